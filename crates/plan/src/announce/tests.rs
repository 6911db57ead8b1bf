use super::*;
use serde_json::{Value, json};

fn service(name: &str, spec: Value, annotations: Value) -> Service {
    let mut spec = spec;
    spec["type"] = json!("LoadBalancer");
    if spec["ports"].is_null() {
        spec["ports"] = json!([{"port": 80, "nodePort": 30080}]);
    }
    serde_json::from_value(
        json!({"metadata": {"namespace": "shop", "name": name, "annotations": annotations}, "spec": spec}),
    )
    .unwrap()
}

fn plain(name: &str) -> Service {
    service(name, json!({}), json!({}))
}

fn pools() -> Vec<Pool> {
    let mut reserved = Pool::new("reserved", vec!["192.0.2.0/28".parse().unwrap()]);
    reserved.auto_assign = false;
    vec![Pool::new("default", vec!["192.168.70.0/30".parse().unwrap()]), reserved]
}

fn allocate(a: &mut Allocator, service: &Service) -> String {
    match Request::parse(service).and_then(|r| a.allocate(&r)) {
        Ok(addresses) => addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","),
        Err(error) => error.to_string(),
    }
}

#[test]
fn addresses_are_given_out_in_order_and_run_out() {
    let mut a = Allocator::new(pools());
    assert_eq!(allocate(&mut a, &plain("a")), "192.168.70.1");
    assert_eq!(allocate(&mut a, &plain("b")), "192.168.70.2");
    assert_eq!(allocate(&mut a, &plain("a")), "192.168.70.1", "the same again");
    assert_eq!(allocate(&mut a, &plain("c")), "192.168.70.3");
    assert_eq!(allocate(&mut a, &plain("d")), "no available IPs");
    assert!(a.release("shop/b"));
    assert!(!a.release("shop/b"));
    assert_eq!(allocate(&mut a, &plain("d")), "192.168.70.2");
}

#[test]
fn an_address_in_the_status_is_kept_over_a_restart() {
    let mut a = Allocator::new(pools());
    let mut s = plain("a");
    s.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "192.168.70.3"}]}})).unwrap();
    assert_eq!(allocate(&mut a, &s), "192.168.70.3");
    s.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}})).unwrap();
    let mut a = Allocator::new(pools());
    assert_eq!(allocate(&mut a, &s), "192.168.70.1", "not of a pool");
}

#[test]
fn requested_addresses() {
    let ip = |ip: &str| service("a", json!({"loadBalancerIP": ip}), json!({}));
    let annotated = |value: &str| service("a", json!({}), json!({"metallb.io/loadBalancerIPs": value}));
    let rows = [
        (ip("192.168.70.3"), "192.168.70.3"),
        (ip("192.0.2.5"), "192.0.2.5"),
        (annotated(" 192.168.70.2 "), "192.168.70.2"),
        (ip("203.0.113.1"), "[\"203.0.113.1\"] is not allowed in config"),
        (annotated("nonsense"), "invalid requested loadbalancer IPs: \"nonsense\" is not an IP address"),
        (annotated("fd00::1"), "requested loadBalancer IP(s) \"fd00::1\" does not match the ipFamily of the service"),
        (
            service(
                "a",
                json!({"loadBalancerIP": "192.168.70.1"}),
                json!({"metallb.io/loadBalancerIPs": "192.168.70.1"}),
            ),
            "service can not have both metallb.io/loadBalancerIPs and svc.Spec.LoadBalancerIP",
        ),
        (service("a", json!({}), json!({"metallb.io/address-pool": "reserved"})), "192.0.2.1"),
        (service("a", json!({}), json!({"metallb.io/address-pool": "none"})), "unknown pool \"none\""),
    ];
    for (service, expected) in rows {
        assert_eq!(allocate(&mut Allocator::new(pools()), &service), expected);
    }
    let mut a = Allocator::new(pools());
    assert_eq!(allocate(&mut a, &plain("first")), "192.168.70.1");
    assert_eq!(allocate(&mut a, &ip("192.168.70.1")), "existing service does not allow sharing");
    assert_eq!(allocate(&mut a, &plain("a")), "192.168.70.2");
    assert_eq!(allocate(&mut a, &ip("192.168.70.3")), "192.168.70.3", "a changed request moves the Service");
    assert_eq!(allocate(&mut a, &plain("b")), "192.168.70.2", "and frees the old address");
}

#[test]
fn sharing_needs_one_key_and_different_ports() {
    let shared = |name: &str, port: u16, key: &str| {
        service(name, json!({"ports": [{"port": port}]}), json!({"metallb.io/allow-shared-ip": key}))
    };
    let mut a = Allocator::new(pools());
    assert_eq!(allocate(&mut a, &shared("a", 80, "k")), "192.168.70.1");
    assert_eq!(allocate(&mut a, &shared("b", 81, "k")), "192.168.70.1");
    assert_eq!(allocate(&mut a, &shared("c", 80, "k")), "192.168.70.2", "the port is taken, another address is free");
    let asking = |name: &str, port: u16, key: Value| {
        let mut s = service(name, json!({"ports": [{"port": port}], "loadBalancerIP": "192.168.70.1"}), json!({}));
        s.metadata.annotations = serde_json::from_value(key).unwrap();
        s
    };
    assert_eq!(allocate(&mut a, &asking("d", 82, json!({}))), "new service does not allow sharing");
    let other = json!({"metallb.io/allow-shared-ip": "x"});
    assert_eq!(
        allocate(&mut a, &asking("d", 82, other)),
        "sharing key \"x\" does not match existing sharing key \"k\""
    );
    let same = json!({"metallb.io/allow-shared-ip": "k"});
    assert_eq!(allocate(&mut a, &asking("d", 81, same)), "port tcp/81 is already in use on \"192.168.70.1\"");
}

