//! One component alone, against any API server.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use portolan_controller::Controller;
use portolan_linux::Netns;
use portolan_observe::Observer;
use portolan_plan::zone::{Options, PodMode};
use tokio_util::sync::CancellationToken;

use crate::args;
use crate::state::write_private;

/// Starts logging and the admin endpoints, and returns what a component is given.
struct Start {
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
}

async fn start(connection: &args::Connection, metrics: Option<SocketAddr>) -> Result<Start> {
    portolan_observe::init_tracing("info");
    let shutdown = CancellationToken::new();
    crate::up::stop_on_signal(shutdown.clone())?;
    let client = portolan_client::connect(connection.kubeconfig.as_deref()).await?;
    let observer = Observer::new();
    if let Some(address) = metrics {
        let listener = std::net::TcpListener::bind(address)
            .with_context(|| format!("cannot serve metrics on {address}; choose another with --metrics-address"))?;
        tokio::spawn(portolan_observe::serve_admin(listener, observer.clone(), shutdown.clone()));
    }
    Ok(Start { client, observer, shutdown })
}

fn netns(path: Option<&Path>) -> Result<Netns> {
    Ok(match path {
        Some(path) => Netns::open(path)?,
        None => Netns::current()?,
    })
}

/// `portolan proxy`
pub async fn proxy(args: args::Proxy) -> Result<()> {
    // The proxy serves its own metrics: it has paths that other components have not.
    let Start { client, observer, shutdown } = start(&args.connection, None).await?;
    let mut config =
        portolan_dataplane::AgentConfig::new(args.node_name, netns(args.netns.as_deref())?, args.pod_interface_prefix);
    (config.node_port_addresses, config.localhost_node_ports) =
        portolan_dataplane::NodePortAddresses::parse(&args.nodeport_addresses).context("--nodeport-addresses")?;
    config.cluster_cidrs = args.cluster_cidr;
    config.masquerade_all = args.masquerade_all;
    config.healthz_address = Some(args.healthz_address);
    config.metrics_address = Some(args.metrics_address);
    Ok(portolan_dataplane::run(config, client, observer, shutdown).await?)
}

/// `portolan dns`
pub async fn dns(args: args::Dns) -> Result<()> {
    let Start { client, observer, shutdown } = start(&args.connection, None).await?;
    let any = |port: u16| Some(SocketAddr::from(([0, 0, 0, 0], port)));
    let config = portolan_dns::Config {
        listen: args.listen,
        cluster_domain: args.cluster_domain,
        upstreams: args.upstream.iter().map(|u| u.0).collect(),
        // As in the manifest that CoreDNS is usually installed with.
        options: Options { pods: PodMode::Insecure, ..Default::default() },
        lame_duck: Duration::from_secs(5),
        health: any(8080),
        ready: any(8181),
        metrics: any(9153),
        ..Default::default()
    };
    Ok(portolan_dns::run(config, client, observer, shutdown).await?)
}

/// `portolan gateway`
pub async fn gateway(args: args::Gateway) -> Result<()> {
    let Start { client, observer, shutdown } = start(&args.connection, None).await?;
    let publish_service = match &args.publish_service {
        Some(text) => {
            let (namespace, name) =
                text.split_once('/').with_context(|| format!("--publish-service {text}: expected NAMESPACE/NAME"))?;
            Some((namespace.to_string(), name.to_string()))
        }
        None => None,
    };
    let mut config = portolan_gateway::Config {
        http: args.http,
        https: args.https,
        publish_service,
        admin: Some(args.metrics_address),
        ..Default::default()
    };
    if let Some(workers) = args.workers {
        config.workers = workers.get();
    }
    Ok(portolan_gateway::run(config, client, observer, shutdown).await?)
}

