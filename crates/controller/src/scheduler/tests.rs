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

/// Claims, volumes and classes by name.
#[derive(Default)]
struct Shelf(Vec<PersistentVolumeClaim>, Vec<PersistentVolume>, Vec<StorageClass>);

fn named<K: kube::Resource<DynamicType = ()> + Clone>(all: &[K], name: &str) -> Option<Arc<K>> {
    all.iter().find(|o| o.meta().name.as_deref() == Some(name)).cloned().map(Arc::new)
}

impl Storage for Shelf {
    fn claim(&self, _: &str, name: &str) -> Option<Arc<PersistentVolumeClaim>> {
        named(&self.0, name)
    }

    fn volume(&self, name: &str) -> Option<Arc<PersistentVolume>> {
        named(&self.1, name)
    }

    fn class(&self, name: &str) -> Option<Arc<StorageClass>> {
        named(&self.2, name)
    }
}

/// A decision by load alone.
fn choose(pod: &Pod, nodes: &[Arc<Node>], loads: &BTreeMap<String, Load>) -> Result<String, Unfit> {
    let (placed, related, namespaces, storage) = Default::default();
    let view =
        View { nodes, loads, placed: &placed, related: &related, namespaces: &namespaces, storage: &storage as &Shelf };
    super::choose(pod, &view)
}

/// A decision among placed pods: node, labels, and more of the spec.
fn among(pod: &Pod, nodes: &[Arc<Node>], others: &[(&str, Value, Value)], storage: &Shelf) -> Result<String, Unfit> {
    let mut ledger = Ledger::default();
    for (n, (node, labels, spec)) in others.iter().enumerate() {
        let mut spec = spec.clone();
        spec["containers"] = json!([]);
        let namespace = labels["in"].as_str().unwrap_or("ns");
        let other = json!({"metadata": {"name": "o", "namespace": namespace, "uid": format!("o{n}"), "labels": labels}, "spec": spec});
        ledger.place(&format!("o{n}"), node, &Arc::new(serde_json::from_value(other).unwrap()));
    }
    let namespaces =
        NamespaceLabels::from([("far".to_string(), BTreeMap::from([("team".to_string(), "far".to_string())]))]);
    let view = View {
        nodes,
        loads: &ledger.loads,
        placed: &ledger.placed,
        related: &ledger.related,
        namespaces: &namespaces,
        storage,
    };
    super::choose(pod, &view)
}

fn labelled(labels: Value, spec: Value) -> Pod {
    let mut pod = pod(spec);
    pod.metadata.labels = serde_json::from_value(labels).unwrap();
    pod.metadata.owner_references = None;
    pod
}

fn reasons(result: Result<String, Unfit>) -> Result<String, String> {
    result.map_err(|unfit| {
        let mut all: Vec<String> =
            unfit.reasons.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        all.sort();
        unfit.blocked.into_iter().chain(all).collect::<Vec<_>>().join(", ")
    })
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
        (
            "no_gpu",
            small.clone(),
            json!({"containers": [{"name": "c", "resources": {"requests": {"example.com/gpu": "1"}}}]}),
            Some("Insufficient example.com/gpu"),
        ),
        ("pod_level", small.clone(), json!({"resources": {"requests": {"cpu": "600m"}}}), Some("Insufficient cpu")),
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
    ledger.place("p", "n1", &unbound);
    assert_eq!(ledger.observe(None, Some(&unbound)), Effect::Nothing);
    assert_eq!(ledger.observe(Some(&unbound), Some(&bound)), Effect::Moved);
    assert_eq!(ledger.observe(Some(&bound), Some(&bound)), Effect::Nothing);
    assert_eq!(ledger.loads["n1"].pods, 1);
    let mut relabelled = Pod::clone(&bound);
    relabelled.metadata.labels = Some(BTreeMap::from([("a".to_string(), "b".to_string())]));
    assert_eq!(ledger.observe(Some(&bound), Some(&Arc::new(relabelled))), Effect::Moved, "rules look at labels");
    assert_eq!(ledger.observe(Some(&bound), None), Effect::Freed);
    assert!(ledger.loads.is_empty());
}