#[test]
fn dual_stack_takes_what_there_is_unless_it_is_required() {
    let dual =
        |policy: &str| service("a", json!({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": policy}), json!({}));
    let mut a = Allocator::new(pools());
    assert_eq!(allocate(&mut a, &dual("PreferDualStack")), "192.168.70.1");
    assert_eq!(
        allocate(&mut a, &dual("RequireDualStack")),
        "Service requires dual stack but no available IPs of family IPv6"
    );
    let mut both = pools();
    both[0].networks.push("fd00:70::/126".parse().unwrap());
    assert_eq!(allocate(&mut Allocator::new(both), &dual("RequireDualStack")), "192.168.70.1,fd00:70::");
}

#[test]
fn annotations_without_effect_are_named() {
    let with = |name: &str, value: &str| {
        let found = ignored_annotations(&service("a", json!({}), json!({name: value})));
        found.first().map(Ignored::message).unwrap_or_default()
    };
    assert_eq!(with("service.beta.kubernetes.io/aws-load-balancer-type", "nlb"), "");
    assert_eq!(with("example.com/anything", "x"), "");
    assert_eq!(
        with("service.beta.kubernetes.io/aws-load-balancer-target-group-attributes", "preserve_client_ip.enabled=true"),
        ""
    );
    let cert = with("service.beta.kubernetes.io/aws-load-balancer-ssl-cert", "arn:x");
    assert!(cert.starts_with("annotation service.beta.kubernetes.io/aws-load-balancer-ssl-cert=arn:x is not supported by provider \"local\": TLS"), "{cert}");
    assert!(
        with("service.beta.kubernetes.io/aws-load-balancer-tipe", "nlb")
            .contains("did you mean service.beta.kubernetes.io/aws-load-balancer-type?")
    );
    assert!(
        with("aws-load-balancer-ssl-ports", "443")
            .contains("did you mean service.beta.kubernetes.io/aws-load-balancer-ssl-ports?")
    );
    assert!(!with("service.beta.kubernetes.io/azure-load-balancer-internal", "true").is_empty());
}

fn slice(name: &str, endpoints: Value) -> SliceTargets {
    slice_targets(
        &serde_json::from_value(json!({"metadata": {"namespace": "shop", "name": name,
        "labels": {"kubernetes.io/service-name": "a"}}, "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints}))
        .unwrap(),
    )
    .unwrap()
}

#[test]
fn targets_are_ready_endpoints_then_those_that_still_serve() {
    let vip: IpAddr = "192.168.70.1".parse().unwrap();
    let targets = |slices: &[SliceTargets]| {
        let slices: Vec<&SliceTargets> = slices.iter().collect();
        let found = listeners(&plain("a"), &slices, &[], &[vip]);
        found[0].targets.iter().map(|(a, p)| format!("{a}:{p}")).collect::<Vec<_>>().join(" ")
    };
    let leaving =
        json!({"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true}});
    let down = json!({"addresses": ["10.0.0.4"], "conditions": {"ready": false, "serving": false}});
    let ready = json!({"addresses": ["10.0.0.1"]});
    assert_eq!(targets(&[slice("1", json!([ready, leaving, down])), slice("2", json!([ready]))]), "10.0.0.1:8080");
    assert_eq!(targets(&[slice("1", json!([leaving, down]))]), "10.0.0.3:8080");
    assert_eq!(targets(&[slice("1", json!([down]))]), "");
}

#[test]
fn node_ports_are_targets_when_asked_for() {
    let vip: IpAddr = "192.168.70.1".parse().unwrap();
    let instance = json!({"service.beta.kubernetes.io/aws-load-balancer-nlb-target-type": "instance"});
    let nodes: Vec<NodeTarget> = [("n1", "192.168.50.11"), ("n2", "192.168.50.12")]
        .map(|(name, a)| NodeTarget { name: name.into(), addresses: vec![a.parse().unwrap()] })
        .into();
    let slice = slice("1", json!([{"addresses": ["10.0.0.1"], "nodeName": "n2"}]));
    let targets = |spec: Value, annotations: &Value| {
        let found = listeners(&service("a", spec, annotations.clone()), &[&slice], &nodes, &[vip]);
        found[0].targets.iter().map(|(a, p)| format!("{a}:{p}")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(targets(json!({}), &instance), "192.168.50.11:30080 192.168.50.12:30080");
    assert_eq!(targets(json!({"externalTrafficPolicy": "Local"}), &instance), "192.168.50.12:30080");
    assert_eq!(targets(json!({"externalTrafficPolicy": "Local"}), &json!({})), "10.0.0.1:8080");
    assert_eq!(targets(json!({"ports": [{"port": 80}]}), &instance), "10.0.0.1:8080", "no node port");
}

#[test]
fn source_ranges_come_from_the_field_first() {
    let ranges = |spec: Value, annotations: Value| {
        source_ranges(&service("a", spec, annotations))
            .map(|r| r.iter().map(IpNet::to_string).collect::<Vec<_>>().join(","))
    };
    let annotation = json!({"service.beta.kubernetes.io/load-balancer-source-ranges": "10.0.0.0/8, 192.0.2.1/32"});
    assert_eq!(ranges(json!({}), json!({})), None);
    assert_eq!(ranges(json!({}), annotation.clone()).as_deref(), Some("10.0.0.0/8,192.0.2.1/32"));
    assert_eq!(
        ranges(json!({"loadBalancerSourceRanges": ["198.51.100.0/24"]}), annotation).as_deref(),
        Some("198.51.100.0/24")
    );
}
