//! Runs the recorded cases in the lab, one test a topic, several labs side by side in each.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use portolan_dataplane::health::HealthServers;
use portolan_dataplane::{Change, ServiceProxy};
use portolan_plan::world::NodeView;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::case::{self, Case};
use crate::lab::{self, Lab, NODES, PODS};
use crate::probe::{self, Flow, Seen};

/// Cases a lab runs one after the other; more labs run at the same time.
const CASES_A_LAB: usize = 4;
/// Silence is believed after this.
const SILENCE: Duration = Duration::from_millis(700);
/// The recorded times leave more room than this: a try each 1.2 s against a timeout of 2 s.
const STANDSTILL: Duration = Duration::from_millis(300);
/// Anything else may take its time on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts the echo servers of the recording everywhere in the lab.
pub fn serve(lab: &Lab, servers: &mut JoinSet<()>) {
    for (name, space) in lab.spaces.iter().filter(|(n, _)| *n != "lan") {
        let mut addresses: Vec<IpAddr> =
            [name.clone(), format!("{name}.6")].iter().filter_map(|n| lab::address(n)).collect();
        let mut ports = vec![8080, 8081, 8082];
        let mut says = name.clone();
        if let Some(k) = name.strip_prefix('n') {
            addresses.extend([format!("{name}.gw"), format!("{name}.gw.6")].iter().filter_map(|n| lab::address(n)));
            ports.push(30999);
            says = format!("h{k}");
        }
        crate::echo::start(servers, space, &says, &addresses, &ports);
    }
}

struct Site {
    lab: Lab,
    proxies: Vec<(ServiceProxy, HealthServers)>,
    /// How much longer than planned the steps of the current case took.
    late: Duration,
    _servers: JoinSet<()>,
}

impl Site {
    fn build(view: fn(&str) -> NodeView) -> Site {
        let lab = Lab::build();
        let mut servers = JoinSet::new();
        serve(&lab, &mut servers);
        let proxies = NODES
            .iter()
            .map(|name| {
                let space = &lab.spaces[*name];
                let mut proxy = ServiceProxy::new(space, view(name)).unwrap();
                proxy.change(case::service_range());
                (proxy, HealthServers::new(space.clone(), tokio::runtime::Handle::current()))
            })
            .collect();
        Site { lab, proxies, late: Duration::ZERO, _servers: servers }
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), String> {
        // The proxies block, as on their own threads in the agent.
        tokio::task::block_in_place(|| self.apply_blocking(changes))
    }

    fn apply_blocking(&mut self, changes: &[Change]) -> Result<(), String> {
        for (proxy, health) in &mut self.proxies {
            for change in changes {
                proxy.change(change.clone());
            }
            let report = proxy.sync();
            for family in &report.families {
                if let Some(error) = &family.error {
                    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
                    return Err(format!("{}: {error}: {source}", family.family.as_str()));
                }
            }
            if !proxy.flows_settled(PATIENCE) {
                return Err("UDP flows are not looked at".into());
            }
            let failed = health.set(proxy.health_checks(), &proxy.node().node_port_addresses);
            if let Some((key, port, error)) = failed.first() {
                return Err(format!("health check of {key} on {port}: {error}"));
            }
        }
        Ok(())
    }

    /// Runs a case, again if it failed while the machine stood still for so long that timeouts of the case itself passed.
    async fn run(&mut self, case: &Case) -> Result<(), String> {
        let timed = case.steps.iter().any(|s| s.get("gap").is_some() || s.get("wait").is_some());
        let mut result = Ok(());
        for _ in 0..5 {
            self.late = Duration::ZERO;
            result = self.run_once(case).await;
            if result.is_ok() || !timed || self.late < STANDSTILL {
                break;
            }
        }
        result
    }

    async fn run_once(&mut self, case: &Case) -> Result<(), String> {
        let puts: Vec<Change> = case.objects.iter().cloned().map(case::put).collect();
        self.apply(&puts)?;
        let result = self.steps(case).await;
        let mut deletes: Vec<Change> = case.objects.iter().map(case::delete).collect();
        for step in &case.steps {
            deletes.extend(step["change"]["put"].as_array().into_iter().flatten().map(case::delete));
        }
        self.apply(&deletes)?;
        result
    }

