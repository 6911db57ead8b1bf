//! The answer to a query, as a pure function from request bytes to response bytes.
//!
//! The name grammar and the records are those of the Kubernetes DNS schema 1.1.0; codes, flags and sections those of CoreDNS,
//! except that NODATA and NXDOMAIN depend on the name alone, never on the type (RFC 2308, RFC 8020).

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portolan_plan::zone::{Endpoint, Entry, PodMode, Port, Published, ServiceKind, Target, ZoneSet};

use crate::wire::{self, Labels, Owner, Parsed, Query, Rcode, Reply, Section, rtype};

/// Largest UDP reply: what passes every path without fragments (DNS flag day 2020).
pub const MAX_UDP: u16 = 1232;
/// Without EDNS a client takes this much over UDP (RFC 1035 section 4.2.1).
const PLAIN_UDP: u16 = 512;
const SCHEMA_VERSION: &str = "1.1.0";
const SCHEMA_VERSION_TTL: u32 = 28_800;
/// Aliases followed before a chain counts as a loop.
const MAX_CHAIN: usize = 8;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A datagram.
    Udp,
    /// A stream.
    Tcp,
}

/// A zone that is served.
#[derive(Clone, Debug)]
pub struct Zone {
    name: Labels,
    text: String,
}

impl Zone {
    /// The zone called `name`; `None` if that is not a domain name.
    pub fn new(name: &str) -> Option<Zone> {
        let name = Labels::parse(name)?;
        Some(Zone { text: format!("{}.", name.to_text()), name })
    }

    /// The reverse zones that cover a network, one for each octet or nibble boundary within its prefix.
    pub fn reverse(net: IpNet) -> Vec<Zone> {
        let step: u8 = if net.addr().is_ipv4() { 8 } else { 4 };
        let whole = net.prefix_len().div_ceil(step) * step;
        let Ok(subnets) = net.subnets(whole) else { return Vec::new() };
        subnets
            .filter_map(|net| {
                let labels: Vec<String> = match net.network() {
                    IpAddr::V4(a) => a.octets().iter().map(u8::to_string).collect(),
                    IpAddr::V6(a) => nibbles(a).map(|n| format!("{n:x}")).collect(),
                };
                let kept = &labels[..usize::from(whole / step)];
                let tail = if step == 8 { "in-addr.arpa" } else { "ip6.arpa" };
                let name: String = kept.iter().rev().map(|l| format!("{l}.")).collect();
                Zone::new(&(name + tail))
            })
            .collect()
    }

    /// The name in lower case with the final dot.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn is_reverse(&self) -> bool {
        self.text.ends_with("in-addr.arpa.") || self.text.ends_with("ip6.arpa.")
    }
}

fn nibbles(address: Ipv6Addr) -> impl Iterator<Item = u8> {
    address.octets().into_iter().flat_map(|o| [o >> 4, o & 0xF])
}

/// Under which names an NXDOMAIN is not sent but handed to the forwarder.
#[derive(Clone, Debug, Default)]
pub enum Fallthrough {
    /// Nowhere.
    #[default]
    Off,
    /// Everywhere.
    All,
    /// Under these zones.
    Zones(Vec<Zone>),
}

/// What a name outside the zones gets when there is no forwarder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unhandled {
    /// REFUSED: this server is not for that name.
    #[default]
    Refused,
    /// SERVFAIL, as CoreDNS answers in a server block for `.` that has nothing behind it.
    ServFail,
}

/// How to answer.
#[derive(Clone, Debug)]
pub struct Settings {
    zones: Vec<Zone>,
    /// Seconds that records may be kept.
    pub ttl: u32,
    /// Where NXDOMAIN is handed on.
    pub fallthrough: Fallthrough,
    /// Whether there is a forwarder.
    pub forwards: bool,
    /// What names get that nothing handles.
    pub unhandled: Unhandled,
    /// Addresses of this server.
    pub own_addresses: Vec<IpAddr>,
    /// A Service that has cluster addresses but no ready endpoint does not exist.
    pub ignore_empty_service: bool,
    /// Leave out the additional section.
    pub minimal: bool,
    /// Answer `version.bind` and the like in class CH with these: version and host name.
    pub chaos: Option<(String, String)>,
}

impl Settings {
    /// Settings for these zones; the first that is not a reverse zone is the one that PTR records name.
    pub fn new(zones: Vec<Zone>) -> Settings {
        Settings {
            zones,
            ttl: 5,
            fallthrough: Fallthrough::Off,
            forwards: false,
            unhandled: Unhandled::Refused,
            own_addresses: Vec::new(),
            ignore_empty_service: false,
            minimal: false,
            chaos: None,
        }
    }

    fn primary(&self) -> Option<&Zone> {
        self.zones.iter().find(|z| !z.is_reverse())
    }

    /// The zone with the longest name that holds `name`. A DS record belongs to the parent side (RFC 4035 section 3.1.4.1).
    fn zone_of(&self, name: &Labels, qtype: u16) -> Option<(usize, &Zone)> {
        let holding = || self.zones.iter().enumerate().filter(|(_, z)| name.is_under(&z.name));
        let best = holding().max_by_key(|(_, z)| z.name.count())?;
        if qtype == rtype::DS && best.1.name.count() == name.count() {
            let parent = holding().filter(|(_, z)| z.name.count() < name.count()).max_by_key(|(_, z)| z.name.count());
            return Some(parent.unwrap_or(best));
        }
        Some(best)
    }

