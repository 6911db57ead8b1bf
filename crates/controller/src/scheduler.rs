//! The scheduler: gives each new pod a node.
//!
//! [`choose`] decides for one pod over the nodes and what is placed on them. Nodes that fit are compared by what the pod prefers
//! (taints, node affinity, pod affinity, spread constraints, with the weights of kube-scheduler), then by how well they spread the
//! pods of one owner, then by load. Waiting pods are tried in the order of their priority, but nothing is evicted for them: a pod
//! that preemption might help gets a Warning event that says so.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Binding, Namespace, Node, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference, PersistentVolume,
    PersistentVolumeClaim, Pod, PodSpec, Taint, Toleration,
};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use portolan_client::{EventRecorder, EventType};
use portolan_plan::slices::ZONE;
use serde_json::json;

use crate::Context;
use crate::cache::Caches;
use crate::metrics::Outcome;
use crate::pods;
use crate::queue::{Key, Next, Queue};
use crate::util::{controller_of, is_conflict, is_not_found, is_replaced, message, reference};

mod topology;
mod volumes;

pub use topology::NamespaceLabels;
use topology::Rules;
pub use volumes::Storage;
use volumes::Volumes;

/// Bindings under way at a time. Decisions are taken one after the other.
const WORKERS: usize = 16;
/// The scheduler that pods ask for by default.
const SCHEDULER_NAME: &str = "default-scheduler";
/// A pod without a node is looked at again after this long even if nothing has changed, as kube-scheduler does.
const FLUSH: Duration = Duration::from_secs(300);

/// What is placed on one node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Pods, finished ones excluded.
    pub pods: usize,
    /// Pods by the uid of their controller.
    pub owners: HashMap<String, usize>,
    /// Requested resources, in thousandths of their unit.
    pub resources: BTreeMap<String, i64>,
    /// Host ports in use: protocol, port, and address (empty for all).
    pub host_ports: Vec<(String, i32, String)>,
}

/// What a pod takes on a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand {
    owner: Option<String>,
    resources: BTreeMap<String, i64>,
    host_ports: Vec<(String, i32, String)>,
}

impl Demand {
    /// Reads it from a pod. Init containers run before the others, so the larger of both needs counts; sidecars run with them.
    /// Requests of the pod as a whole (KEP-2837) stand for those of its containers.
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
            let whole = spec.resources.as_ref().and_then(|r| r.requests.as_ref()).and_then(|r| r.get(resource));
            let overhead = spec.overhead.as_ref().and_then(|o| o.get(resource)).and_then(milli).unwrap_or(0);
            whole.and_then(milli).unwrap_or(steady.max(peak)).saturating_add(overhead)
        };
        let requests = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| c.resources.as_ref());
        let names: BTreeSet<&String> = requests
            .chain([spec.resources.as_ref()])
            .flatten()
            .flat_map(|r| r.requests.iter().flatten().map(|(resource, _)| resource))
            .chain(spec.overhead.iter().flatten().map(|(resource, _)| resource))
            .collect();
        let resources = names.into_iter().map(|n| (n.clone(), total(n))).filter(|(_, need)| *need > 0).collect();
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
        Demand { owner: controller_of(pod).map(|o| o.uid.clone()), resources, host_ports }
    }
}

impl Load {
    /// Counts a pod in.
    pub fn add(&mut self, demand: &Demand) {
        self.pods += 1;
        for (resource, need) in &demand.resources {
            let used = self.resources.entry(resource.clone()).or_default();
            *used = used.saturating_add(*need);
        }
        self.host_ports.extend(demand.host_ports.iter().cloned());
        if let Some(owner) = &demand.owner {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
    }

    /// Takes a pod out again.
    pub fn remove(&mut self, demand: &Demand) {
        self.pods = self.pods.saturating_sub(1);
        for (resource, need) in &demand.resources {
            if let Some(used) = self.resources.get_mut(resource) {
                *used = used.saturating_sub(*need);
            }
        }
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

/// A pod that has a node.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The pod, as last seen.
    pub pod: Arc<Pod>,
    /// Its node.
    pub node: String,
    /// What it takes there.
    pub demand: Demand,
}

/// What a decision looks at.
pub struct View<'a> {
    /// All nodes.
    pub nodes: &'a [Arc<Node>],
    /// What is placed on each node, pods bound a moment ago included.
    pub loads: &'a BTreeMap<String, Load>,
    /// The placed pods by uid.
    pub placed: &'a HashMap<String, Placed>,
    /// uids of the placed pods that have affinity rules.
    pub related: &'a HashSet<String>,
    /// Labels of namespaces.
    pub namespaces: &'a NamespaceLabels,
    /// Claims and volumes.
    pub storage: &'a dyn Storage,
}

/// What evicting other pods could do for a pod that no node takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preemption {
    /// The pod does not want others evicted.
    Never,
    /// There are pods of lower priority on this many of the nodes where room is what lacks; nothing is evicted all the same.
    Unsupported(usize),
    /// No pod that may be evicted is in the way.
    NoVictims,
}

