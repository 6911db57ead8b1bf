//! Bad input gets the error or Warning event that Kubernetes users know, and what works goes on working.

use portolan_testkit::eventually;

use crate::{LIMIT, up};

#[test]
fn bad_manifests_are_refused_with_the_usual_words() {
    let c = up("bad");
    let service = |spec: &str| format!("{{apiVersion: v1, kind: Service, metadata: {{name: s}}, spec: {spec}}}");
    let table = [
        ("apiVersion: v1\nkind: [", "error", None),
        ("{apiVersion: v1, kind: Nothing, metadata: {name: a}}", "no matches for kind \"Nothing\"", None),
        (&service("{prots: []}"), "unknown field \"spec.prots\"", Some("(Service.spec): unknown field \"prots\"")),
        (&service("{ports: [{port: 99999}]}"), "must be between 1 and 65535, inclusive", None),
        (
            &service("{ports: [{port: many}]}"),
            "cannot unmarshal string into Go struct field ServicePort.spec.ports.port of type int32",
            Some("(Service.spec.ports[0].port): invalid type"),
        ),
        (&service("{ports: [{port: 80}, {port: 81}]}"), "spec.ports[0].name: Required value", None),
        (
            &service("{type: NodePort, ports: [{port: 80, nodePort: 80}]}"),
            "provided port is not in the valid range",
            None,
        ),
        (&service("{clusterIP: 10.1.2.3, ports: [{port: 80}]}"), "spec.clusterIPs", None),
        ("{apiVersion: v1, kind: ConfigMap, metadata: {name: Not_A_Name}}", "RFC 1123", None),
        (
            "{apiVersion: v1, kind: ConfigMap, metadata: {name: a, namespace: nowhere}}",
            "namespaces \"nowhere\" not found",
            None,
        ),
    ];
    // kubectl before 1.25 checks manifests itself, against the published schema, and says it in its own words.
    for (manifest, expected, by_kubectl) in table {
        let refused = c.apply(manifest);
        let said = [Some(expected), by_kubectl].into_iter().flatten().any(|text| refused.stderr.contains(text));
        assert!(refused.code != Some(0) && said, "expected {expected:?} or {by_kubectl:?}: {refused}");
    }
    c.kubectl("get nodes").has("Ready").unwrap();
}

#[test]
fn what_is_missing_shows_in_events_and_heals() {
    let c = up("missing");
    c.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: needs}
spec:
  containers:
  - name: a
    image: portolan.dev/echo
    env: [{name: A, valueFrom: {configMapKeyRef: {name: later, key: a}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: noimage}
spec: {containers: [{name: a, image: registry.example/none:1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: nowhere}
spec:
  nodeSelector: {disk: gold}
  containers: [{name: a, image: portolan.dev/echo}]
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {selector: {app: none}, ports: [{port: 80}]}
",
    )
    .ok();
    eventually("the missing ConfigMap is named", LIMIT, || {
        c.kubectl("describe pod needs").has("configmap \"later\" not found")
    });
    eventually("the missing image is explained", LIMIT, || {
        c.kubectl("describe pod noimage").has("portolan image import")
    });
    eventually("the waiting reason shows", LIMIT, || c.kubectl("get pod noimage").has("ErrImageNeverPull"));
    eventually("the scheduler explains", LIMIT, || {
        c.kubectl("describe pod nowhere")
            .has("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector")
    });
    let address = c.kubectl("get service empty -o jsonpath={.spec.clusterIP}").ok();
    eventually("a Service without endpoints refuses", LIMIT, || {
        let ran = c.exec("node/node-1", &["curl", "-sS", "--max-time", "3", &format!("http://{address}/")]);
        if ran.code == Some(7) { Ok(()) } else { Err(ran.to_string()) }
    });
    c.kubectl("create configmap later --from-literal=a=b").ok();
    c.kubectl("wait pod/needs --for=condition=Ready --timeout=60s").ok();
}

#[test]
fn a_load_balancer_without_addresses_says_why_and_recovers() {
    let c = up("pending");
    let service = |n: usize| {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: lb-{n}}}, spec: {{type: LoadBalancer, \
             selector: {{app: none}}, ports: [{{port: 80}}]}}}}\n"
        )
    };
    // The pool has fifteen usable addresses: one is the Ingress controller's, so one of these must wait.
    c.apply(&(0..15).map(service).collect::<String>()).ok();
    let pending = eventually("exactly one Service is pending", LIMIT, || {
        let list = c.kubectl("get services --no-headers").ok();
        let names: Vec<String> = list
            .lines()
            .filter(|l| l.contains("<pending>"))
            .filter_map(|l| l.split_whitespace().next().map(str::to_string))
            .collect();
        if names.len() == 1 { Ok(names[0].clone()) } else { Err(list) }
    });
    eventually("the event says why", LIMIT, || {
        c.kubectl(&format!("describe service {pending}")).has("no available IPs")
    });
    let other = if pending == "lb-0" { "lb-1" } else { "lb-0" };
    c.kubectl(&format!("delete service {other} --timeout=30s")).ok();
    eventually("the freed address is given to it", LIMIT, || {
        let ip = c.kubectl(&format!("get service {pending} -o jsonpath={{.status.loadBalancer.ingress[*].ip}}")).ok();
        if ip.is_empty() { Err("no address") } else { Ok(()) }
    });
}
