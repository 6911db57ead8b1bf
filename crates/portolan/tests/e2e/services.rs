//! Services as users of Kubernetes know them: what its own end-to-end tests of Services assert, asked of a whole cluster.
//!
//! One cluster, one namespace and thread per subject, so that they share the cost of a cluster and the waiting.

use std::collections::BTreeSet;

use portolan_testkit::{Cluster, eventually};
use serde_json::Value;

use crate::{LIMIT, up};

/// A namespace of the shared cluster.
struct Space<'a> {
    c: &'a Cluster,
    ns: &'static str,
}

impl Space<'_> {
    fn kubectl(&self, words: &str) -> portolan_testkit::Ran {
        self.c.kubectl(&format!("-n {} {words}", self.ns))
    }

    fn apply(&self, manifests: &str) {
        self.c.kubectl_stdin(&["-n", self.ns, "apply", "-f", "-"], &format!("---\n{}", manifests.trim_start())).ok();
    }

    fn get(&self, object: &str, path: &str) -> String {
        self.c.kubectl_args(["-n", self.ns, "get", object, "-o", &format!("jsonpath={path}")]).ok()
    }

    fn patch(&self, object: &str, patch: &str) {
        self.c.kubectl_args(["-n", self.ns, "patch", object, "--type=merge", "-p", patch]).ok();
    }

    /// Echo servers, each a line of `name node label further-spec`; waits until they are ready.
    fn servers(&self, lines: &[(&str, &str, &str, &str)]) {
        let mut manifests = String::new();
        for (name, node, label, spec) in lines {
            manifests.push_str(&format!(
                "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{app: {label}}}}}, spec: {{nodeName: {node}, \
                 terminationGracePeriodSeconds: 1, {spec} containers: [{{name: a, image: portolan.dev/echo, \
                 args: ['--port=8080', '--udp-port=8081'], ports: [{{name: http, containerPort: 8080}}]}}]}}}}\n"
            ));
        }
        self.apply(&manifests);
        let names: Vec<&str> = lines.iter().map(|line| line.0).collect();
        self.kubectl(&format!("wait pod {} --for=condition=Ready --timeout=60s", names.join(" "))).ok();
    }

    fn pod(&self, name: &str) -> String {
        format!("pod/{}/{name}", self.ns)
    }

    /// Asks once, over a new connection.
    fn ask(&self, place: &str, address: &str) -> Result<Value, String> {
        let url = format!("http://{address}/");
        let ran = self.c.exec(place, &["curl", "-gsS", "--connect-timeout", "3", "--max-time", "10", &url]);
        if ran.code != Some(0) {
            return Err(ran.to_string());
        }
        serde_json::from_str(&ran.stdout).map_err(|error| format!("{error}: {ran}"))
    }

    fn who(&self, place: &str, address: &str) -> Result<String, String> {
        self.ask(place, address).map(|answer| answer["pod"].as_str().unwrap_or_default().to_string())
    }

    /// Waits until all of `pods` have answered and, from then on, nobody else does.
    fn served_by(&self, place: &str, address: &str, pods: &[&str]) {
        let expected: BTreeSet<String> = pods.iter().map(|p| p.to_string()).collect();
        eventually(&format!("{place} reaches {address} at {pods:?}"), LIMIT, || {
            let mut seen = BTreeSet::new();
            for _ in 0..if pods.len() == 1 { 6 } else { 40 } {
                seen.insert(self.who(place, address)?);
            }
            if seen == expected { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }

    /// Waits until connections fail; `code` is curl's: 7 is refused, 28 is silence.
    fn fails(&self, place: &str, address: &str, code: i32) {
        let url = format!("http://{address}/");
        eventually(&format!("{place} fails to reach {address} with code {code}"), LIMIT, || {
            let ran = self.c.exec(place, &["curl", "-gsS", "--connect-timeout", "2", "--max-time", "10", &url]);
            if ran.code == Some(code) { Ok(()) } else { Err(ran.to_string()) }
        });
    }

    fn cluster_ip(&self, service: &str) -> String {
        self.get(&format!("service/{service}"), "{.spec.clusterIP}")
    }

    fn node_port(&self, service: &str) -> String {
        self.get(&format!("service/{service}"), "{.spec.ports[0].nodePort}")
    }
}

const NODE_1: &str = "192.168.50.11";
const NODE_2: &str = "192.168.50.12";

#[test]
fn services_do_what_kubernetes_expects_of_them() {
    let c = up("services");
    type Subject = (&'static str, fn(&Space));
    let subjects: &[Subject] = &[
        ("ports", ports_follow_pods),
        ("types", types_change),
        ("refusals", node_ports_are_nobody_elses),
        ("labels", labelled_services_are_left_alone),
        ("affinity", affinity_can_be_switched),
        ("unready", unready_pods_can_be_published),
        ("local", local_policies_keep_to_the_node),
        ("ending", terminating_pods_are_the_last_resort),
        ("host", host_networks_and_host_ports),
        ("nearby", traffic_stays_nearby),
        ("handmade", endpoints_made_by_hand),
        ("proxy", the_api_server_proxies),
        ("evicted", evicted_pods_are_no_endpoints),
    ];
    std::thread::scope(|scope| {
        let running: Vec<_> = subjects
            .iter()
            .map(|(ns, subject)| {
                let space = Space { c: &c, ns };
                std::thread::Builder::new()
                    .name((*ns).to_string())
                    .spawn_scoped(scope, move || {
                        space.c.kubectl(&format!("create namespace {ns}")).ok();
                        subject(&space);
                    })
                    .unwrap()
            })
            .collect();
        let failed: Vec<&str> =
            running.into_iter().zip(subjects).filter_map(|(r, s)| r.join().is_err().then_some(s.0)).collect();
        assert!(failed.is_empty(), "failed: {failed:?}");
    });
}

fn ports_follow_pods(s: &Space) {
    s.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: a, port: 80, targetPort: http}]}}",
    );
    s.servers(&[("web", "node-1", "web", ""), ("far", "node-2", "client", "")]);
    let ip = s.cluster_ip("web");
    s.served_by(&s.pod("far"), &format!("{ip}:80"), &["web"]);
    s.served_by(&s.pod("far"), "web:80", &["web"]);
    s.served_by(&s.pod("far"), "web.ports.svc.cluster.local:80", &["web"]);
    // The client's own address is kept across nodes, and a pod reaches itself under another.
    for name in ["far", "web"] {
        let own = s.get(&format!("pod/{name}"), "{.status.podIP}");
        let peer = s.ask(&s.pod(name), &format!("{ip}:80")).unwrap()["peer"].as_str().unwrap().to_string();
        assert_eq!(peer.starts_with(&format!("{own}:")), name == "far", "{name} at {own} is seen as {peer}");
    }
    s.patch(
        "service/web",
        r#"{"spec":{"ports":[{"name":"a","port":80,"targetPort":"http"},{"name":"b","port":81,"targetPort":8080}]}}"#,
    );
    s.served_by(&s.pod("far"), &format!("{ip}:81"), &["web"]);
    s.patch("service/web", r#"{"spec":{"ports":[{"name":"b","port":81,"targetPort":8080}]}}"#);
    s.fails(&s.pod("far"), &format!("{ip}:80"), 7);
    s.servers(&[("more", "node-2", "web", "")]);
    s.served_by(&s.pod("far"), &format!("{ip}:81"), &["web", "more"]);
    s.kubectl("delete pod web more --timeout=60s").ok();
    for place in [s.pod("far"), "node/node-1".to_string()] {
        s.fails(&place, &format!("{ip}:81"), 7);
    }
    // Recreated under the same name it works again.
    s.kubectl("delete service web").ok();
    s.servers(&[("web", "node-2", "web", "")]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, externalIPs: [203.0.113.250], ports: [{port: 80, targetPort: 8080}]}}");
    s.served_by(&s.pod("far"), "web:80", &["web"]);
    s.served_by(&s.pod("far"), "203.0.113.250:80", &["web"]);
}

