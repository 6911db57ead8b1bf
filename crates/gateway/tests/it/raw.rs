//! Raw bytes on the wire: framing, smuggling, tunnels, trailers.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};

use crate::harness::*;

#[test]
fn ambiguous_requests_are_refused_and_reach_no_backend() {
    let (gate, backend) = simple(&[]);
    let host = "Host: h\r\n";
    let chunked = format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n");
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
    let table: Vec<(String, u16)> = vec![
        (
            format!(
                "POST / HTTP/1.1\r\n{host}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"
            ),
            400,
        ),
        (format!("POST / HTTP/1.1\r\n{host}Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd{smuggled}"), 400),
        (format!("POST / HTTP/1.1\r\n{host}Content-Length: 4,4\r\n\r\nabcd{smuggled}"), 400),
        (format!("POST / HTTP/1.1\r\n{host}Content-Length: -1\r\n\r\n{smuggled}"), 400),
        (format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked, identity\r\n\r\n{smuggled}"), 501),
        (format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{smuggled}"), 400),
        (format!("POST / HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"), 400),
        (format!("GET / HTTP/1.1\n{host}\r\n{smuggled}"), 400),
        (format!("GET / HTTP/1.1\r\n{host}X: a\r\n b\r\n\r\n{smuggled}"), 400),
        (format!("GET / HTTP/1.1\r\n{host}X: a\0b\r\n\r\n{smuggled}"), 400),
        (format!("GET / HTTP/1.1\r\n{host}Host: other\r\n\r\n{smuggled}"), 400),
        (format!("GET / HTTP/1.1\r\n\r\n{smuggled}"), 400),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n".to_string(), 400),
        (format!("CONNECT h:80 HTTP/1.1\r\n{host}\r\n{smuggled}"), 405),
        (format!("TRACE / HTTP/1.1\r\n{host}\r\n"), 405),
        (format!("GET /{} HTTP/1.1\r\n{host}\r\n", "a".repeat(9000)), 414),
        (format!("GET / HTTP/1.1\r\n{host}X: {}\r\n\r\n", "a".repeat(40000)), 431),
        (format!("GET / HTTP/1.1\r\n{host}{}\r\n", "X: a\r\n".repeat(300)), 431),
        (format!("POST / HTTP/1.1\r\n{host}Expect: nonsense\r\nContent-Length: 4\r\n\r\n"), 417),
    ];
    for (request, status) in &table {
        let mut raw = Raw::connect(gate.http);
        // The gateway may answer and close before all of a long request was written.
        let _ = raw.stream.write_all(request.as_bytes());
        let reply = raw.reply();
        let shown = &request[..request.len().min(100)];
        assert_eq!(reply.status, *status, "{shown:?}");
        if *status != 400 || !request.contains("Host: a b") {
            assert_eq!(reply.header("connection").as_deref(), Some("close"), "{shown:?}");
            assert!(raw.closed(), "nothing follows the refusal of {shown:?}");
        }
    }
    assert_eq!(backend.seen(), 0, "no backend saw any of them");

    // A chunk that is not one ends the connection, and nothing behind it is taken for a request.
    for body in ["5 \r\nhello\r\n0\r\n\r\n", "5\nhello\r\n0\r\n\r\n", "zz\r\n", "5\r\nhelloX0\r\n\r\n"] {
        let mut raw = Raw::connect(gate.http);
        raw.send(format!("{chunked}{body}{smuggled}"));
        let reply = raw.reply();
        assert_eq!(reply.status, 400, "{body:?}");
        assert!(raw.closed(), "{body:?}");
    }
}

#[test]
fn requests_follow_each_other_on_one_connection() {
    let (gate, backend) = simple(&[]);
    let mut raw = Raw::connect(gate.http);
    let chunked =
        "POST /2 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    raw.send(format!(
        "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n{chunked}POST /3 HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nabcdGET /4 HTTP/1.1\r\nHost: h\r\n\r\n"
    ));
    for (target, length) in [("/1", 0), ("/2", 5), ("/3", 4), ("/4", 0)] {
        let reply = raw.reply().json();
        assert_eq!((reply["target"].as_str(), reply["length"].as_i64()), (Some(target), Some(length)));
    }
    // Byte by byte.
    for byte in b"GET /slowly HTTP/1.1\r\nHost: h\r\n\r\n" {
        raw.send([*byte]);
    }
    assert_eq!(raw.reply().json()["target"], "/slowly");
    // A refusal in the pipeline comes after the answers before it.
    raw.send("GET /good HTTP/1.1\r\nHost: h\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n");
    assert_eq!(raw.reply().json()["target"], "/good");
    assert_eq!(raw.reply().status, 400);
    assert!(raw.closed());
    assert_eq!(backend.seen(), 6);
    assert_eq!(backend.connections.load(std::sync::atomic::Ordering::SeqCst), 1, "one upstream connection served all");

    let mut old = Raw::connect(gate.http);
    old.send("GET /old HTTP/1.0\r\nHost: h\r\n\r\n");
    assert_eq!(old.reply().json()["target"], "/old");
    assert!(old.closed(), "HTTP/1.0 closes");
}

#[test]
fn trailers_travel_both_ways() {
    let (gate, _backend) = simple(&[]);
    let mut raw = Raw::connect(gate.http);
    raw.send("POST /x HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nTrailer: X-Sum, Authorization\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Sum: 7\r\nAuthorization: no\r\n\r\n");
    let reply = raw.reply().json();
    assert_eq!(reply["trailers"], serde_json::json!({"x-sum": "7"}));
    assert_eq!(reply["headers"]["te"], serde_json::json!(["trailers"]));
    raw.send("GET /trailers HTTP/1.1\r\nHost: h\r\nTE: trailers\r\n\r\n");
    let reply = raw.reply();
    assert_eq!(reply.body, b"data");
    assert_eq!(reply.header("x-sum").as_deref(), Some("42"), "{}", reply.head);
    assert_eq!(reply.header("set-cookie"), None);
}