    /// The name of a zone as metrics have it: `dropped` without a dot, `.` outside.
    pub fn zone_text(&self, zone: InZone) -> &str {
        match zone {
            InZone::Dropped => "dropped",
            InZone::Outside => ".",
            InZone::Zone(i) => self.zones.get(i).map_or(".", |z| &z.text),
        }
    }

    fn falls_through(&self, name: &Labels) -> bool {
        match &self.fallthrough {
            Fallthrough::Off => false,
            Fallthrough::All => true,
            Fallthrough::Zones(zones) => zones.iter().any(|z| name.is_under(&z.name)),
        }
    }
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Send what was written.
    Reply(Summary),
    /// Send nothing.
    Ignore,
    /// Hand the query to the forwarder as it is.
    Forward,
    /// Ask the forwarder for `target`, then call [`complete`].
    Chase(Chain),
}

/// Which zone a query fell in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InZone {
    /// None: rejected before zones were looked at.
    Dropped,
    /// None of ours.
    Outside,
    /// The zone of this number; [`Settings::zone_text`] names it.
    Zone(usize),
}

/// What was answered, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Summary {
    /// The zone of the query.
    pub zone: InZone,
    /// Response code.
    pub rcode: Rcode,
    /// Record type asked for; `None` in what is no query.
    pub rtype: Option<u16>,
    /// Whether the client wants DNSSEC records.
    pub dnssec_ok: bool,
}

impl Summary {
    fn new(query: &Query<'_>, zone: InZone, rcode: Rcode) -> Summary {
        Summary { zone, rcode, rtype: Some(query.rtype), dnssec_ok: query.edns.is_some_and(|e| e.dnssec_ok) }
    }
}

/// An alias that leaves the zones: the names passed so far, ending in the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    names: Vec<String>,
    zone: InZone,
    ttl: u32,
}

impl Chain {
    /// The name to resolve.
    pub fn target(&self) -> &str {
        self.names.last().map(String::as_str).unwrap_or_default()
    }

    /// The query for the target, of the type that `request` asks for; its id is 0.
    pub(crate) fn query(&self, request: &[u8]) -> Option<Vec<u8>> {
        let Parsed::Query(query) = wire::parse(request) else { return None };
        Some(wire::build_query(0, Labels::parse(self.target())?.wire(), query.rtype))
    }
}

fn limit(query: &Query<'_>, transport: Transport) -> usize {
    match (transport, query.edns) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, None) => usize::from(PLAIN_UDP),
        (Transport::Udp, Some(edns)) => usize::from(edns.size.clamp(PLAIN_UDP, MAX_UDP)),
    }
}

/// Answers a query from the cluster's names. `seed` decides the order of addresses; 0 keeps that of the objects.
pub fn answer(
    settings: &Settings,
    set: &ZoneSet,
    request: &[u8],
    transport: Transport,
    seed: u64,
    out: &mut Vec<u8>,
) -> Outcome {
    let query = match read(settings, request, transport, out) {
        Ok(query) => query,
        Err(outcome) => return outcome,
    };
    let Some((number, zone)) = settings.zone_of(&query.name, query.rtype) else {
        return unhandled(settings, &query, transport, out);
    };
    let in_zone = InZone::Zone(number);
    if matches!(query.rtype, rtype::AXFR | rtype::IXFR) {
        return simple(&query, transport, Rcode::Refused, in_zone, out);
    }
    let mut responder = Responder {
        settings,
        set,
        zone,
        zone_at: wire::HEADER + query.name.offset(query.name.count() - zone.name.count()),
        reply: Reply::new(&query, limit(&query, transport), out),
        query: &query,
        seed,
    };
    let done = responder.respond();
    let authoritative = |responder: Responder<'_, '_, '_>, rcode| {
        Outcome::Reply(Summary::new(&query, in_zone, responder.reply.finish(rcode, true)))
    };
    match done {
        Done::Data => authoritative(responder, Rcode::NoError),
        Done::NoData => {
            responder.soa(Section::Authority);
            authoritative(responder, Rcode::NoError)
        }
        Done::NoName => {
            // Before the first full sync a missing name may only be late. Cluster names must not leak to an upstream then,
            // so this comes before fallthrough for zones of names; reverse names are asked upstream as usual.
            let unsynced = !set.synced;
            if settings.falls_through(&query.name) && (!unsynced || zone.is_reverse()) {
                return unhandled(settings, &query, transport, out);
            }
            responder.soa(Section::Authority);
            authoritative(responder, if unsynced { Rcode::ServFail } else { Rcode::NxDomain })
        }
        Done::Chase(names) => Outcome::Chase(Chain { names, zone: in_zone, ttl: settings.ttl }),
    }
}

/// Reads a query and deals with all that does not depend on zones.
fn read<'a>(
    settings: &Settings,
    request: &'a [u8],
    transport: Transport,
    out: &mut Vec<u8>,
) -> Result<Box<Query<'a>>, Outcome> {
    let query = match wire::parse(request) {
        Parsed::Ignore => return Err(Outcome::Ignore),
        Parsed::Reject(rcode) => {
            wire::reject(request, rcode, out);
            return Err(Outcome::Reply(Summary { zone: InZone::Dropped, rcode, rtype: None, dnssec_ok: false }));
        }
        Parsed::Query(query) => query,
    };
    if query.edns.is_some_and(|e| e.version != 0) {
        return Err(simple(&query, transport, Rcode::BadVers, InZone::Dropped, out));
    }
    if query.class != wire::CLASS_IN {
        return Err(other_class(settings, &query, transport, out));
    }
    Ok(query)
}