/// Why no node takes the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Nodes looked at.
    pub nodes: usize,
    /// What keeps the pod off all nodes alike.
    pub blocked: Option<String>,
    /// How many nodes give each reason.
    pub reasons: BTreeMap<String, usize>,
    /// How many of them evicting other pods could change.
    pub preemptable: usize,
    /// What preemption could do.
    pub preemption: Preemption,
}

impl Unfit {
    /// The text of the event and of the condition, as kube-scheduler writes it.
    pub fn message(&self) -> String {
        if self.nodes == 0 {
            return "no nodes available to schedule pods".into();
        }
        let mut reasons: Vec<String> = self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        reasons.sort();
        let why = self.blocked.clone().unwrap_or_else(|| reasons.join(", "));
        let total = self.nodes;
        let mut victims = Vec::new();
        let unsupported = match self.preemption {
            Preemption::Never => {
                return format!(
                    "0/{total} nodes are available: {why}. no new claims to deallocate, preemption: not eligible due to \
                     preemptionPolicy=Never."
                );
            }
            Preemption::Unsupported(nodes) => nodes,
            Preemption::NoVictims => 0,
        };
        if unsupported > 0 {
            victims.push(format!("{unsupported} Preemption is not supported"));
        }
        if self.preemptable > unsupported {
            victims.push(format!("{} No preemption victims found for incoming pod", self.preemptable - unsupported));
        }
        if total > self.preemptable {
            victims.push(format!("{} Preemption is not helpful for scheduling", total - self.preemptable));
        }
        victims.sort();
        format!(
            "0/{total} nodes are available: {why}. no new claims to deallocate, preemption: 0/{total} nodes are available: {}.",
            victims.join(", ")
        )
    }
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0)
}

/// Points from 0 to 100, the most for the largest value.
fn scaled(value: f64, least: f64, most: f64) -> f64 {
    if most > least { (value - least) * 100.0 / (most - least) } else { 0.0 }
}

/// Chooses a node.
pub fn choose(pod: &Pod, view: &View<'_>) -> Result<String, Unfit> {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let demand = Demand::of(pod);
    let idle = Load::default();
    let mut unfit = Unfit {
        nodes: view.nodes.len(),
        blocked: None,
        reasons: BTreeMap::new(),
        preemptable: 0,
        preemption: Preemption::NoVictims,
    };
    if spec.preemption_policy.as_deref() == Some("Never") {
        unfit.preemption = Preemption::Never;
    }
    if spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()) {
        unfit.blocked = Some("pod has resource claims, which this scheduler does not allocate".into());
        return Err(unfit);
    }
    let volumes = match Volumes::of(pod, view.storage) {
        Ok(volumes) => volumes,
        Err(reason) => {
            unfit.blocked = Some(reason);
            return Err(unfit);
        }
    };
    let related = view.related.iter().filter_map(|uid| view.placed.get(uid));
    let rules = Rules::of(pod, view.nodes, || view.placed.values(), related, view.namespaces);
    let mut fitting: Vec<&Arc<Node>> = Vec::new();
    let mut crowded: HashSet<&str> = HashSet::new();
    for node in view.nodes {
        let load = view.loads.get(name(node)).unwrap_or(&idle);
        match fits(spec, &demand, node, load, &volumes, &rules) {
            Ok(()) => fitting.push(node),
            Err(misfit) => {
                if misfit.preemptable {
                    unfit.preemptable += 1;
                    crowded.insert(name(node));
                }
                for reason in misfit.reasons {
                    *unfit.reasons.entry(reason).or_default() += 1;
                }
            }
        }
    }
    if fitting.is_empty() && unfit.preemption != Preemption::Never && !crowded.is_empty() {
        let lower = view.placed.values().filter(|p| priority(&p.pod) < priority(pod));
        let victims: HashSet<&str> = lower.map(|p| p.node.as_str()).filter(|n| crowded.contains(n)).collect();
        if !victims.is_empty() {
            unfit.preemption = Preemption::Unsupported(victims.len());
        }
    }
    let siblings = |node: &Node| {
        let owner = demand.owner.as_ref()?;
        view.loads.get(name(node))?.owners.get(owner).copied()
    };
    let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
    for node in view.nodes {
        if let Some(zone) = label(node, ZONE) {
            *zones.entry(zone).or_default() += siblings(node).unwrap_or(0);
        }
    }
    let scores = scores(spec, &fitting, &rules);
    let best = fitting.into_iter().zip(scores).min_by_key(|(node, score)| {
        let zone = label(node, ZONE).and_then(|z| zones.get(z)).copied().unwrap_or(0);
        let pods = view.loads.get(name(node)).map_or(0, |l| l.pods);
        (Reverse(*score), siblings(node).unwrap_or(0), zone, pods, name(node))
    });
    best.map(|(node, _)| name(node).to_string()).ok_or(unfit)
}

