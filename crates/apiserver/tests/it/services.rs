//! Addresses and ports of Services through all that clients do to them.

use std::collections::BTreeSet;
use std::sync::Arc;

use portolan_apiserver::ServerConfig;
use serde_json::{Value, json};

use crate::support::{Fixture, LIMIT};

const SERVICES: &str = "/api/v1/namespaces/default/services";
const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";
const RANGES: &str = "/apis/networking.k8s.io/v1/servicecidrs";

fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

fn message(answer: &crate::support::Answer) -> &str {
    answer.body["message"].as_str().unwrap_or_default()
}

/// Makes sure that what the Services say and what is allocated is one and the same.
async fn check(f: &Fixture, context: &str) {
    let services = f.get("/api/v1/services").await.body;
    let mut ips = BTreeSet::new();
    let mut ports = BTreeSet::new();
    for item in services["items"].as_array().expect("items") {
        let spec = &item["spec"];
        ips.extend(
            spec["clusterIPs"].as_array().into_iter().flatten().filter(|ip| *ip != "None").map(Value::to_string),
        );
        ports.extend(spec["ports"].as_array().into_iter().flatten().filter_map(|port| port["nodePort"].as_u64()));
        ports.extend(spec["healthCheckNodePort"].as_u64());
    }
    let objects = f.get(ADDRESSES).await.body;
    let named: BTreeSet<String> =
        objects["items"].as_array().expect("items").iter().map(|o| o["metadata"]["name"].to_string()).collect();
    assert_eq!(named, ips, "{context}: IPAddress objects");
    // A dry run tells whether a port is free, without taking it.
    for port in 30000..30030u64 {
        let body = service("probe", json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": port}]}));
        let answer = f.post(&format!("{SERVICES}?dryRun=All"), &body).await;
        assert_eq!(answer.code == 422, ports.contains(&port), "{context}: port {port} of {ports:?}");
    }
}

async fn small_ports(ranges: &[&str]) -> Fixture {
    let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
    config.disable_admission_plugins = vec!["ServiceAccount".to_owned()];
    config.service_cidrs = ranges.iter().map(|range| range.parse().expect("a range")).collect();
    config.node_port_range = (30000, 30029);
    Fixture::with(config).await
}

/// Every way from one kind of Service to another: what is refused, and that nothing is lost or left behind.
#[tokio::test]
async fn every_type_turns_into_every_other() {
    let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]);
    let forms: [(&str, Value); 6] = [
        ("ClusterIP", json!({"type": "ClusterIP", "ports": ports, "selector": {"a": "b"}})),
        ("headless", json!({"type": "ClusterIP", "clusterIP": "None", "ports": ports, "selector": {"a": "b"}})),
        ("NodePort", json!({"type": "NodePort", "ports": ports, "selector": {"a": "b"}})),
        (
            "LoadBalancer",
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": ports, "selector": {"a": "b"}}),
        ),
        (
            "bare",
            json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": ports, "selector": {"a": "b"}}),
        ),
        ("ExternalName", json!({"type": "ExternalName", "externalName": "a.example", "ports": ports})),
    ];
    let f = small_ports(&["10.96.0.0/24", "fd00:10:96::/112"]).await;
    for (from, old) in &forms {
        for (to, new) in &forms {
            for dual in [false, true] {
                if dual && *from == "ExternalName" {
                    continue;
                }
                let context = format!("{from} to {to}, dual {dual}");
                let mut first = old.clone();
                if dual {
                    first["ipFamilyPolicy"] = json!("RequireDualStack");
                }
                let made = f.post(SERVICES, &service("s", first)).await;
                assert_eq!(made.code, 201, "{context}: {}", made.body);
                let now = f.put(&format!("{SERVICES}/s"), &service("s", new.clone())).await;
                let (was_headless, is_headless) = (*from == "headless", *to == "headless");
                let refused = match (*from, *to) {
                    (from, to) if from == to => None,
                    ("headless", "NodePort") => Some(
                        "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services",
                    ),
                    ("headless", "LoadBalancer" | "bare") => Some(
                        "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for LoadBalancer services",
                    ),
                    // A PUT that does not say "None" leaves it.
                    ("headless", _) | ("ExternalName", "headless") => None,
                    // The list is not derived from the single address when that has changed.
                    (_, "headless") => Some("first value must match `clusterIP`"),
                    _ => None,
                };
                match refused {
                    Some(text) => {
                        assert_eq!(now.code, 422, "{context}: {}", now.body);
                        assert!(message(&now).contains(text), "{context}: {}", message(&now));
                    }
                    None => {
                        assert_eq!(now.code, 200, "{context}: {}", now.body);
                        let (before, after) = (&made.body["spec"], &now.body["spec"]);
                        if *to == "ExternalName" {
                            for field in
                                ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"]
                            {
                                assert!(after.get(field).is_none(), "{context}: {field}");
                            }
                        } else if *from != "ExternalName" {
                            assert_eq!(before["clusterIPs"], after["clusterIPs"], "{context}");
                        }
                        if *to != "ExternalName" {
                            assert_eq!(was_headless || is_headless, after["clusterIP"] == "None", "{context}");
                        }
                        let node_ports = after["ports"].as_array().expect("ports").iter();
                        let numbers: Vec<u64> = node_ports.filter_map(|port| port["nodePort"].as_u64()).collect();
                        match *to {
                            "NodePort" | "LoadBalancer" => assert_eq!(numbers.len(), 2, "{context}"),
                            _ => assert!(numbers.is_empty(), "{context}"),
                        }
                        assert_eq!(after["healthCheckNodePort"].is_u64(), *to == "LoadBalancer", "{context}");
                    }
                }
                check(&f, &context).await;
                assert_eq!(f.delete(&format!("{SERVICES}/s")).await.code, 200, "{context}");
            }
        }
    }
    check(&f, "in the end").await;
}