#[test]
fn a_tunnel_carries_bytes_and_survives_new_routes() {
    let (mut gate, backend) = simple(&[]);
    let mut raw = Raw::connect(gate.http);
    raw.send("GET /socket HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly");
    let reply = raw.head();
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("upgrade").as_deref(), Some("echo"));
    assert_eq!(raw.take(5), b"early");
    gate.publish(&[]);
    gate.service("web", &[]);
    raw.send("after");
    assert_eq!(raw.take(5), b"after");
    let large = vec![7u8; 300_000];
    let mut writer = raw.stream.try_clone().unwrap();
    let sent = large.clone();
    let thread = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    assert_eq!(raw.take(large.len()), large);
    thread.join().unwrap();
    raw.stream.shutdown(Shutdown::Write).unwrap();
    assert!(raw.closed(), "the end of one side ends the other");
    assert_eq!(backend.seen(), 1);
}

#[test]
fn a_refused_upgrade_leaves_an_ordinary_connection() {
    let (gate, _backend) = simple(&[]);
    let mut raw = Raw::connect(gate.http);
    raw.send("GET /plain HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nGET /next HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(raw.reply().json()["headers"]["upgrade"], serde_json::json!(["echo"]));
    assert_eq!(raw.reply().json()["target"], "/next");
    // HTTP/2 by upgrade is not offered, and not passed on.
    raw.send("GET /h2c HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n");
    let reply = raw.reply().json();
    assert_eq!(reply["headers"]["upgrade"], serde_json::Value::Null);
    assert_eq!(reply["headers"]["http2-settings"], serde_json::Value::Null);
}

#[test]
fn a_body_is_asked_for_only_when_it_is_wanted() {
    let (gate, _backend) = simple(&[]);
    let mut raw = Raw::connect(gate.http);
    raw.send("POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(raw.head().status, 100);
    raw.send("hello");
    assert_eq!(raw.reply().json()["length"], 5);
    raw.send("POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5000000\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(raw.reply().status, 413, "too large: refused without having been sent");
}

/// A backend that answers as soon as it has seen the beginning of a request. It never reads the rest, and closes at once or stays open
/// until the process ends.
fn hasty(closes: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the process.
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 64]);
            if closes {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nearly");
            } else {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly");
                kept.push(stream);
            }
        }
    });
    address
}

#[test]
fn an_answer_before_the_end_of_the_upload_is_passed_on() {
    let (gate, _backend) = simple(&[]);
    gate.service("web", &[hasty(true)]);
    for n in 0..60 {
        let mut raw = Raw::connect(gate.http);
        let mut writer = raw.stream.try_clone().unwrap();
        let upload = std::thread::spawn(move || {
            let _ = writer.write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\n");
            // The gateway may close before all of it was written.
            let _ = writer.write_all(&[b'x'; 900_000]);
        });
        let reply = raw.reply();
        assert_eq!((reply.status, reply.body.as_slice()), (200, &b"early"[..]), "request {n}");
        drop(raw);
        upload.join().unwrap();
    }
}

#[test]
fn a_connection_is_not_used_again_after_an_answer_before_the_end_of_the_upload() {
    let (gate, _backend) = simple(&[]);
    gate.service("web", &[hasty(false)]);
    for n in 0..5 {
        let mut raw = Raw::connect(gate.http);
        raw.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\nbeginning");
        let reply = raw.reply();
        assert_eq!((reply.status, reply.body.as_slice()), (200, &b"early"[..]), "request {n}");
    }
}

#[test]
fn an_http2_answer_before_the_end_of_the_upload_is_seen() {
    let (mut gate, backend) = simple(&[]);
    gate.service("hasty", &[hasty(true)]);
    gate.publish(&[
        ingress("a", "nginx", "h", "/", "web", &[]),
        ingress("b", "nginx", "hasty", "/", "hasty", &[]),
        ingress("c", "nginx", "none", "/", "nothing", &[]),
    ]);
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, size: usize| {
        let path = directory.path().join(name);
        std::fs::write(&path, vec![b'x'; size]).unwrap();
        format!("@{}", path.display())
    };
    let (large, medium) = (file("large", 30_000_000), file("medium", 900_000));
    let body = directory.path().join("answer");
    let port = gate.https.port();
    let table = [
        ("h", &large, &[][..], "2 413"),
        ("h", &large, &["-H", "Content-Length:"][..], "2 413"),
        ("none", &large, &[][..], "2 503"),
        ("other", &large, &[][..], "2 404"),
        ("hasty", &medium, &[][..], "2 200"),
    ];
    for (host, data, more, expected) in table {
        for n in 0..10 {
            let resolve = format!("{host}:{port}:127.0.0.1");
            let url = format!("https://{host}:{port}/");
            let mut arguments = vec!["-k", "--resolve", &resolve, "-o", body.to_str().unwrap()];
            arguments.extend(["-w", "%{http_version} %{http_code}", "--data-binary", data, &url]);
            arguments.extend(more);
            assert_eq!(curl(&arguments), expected, "{host} {more:?}, request {n}");
            assert!(std::fs::metadata(&body).unwrap().len() > 0, "{host}: the answer is whole");
        }
    }
    // Without an announced length the backend sees the beginning of the upload, but nothing that it could answer.
    assert!(backend.seen() <= 10, "{}", backend.seen());
}