fn other_class(settings: &Settings, query: &Query<'_>, transport: Transport, out: &mut Vec<u8>) -> Outcome {
    let Some((version, host)) = settings.chaos.as_ref().filter(|_| query.class == wire::CLASS_CH) else {
        return simple(query, transport, Rcode::Refused, InZone::Dropped, out);
    };
    let text = match query.name.to_text().as_str() {
        "version.bind" | "version.server" => version,
        "hostname.bind" | "id.server" => host,
        _ => return simple(query, transport, Rcode::ServFail, InZone::Outside, out),
    };
    if query.rtype != rtype::TXT {
        return simple(query, transport, Rcode::ServFail, InZone::Outside, out);
    }
    let mut reply = Reply::new(query, limit(query, transport), out);
    reply.record_in(wire::CLASS_CH, Section::Answer, Owner::Question, rtype::TXT, 0, |out| character_string(text, out));
    Outcome::Reply(Summary::new(query, InZone::Outside, reply.finish(Rcode::NoError, false)))
}

/// One string of a TXT record (RFC 1035 section 3.3): at most 255 octets.
fn character_string(text: &str, out: &mut Vec<u8>) {
    let bytes = &text.as_bytes()[..text.len().min(255)];
    out.push(bytes.len() as u8);
    out.extend_from_slice(bytes);
}

/// A reply of nothing but a code.
fn simple(query: &Query<'_>, transport: Transport, rcode: Rcode, zone: InZone, out: &mut Vec<u8>) -> Outcome {
    let reply = Reply::new(query, limit(query, transport), out);
    Outcome::Reply(Summary::new(query, zone, reply.finish(rcode, false)))
}

fn unhandled(settings: &Settings, query: &Query<'_>, transport: Transport, out: &mut Vec<u8>) -> Outcome {
    match settings.unhandled {
        _ if settings.forwards => Outcome::Forward,
        Unhandled::Refused => simple(query, transport, Rcode::Refused, InZone::Outside, out),
        Unhandled::ServFail => simple(query, transport, Rcode::ServFail, InZone::Outside, out),
    }
}

/// Answers with SERVFAIL or REFUSED what the forwarder could not.
pub fn fail(request: &[u8], transport: Transport, rcode: Rcode, out: &mut Vec<u8>) -> Outcome {
    match wire::parse(request) {
        Parsed::Query(query) => simple(&query, transport, rcode, InZone::Outside, out),
        Parsed::Ignore | Parsed::Reject(_) => Outcome::Ignore,
    }
}

/// Answers with an upstream's reply: as it came, but cut to what the client takes.
pub fn relay(request: &[u8], transport: Transport, upstream: &[u8], out: &mut Vec<u8>) -> Outcome {
    let (Parsed::Query(query), true) = (wire::parse(request), upstream.len() >= wire::HEADER) else {
        return fail(request, transport, Rcode::ServFail, out);
    };
    let rcode = match upstream[3] & 0xF {
        0 => Rcode::NoError,
        1 => Rcode::FormErr,
        3 => Rcode::NxDomain,
        4 => Rcode::NotImp,
        5 => Rcode::Refused,
        _ => Rcode::ServFail,
    };
    wire::relay(&query, upstream, out);
    if out.len() > limit(&query, transport) {
        let mut reply = Reply::new(&query, limit(&query, transport), out);
        reply.set_truncated();
        reply.finish(rcode, false);
    }
    Outcome::Reply(Summary::new(&query, InZone::Outside, rcode))
}

/// Completes an alias with the forwarder's reply for its target; `None` when it got none.
///
/// A lookup that failed is SERVFAIL, so that clients try again instead of taking the name to have no address.
pub fn complete(
    chain: &Chain,
    request: &[u8],
    transport: Transport,
    upstream: Option<&[u8]>,
    out: &mut Vec<u8>,
) -> Outcome {
    let found = upstream.and_then(wire::parse_upstream);
    let usable = |rcode| rcode == Rcode::NoError as u16 || rcode == Rcode::NxDomain as u16;
    let (Some(found), Parsed::Query(query)) = (found.filter(|f| usable(f.rcode)), wire::parse(request)) else {
        return fail(request, transport, Rcode::ServFail, out);
    };
    let mut reply = Reply::new(&query, limit(&query, transport), out);
    write_chain(&mut reply, &chain.names, chain.ttl);
    for record in &found.answers {
        reply.record(Section::Answer, Owner::Wire(&record.owner), record.rtype, record.ttl, |out| {
            out.extend_from_slice(&record.data);
        });
    }
    if found.truncated {
        reply.set_truncated();
    }
    Outcome::Reply(Summary::new(&query, chain.zone, reply.finish(Rcode::NoError, true)))
}

/// Writes the CNAME records from the question to the last of `names`; returns where that name stands.
fn write_chain(reply: &mut Reply<'_, '_>, names: &[String], ttl: u32) -> usize {
    let mut owner = wire::HEADER;
    for name in names {
        let mut at = 0;
        reply.record(Section::Answer, Owner::At(owner), rtype::CNAME, ttl, |out| {
            at = out.len();
            wire::encode_name(name, out);
        });
        owner = at;
    }
    owner
}

