//! Choices of the scheduler as tables.

use super::*;
use serde_json::Value;

fn node(name: &str, extra: Value) -> Arc<Node> {
    let mut node =
        json!({"metadata": {"name": name, "labels": {ZONE: format!("zone-{name}"), "kubernetes.io/hostname": name}}});
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    Arc::new(serde_json::from_value(node).unwrap())
}

fn pod(spec: Value) -> Pod {
    let mut whole = json!({"containers": [{"name": "c"}]});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "p", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "r", "controller": true}]},
        "spec": whole
    }))
    .unwrap()
}

fn two() -> Vec<Arc<Node>> {
    vec![node("n1", json!({})), node("n2", json!({}))]
}

fn tainted(effect: &str) -> Value {
    json!({"spec": {"taints": [{"key": "k", "value": "v", "effect": effect}]}})
}

#[test]
fn pods_of_one_owner_spread_before_load_counts() {
    let mut loads: BTreeMap<String, Load> = BTreeMap::new();
    let mut placed = Vec::new();
    for _ in 0..4 {
        let chosen = choose(&pod(json!({})), &two(), &loads).unwrap();
        loads.entry(chosen.clone()).or_default().add(&Demand::of(&pod(json!({}))));
        placed.push(chosen);
    }
    assert_eq!(placed, ["n1", "n2", "n1", "n2"]);
    let mut busy: BTreeMap<String, Load> = BTreeMap::new();
    busy.entry("n1".into()).or_default().pods = 7;
    assert_eq!(choose(&pod(json!({})), &two(), &busy).unwrap(), "n2", "fewest pods");
    busy.entry("n2".into()).or_default().add(&Demand::of(&pod(json!({}))));
    assert_eq!(choose(&pod(json!({})), &two(), &busy).unwrap(), "n1", "a sibling counts more than strangers");
}

#[test]
fn what_keeps_a_pod_off_a_node() {
    let required = |operator: &str, values: Value| {
        json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": operator, "values": values}]}]}}}})
    };
    let by_field = json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]}}}});
    let small = json!({"status": {"allocatable": {"cpu": "500m", "memory": "1Gi", "pods": "10"}}});
    let needs = |cpu: &str, memory: &str| json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}}]});
    const AFFINITY: &str = "node(s) didn't match Pod's node affinity/selector";
    const TAINT: &str = "node(s) had untolerated taint(s)";
    for (name, node_extra, spec, expected) in [
        ("free", json!({}), json!({}), None),
        ("node_selector", json!({}), json!({"nodeSelector": {"disk": "ssd"}}), Some(AFFINITY)),
        ("affinity_in", json!({}), required("In", json!(["n1"])), None),
        ("affinity_not_in", json!({}), required("NotIn", json!(["n1"])), Some(AFFINITY)),
        ("affinity_field", json!({}), by_field, None),
        ("no_schedule", tainted("NoSchedule"), json!({}), Some(TAINT)),
        ("no_execute", tainted("NoExecute"), json!({}), Some(TAINT)),
        ("prefer_no_schedule", tainted("PreferNoSchedule"), json!({}), None),
        ("tolerated", tainted("NoSchedule"), json!({"tolerations": [{"key": "k", "value": "v"}]}), None),
        ("other_value", tainted("NoSchedule"), json!({"tolerations": [{"key": "k", "value": "w"}]}), Some(TAINT)),
        ("tolerates_all", tainted("NoSchedule"), json!({"tolerations": [{"operator": "Exists"}]}), None),
        ("cordoned", json!({"spec": {"unschedulable": true}}), json!({}), Some("node(s) were unschedulable")),
        ("cpu", small.clone(), needs("600m", "1Mi"), Some("Insufficient cpu")),
        ("memory", small.clone(), needs("1m", "2Gi"), Some("Insufficient memory")),
        ("fits", small.clone(), needs("500m", "1Gi"), None),
        ("full", json!({"status": {"allocatable": {"pods": "0"}}}), json!({}), Some("Too many pods")),
    ] {
        let result = choose(&pod(spec), &[node("n1", node_extra)], &BTreeMap::new());
        let reason = result.err().map(|unfit| unfit.reasons.into_keys().collect::<Vec<_>>().join(";"));
        assert_eq!(reason.as_deref(), expected, "{name}");
    }
}

#[test]
fn the_event_reads_like_upstreams() {
    let nodes = [node("n1", tainted("NoSchedule")), node("n2", json!({"spec": {"unschedulable": true}}))];
    let unfit = choose(&pod(json!({})), &nodes, &BTreeMap::new()).unwrap_err();
    assert_eq!(
        unfit.message(),
        "0/2 nodes are available: 1 node(s) had untolerated taint(s), 1 node(s) were unschedulable. no new claims to deallocate, \
         preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
    );
    assert_eq!(
        choose(&pod(json!({})), &[], &BTreeMap::new()).unwrap_err().message(),
        "no nodes available to schedule pods"
    );
}

#[test]
fn host_ports_clash_by_protocol_and_address() {
    let with = |port: Value| pod(json!({"containers": [{"name": "c", "ports": [port]}]}));
    let taken = with(json!({"containerPort": 80, "hostPort": 80}));
    let mut loads: BTreeMap<String, Load> = BTreeMap::new();
    loads.entry("n1".into()).or_default().add(&Demand::of(&taken));
    let nodes = [node("n1", json!({}))];
    assert!(choose(&taken, &nodes, &loads).is_err());
    assert!(
        choose(&with(json!({"containerPort": 80, "hostPort": 80, "hostIP": "192.168.50.11"})), &nodes, &loads).is_err()
    );
    assert!(choose(&with(json!({"containerPort": 80, "hostPort": 80, "protocol": "UDP"})), &nodes, &loads).is_ok());
}

#[test]
fn the_ledger_counts_a_pod_once() {
    let mut ledger = Ledger::default();
    let unbound = Arc::new(pod(json!({})));
    let bound = Arc::new(pod(json!({"nodeName": "n1"})));
    ledger.assumed.insert("p".into());
    ledger.place("p", "n1", Demand::of(&unbound));
    ledger.observe(None, Some(&unbound));
    ledger.observe(Some(&unbound), Some(&bound));
    assert_eq!(ledger.loads["n1"].pods, 1);
    assert!(ledger.observe(Some(&bound), None), "room becomes free");
    assert!(ledger.loads.is_empty());
}

#[test]
fn quantities() {
    for (text, expected) in [("2", 2000), ("1500m", 1500), ("1Ki", 1_024_000), ("0.5", 500), ("1k", 1_000_000)] {
        assert_eq!(milli(&Quantity(text.into())), Some(expected), "{text}");
    }
    assert_eq!(milli(&Quantity("lots".into())), None);
}
