//! What a pod's containers get, and how pods begin and end.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, PodStatus, Secret};
use serde_json::{Value, json};

use crate::api::condition;
use crate::cluster::{Node, shell, shell_with_trap};

fn echo(extra: Value) -> Value {
    let mut container =
        json!({"name": "web", "image": "portolan.dev/echo", "args": ["--port", "8080", "--udp-port", "9090"]});
    for (key, value) in extra.as_object().unwrap() {
        container[key] = value.clone();
    }
    json!({"terminationGracePeriodSeconds": 5, "containers": [container]})
}

fn address(status: &PodStatus, port: u16) -> SocketAddr {
    SocketAddr::new(status.pod_ip.as_deref().unwrap().parse().unwrap(), port)
}

fn first(status: &PodStatus) -> &k8s_openapi::api::core::v1::ContainerStatus {
    &status.container_statuses.as_ref().unwrap()[0]
}

async fn logs(node: &Node, pod: &str) -> String {
    let (code, body) = node.kubelet_get(&format!("/containerLogs/shop/{pod}/main")).await;
    assert_eq!(code, 200, "{body}");
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn an_echo_pod_answers_and_knows_who_it_is() {
    let node = Node::start("echo").await;
    let begin = Instant::now();
    let pod = node.run(
        "web-1",
        echo(json!({"readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 30}})),
    );
    let status = node.api.ready("web-1").await;
    let took = begin.elapsed();
    assert!(
        took < Duration::from_secs(20),
        "a server is ready long before the second probe is due, not after {took:?}"
    );
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.244.1.2"));
    assert_eq!(status.host_ip.as_deref(), Some("192.168.50.11"));
    let answer = node.get(address(&status, 8080), "/a/b?x=1").await.unwrap();
    let object: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    for (key, value) in [
        ("pod", "web-1"),
        ("namespace", "shop"),
        ("node", "node-1"),
        ("zone", "zone-a"),
        ("path", "/a/b"),
        ("query", "x=1"),
        ("host", "test"),
    ] {
        assert_eq!(object[key], value, "{key} in {object}");
    }
    // The node speaks as itself, not as the gateway of its pods.
    assert!(object["peer"].as_str().unwrap().starts_with("192.168.50.11:"), "{object}");
    let reasons = node.api.reasons("web-1");
    assert_eq!(reasons[..3], ["Pulled", "Created", "Started"], "{reasons:?}");

    node.delete(&pod, 5);
    node.deleted("web-1").await;
    assert!(node.get(address(&status, 8080), "/").await.is_err(), "the pod is gone");
    let last = node.api.store().statuses["web-1"].clone();
    assert_eq!(
        first(&last).state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code,
        0,
        "SIGTERM ends the server cleanly"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_health_makes_it_unready_then_restarts_it() {
    let node = Node::start("health").await;
    node.run(
        "web",
        echo(json!({
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1},
            "livenessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "failureThreshold": 3}})),
    );
    let status = node.api.ready("web").await;
    node.get(address(&status, 8080), "/fail").await.unwrap();
    node.api.status("web", "unready", |s| condition(s, "Ready") == "False").await;
    node.api.event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 500").await;
    node.api.event("Killing", "Container web failed liveness probe, will be restarted").await;
    let status =
        node.api.status("web", "restarted", |s| first(s).restart_count == 1 && condition(s, "Ready") == "True").await;
    let last = first(&status).last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!(last.exit_code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_logs_and_messages_are_exact() {
    let node = Node::start("exit").await;
    node.run("done", shell("echo out; echo err >&2; echo last words > /dev/termination-log; exit 7"));
    let status = node.api.phase("done", "Failed").await;
    let end = first(&status).state.as_ref().unwrap().terminated.clone().unwrap();
    assert_eq!((end.exit_code, end.reason.as_deref()), (7, Some("Error")));
    assert_eq!(end.message.as_deref(), Some("last words\n"));
    let text = logs(&node, "done").await;
    assert!(text.contains("out\n") && text.contains("err\n"), "{text}");
    let (_, only_err) = node.kubelet_get("/containerLogs/shop/done/main?stream=Stderr&timestamps=true").await;
    assert!(only_err.ends_with("Z err\n"), "{only_err}");

    node.run("killed", shell("kill -9 $$; sleep 1"));
    // The first process of a pid namespace ignores its own SIGKILL, so the shell goes on.
    let status = node.api.phase("killed", "Succeeded").await;
    assert_eq!(first(&status).state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_volumes_and_files_arrive() {
    let node = Node::start("env").await;
    {
        let mut store = node.api.store();
        store.config_maps.insert(
            "settings".into(),
            ConfigMap {
                data: Some([("color".to_string(), "blue".to_string()), ("file.txt".into(), "hello".into())].into()),
                ..Default::default()
            },
        );
        store.secrets.insert(
            "keys".into(),
            Secret { data: Some([("pass".to_string(), ByteString(b"s3cret".to_vec()))].into()), ..Default::default() },
        );
        store.services.push(
            serde_json::from_value(json!({"metadata": {"name": "kubernetes", "namespace": "default"},
                "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}}))
            .unwrap(),
        );
    }
    let script = r#"
        echo "A=$A B=$B COLOR=$COLOR PASS=$PASS POD=$POD IP=$IP MEM=$MEM HOST=$(hostname) K=$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT_HTTPS"
        echo "FROM=$CFG_color"
        echo "FILES=$(cat /cfg/file.txt)/$(cat /one)/$(cat /sec/pass)/$(cat /tok/token)/$(cat /tok/labels)"
        cat /etc/resolv.conf; grep main- /etc/hosts; grep extra /etc/hosts
        echo data > /shared/x && cat /shared/x; touch /usr/nope 2>/dev/null || echo "usr is read-only"; touch /sec/no 2>/dev/null || echo "volume is read-only"
        id -u; echo "CWD=$(pwd)"; cat /proc/1/comm; ls /sys/class/net; ip -4 -o addr show eth0 | awk '{print $4}'
    "#;
    node.run(
        "main-pod",
        json!({
            "restartPolicy": "Never", "hostname": "main-host", "subdomain": "sub",
            "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["extra"]}],
            "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
            "volumes": [
                {"name": "cfg", "configMap": {"name": "settings"}},
                {"name": "sec", "secret": {"secretName": "keys"}},
                {"name": "shared", "emptyDir": {}},
                {"name": "tok", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "audience": "x", "expirationSeconds": 600}},
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]}}],
            "containers": [{
                "name": "main", "image": "portolan.dev/toolbox", "command": ["/bin/sh", "-c", script], "workingDir": "/tmp",
                "resources": {"limits": {"memory": "64Mi"}},
                "envFrom": [{"prefix": "CFG_", "configMapRef": {"name": "settings"}}],
                "env": [
                    {"name": "A", "value": "1"}, {"name": "B", "value": "$(A)-$(MISSING)-$$(A)"},
                    {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}},
                    {"name": "PASS", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "pass"}}},
                    {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}}],
                "volumeMounts": [
                    {"name": "cfg", "mountPath": "/cfg"}, {"name": "cfg", "mountPath": "/one", "subPath": "color"},
                    {"name": "sec", "mountPath": "/sec", "readOnly": true},
                    {"name": "shared", "mountPath": "/shared"}, {"name": "tok", "mountPath": "/tok"}]}]}),
    );
    node.api.phase("main-pod", "Succeeded").await;
    let text = logs(&node, "main-pod").await;
    for line in [
        "A=1 B=1-$(MISSING)-$(A) COLOR=blue PASS=s3cret POD=main-pod IP=10.244.1.2 MEM=64 HOST=main-host K=10.96.0.1:443",
        "FROM=blue",
        "FILES=hello/blue/s3cret/token-of-main-pod-for-x/app=\"main-pod\"",
        "search shop.svc.cluster.local svc.cluster.local cluster.local host.example",
        "nameserver 10.96.0.10",
        "options ndots:5",
        "10.244.1.2\tmain-host.sub.shop.svc.cluster.local\tmain-host",
        "192.0.2.7\textra",
        "data",
        "usr is read-only",
        "volume is read-only",
        "1000",
        "CWD=/tmp",
        "sh",
        "10.244.1.2/32",
    ] {
        assert!(text.lines().any(|l| l.trim() == line), "{line:?} is missing in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_things_have_the_usual_reasons() {
    let node = Node::start("missing").await;
    let waiting = |status: &PodStatus| {
        let state = first(status).state.as_ref().unwrap().waiting.clone().unwrap_or_default();
        (state.reason.unwrap_or_default(), state.message.unwrap_or_default())
    };
    node.run("no-image", json!({"containers": [{"name": "main", "image": "nginx:1"}]}));
    let status = node.api.status("no-image", "waits", |s| waiting(s).0 == "ErrImageNeverPull").await;
    assert!(waiting(&status).1.contains("portolan image import"), "{}", waiting(&status).1);
    assert_eq!(status.phase.as_deref(), Some("Pending"));

    let mut spec = shell("true");
    spec["volumes"] = json!([{"name": "v", "configMap": {"name": "later"}}]);
    node.run("no-map", spec);
    node.api.event("FailedMount", "MountVolume.SetUp failed for volume \"v\" : configmap \"later\" not found").await;
    node.api.store().config_maps.insert("later".into(), ConfigMap::default());
    node.api.phase("no-map", "Succeeded").await;

    let mut spec = shell("true");
    spec["containers"][0]["env"] = json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k"}}}]);
    node.run("no-secret", spec);
    let status = node.api.status("no-secret", "waits", |s| waiting(s).0 == "CreateContainerConfigError").await;
    assert_eq!(waiting(&status).1, "secret \"none\" not found");
    let (code, body) = node.kubelet_get("/containerLogs/shop/no-secret/main").await;
    assert_eq!(code, 400);
    assert!(body.contains("is waiting to start: CreateContainerConfigError"), "{body}");

    let mut spec = shell("true");
    spec["containers"][0]["command"] = json!(["/no/such/program"]);
    node.run("no-program", spec);
    let status = node.api.phase("no-program", "Failed").await;
    let end = first(&status).state.as_ref().unwrap().terminated.clone().unwrap();
    assert_eq!((end.exit_code, end.reason.as_deref()), (128, Some("StartError")));
    assert!(end.message.unwrap().contains("/no/such/program"));

    let mut spec = shell("true");
    spec["volumes"] = json!([{"name": "v", "nfs": {"server": "192.0.2.1", "path": "/"}}]);
    node.run("no-nfs", spec);
    node.api.event("FailedMount", "volume type nfs is not supported by this node").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashing_container_backs_off() {
    let node = Node::start("crash").await;
    let mut spec = shell("echo run; exit 3");
    spec["restartPolicy"] = json!("Always");
    node.run("loop", spec);
    let status = node
        .api
        .status("loop", "in back-off", |s| {
            first(s)
                .state
                .as_ref()
                .unwrap()
                .waiting
                .as_ref()
                .is_some_and(|w| w.reason.as_deref() == Some("CrashLoopBackOff"))
        })
        .await;
    assert_eq!(first(&status).restart_count, 1, "the first restart is immediate");
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let message = first(&status).state.as_ref().unwrap().waiting.as_ref().unwrap().message.clone().unwrap();
    assert!(message.starts_with("back-off 10s restarting failed container=main pod=loop_shop("), "{message}");
    assert_eq!(first(&status).last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 3);
    node.api.event("BackOff", "Back-off restarting failed container main in pod loop_shop(").await;
    assert_eq!(logs(&node, "loop").await, "run\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn init_containers_and_sidecars_keep_their_order() {
    let node = Node::start("init").await;
    let step = |name: &str, script: &str| {
        json!({"name": name, "image": "portolan.dev/toolbox", "command": ["/bin/sh", "-c", script],
               "volumeMounts": [{"name": "v", "mountPath": "/v"}]})
    };
    let mut sidecar = step(
        "side",
        "echo side >> /v/order; trap 'echo side-stops >> /v/order; exit 0' TERM; touch /v/up; while :; do sleep 0.05; done",
    );
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] = json!({"exec": {"command": ["test", "-e", "/v/up"]}, "periodSeconds": 1});
    node.run(
        "order",
        json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 5,
               "volumes": [{"name": "v", "emptyDir": {}}],
               "initContainers": [step("one", "echo one >> /v/order"), sidecar, step("two", "echo two >> /v/order")],
               "containers": [step("main", "echo main >> /v/order; cat /v/order")]}),
    );
    let status = node.api.phase("order", "Succeeded").await;
    assert_eq!(logs(&node, "order").await, "one\nside\ntwo\nmain\n");
    let inits = status.init_container_statuses.unwrap();
    assert_eq!(inits.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["one", "side", "two"]);
    assert_eq!(
        inits[1].state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code,
        0,
        "the sidecar was asked to stop"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn termination_is_polite_then_firm() {
    let node = Node::start("term").await;
    let mut spec = shell_with_trap("trap 'echo got TERM' TERM; touch /tmp/up; while :; do sleep 0.1; done");
    spec["containers"][0]["lifecycle"] =
        json!({"preStop": {"exec": {"command": ["/bin/sh", "-c", "echo hook > /proc/1/fd/1"]}}});
    let pod = node.run("deaf", spec);
    node.api.ready("deaf").await;
    let begin = Instant::now();
    node.delete(&pod, 1);
    node.api.event("Killing", "Stopping container main").await;
    // Ignores the signal: killed after the grace period, but not before two seconds have passed since the signal.
    node.deleted("deaf").await;
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(1900) && took < Duration::from_secs(20), "took {took:?}");
    let status = node.api.store().statuses["deaf"].clone();
    let end = first(&status).state.as_ref().unwrap().terminated.clone().unwrap();
    assert_eq!(end.exit_code, 137);
    assert_eq!(status.phase.as_deref(), Some("Failed"));

    let pod = node.run("quick", shell_with_trap("trap 'exit 0' TERM; touch /tmp/up; while :; do sleep 0.05; done"));
    node.api.ready("quick").await;
    let begin = Instant::now();
    node.delete(&pod, 30);
    node.deleted("quick").await;
    assert!(begin.elapsed() < Duration::from_secs(20), "a container that obeys does not wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_and_probes_of_the_other_kinds() {
    let node = Node::start("kinds").await;
    let mut spec = echo(json!({
        "readinessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 1},
        "ports": [{"name": "http", "containerPort": 8080}]}));
    spec["containers"][0]["livenessProbe"] =
        json!({"tcpSocket": {"port": 9999}, "periodSeconds": 1, "failureThreshold": 100});
    node.run("web", spec);
    node.api.event("Unhealthy", "Liveness probe failed: dial tcp 10.244.1.2:9999: connect: connection refused").await;
    let status = node.api.ready("web").await;
    let mut spec = shell("sleep 60");
    spec["containers"][0]["lifecycle"] =
        json!({"postStart": {"httpGet": {"host": status.pod_ip, "path": "/fail", "port": 8080}}});
    node.run("caller", spec);
    node.api.ready("caller").await;
    let answer = node.get(address(&status, 8080), "/healthz").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 500"), "the hook has been run: {answer}");

    let mut spec = shell("sleep 60");
    spec["containers"][0]["readinessProbe"] =
        json!({"exec": {"command": ["/bin/sh", "-c", "sleep 30"]}, "periodSeconds": 1, "timeoutSeconds": 1});
    node.run("slow", spec);
    node.api
        .event("Unhealthy", "Readiness probe failed: command timed out: \"/bin/sh -c sleep 30\" timed out after 1s")
        .await;

    let mut spec = shell("sleep 60");
    spec["restartPolicy"] = json!("Always");
    spec["containers"][0]["lifecycle"] = json!({"postStart": {"exec": {"command": ["false"]}}});
    node.run("hook", spec);
    node.api.event("FailedPostStartHook", "PostStartHook failed").await;

    let mut spec = shell("sleep 60");
    spec["containers"][0]["readinessProbe"] = json!({"httpGet": {"port": "nope"}, "periodSeconds": 1});
    node.run("port", spec);
    node.api.event("Unhealthy", "Readiness probe errored and resulted in unknown state: couldn't find port").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_each_other_and_the_node_and_use_its_network_if_asked() {
    let node = Node::start("net").await;
    node.run("web", echo(json!({})));
    let web = node.api.ready("web").await;
    let ip = web.pod_ip.clone().unwrap();
    node.run(
        "client",
        shell(&format!(
            "curl -s http://{ip}:8080/x | head -c 300; ip route; curl -s -m 2 http://10.244.1.200:80/ || echo code $?"
        )),
    );
    node.api.phase("client", "Succeeded").await;
    let text = logs(&node, "client").await;
    assert!(text.contains("\"peer\":\"10.244.1.3:"), "the client's own address arrives: {text}");
    assert!(text.contains("default via 10.244.1.1 dev eth0"), "{text}");
    assert!(text.contains("code 7"), "an address without a pod refuses at once: {text}");

    let mut spec = shell("hostname; ip -o -4 addr show lo | grep -c 192.168.50.11");
    spec["hostNetwork"] = json!(true);
    node.run("hostnet", spec);
    let status = node.api.phase("hostnet", "Succeeded").await;
    assert_eq!(status.pod_ip.as_deref(), Some("192.168.50.11"));
    assert!(logs(&node, "hostnet").await.ends_with("1\n"));

    // UDP: one datagram, one object.
    let answer = node
        .netns
        .run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            socket.send_to(b"x", format!("{ip}:9090")).unwrap();
            let mut buffer = [0; 2048];
            let n = socket.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        })
        .unwrap();
    let object: BTreeMap<String, Value> = serde_json::from_str(&answer).unwrap();
    assert_eq!(object["pod"], "web");
    assert_eq!(object["local"], format!("{ip}:9090"));
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_limits_hold_where_the_machine_can() {
    let node = Node::start("limit").await;
    // The shell itself, the container's first process, holds the text.
    let mut spec = shell("x=$(head -c 200M /dev/zero | tr '\\0' a); echo ${#x}");
    spec["containers"][0]["resources"] = json!({"limits": {"memory": "40Mi", "cpu": "500m"}});
    node.run("big", spec);
    let status = node.api.status("big", "over", |s| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"))).await;
    let end = first(&status).state.as_ref().unwrap().terminated.clone().unwrap();
    if node.api.reasons("node-1").contains(&"FailedNodeAllocatableEnforcement".to_string()) {
        assert_eq!(end.exit_code, 0, "where nothing is limited, nothing is killed: {end:?}");
    } else {
        assert_eq!((end.exit_code, end.reason.as_deref()), (137, Some("OOMKilled")), "{end:?}");
    }
}
