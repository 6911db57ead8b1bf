//! Runs the recorded cases through `plan::eval`, hop by hop, without a kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use portolan_dataplane::Change;
use portolan_plan::eval::{self, Outcome, Packet};
use portolan_plan::service::compile;
use portolan_plan::world::{L4, World};
use serde_json::Value;

use crate::case::{self, Case};
use crate::lab::{self, NODES, PODS};

/// What may happen to a probe: name of the answering server with the class of the source that it sees, or a failure.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Reply { name: String, source: String },
    Failure(&'static str),
}

fn apply(world: &mut World, change: &Change) {
    match change {
        Change::Service(service) => {
            world.put_service(service);
        }
        Change::ServiceGone(key) => world.delete_service(key),
        Change::Slice(slice) => {
            world.put_slice(slice);
        }
        Change::SliceGone(key) => {
            world.delete_slice(key);
        }
        Change::ServiceCidr(name, nets) => world.put_service_cidr(name, nets.clone()),
        Change::Pod(pod) => {
            world.put_pod(pod);
        }
        Change::PodGone(key) => {
            world.delete_pod(&key.namespace, &key.name);
        }
        Change::Node(_) => {}
    }
}

/// Who has an address: a pod, a node, a client, or the gateway for everything else in its networks.
fn owner(addr: IpAddr) -> String {
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

fn fates(world: &World, probe: &Value) -> BTreeSet<Fate> {
    let from = probe["from"].as_str().unwrap();
    let to = lab::address(probe["to"].as_str().unwrap()).unwrap();
    let protocol = if probe["proto"] == "udp" { L4::Udp } else { L4::Tcp };
    let port = NonZeroU16::new(probe["port"].as_u64().unwrap() as u16).unwrap();
    let v6 = to.is_ipv6();
    let address = |name: &str| lab::address(&if v6 { format!("{name}.6") } else { name.to_owned() }).unwrap();
    let source = address(from);
    let (node, interface) = match &from[..1] {
        "p" => (Some(format!("n{}", &from[1..2])), Some(format!("v{from}"))),
        "n" => (Some(from.to_owned()), None),
        _ => (probe["via"].as_str().map(str::to_owned), Some("eth0".to_owned())),
    };
    let packet = Packet { source, destination: to, transport: Some((protocol, port)), interface };
    let mut all = BTreeSet::new();
    travel(world, node, packet, source, 0, &mut all);
    all
}

fn travel(world: &World, node: Option<String>, packet: Packet, origin: IpAddr, hops: usize, all: &mut BTreeSet<Fate>) {
    assert!(hops < 6, "a packet that goes round in circles: {packet:?}");
    let (protocol, port) = packet.transport.unwrap();
    let Some(node) = node else {
        // On the LAN: on to whoever has the address.
        let to = owner(packet.destination);
        if NODES.contains(&&*to) {
            return travel(world, Some(to), packet, origin, hops + 1, all);
        }
        if let Some(k) = to.strip_prefix('p') {
            return travel(world, Some(format!("n{}", &k[..1])), packet, origin, hops + 1, all);
        }
        arrive(&to, &packet, origin, port, all);
        return;
    };
    let view = lab::node_view(&node);
    let (map, _) = compile(world, &view);
    let mut count = 1;
    let mut choice = 0;
    while choice < count {
        let outcome = eval::packet(&map, &view, &packet, |set| {
            count = set.len();
            choice
        });
        choice += 1;
        let mut next = packet.clone();
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
                }
            }
        }
        next.interface = Some("eth0".into());
        let to = owner(next.destination);
        let here = to == node || to == "localhost" || to.strip_prefix('p').is_some_and(|p| p[..1] == node[1..]);
        let port = next.transport.unwrap().1;
        if here || to == "gw" || to == "dead" {
            arrive(if to == "localhost" { &node } else { &to }, &next, origin, port, all);
        } else {
            travel(world, None, next, origin, hops + 1, all);
        }
    }
}

fn arrive(to: &str, packet: &Packet, origin: IpAddr, port: NonZeroU16, all: &mut BTreeSet<Fate>) {
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

fn class(source: IpAddr, origin: IpAddr) -> String {
    let of = owner(source);
    if NODES.contains(&&*of) {
        format!("node:{of}")
    } else if source == origin {
        "client".into()
    } else {
        of
    }
}

fn check(world: &World, case: &Case, probe: &Value) -> Result<(), String> {
    let fates = fates(world, probe);
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
    let expected: BTreeSet<&str> = BTreeSet::from([expect["outcome"].as_str().unwrap()]);
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
    let mut wrong = Vec::new();
    let mut checked = 0;
    for case in case::load() {
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
            if let Err(error) = check(&world, &case, step) {
                wrong.push(format!("{} step {i} {} -> {}: {error}", case.id, step["from"], step["to"]));
            }
        }
    }
    println!("{checked} probes evaluated");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