    async fn steps(&mut self, case: &Case) -> Result<(), String> {
        let mut flows: BTreeMap<String, Flow> = BTreeMap::new();
        let mut bound: BTreeMap<String, String> = BTreeMap::new();
        let in_order = case.steps.iter().any(|s| {
            ["change", "wait", "flow", "gap"].iter().any(|k| s.get(k).is_some())
                || s["expect"].get("distinct").is_some()
        });
        if !in_order {
            let checks = case.steps.iter().enumerate().map(|(i, probe)| {
                let lab = &self.lab;
                async move {
                    let mut flows = BTreeMap::new();
                    let mut bound = BTreeMap::new();
                    run_probe(lab, probe, &mut flows, &mut bound)
                        .await
                        .map_err(|e| format!("probe {i} {}: {e}", brief(probe)))
                }
            });
            return futures::future::try_join_all(checks).await.map(|_| ());
        }
        for (i, step) in case.steps.iter().enumerate() {
            if let Some(change) = step.get("change") {
                self.apply(&case::changes(change))?;
            } else if let Some(wait) = step.get("wait") {
                // The recording's own pause: the behaviour over time is what the case is about.
                tokio::time::sleep(Duration::from_secs_f64(wait.as_f64().unwrap())).await;
            } else {
                let start = Instant::now();
                let result = run_probe(&self.lab, step, &mut flows, &mut bound).await;
                let silent = result.is_ok() && case::expectations(step).iter().any(|e| e["outcome"] != "reply");
                let gaps = step["count"].as_u64().unwrap_or(1).saturating_sub(1) as f64;
                let planned = Duration::from_secs_f64(step["gap"].as_f64().unwrap_or(0.0) * gaps);
                if !silent {
                    self.late += start.elapsed().saturating_sub(planned);
                }
                result.map_err(|e| format!("step {i} {}: {e}", brief(step)))?;
            }
        }
        Ok(())
    }
}

fn brief(probe: &Value) -> String {
    let text = |k: &str| probe[k].as_str().unwrap_or_default().to_owned();
    format!("{} -> {} {} {} {}", text("from"), text("to"), text("proto"), probe["port"], text("via"))
}