/// Of many clients that want one thing exactly one gets it, whatever they do to get it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_clients_one_wins() {
    const CLIENTS: usize = 40;
    let f = Arc::new(small_ports(&["10.96.0.0/24"]).await);
    for i in 0..CLIENTS {
        let made = f.post(SERVICES, &service(&format!("old-{i}"), json!({"ports": [{"port": 80}]}))).await;
        assert_eq!(made.code, 201);
    }
    for round in 0..3u64 {
        let (port, ip) = (30001 + round, format!("10.96.0.{}", 3 + round));
        let tasks: Vec<_> = (0..CLIENTS)
            .map(|i| {
                let (f, ip) = (f.clone(), ip.clone());
                tokio::spawn(async move {
                    match i % 4 {
                        0 => {
                            let spec = json!({"clusterIP": ip, "ports": [{"port": 80}]});
                            ("ip", f.post(SERVICES, &service(&format!("ip-{round}-{i}"), spec)).await)
                        }
                        1 => {
                            let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
                            ("port", f.post(SERVICES, &service(&format!("port-{round}-{i}"), spec)).await)
                        }
                        2 => {
                            let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
                            ("port", f.merge(&format!("{SERVICES}/old-{i}"), &json!({ "spec": spec })).await)
                        }
                        _ => {
                            let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port});
                            let spec = json!({"spec": spec, "metadata": {}});
                            ("port", f.merge(&format!("{SERVICES}/old-{i}"), &spec).await)
                        }
                    }
                })
            })
            .collect();
        let mut won = BTreeSet::new();
        for task in tasks {
            let (what, answer) = task.await.expect("an answer");
            if answer.code < 300 {
                assert!(won.insert(what), "{what} was given twice");
            } else {
                assert!(
                    message(&answer).contains("already allocated") || message(&answer).contains("is full"),
                    "{}",
                    answer.body
                );
            }
        }
        assert_eq!(won.len(), 2, "somebody wins");
        check(&f, "after a race").await;
    }
    // A collection goes at once and leaves nothing.
    assert_eq!(f.delete(SERVICES).await.code, 200);
    let wait = async {
        while f.get(&format!("{SERVICES}/kubernetes")).await.code != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("the server's own Service is back");
    check(&f, "after deletecollection").await;
}