/// What a name means (section 2 of the schema: labels left of the zone).
#[derive(Debug, PartialEq, Eq)]
enum Name<'q> {
    Apex,
    /// `svc` or `pod` alone.
    Middle,
    Namespace {
        namespace: &'q str,
        pod: bool,
    },
    Service {
        service: &'q str,
        namespace: &'q str,
    },
    Endpoint {
        endpoint: &'q str,
        service: &'q str,
        namespace: &'q str,
    },
    Port {
        port: &'q str,
        protocol: &'q str,
        service: &'q str,
        namespace: &'q str,
    },
    Pod {
        address: &'q str,
        namespace: &'q str,
    },
    /// `ns.dns`, the name that SOA records give the server.
    GlueForNs,
    SchemaVersion,
    Unknown,
}

/// Splits the first `count` labels of a name, those left of the zone.
fn classify(labels: &Labels, count: usize) -> Name<'_> {
    let left: [&str; 6] = std::array::from_fn(|i| if i < count.min(6) { labels.get(i) } else { "" });
    let strip = |label: &'_ str| -> usize { usize::from(label.starts_with('_')) };
    match &left[..count.min(6)] {
        [] => Name::Apex,
        ["svc" | "pod"] => Name::Middle,
        ["dns-version"] => Name::SchemaVersion,
        ["ns", "dns"] => Name::GlueForNs,
        [namespace, "svc"] => Name::Namespace { namespace, pod: false },
        [namespace, "pod"] => Name::Namespace { namespace, pod: true },
        [service, namespace, "svc"] => Name::Service { service, namespace },
        [endpoint, service, namespace, "svc"] => Name::Endpoint { endpoint, service, namespace },
        [port, protocol, service, namespace, "svc"] => {
            let (port, protocol) = (&port[strip(port)..], &protocol[strip(protocol)..]);
            Name::Port { port, protocol, service, namespace }
        }
        [address, namespace, "pod"] | [_, address, namespace, "pod"] | [_, _, address, namespace, "pod"] => {
            Name::Pod { address, namespace }
        }
        _ => Name::Unknown,
    }
}

/// The address that a reverse name stands for: exactly four octets or 32 nibbles.
fn reverse_address(name: &Labels) -> Option<IpAddr> {
    let count = name.count();
    let suffix = |i: usize| if count >= i { name.get(count - i) } else { "" };
    if suffix(1) != "arpa" {
        return None;
    }
    match (suffix(2), count) {
        ("in-addr", 6) => {
            let mut octets = [0; 4];
            for (i, octet) in octets.iter_mut().rev().enumerate() {
                let label = name.get(i);
                let plain = label.len() == 1 || !label.starts_with('0');
                *octet = label.parse().ok().filter(|_| plain && label.bytes().all(|b| b.is_ascii_digit()))?;
            }
            Some(Ipv4Addr::from(octets).into())
        }
        ("ip6", 34) => {
            let mut bits = 0u128;
            for i in (0..32).rev() {
                let label = name.get(i);
                let digit = if label.len() == 1 { char::from(label.as_bytes()[0]).to_digit(16)? } else { return None };
                bits = bits << 4 | u128::from(digit);
            }
            Some(Ipv6Addr::from(bits).into())
        }
        _ => None,
    }
}

/// The address in a pod name: `-` for `.` or `:`.
fn pod_address(label: &str) -> Option<IpAddr> {
    if label.bytes().filter(|b| *b == b'-').count() == 3 && !label.contains("--") {
        label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    } else {
        label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6)
    }
}

/// Which part of a Service a name asks for.
#[derive(Clone, Copy, Debug)]
enum Part<'q> {
    Whole,
    Endpoint(&'q str),
    /// Empty parts match anything.
    Port {
        port: &'q str,
        protocol: &'q str,
    },
}

impl Part<'_> {
    fn has_port(&self, port: &Port) -> bool {
        match self {
            Part::Whole | Part::Endpoint(_) => true,
            Part::Port { port: name, protocol } => {
                (name.is_empty() || **name == *port.name) && (protocol.is_empty() || *protocol == port.protocol.label())
            }
        }
    }

    /// Whether an address without any port has this part.
    fn has_no_port(&self) -> bool {
        match self {
            Part::Whole | Part::Endpoint(_) => true,
            Part::Port { port, protocol } => port.is_empty() && protocol.is_empty(),
        }
    }

    fn matches_any(&self, ports: &[Port]) -> bool {
        if ports.is_empty() { self.has_no_port() } else { ports.iter().any(|p| self.has_port(p)) }
    }
}

/// The pairs of address and port of a Service that a name stands for; a missing port has no number.
fn pairs<'a>(entry: &'a Entry, part: Part<'a>) -> Vec<(IpAddr, Option<&'a Endpoint>, Option<u16>)> {
    let mut found = Vec::new();
    let mut push = |address: IpAddr, endpoint: Option<&'a Endpoint>, ports: &'a [Port]| {
        if ports.is_empty() && part.has_no_port() {
            found.push((address, endpoint, None));
        }
        found.extend(ports.iter().filter(|p| part.has_port(p)).map(|p| (address, endpoint, p.number)));
    };
    match (&entry.kind, part) {
        (Some(ServiceKind::Cluster(ips)), Part::Whole | Part::Port { .. }) => {
            ips.iter().for_each(|ip| push(*ip, None, &entry.ports));
        }
        (Some(ServiceKind::Cluster(_) | ServiceKind::Headless), Part::Endpoint(label)) => {
            entry
                .endpoints()
                .filter(|(e, _)| e.has_label(label))
                .for_each(|(e, ports)| push(e.address, Some(e), ports));
        }
        (Some(ServiceKind::Headless), Part::Whole | Part::Port { .. }) => {
            entry.endpoints().for_each(|(e, ports)| push(e.address, Some(e), ports));
        }
        (Some(ServiceKind::External(_)) | None, _) => {}
    }
    found
}

