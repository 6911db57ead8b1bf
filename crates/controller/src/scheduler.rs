//! The scheduler: gives each new pod a node.
//!
//! [`choose`] decides for one pod over the nodes and what is placed on them. Nodes that fit are compared by how well they spread
//! the pods of one owner, then by load. There is no preemption.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Binding, Node, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference, Pod, PodSpec, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use portolan_client::{EventRecorder, EventType};
use portolan_plan::slices::ZONE;
use serde_json::json;

use crate::Context;
use crate::pods;
use crate::queue::{Key, Next, Queue};
use crate::util::{controller_of, is_conflict, is_not_found, message, reference};

/// Bindings under way at a time. Decisions are taken one after the other.
const WORKERS: usize = 16;
/// The scheduler that pods ask for by default.
const SCHEDULER_NAME: &str = "default-scheduler";

/// What is placed on one node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Pods, finished ones excluded.
    pub pods: usize,
    /// Pods by the uid of their controller.
    pub owners: HashMap<String, usize>,
    /// Requested CPU, thousandths of a core.
    pub cpu_milli: i64,
    /// Requested memory, bytes.
    pub memory: i64,
    /// Host ports in use: protocol, port, and address (empty for all).
    pub host_ports: Vec<(String, i32, String)>,
}

/// What a pod takes on a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand {
    owner: Option<String>,
    cpu_milli: i64,
    memory: i64,
    host_ports: Vec<(String, i32, String)>,
}

impl Demand {
    /// Reads it from a pod. Init containers run before the others, so the larger of both needs counts; sidecars run with them.
    pub fn of(pod: &Pod) -> Demand {
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let request = |container: &k8s_openapi::api::core::v1::Container, resource: &str| {
            let requests = container.resources.as_ref().and_then(|r| r.requests.as_ref());
            requests.and_then(|r| r.get(resource)).and_then(milli).unwrap_or(0)
        };
        let total = |resource: &str| -> i64 {
            let mut sidecars = 0;
            let mut peak = 0;
            for init in spec.init_containers.iter().flatten() {
                let need = request(init, resource);
                if init.restart_policy.as_deref() == Some("Always") {
                    sidecars += need;
                    peak = peak.max(sidecars);
                } else {
                    peak = peak.max(sidecars + need);
                }
            }
            let steady: i64 = spec.containers.iter().map(|c| request(c, resource)).sum::<i64>() + sidecars;
            let overhead = spec.overhead.as_ref().and_then(|o| o.get(resource)).and_then(milli).unwrap_or(0);
            steady.max(peak) + overhead
        };
        let host_ports = spec
            .containers
            .iter()
            .flat_map(|c| c.ports.iter().flatten())
            .filter_map(|p| {
                let port = p.host_port.filter(|n| *n > 0)?;
                let any = |ip: &str| matches!(ip, "" | "0.0.0.0" | "::");
                let ip = p.host_ip.clone().filter(|ip| !any(ip)).unwrap_or_default();
                Some((p.protocol.clone().unwrap_or_else(|| "TCP".into()), port, ip))
            })
            .collect();
        Demand {
            owner: controller_of(pod).map(|o| o.uid.clone()),
            cpu_milli: total("cpu"),
            memory: total("memory") / 1000,
            host_ports,
        }
    }
}

impl Load {
    /// Counts a pod in.
    pub fn add(&mut self, demand: &Demand) {
        self.pods += 1;
        self.cpu_milli += demand.cpu_milli;
        self.memory += demand.memory;
        self.host_ports.extend(demand.host_ports.iter().cloned());
        if let Some(owner) = &demand.owner {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
    }

    /// Takes a pod out again.
    pub fn remove(&mut self, demand: &Demand) {
        self.pods = self.pods.saturating_sub(1);
        self.cpu_milli -= demand.cpu_milli;
        self.memory -= demand.memory;
        for port in &demand.host_ports {
            if let Some(at) = self.host_ports.iter().position(|p| p == port) {
                self.host_ports.swap_remove(at);
            }
        }
        if let Some(owner) = &demand.owner
            && let Some(count) = self.owners.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(owner);
            }
        }
    }
}

