//! Tables for the endpoint compilers.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;

fn service(spec: Value) -> Service {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "svc", "labels": {"team": "a", MANAGED_BY: "me"}},
        "spec": spec
    }))
    .unwrap()
}

fn web(extra: Value) -> Service {
    let mut spec = json!({
        "clusterIP": "10.96.0.5", "ipFamilies": ["IPv4"], "selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]
    });
    spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    service(spec)
}

fn pod_with(name: &str, ip: &str, ready: bool, extra: Value) -> Arc<Pod> {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9000}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}],
                   "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}
    });
    merge(&mut pod, &extra);
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

fn pod(name: &str, ip: &str, ready: bool) -> Arc<Pod> {
    pod_with(name, ip, ready, json!({}))
}

fn topology() -> Topology {
    let node = |zone: &str| NodeFacts { zone: Some(zone.into()), ready: true, cpu_milli: 4000, control_plane: false };
    Topology { nodes: BTreeMap::from([("n1".into(), node("z1")), ("n2".into(), node("z2"))]) }
}

fn run(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>]) -> Changes {
    run_with(service, pods, existing, 100)
}

fn run_with(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>], max: usize) -> Changes {
    reconcile(&Input {
        service,
        pods,
        topology: &topology(),
        existing,
        trigger_time: None,
        max_per_slice: max,
        hinted: &[],
    })
}

/// Does what an API server would: names creations, replaces updates, drops deletions.
fn apply(existing: &mut Vec<Arc<EndpointSlice>>, changes: Changes, serial: &mut usize) {
    for slice in changes.update {
        let at = existing.iter().position(|s| s.metadata.name == slice.metadata.name).expect("an update names a slice");
        existing[at] = Arc::new(slice);
    }
    existing.retain(|s| !changes.delete.iter().any(|d| d.metadata.name == s.metadata.name));
    for mut slice in changes.create {
        *serial += 1;
        slice.metadata.name = Some(format!("web-{serial}"));
        existing.push(Arc::new(slice));
    }
}

fn addresses(slice: &EndpointSlice) -> Vec<&str> {
    slice.endpoints.iter().flatten().map(|e| e.addresses[0].as_str()).collect()
}

#[test]
fn conditions_of_endpoints() {
    let gone = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    for (name, publish, ready, terminating, expected) in [
        ("ready", false, true, false, (true, true, false)),
        ("not_ready", false, false, false, (false, false, false)),
        ("terminating_but_ready_serves", false, true, true, (false, true, true)),
        ("terminating_not_ready", false, false, true, (false, false, true)),
        ("published_not_ready", true, false, false, (true, false, false)),
        ("published_terminating", true, true, true, (true, true, true)),
    ] {
        let extra = if terminating { gone.clone() } else { json!({}) };
        let changes =
            run(&web(json!({"publishNotReadyAddresses": publish})), &[pod_with("p", "10.0.0.1", ready, extra)], &[]);
        let endpoint = &changes.create[0].endpoints.as_ref().unwrap()[0];
        let c = endpoint.conditions.as_ref().unwrap();
        let got = (c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap());
        assert_eq!(got, expected, "{name}");
    }
}

#[test]
fn shape_of_a_slice() {
    let changes = run(&web(json!({})), &[pod("p", "10.0.0.1", true)], &[]);
    let slice = &changes.create[0];
    assert_eq!(slice.metadata.generate_name.as_deref(), Some("web-"));
    let labels = slice.metadata.labels.as_ref().unwrap();
    assert_eq!(labels[MANAGED_BY], SLICE_CONTROLLER, "the Service cannot set a reserved label");
    assert_eq!((labels[SERVICE_NAME].as_str(), labels["team"].as_str()), ("web", "a"));
    assert!(!labels.contains_key(HEADLESS));
    let endpoint = &slice.endpoints.as_ref().unwrap()[0];
    assert_eq!((endpoint.node_name.as_deref(), endpoint.zone.as_deref()), (Some("n1"), Some("z1")));
    assert_eq!(endpoint.target_ref.as_ref().unwrap().uid.as_deref(), Some("p"));
    let owner = &slice.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Service", "svc", Some(true)));
}

