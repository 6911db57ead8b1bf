//! `portolan up`: the composition root of a standalone cluster.
//!
//! One process runs the API server, the controllers, the load balancer, and for each node a kubelet and a service proxy. DNS and the
//! Ingress controller are pods. All of them are ordinary clients of the API; only the transport is shorter.

mod dialer;
mod preflight;
mod system;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use portolan_observe::Observer;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::args;
use crate::fabric::{self, Fabric};
use crate::publish;
use crate::state::{Lock, NodeState, Paths, State, write_private};

/// Namespaces whose pods must be ready before the cluster is.
pub const SYSTEM_NAMESPACES: [&str; 2] = ["kube-system", "ingress-nginx"];
/// DNS suffix of the cluster.
const CLUSTER_DOMAIN: &str = "cluster.local";
/// How long the parts get to stop by themselves.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs the command: in the foreground until a signal, or detached until ready.
pub fn run(args: args::Up) -> Result<()> {
    let started = Instant::now();
    preflight::check(&args.runtime)?;
    let paths = Paths::new(&args.named.name);
    if args.detach && !args.background {
        if let Some(pid) = paths.holder()? {
            bail!("{}", already_runs(&paths, pid));
        }
        return detach(&args, &paths);
    }
    let lock = match paths.lock()? {
        Ok(lock) => lock,
        Err(pid) => bail!("{}", already_runs(&paths, pid)),
    };
    if args.background {
        nix::unistd::setsid().context("cannot leave the terminal's session")?;
    }
    portolan_observe::init_tracing(if args.background { "info" } else { "warn" });
    let runtime = crate::runtime(2)?;
    let result = runtime.block_on(serve(&args, &paths, &lock, started));
    // Blocking work of a part that does not stop must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn already_runs(paths: &Paths, pid: u32) -> String {
    let name = &paths.name;
    format!(
        "cluster {name} runs already (process {pid}); stop it with: portolan down --name {name}, or choose another --name"
    )
}

/// Starts the same command in the background and passes on what it prints until it says that it is ready.
fn detach(args: &args::Up, paths: &Paths) -> Result<()> {
    let data = args.data_dir.clone().unwrap_or_else(|| paths.default_data());
    std::fs::create_dir_all(&data).with_context(|| format!("cannot create {}", data.display()))?;
    let log_path = data.join("up.log");
    let log = std::fs::File::create(&log_path).with_context(|| format!("cannot create {}", log_path.display()))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .arg("--background")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the background process")?;
    let output = child.stdout.take().context("the background process has no output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        if line == READY {
            return Ok(());
        }
        println!("{line}");
    }
    let status = child.wait()?;
    let log = std::fs::read_to_string(&log_path).unwrap_or_default();
    let reason = log.lines().rev().find_map(|l| l.strip_prefix("portolan: ")).unwrap_or("it ended early");
    bail!("{reason} ({status}; log: {})", log_path.display())
}

/// The line that tells the waiting parent to return.
const READY: &str = "--- ready ---";

async fn serve(args: &args::Up, paths: &Paths, _lock: &Lock, started: Instant) -> Result<()> {
    let data = args.data_dir.clone().unwrap_or_else(|| paths.default_data());
    crate::down::clean(paths, &data)?;
    std::fs::create_dir_all(&data).with_context(|| format!("cannot create {}", data.display()))?;
    let data = data.canonicalize()?;
    let shutdown = CancellationToken::new();
    stop_on_signal(shutdown.clone())?;
    let mut parts = Parts::default();
    let result = tokio::select! {
        result = compose(args, paths, &data, started, &shutdown, &mut parts) => result,
        () = shutdown.cancelled() => Ok(()),
    };
    let result = match result {
        Ok(()) => parts.run_until(&shutdown).await,
        Err(error) => Err(error),
    };
    shutdown.cancel();
    parts.stop().await;
    let cleaned = crate::down::clean(paths, &data);
    result.and(cleaned)
}

/// Everything that runs, so that the end of one part is noticed and all are stopped in order.
#[derive(Default)]
struct Parts {
    tasks: JoinSet<(&'static str, Result<()>)>,
    server: Option<portolan_apiserver::Server>,
    kubelets: Vec<portolan_node::Kubelet>,
}

impl Parts {
    fn spawn<E: Into<anyhow::Error>>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.tasks.spawn(async move { (name, part.await.map_err(Into::into)) });
    }

    /// Waits for `shutdown`, or for a part that ends before it: that is an error.
    async fn run_until(&mut self, shutdown: &CancellationToken) -> Result<()> {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            Some(ended) = self.tasks.join_next() => match ended {
                _ if shutdown.is_cancelled() => Ok(()),
                Ok((name, Ok(()))) => bail!("{name} ended unexpectedly"),
                Ok((name, Err(error))) => Err(error).with_context(|| format!("{name} failed")),
                Err(error) => Err(error).context("a part crashed"),
            },
        }
    }

    async fn stop(&mut self) {
        let all = async {
            for kubelet in self.kubelets.drain(..) {
                kubelet.stopped().await;
            }
            while self.tasks.join_next().await.is_some() {}
            if let Some(server) = self.server.take() {
                server.shutdown().await;
            }
        };
        if tokio::time::timeout(STOP_DEADLINE, all).await.is_err() {
            tracing::warn!("some parts did not stop in time");
        }
    }
}

