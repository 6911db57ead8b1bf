//! `kill -9` in the middle of writes.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use portolan_apiserver::store::{Key, Store};
use portolan_apiserver::{Durability, Server, ServerConfig, User};
use serde_json::{Value, json};

/// Set in the process that is to be killed: the data directory.
const VICTIM: &str = "PORTOLAN_CRASH_TEST_DIR";

/// Not a test of its own: with [`VICTIM`] set this process becomes the server that is killed. It writes ConfigMaps as
/// fast as it can from several tasks and says after each acknowledgement what has been acknowledged.
#[test]
fn victim() {
    let Ok(directory) = std::env::var(VICTIM) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(async {
        let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
        config.data_dir = Some(directory.into());
        let server = Arc::new(Server::start(config).await.expect("a server"));
        let tasks: Vec<_> = (0..4).map(|task| tokio::spawn(write(server.clone(), task))).collect();
        for task in tasks {
            task.await.expect("a writer");
        }
    });
}

async fn write(server: Arc<Server>, task: u32) {
    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Full};
    use tower::Service as _;
    let mut service = server.local_service(User::admin());
    for n in 0_u64.. {
        let name = format!("t{task}-{}", n % 16);
        let body =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"n": n.to_string()}});
        let (method, path) = if n < 16 {
            ("POST", "/api/v1/namespaces/default/configmaps".to_owned())
        } else {
            ("PUT", format!("/api/v1/namespaces/default/configmaps/{name}"))
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request");
        let response = service.call(request).await.expect("local");
        let success = response.status().is_success() || (n < 16 && response.status().as_u16() == 409);
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        let answer: Value = serde_json::from_slice(&bytes).expect("json");
        assert!(success, "{answer}");
        if answer["kind"] == "ConfigMap" {
            let revision = answer["metadata"]["resourceVersion"].as_str().expect("a revision");
            // One write for a line: whole or not there.
            println!("ACK {name} {n} {revision}");
        }
    }
}

/// Kills its process and removes the directory also when the test fails.
struct Victim {
    child: Child,
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Directory(std::path::PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a victim until it has acknowledged `count` writes, kills it, and returns what was acknowledged: number and
/// revision by name, and the highest revision.
fn run_and_kill(directory: &Path, count: usize) -> (BTreeMap<String, (u64, u64)>, u64) {
    let program = std::env::current_exe().expect("the test program");
    let child = Command::new(program)
        .args(["crash::victim", "--exact", "--nocapture", "--test-threads=1"])
        .env(VICTIM, directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("a process");
    let mut victim = Victim { child };
    let mut lines = BufReader::new(victim.child.stdout.take().expect("a pipe")).lines();
    let mut acknowledged = BTreeMap::new();
    let mut last = 0;
    let mut seen = 0;
    let mut killed = false;
    // After the kill the pipe still holds lines: they were acknowledged too.
    while let Some(Ok(line)) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(at) = words.iter().position(|word| *word == "ACK") else { continue };
        let [name, n, revision] = words[at + 1..] else { continue };
        let (n, revision): (u64, u64) = (n.parse().expect("a number"), revision.parse().expect("a revision"));
        acknowledged.insert(name.to_owned(), (n, revision));
        last = last.max(revision);
        seen += 1;
        if seen >= count && !killed {
            victim.child.kill().expect("killed");
            killed = true;
        }
    }
    assert!(killed, "the victim ended by itself after {seen} writes");
    (acknowledged, last)
}

#[test]
fn nothing_acknowledged_is_lost_and_watchers_resume() {
    let directory = Directory(std::env::temp_dir().join(format!("portolan-crash-{}", uuid::Uuid::new_v4())));
    std::fs::create_dir_all(&directory.0).expect("directory");
    let mut highest = 0;
    for round in 0..4 {
        let (acknowledged, last) = run_and_kill(&directory.0, 60 + 40 * round);
        assert!(last > highest, "round {round}: the revision went back");
        let store = Store::open(&directory.0.join("store.redb"), Durability::Synced).expect("the store opens");
        let snapshot = store.snapshot();
        assert!(snapshot.revision >= last, "round {round}");
        highest = snapshot.revision;
        for (name, (n, revision)) in &acknowledged {
            let object = snapshot.get("configmaps", &Key::new("default", name)).expect("it was acknowledged");
            // A later write may have reached the disk without its acknowledgement.
            assert!(object.revision >= *revision, "round {round}: {name} is older than acknowledged");
            let stored: u64 = object.value["data"]["n"].as_str().expect("text").parse().expect("a number");
            assert!(stored >= *n || object.revision > *revision, "round {round}: {name}");
        }
        // A client that saw the middle of the writes goes on from there without a relist.
        let middle = acknowledged.values().map(|(_, revision)| *revision).min().expect("some");
        let mut watcher = store.watch("configmaps", middle).expect("the history is kept");
        let revisions: Vec<u64> = watcher.read().expect("kept").iter().map(|event| event.object.revision).collect();
        assert!(revisions.is_sorted_by(|a, b| a < b));
        for (_, revision) in acknowledged.values() {
            assert!(*revision <= middle || revisions.contains(revision), "round {round}: {revision} is missing");
        }
    }
}
