//! Clients that are slow, silent or hostile, and what others notice of them.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use portolan_apiserver::ServerConfig;
use serde_json::{Value, json};

use crate::support::{Fixture, LIMIT};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn a_watcher_that_does_not_read_falls_behind_alone() {
    let f = Fixture::start().await;
    let request = Request::get(format!("{MAPS}?watch=true&resourceVersion=1")).body(Full::new(Bytes::new()));
    let mut slow = f.raw(request.expect("a request")).await.into_body();
    // More than the server keeps of a collection.
    let text = "x".repeat(900 << 10);
    let map = |i: usize| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"i": i.to_string(), "x": text}});
    assert_eq!(f.post(MAPS, &map(0)).await.code, 201);
    for i in 1..60 {
        assert_eq!(f.put(&format!("{MAPS}/a"), &map(i)).await.code, 200);
    }
    let read = async {
        let mut all = Vec::new();
        while let Some(frame) = slow.frame().await {
            all.extend_from_slice(frame.expect("a frame").data_ref().expect("data"));
        }
        all
    };
    let all = tokio::time::timeout(LIMIT, read).await.expect("the end of the watch");
    let last = all.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty()).expect("a line");
    let last: Value = serde_json::from_slice(last).expect("json");
    assert_eq!((&last["type"], &last["object"]["code"]), (&json!("ERROR"), &json!(410)), "it must list again");
    assert!(all.len() < 40 << 20, "no more than what is kept for all: {}", all.len());
}

#[tokio::test]
async fn hostile_bodies_are_refused_and_others_served() {
    let f = Fixture::start().await;
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let nested = format!(r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"a"}},"data":{deep}}}"#);
    let large = format!(r#"{{"metadata":{{"name":"a"}},"data":{{"x":"{}"}}}}"#, "x".repeat(4 << 20));
    let yaml_deep = "[".repeat(50_000);
    let rows: [(&str, &str, &[u8], u16); 5] = [
        ("deep_json", "application/json", nested.as_bytes(), 400),
        ("deep_yaml", "application/yaml", yaml_deep.as_bytes(), 400),
        ("too_large", "application/json", large.as_bytes(), 413),
        ("bad_utf8", "application/json", b"{\"metadata\":{\"name\":\"\xff\xfe\"}}", 422),
        ("bad_utf8_yaml", "application/yaml", b"metadata: {name: \xff\xfe}", 400),
    ];
    for (what, content_type, body, code) in rows {
        let request = Request::post(MAPS).header("content-type", content_type);
        let request = request.body(Full::new(Bytes::copy_from_slice(body))).expect("a request");
        let got = crate::support::answer(f.raw(request).await).await;
        assert_eq!(got.code, code, "{what}: {}", got.body);
    }
    assert_eq!(f.get(MAPS).await.body["items"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_do_not_keep_others_out() {
    let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    config.listeners = vec![listener];
    let f = Fixture::with(config).await;
    let mut silent = Vec::new();
    for _ in 0..2000 {
        silent.push(tokio::net::TcpStream::connect(address).await.expect("connected"));
    }
    let got = tokio::time::timeout(LIMIT, f.get("/readyz")).await.expect("an answer");
    assert_eq!(got.code, 200);
    let one_more = tokio::net::TcpStream::connect(address);
    tokio::time::timeout(LIMIT, one_more).await.expect("in time").expect("connected");
    f.server.shutdown().await;
}