pub fn stop_on_signal(shutdown: CancellationToken) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        shutdown.cancel();
    });
    Ok(())
}

async fn compose(
    args: &args::Up,
    paths: &Paths,
    data: &Path,
    started: Instant,
    shutdown: &CancellationToken,
    parts: &mut Parts,
) -> Result<()> {
    let api_listener = publish::bind(args.api_port, 6443, "--api-port")?;
    let http_listener = publish::bind(args.http_port, 8080, "--http-port")?;
    let https_listener = publish::bind(args.https_port, 8443, "--https-port")?;
    let api_address = api_listener.local_addr()?;
    let mut state = State {
        pid: std::process::id(),
        data_dir: data.to_path_buf(),
        kubeconfig: data.join("kubeconfig"),
        api: api_address,
        http: http_listener.local_addr()?,
        https: https_listener.local_addr()?,
        nodes: Vec::new(),
        ready: false,
    };

    let fabric = Fabric::create(&paths.netns(), args.nodes, args.zones).await?;
    for node in &fabric.nodes {
        let (name, address, zone) = (node.name.clone(), node.address.into(), node.zone.clone());
        state.nodes.push(NodeState { name, address, zone });
    }

    let observer = Observer::new();
    let advertise = SocketAddr::from((fabric::LAN_ROUTER, 6443));
    let inside_listener = listen_inside(&fabric, advertise)?;
    let dialer = Arc::new(dialer::Dialer::new(fabric.router.clone()));
    let mut config = portolan_apiserver::ServerConfig::new(advertise);
    config.data_dir = Some(data.join("apiserver"));
    config.listeners = vec![api_listener, inside_listener];
    config.service_cidrs = vec![ipnet::IpNet::V4(fabric::SERVICE_CIDR)];
    config.dialer = dialer.clone();
    config.observer = observer.clone();
    // All plug-ins run: the node life cycle controller takes the taint of new nodes away.
    config.disable_admission_plugins.clear();
    let server = portolan_apiserver::Server::start(config).await.context("cannot start the API server")?;
    write_private(&state.kubeconfig, server.kubeconfig(&format!("https://{api_address}"))?.as_bytes())?;
    paths.write_state(&state)?;
    let ca = server.ca_pem();
    let client = |user: &str| local_client(&server, user);
    say(&format!("API server  https://{api_address}"));

    let controllers = portolan_controller::Config { cluster_ca: Some(ca.clone()), ..Default::default() };
    let controller_client = client("system:kube-controller-manager");
    parts.spawn(
        "controller",
        portolan_controller::run(controllers, controller_client, observer.clone(), shutdown.clone()),
    );

    let images = portolan_node::ImageStore::open(data.join("images")).context("cannot open the image store")?;
    let proxy_metrics = observer.register(portolan_dataplane::Metrics::register);
    write_private(&paths.outside_resolv_conf(), format!("nameserver {}\n", fabric::OUTSIDE_ROUTER).as_bytes())?;
    make_readable(&paths.outside_resolv_conf())?;
    for node in &fabric.nodes {
        let config = portolan_node::NodeConfig {
            name: node.name.clone(),
            zone: node.zone.clone(),
            netns: node.netns.clone(),
            pod_cidr: node.pod_cidr.into(),
            node_ip: node.address.into(),
            cluster_dns: vec![fabric::DNS_IP.into()],
            cluster_domain: CLUSTER_DOMAIN.into(),
            state_dir: data.to_path_buf(),
            run_dir: paths.run.clone(),
            images: images.clone(),
            allow_pull: args.allow_pull,
            runtime: portolan_node::RuntimeConfig { program: args.runtime.clone() },
            // A node is a host on the LAN and its pods resolve as those do, not as the machine does: nothing leaves it by default.
            host_resolv_conf: Some(paths.outside_resolv_conf()),
            max_pods: 250,
        };
        let user = format!("system:node:{}", node.name);
        let kubelet = portolan_node::Kubelet::start(config, client(&user), observer.clone(), shutdown.clone())
            .await
            .with_context(|| format!("cannot start {}", node.name))?;
        dialer.add(node.name.clone(), kubelet.clone());
        parts.kubelets.push(kubelet);
        let mut agent = portolan_dataplane::AgentConfig::new(node.name.clone(), node.netns.clone(), "vp");
        agent.metrics = Some(proxy_metrics.clone());
        let agent_client = client("system:kube-proxy");
        parts.spawn("service proxy", portolan_dataplane::run(agent, agent_client, observer.clone(), shutdown.clone()));
    }
    for node in &fabric.nodes {
        say(&format!("node        {} {} {}", node.name, node.address, node.zone));
    }

    let lb = portolan_lb::Config::new(fabric.router.clone(), vec![ipnet::IpNet::V4(fabric::LB_POOL)]);
    let lb_client = client("system:cloud-controller-manager");
    parts.spawn("load balancer", portolan_lb::run(lb, lb_client, observer.clone(), shutdown.clone()));

    let upstreams: Vec<SocketAddr> = args.dns_upstream.iter().map(|u| u.0).collect();
    let published = portolan_dns::Config {
        listen: vec![SocketAddr::from((fabric::OUTSIDE_ROUTER, 53))],
        netns: Some(fabric.router.clone()),
        upstreams: upstreams.clone(),
        published: true,
        ..Default::default()
    };
    let dns_client = client("system:published-dns");
    parts.spawn("published DNS", portolan_dns::run(published, dns_client, observer.clone(), shutdown.clone()));

    let admin = client("system:admin");
    system::apply(&admin, &upstreams).await?;

    let ingress = ingress_address(admin.clone(), shutdown.clone());
    for (listener, port) in [(http_listener, 80), (https_listener, 443)] {
        let relay = publish::relay(listener, fabric.outside.clone(), ingress.clone(), port, shutdown.clone());
        parts.spawn("published ports", relay);
    }
    parts.server = Some(server);

    let wait = Duration::from_secs(args.wait);
    let names: Vec<String> = fabric.nodes.iter().map(|n| n.name.clone()).collect();
    let ready = tokio::select! {
        ready = tokio::time::timeout(wait, wait_ready(&admin, &names, &observer, ingress)) => ready,
        ended = parts.run_until(shutdown) => return ended,
    };
    match ready {
        Ok(ready) => ready?,
        Err(_) => {
            let gates = observer.not_ready();
            let gates = gates.iter().map(|(n, r)| format!("{n}: {r}")).collect::<Vec<_>>().join("; ");
            bail!("not ready after {} s; look at the log, or wait longer with --wait. {gates}", args.wait);
        }
    }
    state.ready = true;
    paths.write_state(&state)?;
    say(&format!("Ingress     http://{}  https://{}", state.http, state.https));
    say(&format!("kubeconfig  {}", state.kubeconfig.display()));
    say(&format!("ready in {:.1} s; stop with: portolan down --name {}", started.elapsed().as_secs_f64(), paths.name));
    if args.background {
        say(READY);
        let null = std::fs::File::options().write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(null).context("cannot let go of the output")?;
    } else {
        say("press Ctrl-C to stop it");
    }
    Ok(())
}