async fn run_probe(
    lab: &Lab,
    probe: &Value,
    flows: &mut BTreeMap<String, Flow>,
    bound: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    let text = |k: &str| probe[k].as_str();
    let space = &lab.spaces[text("from").unwrap()];
    let to = lab::address(text("to").unwrap()).ok_or("unknown address")?;
    let to = SocketAddr::new(to, probe["port"].as_u64().unwrap_or_default() as u16);
    let mark = text("via").map(|via| via[1..].parse::<u32>().unwrap());
    let proto = text("proto").unwrap();
    let expectations = case::expectations(probe);
    let silence = expectations.iter().any(|e| e["outcome"] == "timeout" || e["outcome"] == "mixed");
    // TCP learns of an ICMP error after its first retransmission in some cases (README of the recording).
    let patience = if silence { SILENCE } else { PATIENCE };

    if proto == "http" {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            let answer =
                probe::http(space, to, mark, text("method").unwrap_or("GET"), text("path").unwrap_or("/"), patience)
                    .await;
            match check_http(&probe["expect"], &answer) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    let count = probe["count"].as_u64().unwrap_or(1);
    let mut seen = Vec::new();
    if let Some(name) = text("flow") {
        if !flows.contains_key(name) {
            match probe::open(space, proto, to, mark, patience).await {
                Ok(flow) => {
                    flows.insert(name.to_owned(), flow);
                }
                Err(failure) => seen.push(failure),
            }
        }
        if let Some(flow) = flows.get_mut(name) {
            for _ in 0..count {
                seen.push(probe::exchange(flow, patience).await);
            }
        }
    } else if let Some(gap) = probe.get("gap") {
        for i in 0..count {
            if i > 0 {
                tokio::time::sleep(Duration::from_secs_f64(gap.as_f64().unwrap())).await;
            }
            seen.push(probe::once(space, proto, to, mark, patience).await);
        }
    } else if probe["expect"].get("distinct").is_some() {
        for _ in 0..count {
            seen.push(probe::once(space, proto, to, mark, patience).await);
        }
    } else {
        seen = futures::future::join_all((0..count).map(|_| probe::once(space, proto, to, mark, patience))).await;
    }
    let mut errors = Vec::new();
    for expect in expectations {
        match check(lab, probe, expect, &seen, bound) {
            Ok(()) => return Ok(()),
            Err(error) => errors.push(error),
        }
    }
    Err(errors.join("; or "))
}

fn check(
    lab: &Lab,
    probe: &Value,
    expect: &Value,
    seen: &[Seen],
    bound: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    let _ = lab;
    let outcome = expect["outcome"].as_str().unwrap();
    let allowed: Vec<&str> = match outcome {
        "mixed" => expect["outcomes"].as_array().unwrap().iter().map(|o| o.as_str().unwrap()).collect(),
        one => vec![one],
    };
    let mut answering = BTreeSet::new();
    for one in seen {
        let kind = match one {
            Seen::Reply { .. } => "reply",
            Seen::Refused => "refused",
            Seen::Unreachable => "icmp-unreachable",
            Seen::Timeout => "timeout",
            Seen::Other(_) => "other",
        };
        if !allowed.contains(&kind) {
            return Err(format!("expected {outcome}, saw {one:?}"));
        }
        if let Seen::Reply { name, port, peer } = one {
            answering.insert(name.clone());
            check_source(probe, expect, name, peer)?;
            let ports: Vec<u64> = match expect.get("targetPorts") {
                Some(ports) => ports.as_array().unwrap().iter().map(|p| p.as_u64().unwrap()).collect(),
                None => vec![8080],
            };
            if name != "gw" && !ports.contains(&u64::from(*port)) {
                return Err(format!("{name} answered on port {port}, expected {ports:?}"));
            }
        }
    }
    let endpoints = case::names(&expect["endpoints"]);
    match expect["distinct"].as_str() {
        None if !endpoints.is_empty() && answering != endpoints => {
            Err(format!("expected {endpoints:?}, saw {answering:?}"))
        }
        None => Ok(()),
        Some(_) if !answering.is_subset(&endpoints) => {
            Err(format!("expected some of {endpoints:?}, saw {answering:?}"))
        }
        Some("one") => {
            if answering.len() != 1 {
                return Err(format!("expected a single endpoint, saw {answering:?}"));
            }
            let one = answering.pop_first().unwrap();
            match expect["one"].as_str() {
                Some(name) => {
                    let known = bound.entry(name.to_owned()).or_insert_with(|| one.clone());
                    if *known == one { Ok(()) } else { Err(format!("bound to {known}, saw {one}")) }
                }
                None => Ok(()),
            }
        }
        Some(_) if answering.len() >= 2 => Ok(()),
        Some(_) => Err(format!("expected several endpoints, saw {answering:?}")),
    }
}

/// `client` or `node:nK`, from whatever name an address has in the lab.
fn class_of(name: &str) -> String {
    match name.split('.').next() {
        Some(node) if NODES.contains(&node) => format!("node:{node}"),
        _ => name.to_owned(),
    }
}

fn check_source(probe: &Value, expect: &Value, endpoint: &str, peer: &IpAddr) -> Result<(), String> {
    let from = probe["from"].as_str().unwrap();
    let all: Vec<String> = NODES
        .iter()
        .flat_map(|n| [(*n).to_owned(), format!("{n}.gw")])
        .chain(PODS.map(str::to_owned))
        .chain(["x1", "x2", "gw", "localhost"].map(str::to_owned))
        .collect();
    let peer_name = all
        .iter()
        .flat_map(|n| [n.clone(), format!("{n}.6")])
        .find(|n| lab::address(n).as_ref() == Some(peer))
        .ok_or_else(|| format!("unknown peer {peer}"))?;
    let peer_class = class_of(peer_name.trim_end_matches(".6"));
    if let Some(recorded) = expect["peers"].get(endpoint).and_then(Value::as_str) {
        let wanted = class_of(recorded);
        return if wanted == peer_class {
            Ok(())
        } else {
            Err(format!("{endpoint} saw {peer_name}, expected {wanted}"))
        };
    }
    let sources: Vec<&str> = match &expect["source"] {
        Value::String(one) => vec![one],
        Value::Array(many) => many.iter().map(|s| s.as_str().unwrap()).collect(),
        _ => return Ok(()),
    };
    let matches = sources.iter().any(|s| match *s {
        "client" => peer_class == class_of(from),
        node => peer_class == node,
    });
    if matches { Ok(()) } else { Err(format!("{endpoint} saw {peer_name}, expected {sources:?}")) }
}

fn check_http(expect: &Value, answer: &Result<probe::HttpAnswer, Seen>) -> Result<(), String> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(seen) => {
            let kind = match seen {
                Seen::Refused => "refused",
                Seen::Timeout => "timeout",
                Seen::Unreachable => "icmp-unreachable",
                _ => "other",
            };
            return if expect["outcome"] == kind { Ok(()) } else { Err(format!("saw {seen:?}, expected {expect}")) };
        }
    };
    if expect["outcome"] != "reply" {
        return Err(format!("status {}, expected {expect}", answer.status));
    }
    if expect.get("status").is_some_and(|s| *s != answer.status) {
        return Err(format!("status {}, expected {}", answer.status, expect["status"]));
    }
    for (name, value) in expect["headers"].as_object().into_iter().flatten() {
        let found = answer.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        if found != value.as_str() {
            return Err(format!("header {name}: {found:?}, expected {value}"));
        }
    }
    if let Some(json) = expect.get("json") {
        let body: Value = serde_json::from_str(&answer.body).map_err(|e| format!("{e}: {}", answer.body))?;
        if body != case::resolve(json.clone()) {
            return Err(format!("body {body}, expected {json}"));
        }
    }
    Ok(())
}