#[test]
fn which_pods_are_endpoints() {
    for (name, extra, expected) in [
        ("succeeded", json!({"status": {"phase": "Succeeded"}}), 0),
        ("failed", json!({"status": {"phase": "Failed"}}), 0),
        ("without_address", json!({"status": {"podIPs": []}}), 0),
        ("of_another_family", json!({"status": {"podIPs": [{"ip": "fd00::1"}]}}), 0),
        ("not_selected", json!({"metadata": {"labels": {"app": "db"}}}), 0),
        ("on_an_unknown_node", json!({"spec": {"nodeName": "n9"}}), 0),
        ("pending_with_address", json!({"status": {"phase": "Pending"}}), 1),
    ] {
        let changes = run(&web(json!({})), &[pod_with("p", "10.0.0.1", true, extra)], &[]);
        let count: usize = changes.create.iter().map(|s| addresses(s).len()).sum();
        assert_eq!(count, expected, "{name}");
        assert_eq!(changes.waiting.is_empty(), name != "on_an_unknown_node", "{name}");
    }
    let published = web(json!({"publishNotReadyAddresses": true}));
    let stray = pod_with("p", "10.0.0.1", true, json!({"spec": {"nodeName": "n9"}}));
    assert_eq!(run(&published, &[stray], &[]).create[0].endpoints.as_ref().unwrap()[0].zone, None);
}

#[test]
fn target_ports_resolve_per_pod() {
    let port = |target: Value, protocol: &str| {
        serde_json::from_value::<ServicePort>(json!({"port": 80, "targetPort": target, "protocol": protocol})).unwrap()
    };
    let sidecar = json!({"spec": {"initContainers": [
        {"name": "s", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 7000}]},
        {"name": "i", "ports": [{"name": "init", "containerPort": 7001}]}]}});
    let pod = pod_with("p", "10.0.0.1", true, sidecar);
    for (name, target, protocol, expected) in [
        ("number", json!(8080), "TCP", Some(8080)),
        ("container_name", json!("web"), "TCP", Some(9000)),
        ("other_protocol", json!("web"), "UDP", None),
        ("sidecar", json!("side"), "TCP", Some(7000)),
        ("plain_init_container", json!("init"), "TCP", None),
        ("unknown", json!("nope"), "TCP", None),
    ] {
        assert_eq!(target_port(&port(target, protocol), &pod), expected, "{name}");
    }
    let mut absent = port(json!(1), "TCP");
    absent.target_port = None;
    assert_eq!(target_port(&absent, &pod), Some(80), "without targetPort the Service port counts");
}

#[test]
fn one_name_with_two_numbers_makes_two_slices() {
    let service = web(json!({"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}));
    let other = json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9001}]}]}});
    let changes = run(&service, &[pod("a", "10.0.0.1", true), pod_with("b", "10.0.0.2", true, other)], &[]);
    let numbers: BTreeSet<_> = changes.create.iter().map(|s| s.ports.as_ref().unwrap()[0].port).collect();
    assert_eq!(numbers, BTreeSet::from([Some(9000), Some(9001)]));
}

#[test]
fn hostname_only_with_the_matching_subdomain() {
    for (subdomain, expected) in [(json!("web"), Some("db-0")), (json!("other"), None), (json!(null), None)] {
        let extra = json!({"spec": {"hostname": "db-0", "subdomain": subdomain}});
        let changes = run(&web(json!({})), &[pod_with("p", "10.0.0.1", true, extra)], &[]);
        assert_eq!(changes.create[0].endpoints.as_ref().unwrap()[0].hostname.as_deref(), expected);
    }
}

#[test]
fn a_placeholder_stays_and_is_reused() {
    let mut serial = 0;
    let mut slices = Vec::new();
    apply(&mut slices, run(&web(json!({})), &[], &[]), &mut serial);
    assert_eq!(slices.len(), 1);
    assert!(run(&web(json!({})), &[], &slices).is_empty(), "nothing to write the second time");
    let name = slices[0].metadata.name.clone();
    let written = run(&web(json!({})), &[pod("p", "10.0.0.1", true)], &slices);
    apply(&mut slices, written, &mut serial);
    assert_eq!((slices.len(), &slices[0].metadata.name), (1, &name));
    assert_eq!(addresses(&slices[0]), ["10.0.0.1"]);
    let written = run(&web(json!({})), &[], &slices);
    apply(&mut slices, written, &mut serial);
    assert_eq!((slices.len(), &slices[0].metadata.name), (1, &name), "emptied, not replaced");
    assert!(addresses(&slices[0]).is_empty());
}

