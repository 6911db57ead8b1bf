//! Cluster DNS: answers for the cluster's names, forwarding of the others, and the sockets in between.
//!
//! Input are queries over UDP and TCP and, by watch, the objects that [`portolan_plan::zone`] compiles. [`answer`] decides as
//! a pure function from request bytes to response bytes; the other modules carry bytes. Behaviour is that of CoreDNS with the
//! kubernetes plugin except where ARCHITECTURE.md names a difference.

pub mod answer;
mod forward;
mod metrics;
mod probe;
mod tcp;
mod udp;
mod watch;
pub mod wire;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use portolan_linux::Netns;
use portolan_observe::Observer;
use portolan_plan::zone::{Options, Published, ZoneBuilder, ZoneSet};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use answer::{Fallthrough, Outcome, Settings, Summary, Transport, Zone};
use forward::{Failure, Forwarder};
use metrics::{Metrics, Recorder};
use udp::Peer;
use wire::Rcode;

/// What a DNS server is told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses for UDP and TCP; port 0 picks a free one. A wildcard address answers from the address that was asked.
    pub listen: Vec<SocketAddr>,
    /// Namespace to make the sockets in; `None`: where the process runs.
    pub netns: Option<Netns>,
    /// The cluster's domain without the final dot, as in `cluster.local`.
    pub cluster_domain: String,
    /// Where names outside the served zones go, in turn. Empty: they are refused at once and nothing is sent anywhere.
    pub upstreams: Vec<SocketAddr>,
    /// Which names exist (pod names, namespaces, endpoint names).
    pub options: Options,
    /// Seconds that answers may be kept by clients, 0 to 3600.
    pub ttl: u32,
    /// Serve published names (hosts of Ingresses, annotated Services) instead of the cluster's own.
    pub published: bool,
    /// Addresses of this server itself, which the NS record of a zone names; found in an EndpointSlice if it is one of a
    /// Service's.
    pub own_addresses: Vec<IpAddr>,
    /// How long to wait for the first lists before answering regardless.
    pub startup_timeout: Duration,
    /// How long to go on answering after shutdown began, so that the data plane can move clients away.
    pub lame_duck: Duration,
    /// Where to serve `/health`, if at all (CoreDNS: port 8080).
    pub health: Option<SocketAddr>,
    /// Where to serve `/ready`, if at all (CoreDNS: port 8181).
    pub ready: Option<SocketAddr>,
    /// Where to serve `/metrics`, if at all (CoreDNS: port 9153).
    pub metrics: Option<SocketAddr>,
    /// Queries being forwarded at once before more are refused; 0: no limit.
    pub max_concurrent: usize,
    /// UDP sockets per address, each served on its own.
    pub workers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: Vec::new(),
            netns: None,
            cluster_domain: "cluster.local".into(),
            upstreams: Vec::new(),
            options: Options::default(),
            ttl: 5,
            published: false,
            own_addresses: Vec::new(),
            startup_timeout: Duration::from_secs(5),
            lame_duck: Duration::ZERO,
            health: None,
            ready: None,
            metrics: None,
            max_concurrent: 1000,
            workers: 1,
        }
    }
}

/// Why a DNS server could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket could not be made.
    #[error("cannot listen on {address} ({transport}): {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// `udp`, `tcp` or `http`.
        transport: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The cluster domain is not a domain name.
    #[error("cluster domain {0:?} is not a domain name")]
    Domain(String),
    /// Queries would come back to this server.
    #[error(
        "upstream {0} would send queries back to this server or to nobody; name a server that is reachable from here \
         (behind systemd-resolved, one of those in /run/systemd/resolve/resolv.conf)"
    )]
    Loop(SocketAddr),
}

/// Where answers come from.
enum Names {
    Cluster(Arc<ArcSwap<ZoneSet>>),
    Published(Arc<ArcSwap<Published>>),
}

/// What all workers share.
struct Server {
    settings: Settings,
    names: Names,
    forwarder: Forwarder,
    metrics: Arc<Metrics>,
}

impl Server {
    fn answer(&self, request: &[u8], transport: Transport, seed: u64, out: &mut Vec<u8>) -> Outcome {
        match &self.names {
            Names::Cluster(set) => answer::answer(&self.settings, &set.load(), request, transport, seed, out),
            Names::Published(names) => {
                answer::answer_published(&self.settings, &names.load(), request, transport, seed, out)
            }
        }
    }

