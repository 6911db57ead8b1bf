//! Small promises that users notice when they are broken.

use portolan_testkit::eventually;

use crate::{LIMIT, up};

const MANIFESTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: echo, labels: {app: echo}}
spec: {containers: [{name: a, image: portolan.dev/echo}]}
---
apiVersion: v1
kind: Pod
metadata: {name: noimage}
spec: {containers: [{name: a, image: registry.example/none:1}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec: {selector: {app: echo}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: echo}
spec:
  ingressClassName: nginx
  tls: [{hosts: [details.example.com]}]
  rules:
  - host: details.example.com
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: echo, port: {number: 80}}}}]}
";

#[test]
fn places_uploads_listings_and_refusals() {
    let c = up("details");
    c.apply(MANIFESTS).ok();
    c.kubectl("wait pod/echo --for=condition=Ready --timeout=60s").ok();

    eventually("a node resolves what is published", LIMIT, || {
        c.exec("node/node-2", &["dig", "+short", "+time=2", "details.example.com"]).has("192.168.70.")
    });
    for place in ["node/..", "node/outside", "node/fabric", "pod/default/.."] {
        let refused = c.exec(place, &["true"]);
        assert!(matches!(refused.code, Some(2 | 64)), "{place}: {refused}");
    }

    let upload = [
        "sh",
        "-c",
        "head -c 900000 /dev/zero | curl -sS --max-time 5 --data-binary @- -w '%{http_code}' https://details.example.com/ -k",
    ];
    eventually("the Ingress answers", LIMIT, || c.exec("outside", &upload).has("200"));
    for time in 0..5 {
        // An answer while the body still is on its way would break the connection, now and then.
        let ran = c.exec("outside", &upload);
        assert!(ran.stdout.ends_with("200"), "time {time}: {ran}");
    }
    c.exec("outside", &["curl", "-sSk", "--http1.0", "--max-time", "5", "https://details.example.com/"])
        .has("\"pod\":\"echo\"")
        .unwrap();

    for place in ["node/node-1", "router"] {
        c.exec(place, &["nft", "list", "ruleset"]).has("192.168.70.").unwrap();
    }

    eventually("a waiting container has no log", LIMIT, || {
        let refused = c.kubectl("logs noimage");
        let expected = "Error from server (BadRequest): container \"a\" in pod \"noimage\" is waiting to start: ";
        if refused.stderr.starts_with(expected) { Ok(()) } else { Err(refused.to_string()) }
    });
}