#[tokio::test]
async fn a_dry_run_takes_nothing_and_shows_stand_ins() {
    let f = small_ports(&["10.96.0.0/24"]).await;
    let dry = format!("{SERVICES}?dryRun=All");
    let ports =
        json!([{"name": "a", "port": 80}, {"name": "b", "port": 81, "nodePort": 30003}, {"name": "c", "port": 82}]);
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": ports});
    let shown = f.post(&dry, &service("a", spec)).await;
    assert_eq!(shown.code, 201, "{}", shown.body);
    let spec = &shown.body["spec"];
    let numbers: Vec<&Value> = spec["ports"].as_array().expect("ports").iter().map(|p| &p["nodePort"]).collect();
    // Counted from the highest number that the write has so far.
    assert_eq!(json!(numbers), json!([32769, 30003, 32770]));
    assert_eq!((&spec["clusterIP"], &spec["healthCheckNodePort"]), (&json!("10.96.0.0"), &json!(32771)));
    check(&f, "after a dry run").await;

    let ports = json!([{"name": "a", "port": 80, "nodePort": 30003}, {"name": "b", "port": 81}]);
    let shown = f.post(&dry, &service("a", json!({"type": "NodePort", "ports": ports}))).await;
    assert_eq!(shown.body["spec"]["ports"][1]["nodePort"], 30004);

    assert_eq!(f.post(SERVICES, &service("a", json!({"type": "NodePort", "ports": ports}))).await.code, 201);
    let path = format!("{SERVICES}/a?dryRun=All");
    for body in [
        json!({"spec": {"type": "ExternalName", "externalName": "a.example"}}),
        json!({"spec": {"type": "ClusterIP"}}),
        json!({"spec": {"ports": [{"name": "z", "port": 1, "nodePort": 30009}]}}),
    ] {
        assert_eq!(f.merge(&path, &body).await.code, 200);
        check(&f, "after a dry run").await;
    }
    assert_eq!(f.delete(&path).await.code, 200);
    check(&f, "after a dry run").await;
}

/// A cluster with two families: the policy, families and addresses that come out, in both orders.
#[tokio::test]
async fn dual_stack_comes_and_goes_in_both_orders() {
    let (v4, v6) = ("10.96.0.0/24", "fd00:10:96::/112");
    for ranges in [[v4, v6], [v6, v4]] {
        let f = small_ports(&ranges).await;
        let first = |family: &str| if family == "IPv4" { "10.96.0." } else { "fd00:10:96::" };
        let default = if ranges[0] == v4 { "IPv4" } else { "IPv6" };
        for families in [json!(null), json!(["IPv4"]), json!(["IPv6"])] {
            let made = f.post(SERVICES, &service("s", json!({"ipFamilies": families, "ports": [{"port": 80}]}))).await;
            let primary = families[0].as_str().unwrap_or(default);
            let other = if primary == "IPv4" { "IPv6" } else { "IPv4" };
            assert_eq!(made.body["spec"]["ipFamilies"], json!([primary]), "{}", made.body);
            let up = f.merge(&format!("{SERVICES}/s"), &json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}})).await;
            let spec = &up.body["spec"];
            assert_eq!(spec["ipFamilies"], json!([primary, other]));
            assert_eq!(spec["clusterIPs"][0], made.body["spec"]["clusterIP"]);
            for (i, family) in [primary, other].into_iter().enumerate() {
                assert!(spec["clusterIPs"][i].as_str().expect("an address").starts_with(first(family)), "{spec}");
            }
            check(&f, "upgraded").await;
            // Applying the manifest again changes nothing, whichever field it leaves out.
            for body in [
                json!({"ports": [{"port": 80}]}),
                json!({"ports": [{"port": 80}], "ipFamilyPolicy": "PreferDualStack"}),
                json!({"ports": [{"port": 80}], "ipFamilies": [primary, other]}),
                json!({"ports": [{"port": 80}], "clusterIP": spec["clusterIP"]}),
                json!({"ports": [{"port": 80}], "clusterIP": spec["clusterIP"], "clusterIPs": spec["clusterIPs"]}),
            ] {
                let again = f.put(&format!("{SERVICES}/s"), &service("s", body.clone())).await;
                assert_eq!(&again.body["spec"]["clusterIPs"], &spec["clusterIPs"], "{body}");
                assert_eq!(again.body["spec"]["ipFamilyPolicy"], "PreferDualStack", "{body}");
            }
            let down = f.merge(&format!("{SERVICES}/s"), &json!({"spec": {"ipFamilyPolicy": "SingleStack"}})).await;
            assert_eq!(down.body["spec"]["ipFamilies"], json!([primary]));
            assert_eq!(down.body["spec"]["clusterIPs"], json!([spec["clusterIP"]]));
            check(&f, "downgraded").await;
            assert_eq!(f.delete(&format!("{SERVICES}/s")).await.code, 200);
        }
    }
}