#[test]
fn dual_stack_has_one_slice_a_family_and_a_left_family_goes() {
    let both = json!({"status": {"podIPs": [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]}});
    let pods = [pod_with("p", "10.0.0.1", true, both)];
    let mut slices = Vec::new();
    apply(&mut slices, run(&web(json!({"ipFamilies": ["IPv6", "IPv4"]})), &pods, &[]), &mut 0);
    let types: BTreeSet<_> = slices.iter().map(|s| s.address_type.as_str()).collect();
    assert_eq!(types, BTreeSet::from(["IPv4", "IPv6"]));
    let changes = run(&web(json!({})), &pods, &slices);
    assert_eq!((changes.delete.len(), changes.delete[0].address_type.as_str()), (1, "IPv6"));
    assert!(changes.create.is_empty() && changes.update.is_empty());
}

#[test]
fn slices_of_an_earlier_service_are_deleted() {
    let mut slices = Vec::new();
    let pods = [pod("p", "10.0.0.1", true)];
    apply(&mut slices, run(&web(json!({})), &pods, &[]), &mut 0);
    let mut again = web(json!({}));
    again.metadata.uid = Some("svc2".into());
    let changes = run(&again, &pods, &slices);
    assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (1, 0, 1));
}

fn many(range: std::ops::Range<usize>) -> Vec<Arc<Pod>> {
    range.map(|i| pod(&format!("p{i:04}"), &format!("10.1.{}.{}", i / 250, i % 250 + 1), true)).collect()
}

#[test]
fn packing() {
    let service = web(json!({}));
    let mut serial = 0;
    let mut slices = Vec::new();
    apply(&mut slices, run(&service, &many(0..101), &[]), &mut serial);
    let mut sizes: Vec<usize> = slices.iter().map(|s| addresses(s).len()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 100]);
    // Three more fit into the small one; the full one is not touched.
    let changes = run(&service, &many(0..104), &slices);
    assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (0, 1, 0));
    assert_eq!(addresses(&changes.update[0]).len(), 4);
    apply(&mut slices, changes, &mut serial);
    // 98 more do not fit into it as a whole: a new slice, and nothing else is written.
    let changes = run(&service, &many(0..202), &slices);
    assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (1, 0, 0));
    assert_eq!(addresses(&changes.create[0]).len(), 98);
    apply(&mut slices, changes, &mut serial);
    // Sparse slices are not merged.
    let some: Vec<_> = many(0..202).into_iter().step_by(3).collect();
    let written = run(&service, &some, &slices);
    apply(&mut slices, written, &mut serial);
    assert_eq!(slices.len(), 3);
}

#[test]
fn hints() {
    let pods = [
        pod("a", "10.0.0.1", true),
        pod_with("b", "10.0.0.2", true, json!({"spec": {"nodeName": "n2"}})),
        pod("c", "10.0.0.3", false),
    ];
    let hints = |distribution: &str| -> Vec<String> {
        let changes = run(&web(json!({"trafficDistribution": distribution})), &pods, &[]);
        let endpoints = changes.create[0].endpoints.as_ref().unwrap();
        let mut all: Vec<String> = endpoints
            .iter()
            .map(|e| {
                let zones = e.hints.iter().flat_map(|h| h.for_zones.iter().flatten()).map(|z| z.name.as_str());
                let nodes = e.hints.iter().flat_map(|h| h.for_nodes.iter().flatten()).map(|n| n.name.as_str());
                format!("{}:{}", e.addresses[0], zones.chain(nodes).collect::<Vec<_>>().join("+"))
            })
            .collect();
        all.sort();
        all
    };
    assert_eq!(hints("PreferSameZone"), ["10.0.0.1:z1", "10.0.0.2:z2", "10.0.0.3:"]);
    assert_eq!(hints("PreferClose"), ["10.0.0.1:z1", "10.0.0.2:z2", "10.0.0.3:"]);
    assert_eq!(hints("PreferSameNode"), ["10.0.0.1:z1+n1", "10.0.0.2:z2+n2", "10.0.0.3:"]);
}