/// Points of the fitting nodes by what the pod prefers, each wish scaled to 100 and weighted as in kube-scheduler.
fn scores(spec: &PodSpec, nodes: &[&Arc<Node>], rules: &Rules) -> Vec<i64> {
    let range = |values: &[f64]| {
        (values.iter().copied().fold(f64::INFINITY, f64::min), values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
    };
    let taints: Vec<f64> = nodes.iter().map(|n| untolerated(spec, n, "PreferNoSchedule").count() as f64).collect();
    let wanted: Vec<f64> = nodes.iter().map(|n| preference(spec, n) as f64).collect();
    let company: Vec<f64> = nodes.iter().map(|n| rules.preference(n) as f64).collect();
    let crowding: Vec<Option<f64>> = nodes.iter().map(|n| rules.crowding(n)).collect();
    let most_taints = range(&taints).1;
    let most_wanted = range(&wanted).1;
    let (least_company, most_company) = range(&company);
    let (least_crowded, most_crowded) = range(&crowding.iter().flatten().copied().collect::<Vec<_>>());
    let points = |at: usize| {
        let free = 100.0 - scaled(taints[at], 0.0, most_taints);
        let apart = match crowding[at] {
            None => 0.0,
            Some(_) if most_crowded == 0.0 => 100.0,
            Some(here) => 100.0 * (most_crowded + least_crowded - here) / most_crowded,
        };
        let sum = 3.0 * free
            + 2.0 * scaled(wanted[at], 0.0, most_wanted)
            + 2.0 * scaled(company[at], least_company, most_company)
            + 2.0 * apart;
        sum.round() as i64
    };
    (0..nodes.len()).map(points).collect()
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

fn fits(
    spec: &PodSpec,
    demand: &Demand,
    node: &Node,
    load: &Load,
    volumes: &Volumes,
    rules: &Rules,
) -> Result<(), Misfit> {
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
    // A node that does not report a basic resource is not limited by it: nodes of the standalone cluster share one machine.
    // What a node does not report of other resources it does not have.
    let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
    let limit = |resource: &str| allocatable.and_then(|a| a.get(resource)).and_then(milli);
    let mut reasons = Vec::new();
    if limit("pods").is_some_and(|most| i64::try_from(load.pods).unwrap_or(i64::MAX).saturating_add(1) > most / 1000) {
        reasons.push("Too many pods".to_string());
    }
    for (resource, need) in &demand.resources {
        let basic = matches!(resource.as_str(), "cpu" | "memory" | "ephemeral-storage");
        let most = limit(resource).or((!basic).then_some(0));
        let used = load.resources.get(resource).copied().unwrap_or(0);
        if most.is_some_and(|most| used.saturating_add(*need) > most) {
            reasons.push(format!("Insufficient {resource}"));
        }
    }
    if !reasons.is_empty() {
        return Err(Misfit { reasons, preemptable: true });
    }
    let refusals = volumes.refusals(node);
    if !refusals.is_empty() {
        return Err(Misfit { reasons: refusals.into_iter().map(str::to_string).collect(), preemptable: false });
    }
    rules
        .allow(node)
        .map_err(|refusal| Misfit { reasons: vec![refusal.reason.into()], preemptable: refusal.preemptable })
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

/// What a pod without a node waits for.
#[derive(Clone, Copy, Debug)]
struct Waits {
    /// Where other pods are matters.
    pods: bool,
    /// It uses claims.
    claims: bool,
    priority: i32,
}

/// What a change of a pod means for pods that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Nothing,
    /// A placed pod is new or changed what rules between pods look at.
    Moved,
    /// Room has become free.
    Freed,
}

/// Where pods are, those included whose binding this process has begun.
#[derive(Default)]
struct Ledger {
    loads: BTreeMap<String, Load>,
    placed: HashMap<String, Placed>,
    /// uids of placed pods with affinity rules.
    related: HashSet<String>,
    /// uids of pods whose binding is under way or not yet seen.
    assumed: HashSet<String>,
    /// Pods that found no node.
    unschedulable: HashMap<Key, Waits>,
}

impl Ledger {
    /// Says whether something has changed for rules between pods.
    fn place(&mut self, uid: &str, node: &str, pod: &Arc<Pod>) -> bool {
        let demand = Demand::of(pod);
        if let Some(known) = self.placed.get_mut(uid)
            && known.node == node
            && known.demand == demand
        {
            let facts = |p: &Pod| (p.metadata.labels.clone(), p.metadata.deletion_timestamp.is_some());
            let same = facts(&known.pod) == facts(pod);
            known.pod = pod.clone();
            return !same;
        }
        self.unplace(uid);
        self.loads.entry(node.to_string()).or_default().add(&demand);
        if topology::has_affinity(pod) {
            self.related.insert(uid.to_string());
        }
        self.placed.insert(uid.to_string(), Placed { pod: pod.clone(), node: node.to_string(), demand });
        true
    }

    fn unplace(&mut self, uid: &str) -> bool {
        let Some(Placed { node, demand, .. }) = self.placed.remove(uid) else { return false };
        self.related.remove(uid);
        if let Some(load) = self.loads.get_mut(&node) {
            load.remove(&demand);
            if load.pods == 0 {
                self.loads.remove(&node);
            }
        }
        true
    }

    /// Follows a change of a pod.
    fn observe(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) -> Effect {
        let Some(uid) = new.or(old).and_then(|p| p.metadata.uid.clone()) else { return Effect::Nothing };
        let node = new
            .filter(|p| !pods::is_finished(p))
            .and_then(|p| p.spec.as_ref()?.node_name.clone())
            .filter(|n| !n.is_empty());
        match (node, new) {
            (Some(node), Some(pod)) => {
                let landed = self.assumed.remove(&uid);
                if self.place(&uid, &node, pod) || landed { Effect::Moved } else { Effect::Nothing }
            }
            (None, Some(pod)) if self.assumed.contains(&uid) && pods::is_active(pod) => Effect::Nothing,
            _ => {
                self.assumed.remove(&uid);
                if self.unplace(&uid) { Effect::Freed } else { Effect::Nothing }
            }
        }
    }

    /// Takes out the waiting pods that `which` chooses, the most important first.
    fn wake(&mut self, which: impl Fn(&Key, &Waits) -> bool) -> Vec<Key> {
        let mut woken: Vec<(Key, Waits)> = self.unschedulable.extract_if(|key, waits| which(key, waits)).collect();
        woken.sort_by(|(a, x), (b, y)| y.priority.cmp(&x.priority).then_with(|| a.cmp(b)));
        woken.into_iter().map(|(key, _)| key).collect()
    }
}

const POISONED: &str = "the scheduler does not panic while it holds its ledger";

impl Storage for Caches {
    fn claim(&self, namespace: &str, name: &str) -> Option<Arc<PersistentVolumeClaim>> {
        self.claims.get(namespace, name)
    }

    fn volume(&self, name: &str) -> Option<Arc<PersistentVolume>> {
        self.volumes.get("", name)
    }

    fn class(&self, name: &str) -> Option<Arc<StorageClass>> {
        self.storage_classes.get("", name)
    }
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("scheduler");
    let ledger: Arc<Mutex<Ledger>> = Arc::default();
    let (add, book) = (queue.clone(), ledger.clone());
    context.caches.pods.on_change(move |old, new| {
        let mut ledger = book.lock().expect(POISONED);
        let effect = ledger.observe(old, new);
        if let Some(pod) = new.filter(|p| needs_node(p)) {
            let key = Key::of(&**pod);
            // A pod that waits for room is looked at again when its spec changes, not when its own condition does.
            let same_spec = old.is_some_and(|o| o.spec == pod.spec && o.metadata.uid == pod.metadata.uid);
            if !same_spec || !ledger.unschedulable.contains_key(&key) {
                add.add(key);
            }
        } else if let Some(pod) = new.or(old) {
            ledger.unschedulable.remove(&Key::of(&**pod));
        }
        let woken = match effect {
            Effect::Nothing => Vec::new(),
            Effect::Moved => ledger.wake(|_, waits| waits.pods),
            Effect::Freed => ledger.wake(|_, _| true),
        };
        woken.into_iter().for_each(|key| add.add(key));
    });
    let wake_all = {
        let (add, book) = (queue.clone(), ledger.clone());
        move |which: &dyn Fn(&Key, &Waits) -> bool| {
            let woken = book.lock().expect(POISONED).wake(which);
            woken.into_iter().for_each(|key| add.add(key));
        }
    };
    let wake = wake_all.clone();
    context.caches.nodes.on_change(move |old, new| {
        let same = old.zip(new).is_some_and(|(old, new)| {
            let capacity = |n: &Node| n.status.as_ref().and_then(|s| s.allocatable.clone());
            old.spec == new.spec && old.metadata.labels == new.metadata.labels && capacity(old) == capacity(new)
        });
        if !same {
            wake(&|_, _| true);
        }
    });
    let wake = wake_all.clone();
    context.caches.namespaces.on_change(move |old, new| {
        let labels = |n: Option<&Arc<Namespace>>| n.and_then(|n| n.metadata.labels.clone());
        if old.is_some() && labels(old) != labels(new) {
            wake(&|_, waits| waits.pods);
        }
    });
    let wake = wake_all.clone();
    context.caches.claims.on_change(move |old, new| {
        let namespace = new.or(old).and_then(|c| c.metadata.namespace.clone()).unwrap_or_default();
        wake(&|key, waits| waits.claims && key.namespace == namespace);
    });
    let wake = wake_all.clone();
    context.caches.volumes.on_change(move |_, _| wake(&|_, waits| waits.claims));
    let wake = wake_all;
    context.caches.storage_classes.on_change(move |_, _| wake(&|_, waits| waits.claims));
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
    let attempts = |result| context.metrics.schedule_attempts.get_or_create_owned(&Outcome { result });
    let decision = {
        let mut ledger = ledger.lock().expect(POISONED);
        if ledger.assumed.contains(&uid) {
            return Ok(Next::Wait);
        }
        // Read under the lock: what changes later finds the pod among those that wait.
        let nodes = context.caches.nodes.all();
        let mut namespaces = NamespaceLabels::new();
        if topology::has_affinity(&pod) || !ledger.related.is_empty() {
            for namespace in context.caches.namespaces.all() {
                let labels = namespace.metadata.labels.clone().unwrap_or_default();
                namespaces.insert(namespace.metadata.name.clone().unwrap_or_default(), labels);
            }
        }
        let view = View {
            nodes: &nodes,
            loads: &ledger.loads,
            placed: &ledger.placed,
            related: &ledger.related,
            namespaces: &namespaces,
            storage: &context.caches,
        };
        let decision = choose(&pod, &view);
        match &decision {
            Ok(node) => {
                ledger.assumed.insert(uid.clone());
                ledger.place(&uid, node, &pod);
                ledger.unschedulable.remove(&key);
            }
            Err(_) => {
                let waits = Waits {
                    pods: topology::depends_on_pods(&pod) || !ledger.related.is_empty(),
                    claims: !volumes::claim_names(&pod).is_empty(),
                    priority: priority(&pod),
                };
                ledger.unschedulable.insert(key.clone(), waits);
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
                    attempts("scheduled").inc();
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
                    attempts("error").inc();
                    let text = format!("binding rejected: {}", message(&error));
                    events.event(&about, EventType::Warning, "FailedScheduling", text);
                    Err(error).context("cannot bind the pod")
                }
            }
        }
        Err(unfit) => {
            attempts("unschedulable").inc();
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
                    .map_or_else(|| context.clock.now(), |t| t.0);
                let seconds = Timestamp::from_second(since.as_second()).unwrap_or(since);
                let patch = json!({"metadata": {"uid": uid}, "status": {"conditions": [{
                    "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text,
                    "lastProbeTime": null, "lastTransitionTime": seconds,
                }]}});
                match api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                    Ok(written) => context.caches.pods.wrote(written),
                    Err(error) if is_not_found(&error) || is_replaced(&error) => return Ok(Next::Wait),
                    Err(error) => return Err(error).context("cannot write the PodScheduled condition"),
                }
                events.event(&about, EventType::Warning, "FailedScheduling", text);
                if let Preemption::Unsupported(nodes) = unfit.preemption {
                    let text = format!(
                        "{nodes} node(s) run pods of lower priority than {}, but this scheduler does not evict them; priority \
                         only decides who is tried first",
                        priority(&pod)
                    );
                    events.event(&about, EventType::Warning, "PreemptionNotSupported", text);
                }
            }
            Ok(Next::After(FLUSH))
        }
    }
}

#[cfg(test)]
mod tests;
