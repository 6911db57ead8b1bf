//! Runs the recorded cases through `plan::eval`, hop by hop, without a kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use portolan_dataplane::Change;
use portolan_plan::eval::{self, Outcome, Packet};
use portolan_plan::service::{ServiceMap, compile};
use portolan_plan::world::{L4, NodeView, World};
use serde_json::Value;

use crate::case::{self, Case};
use crate::lab::{self, NODES, PODS};

/// What may happen to a probe: name of the answering server with the class of the source that it sees, or a failure.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    Reply { name: String, source: String },
    Failure(&'static str),
}

/// What each node does.
pub type Nodes = BTreeMap<String, (ServiceMap, NodeView)>;

pub fn apply(world: &mut World, change: &Change) {
    match change {
        Change::Service(key, service) => world.set_service(key, service.clone()),
        Change::Slice(key, slice) => {
            world.set_slice(key, slice.clone());
        }
        Change::ServiceCidr(name, nets) => world.put_service_cidr(name, nets.clone()),
        Change::Pod(key, pod) => {
            world.set_pod(key, pod.clone());
        }
        Change::Node(_) => {}
    }
}

/// Who has an address: a pod, a node, a client, or the gateway for everything else in its networks.
pub fn owner(addr: IpAddr) -> String {
    for name in NODES
        .iter()
        .map(|n| (*n).to_owned())
        .chain(NODES.iter().map(|n| format!("{n}.gw")))
        .chain(PODS.map(str::to_owned))
    {
        if [name.clone(), format!("{name}.6")].iter().any(|n| lab::address(n) == Some(addr)) {
            return name.split('.').next().unwrap().to_owned();
        }
    }
    if NODES.iter().any(|n| {
        [format!("p{}dead", &n[1..]), format!("p{}dead.6", &n[1..])].iter().any(|d| lab::address(d) == Some(addr))
    }) {
        return "dead".into();
    }
    if addr.is_loopback() {
        return "localhost".into();
    }
    "gw".into()
}

/// All that may happen to a probe.
pub fn fates(nodes: &Nodes, probe: &Value) -> BTreeSet<Fate> {
    let from = probe["from"].as_str().unwrap();
    let to = lab::address(probe["to"].as_str().unwrap()).unwrap();
    let protocol = if probe["proto"] == "udp" { L4::Udp } else { L4::Tcp };
    let port = NonZeroU16::new(probe["port"].as_u64().unwrap() as u16).unwrap();
    let v6 = to.is_ipv6();
    let address = |name: &str| lab::address(&if v6 { format!("{name}.6") } else { name.to_owned() }).unwrap();
    // To an address of its own a node speaks from that address.
    let source = if owner(to) == from { to } else { address(from) };
    let (node, interface) = match &from[..1] {
        "p" => (Some(format!("n{}", &from[1..2])), Some(format!("v{from}"))),
        "n" => (Some(from.to_owned()), None),
        _ => (probe["via"].as_str().map(str::to_owned), Some("eth0".to_owned())),
    };
    let packet = Packet { source, destination: to, transport: Some((protocol, port)), interface };
    let mut all = BTreeSet::new();
    let journey = Journey { from: from.to_owned(), origin: source, hops: 0, translators: Vec::new() };
    travel(nodes, node, packet, &journey, &mut all);
    // That a host is unreachable counts as passing trouble, which UDP sockets do not report.
    if protocol == L4::Udp && all.contains(&Fate::Failure("icmp-unreachable")) {
        all.insert(Fate::Failure("timeout"));
    }
    all
}

#[derive(Clone)]
struct Journey {
    /// Who sent the packet.
    from: String,
    /// From which address.
    origin: IpAddr,
    hops: usize,
    /// Nodes that changed the destination and left the source.
    translators: Vec<String>,
}

impl Journey {
    fn hop(&self) -> Journey {
        Journey { hops: self.hops + 1, ..self.clone() }
    }

    /// Whether the answer of `to` passes the nodes that have to translate it back: those on its own way only.
    fn answered(&self, to: &str) -> bool {
        let node_of = |name: &str| match &name[..1] {
            "p" => format!("n{}", &name[1..2]),
            _ => name.to_owned(),
        };
        let (here, back) = (node_of(to), node_of(&self.from));
        self.translators.iter().all(|n| *n == here || *n == back)
    }
}