    /// Completes a query that needs an upstream.
    async fn resolve(&self, outcome: Outcome, request: &[u8], transport: Transport, out: &mut Vec<u8>) -> Outcome {
        match outcome {
            Outcome::Forward => match self.forwarder.exchange(request, transport, &self.metrics).await {
                Ok(reply) => answer::relay(request, transport, &reply, out),
                Err(Failure::Busy) => answer::fail(request, transport, Rcode::Refused, out),
                Err(Failure::NoAnswer) => answer::fail(request, transport, Rcode::ServFail, out),
            },
            Outcome::Chase(chain) => {
                let reply = match chain.query(request) {
                    Some(query) => self.forwarder.exchange(&query, transport, &self.metrics).await.ok(),
                    None => None,
                };
                answer::complete(&chain, request, transport, reply.as_deref(), out)
            }
            Outcome::Reply(_) | Outcome::Ignore => outcome,
        }
    }

    fn record(
        &self,
        recorder: &mut Recorder,
        summary: Summary,
        from: (IpAddr, Transport),
        sizes: (usize, usize),
        took: Duration,
    ) {
        recorder.record(summary, self.settings.zone_text(summary.zone), from, sizes, took);
    }
}

/// A sequence of seeds for the order of addresses.
struct Seeds(u64);

impl Seeds {
    fn new() -> Seeds {
        Seeds(rand::random())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // 0 would mean "do not shuffle".
        self.0 | 1
    }
}

fn within<T: Send>(netns: Option<&Netns>, make: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    match netns {
        Some(netns) => netns.run(make)?,
        None => make(),
    }
}

fn listen_http(netns: Option<&Netns>, address: SocketAddr) -> Result<std::net::TcpListener, Error> {
    let bind = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    within(netns, bind).map_err(|source| Error::Listen { address, transport: "http", source })
}

/// The sockets of one address. With port 0 TCP picks the port and UDP follows.
fn listen_dns(netns: Option<&Netns>, address: SocketAddr, workers: usize) -> Result<Sockets, Error> {
    let failed = |transport| move |source| Error::Listen { address, transport, source };
    let listener = within(netns, || tcp::bind(address)).map_err(failed("tcp"))?;
    let bound = listener.local_addr().map_err(failed("tcp"))?;
    let udp = (0..workers.max(1)).map(|_| within(netns, || udp::bind(bound))).collect::<io::Result<_>>();
    Ok(Sockets { tcp: listener, udp: udp.map_err(failed("udp"))? })
}

struct Sockets {
    tcp: std::net::TcpListener,
    udp: Vec<std::net::UdpSocket>,
}

/// The addresses of the interfaces, without loopback and link-local ones.
fn interface_addresses(netns: Option<&Netns>) -> Vec<IpAddr> {
    let list = || {
        let interfaces = nix::ifaddrs::getifaddrs()?;
        let addresses = interfaces.filter_map(|i| {
            let address = i.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
        });
        Ok(addresses.collect::<Vec<_>>())
    };
    let mut found = within(netns, list).unwrap_or_default();
    found.retain(|a| match a {
        IpAddr::V4(a) => !a.is_loopback() && !a.is_link_local(),
        IpAddr::V6(a) => !a.is_loopback() && !a.is_unicast_link_local(),
    });
    found.sort_unstable();
    found.dedup();
    found
}

fn settings(config: &Config, own_addresses: Vec<IpAddr>) -> Result<Settings, Error> {
    let domain = Zone::new(&config.cluster_domain).filter(|z| z.text() != ".");
    let domain = domain.ok_or_else(|| Error::Domain(config.cluster_domain.clone()))?;
    let reverse = || ["in-addr.arpa", "ip6.arpa"].into_iter().filter_map(Zone::new);
    let mut settings = Settings::new(std::iter::once(domain).chain(reverse()).collect());
    settings.ttl = config.ttl.min(3600);
    settings.forwards = !config.upstreams.is_empty();
    // Reverse names that are not the cluster's belong to somebody else; without an upstream there is nobody to ask.
    if settings.forwards {
        settings.fallthrough = Fallthrough::Zones(reverse().collect());
    }
    settings.own_addresses = own_addresses;
    Ok(settings)
}