fn types_change(s: &Space) {
    s.servers(&[("web", "node-1", "web", ""), ("client", "node-2", "client", "")]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {type: ExternalName, externalName: other.example.com}}");
    assert_eq!(s.cluster_ip("s"), "");
    s.patch(
        "service/s",
        r#"{"spec":{"type":"NodePort","externalName":null,"selector":{"app":"web"},"ports":[{"port":80,"targetPort":8080}]}}"#,
    );
    let (ip, port) = (s.cluster_ip("s"), s.node_port("s"));
    s.served_by(&s.pod("client"), &format!("{ip}:80"), &["web"]);
    for node in [NODE_1, NODE_2] {
        s.served_by(&s.pod("client"), &format!("{node}:{port}"), &["web"]);
        s.served_by("outside", &format!("{node}:{port}"), &["web"]);
    }
    s.patch("service/s", r#"{"spec":{"type":"ClusterIP"}}"#);
    assert_eq!((s.cluster_ip("s"), s.node_port("s")), (ip.clone(), String::new()));
    s.fails("outside", &format!("{NODE_1}:{port}"), 7);
    s.served_by(&s.pod("client"), "s:80", &["web"]);
    // To TCP and UDP under one number.
    s.patch(
        "service/s",
        r#"{"spec":{"type":"NodePort","ports":[{"name":"t","port":80,"targetPort":8080},{"name":"u","port":80,"protocol":"UDP","targetPort":8081}]}}"#,
    );
    assert_eq!(s.get("service/s", "{.spec.ports[*].protocol}"), "TCP UDP");
    s.patch("service/s", r#"{"spec":{"type":"ExternalName","externalName":"kubernetes.default.svc.cluster.local"}}"#);
    assert_eq!(s.cluster_ip("s"), "");
    eventually("the name leads elsewhere", LIMIT, || {
        s.c.exec(&s.pod("client"), &["dig", "+short", "+time=2", "s.types.svc.cluster.local"])
            .has("kubernetes.default.svc.cluster.local.\n10.96.0.1")
    });
}

fn node_ports_are_nobody_elses(s: &Space) {
    let service = |name: &str, port: &str| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{type: NodePort, ports: [{{port: 80, nodePort: {port}}}]}}}}"
        )
    };
    let create = |name: &str, port: &str| s.c.kubectl_stdin(&["-n", s.ns, "create", "-f", "-"], &service(name, port));
    create("one", "0").ok();
    let port = s.node_port("one");
    let refused = create("two", &port).failed();
    assert!(refused.contains(&format!("Invalid value: {port}: provided port is already allocated")), "{refused}");
    s.kubectl("delete service one").ok();
    create("two", &port).ok();
    let refused = create("three", "40000").failed();
    let range =
        "Invalid value: 40000: provided port is not in the valid range. The range of valid ports is 30000-32767";
    assert!(refused.contains(range), "{refused}");
    let refused = s.c.kubectl_args([
        "-n",
        s.ns,
        "patch",
        "service/two",
        "-p",
        r#"{"spec":{"ports":[{"port":80,"nodePort":40000}]}}"#,
    ]);
    assert!(refused.failed().contains(range));
    s.kubectl("label service two tier=x").ok();
    create("kept", "0").ok();
    s.c.kubectl_args(["-n", s.ns, "delete", "service", "-l", "tier=x"]).ok();
    assert_eq!(s.kubectl("get service -o name").ok(), "service/kept\n");
}