/// `portolan controller`
pub async fn controller(args: args::Controller) -> Result<()> {
    let enabled = controllers(&args.controllers)?;
    let Start { client, observer, shutdown } = start(&args.connection, Some(args.metrics_address)).await?;
    let leader_election = args.leader_elect.then(|| {
        let host = nix::unistd::gethostname().unwrap_or_default();
        let identity = format!("{}_{}", host.display(), std::process::id());
        portolan_client::leader::Election::new("kube-system", "portolan-controller", identity)
    });
    let config = portolan_controller::Config {
        enabled,
        leader_election,
        max_endpoints_per_slice: args.max_endpoints_per_slice.into(),
        ..Default::default()
    };
    Ok(portolan_controller::run(config, client, observer, shutdown).await?)
}

/// `portolan lb`
pub async fn lb(args: args::Lb) -> Result<()> {
    let Start { client, observer, shutdown } = start(&args.connection, Some(args.metrics_address)).await?;
    let config = portolan_lb::Config::new(netns(args.netns.as_deref())?, args.pool);
    Ok(portolan_lb::run(config, client, observer, shutdown).await?)
}

/// `portolan apiserver`: prints its address and serves until a signal.
pub async fn apiserver(args: args::Apiserver) -> Result<()> {
    portolan_observe::init_tracing("info");
    let shutdown = CancellationToken::new();
    crate::up::stop_on_signal(shutdown.clone())?;
    let listener = std::net::TcpListener::bind(args.listen)
        .with_context(|| format!("cannot listen on {}; choose another address with --listen", args.listen))?;
    let address = listener.local_addr()?;
    let token = uuid::Uuid::new_v4().to_string();
    let advertise = args.advertise_address.unwrap_or(address);
    if advertise.ip().is_loopback() {
        bail!("pods cannot reach the loopback address {advertise}; name one that they can with --advertise-address");
    }
    let enabled = controllers(&args.controllers)?;
    let mut config = portolan_apiserver::ServerConfig::new(advertise);
    config.disable_admission_plugins = args.disable_admission_plugins;
    config.data_dir = args.data_dir;
    config.service_cidrs = args.service_cluster_ip_range;
    config.listeners = vec![listener];
    config.admin_token = Some(token.clone());
    let server = portolan_apiserver::Server::start(config).await?;
    let url = format!("https://{address}");
    if let Some(dir) = &args.credentials_out {
        write_private(&dir.join("kubeconfig"), server.kubeconfig(&url)?.as_bytes())?;
        write_private(&dir.join("ca.crt"), server.ca_pem().as_bytes())?;
        write_private(&dir.join("token"), token.as_bytes())?;
    }
    println!("{url}");
    if !enabled.is_empty() {
        let config = portolan_controller::Config { enabled, cluster_ca: Some(server.ca_pem()), ..Default::default() };
        let client = crate::up::local_client(&server, "system:kube-controller-manager");
        portolan_controller::run(config, client, Observer::new(), shutdown.clone()).await?;
    } else {
        shutdown.cancelled().await;
    }
    server.shutdown().await;
    Ok(())
}

/// Reads a list of controllers as kube-controller-manager does: `*` is all, `-name` takes one away.
fn controllers(names: &[String]) -> Result<BTreeSet<Controller>> {
    let parse = |name: &str| {
        let known = || Controller::ALL.map(Controller::name).join(", ");
        Controller::parse(name).with_context(|| format!("there is no controller {name}; there are: {}", known()))
    };
    let mut enabled = BTreeSet::new();
    for name in names {
        match name.strip_prefix('-') {
            Some(name) => drop(enabled.remove(&parse(name)?)),
            None if name == "*" => enabled.extend(Controller::ALL),
            None => drop(enabled.insert(parse(name)?)),
        }
    }
    Ok(enabled)
}

/// `portolan echo`
pub async fn echo(args: args::Echo) -> Result<()> {
    let only_others = args.port.is_empty() && !(args.tcp_port.is_empty() && args.udp_port.is_empty());
    let http_ports = if args.port.is_empty() && !only_others { vec![8080] } else { args.port };
    let config = portolan_node::echo::EchoConfig {
        http_ports,
        tcp_ports: args.tcp_port,
        udp_ports: args.udp_port,
        identity: portolan_node::echo::Identity::from_env(),
        ..Default::default()
    };
    Ok(portolan_node::echo::run(config).await?)
}