fn topic(name: &str) {
    let only = std::env::var("TRAFFIC_CASE").ok();
    let chosen = |c: &Case| c.topic == name && only.as_ref().is_none_or(|o| *o == c.id);
    run_cases(name, case::load().into_iter().filter(chosen).collect(), lab::node_view);
}

/// What is recorded with other expectations for pods recognised by network; the evaluator takes all cases that way.
#[test]
fn pods_recognised_by_network() {
    let differs = |c: &Case| c.steps.iter().any(|s| s.get("byNetwork").is_some());
    let cases: Vec<Case> = case::load_cluster_cidr().into_iter().filter(differs).collect();
    assert!(!cases.is_empty());
    run_cases("by network", cases, lab::node_view_by_network);
}

/// What is recorded over IPv4 alone holds over IPv6: flows of UDP clients, affinity, and who sees whose address.
#[test]
fn over_ipv6() {
    let topics = ["udp-flows", "affinity", "hairpin", "external-policy"];
    let mut cases = case::load_over_ipv6(&topics);
    for topic in topics {
        assert!(cases.iter().any(|c| c.topic == topic), "no case of {topic}");
    }
    for case in &mut cases {
        case.id.push_str("/ipv6");
    }
    run_cases("over IPv6", cases, lab::node_view);
}

fn run_cases(name: &str, cases: Vec<Case>, view: fn(&str) -> NodeView) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let results: Vec<(String, Result<(), String>)> = runtime.block_on(async {
        let mut labs = JoinSet::new();
        for chunk in cases.chunks(CASES_A_LAB) {
            let chunk = chunk.to_vec();
            labs.spawn(async move {
                let mut site = Site::build(view);
                let mut results = Vec::new();
                for case in chunk {
                    let result = site.run(&case).await;
                    results.push((case.id, result));
                }
                results
            });
        }
        labs.join_all().await.into_iter().flatten().collect()
    });
    let known = case::known_failing();
    let mut wrong = Vec::new();
    let passed = results.iter().filter(|(_, r)| r.is_ok()).count();
    println!("{name}: {passed} of {} cases pass", results.len());
    for (id, result) in &results {
        match result {
            Ok(()) if known.contains(id) => {
                wrong.push(format!("{id} passes: take it off conformance/known-failing/traffic.txt"))
            }
            Err(error) if !known.contains(id) => wrong.push(format!("{id}: {error}")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

macro_rules! topics {
    ($($test:ident = $topic:literal),* $(,)?) => {
        $(#[test] fn $test() { topic($topic); })*

        #[test]
        fn every_topic_has_a_test() {
            let tested = BTreeSet::from([$($topic),*]);
            let recorded: BTreeSet<String> = case::load().into_iter().map(|c| c.topic).collect();
            assert_eq!(recorded.iter().map(String::as_str).collect::<BTreeSet<_>>(), tested);
            let ids: BTreeSet<String> = case::load().into_iter().map(|c| c.id).collect();
            let unknown: Vec<String> = case::known_failing().difference(&ids).cloned().collect();
            assert!(unknown.is_empty(), "known-failing names that do not exist: {unknown:?}");
        }
    };
}

topics! {
    clusterip = "clusterip",
    nodeport = "nodeport",
    external_policy = "external-policy",
    loadbalancer = "loadbalancer",
    external_ip = "external-ip",
    source_ranges = "source-ranges",
    internal_policy = "internal-policy",
    terminating = "terminating",
    health = "health",
    affinity = "affinity",
    hairpin = "hairpin",
    topology = "topology",
    duplicates = "duplicates",
    udp_flows = "udp-flows",
    connections = "connections",
    changes = "changes",
    ipv6 = "ipv6",
    dual_stack = "dual-stack",
}