/// A quantity in thousandths; saturates. `None` if it is none.
fn milli(quantity: &Quantity) -> Option<i64> {
    let text = quantity.0.as_str();
    let (number, factor) = [
        ("Ki", 1024f64),
        ("Mi", 1024f64.powi(2)),
        ("Gi", 1024f64.powi(3)),
        ("Ti", 1024f64.powi(4)),
        ("Pi", 1024f64.powi(5)),
        ("Ei", 1024f64.powi(6)),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ]
    .iter()
    .find_map(|(suffix, factor)| text.strip_suffix(suffix).map(|number| (number, *factor)))
    .unwrap_or((text, 1.0));
    let value: f64 = number.parse().ok()?;
    // `as` saturates, which is what a limit beyond all machines means.
    value.is_finite().then(|| (value * factor * 1000.0).ceil() as i64)
}

/// Why no node takes the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Nodes looked at.
    pub nodes: usize,
    /// How many nodes give each reason.
    pub reasons: BTreeMap<String, usize>,
    /// How many of them evicting other pods could change.
    pub preemptable: usize,
}

impl Unfit {
    /// The text of the event and of the condition, as kube-scheduler writes it.
    pub fn message(&self) -> String {
        if self.nodes == 0 {
            return "no nodes available to schedule pods".into();
        }
        let mut reasons: Vec<String> = self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        reasons.sort();
        let mut victims = Vec::new();
        if self.preemptable > 0 {
            victims.push(format!("{} No preemption victims found for incoming pod", self.preemptable));
        }
        if self.nodes > self.preemptable {
            victims.push(format!("{} Preemption is not helpful for scheduling", self.nodes - self.preemptable));
        }
        let total = self.nodes;
        format!(
            "0/{total} nodes are available: {}. no new claims to deallocate, preemption: 0/{total} nodes are available: {}.",
            reasons.join(", "),
            victims.join(", ")
        )
    }
}

/// Chooses a node. `loads` holds what is placed on each node, pods bound a moment ago included.
pub fn choose(pod: &Pod, nodes: &[Arc<Node>], loads: &BTreeMap<String, Load>) -> Result<String, Unfit> {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let demand = Demand::of(pod);
    let idle = Load::default();
    let mut unfit = Unfit { nodes: nodes.len(), reasons: BTreeMap::new(), preemptable: 0 };
    let mut fitting: Vec<&Arc<Node>> = Vec::new();
    for node in nodes {
        let load = loads.get(name(node)).unwrap_or(&idle);
        match fits(spec, &demand, node, load) {
            Ok(()) => fitting.push(node),
            Err(misfit) => {
                unfit.preemptable += usize::from(misfit.preemptable);
                for reason in misfit.reasons {
                    *unfit.reasons.entry(reason).or_default() += 1;
                }
            }
        }
    }
    let siblings = |node: &Node| {
        let owner = demand.owner.as_ref()?;
        loads.get(name(node))?.owners.get(owner).copied()
    };
    let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
    for node in nodes {
        if let Some(zone) = label(node, ZONE) {
            *zones.entry(zone).or_default() += siblings(node).unwrap_or(0);
        }
    }
    let best = fitting.into_iter().min_by_key(|node| {
        let taints = untolerated(spec, node, "PreferNoSchedule").count();
        let preferred = preference(spec, node);
        let zone = label(node, ZONE).and_then(|z| zones.get(z)).copied().unwrap_or(0);
        let pods = loads.get(name(node)).map_or(0, |l| l.pods);
        (taints, Reverse(preferred), siblings(node).unwrap_or(0), zone, pods, name(node))
    });
    best.map(|node| name(node).to_string()).ok_or(unfit)
}

fn name(node: &Node) -> &str {
    node.metadata.name.as_deref().unwrap_or_default()
}