#[test]
fn proportional_hints_or_the_reason_why_not() {
    let mut service = web(json!({}));
    service.metadata.annotations =
        Some(BTreeMap::from([("service.kubernetes.io/topology-mode".into(), "Auto".into())]));
    let on = |count: usize, node: &str, from: usize| -> Vec<Arc<Pod>> {
        (0..count)
            .map(|i| {
                let n = from + i;
                pod_with(&format!("p{n}"), &format!("10.0.0.{}", n + 1), true, json!({"spec": {"nodeName": node}}))
            })
            .collect()
    };
    let few = run(&service, &on(1, "n1", 0), &[]);
    assert_eq!(
        few.events,
        [(
            true,
            "TopologyAwareHintsDisabled",
            "Insufficient number of endpoints (1 endpoints, 2 zones), addressType: IPv4".to_string()
        )]
    );
    // Five in one zone, one in the other: each zone wants three, so zone 2 gets what it lacks from zone 1.
    let mut pods = on(5, "n1", 0);
    pods.extend(on(1, "n2", 5));
    let changes = run(&service, &pods, &[]);
    assert_eq!(changes.hinted, [Family::V4]);
    assert_eq!(changes.events[0].1, "TopologyAwareHintsEnabled");
    let in_zone = |zone: &str| {
        let endpoints = changes.create[0].endpoints.as_ref().unwrap();
        endpoints.iter().filter(|e| e.hints.as_ref().unwrap().for_zones.as_ref().unwrap()[0].name == zone).count()
    };
    assert_eq!((in_zone("z1"), in_zone("z2")), (3, 3));
}

#[test]
fn trigger_time_is_the_creation_first_and_then_the_oldest_new_change() {
    let mut service = web(json!({}));
    let at = |second: i64| k8s_openapi::jiff::Timestamp::from_second(second).unwrap();
    service.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(5)));
    let changed = |name: &str, second: i64| {
        let extra =
            json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": at(second)}]}});
        pod_with(name, "10.0.0.1", true, extra)
    };
    let mut times = TriggerTimes::default();
    assert_eq!(times.observe(&service, &[&changed("a", 10)]), Some(at(5)));
    assert_eq!(times.observe(&service, &[&changed("a", 10)]), None);
    assert_eq!(times.observe(&service, &[&changed("a", 30), &changed("b", 20)]), Some(at(20)));
}

#[test]
fn endpoints_object() {
    let service = web(json!({}));
    let pods = [pod("b", "10.0.0.20", true), pod("a", "10.0.0.3", true), pod("c", "10.0.0.1", false)];
    let made = endpoints::reconcile(&service, &pods, None, None).unwrap();
    let subset = &made.subsets.as_ref().unwrap()[0];
    let ips = |list: &Option<Vec<k8s_openapi::api::core::v1::EndpointAddress>>| -> Vec<String> {
        list.iter().flatten().map(|a| a.ip.clone()).collect()
    };
    assert_eq!(ips(&subset.addresses), ["10.0.0.3", "10.0.0.20"], "sorted by address, not by text");
    assert_eq!(ips(&subset.not_ready_addresses), ["10.0.0.1"]);
    assert!(endpoints::reconcile(&service, &pods, Some(&made), None).is_none(), "equal objects are not written");
    let terminating =
        pod_with("a", "10.0.0.3", true, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
    let left = endpoints::reconcile(&service, &[terminating], None, None).unwrap();
    assert!(left.subsets.is_none());
}

#[test]
fn endpoints_over_capacity_are_cut_and_say_so() {
    let service = web(json!({}));
    let mut pods = many(0..990);
    pods.extend((0..30).map(|i| pod(&format!("u{i}"), &format!("10.9.0.{}", i + 1), false)));
    let cut = endpoints::reconcile(&service, &pods, None, None).unwrap();
    let subset = &cut.subsets.as_ref().unwrap()[0];
    assert_eq!(subset.addresses.as_ref().unwrap().len(), 990, "ready ones are kept first");
    assert_eq!(subset.not_ready_addresses.as_ref().unwrap().len(), 10);
    assert_eq!(cut.metadata.annotations.as_ref().unwrap()[endpoints::OVER_CAPACITY], "truncated");
    let fits = endpoints::reconcile(&service, &many(0..10), Some(&cut), None).unwrap();
    assert!(fits.metadata.annotations.is_none_or(|a| !a.contains_key(endpoints::OVER_CAPACITY)));
}

fn hand_made(subsets: Value) -> k8s_openapi::api::core::v1::Endpoints {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "ep", "labels": {"l": "1"}, "annotations": {"a": "1"}},
        "subsets": subsets
    }))
    .unwrap()
}