/// A PreferDualStack Service of a cluster that was single-stack stays as it is until somebody touches it.
#[tokio::test]
async fn a_cluster_becomes_dual_stack() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = |ranges: &[&str]| {
        let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
        config.disable_admission_plugins = vec!["ServiceAccount".to_owned()];
        config.data_dir = Some(dir.path().to_owned());
        config.service_cidrs = ranges.iter().map(|range| range.parse().expect("a range")).collect();
        config
    };
    let f = Fixture::with(config(&["10.96.0.0/24"])).await;
    let spec = json!({"ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 80}]});
    assert_eq!(f.post(SERVICES, &service("a", spec)).await.code, 201);
    let taken =
        f.post(SERVICES, &service("b", json!({"ports": [{"port": 80}]}))).await.body["spec"]["clusterIP"].clone();
    f.server.shutdown().await;

    let f = Fixture::with(config(&["10.96.0.0/24", "fd00:10:96::/112"])).await;
    let range = f.get(&format!("{RANGES}/kubernetes")).await.body;
    assert_eq!(range["spec"]["cidrs"], json!(["10.96.0.0/24", "fd00:10:96::/112"]));
    assert_eq!(range["status"]["conditions"][0]["status"], "True");
    let same = f.merge(&format!("{SERVICES}/a"), &json!({"metadata": {"labels": {"a": "b"}}})).await;
    assert_eq!(same.body["spec"]["ipFamilies"], json!(["IPv4"]));
    let up = f.merge(&format!("{SERVICES}/a"), &json!({"spec": {"ipFamilyPolicy": "RequireDualStack"}})).await;
    assert_eq!(up.body["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]), "{}", up.body);
    // What was given before the restart is still taken.
    let again = f.post(SERVICES, &service("c", json!({"clusterIP": taken, "ports": [{"port": 80}]}))).await;
    assert!(message(&again).ends_with("provided IP is already allocated"), "{}", again.body);
    f.server.shutdown().await;

    // Another range than the stored one: the stored one stays, and it is said so.
    let f = Fixture::with(config(&["10.97.0.0/24"])).await;
    let range = f.get(&format!("{RANGES}/kubernetes")).await.body;
    assert_eq!(range["spec"]["cidrs"], json!(["10.96.0.0/24", "fd00:10:96::/112"]));
    let events = f.get("/api/v1/namespaces/default/events").await.body;
    let event = events["items"]
        .as_array()
        .expect("items")
        .iter()
        .find(|event| event["reason"] == "KubernetesDefaultServiceCIDRInconsistent")
        .expect("an event");
    assert_eq!((&event["involvedObject"]["kind"], &event["type"]), (&json!("ServiceCIDR"), &json!("Warning")));
    f.server.shutdown().await;
}

#[tokio::test]
async fn ranges_come_and_go() {
    let f = small_ports(&["10.96.0.0/29"]).await;
    let range = |name: &str, cidr: &str| json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": [cidr]}});
    let ready = async |name: &str, status: &str| {
        let wait = async {
            loop {
                let object = f.get(&format!("{RANGES}/{name}")).await.body;
                if object["status"]["conditions"][0]["status"] == status {
                    return object;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.expect("the condition")
    };
    // Six addresses, one of which is the server's own.
    for i in 0..5 {
        assert_eq!(f.post(SERVICES, &service(&format!("s{i}"), json!({"ports": [{"port": 80}]}))).await.code, 201);
    }
    let full = f.post(SERVICES, &service("more", json!({"ports": [{"port": 80}]}))).await;
    assert_eq!(full.code, 500);
    assert_eq!(
        message(&full),
        "Internal error occurred: failed to allocate a serviceIP for Service \"more\": range is full"
    );

    assert_eq!(f.post(RANGES, &range("more", "10.97.0.0/28")).await.code, 201);
    let object = ready("more", "True").await;
    assert_eq!(object["metadata"]["finalizers"], json!(["networking.k8s.io/service-cidr-finalizer"]));
    assert_eq!(object["status"]["conditions"][0]["message"], "Kubernetes Service CIDR is ready");
    let made = f.post(SERVICES, &service("more", json!({"ports": [{"port": 80}]}))).await;
    assert!(made.body["spec"]["clusterIP"].as_str().expect("an address").starts_with("10.97.0."), "{}", made.body);

    // It cannot go while the address is in use, and gives no more.
    assert_eq!(f.delete(&format!("{RANGES}/more")).await.code, 200);
    let object = ready("more", "False").await;
    assert_eq!(object["status"]["conditions"][0]["reason"], "Terminating");
    let none = f.post(SERVICES, &service("x", json!({"clusterIP": "10.97.0.9", "ports": [{"port": 80}]}))).await;
    assert!(message(&none).ends_with("the provided network does not match the current range"), "{}", none.body);
    assert_eq!(f.delete(&format!("{SERVICES}/more")).await.code, 200);
    let gone = async {
        while f.get(&format!("{RANGES}/more")).await.code != 404 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("the range goes");

    // A larger one over it lets a range go whose addresses are in use.
    for (name, cidr) in [("inner", "10.98.0.0/28"), ("outer", "10.98.0.0/24")] {
        assert_eq!(f.post(RANGES, &range(name, cidr)).await.code, 201);
        ready(name, "True").await;
    }
    let held = f.post(SERVICES, &service("held", json!({"clusterIP": "10.98.0.3", "ports": [{"port": 80}]}))).await;
    assert_eq!(held.code, 201, "{}", held.body);
    assert_eq!(f.delete(&format!("{RANGES}/inner")).await.code, 200);
    let gone = async {
        while f.get(&format!("{RANGES}/inner")).await.code != 404 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("the inner range goes");
}

/// Messages, in the order in which they come, as clients know them.
#[tokio::test]
async fn faults_have_their_usual_texts() {
    let f = small_ports(&["10.96.0.0/24"]).await;
    let port = json!([{"port": 80}]);
    let rows: Vec<(&str, Value, &str)> = vec![
        (
            "policy_empty",
            json!({"ports": port, "ipFamilyPolicy": ""}),
            "spec.ipFamilyPolicy: Unsupported value: \"\": supported values: \"PreferDualStack\", \"RequireDualStack\", \"SingleStack\"",
        ),
        (
            "families_twice_unknown",
            json!({"ports": port, "ipFamilies": ["IPv5", "IPv5"]}),
            "[spec.ipFamilies[0]: Unsupported value: \"IPv5\": supported values: \"IPv4\", \"IPv6\", spec.ipFamilies[1]: Unsupported value: \"IPv5\": supported values: \"IPv4\", \"IPv6\", spec.ipFamilies[1]: Duplicate value: \"IPv5\"]",
        ),
        (
            "family_and_address_not_here",
            json!({"ports": port, "clusterIP": "fd00::5", "ipFamilies": ["IPv6"]}),
            "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
        ),
        (
            "two_addresses_one_not_here",
            json!({"ports": port, "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::5"]}),
            "[spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple cluster IPs are specified, spec.clusterIPs[1]: Invalid value: [\"10.96.0.9\",\"fd00::5\"]: IPv6 is not configured on this cluster]",
        ),
        (
            "policy_of_external_name",
            json!({"type": "ExternalName", "externalName": "a.example", "internalTrafficPolicy": "x"}),
            "spec.internalTrafficPolicy: Unsupported value: \"x\": supported values: \"Cluster\", \"Local\"",
        ),
        (
            "empty_internal_policy",
            json!({"ports": port, "internalTrafficPolicy": ""}),
            "spec.internalTrafficPolicy: Unsupported value: \"\": supported values: \"Cluster\", \"Local\"",
        ),
        (
            "empty_distribution",
            json!({"ports": port, "trafficDistribution": ""}),
            "spec.trafficDistribution: Unsupported value: \"\": supported values: \"PreferClose\", \"PreferSameZone\", \"PreferSameNode\"",
        ),
        (
            "range_shown_without_blanks",
            json!({"type": "LoadBalancer", "ports": port, "loadBalancerSourceRanges": [" 10.0.0.1/8 "]}),
            "spec.LoadBalancerSourceRanges[0]: Invalid value: \"10.0.0.1/8\": must not have bits set beyond the prefix length",
        ),
        (
            "health_check_port",
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": port, "healthCheckNodePort": 70000}),
            "failed to allocate requested HealthCheck NodePort 70000: provided port is not in the valid range. The range of valid ports is 30000-30029",
        ),
        (
            "external_name_address",
            json!({"type": "ExternalName", "ports": port, "externalName": "a..b"}),
            "spec.externalName: Invalid value: \"a..b\": a lowercase RFC 1123 subdomain must consist of",
        ),
    ];
    for (name, spec, text) in rows {
        let answer = f.post(SERVICES, &service("a", spec)).await;
        assert!(answer.code >= 400, "{name}: {}", answer.body);
        assert!(message(&answer).contains(text), "{name}:\n{}\n{text}", message(&answer));
    }
    let annotated = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a",
        "annotations": {"service.beta.kubernetes.io/load-balancer-source-ranges": "10.0.0.0/8, 10.0.0.01/32"}},
        "spec": {"type": "LoadBalancer", "ports": port}});
    let answer = f.post(SERVICES, &annotated).await;
    assert!(
        message(&answer).ends_with("\"10.0.0.01/32\": must not have leading 0s in IP or prefix length"),
        "{}",
        answer.body
    );
    check(&f, "after refusals").await;
    // Every number is taken.
    for i in 0..30 {
        let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30000 + i}]});
        assert_eq!(f.post(SERVICES, &service(&format!("p{i}"), spec)).await.code, 201);
    }
    let spec = json!({"type": "NodePort", "ports": port});
    assert_eq!(
        message(&f.post(SERVICES, &service("a", spec)).await),
        "Internal error occurred: failed to allocate a nodePort: range is full"
    );
    let spec = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "externalTrafficPolicy": "Local", "ports": port});
    assert_eq!(
        message(&f.post(SERVICES, &service("a", spec)).await),
        "Internal error occurred: failed to allocate a HealthCheck NodePort 0: range is full"
    );
}