fn label<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    node.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// Whether a node is one that the pod asks for, by selector and required affinity.
pub(crate) fn wants_node(spec: &PodSpec, node: &Node) -> bool {
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    spec.node_selector.iter().flatten().all(|(k, v)| label(node, k) == Some(v.as_str()))
        && required.is_none_or(|r| r.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

/// Whether the pod tolerates all taints of a node that have this effect.
pub(crate) fn tolerates_node(spec: &PodSpec, node: &Node, effect: &str) -> bool {
    untolerated(spec, node, effect).next().is_none()
}

struct Misfit {
    reasons: Vec<String>,
    preemptable: bool,
}

fn fits(spec: &PodSpec, demand: &Demand, node: &Node, load: &Load) -> Result<(), Misfit> {
    let never = |reason: &str| Err(Misfit { reasons: vec![reason.into()], preemptable: false });
    let node_spec = node.spec.clone().unwrap_or_default();
    if node.metadata.deletion_timestamp.is_some() {
        return never("node(s) were unschedulable");
    }
    if node_spec.unschedulable == Some(true) {
        let taint =
            Taint { key: "node.kubernetes.io/unschedulable".into(), effect: "NoSchedule".into(), ..Default::default() };
        if !spec.tolerations.iter().flatten().any(|t| tolerates(t, &taint)) {
            return never("node(s) were unschedulable");
        }
    }
    if untolerated(spec, node, "NoSchedule").chain(untolerated(spec, node, "NoExecute")).next().is_some() {
        return never("node(s) had untolerated taint(s)");
    }
    if !wants_node(spec, node) {
        return never("node(s) didn't match Pod's node affinity/selector");
    }
    let clash = demand.host_ports.iter().any(|(protocol, port, ip)| {
        load.host_ports.iter().any(|(p, n, i)| p == protocol && n == port && (i == ip || i.is_empty() || ip.is_empty()))
    });
    if clash {
        let reason = "node(s) didn't have free ports for the requested pod ports";
        return Err(Misfit { reasons: vec![reason.into()], preemptable: true });
    }
    // A node that does not report a resource is not limited by it: nodes of the standalone cluster share one machine.
    let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
    let limit = |resource: &str| allocatable.and_then(|a| a.get(resource)).and_then(milli);
    let mut reasons = Vec::new();
    if limit("pods").is_some_and(|most| i64::try_from(load.pods).unwrap_or(i64::MAX).saturating_add(1) > most / 1000) {
        reasons.push("Too many pods".to_string());
    }
    if demand.cpu_milli > 0 && limit("cpu").is_some_and(|most| load.cpu_milli + demand.cpu_milli > most) {
        reasons.push("Insufficient cpu".into());
    }
    if demand.memory > 0 && limit("memory").is_some_and(|most| load.memory + demand.memory > most / 1000) {
        reasons.push("Insufficient memory".into());
    }
    if reasons.is_empty() { Ok(()) } else { Err(Misfit { reasons, preemptable: true }) }
}

/// Whether a toleration covers a taint (API doc of Toleration).
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect || !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => {
            !key.is_empty()
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    }
}

fn untolerated<'a>(spec: &'a PodSpec, node: &'a Node, effect: &'a str) -> impl Iterator<Item = &'a Taint> {
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    taints
        .iter()
        .filter(move |taint| taint.effect == effect && !spec.tolerations.iter().flatten().any(|t| tolerates(t, taint)))
}

/// Sum of the weights of the preferred node affinity terms that the node matches.
fn preference(spec: &PodSpec, node: &Node) -> i64 {
    let terms = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_deref())
        .unwrap_or_default();
    terms.iter().filter(|t| term_matches(&t.preference, node)).map(|t| i64::from(t.weight)).sum()
}

/// Whether a term matches; a term without requirements matches nothing.
fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    (!expressions.is_empty() || !fields.is_empty())
        && expressions.iter().all(|r| requirement_matches(r, label(node, &r.key)))
        && fields.iter().all(|r| r.key == "metadata.name" && requirement_matches(r, Some(name(node))))
}