/// The addresses of a Service that a name stands for, each once.
fn addresses(entry: &Entry, part: Part<'_>) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = match (&entry.kind, part) {
        (Some(ServiceKind::Cluster(ips)), Part::Whole | Part::Port { .. }) => {
            if part.matches_any(&entry.ports) {
                ips.to_vec()
            } else {
                Vec::new()
            }
        }
        (Some(ServiceKind::Cluster(_) | ServiceKind::Headless), Part::Endpoint(label)) => {
            entry.endpoints().filter(|(e, _)| e.has_label(label)).map(|(e, _)| e.address).collect()
        }
        (Some(ServiceKind::Headless), Part::Whole | Part::Port { .. }) => {
            entry.endpoints().filter(|(_, ports)| part.matches_any(ports)).map(|(e, _)| e.address).collect()
        }
        (Some(ServiceKind::External(_)) | None, _) => Vec::new(),
    };
    if entry.overlapping {
        let mut seen = HashSet::with_capacity(found.len());
        found.retain(|a| seen.insert(*a));
    }
    found
}

/// How a query ends.
enum Done {
    /// Records were written.
    Data,
    /// The name exists, but not with that type.
    NoData,
    /// The name does not exist.
    NoName,
    /// The name is an alias to a name that only the forwarder can resolve.
    Chase(Vec<String>),
}

/// Where an alias leads.
enum Followed {
    /// To these addresses of the asked family.
    Addresses(Vec<IpAddr>),
    /// To nothing; the alias itself is left out.
    Nothing,
    /// Out of all zones, with nobody to ask.
    Dangling,
    /// Out of all zones, to the forwarder.
    Upstream,
}

struct Responder<'a, 'q, 'o> {
    settings: &'a Settings,
    set: &'a ZoneSet,
    zone: &'a Zone,
    /// Where the zone's name stands in the question, in the client's case.
    zone_at: usize,
    query: &'q Query<'q>,
    reply: Reply<'q, 'o>,
    seed: u64,
}

impl<'a> Responder<'a, '_, '_> {
    fn respond(&mut self) -> Done {
        let query = self.query;
        let labels = &query.name;
        let left = labels.count() - self.zone.name.count();
        match classify(labels, left) {
            Name::Apex => self.apex(),
            Name::Middle => Done::NoData,
            Name::SchemaVersion if query.rtype == rtype::TXT => {
                self.reply.record(Section::Answer, Owner::Question, rtype::TXT, SCHEMA_VERSION_TTL, |out| {
                    character_string(SCHEMA_VERSION, out);
                });
                Done::Data
            }
            Name::SchemaVersion => Done::NoData,
            Name::GlueForNs => {
                let addresses = self.name_servers().into_iter().flat_map(|(_, addresses)| addresses).collect();
                self.write_addresses(addresses)
            }
            Name::Namespace { namespace, pod } => {
                let served = !pod || self.set.pod_mode() != PodMode::Disabled;
                if served && self.set.has_namespace(namespace) { Done::NoData } else { Done::NoName }
            }
            Name::Service { service, namespace } => self.service(service, namespace, Part::Whole),
            Name::Endpoint { endpoint, service, namespace } => {
                self.service(service, namespace, Part::Endpoint(endpoint))
            }
            Name::Port { port, protocol, service, namespace } => {
                self.service(service, namespace, Part::Port { port, protocol })
            }
            Name::Pod { address, namespace } => self.pod(address, namespace),
            Name::Unknown => self.reverse(),
        }
    }

    fn apex(&mut self) -> Done {
        match self.query.rtype {
            rtype::SOA => {
                self.soa(Section::Answer);
                Done::Data
            }
            rtype::NS => {
                let servers = self.name_servers();
                let ttl = self.settings.ttl;
                let mut names = Vec::new();
                for (labels, addresses) in servers {
                    let wire = self.name_below_zone(&labels);
                    let mut at = 0;
                    self.reply.record(Section::Answer, Owner::Question, rtype::NS, ttl, |out| {
                        at = out.len();
                        out.extend_from_slice(&wire);
                    });
                    names.push((at, wire, addresses));
                }
                if !self.settings.minimal {
                    let mut seen = HashSet::new();
                    for (at, wire, addresses) in &names {
                        for address in addresses.iter().filter(|a| seen.insert((wire, **a))) {
                            self.reply.address(Section::Additional, Owner::At(*at), ttl, *address);
                        }
                    }
                }
                if names.is_empty() { Done::NoData } else { Done::Data }
            }
            _ => Done::NoData,
        }
    }