#[test]
fn quantities() {
    for (text, expected) in [("2", 2000), ("1500m", 1500), ("1Ki", 1_024_000), ("0.5", 500), ("1k", 1_000_000)] {
        assert_eq!(milli(&Quantity(text.into())), Some(expected), "{text}");
    }
    assert_eq!(milli(&Quantity("lots".into())), None);
}

#[test]
fn rules_between_pods() {
    // Two nodes in zone a, one in zone b, one without a zone.
    let zoned = |name: &str, zone: Option<&str>| {
        let labels = json!({"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": zone});
        let labels: serde_json::Map<String, Value> = labels
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        node(name, json!({"metadata": {"name": name, "labels": labels}}))
    };
    let nodes = [zoned("a1", Some("a")), zoned("a2", Some("a")), zoned("b1", Some("b")), zoned("x1", None)];
    let term = |key: &str, app: &str| json!({"topologyKey": key, "labelSelector": {"matchLabels": {"app": app}}});
    const ZONES: &str = "topology.kubernetes.io/zone";
    const HOST: &str = "kubernetes.io/hostname";
    let required = |kind: &str, term: Value| json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}});
    let preferred = |kind: &str, term: Value| json!({"affinity": {kind: {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 10, "podAffinityTerm": term}]}}});
    let spread = |when: &str, key: &str, extra: Value| {
        let mut constraint = json!({"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": when,
            "labelSelector": {"matchLabels": {"app": "web"}}});
        constraint.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"topologySpreadConstraints": [constraint]})
    };
    let web = json!({"app": "web"});
    let db = json!({"app": "db"});
    let on = |node: &'static str, labels: &Value| (node, labels.clone(), json!({}));
    let mut beyond = term(ZONES, "db");
    beyond["namespaceSelector"] = json!({"matchLabels": {"team": "far"}});
    let far_db = json!({"app": "db", "in": "far"});
    let mut same_version = term(HOST, "web");
    same_version["matchLabelKeys"] = json!(["version"]);
    let none = json!({});
    for (name, labels, spec, others, expected) in [
        ("together_in_a_zone", &web, required("podAffinity", term(ZONES, "db")), vec![on("b1", &db)], Ok("b1")),
        (
            "nobody_to_be_together_with",
            &web,
            required("podAffinity", term(ZONES, "db")),
            vec![on("a1", &web)],
            Err("4 node(s) didn't match pod affinity rules"),
        ),
        ("first_of_its_kind", &web, required("podAffinity", term(ZONES, "web")), vec![on("a1", &db)], Ok("a2")),
        (
            "first_of_its_kind_needs_the_topology_key",
            &web,
            json!({"nodeSelector": {HOST: "x1"}, "affinity": required("podAffinity", term(ZONES, "web"))["affinity"]}),
            vec![],
            Err("1 node(s) didn't match pod affinity rules, 3 node(s) didn't match Pod's node affinity/selector"),
        ),
        (
            "other_namespace_does_not_count",
            &web,
            required("podAffinity", term(ZONES, "db")),
            vec![on("b1", &far_db)],
            Err("4 node(s) didn't match pod affinity rules"),
        ),
        ("namespace_selector", &web, required("podAffinity", beyond), vec![on("b1", &far_db)], Ok("b1")),
        (
            "apart_by_host",
            &web,
            required("podAntiAffinity", term(HOST, "web")),
            vec![on("a1", &web), on("a2", &web), on("b1", &web), on("x1", &web)],
            Err("4 node(s) didn't match pod anti-affinity rules"),
        ),
        (
            "apart_by_zone",
            &web,
            required("podAntiAffinity", term(ZONES, "web")),
            vec![on("a1", &web), on("x1", &web)],
            Ok("b1"),
        ),
        (
            "apart_only_from_the_same_version",
            &json!({"app": "web", "version": "2"}),
            required("podAntiAffinity", same_version),
            vec![
                on("a1", &json!({"app": "web", "version": "2"})),
                on("a2", &json!({"app": "web", "version": "1"})),
                on("b1", &json!({"app": "web", "version": "2"})),
                on("x1", &json!({"app": "web", "version": "2"})),
            ],
            Ok("a2"),
        ),
        (
            "refused_by_those_that_are_there",
            &web,
            json!({}),
            vec![
                ("a1", db.clone(), required("podAntiAffinity", term(ZONES, "web"))),
                ("x1", db.clone(), required("podAntiAffinity", term(HOST, "web"))),
                on("b1", &none),
                on("b1", &none),
            ],
            Ok("b1"),
        ),
        (
            "refused_everywhere",
            &web,
            json!({"nodeSelector": {HOST: "a2"}}),
            vec![("a1", db.clone(), required("podAntiAffinity", term(ZONES, "web")))],
            Err(
                "1 node(s) didn't satisfy existing pods anti-affinity rules, 3 node(s) didn't match Pod's node affinity/selector",
            ),
        ),
        (
            "would_rather_be_near",
            &web,
            preferred("podAffinity", term(ZONES, "db")),
            vec![on("b1", &db), on("b1", &db)],
            Ok("b1"),
        ),
        (
            "would_rather_be_away",
            &web,
            preferred("podAntiAffinity", term(ZONES, "db")),
            vec![on("a1", &db), on("x1", &none), on("b1", &none), on("b1", &none)],
            Ok("x1"),
        ),
        (
            "is_wished_near",
            &web,
            json!({}),
            vec![("b1", db.clone(), preferred("podAffinity", term(HOST, "web")))],
            Ok("b1"),
        ),
        ("spread_over_zones", &web, spread("DoNotSchedule", ZONES, json!({})), vec![on("a1", &web)], Ok("b1")),
        (
            "spread_cannot_be_kept",
            &web,
            json!({"nodeSelector": {ZONES: "a"}, "topologySpreadConstraints": spread("DoNotSchedule", ZONES, json!({"nodeAffinityPolicy": "Ignore"}))["topologySpreadConstraints"]}),
            vec![on("a1", &web)],
            Err(
                "2 node(s) didn't match Pod's node affinity/selector, 2 node(s) didn't match pod topology spread constraints",
            ),
        ),
        (
            "domains_that_the_pod_cannot_use_do_not_count",
            &web,
            json!({"nodeSelector": {ZONES: "a"}, "topologySpreadConstraints": spread("DoNotSchedule", ZONES, json!({}))["topologySpreadConstraints"]}),
            vec![on("a1", &web)],
            Ok("a2"),
        ),
        (
            "too_few_domains",
            &web,
            spread("DoNotSchedule", ZONES, json!({"minDomains": 3})),
            vec![on("a1", &web), on("b1", &web)],
            Err(
                "1 node(s) didn't match pod topology spread constraints (missing required label), 3 node(s) didn't match pod topology spread constraints",
            ),
        ),
        (
            "rather_spread",
            &web,
            spread("ScheduleAnyway", ZONES, json!({})),
            vec![on("a1", &web), on("b1", &none), on("b1", &none)],
            Ok("b1"),
        ),
        (
            "rather_spread_where_it_is_impossible",
            &web,
            json!({"nodeSelector": {HOST: "a1"}, "topologySpreadConstraints": spread("ScheduleAnyway", ZONES, json!({}))["topologySpreadConstraints"]}),
            vec![on("a1", &web)],
            Ok("a1"),
        ),
    ] {
        let result = reasons(among(&labelled(labels.clone(), spec), &nodes, &others, &Shelf::default()));
        assert_eq!(result.as_deref().map_err(String::as_str), expected, "{name}");
    }
}