fn requirement_matches(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|v| values.iter().any(|w| w == v));
    let compare = |accept: fn(i64, i64) -> bool| {
        let (Some(have), [bound]) = (value.and_then(|v| v.parse().ok()), values) else { return false };
        bound.parse().is_ok_and(|bound| accept(have, bound))
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|have, bound| have > bound),
        "Lt" => compare(|have, bound| have < bound),
        _ => false,
    }
}

/// Whether this scheduler has to find a node for the pod.
fn needs_node(pod: &Pod) -> bool {
    let Some(spec) = pod.spec.as_ref() else { return false };
    spec.node_name.as_deref().unwrap_or_default().is_empty()
        && spec.scheduler_name.as_deref().unwrap_or(SCHEDULER_NAME) == SCHEDULER_NAME
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && pods::is_active(pod)
}

/// Where pods are, those included whose binding this process has begun.
#[derive(Default)]
struct Ledger {
    loads: BTreeMap<String, Load>,
    placed: HashMap<String, (String, Demand)>,
    /// uids of pods whose binding is under way or not yet seen.
    assumed: HashSet<String>,
    /// Pods that found no node.
    unschedulable: HashSet<Key>,
}

impl Ledger {
    fn place(&mut self, uid: &str, node: &str, demand: Demand) {
        if self.placed.get(uid).is_some_and(|(n, d)| n == node && *d == demand) {
            return;
        }
        self.unplace(uid);
        self.loads.entry(node.to_string()).or_default().add(&demand);
        self.placed.insert(uid.to_string(), (node.to_string(), demand));
    }

    fn unplace(&mut self, uid: &str) -> bool {
        let Some((node, demand)) = self.placed.remove(uid) else { return false };
        if let Some(load) = self.loads.get_mut(&node) {
            load.remove(&demand);
            if load.pods == 0 {
                self.loads.remove(&node);
            }
        }
        true
    }

    /// Follows a change of a pod. Says whether room has become free.
    fn observe(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) -> bool {
        let Some(uid) = new.or(old).and_then(|p| p.metadata.uid.clone()) else { return false };
        let node = new
            .filter(|p| !pods::is_finished(p))
            .and_then(|p| p.spec.as_ref()?.node_name.clone())
            .filter(|n| !n.is_empty());
        match (node, new) {
            (Some(node), Some(pod)) => {
                self.assumed.remove(&uid);
                self.place(&uid, &node, Demand::of(pod));
                false
            }
            (None, Some(pod)) if self.assumed.contains(&uid) && pods::is_active(pod) => false,
            _ => {
                self.assumed.remove(&uid);
                self.unplace(&uid)
            }
        }
    }
}

const POISONED: &str = "the scheduler does not panic while it holds its ledger";

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = Queue::new("scheduler");
    let ledger: Arc<Mutex<Ledger>> = Arc::default();
    let (add, book) = (queue.clone(), ledger.clone());
    context.caches.pods.on_change(move |old, new| {
        let mut ledger = book.lock().expect(POISONED);
        let freed = ledger.observe(old, new);
        if let Some(pod) = new.filter(|p| needs_node(p)) {
            let key = Key::of(&**pod);
            // A pod that waits for room is looked at again when its spec changes, not when its own condition does.
            let same_spec = old.is_some_and(|o| o.spec == pod.spec && o.metadata.uid == pod.metadata.uid);
            if !same_spec || !ledger.unschedulable.contains(&key) {
                add.add(key);
            }
        } else if let Some(pod) = new.or(old) {
            ledger.unschedulable.remove(&Key::of(&**pod));
        }
        if freed {
            for key in ledger.unschedulable.drain() {
                add.add(key);
            }
        }
    });
    let (add, book) = (queue.clone(), ledger.clone());
    context.caches.nodes.on_change(move |old, new| {
        let Some(new) = new else { return };
        let same = old.is_some_and(|old| {
            let capacity = |n: &Node| n.status.as_ref().and_then(|s| s.allocatable.clone());
            old.spec == new.spec && old.metadata.labels == new.metadata.labels && capacity(old) == capacity(new)
        });
        if !same {
            for key in book.lock().expect(POISONED).unschedulable.drain() {
                add.add(key);
            }
        }
    });
    async move {
        let events = context.recorder(SCHEDULER_NAME);
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| schedule(context.clone(), events.clone(), ledger.clone(), key)).await;
    }
}