fn labelled_services_are_left_alone(s: &Space) {
    s.servers(&[("web", "node-1", "web", ""), ("client", "node-2", "client", "")]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}");
    let address = format!("{}:80", s.cluster_ip("web"));
    s.served_by(&s.pod("client"), &address, &["web"]);
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        s.kubectl(&format!("label service web {label}=other")).ok();
        // An address of nobody: packets to it are dropped.
        s.fails(&s.pod("client"), &address, 28);
        s.kubectl(&format!("label service web {label}-")).ok();
        s.served_by(&s.pod("client"), &address, &["web"]);
    }
}

fn affinity_can_be_switched(s: &Space) {
    s.servers(&[
        ("a", "node-1", "web", ""),
        ("b", "node-2", "web", ""),
        ("c", "node-2", "web", ""),
        ("client", "node-1", "client", ""),
    ]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {type: NodePort, sessionAffinity: ClientIP, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}");
    let addresses = [format!("{}:80", s.cluster_ip("web")), format!("{NODE_2}:{}", s.node_port("web"))];
    let sticky = |address: &String| {
        eventually(&format!("{address} sticks"), LIMIT, || {
            let first = s.who(&s.pod("client"), address)?;
            for _ in 0..20 {
                let next = s.who(&s.pod("client"), address)?;
                if next != first {
                    return Err(format!("{first}, then {next}"));
                }
            }
            Ok(())
        });
    };
    addresses.iter().for_each(sticky);
    s.patch("service/web", r#"{"spec":{"sessionAffinity":"None"}}"#);
    for address in &addresses {
        s.served_by(&s.pod("client"), address, &["a", "b", "c"]);
    }
    s.patch("service/web", r#"{"spec":{"sessionAffinity":"ClientIP"}}"#);
    addresses.iter().for_each(sticky);
}

fn unready_pods_can_be_published(s: &Space) {
    s.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: never, labels: {app: never}}
spec:
  terminationGracePeriodSeconds: 600
  containers:
  - name: a
    image: portolan.dev/toolbox
    command: [python3, -m, http.server, '8080']
    readinessProbe: {exec: {command: ['false']}}
    lifecycle: {preStop: {exec: {command: [sleep, '600']}}}
",
    );
    s.servers(&[("client", "node-2", "client", "")]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: never}, spec: {publishNotReadyAddresses: true, selector: {app: never}, ports: [{port: 80, targetPort: 8080}]}}");
    let reached = |name: &str| {
        eventually(name, LIMIT, || {
            let ran =
                s.c.exec(&s.pod("client"), &["curl", "-sS", "-o", "/dev/null", "--max-time", "5", "http://never:80/"]);
            if ran.code == Some(0) { Ok(()) } else { Err(ran.to_string()) }
        });
    };
    reached("an unready pod is reached");
    s.kubectl("delete pod never --wait=false").ok();
    reached("a terminating and unready pod is reached");
    s.patch("service/never", r#"{"spec":{"publishNotReadyAddresses":false}}"#);
    s.fails(&s.pod("client"), "never:80", 7);
    s.patch("service/never", r#"{"spec":{"publishNotReadyAddresses":true}}"#);
    reached("it is published again");
    s.kubectl("delete pod never --grace-period=0 --force").ok();
    s.fails(&s.pod("client"), "never:80", 7);
}

/// Waits until a health check node port of a node says `code`; `000` is no answer.
fn health(s: &Space, node: &str, port: &str, code: &str) {
    let url = format!("http://{node}:{port}/");
    eventually(&format!("{url} says {code}"), LIMIT, || {
        let ran =
            s.c.exec("outside", &["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "5", &url]);
        if ran.stdout == code { Ok(()) } else { Err(ran.to_string()) }
    });
}

fn local_policies_keep_to_the_node(s: &Space) {
    s.servers(&[("web", "node-1", "web", ""), ("near", "node-1", "client", ""), ("far", "node-2", "client", "")]);
    s.apply("
{apiVersion: v1, kind: Service, metadata: {name: inner}, spec: {internalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: outer}, spec: {type: LoadBalancer, loadBalancerClass: example.com/none, externalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}
");
    let inner = format!("{}:80", s.cluster_ip("inner"));
    for place in [s.pod("near"), "node/node-1".to_string()] {
        s.served_by(&place, &inner, &["web"]);
    }
    s.fails(&s.pod("far"), &inner, 28);
    s.fails("node/node-2", &inner, 28);

    let port = s.node_port("outer");
    let check = s.get("service/outer", "{.spec.healthCheckNodePort}");
    let local = || {
        s.served_by("outside", &format!("{NODE_1}:{port}"), &["web"]);
        s.fails("outside", &format!("{NODE_2}:{port}"), 28);
        // Clients within the cluster get as far as through a load balancer.
        s.served_by(&s.pod("far"), &format!("{NODE_2}:{port}"), &["web"]);
        s.served_by("node/node-2", &format!("{NODE_2}:{port}"), &["web"]);
        let peer = s.ask("node/node-2", &format!("{NODE_1}:{port}")).unwrap()["peer"].as_str().unwrap().to_string();
        assert!(peer.starts_with(&format!("{NODE_2}:")), "{peer}");
        health(s, NODE_1, &check, "200");
        health(s, NODE_2, &check, "503");
    };
    local();
    s.patch("service/outer", r#"{"spec":{"externalTrafficPolicy":"Cluster","healthCheckNodePort":null}}"#);
    assert_eq!(s.get("service/outer", "{.spec.healthCheckNodePort}"), "");
    for node in [NODE_1, NODE_2] {
        s.served_by("outside", &format!("{node}:{port}"), &["web"]);
        health(s, node, &check, "000");
    }
    s.patch(
        "service/outer",
        &format!(r#"{{"spec":{{"externalTrafficPolicy":"Local","healthCheckNodePort":{check}}}}}"#),
    );
    local();
}

fn terminating_pods_are_the_last_resort(s: &Space) {
    s.apply("
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 600
  containers:
  - name: a
    image: portolan.dev/echo
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    lifecycle: {preStop: {sleep: {seconds: 500}}}
---
{apiVersion: v1, kind: Service, metadata: {name: all}, spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: local}, spec: {type: LoadBalancer, loadBalancerClass: example.com/none, externalTrafficPolicy: Local, internalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}
");
    s.kubectl("wait pod web --for=condition=Ready --timeout=60s").ok();
    s.servers(&[("near", "node-1", "client", ""), ("far", "node-2", "client", "")]);
    let check = s.get("service/local", "{.spec.healthCheckNodePort}");
    health(s, NODE_1, &check, "200");
    s.kubectl("delete pod web --wait=false").ok();
    // Load balancers are told to go elsewhere while new connections still are served.
    health(s, NODE_1, &check, "503");
    let (all, local) = (format!("{}:80", s.cluster_ip("all")), format!("{}:80", s.cluster_ip("local")));
    for place in [s.pod("near"), s.pod("far")] {
        s.served_by(&place, &all, &["web"]);
        s.served_by(&place, &format!("{NODE_2}:{}", s.node_port("all")), &["web"]);
    }
    s.served_by(&s.pod("near"), &local, &["web"]);
    s.fails(&s.pod("far"), &local, 28);
    s.served_by("outside", &format!("{NODE_1}:{}", s.node_port("local")), &["web"]);
    s.fails("outside", &format!("{NODE_2}:{}", s.node_port("local")), 28);
    s.kubectl("delete pod web --grace-period=0 --force").ok();
    s.fails(&s.pod("far"), &all, 7);
    s.fails(&s.pod("far"), &local, 7);
}

fn host_networks_and_host_ports(s: &Space) {
    // A pod with the node's network bears the node's name.
    s.apply("
{apiVersion: v1, kind: Pod, metadata: {name: net, labels: {app: net}}, spec: {nodeName: node-2, hostNetwork: true, terminationGracePeriodSeconds: 1, containers: [{name: a, image: portolan.dev/toolbox, command: [python3, -m, http.server, '10180'], securityContext: {privileged: true}}, {name: b, image: portolan.dev/echo, args: ['--port=10182', '--udp-port=10181']}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: net}, spec: {selector: {app: net}, ports: [{name: t, port: 80, targetPort: 10180}, {name: u, port: 90, protocol: UDP, targetPort: 10181}]}}
");
    s.servers(&[("near", "node-2", "client", "")]);
    let port = |name: &str, ip: &str, protocol: &str, target: u16| {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{nodeName: node-1, terminationGracePeriodSeconds: 1, containers: [{{name: a, image: portolan.dev/echo, args: ['--port=8080', '--udp-port=8081'], ports: [{{hostPort: 54323, hostIP: {ip}, protocol: {protocol}, containerPort: {target}}}]}}]}}}}\n"
        )
    };
    s.apply(
        &[port("p1", "127.0.0.1", "TCP", 8080), port("p2", NODE_1, "TCP", 8080), port("p3", NODE_1, "UDP", 8081)]
            .concat(),
    );
    s.kubectl("wait pod net p1 p2 p3 --for=condition=Ready --timeout=60s").ok();
    let shell = |script: &str| s.c.kubectl_args(["-n", s.ns, "exec", "net", "--", "bash", "-c", script]).ok();
    assert_eq!(shell("hostname; cat /etc/hostname; echo $HOSTNAME"), "node-2\nnode-2\nnode-2\n");
    s.served_by("node/node-1", "127.0.0.1:54323", &["p1"]);
    s.served_by("node/node-1", &format!("{NODE_1}:54323"), &["p2"]);
    s.served_by("node/node-2", &format!("{NODE_1}:54323"), &["p2"]);
    let udp = format!("exec 3<>/dev/udp/{NODE_1}/54323; echo x >&3; timeout 5 head -c 12 <&3");
    eventually("UDP has a host port of its own", LIMIT, || s.c.exec("node/node-2", &["bash", "-c", &udp]).has("{"));
    eventually("a host-network pod is an endpoint", LIMIT, || {
        let url = format!("http://{}/", s.cluster_ip("net"));
        s.c.exec(&s.pod("p1"), &["curl", "-sS", "--max-time", "5", &url]).has("Directory listing")
    });
    let code =
        shell("curl -s -o /dev/null -w '%{http_code}' localhost:10256/healthz; curl -s localhost:10249/proxyMode");
    assert_eq!(code, "200nftables");
}

fn traffic_stays_nearby(s: &Space) {
    s.servers(&[
        ("a", "node-1", "web", ""),
        ("b", "node-2", "web", ""),
        ("near", "node-1", "client", ""),
        ("far", "node-2", "client", ""),
    ]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {trafficDistribution: PreferSameZone, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}");
    let address = format!("{}:80", s.cluster_ip("web"));
    for kind in ["PreferSameZone", "PreferSameNode"] {
        s.patch("service/web", &format!(r#"{{"spec":{{"trafficDistribution":"{kind}"}}}}"#));
        s.served_by(&s.pod("near"), &address, &["a"]);
        s.served_by(&s.pod("far"), &address, &["b"]);
    }
    s.kubectl("delete pod a --timeout=60s").ok();
    s.served_by(&s.pod("near"), &address, &["b"]);
    s.servers(&[("a", "node-1", "web", "")]);
    s.served_by(&s.pod("near"), &address, &["a"]);
    s.patch("service/web", r#"{"spec":{"trafficDistribution":null}}"#);
    s.served_by(&s.pod("near"), &address, &["a", "b"]);
}

fn endpoints_made_by_hand(s: &Space) {
    s.servers(&[("a", "node-1", "x", ""), ("b", "node-2", "x", ""), ("client", "node-2", "client", "")]);
    let ip = |pod: &str| s.get(&format!("pod/{pod}"), "{.status.podIP}");
    let service = |name: &str, rest: &str| {
        s.apply(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{{rest} ports: [{{port: 80}}]}}}}"
        ));
    };
    service("mirrored", "");
    let endpoints = |address: &str| {
        s.apply(&format!("{{apiVersion: v1, kind: Endpoints, metadata: {{name: mirrored}}, subsets: [{{addresses: [{{ip: {address}}}], ports: [{{port: 8080}}]}}]}}"));
    };
    endpoints(&ip("a"));
    s.served_by(&s.pod("client"), "mirrored:80", &["a"]);
    endpoints(&ip("b"));
    s.served_by(&s.pod("client"), "mirrored:80", &["b"]);
    s.kubectl("delete endpoints mirrored").ok();
    s.fails(&s.pod("client"), "mirrored:80", 7);

    // Slices by hand, and a cluster IP from a range that is added while the cluster runs.
    s.apply("{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: more}, spec: {cidrs: [203.0.113.0/25]}}");
    s.kubectl("wait servicecidr more --for=condition=Ready --timeout=60s").ok();
    service("sliced", "clusterIP: 203.0.113.23,");
    for pod in ["a", "b"] {
        s.apply(&format!("{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: sliced-{pod}, labels: {{kubernetes.io/service-name: sliced}}}}, addressType: IPv4, endpoints: [{{addresses: [{}]}}], ports: [{{name: '', port: 8080}}]}}", ip(pod)));
    }
    s.served_by(&s.pod("client"), "203.0.113.23:80", &["a", "b"]);
    s.kubectl("delete endpointslice sliced-a").ok();
    s.served_by(&s.pod("client"), "203.0.113.23:80", &["b"]);
    s.kubectl("delete service sliced").ok();
    s.kubectl("delete servicecidr more --wait=false").ok();
}

fn the_api_server_proxies(s: &Space) {
    s.servers(&[("web", "node-1", "web", "")]);
    s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: named, port: 80, targetPort: http}]}}");
    let base = "/api/v1/namespaces/proxy";
    for path in [
        "services/web",
        "services/web:80",
        "services/web:named",
        "services/http:web:named",
        "pods/web",
        "pods/web:8080",
    ] {
        eventually(path, LIMIT, || {
            s.c.kubectl(&format!("get --raw {base}/{path}/proxy/some/path?q=1")).has("\"path\":\"/some/path\"")
        });
    }
    let uid = s.get("pod/web", "{.metadata.uid}");
    let logs = "/api/v1/nodes/node-1:10250/proxy/logs/";
    s.c.kubectl(&format!("get --raw {logs}")).has("href=\"pods/\"").unwrap();
    s.c.kubectl(&format!("get --raw {logs}pods/proxy_web_{uid}/a/")).has("0.log").unwrap();
    s.c.kubectl(&format!("get --raw {logs}pods/proxy_web_{uid}/a/0.log")).ok();
    assert!(s.c.kubectl(&format!("get --raw {logs}pods/proxy_web_{uid}/%2e%2e/")).code != Some(0));
    s.c.kubectl("get --raw /api/v1/nodes/node-1/proxy/pods").has("\"PodList\"").unwrap();
    s.c.kubectl("get --raw /api/v1/nodes/node-1/proxy/configz").has("kubeletconfig").unwrap();
}

fn evicted_pods_are_no_endpoints(s: &Space) {
    s.apply("
apiVersion: v1
kind: Pod
metadata: {name: greedy, labels: {app: greedy}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: a
    image: portolan.dev/toolbox
    command: [sh, -c, 'head -c 10485760 /dev/zero > /file; sleep 1000']
    resources: {limits: {ephemeral-storage: 5Mi}}
---
{apiVersion: v1, kind: Service, metadata: {name: greedy}, spec: {publishNotReadyAddresses: true, selector: {app: greedy}, ports: [{port: 80}]}}
");
    s.servers(&[("client", "node-2", "client", "")]);
    eventually("the pod is evicted", LIMIT, || {
        let status = s.get("pod/greedy", "{.status.phase} {.status.reason} {.status.message}");
        let expected = "Failed Evicted Pod ephemeral local storage usage exceeds the total limit of containers 5Mi.";
        if status.trim_end() == expected { Ok(()) } else { Err(status) }
    });
    s.kubectl("get events").has("Evicted").unwrap();
    s.kubectl("describe pod greedy").has("DisruptionTarget").unwrap();
    eventually("its endpoint is gone", LIMIT, || {
        let left = s.get("endpointslice", "{.items[*].endpoints[*].addresses}");
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    s.fails(&s.pod("client"), "greedy:80", 7);
}
