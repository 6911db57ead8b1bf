//! Rules between pods: pod affinity and anti-affinity, and topology spread constraints.
//!
//! [`Rules::of`] counts, once for a pod to be placed, what the rules ask about the pods that are placed already; then each node is
//! judged by those counts. The rules are those of the API docs of PodAffinity, PodAntiAffinity and TopologySpreadConstraint
//! (KEP-895, KEP-3022, KEP-3094, KEP-3633), and of kube-scheduler's plugins where the docs are silent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    Node, Pod, PodAffinityTerm, PodSpec, TopologySpreadConstraint, WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use super::{Placed, label, name, tolerates_node, wants_node};
use crate::selector;

/// Labels of namespaces, by name.
pub type NamespaceLabels = HashMap<String, BTreeMap<String, String>>;

/// Topology key and the value of a node.
type Domain = (String, String);

/// What the rules between pods mean for one pod to be placed.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// Topology keys of the required affinity terms, and how many matching pods each domain has.
    affinity: Vec<String>,
    affinity_counts: HashMap<Domain, usize>,
    /// The pod may be the first of pods that want to be together: no pod matches yet, but it does itself.
    may_be_first: bool,
    /// Domains that the pod's required anti-affinity keeps it out of.
    avoided: HashSet<Domain>,
    /// Domains that the required anti-affinity of placed pods keeps it out of.
    refused: HashSet<Domain>,
    spread: Vec<Spread>,
    /// Points for and against domains by preferred affinity.
    preferred: HashMap<Domain, i64>,
    /// ScheduleAnyway.
    soft_spread: Vec<Spread>,
}

/// One topology spread constraint with what it counted.
#[derive(Debug)]
struct Spread {
    key: String,
    max_skew: i64,
    /// Matching pods by value of the topology key, domains without any included.
    counts: HashMap<String, i64>,
    /// Pods in the emptiest domain.
    least: i64,
    /// The pod counts itself.
    matches_self: bool,
}

/// Why the rules keep a pod off a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub reason: &'static str,
    /// Whether removing pods from the node could help.
    pub preemptable: bool,
}

fn refusal(reason: &'static str, preemptable: bool) -> Result<(), Refusal> {
    Err(Refusal { reason, preemptable })
}

/// Whether a pod takes part in affinity rules of its own.
pub(super) fn has_affinity(pod: &Pod) -> bool {
    let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
    affinity.is_some_and(|a| a.pod_affinity.is_some() || a.pod_anti_affinity.is_some())
}

/// Whether where other pods are matters to a pod that waits.
pub(super) fn depends_on_pods(pod: &Pod) -> bool {
    let spread = pod.spec.as_ref().and_then(|s| s.topology_spread_constraints.as_ref());
    has_affinity(pod) || spread.is_some_and(|s| !s.is_empty())
}

struct Terms<'a> {
    affinity: &'a [PodAffinityTerm],
    anti: &'a [PodAffinityTerm],
    preferred: &'a [WeightedPodAffinityTerm],
    preferred_anti: &'a [WeightedPodAffinityTerm],
}

impl<'a> Terms<'a> {
    fn of(pod: &'a Pod) -> Terms<'a> {
        let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
        let with = affinity.and_then(|a| a.pod_affinity.as_ref());
        let without = affinity.and_then(|a| a.pod_anti_affinity.as_ref());
        Terms {
            affinity: with
                .and_then(|w| w.required_during_scheduling_ignored_during_execution.as_deref())
                .unwrap_or_default(),
            anti: without
                .and_then(|w| w.required_during_scheduling_ignored_during_execution.as_deref())
                .unwrap_or_default(),
            preferred: with
                .and_then(|w| w.preferred_during_scheduling_ignored_during_execution.as_deref())
                .unwrap_or_default(),
            preferred_anti: without
                .and_then(|w| w.preferred_during_scheduling_ignored_during_execution.as_deref())
                .unwrap_or_default(),
        }
    }
}

/// A selector with the pod's own values of `matchLabelKeys` and `mismatchLabelKeys` added, as the API server does for new pods.
fn narrowed(
    selector: Option<&LabelSelector>,
    pod: &Pod,
    same: Option<&Vec<String>>,
    other: Option<&Vec<String>>,
) -> Option<LabelSelector> {
    let mut selector = selector?.clone();
    for (keys, operator) in [(same, "In"), (other, "NotIn")] {
        for key in keys.into_iter().flatten() {
            let Some(value) = pod.metadata.labels.as_ref().and_then(|l| l.get(key)) else { continue };
            selector.match_expressions.get_or_insert_default().push(LabelSelectorRequirement {
                key: key.clone(),
                operator: operator.into(),
                values: Some(vec![value.clone()]),
            });
        }
    }
    Some(selector)
}

/// A term, read for the pod that carries it.
struct Term {
    key: String,
    selector: Option<LabelSelector>,
    namespaces: Vec<String>,
    namespace_selector: Option<LabelSelector>,
}

impl Term {
    fn of(term: &PodAffinityTerm, pod: &Pod) -> Term {
        let mut namespaces = term.namespaces.clone().unwrap_or_default();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.extend(pod.metadata.namespace.clone());
        }
        Term {
            key: term.topology_key.clone(),
            selector: narrowed(
                term.label_selector.as_ref(),
                pod,
                term.match_label_keys.as_ref(),
                term.mismatch_label_keys.as_ref(),
            ),
            namespaces,
            namespace_selector: term.namespace_selector.clone(),
        }
    }