async fn schedule(
    context: Context,
    events: EventRecorder,
    ledger: Arc<Mutex<Ledger>>,
    key: Key,
) -> anyhow::Result<Next> {
    let Some(pod) = context.caches.pods.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    if !needs_node(&pod) {
        return Ok(Next::Wait);
    }
    let nodes = context.caches.nodes.all();
    let decision = {
        let mut ledger = ledger.lock().expect(POISONED);
        if ledger.assumed.contains(&uid) {
            return Ok(Next::Wait);
        }
        let decision = choose(&pod, &nodes, &ledger.loads);
        match &decision {
            Ok(node) => {
                ledger.assumed.insert(uid.clone());
                ledger.place(&uid, node, Demand::of(&pod));
                ledger.unschedulable.remove(&key);
            }
            Err(_) => {
                ledger.unschedulable.insert(key.clone());
            }
        }
        decision
    };
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let about = reference(&*pod);
    match decision {
        Ok(node) => {
            let binding = Binding {
                metadata: ObjectMeta { name: Some(key.name.clone()), uid: Some(uid.clone()), ..Default::default() },
                target: ObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Node".into()),
                    name: Some(node.clone()),
                    ..Default::default()
                },
            };
            let bound: Result<serde_json::Value, kube::Error> =
                api.create_subresource("binding", &key.name, &PostParams::default(), &binding).await;
            match bound {
                Ok(_) => {
                    let text = format!("Successfully assigned {}/{} to {node}", key.namespace, key.name);
                    events.event(&about, EventType::Normal, "Scheduled", text);
                    Ok(Next::Wait)
                }
                Err(error) => {
                    let mut ledger = ledger.lock().expect(POISONED);
                    if ledger.assumed.remove(&uid) {
                        ledger.unplace(&uid);
                    }
                    drop(ledger);
                    // Gone, or bound by someone else meanwhile.
                    if is_not_found(&error) || is_conflict(&error) {
                        return Ok(Next::Wait);
                    }
                    let text = format!("binding rejected: {}", message(&error));
                    events.event(&about, EventType::Warning, "FailedScheduling", text);
                    Err(error).context("cannot bind the pod")
                }
            }
        }
        Err(unfit) => {
            let text = unfit.message();
            let condition = pod
                .status
                .as_ref()
                .and_then(|s| s.conditions.as_ref())
                .and_then(|c| c.iter().find(|c| c.type_ == "PodScheduled"));
            if condition.is_none_or(|c| c.status != "False" || c.message.as_deref() != Some(text.as_str())) {
                let since = condition
                    .filter(|c| c.status == "False")
                    .and_then(|c| c.last_transition_time.clone())
                    .map_or_else(Timestamp::now, |t| t.0);
                let seconds = Timestamp::from_second(since.as_second()).unwrap_or(since);
                let patch = json!({"metadata": {"uid": uid}, "status": {"conditions": [{
                    "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text,
                    "lastProbeTime": null, "lastTransitionTime": seconds,
                }]}});
                match api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                    Ok(written) => context.caches.pods.wrote(written),
                    Err(error) if is_not_found(&error) || is_conflict(&error) => return Ok(Next::Wait),
                    Err(error) => return Err(error).context("cannot write the PodScheduled condition"),
                }
                events.event(&about, EventType::Warning, "FailedScheduling", text);
            }
            Ok(Next::Wait)
        }
    }
}

#[cfg(test)]
mod tests;