/// Serves DNS until `shutdown`.
///
/// Returns when the lame-duck time is over and what was asked before has been answered.
///
/// # Errors
/// Fails when a socket cannot be made or the configuration cannot work. Trouble with the API server is no error: the last
/// known names are served.
pub async fn run(
    config: Config,
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let netns = config.netns.as_ref();
    let own = if config.own_addresses.is_empty() { interface_addresses(netns) } else { config.own_addresses.clone() };
    let is_ours = |u: &SocketAddr| {
        config
            .listen
            .iter()
            .any(|l| l.port() == u.port() && (l.ip() == u.ip() || l.ip().is_unspecified() && own.contains(&u.ip())))
    };
    if let Some(bad) = config.upstreams.iter().find(|u| u.ip().is_loopback() || u.ip().is_unspecified() || is_ours(u)) {
        return Err(Error::Loop(*bad));
    }
    let settings = settings(&config, own)?;
    let gate = observer.gate("dns");
    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let tasks = TaskTracker::new();

    // The cheap endpoints come first, so that a probe during the first sync is told what is going on.
    let draining = Arc::new(AtomicBool::new(false));
    let (synced_tx, mut synced) = tokio::sync::watch::channel(false);
    if let Some(address) = config.health {
        serve_probe(&tasks, listen_http(netns, address)?, "/health", Arc::new(|| Ok(())), &stop, address)?;
    }
    if let Some(address) = config.ready {
        let (draining, synced) = (Arc::clone(&draining), synced.clone());
        let state = move || match (draining.load(Ordering::Relaxed), *synced.borrow()) {
            (true, _) => Err("Shutting down".to_string()),
            (false, false) => Err("kubernetes".to_string()),
            (false, true) => Ok(()),
        };
        serve_probe(&tasks, listen_http(netns, address)?, "/ready", Arc::new(state), &stop, address)?;
    }
    if let Some(address) = config.metrics {
        let listener = listen_http(netns, address)?;
        tasks.spawn(portolan_observe::serve_admin(listener, observer.clone(), stop.clone()));
    }
    let sockets: Vec<Sockets> =
        config.listen.iter().map(|a| listen_dns(netns, *a, config.workers)).collect::<Result<_, _>>()?;
    let port = sockets.first().and_then(|s| s.tcp.local_addr().ok()).map_or(53, |a| a.port());
    let metrics = Arc::new(observer.register(|r| Metrics::new(port, r)));

    let names = if config.published {
        let names = Arc::new(ArcSwap::from_pointee(Published::default()));
        let follow = watch::follow_published(client, Arc::clone(&names), synced_tx);
        tasks.spawn(stop.clone().run_until_cancelled_owned(follow));
        Names::Published(names)
    } else {
        let builder = ZoneBuilder::new(config.options.clone());
        let set = Arc::new(ArcSwap::from_pointee(builder.set().clone()));
        let follow = watch::follow_cluster(client, builder, Arc::clone(&set), synced_tx, Arc::clone(&metrics));
        tasks.spawn(stop.clone().run_until_cancelled_owned(follow));
        Names::Cluster(set)
    };
    let forwarder = Forwarder::new(config.upstreams.clone(), config.netns.clone(), config.max_concurrent);
    let server = Arc::new(Server { settings, names, forwarder, metrics });

    let first_sync = async {
        let _ = synced.wait_for(|s| *s).await;
    };
    tokio::select! {
        () = first_sync => gate.ready(),
        () = tokio::time::sleep(config.startup_timeout) => {
            tracing::warn!("starting server with unsynced Kubernetes API");
            gate.not_ready("waiting for the Kubernetes API");
            let (gate, mut synced, draining) = (gate.clone(), synced.clone(), Arc::clone(&draining));
            tasks.spawn(stop.clone().run_until_cancelled_owned(async move {
                let done = synced.wait_for(|s| *s).await.is_ok();
                if done && !draining.load(Ordering::Relaxed) {
                    gate.ready();
                }
            }));
        }
        () = shutdown.cancelled() => return Ok(()),
    }
    for set in sockets {
        if let Ok(address) = set.tcp.local_addr() {
            tracing::info!(%address, "answering DNS queries");
        }
        for socket in set.udp {
            let worker = udp_worker(Arc::clone(&server), socket, stop.clone(), tasks.clone());
            tasks.spawn(worker);
        }
        tasks.spawn(tcp::serve(Arc::clone(&server), set.tcp, stop.clone(), tasks.clone()));
    }

    shutdown.cancelled().await;
    draining.store(true, Ordering::Relaxed);
    gate.not_ready("shutting down");
    tokio::time::sleep(config.lame_duck).await;
    stop.cancel();
    tasks.close();
    // What is being forwarded may take its five seconds; a client does not wait longer.
    let _ = tokio::time::timeout(Duration::from_secs(5), tasks.wait()).await;
    Ok(())
}