    /// The names (labels left of the zone) and addresses under which this server is known.
    fn name_servers(&self) -> Vec<(Vec<String>, Vec<IpAddr>)> {
        let mut found: Vec<(Vec<String>, Vec<IpAddr>)> = Vec::new();
        let mut add = |labels: Vec<String>, address: IpAddr| match found.iter_mut().find(|(l, _)| *l == labels) {
            Some((_, addresses)) if addresses.contains(&address) => {}
            Some((_, addresses)) => addresses.push(address),
            None => found.push((labels, vec![address])),
        };
        for own in &self.settings.own_addresses {
            for (key, entry) in self.set.endpoint_owners(*own) {
                let base = [key.name(), key.namespace(), "svc"].map(String::from);
                match &entry.kind {
                    Some(ServiceKind::Cluster(ips)) => ips.iter().for_each(|ip| add(base.to_vec(), *ip)),
                    Some(ServiceKind::Headless) => {
                        let slices = entry.slices.iter().filter(|s| s.endpoints.iter().any(|e| e.address == *own));
                        for endpoint in slices.flat_map(|s| &s.endpoints) {
                            let mut label = String::new();
                            endpoint.write_label(&mut label);
                            add(std::iter::once(label).chain(base.clone()).collect(), endpoint.address);
                        }
                    }
                    Some(ServiceKind::External(_)) | None => {}
                }
            }
        }
        if found.is_empty() {
            let own = &self.settings.own_addresses;
            found.extend((!own.is_empty()).then(|| (vec!["ns".into(), "dns".into()], own.clone())));
        }
        found
    }

    fn service(&mut self, service: &str, namespace: &str, part: Part<'_>) -> Done {
        let key = format!("{service}.{namespace}");
        let Some(entry) = self.set.service(&key) else { return Done::NoName };
        match &entry.kind {
            None => Done::NoName,
            Some(ServiceKind::External(target)) => self.external(target, part),
            Some(ServiceKind::Cluster(_)) if self.settings.ignore_empty_service && entry.is_empty() => Done::NoName,
            Some(ServiceKind::Cluster(_) | ServiceKind::Headless) => match self.query.rtype {
                rtype::SRV => self.srv(entry, part, service, namespace),
                _ => {
                    let addresses = addresses(entry, part);
                    if addresses.is_empty() { Done::NoName } else { self.write_addresses(addresses) }
                }
            },
        }
    }

    /// Writes the addresses of the asked family; the name is known to exist.
    fn write_addresses(&mut self, addresses: Vec<IpAddr>) -> Done {
        let mut chosen = of_type(addresses, self.query.rtype);
        shuffle(&mut chosen, self.seed);
        for address in &chosen {
            if !self.reply.address(Section::Answer, Owner::Question, self.settings.ttl, *address) {
                break;
            }
        }
        if chosen.is_empty() { Done::NoData } else { Done::Data }
    }

    fn srv(&mut self, entry: &Entry, part: Part<'_>, service: &str, namespace: &str) -> Done {
        let pairs = pairs(entry, part);
        if pairs.is_empty() {
            return Done::NoName;
        }
        // The weight counts pairs before equal records are merged, so a dual-stack Service has 50. Kept as CoreDNS has it.
        let weight = (100 / pairs.len()).max(1) as u16;
        let ttl = self.settings.ttl;
        let suffix = self.name_below_zone(&[service, namespace, "svc"].map(String::from));
        // Where each target's name stands in the reply. Endpoints with one hostname share a target.
        let mut targets: HashMap<String, usize> = HashMap::with_capacity(pairs.len());
        let mut seen = HashSet::with_capacity(pairs.len());
        let mut glue = Vec::with_capacity(pairs.len());
        for (address, endpoint, number) in &pairs {
            let Some(number) = number else { continue };
            let mut label = String::new();
            if let Some(endpoint) = endpoint {
                endpoint.write_label(&mut label);
            }
            glue.push((label.clone(), *address));
            if !seen.insert((label.clone(), *number)) {
                continue;
            }
            let mut at = 0;
            let fits = self.reply.record(Section::Answer, Owner::Question, rtype::SRV, ttl, |out| {
                out.extend_from_slice(&0u16.to_be_bytes());
                out.extend_from_slice(&weight.to_be_bytes());
                out.extend_from_slice(&number.to_be_bytes());
                at = out.len();
                // Not compressed: RFC 2782 forbids it for the target.
                if !label.is_empty() {
                    out.push(label.len() as u8);
                    out.extend_from_slice(label.as_bytes());
                }
                out.extend_from_slice(&suffix);
            });
            if !fits {
                return Done::Data;
            }
            targets.entry(label).or_insert(at);
        }
        if targets.is_empty() {
            return Done::NoData;
        }
        if !self.settings.minimal {
            let mut given = HashSet::with_capacity(glue.len());
            for (label, address) in &glue {
                if !given.insert((label, address)) {
                    continue;
                }
                let mut full = Vec::new();
                // A pointer has 14 bits (RFC 1035 section 4.1.4).
                let owner = match targets.get(label) {
                    Some(at) if *at < 0x4000 => Owner::At(*at),
                    _ => {
                        if !label.is_empty() {
                            full.push(label.len() as u8);
                            full.extend_from_slice(label.as_bytes());
                        }
                        full.extend_from_slice(&suffix);
                        Owner::Wire(&full)
                    }
                };
                if !self.reply.address(Section::Additional, owner, ttl, *address) {
                    break;
                }
            }
        }
        Done::Data
    }

    /// The wire form of a name of the cluster: given labels, then the zone in the client's case.
    fn name_below_zone(&self, labels: &[String]) -> Vec<u8> {
        let mut name = Vec::with_capacity(64);
        for label in labels {
            name.push(label.len() as u8);
            name.extend_from_slice(label.as_bytes());
        }
        name.extend_from_slice(&self.query.message[self.zone_at..self.query.question_end - 4]);
        name
    }

