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
    let changes = mirror::reconcile(&endpoints, &[]);
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
    assert!(mirror::reconcile(&endpoints, &slices).is_empty());
    let emptied = mirror::reconcile(&hand_made(json!([])), &slices);
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

#[test]
fn a_subset_is_mirrored_in_one_slice_a_family() {
    let addresses = |from: usize, count: usize| -> Vec<Value> {
        (from..from + count).map(|i| json!({"ip": format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255)})).collect()
    };
    let one = hand_made(json!([{"addresses": addresses(1, 1000), "ports": [{"port": 80}]}]));
    let changes = mirror::reconcile(&one, &[]);
    assert_eq!((changes.create.len(), changes.events.len()), (1, 0));
    assert_eq!(changes.create[0].endpoints.as_ref().unwrap().len(), 1000);

    // Ready ones come first; what is over the limit is told, and so is what is no address.
    let mut many = addresses(1, 999);
    many.insert(0, json!({"ip": "none"}));
    let over =
        hand_made(json!([{"addresses": many, "notReadyAddresses": addresses(5000, 3), "ports": [{"port": 80}]}]));
    let changes = mirror::reconcile(&over, &[]);
    let ready = |e: &Endpoint| e.conditions.as_ref().unwrap().ready == Some(true);
    let endpoints = changes.create[0].endpoints.as_ref().unwrap();
    assert_eq!((endpoints.len(), endpoints.iter().filter(|e| ready(e)).count()), (1000, 999));
    let texts: Vec<&str> = changes.events.iter().map(|(_, _, text)| text.as_str()).collect();
    assert_eq!(
        texts,
        [
            "Skipped 1 invalid IP addresses when mirroring to EndpointSlices",
            "A max of 1000 addresses can be mirrored to EndpointSlices per Endpoints subset. 3 addresses were skipped"
        ]
    );

    // Slices of a mirror that made smaller ones become one.
    let mut slices = Vec::new();
    apply(&mut slices, mirror::reconcile(&one, &[]), &mut 0);
    let whole = slices.pop().unwrap();
    for (i, part) in whole.endpoints.as_ref().unwrap().chunks(100).enumerate() {
        let mut slice = EndpointSlice::clone(&whole);
        slice.metadata.name = Some(format!("part-{i}"));
        slice.endpoints = Some(part.to_vec());
        slices.push(Arc::new(slice));
    }
    let changes = mirror::reconcile(&one, &slices);
    assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (0, 1, 9));
    assert_eq!(changes.update[0].endpoints.as_ref().unwrap().len(), 1000);
}

#[test]
fn a_service_that_is_being_deleted_gets_no_new_slices() {
    let mut service = web(json!({}));
    let pods = [pod("a", "10.0.0.1", true), pod("b", "10.0.0.2", true)];
    let mut slices = Vec::new();
    apply(&mut slices, run_with(&service, &pods, &[], 1), &mut 0);
    let time = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH);
    service.metadata.deletion_timestamp = Some(time);
    assert!(run(&service, &pods, &[]).is_empty());
    // What is there still follows the pods.
    let changes = run_with(&service, &pods[..1], &slices, 1);
    assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (0, 0, 1));
}

#[test]
fn two_pods_with_one_address_are_two_endpoints() {
    let leaving = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let pods = [pod_with("old", "10.0.0.1", true, leaving), pod("new", "10.0.0.1", true)];
    let changes = run(&web(json!({})), &pods, &[]);
    let endpoints = changes.create[0].endpoints.as_ref().unwrap();
    let names: BTreeSet<_> = endpoints.iter().map(|e| e.target_ref.as_ref().unwrap().name.clone().unwrap()).collect();
    assert_eq!(names, BTreeSet::from(["new".to_owned(), "old".to_owned()]));
}

#[test]
fn a_pod_that_comes_back_under_its_name_is_an_update() {
    let mut slices = Vec::new();
    apply(&mut slices, run(&web(json!({})), &[pod("db-0", "10.0.0.1", true)], &[]), &mut 0);
    let again = pod_with("db-0", "10.0.0.1", true, json!({"metadata": {"uid": "another"}}));
    let changes = run(&web(json!({})), &[again], &slices);
    assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (0, 1, 0));
    let endpoint = &changes.update[0].endpoints.as_ref().unwrap()[0];
    assert_eq!(endpoint.target_ref.as_ref().unwrap().uid.as_deref(), Some("another"));
}