#[test]
fn preferred_node_affinity_outweighs_load() {
    let prefers = json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "preference": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["n1"]}]}}]}}});
    let busy: Vec<(&str, Value, Value)> = (0..5).map(|_| ("n1", json!({}), json!({}))).collect();
    let plain = labelled(json!({}), json!({}));
    assert_eq!(among(&plain, &two(), &busy, &Shelf::default()).unwrap(), "n2");
    assert_eq!(among(&labelled(json!({}), prefers), &two(), &busy, &Shelf::default()).unwrap(), "n1");
}

#[test]
fn claims_keep_a_pod_waiting() {
    let with = |volume: Value| labelled(json!({}), json!({"volumes": [volume]}));
    let uses = |claim: &str| with(json!({"name": "v", "persistentVolumeClaim": {"claimName": claim}}));
    let claim = |name: &str, spec: Value, phase: &str| -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec, "status": {"phase": phase}})).unwrap()
    };
    let volume: PersistentVolume = serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": {"nodeAffinity": {"required": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["n2"]}]}]}}}}))
    .unwrap();
    let class: StorageClass = serde_json::from_value(
        json!({"metadata": {"name": "late"}, "provisioner": "p", "volumeBindingMode": "WaitForFirstConsumer"}),
    )
    .unwrap();
    let mut leaving = claim("leaving", json!({"volumeName": "pv"}), "Bound");
    leaving.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
    let shelf = Shelf(
        vec![
            claim("unbound", json!({}), "Pending"),
            claim("bound", json!({"volumeName": "pv"}), "Bound"),
            claim("astray", json!({"volumeName": "gone"}), "Bound"),
            claim("lost", json!({"volumeName": "gone"}), "Lost"),
            claim("late", json!({"storageClassName": "late"}), "Pending"),
            claim("p-mine", json!({"volumeName": "pv"}), "Bound"),
            leaving,
        ],
        vec![volume],
        vec![class],
    );
    for (pod, expected) in [
        (uses("none"), Err("persistentvolumeclaim \"none\" not found")),
        (uses("unbound"), Err("pod has unbound immediate PersistentVolumeClaims")),
        (uses("bound"), Ok("n2")),
        (uses("lost"), Err("persistentvolumeclaim \"lost\" bound to non-existent persistentvolume \"gone\"")),
        (uses("leaving"), Err("persistentvolumeclaim \"leaving\" is being deleted")),
        (uses("astray"), Err("2 node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)")),
        (uses("late"), Err("2 node(s) didn't find available persistent volumes to bind")),
        (
            with(json!({"name": "new", "ephemeral": {}})),
            Err("waiting for ephemeral volume controller to create the persistentvolumeclaim \"p-new\""),
        ),
        (
            with(json!({"name": "mine", "ephemeral": {}})),
            Err("PVC ns/p-mine was not created for pod ns/p (pod is not owner)"),
        ),
    ] {
        let result = reasons(among(&pod, &two(), &[], &shelf));
        assert_eq!(result.as_deref().map_err(String::as_str), expected);
    }
    assert_eq!(
        among(&uses("unbound"), &two(), &[], &shelf).unwrap_err().message(),
        "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. no new claims to deallocate, preemption: \
         0/2 nodes are available: 2 Preemption is not helpful for scheduling."
    );
}