fn travel(nodes: &Nodes, node: Option<String>, packet: Packet, journey: &Journey, all: &mut BTreeSet<Fate>) {
    let hops = journey.hops;
    assert!(hops < 6, "a packet that goes round in circles: {packet:?}");
    let (protocol, port) = packet.transport.unwrap();
    let Some(node) = node else {
        // On the LAN: on to whoever has the address.
        let to = owner(packet.destination);
        if NODES.contains(&&*to) {
            return travel(nodes, Some(to), packet, &journey.hop(), all);
        }
        if let Some(k) = to.strip_prefix('p') {
            return travel(nodes, Some(format!("n{}", &k[..1])), packet, &journey.hop(), all);
        }
        arrive(&to, &packet, journey, port, all);
        return;
    };
    let (map, view) = &nodes[&node];
    let mut count = 1;
    let mut choice = 0;
    while choice < count {
        let outcome = eval::packet(map, view, &packet, |set| {
            count = set.len();
            choice
        });
        choice += 1;
        let mut next = packet.clone();
        let mut journey = journey.hop();
        match outcome {
            Outcome::Rejected => {
                all.insert(Fate::Failure("refused"));
                continue;
            }
            Outcome::Dropped => {
                all.insert(Fate::Failure("timeout"));
                continue;
            }
            Outcome::Untouched => {}
            Outcome::Forwarded { backend, masqueraded, .. } => {
                next.destination = backend.addr;
                next.transport = Some((protocol, backend.port));
                let to = owner(backend.addr);
                if masqueraded && to != node {
                    next.source =
                        lab::address(&if backend.addr.is_ipv6() { format!("{node}.6") } else { node.clone() }).unwrap();
                } else {
                    journey.translators.push(node.clone());
                }
            }
        }
        next.interface = Some("eth0".into());
        let to = owner(next.destination);
        let here = to == node || to == "localhost" || to.strip_prefix('p').is_some_and(|p| p[..1] == node[1..]);
        let port = next.transport.unwrap().1;
        if here || to == "gw" || to == "dead" {
            // The node of a pod that is gone answers in its place.
            let dead = if to == "dead" { dead_node(next.destination) } else { String::new() };
            let to = match to.as_str() {
                "localhost" => &node,
                "dead" if dead != node => {
                    travel(nodes, None, next, &journey, all);
                    continue;
                }
                _ => &to,
            };
            arrive(to, &next, &journey, port, all);
        } else {
            travel(nodes, None, next, &journey, all);
        }
    }
}

/// The node in whose network a pod that is gone was.
fn dead_node(addr: IpAddr) -> String {
    let k = match addr {
        IpAddr::V4(v4) => u16::from(v4.octets()[2]),
        IpAddr::V6(v6) => v6.segments()[3],
    };
    format!("n{k}")
}

fn arrive(to: &str, packet: &Packet, journey: &Journey, port: NonZeroU16, all: &mut BTreeSet<Fate>) {
    let origin = journey.origin;
    // A packet that comes in with the receiver's own address as its source is a martian.
    if to == journey.from && to.starts_with('p') && packet.source == origin {
        all.insert(Fate::Failure("timeout"));
        return;
    }
    let place = if to == "dead" { dead_node(packet.destination) } else { to.to_owned() };
    if !journey.answered(&place) {
        all.insert(Fate::Failure("timeout"));
        return;
    }
    let listens = matches!(port.get(), 8080..=8082) || to.starts_with('n') && port.get() == 30999;
    all.insert(match to {
        "dead" => Fate::Failure("icmp-unreachable"),
        "gw" => Fate::Reply { name: "gw".into(), source: class(packet.source, origin) },
        _ if !listens => Fate::Failure("refused"),
        _ => Fate::Reply {
            name: to.strip_prefix('n').map_or(to.to_owned(), |k| format!("h{k}")),
            source: class(packet.source, origin),
        },
    });
}

pub fn class(source: IpAddr, origin: IpAddr) -> String {
    let of = owner(source);
    if NODES.contains(&&*of) {
        format!("node:{of}")
    } else if source == origin {
        "client".into()
    } else {
        of
    }
}