    fn external(&mut self, target: &str, part: Part<'_>) -> Done {
        let target = target.trim_end_matches('.').to_ascii_lowercase();
        let Some(labels) = Labels::parse(&target) else { return Done::NoName };
        if !matches!(part, Part::Whole) || target.is_empty() || target.parse::<IpAddr>().is_ok() {
            return Done::NoName;
        }
        match self.query.rtype {
            rtype::CNAME => {
                write_chain(&mut self.reply, &[target], self.settings.ttl);
                Done::Data
            }
            rtype::A | rtype::AAAA => {
                let mut names = vec![target];
                match self.follow(self.zone, &labels, &mut names) {
                    Followed::Nothing => Done::NoData,
                    Followed::Upstream => Done::Chase(names),
                    Followed::Dangling => {
                        write_chain(&mut self.reply, &names, self.settings.ttl);
                        Done::Data
                    }
                    Followed::Addresses(mut addresses) => {
                        shuffle(&mut addresses, self.seed);
                        let owner = write_chain(&mut self.reply, &names, self.settings.ttl);
                        for address in addresses {
                            self.reply.address(Section::Answer, Owner::At(owner), self.settings.ttl, address);
                        }
                        Done::Data
                    }
                }
            }
            _ => Done::NoData,
        }
    }

    /// Follows an alias to `target`, adding further targets to `names`.
    ///
    /// Within the zone of the query a target without records takes its alias with it; elsewhere the alias stays, since there
    /// somebody else may know more.
    fn follow(&self, zone: &Zone, target: &Labels, names: &mut Vec<String>) -> Followed {
        if names.len() > MAX_CHAIN || target.wire() == self.query.name.wire() {
            return Followed::Nothing;
        }
        if names[..names.len() - 1].contains(&names[names.len() - 1]) {
            return Followed::Nothing;
        }
        let inside = target.is_under(&zone.name);
        let zone = match self.settings.zone_of(target, self.query.rtype) {
            _ if inside => zone,
            Some((_, other)) => other,
            None if self.settings.forwards => return Followed::Upstream,
            None => return Followed::Dangling,
        };
        let found = match classify(target, target.count() - zone.name.count()) {
            Name::Service { service, namespace } => {
                let entry = self.set.service(&format!("{service}.{namespace}"));
                if let Some(ServiceKind::External(next)) = entry.and_then(|e| e.kind.as_ref()) {
                    let next = next.trim_end_matches('.').to_ascii_lowercase();
                    let labels = Labels::parse(&next).filter(|_| !next.is_empty() && next.parse::<IpAddr>().is_err());
                    let Some(labels) = labels else { return Followed::Nothing };
                    names.push(next);
                    return self.follow(zone, &labels, names);
                }
                entry.map(|e| addresses(e, Part::Whole))
            }
            Name::Endpoint { endpoint, service, namespace } => {
                self.set.service(&format!("{service}.{namespace}")).map(|e| addresses(e, Part::Endpoint(endpoint)))
            }
            Name::Port { port, protocol, service, namespace } => {
                self.set.service(&format!("{service}.{namespace}")).map(|e| addresses(e, Part::Port { port, protocol }))
            }
            Name::Pod { address, namespace } => self.pod_addresses(address, namespace).map(|a| vec![a]),
            Name::GlueForNs => Some(self.name_servers().into_iter().flat_map(|(_, a)| a).collect()),
            Name::Apex | Name::Middle | Name::Namespace { .. } | Name::SchemaVersion | Name::Unknown => None,
        };
        let found = of_type(found.unwrap_or_default(), self.query.rtype);
        match (found.is_empty(), inside) {
            (false, _) => Followed::Addresses(found),
            (true, true) => Followed::Nothing,
            (true, false) => Followed::Dangling,
        }
    }

    fn pod_addresses(&self, label: &str, namespace: &str) -> Option<IpAddr> {
        let address = pod_address(label)?;
        let exists = self.set.has_namespace(namespace)
            && match self.set.pod_mode() {
                PodMode::Disabled => false,
                PodMode::Insecure => true,
                PodMode::Verified => self.set.has_pod(namespace, address),
            };
        exists.then_some(address)
    }

    fn pod(&mut self, label: &str, namespace: &str) -> Done {
        let Some(address) = self.pod_addresses(label, namespace) else { return Done::NoName };
        if self.query.rtype != rtype::SRV {
            return self.write_addresses(vec![address]);
        }
        let target = self.name_below_zone(&[label, namespace, "pod"].map(String::from));
        let ttl = self.settings.ttl;
        let mut at = 0;
        self.reply.record(Section::Answer, Owner::Question, rtype::SRV, ttl, |out| {
            out.extend_from_slice(&[0, 0, 0, 100, 0, 0]);
            at = out.len();
            out.extend_from_slice(&target);
        });
        if !self.settings.minimal {
            self.reply.address(Section::Additional, Owner::At(at), ttl, address);
        }
        Done::Data
    }