#[test]
fn what_preemption_could_do_is_told() {
    let full = [node("n1", json!({"status": {"allocatable": {"cpu": "1"}}})), node("n2", tainted("NoSchedule"))];
    let wants = |priority: i32, policy: &str| {
        labelled(
            json!({}),
            json!({"priority": priority, "preemptionPolicy": policy,
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "2"}}}]}),
        )
    };
    let others = [("n1", json!({}), json!({"priority": 5}))];
    let text = |pod: Pod| among(&pod, &full, &others, &Shelf::default()).unwrap_err().message();
    const WHY: &str = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s). no new claims to deallocate, ";
    for (priority, policy, expected) in [
        (
            5,
            "PreemptLowerPriority",
            "preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling.",
        ),
        (
            6,
            "PreemptLowerPriority",
            "preemption: 0/2 nodes are available: 1 Preemption is not helpful for scheduling, 1 Preemption is not supported.",
        ),
        (6, "Never", "preemption: not eligible due to preemptionPolicy=Never."),
    ] {
        assert_eq!(text(wants(priority, policy)), format!("{WHY}{expected}"));
    }
}

#[test]
fn the_most_important_pods_are_tried_first() {
    let mut ledger = Ledger::default();
    for (name, priority, claims) in [("low", 1, false), ("high", 9, false), ("claims", 5, true)] {
        ledger.unschedulable.insert(Key::new("ns", name), Waits { pods: false, claims, priority });
    }
    let names = |keys: Vec<Key>| keys.into_iter().map(|k| k.name).collect::<Vec<_>>();
    assert_eq!(names(ledger.wake(|_, waits| waits.claims)), ["claims"]);
    assert_eq!(names(ledger.wake(|_, _| true)), ["high", "low"]);
}