#[test]
fn what_others_do_to_a_slice_is_undone() {
    let service = web(json!({}));
    let pods = [pod("a", "10.0.0.1", true), pod("b", "10.0.0.2", false)];
    let mut made = Vec::new();
    apply(&mut made, run(&service, &pods, &[]), &mut 0);
    let tampered = |change: &dyn Fn(&mut EndpointSlice)| {
        let mut slice = EndpointSlice::clone(&made[0]);
        change(&mut slice);
        Arc::new(slice)
    };
    let rows: [(&str, Arc<EndpointSlice>); 6] = [
        (
            "an_endpoint_added",
            tampered(&|s| {
                s.endpoints
                    .as_mut()
                    .unwrap()
                    .push(Endpoint { addresses: vec!["192.0.2.1".into()], ..Default::default() })
            }),
        ),
        ("an_endpoint_removed", tampered(&|s| drop(s.endpoints.as_mut().unwrap().pop()))),
        (
            "an_endpoint_doubled",
            tampered(&|s| {
                let e = s.endpoints.as_ref().unwrap()[0].clone();
                s.endpoints.as_mut().unwrap().push(e);
            }),
        ),
        (
            "a_condition",
            tampered(&|s| s.endpoints.as_mut().unwrap()[1].conditions.as_mut().unwrap().ready = Some(true)),
        ),
        ("a_port", tampered(&|s| s.ports.as_mut().unwrap()[0].port = Some(1))),
        ("a_label", tampered(&|s| drop(s.metadata.labels.as_mut().unwrap().insert("team".into(), "b".into())))),
    ];
    for (name, slice) in rows {
        let changes = run(&service, &pods, std::slice::from_ref(&slice));
        assert_eq!((changes.create.len(), changes.update.len(), changes.delete.len()), (0, 1, 0), "{name}");
        let fixed = &changes.update[0];
        assert_eq!(fixed.metadata.name, slice.metadata.name, "{name}");
        assert_eq!(addresses(fixed), ["10.0.0.1", "10.0.0.2"], "{name}");
        assert_eq!((&fixed.ports, &fixed.metadata.labels), (&made[0].ports, &made[0].metadata.labels), "{name}");
    }
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

        /// Pods of all kinds, Services of all kinds, and somebody who tampers with the slices in between: after every sync the slices
        /// hold exactly what the pods say, each endpoint once, with its ports, within the limit, and nothing more is to be done.
        #[test]
        fn slices_say_what_the_pods_say(
            steps in prop::collection::vec((prop::collection::vec(any_pod(), 0..14), any_service(), any_tampering()), 1..6),
            max in 1usize..6,
        ) {
            let mut slices: Vec<Arc<EndpointSlice>> = Vec::new();
            let mut serial = 0;
            for (pods, service, tampering) in steps {
                tamper(&mut slices, &tampering);
                let pods: Vec<Arc<Pod>> = pods.iter().enumerate().map(|(i, kind)| kind.pod(i)).collect();
                let changes = run_with(&service, &pods, &slices, max);
                apply(&mut slices, changes, &mut serial);
                let mut have: Vec<(String, String, Vec<String>, Option<bool>)> = Vec::new();
                for slice in &slices {
                    prop_assert!(addresses(slice).len() <= max);
                    let ports = slice.ports.iter().flatten().map(|p| format!("{:?} {:?}", p.name.as_deref(), p.port)).collect::<Vec<_>>();
                    for endpoint in slice.endpoints.iter().flatten() {
                        let ready = endpoint.conditions.as_ref().and_then(|c| c.ready);
                        have.push((slice.address_type.clone(), endpoint.addresses[0].clone(), ports.clone(), ready));
                    }
                }
                have.sort();
                prop_assert_eq!(have, wanted(&service, &pods));
                for family in families(&service, &pods) {
                    prop_assert!(slices.iter().any(|s| s.address_type == family.as_str()), "a slice of {:?}", family);
                }
                prop_assert!(run_with(&service, &pods, &slices, max).is_empty(), "nothing is left to do");
            }
        }

        /// Whatever changes about one pod, its port numbers too, two slices a family are written at most: the one it leaves and
        /// the one it enters.
        #[test]
        fn a_change_of_one_pod_touches_two_slices(
            kinds in prop::collection::vec(any_pod(), 1..20), service in any_service(), at in 0usize..20, now in any_pod(), max in 1usize..6,
        ) {
            let pods = |kinds: &[Kind]| -> Vec<Arc<Pod>> { kinds.iter().enumerate().map(|(i, kind)| kind.pod(i)).collect() };
            let mut slices = Vec::new();
            apply(&mut slices, run_with(&service, &pods(&kinds), &[], max), &mut 0);
            let mut changed = kinds.clone();
            changed[at % kinds.len()] = now;
            let changes = run_with(&service, &pods(&changed), &slices, max);
            let written = changes.create.len() + changes.update.len() + changes.delete.len();
            prop_assert!(written <= 2 * families(&service, &[]).len(), "{} writes", written);
        }
    }

    /// What pods differ in.
    #[derive(Clone, Debug)]
    struct Kind {
        ready: bool,
        leaving: bool,
        finished: bool,
        known_node: bool,
        /// What the named port is in this pod, if it has it.
        number: Option<i32>,
        v4: bool,
        v6: bool,
    }

    impl Kind {
        fn pod(&self, i: usize) -> Arc<Pod> {
            let mut ips = Vec::new();
            if self.v6 {
                ips.push(json!({"ip": format!("fd00::{:x}", i + 1)}));
            }
            if self.v4 {
                ips.push(json!({"ip": format!("10.0.0.{}", i + 1)}));
            }
            let ports = self.number.map(|n| vec![json!({"name": "web", "containerPort": n})]).unwrap_or_default();
            let mut extra = json!({
                "spec": {"nodeName": if self.known_node { "n1" } else { "n9" }, "containers": [{"name": "c", "ports": ports}]},
                "status": {"podIPs": ips, "phase": if self.finished { "Failed" } else { "Running" }}
            });
            if self.leaving {
                extra["metadata"] = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
            }
            pod_with(&format!("p{i}"), "", self.ready, extra)
        }
    }

    fn any_pod() -> impl Strategy<Value = Kind> {
        let flags = (any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.1), prop::bool::weighted(0.9));
        let ports = prop_oneof![3 => Just(Some(9000)), 2 => Just(Some(9001)), 1 => Just(None)];
        (flags, ports, prop::bool::weighted(0.9), any::<bool>()).prop_map(
            |((ready, leaving, finished, known_node), number, v4, v6)| Kind {
                ready,
                leaving,
                finished,
                known_node,
                number,
                v4,
                v6,
            },
        )
    }

    fn any_service() -> impl Strategy<Value = Service> {
        let families = prop_oneof![
            Just(json!(["IPv4"])),
            Just(json!(["IPv6"])),
            Just(json!(["IPv4", "IPv6"])),
            Just(json!(["IPv6", "IPv4"])),
        ];
        let ports = prop_oneof![
            Just(json!([{"name": "a", "port": 80, "targetPort": 8080}])),
            Just(json!([{"name": "a", "port": 80, "targetPort": "web"}])),
            Just(
                json!([{"name": "a", "port": 80, "targetPort": "web"}, {"name": "b", "port": 81, "targetPort": 8081}])
            ),
        ];
        let distribution = prop_oneof![Just(Value::Null), Just(json!("PreferSameZone")), Just(json!("PreferSameNode"))];
        (families, ports, distribution, prop::bool::weighted(0.2), prop_oneof![Just("None"), Just("10.96.0.5")])
            .prop_map(|(families, ports, distribution, publish, ip)| {
                web(json!({"ipFamilies": families, "ports": ports, "trafficDistribution": distribution,
                    "publishNotReadyAddresses": publish, "clusterIP": ip}))
            })
    }

    /// What somebody does to a slice, if there is one.
    fn any_tampering() -> impl Strategy<Value = (u8, usize)> {
        (0u8..7, any::<usize>())
    }

    fn tamper(slices: &mut Vec<Arc<EndpointSlice>>, (act, at): &(u8, usize)) {
        if slices.is_empty() {
            return;
        }
        let at = at % slices.len();
        let slice = Arc::make_mut(&mut slices[at]);
        let endpoints = slice.endpoints.get_or_insert_default();
        match act {
            0 => drop(slices.remove(at)),
            1 => drop(endpoints.pop()),
            2 => endpoints.extend(endpoints.first().cloned()),
            3 => endpoints.push(Endpoint { addresses: vec!["192.0.2.1".into()], ..Default::default() }),
            4 => drop(slice.metadata.labels.get_or_insert_default().insert("team".into(), "x".into())),
            5 => drop(slice.ports.take()),
            _ => {}
        }
    }

    fn wanted(service: &Service, pods: &[Arc<Pod>]) -> Vec<(String, String, Vec<String>, Option<bool>)> {
        let spec = service.spec.as_ref().unwrap();
        let publish = spec.publish_not_ready_addresses == Some(true);
        let mut all = Vec::new();
        for family in spec.ip_families.as_ref().unwrap() {
            for pod in pods {
                let (pod_spec, status) = (pod.spec.as_ref().unwrap(), pod.status.as_ref().unwrap());
                let known = pod_spec.node_name.as_deref() == Some("n1");
                if status.phase.as_deref() == Some("Failed") || !(known || publish) {
                    continue;
                }
                let colon = family == "IPv6";
                let Some(ip) = status.pod_ips.iter().flatten().find(|ip| ip.ip.contains(':') == colon) else {
                    continue;
                };
                let mut ports = Vec::new();
                for port in spec.ports.as_ref().unwrap() {
                    let number = match port.target_port.as_ref().unwrap() {
                        IntOrString::Int(number) => Some(*number),
                        IntOrString::String(_) => {
                            pod_spec.containers[0].ports.as_ref().and_then(|p| p.first()).map(|p| p.container_port)
                        }
                    };
                    ports.extend(number.map(|n| format!("{:?} {:?}", port.name.as_deref(), Some(n))));
                }
                let ready = status.conditions.as_ref().unwrap()[0].status == "True"
                    && pod.metadata.deletion_timestamp.is_none();
                all.push((family.clone(), ip.ip.clone(), ports, Some(ready || publish)));
            }
        }
        all.sort();
        all
    }
}