    /// A term without a selector matches no pod.
    fn matches(&self, pod: &Pod, namespaces: &NamespaceLabels) -> bool {
        let Some(selector) = &self.selector else { return false };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let here = self.namespaces.iter().any(|n| n == namespace)
            || self.namespace_selector.as_ref().is_some_and(|s| selector::matches(s, namespaces.get(namespace)));
        here && selector::matches(selector, pod.metadata.labels.as_ref())
    }

    fn domain(&self, node: &Node) -> Option<Domain> {
        Some((self.key.clone(), label(node, &self.key)?.to_string()))
    }
}

impl Rules {
    /// Counts for `pod`. `related` are the placed pods that carry affinity rules themselves, `placed` yields all of them; it is
    /// asked for only when the pod has rules.
    pub fn of<'a, I: Iterator<Item = &'a Placed>>(
        pod: &Pod,
        nodes: &[Arc<Node>],
        placed: impl Fn() -> I,
        related: impl Iterator<Item = &'a Placed>,
        namespaces: &NamespaceLabels,
    ) -> Rules {
        let by_name: HashMap<&str, &Node> = nodes.iter().map(|n| (name(n), &**n)).collect();
        let mut rules = Rules::default();
        let terms = Terms::of(pod);
        rules.count_affinity(pod, &terms, &by_name, placed(), namespaces);
        for other in related {
            let Some(node) = by_name.get(other.node.as_str()) else { continue };
            let theirs = Terms::of(&other.pod);
            let matching = |term: &PodAffinityTerm| {
                let term = Term::of(term, &other.pod);
                term.matches(pod, namespaces).then(|| term.domain(node)).flatten()
            };
            rules.refused.extend(theirs.anti.iter().filter_map(matching));
            // What placed pods wish is symmetric: a required affinity counts one, kube-scheduler's hardPodAffinityWeight.
            for domain in theirs.affinity.iter().filter_map(matching) {
                *rules.preferred.entry(domain).or_default() += 1;
            }
            for (wishes, sign) in [(theirs.preferred, 1), (theirs.preferred_anti, -1)] {
                for wish in wishes {
                    if let Some(domain) = matching(&wish.pod_affinity_term) {
                        *rules.preferred.entry(domain).or_default() += sign * i64::from(wish.weight);
                    }
                }
            }
        }
        rules.count_spread(pod, nodes, &by_name, placed);
        rules
    }