fn check(nodes: &Nodes, case: &Case, probe: &Value) -> Result<(), String> {
    let fates = fates(nodes, probe);
    let mut errors = Vec::new();
    for expect in case::expectations(probe) {
        match check_one(case, probe, expect, &fates) {
            Ok(()) => return Ok(()),
            Err(error) => errors.push(error),
        }
    }
    Err(errors.join("; or "))
}

fn check_one(case: &Case, probe: &Value, expect: &Value, fates: &BTreeSet<Fate>) -> Result<(), String> {
    let sticky = case
        .objects
        .iter()
        .chain(case.steps.iter().flat_map(|s| s["change"]["put"].as_array().into_iter().flatten()))
        .any(|o| o["spec"]["sessionAffinity"] == "ClientIP");
    let outcomes: BTreeSet<&str> =
        fates.iter().map(|f| if let Fate::Failure(kind) = f { kind } else { "reply" }).collect();
    let expected: BTreeSet<&str> = match expect["outcome"].as_str().unwrap() {
        "mixed" => expect["outcomes"].as_array().unwrap().iter().map(|o| o.as_str().unwrap()).collect(),
        one => BTreeSet::from([one]),
    };
    if outcomes != expected {
        return Err(format!("expected {expected:?}, evaluated {fates:?}"));
    }
    let answering: BTreeSet<String> =
        fates.iter().filter_map(|f| if let Fate::Reply { name, .. } = f { Some(name.clone()) } else { None }).collect();
    let endpoints = case::names(&expect["endpoints"]);
    // Affinity is memory, which the evaluator does not have: what is bound must be among what may be chosen.
    let right = if sticky || expect.get("distinct").is_some() {
        endpoints.is_superset(&answering) || endpoints.is_subset(&answering)
    } else {
        endpoints == answering
    };
    if !endpoints.is_empty() && !right {
        return Err(format!("expected {endpoints:?}, evaluated {answering:?}"));
    }
    let from = probe["from"].as_str().unwrap();
    for fate in fates {
        let Fate::Reply { name, source } = fate else { continue };
        let Some(recorded) = expect["peers"].get(name).and_then(Value::as_str) else { continue };
        let node = recorded.split('.').next().unwrap();
        let wanted = if NODES.contains(&node) { format!("node:{node}") } else { "client".to_owned() };
        // A pod that reaches itself is masqueraded by its node on the way back in.
        let hairpin = *name == from && wanted.starts_with("node:");
        if *source != wanted && !hairpin {
            return Err(format!("{name} sees {source}, recorded {wanted}"));
        }
    }
    Ok(())
}

#[test]
fn the_evaluator_agrees_with_the_recording() {
    evaluate(case::load(), lab::node_view);
}

#[test]
fn the_evaluator_agrees_with_the_recording_by_network() {
    evaluate(case::load_cluster_cidr(), lab::node_view_by_network);
}

fn evaluate(cases: Vec<Case>, view: fn(&str) -> NodeView) {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for case in cases {
        let mut world = World::default();
        apply(&mut world, &case::service_range());
        for object in &case.objects {
            apply(&mut world, &case::put(object.clone()));
        }
        let mut opened = BTreeSet::new();
        for (i, step) in case.steps.iter().enumerate() {
            if let Some(change) = step.get("change") {
                for change in case::changes(change) {
                    apply(&mut world, &change);
                }
                continue;
            }
            // Health checks are no forwarding, open flows are conntrack's.
            let open_flow = step["flow"].as_str().is_some_and(|f| !opened.insert(f.to_owned()));
            let health_port = step["port"] == 32000;
            if step.get("wait").is_some() || open_flow || step["proto"] == "http" || health_port {
                continue;
            }
            checked += 1;
            let nodes: Nodes = NODES
                .iter()
                .map(|n| ((*n).to_owned(), view(n)))
                .map(|(n, view)| (n, (compile(&world, &view).0, view)))
                .collect();
            if let Err(error) = check(&nodes, &case, step) {
                wrong.push(format!("{} step {i} {} -> {}: {error}", case.id, step["from"], step["to"]));
            }
        }
    }
    println!("{checked} probes evaluated");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