/// A client of the server in this process, acting as a component of the cluster.
pub fn local_client(server: &portolan_apiserver::Server, user: &str) -> kube::Client {
    let user = portolan_apiserver::User::new(user, &["system:masters"]);
    kube::Client::new(server.local_service(user), "default")
}

/// A line for the person or parent process that waits; nobody listening is no error.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn listen_inside(fabric: &Fabric, address: SocketAddr) -> Result<std::net::TcpListener> {
    let listener = fabric.router.run(|| std::net::TcpListener::bind(address))?;
    let listener = listener.with_context(|| format!("cannot listen on {address} inside"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn make_readable(path: &PathBuf) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))?;
    Ok(())
}

/// Follows the load-balancer address of the Ingress controller's Service.
fn ingress_address(client: kube::Client, shutdown: CancellationToken) -> watch::Receiver<Option<IpAddr>> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let api: Api<Service> = Api::namespaced(client, "ingress-nginx");
        let config = watcher::Config::default().fields("metadata.name=ingress-nginx-controller");
        let mut services = watcher(api, config).default_backoff().applied_objects().boxed();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                next = services.try_next() => match next {
                    Ok(Some(service)) => {
                        let ingress = service.status.and_then(|s| s.load_balancer).and_then(|l| l.ingress);
                        let address = ingress.into_iter().flatten().find_map(|i| i.ip?.parse().ok());
                        sender.send_replace(address);
                    }
                    Ok(None) => return,
                    Err(error) => tracing::debug!(%error, "cannot watch the Ingress controller's Service"),
                },
            }
        }
    });
    receiver
}

/// Waits until nodes are Ready, system Deployments available, and every part has done its first sync.
async fn wait_ready(
    client: &kube::Client,
    nodes: &[String],
    observer: &Observer,
    mut ingress: watch::Receiver<Option<IpAddr>>,
) -> Result<()> {
    let ready_node = |node: Option<&Node>| node.is_some_and(crate::status::node_ready);
    for name in nodes {
        let api: Api<Node> = Api::all(client.clone());
        kube::runtime::wait::await_condition(api, name, ready_node).await?;
    }
    for namespace in SYSTEM_NAMESPACES {
        let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
        for deployment in api.list(&Default::default()).await?.items {
            let name = deployment.metadata.name.unwrap_or_default();
            kube::runtime::wait::await_condition(api.clone(), &name, available).await?;
        }
    }
    observer.wait_ready().await;
    ingress.wait_for(Option::is_some).await?;
    Ok(())
}

fn available(deployment: Option<&Deployment>) -> bool {
    let Some(deployment) = deployment else { return false };
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let status = deployment.status.as_ref();
    status.and_then(|s| s.observed_generation) == deployment.metadata.generation
        && status.and_then(|s| s.available_replicas).unwrap_or(0) >= wanted
}