    fn count_affinity<'a>(
        &mut self,
        pod: &Pod,
        terms: &Terms<'_>,
        nodes: &HashMap<&str, &Node>,
        placed: impl Iterator<Item = &'a Placed>,
        namespaces: &NamespaceLabels,
    ) {
        let read = |terms: &[PodAffinityTerm]| -> Vec<Term> { terms.iter().map(|t| Term::of(t, pod)).collect() };
        let (with, without) = (read(terms.affinity), read(terms.anti));
        let wishes: Vec<(Term, i64)> = (terms.preferred.iter().map(|w| (w, 1)))
            .chain(terms.preferred_anti.iter().map(|w| (w, -1)))
            .map(|(wish, sign)| (Term::of(&wish.pod_affinity_term, pod), sign * i64::from(wish.weight)))
            .collect();
        if with.is_empty() && without.is_empty() && wishes.is_empty() {
            return;
        }
        for other in placed {
            let Some(node) = nodes.get(other.node.as_str()) else { continue };
            // Only a pod that matches all terms counts for any of them.
            if !with.is_empty() && with.iter().all(|t| t.matches(&other.pod, namespaces)) {
                for domain in with.iter().filter_map(|t| t.domain(node)) {
                    *self.affinity_counts.entry(domain).or_default() += 1;
                }
            }
            let avoided = without.iter().filter(|t| t.matches(&other.pod, namespaces));
            self.avoided.extend(avoided.filter_map(|t| t.domain(node)));
            for (term, weight) in &wishes {
                if term.matches(&other.pod, namespaces)
                    && let Some(domain) = term.domain(node)
                {
                    *self.preferred.entry(domain).or_default() += weight;
                }
            }
        }
        self.may_be_first = self.affinity_counts.is_empty() && with.iter().all(|t| t.matches(pod, namespaces));
        self.affinity = with.into_iter().map(|t| t.key).collect();
    }

    fn count_spread<'a, I: Iterator<Item = &'a Placed>>(
        &mut self,
        pod: &Pod,
        nodes: &[Arc<Node>],
        by_name: &HashMap<&str, &Node>,
        placed: impl Fn() -> I,
    ) {
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let all = spec.topology_spread_constraints.as_deref().unwrap_or_default();
        for hard in [true, false] {
            let wanted: Vec<&TopologySpreadConstraint> =
                all.iter().filter(|c| (c.when_unsatisfiable == "DoNotSchedule") == hard).collect();
            // A node counts only if it has the keys of all constraints of its sort.
            let complete = |node: &Node| wanted.iter().all(|c| label(node, &c.topology_key).is_some());
            for constraint in &wanted {
                let counts_node = |node: &Node| {
                    complete(node)
                        && (constraint.node_affinity_policy.as_deref() == Some("Ignore") || wants_node(spec, node))
                        && (constraint.node_taints_policy.as_deref() != Some("Honor")
                            || tolerates_node(spec, node, "NoSchedule") && tolerates_node(spec, node, "NoExecute"))
                };
                let selector =
                    narrowed(constraint.label_selector.as_ref(), pod, constraint.match_label_keys.as_ref(), None);
                let matches = |p: &Pod| {
                    selector
                        .as_ref()
                        .is_some_and(|s| !selector::is_empty(s) && selector::matches(s, p.metadata.labels.as_ref()))
                };
                let mut counts: HashMap<String, i64> = HashMap::new();
                for node in nodes.iter().filter(|n| counts_node(n)) {
                    counts.entry(label(node, &constraint.topology_key).unwrap_or_default().to_string()).or_default();
                }
                for other in placed() {
                    if other.pod.metadata.namespace == pod.metadata.namespace
                        && other.pod.metadata.deletion_timestamp.is_none()
                        && matches(&other.pod)
                        && let Some(node) = by_name.get(other.node.as_str())
                        && counts_node(node)
                    {
                        let value = label(node, &constraint.topology_key).unwrap_or_default();
                        *counts.entry(value.to_string()).or_default() += 1;
                    }
                }
                // Fewer domains than asked for: the missing ones are empty.
                let domains = i32::try_from(counts.len()).unwrap_or(i32::MAX);
                let least = match constraint.min_domains {
                    Some(asked) if domains < asked => 0,
                    _ => counts.values().copied().min().unwrap_or(0),
                };
                let spread = Spread {
                    key: constraint.topology_key.clone(),
                    max_skew: constraint.max_skew.into(),
                    counts,
                    least,
                    matches_self: selector.as_ref().is_some_and(|s| selector::matches(s, pod.metadata.labels.as_ref())),
                };
                if hard { &mut self.spread } else { &mut self.soft_spread }.push(spread);
            }
        }
    }

    /// Whether the rules allow a node.
    pub fn allow(&self, node: &Node) -> Result<(), Refusal> {
        for spread in &self.spread {
            let Some(value) = label(node, &spread.key) else {
                return refusal("node(s) didn't match pod topology spread constraints (missing required label)", false);
            };
            let here = spread.counts.get(value).copied().unwrap_or(0) + i64::from(spread.matches_self);
            if here - spread.least > spread.max_skew {
                return refusal("node(s) didn't match pod topology spread constraints", true);
            }
        }
        let mut together = true;
        for key in &self.affinity {
            let Some(value) = label(node, key) else {
                return refusal("node(s) didn't match pod affinity rules", false);
            };
            together &= self.affinity_counts.get(&(key.clone(), value.to_string())).is_some_and(|n| *n > 0);
        }
        if !together && !self.may_be_first {
            return refusal("node(s) didn't match pod affinity rules", false);
        }
        let in_one_of = |domains: &HashSet<Domain>| domains.iter().any(|(key, value)| label(node, key) == Some(value));
        if in_one_of(&self.avoided) {
            return refusal("node(s) didn't match pod anti-affinity rules", true);
        }
        if in_one_of(&self.refused) {
            return refusal("node(s) didn't satisfy existing pods anti-affinity rules", true);
        }
        Ok(())
    }

    /// Points of a node by preferred affinity, not yet scaled.
    pub fn preference(&self, node: &Node) -> i64 {
        let here = self.preferred.iter().filter(|((key, value), _)| label(node, key) == Some(value));
        here.map(|(_, points)| points).sum()
    }

    /// How crowded a node's domains are by the ScheduleAnyway constraints: less is better. `None` without such constraints, or for
    /// a node that lacks a topology key.
    pub fn crowding(&self, node: &Node) -> Option<f64> {
        if self.soft_spread.is_empty() {
            return None;
        }
        let mut sum = 0.0;
        for spread in &self.soft_spread {
            let value = label(node, &spread.key)?;
            let here = spread.counts.get(value).copied().unwrap_or(0);
            // Many small domains hold fewer pods each, so they weigh more; a larger allowed skew makes the counts count less.
            let weight = ((spread.counts.len() + 2) as f64).ln();
            sum += here as f64 * weight + (spread.max_skew - 1) as f64;
        }
        Some(sum)
    }
}
