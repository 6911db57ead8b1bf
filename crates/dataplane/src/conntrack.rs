//! Removes UDP flows that point where no traffic should go, through conntrack's netlink interface.
//!
//! The rules decide about a flow's first packet only, so a client that keeps its port would stay with an endpoint that is
//! gone. What has to go is decided from the current map alone (services.md 3.6), so that missed events and restarts heal.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use portolan_linux::Netns;
use portolan_nft::netlink::socket::Socket;
use portolan_plan::endpoint::Backend;
use portolan_plan::service::{Frontend, FrontendAddr, ServiceMap};
use portolan_plan::world::{IpFamily, L4};
use tracing::{debug, warn};

/// A tracked UDP flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// Client's address.
    pub source: IpAddr,
    /// Client's port.
    pub source_port: u16,
    /// What the client addressed.
    pub destination: IpAddr,
    /// Port that the client addressed.
    pub destination_port: u16,
    /// Where answers come from: the endpoint, when the flow was translated.
    pub reply_source: IpAddr,
    /// Port that answers come from.
    pub reply_source_port: u16,
}

/// What UDP flows are held to: the UDP frontends of a [`ServiceMap`], and those that went away lately. The proxy keeps it up to
/// date with work that follows the change; the [`FlowCleaner`] reads it on another thread.
#[derive(Debug, Default)]
pub struct UdpView {
    serving: HashMap<Frontend, Arc<[Backend]>>,
    /// With the number of the look that has to find their flows.
    removed: HashMap<Frontend, u64>,
    node_port_addresses: BTreeSet<IpAddr>,
    local_addresses: BTreeSet<IpAddr>,
}

impl UdpView {
    /// Takes over what `map` says about some frontends; `look` is the number of the next look.
    pub fn update(&mut self, map: &ServiceMap, frontends: impl IntoIterator<Item = Frontend>, look: u64) {
        for frontend in frontends.into_iter().filter(|f| f.protocol == L4::Udp) {
            let service = map.frontends.get(&frontend).and_then(|t| map.services.get(&t.service));
            match service {
                Some(service) => {
                    self.removed.remove(&frontend);
                    self.serving.insert(frontend, service.serving.clone());
                }
                None => {
                    if self.serving.remove(&frontend).is_some() {
                        self.removed.insert(frontend, look);
                    }
                }
            }
        }
    }

    /// Takes over the node's addresses.
    pub fn set_addresses(&mut self, map: &ServiceMap) {
        self.node_port_addresses.clone_from(&map.node_port_addresses);
        self.local_addresses.clone_from(&map.local_addresses);
    }

    /// Whether a flow has to go: one to a UDP frontend whose answers come from anything but an endpoint that is ready or
    /// serving, and a translated one to a frontend that is no more.
    pub fn is_stale(&self, flow: &Flow) -> bool {
        let Ok(port) = flow.destination_port.try_into() else { return false };
        let family = IpFamily::of(&flow.destination);
        let exact = Frontend { addr: FrontendAddr::Address(flow.destination), protocol: L4::Udp, port };
        // Node ports only on addresses that carry them, or unrelated flows would be cut.
        let node_port = self
            .node_port_addresses
            .contains(&flow.destination)
            .then_some(Frontend { addr: FrontendAddr::NodePort(family), ..exact });
        let host_port = self
            .local_addresses
            .contains(&flow.destination)
            .then_some(Frontend { addr: FrontendAddr::HostPort(family), ..exact });
        let candidates = || [Some(exact), node_port, host_port].into_iter().flatten();
        match candidates().find_map(|f| self.serving.get(&f)) {
            Some(serving) => {
                !serving.iter().any(|b| b.addr == flow.reply_source && b.port.get() == flow.reply_source_port)
            }
            None => {
                let translated =
                    (flow.reply_source, flow.reply_source_port) != (flow.destination, flow.destination_port);
                translated && candidates().any(|f| self.removed.contains_key(&f))
            }
        }
    }
}

/// What a look at the flows came to.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Flows that were removed.
    pub deleted: usize,
    /// How long it took.
    pub took: Duration,
}

/// Looks at the UDP flows on a thread of its own, so that the walk through the kernel's table delays no change of rules.
#[derive(Debug)]
pub struct FlowCleaner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

type Report = Box<dyn Fn(Look) + Send>;