fn serve_probe(
    tasks: &TaskTracker,
    listener: std::net::TcpListener,
    path: &'static str,
    state: probe::State,
    stop: &CancellationToken,
    address: SocketAddr,
) -> Result<(), Error> {
    let listener = tokio::net::TcpListener::from_std(listener);
    let listener = listener.map_err(|source| Error::Listen { address, transport: "http", source })?;
    tasks.spawn(probe::serve(listener, path, state, stop.clone()));
    Ok(())
}

/// Answers datagrams of one socket. Queries that need an upstream go to a task of their own, so that a slow upstream holds
/// up nobody else.
async fn udp_worker(server: Arc<Server>, socket: std::net::UdpSocket, stop: CancellationToken, tasks: TaskTracker) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => Arc::new(socket),
        Err(error) => {
            tracing::error!(%error, "cannot wait for datagrams");
            return;
        }
    };
    let mut received = udp::Received::new();
    let mut recorder = Recorder::new(Arc::clone(&server.metrics));
    let mut seeds = Seeds::new();
    let mut replies: Vec<(Peer, Vec<u8>)> = Vec::with_capacity(udp::BATCH);
    let mut spare: Vec<Vec<u8>> = Vec::with_capacity(udp::BATCH);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            readable = socket.readable() => if readable.is_err() { return },
        }
        // A bounded number of batches at a time leaves room for the runtime's other tasks.
        for _ in 0..16 {
            match socket.try_io(Interest::READABLE, || received.read(&*socket)) {
                Ok(_) => {
                    answer_batch(
                        &server,
                        &received,
                        &socket,
                        &mut seeds,
                        &mut recorder,
                        &mut replies,
                        &mut spare,
                        &tasks,
                    );
                    udp::send(&*socket, &replies);
                    spare.extend(replies.drain(..).map(|(_, out)| out));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error of an earlier answer; the socket goes on.
                Err(error) => tracing::trace!(%error, "cannot read queries"),
            }
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of one worker's state, borrowed apart")]
fn answer_batch(
    server: &Arc<Server>,
    received: &udp::Received,
    socket: &Arc<UdpSocket>,
    seeds: &mut Seeds,
    recorder: &mut Recorder,
    replies: &mut Vec<(Peer, Vec<u8>)>,
    spare: &mut Vec<Vec<u8>>,
    tasks: &TaskTracker,
) {
    for (request, peer) in received.iter() {
        let started = Instant::now();
        let mut out = spare.pop().unwrap_or_default();
        match server.answer(request, Transport::Udp, seeds.next(), &mut out) {
            Outcome::Reply(summary) => {
                let from = (peer.address.ip(), Transport::Udp);
                server.record(recorder, summary, from, (request.len(), out.len()), started.elapsed());
                replies.push((peer, out));
            }
            Outcome::Ignore => spare.push(out),
            outcome @ (Outcome::Forward | Outcome::Chase(_)) => {
                let (server, socket, request) = (Arc::clone(server), Arc::clone(socket), request.to_vec());
                tasks.spawn(async move {
                    if let Outcome::Reply(summary) = server.resolve(outcome, &request, Transport::Udp, &mut out).await {
                        let mut recorder = Recorder::new(Arc::clone(&server.metrics));
                        let from = (peer.address.ip(), Transport::Udp);
                        server.record(&mut recorder, summary, from, (request.len(), out.len()), started.elapsed());
                        udp::send(&*socket, &[(peer, out)]);
                    }
                });
            }
        }
    }
}