#[tokio::test]
async fn faults_of_changes_have_their_usual_texts() {
    let f = small_ports(&["10.96.0.0/24", "fd00:10:96::/112"]).await;
    let port = json!([{"port": 80}]);
    assert_eq!(f.post(SERVICES, &service("a", json!({"clusterIP": "10.96.0.9", "ports": port}))).await.code, 201);
    assert_eq!(f.post(SERVICES, &service("b", json!({"type": "NodePort", "ports": port}))).await.code, 201);
    assert_eq!(f.post(SERVICES, &service("l", json!({"type": "LoadBalancer", "ports": port}))).await.code, 201);
    let put = |name: &'static str, spec: Value| (name, service(name, spec));
    let rows: Vec<((&str, Value), &str, usize)> = vec![
        // The list is not derived from a changed single address when it is left out.
        (
            put("a", json!({"clusterIP": "10.96.0.8", "ports": port})),
            "spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: first value must match `clusterIP`",
            1,
        ),
        (
            put("a", json!({"clusterIP": "10.96.0.8", "clusterIPs": ["10.96.0.8"], "ports": port})),
            "spec.clusterIPs[0]: Invalid value: [\"10.96.0.8\"]: may not change once set",
            1,
        ),
        (
            put("a", json!({"clusterIPs": ["10.96.0.8"], "ports": port})),
            "spec.clusterIPs: Invalid value: [\"10.96.0.8\"]: first value must match `clusterIP`",
            1,
        ),
        (
            put("a", json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": port})),
            "spec.clusterIPs[0]: Invalid value: [\"None\"]: may not change once set",
            1,
        ),
        // The class is judged twice in an update: two causes, one message.
        (
            put("b", json!({"type": "NodePort", "loadBalancerClass": "a.example/b", "ports": port})),
            "spec.loadBalancerClass: Forbidden: may only be used when `type` is 'LoadBalancer'",
            2,
        ),
        (
            put("l", json!({"type": "LoadBalancer", "loadBalancerClass": "a b", "ports": port})),
            "[spec.loadBalancerClass: Invalid value: \"a b\": may not change once set, spec.loadBalancerClass: Invalid value: \"a b\": name part must consist of",
            3,
        ),
        (
            put("l", json!({"type": "NodePort", "healthCheckNodePort": 30004, "ports": port})),
            "spec.healthCheckNodePort: Invalid value: 30004: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
            1,
        ),
    ];
    for ((name, body), text, causes) in rows {
        let answer = f.put(&format!("{SERVICES}/{name}"), &body).await;
        assert_eq!(answer.code, 422, "{body}: {}", answer.body);
        assert!(message(&answer).contains(text), "{}\n{text}", message(&answer));
        assert_eq!(answer.body["details"]["causes"].as_array().map(Vec::len), Some(causes), "{}", answer.body);
    }
    check(&f, "after refusals").await;
    // The whole manifest with the address, without the list: all goes.
    let named =
        put("a", json!({"type": "ExternalName", "externalName": "a.example", "clusterIP": "10.96.0.9", "ports": port}));
    let answer = f.put(&format!("{SERVICES}/a"), &named.1).await;
    assert_eq!((answer.code, answer.body["spec"].get("clusterIP")), (200, None), "{}", answer.body);
    check(&f, "after the change").await;
}

#[tokio::test]
async fn warnings_say_what_is_ignored_or_old() {
    let f = small_ports(&["10.96.0.0/24", "fd00:10:96::/112"]).await;
    let port = json!([{"port": 80}]);
    let rows: Vec<(&str, Value, &[&str])> = vec![
        ("nothing", json!({"ports": port}), &[]),
        (
            "headless",
            json!({"clusterIP": "None", "ports": port, "sessionAffinity": "ClientIP", "externalIPs": ["2001:DB8::1"],
                "loadBalancerIP": "192.0.2.01", "externalName": "a.example", "trafficDistribution": "PreferClose"}),
            &[
                "spec.loadBalancerIP is ignored for headless services",
                "spec.externalIPs is ignored for headless services",
                "spec.SessionAffinity is ignored for headless services",
                "spec.externalIPs[0]: IPv6 address \"2001:DB8::1\" should be in RFC 5952 canonical format (\"2001:db8::1\")",
                "spec.loadBalancerIP: non-standard IP address \"192.0.2.01\" will be considered invalid in a future Kubernetes release: use \"192.0.2.1\"",
                "spec.externalName is ignored when spec.type is not \"ExternalName\"",
                "spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"",
            ],
        ),
        (
            "addresses_in_use",
            json!({"clusterIP": "fd00:10:96:0::5", "ports": port, "externalIPs": ["198.51.100.1"]}),
            &[
                "spec.clusterIPs[0]: IPv6 address \"fd00:10:96:0::5\" should be in RFC 5952 canonical format (\"fd00:10:96::5\")",
                "spec.externalIPs is deprecated and may no longer be implemented in some clusters",
            ],
        ),
    ];
    let text = |warning: &str| {
        let quoted = warning.strip_prefix("299 - \"").and_then(|w| w.strip_suffix('"')).unwrap_or(warning);
        quoted.replace("\\\"", "\"")
    };
    for (name, spec, wanted) in rows {
        let answer = f.post(SERVICES, &service("a", spec)).await;
        assert_eq!(answer.code, 201, "{name}: {}", answer.body);
        let warnings: Vec<String> = answer.warnings.iter().map(|w| text(w)).collect();
        assert_eq!(warnings, wanted, "{name}");
        // A write of the status has nothing to say about the spec.
        let status = f.merge(&format!("{SERVICES}/a/status"), &json!({"metadata": {"labels": {"a": "b"}}})).await;
        assert_eq!((status.code, status.warnings.len()), (200, 0), "{name}");
        assert_eq!(f.delete(&format!("{SERVICES}/a")).await.code, 200);
    }
    let spec = json!({"type": "LoadBalancer", "ports": port});
    assert_eq!(f.post(SERVICES, &service("a", spec)).await.code, 201);
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "2001:DB8::1"}]}}});
    let answer = f.merge(&format!("{SERVICES}/a/status"), &status).await;
    assert_eq!(
        answer.warnings.iter().map(|w| text(w)).collect::<Vec<_>>(),
        [
            "status.loadBalancer.ingress[0]: IPv6 address \"2001:DB8::1\" should be in RFC 5952 canonical format (\"2001:db8::1\")"
        ]
    );
}