#[derive(Default)]
struct Shared {
    view: Mutex<UdpView>,
    looks: Mutex<Looks>,
    wake: Condvar,
    report: Mutex<Option<Report>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("looks", &self.looks).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Looks {
    asked: u64,
    done: u64,
    closed: bool,
}

impl FlowCleaner {
    /// Starts the thread.
    pub fn start(conntrack: Conntrack) -> io::Result<FlowCleaner> {
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = shared.clone();
            std::thread::Builder::new().name("conntrack".into()).spawn(move || shared.run(conntrack))?
        };
        Ok(FlowCleaner { shared, thread: Some(thread) })
    }

    /// Calls `report` after each look, on the cleaner's thread.
    pub fn report_to(&self, report: impl Fn(Look) + Send + 'static) {
        *lock(&self.shared.report) = Some(Box::new(report));
    }

    /// Changes what flows are held to. Done before the rules change, so that no look removes a flow to an endpoint that the
    /// rules already use; what a look removes too early is made again, and found by the look after the commit.
    pub fn update(&self, edit: impl FnOnce(&mut UdpView, u64)) {
        let next = lock(&self.shared.looks).asked + 1;
        edit(&mut lock(&self.shared.view), next);
    }

    /// Asks for a look. Called when the new rules are in force, or the next packet would make the same flow again
    /// (services.md 3.6).
    pub fn look(&self) {
        lock(&self.shared.looks).asked += 1;
        self.shared.wake.notify_all();
    }

    /// Waits until every look that was asked for is done; false when that takes longer than `limit`.
    pub fn settled(&self, limit: Duration) -> bool {
        let guard = lock(&self.shared.looks);
        let (looks, _) = self
            .shared
            .wake
            .wait_timeout_while(guard, limit, |looks| looks.done < looks.asked)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        looks.done >= looks.asked
    }
}