#[test]
fn mirroring() {
    let endpoints = hand_made(json!([
        {"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "ports": [{"port": 80}]},
        {"addresses": [{"ip": "10.0.0.3"}], "notReadyAddresses": [{"ip": "10.0.0.1"}, {"ip": "no-address"}], "ports": [{"port": 80}]}
    ]));
    let changes = mirror::reconcile(&endpoints, &[], 100);
    let v4 = changes.create.iter().find(|s| s.address_type == "IPv4").unwrap();
    assert_eq!(addresses(v4), ["10.0.0.1", "10.0.0.3"], "equal ports share a slice");
    let first = v4.endpoints.as_ref().unwrap()[0].conditions.as_ref().unwrap();
    assert_eq!(
        (first.ready, first.serving, first.terminating),
        (Some(false), None, None),
        "not ready anywhere is not ready"
    );
    assert_eq!(v4.metadata.labels.as_ref().unwrap()[MANAGED_BY], MIRROR_CONTROLLER);
    assert_eq!(v4.metadata.annotations.as_ref().unwrap()["a"], "1");
    assert_eq!(
        changes.events,
        [(true, "InvalidIPAddress", "Skipped 1 invalid IP addresses when mirroring to EndpointSlices".to_string())]
    );
    let mut slices = Vec::new();
    apply(&mut slices, changes, &mut 0);
    assert_eq!(slices.len(), 2);
    assert!(mirror::reconcile(&endpoints, &slices, 100).is_empty());
    let emptied = mirror::reconcile(&hand_made(json!([])), &slices, 100);
    assert_eq!((emptied.delete.len(), emptied.create.len()), (2, 0), "no placeholder");
}

#[test]
fn what_is_mirrored() {
    let selectorless = web(json!({"selector": {}}));
    let plain = hand_made(json!([]));
    let mut skipped = plain.clone();
    skipped.metadata.labels = Some(BTreeMap::from([(mirror::SKIP_MIRROR.into(), "true".into())]));
    let mut lock = plain.clone();
    lock.metadata.annotations = Some(BTreeMap::from([(mirror::LEADER.into(), "x".into())]));
    assert!(mirror::wanted(&plain, Some(&selectorless)));
    assert!(!mirror::wanted(&plain, None));
    assert!(!mirror::wanted(&plain, Some(&web(json!({})))));
    assert!(!mirror::wanted(&skipped, Some(&selectorless)));
    assert!(!mirror::wanted(&lock, Some(&selectorless)));
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the history, the slices hold exactly the wanted endpoints, none twice, none over the limit; and a second look
        /// changes nothing.
        #[test]
        fn any_history_converges(history in prop::collection::vec(prop::collection::btree_set(0usize..40, 0..40), 1..8)) {
            let service = web(json!({}));
            let mut slices = Vec::new();
            let mut serial = 0;
            for wanted in history {
                let pods: Vec<Arc<Pod>> = wanted.iter().map(|i| many(*i..*i + 1).remove(0)).collect();
                let changes = run_with(&service, &pods, &slices, 7);
                prop_assert!(changes.update.iter().all(|u| !changes.delete.iter().any(|d| d.metadata.name == u.metadata.name)));
                apply(&mut slices, changes, &mut serial);
                let mut have: Vec<String> = slices.iter().flat_map(|s| addresses(s)).map(str::to_string).collect();
                have.sort();
                let mut want: Vec<String> = pods.iter().map(|p| p.status.as_ref().unwrap().pod_ips.as_ref().unwrap()[0].ip.clone()).collect();
                want.sort();
                prop_assert_eq!(have, want);
                prop_assert!(slices.iter().all(|s| addresses(s).len() <= 7));
                prop_assert!(!slices.is_empty());
                prop_assert!(run_with(&service, &pods, &slices, 7).is_empty());
            }
        }

        /// One pod more or less costs one write.
        #[test]
        fn one_change_costs_one_write(count in 1usize..60, out in 0usize..60) {
            let service = web(json!({}));
            let mut slices = Vec::new();
            apply(&mut slices, run_with(&service, &many(0..count), &[], 7), &mut 0);
            let mut pods = many(0..count);
            pods.remove(out % count);
            let less = run_with(&service, &pods, &slices, 7);
            prop_assert_eq!(less.create.len() + less.update.len() + less.delete.len(), 1);
            let more = run_with(&service, &many(0..count + 1), &slices, 7);
            prop_assert_eq!(more.create.len() + more.update.len() + more.delete.len(), 1);
        }
    }
}