#[tokio::test]
async fn slices_made_by_hand_are_checked() {
    let f = small_ports(&["10.96.0.0/24"]).await;
    let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    let slice = |type_: &str, addresses: Value, more: Value| {
        let mut body = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "a"},
            "addressType": type_, "endpoints": [{"addresses": addresses}]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        body
    };
    let none = json!({});
    let endpoints = |n: usize| json!({"endpoints": vec![json!({"addresses": ["192.0.2.1"]}); n]});
    let addresses = |n: usize| json!(vec!["192.0.2.1"; n]);
    let rows = [
        (
            "malformed",
            slice("IPv4", json!(["192.0.2.300"]), none.clone()),
            "endpoints[0].addresses[0]: Invalid value: \"192.0.2.300\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        ),
        (
            "loopback",
            slice("IPv4", json!(["127.0.0.1"]), none.clone()),
            "endpoints[0].addresses[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)",
        ),
        (
            "a_name",
            slice("IPv4", json!(["a.example"]), none.clone()),
            "endpoints[0].addresses[0]: Invalid value: \"a.example\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        ),
        (
            "wrong_family",
            slice("IPv6", json!(["192.0.2.1"]), none.clone()),
            "endpoints[0].addresses: Invalid value: \"192.0.2.1\": must be an IPv6 address",
        ),
        (
            "one_label",
            slice("FQDN", json!(["localhost"]), none.clone()),
            "endpoints[0].addresses[0]: Invalid value: \"localhost\": should be a domain with at least two segments separated by dots",
        ),
        ("no_name", slice("FQDN", json!([""]), none.clone()), "endpoints[0].addresses[0]: Required value"),
        (
            "long_label",
            slice("FQDN", json!([format!("{}.example", "a".repeat(64))]), none.clone()),
            "must be no more than 63",
        ),
        (
            "too_many",
            slice("IPv4", json!([]), endpoints(1001)),
            "endpoints: Too many: 1001: must have at most 1000 items",
        ),
        (
            "too_many_addresses",
            slice("IPv4", addresses(101), none.clone()),
            "endpoints[0].addresses: Too many: 101: must have at most 100 items",
        ),
        (
            "type_and_port",
            slice("ipv4", json!(["x"]), json!({"ports": [{"name": "A"}]})),
            "[addressType: Unsupported value: \"ipv4\": supported values: \"FQDN\", \"IPv4\", \"IPv6\", ports[0].name: Invalid value: \"A\"",
        ),
        (
            "no_type",
            slice("", json!(["x"]), json!({"ports": [{"protocol": "ICMP"}]})),
            "[addressType: Required value, ports[0].protocol: Unsupported value: \"ICMP\": supported values: \"SCTP\", \"TCP\", \"UDP\"]",
        ),
    ];
    for (name, body, text) in rows {
        let answer = f.post(path, &body).await;
        assert_eq!(answer.code, 422, "{name}: {}", answer.body);
        assert!(message(&answer).contains(text), "{name}:\n{}\n{text}", message(&answer));
    }
    assert_eq!(f.post(path, &slice("IPv4", json!([]), endpoints(1000))).await.code, 201);
    let moved = f.put(&format!("{path}/a"), &slice("IPv6", json!(["192.0.2.7"]), none.clone())).await;
    assert!(message(&moved).ends_with(
        "[endpoints[0].addresses: Invalid value: \"192.0.2.7\": must be an IPv6 address, addressType: Invalid value: \"IPv6\": field is immutable]"
    ), "{}", message(&moved));
    let mut dotted = slice("FQDN", json!(["a.example."]), none);
    dotted["metadata"]["name"] = json!("b");
    dotted["endpoints"][0]["deprecatedTopology"] = json!({"a": "b"});
    let dotted = f.post(path, &dotted).await;
    assert_eq!((dotted.code, dotted.body["endpoints"][0].get("deprecatedTopology")), (201, None), "{}", dotted.body);
}
