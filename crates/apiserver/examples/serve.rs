//! An API server in memory on a loopback port, for replaying recorded conversations and trying out clients.
//!
//! ```text
//! serve [--listen ADDRESS] [--data-dir DIR] [--service-cidr RANGE]... [--disable-admission-plugins A,B] [--kubeconfig FILE]
//! ```
//!
//! It prints its URL and the administrator's token (always `golden`) on one line each, then serves until it is ended.

use std::sync::Arc;

use portolan_apiserver::{Server, ServerConfig};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    portolan_observe::init_tracing("warn");
    let mut config = ServerConfig::new("203.0.113.10:6443".parse()?);
    let mut listen = "127.0.0.1:0".to_owned();
    config.disable_admission_plugins.clear();
    let mut kubeconfig = None;
    let mut ranges = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| anyhow::anyhow!("{argument} needs a value"));
        match argument.as_str() {
            "--listen" => listen = value()?,
            "--data-dir" => config.data_dir = Some(value()?.into()),
            "--service-cidr" => ranges.push(value()?.parse()?),
            "--disable-admission-plugins" => {
                config.disable_admission_plugins = value()?.split(',').map(str::to_owned).collect();
            }
            "--kubeconfig" => kubeconfig = Some(value()?),
            _ => anyhow::bail!("unknown argument {argument}"),
        }
    }
    if !ranges.is_empty() {
        config.service_cidrs = ranges;
    }
    let listener = std::net::TcpListener::bind(&listen)?;
    let url = format!("https://{}", listener.local_addr()?);
    config.listeners = vec![listener];
    config.admin_token = Some("golden".to_owned());
    let server = Arc::new(Server::start(config).await?);
    if let Some(path) = kubeconfig {
        std::fs::write(path, server.kubeconfig(&url)?)?;
    }
    println!("{url}");
    println!("golden");
    tokio::signal::ctrl_c().await?;
    server.shutdown().await;
    Ok(())
}