    /// A name in a reverse zone.
    fn reverse(&mut self) -> Done {
        let Some(address) = reverse_address(&self.query.name).filter(|_| self.zone.is_reverse()) else {
            return Done::NoName;
        };
        let Some(primary) = self.settings.primary() else { return Done::NoName };
        let mut names: Vec<String> = Vec::new();
        if let Some(key) = self.set.cluster_ip_owner(address) {
            names.push(key.as_str().to_string());
        } else {
            for (key, entry) in self.set.endpoint_owners(address) {
                for (endpoint, _) in entry.endpoints().filter(|(e, _)| e.address == address) {
                    let mut name = String::new();
                    endpoint.write_label(&mut name);
                    name.push('.');
                    name.push_str(key.as_str());
                    if !names.contains(&name) {
                        names.push(name);
                    }
                }
            }
        }
        if names.is_empty() {
            return Done::NoName;
        }
        if self.query.rtype != rtype::PTR {
            return Done::NoData;
        }
        for name in names {
            self.reply.record(Section::Answer, Owner::Question, rtype::PTR, self.settings.ttl, |out| {
                for label in name.split('.').chain(["svc"]) {
                    out.push(label.len() as u8);
                    out.extend_from_slice(label.as_bytes());
                }
                out.extend_from_slice(primary.name.wire());
            });
        }
        Done::Data
    }

    fn soa(&mut self, section: Section) {
        // The negative TTL is the smaller of the record's and its minimum field (RFC 2308 section 5).
        let ttl = self.settings.ttl;
        let (zone_at, serial) = (self.zone_at, self.set.serial);
        self.reply.record(section, Owner::At(zone_at), rtype::SOA, ttl.min(300), |out| {
            soa_data(zone_at, serial, ttl, out);
        });
    }
}

/// The data of a zone's SOA, whose name stands at `zone_at`.
fn soa_data(zone_at: usize, serial: u32, minimum: u32, out: &mut Vec<u8>) {
    let pointer = (0xC000 | zone_at as u16).to_be_bytes();
    out.extend_from_slice(b"\x02ns\x03dns");
    out.extend_from_slice(&pointer);
    out.extend_from_slice(b"\x0ahostmaster");
    out.extend_from_slice(&pointer);
    for number in [serial, 7200, 1800, 86_400, minimum] {
        out.extend_from_slice(&number.to_be_bytes());
    }
}

fn of_type(mut addresses: Vec<IpAddr>, qtype: u16) -> Vec<IpAddr> {
    addresses.retain(|a| match qtype {
        rtype::A => a.is_ipv4(),
        rtype::AAAA => a.is_ipv6(),
        _ => false,
    });
    addresses
}

/// Orders the items by chance, as `seed` has it (Fisher and Yates); 0 leaves them.
fn shuffle<T>(items: &mut [T], seed: u64) {
    if seed == 0 {
        return;
    }
    let mut state = seed;
    for i in (1..items.len()).rev() {
        // SplitMix64: good enough to spread load, and one multiplication a step.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^= z >> 27;
        items.swap(i, (z % (i as u64 + 1)) as usize);
    }
}

/// Answers a query from published names. Everything else is forwarded or refused.
pub fn answer_published(
    settings: &Settings,
    names: &Published,
    request: &[u8],
    transport: Transport,
    seed: u64,
    out: &mut Vec<u8>,
) -> Outcome {
    let query = match read(settings, request, transport, out) {
        Ok(query) => query,
        Err(outcome) => return outcome,
    };
    let text = query.name.to_text();
    let Some(host) = names.find(&text) else { return unhandled(settings, &query, transport, out) };
    if matches!(query.rtype, rtype::AXFR | rtype::IXFR) {
        return simple(&query, transport, Rcode::Refused, InZone::Outside, out);
    }
    let ttl = host.ttl.unwrap_or(settings.ttl);
    let mut addresses = Vec::new();
    let mut alias = None;
    for target in &host.targets {
        match target {
            Target::Address(address) => addresses.push(*address),
            Target::Name(name) => alias = alias.or(Some(name.to_string())),
        }
    }
    let mut chain = Vec::new();
    // An alias cannot stand beside addresses (RFC 1034 section 3.6.2); addresses are the better answer.
    if let (true, Some(target)) = (addresses.is_empty(), alias) {
        let within = names.find(&target).map(|h| h.targets.as_slice());
        chain.push(target);
        if matches!(query.rtype, rtype::A | rtype::AAAA) {
            match within {
                Some(targets) => addresses.extend(targets.iter().filter_map(|t| match t {
                    Target::Address(a) => Some(*a),
                    Target::Name(_) => None,
                })),
                None if settings.forwards => return Outcome::Chase(Chain { names: chain, zone: InZone::Outside, ttl }),
                None => {}
            }
        }
    }
    let mut chosen = of_type(addresses, query.rtype);
    shuffle(&mut chosen, seed);
    let mut reply = Reply::new(&query, limit(&query, transport), out);
    if chain.is_empty() && chosen.is_empty() {
        // Each published name is the top of a zone of its own, which is what its SOA says.
        let top = wire::HEADER;
        let (section, at_top) =
            (if query.rtype == rtype::SOA { Section::Answer } else { Section::Authority }, Owner::Question);
        reply.record(section, at_top, rtype::SOA, ttl.min(300), |out| soa_data(top, names.serial, ttl, out));
    } else {
        let owner = write_chain(&mut reply, &chain, ttl);
        for address in chosen {
            reply.address(Section::Answer, Owner::At(owner), ttl, address);
        }
    }
    Outcome::Reply(Summary::new(&query, InZone::Outside, reply.finish(Rcode::NoError, true)))
}
