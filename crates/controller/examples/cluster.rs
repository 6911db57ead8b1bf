//! An API server in memory with controllers, without nodes, for replaying recorded conversations and trying things out.
//!
//! ```text
//! cluster [--listen ADDRESS] [--service-cidr RANGE]... [--controllers NAME,... | --without NAME,...]
//!         [--disable-admission-plugins A,B] [--kubeconfig FILE]
//! ```
//!
//! It prints its URL and the administrator's token (always `golden`) on one line each, then serves until it is ended. The
//! recorded conversations want it `--without scheduler,pod-garbage-collector-controller`, because their
//! nodes and pods are bare objects; those of workloads also want the admission plugin ServiceAccount off.

use std::collections::BTreeSet;
use std::sync::Arc;

use portolan_apiserver::{Server, ServerConfig, User};
use portolan_controller::{Config, Controller};
use portolan_observe::Observer;
use tokio_util::sync::CancellationToken;

fn controllers(names: &str) -> anyhow::Result<BTreeSet<Controller>> {
    names.split(',').map(|n| Controller::parse(n).ok_or_else(|| anyhow::anyhow!("unknown controller {n}"))).collect()
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    portolan_observe::init_tracing("warn");
    let mut server_config = ServerConfig::new("203.0.113.10:6443".parse()?);
    let mut config = Config::default();
    let mut listen = "127.0.0.1:0".to_owned();
    let mut kubeconfig = None;
    let mut ranges = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| anyhow::anyhow!("{argument} needs a value"));
        match argument.as_str() {
            "--listen" => listen = value()?,
            "--service-cidr" => ranges.push(value()?.parse()?),
            "--controllers" => config.enabled = controllers(&value()?)?,
            "--without" => {
                let without = controllers(&value()?)?;
                config.enabled.retain(|c| !without.contains(c));
            }
            "--disable-admission-plugins" => {
                server_config.disable_admission_plugins = value()?.split(',').map(str::to_owned).collect();
            }
            "--kubeconfig" => kubeconfig = Some(value()?),
            _ => anyhow::bail!("unknown argument {argument}"),
        }
    }
    if !ranges.is_empty() {
        server_config.service_cidrs = ranges;
    }
    let listener = std::net::TcpListener::bind(&listen)?;
    let url = format!("https://{}", listener.local_addr()?);
    server_config.listeners = vec![listener];
    server_config.admin_token = Some("golden".to_owned());
    let server = Arc::new(Server::start(server_config).await?);
    if let Some(path) = kubeconfig {
        std::fs::write(path, server.kubeconfig(&url)?)?;
    }
    config.cluster_ca = Some(server.ca_pem());
    let user = User::new("system:kube-controller-manager", &["system:masters"]);
    let client = kube::Client::new(server.local_service(user), "default");
    let shutdown = CancellationToken::new();
    let observer = Observer::new();
    let running = tokio::spawn(portolan_controller::run(config, client, observer.clone(), shutdown.clone()));
    tokio::task::yield_now().await;
    observer.wait_ready().await;
    println!("{url}");
    println!("golden");
    tokio::signal::ctrl_c().await?;
    shutdown.cancel();
    running.await??;
    server.shutdown().await;
    Ok(())
}
