//! Logs, exec, attach and port-forward as clients use them.

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::cluster::{Node, shell};

type Client = WebSocketStream<tokio::io::DuplexStream>;

async fn open(node: &Node, path: &str, protocol: &str) -> Client {
    let (client, server) = tokio::io::duplex(64 * 1024);
    let kubelet = node.kubelet.clone();
    tokio::spawn(async move { kubelet.serve_connection(server).await });
    let mut request = format!("ws://kubelet{path}").into_client_request().unwrap();
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
    let (socket, response) = tokio_tungstenite::client_async(request, client).await.unwrap();
    assert_eq!(response.headers()["Sec-WebSocket-Protocol"], protocol);
    socket
}

/// Everything until the server closes, by channel.
async fn collect(socket: &mut Client) -> [Vec<u8>; 4] {
    let mut channels: [Vec<u8>; 4] = Default::default();
    let all = async {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Binary(bytes) = message {
                channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.expect("the stream ends");
    channels
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn sleeper(node: &Node) {
    node.run("sleeper", shell("trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"));
    node.api.ready("sleeper").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_gives_output_and_exit_code() {
    let node = Node::start("exec").await;
    sleeper(&node).await;
    let path =
        "/exec/shop/sleeper/main?command=sh&command=-c&command=echo+out%3B+echo+err+%3E%262%3B+exit+5&output=1&error=1";
    let mut socket = open(&node, path, "v5.channel.k8s.io").await;
    let [_, out, err, status] = collect(&mut socket).await;
    assert_eq!((text(&out).as_str(), text(&err).as_str()), ("out\n", "err\n"));
    let status: Value = serde_json::from_slice(&status).unwrap();
    assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "5"}));

    let mut socket = open(&node, "/exec/shop/sleeper/main?command=true&output=1", "v4.channel.k8s.io").await;
    let [.., status] = collect(&mut socket).await;
    assert_eq!(serde_json::from_slice::<Value>(&status).unwrap()["status"], "Success");

    let mut socket = open(&node, "/exec/shop/sleeper/main?command=/no/such&output=1", "v5.channel.k8s.io").await;
    let [.., status] = collect(&mut socket).await;
    let status: Value = serde_json::from_slice(&status).unwrap();
    assert!(status["message"].as_str().unwrap().contains("/no/such"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_takes_input_until_it_is_closed() {
    let node = Node::start("stdin").await;
    sleeper(&node).await;
    let mut socket =
        open(&node, "/exec/shop/sleeper/main?command=wc&command=-c&input=1&output=1", "v5.channel.k8s.io").await;
    let mut big = vec![b'x'; 200_001];
    big[0] = 0;
    for chunk in big[1..].chunks(20_000) {
        let mut message = vec![0];
        message.extend_from_slice(chunk);
        socket.send(Message::binary(message)).await.unwrap();
    }
    socket.send(Message::binary(vec![255, 0])).await.unwrap();
    let [_, out, ..] = collect(&mut socket).await;
    assert_eq!(text(&out).trim(), "200000");
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_on_a_terminal() {
    let node = Node::start("tty").await;
    sleeper(&node).await;
    let mut socket =
        open(&node, "/exec/shop/sleeper/main?command=sh&input=1&output=1&tty=1", "v5.channel.k8s.io").await;
    let mut resize = vec![4];
    resize.extend_from_slice(br#"{"Width":101,"Height":31}"#);
    socket.send(Message::binary(resize)).await.unwrap();
    let mut typed = vec![0];
    typed.extend_from_slice(b"stty size; tty; exit 3\n");
    socket.send(Message::binary(typed)).await.unwrap();
    let [_, out, _, status] = collect(&mut socket).await;
    assert!(text(&out).contains("31 101") && text(&out).contains("/dev/pts/"), "{}", text(&out));
    assert!(text(&status).contains("\"message\":\"3\""), "{}", text(&status));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_takes_its_command_with_it() {
    let node = Node::start("gone").await;
    sleeper(&node).await;
    let mut socket = open(
        &node,
        "/exec/shop/sleeper/main?command=sh&command=-c&command=echo+on%3B+exec+sleep+1234.5&output=1",
        "v5.channel.k8s.io",
    )
    .await;
    let first = tokio::time::timeout(Duration::from_secs(20), socket.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(first, Message::binary(b"\x01on\n".to_vec()));
    until("the command runs", || running("1234.5")).await;
    drop(socket);
    until("the command has ended", || !running("1234.5")).await;
}

async fn until(what: &str, check: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(tokio::time::Instant::now() < deadline, "not so after five seconds: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn running(argument: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        command.starts_with(b"sleep\0") && text(&command).contains(argument)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_talks_to_the_first_process() {
    let node = Node::start("attach").await;
    let mut spec = shell("while read line; do echo got $line; [ $line = end ] && exit 0; done");
    spec["containers"][0]["stdin"] = json!(true);
    node.run("reader", spec);
    node.api.ready("reader").await;
    let mut socket = open(&node, "/attach/shop/reader/main?input=1&output=1&error=1", "v4.channel.k8s.io").await;
    socket.send(Message::binary(b"\x00hello\n".to_vec())).await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(20), socket.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(first, Message::binary(b"\x01got hello\n".to_vec()));
    socket.send(Message::binary(b"\x00end\n".to_vec())).await.unwrap();
    let [_, out, _, status] = collect(&mut socket).await;
    assert_eq!(text(&out), "got end\n");
    assert!(text(&status).contains("Success"));

    let mut spec = shell("stty size; echo done");
    spec["containers"][0]["tty"] = json!(true);
    spec["containers"][0]["stdin"] = json!(true);
    node.run("terminal", spec);
    node.api.phase("terminal", "Succeeded").await;
    let (_, log) = node.kubelet_get("/containerLogs/shop/terminal/main").await;
    assert!(log.contains("done"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn followed_logs_end_with_the_container() {
    let node = Node::start("follow").await;
    node.run("talker", shell("for i in 1 2 3 4 5; do echo line $i; sleep 0.2; done"));
    node.api.ready("talker").await;
    let (code, body) = node.kubelet_get("/containerLogs/shop/talker/main?follow=true").await;
    assert_eq!(code, 200);
    assert_eq!(body, "line 1\nline 2\nline 3\nline 4\nline 5\n");
    let (_, tail) = node.kubelet_get("/containerLogs/shop/talker/main?tailLines=2").await;
    assert_eq!(tail, "line 4\nline 5\n");
    let (code, _) = node.kubelet_get("/containerLogs/shop/talker/nope").await;
    assert_eq!(code, 400);
    let (code, _) = node.kubelet_get("/containerLogs/shop/nope/main").await;
    assert_eq!(code, 404);
    let (code, body) = node.kubelet_get("/containerLogs/shop/talker/main?previous=true").await;
    assert!(code == 200 || body.contains("previous terminated container"), "{code} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded_into_the_pod() {
    let node = Node::start("forward").await;
    node.run(
        "web",
        json!({"containers": [{"name": "web", "image": "portolan.dev/echo", "args": ["--port", "8080", "--tcp-port", "7000"],
                               "readinessProbe": {"tcpSocket": {"port": 7000}, "periodSeconds": 1}}]}),
    );
    node.api.ready("web").await;
    let mut socket = open(&node, "/portForward/shop/web?ports=7000&ports=7001", "v4.channel.k8s.io").await;
    let mut channels: [Vec<u8>; 4] = Default::default();
    let read = async {
        while channels[0].len() < 20 || channels[3].len() < 4 {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]),
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read).await.expect("both ports say something");
    assert_eq!(channels[0][..2], 7000u16.to_le_bytes());
    let object: Value = serde_json::from_slice(&channels[0][2..]).unwrap();
    assert_eq!(object["pod"], "web");
    assert_eq!(channels[1], 7000u16.to_le_bytes());
    assert!(text(&channels[3][2..]).contains("failed to connect to localhost:7001"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_request_for_a_stream_is_refused() {
    let node = Node::start("plain").await;
    sleeper(&node).await;
    let (code, body) = node.kubelet_get("/exec/shop/sleeper/main?command=true").await;
    assert_eq!(code, 400);
    assert!(body.contains("Upgrade request required"), "{body}");
    let mut nothing = String::new();
    let (client, server) = tokio::io::duplex(1024);
    let kubelet = node.kubelet.clone();
    let task = tokio::spawn(async move { kubelet.serve_connection(server).await });
    drop(client);
    tokio::time::timeout(Duration::from_secs(20), task).await.unwrap().unwrap();
    tokio::io::empty().read_to_string(&mut nothing).await.unwrap();
}