impl Drop for FlowCleaner {
    fn drop(&mut self) {
        lock(&self.shared.looks).closed = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shared {
    fn run(&self, mut conntrack: Conntrack) {
        let mut pause = None;
        loop {
            let target = {
                let mut looks = lock(&self.looks);
                // After a look or a failure, whatever is asked for meanwhile waits and counts as one.
                if let Some(pause) = pause {
                    let waited = self.wake.wait_timeout_while(looks, pause, |looks| !looks.closed);
                    looks = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
                }
                let looks = self
                    .wake
                    .wait_while(looks, |looks| !looks.closed && looks.done >= looks.asked)
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                if looks.closed {
                    return;
                }
                looks.asked
            };
            let start = Instant::now();
            match self.clean(&mut conntrack) {
                Ok(deleted) => {
                    lock(&self.view).removed.retain(|_, look| *look > target);
                    if let Some(report) = &*lock(&self.report) {
                        report(Look { deleted, took: start.elapsed() });
                    }
                    lock(&self.looks).done = target;
                    self.wake.notify_all();
                    // At most a tenth of a core, however large the table is.
                    pause = Some(start.elapsed() * 9);
                }
                Err(error) => {
                    warn!(%error, "cannot look at UDP flows; trying again");
                    pause = Some(RETRY);
                }
            }
        }
    }

    fn clean(&self, conntrack: &mut Conntrack) -> io::Result<usize> {
        let mut deleted = 0;
        let flows = conntrack.udp_flows()?;
        // In pieces, because the proxy waits for the view.
        for piece in flows.chunks(FLOWS_AT_ONCE) {
            let stale: Vec<&Flow> = {
                let view = lock(&self.view);
                piece.iter().filter(|flow| view.is_stale(flow)).collect()
            };
            for flow in stale {
                conntrack.delete(flow)?;
                debug!(?flow, "stale UDP flow removed");
                deleted += 1;
            }
        }
        Ok(deleted)
    }
}

/// Flows that are judged under one lock: some tens of microseconds.
const FLOWS_AT_ONCE: usize = 256;
/// Pause after a failed look.
const RETRY: Duration = Duration::from_secs(1);

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
/// A dump that is interrupted by changes is repeated this often before its partial result counts (services.md 3.6).
const DUMP_TRIES: usize = 5;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// The conntrack table of one network namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl Conntrack {
    /// Opens a socket in a namespace.
    pub fn open(netns: &Netns) -> io::Result<Conntrack> {
        Ok(Conntrack { socket: netns.run(|| Socket::open(libc::NETLINK_NETFILTER))??, sequence: 0 })
    }

    /// All UDP flows of both families. The kernel walks its whole table, whatever is in it: some milliseconds.
    pub fn udp_flows(&mut self) -> io::Result<Vec<Flow>> {
        let mut flows = Vec::new();
        for _ in 0..DUMP_TRIES {
            let (dumped, whole) = self.dump()?;
            flows = dumped;
            if whole {
                break;
            }
        }
        Ok(flows)
    }

    fn dump(&mut self) -> io::Result<(Vec<Flow>, bool)> {
        self.sequence += 1;
        self.socket.send(&message(IPCTNL_MSG_CT_GET, NLM_F_REQUEST | NLM_F_DUMP, self.sequence, None, &[]))?;
        let mut flows = Vec::new();
        let mut whole = true;
        loop {
            let buffer = self.socket.receive()?;
            let mut rest = &buffer[..];
            while let Some(header) = rest.get(..16) {
                let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
                let kind = u16::from_ne_bytes([header[4], header[5]]);
                let flags = u16::from_ne_bytes([header[6], header[7]]);
                let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
                let Some(body) = rest.get(16..len) else { break };
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                whole &= flags & NLM_F_DUMP_INTR == 0;
                match kind {
                    NLMSG_DONE => return Ok((flows, whole)),
                    NLMSG_ERROR => match error(body) {
                        0 => return Ok((flows, whole)),
                        code => return Err(io::Error::from_raw_os_error(code)),
                    },
                    _ => flows.extend(body.get(4..).and_then(parse_flow)),
                }
            }
        }
    }

    /// Removes one flow; one that is gone already is no error.
    pub fn delete(&mut self, flow: &Flow) -> io::Result<()> {
        self.sequence += 1;
        let family = IpFamily::of(&flow.destination);
        let tuple = nest(
            1,
            &[
                addresses(flow),
                nest(
                    2,
                    &[
                        attribute(1, &[17]),
                        attribute(2, &flow.source_port.to_be_bytes()),
                        attribute(3, &flow.destination_port.to_be_bytes()),
                    ]
                    .concat(),
                ),
            ]
            .concat(),
        );
        self.socket.send(&message(
            IPCTNL_MSG_CT_DELETE,
            NLM_F_REQUEST | NLM_F_ACK,
            self.sequence,
            Some(family),
            &tuple,
        ))?;
        loop {
            let buffer = self.socket.receive()?;
            let sequence = buffer.get(8..12).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            if sequence != Some(self.sequence) {
                continue;
            }
            return match error(buffer.get(16..).unwrap_or_default()) {
                0 | libc::ENOENT => Ok(()),
                code => Err(io::Error::from_raw_os_error(code)),
            };
        }
    }
}

fn error(body: &[u8]) -> i32 {
    body.get(..4).map_or(libc::EIO, |b| -i32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

fn message(kind: u16, flags: u16, sequence: u32, family: Option<IpFamily>, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + attributes.len());
    bytes.extend_from_slice(&(20 + attributes.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(&(NFNL_SUBSYS_CTNETLINK << 8 | kind).to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let family = match family {
        None => libc::AF_UNSPEC,
        Some(IpFamily::V4) => libc::AF_INET,
        Some(IpFamily::V6) => libc::AF_INET6,
    };
    bytes.extend_from_slice(&[family as u8, 0, 0, 0]);
    bytes.extend_from_slice(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nest(kind: u16, content: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, content)
}

fn addresses(flow: &Flow) -> Vec<u8> {
    let octets = |addr: IpAddr| match addr {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let (source, destination) = if flow.source.is_ipv4() { (1, 2) } else { (3, 4) };
    nest(1, &[attribute(source, &octets(flow.source)), attribute(destination, &octets(flow.destination))].concat())
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = bytes;
    loop {
        let header = rest.get(..4)?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = rest.get(4..len)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
}

fn parse_flow(attributes: &[u8]) -> Option<Flow> {
    let original = parse_tuple(find(attributes, 1)?)?;
    let reply = parse_tuple(find(attributes, 2)?)?;
    Some(Flow {
        source: original.0,
        source_port: original.1,
        destination: original.2,
        destination_port: original.3,
        reply_source: reply.0,
        reply_source_port: reply.1,
    })
}

fn parse_tuple(tuple: &[u8]) -> Option<(IpAddr, u16, IpAddr, u16)> {
    let ip = find(tuple, 1)?;
    let proto = find(tuple, 2)?;
    if find(proto, 1)? != [17] {
        return None;
    }
    let addr = |v4: u16, v6: u16| -> Option<IpAddr> {
        match find(ip, v4) {
            Some(bytes) => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            None => <[u8; 16]>::try_from(find(ip, v6)?).ok().map(IpAddr::from),
        }
    };
    let port = |kind: u16| find(proto, kind).and_then(|b| <[u8; 2]>::try_from(b).ok()).map(u16::from_be_bytes);
    Some((addr(1, 3)?, port(2)?, addr(2, 4)?, port(3)?))
}
