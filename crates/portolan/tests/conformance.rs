//! Replays recorded API conversations against the real binary and compares with the list of cases known to fail.
//!
//! The list may only shrink: a listed case that passes fails the test until it is taken off the list.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// An API server of the test's own; killed when dropped.
struct Server {
    child: Child,
    url: String,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(ranges: &str, arguments: &[&str]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
        command.args(["apiserver", "--listen", "127.0.0.1:0", "--service-cluster-ip-range", ranges]);
        command.arg("--credentials-out").arg(dir.path());
        command.args(["--advertise-address", "203.0.113.10:6443"]).args(arguments);
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().to_string();
        if !url.starts_with("https://") {
            let _ = child.kill();
            panic!("apiserver did not start: {line:?} {}", fs::read_to_string(dir.path().join("log")).unwrap());
        }
        Server { child, url, dir }
    }

    fn replay(&self, golden: &Path, file: &str, concerns: fn(&str) -> bool) -> Outcome {
        let cases = fs::read_to_string(golden.join(format!("{file}.jsonl"))).unwrap();
        let id_of =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_string();
        let cases: Vec<(String, String)> = cases
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| (id_of(line), patient(&line.replace(SELECTOR_REMOVED, &selector_removal_seen()))))
            .filter(|(id, _)| concerns(id))
            .collect();
        let path = self.dir.path().join(format!("{file}.jsonl"));
        fs::write(&path, cases.iter().map(|(_, line)| format!("{line}\n")).collect::<String>()).unwrap();
        let credential = |name: &str| self.dir.path().join(name);
        let output = Command::new("python3")
            .arg(golden.join("golden.py"))
            .args(["replay", "--server", &self.url])
            .arg("--ca")
            .arg(credential("ca.crt"))
            .arg("--token")
            .arg(fs::read_to_string(credential("token")).unwrap())
            .arg(&path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let failed: BTreeSet<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("FAIL ")?.split_once(':').map(|(id, _)| id.to_string()))
            .collect();
        let all: BTreeSet<String> = cases.into_iter().map(|(id, _)| id).collect();
        let summary = format!("{} passed, {} failed", all.len() - failed.len(), failed.len());
        assert!(
            text.lines().any(|line| line == summary),
            "the replayer did not finish {file}: {text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Outcome { all, failed, text }
    }
}

/// How long a step is repeated until the answer is as recorded, in seconds. The recordings say how long the reference took on a
/// machine with nothing else to do.
const PATIENCE: f64 = 30.0;

/// A case whose waiting steps allow for a busy machine. Changed as text: the order of fields in the bodies matters.
fn patient(case: &str) -> String {
    const WAIT: &str = "\"wait\": ";
    let mut pieces = case.split(WAIT);
    let mut text = pieces.next().unwrap().to_string();
    let mut changed = 0;
    for piece in pieces {
        let (seconds, rest) = piece.split_at(piece.find([',', '}']).unwrap());
        text += &format!("{WAIT}{}{rest}", seconds.parse::<f64>().unwrap().max(PATIENCE));
        changed += 1;
    }
    let case: serde_json::Value = serde_json::from_str(&text).unwrap();
    let waiting = case["steps"].as_array().unwrap().iter().filter(|step| step.get("wait").is_some()).count();
    assert_eq!(changed, waiting, "a step waits, nothing else does: {}", case["id"]);
    text
}

/// A step that takes the selector of a Service away and is followed by a change of a pod. The endpoint controllers see Services
/// and pods through two watches, which are not in step (in Kubernetes neither), and the recording holds what comes out when the
/// Service is seen first.
const SELECTOR_REMOVED: &str = r#""body": {"spec": {"selector": null}}, "expect": {"status": 200}}, {"method": "PATCH", "path": "/api/v1/namespaces/{ns}/pods/"#;

/// The same with a step between the two that waits for what only a controller that has seen the Service makes: a mirror of its
/// Endpoints.
fn selector_removal_seen() -> String {
    let (first, second) = SELECTOR_REMOVED.split_at(SELECTOR_REMOVED.rfind("{\"method\"").unwrap());
    let mirrors = "endpointslice.kubernetes.io/managed-by%3Dendpointslicemirroring-controller.k8s.io";
    let step = serde_json::json!({"method": "GET", "expect": {"status": 200, "body": {"items": [{}]}},
        "path": format!("/apis/discovery.k8s.io/v1/namespaces/{{ns}}/endpointslices?labelSelector={mirrors}")});
    // As text, to be found by [`patient`].
    let step = step.to_string().replacen('{', "{\"wait\": 1, ", 1);
    format!("{first}{step}, {second}")
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Outcome {
    all: BTreeSet<String>,
    failed: BTreeSet<String>,
    text: String,
}

fn check(ranges: &str, arguments: &[&str], files: &[&str]) {
    check_some(ranges, arguments, files, |_| true);
}

/// Like [`check`], for the cases whose ids `concerns` picks.
fn check_some(ranges: &str, arguments: &[&str], files: &[&str], concerns: fn(&str) -> bool) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../conformance");
    let server = Server::start(ranges, arguments);
    let mut wrong = Vec::new();
    for file in files {
        let outcome = server.replay(&root.join("golden"), file, concerns);
        let list = root.join(format!("known-failing/{file}.txt"));
        if std::env::var_os("PORTOLAN_RECORD_FAILING").is_some() {
            let lines: String = outcome.failed.iter().map(|id| format!("{id}\n")).collect();
            if lines.is_empty() { drop(fs::remove_file(&list)) } else { fs::write(&list, lines).unwrap() }
        }
        let known: BTreeSet<String> = fs::read_to_string(&list)
            .unwrap_or_default()
            .lines()
            .map(str::to_string)
            .filter(|l| !l.is_empty() && concerns(l))
            .collect();
        println!("{file}: {} of {} pass", outcome.all.len() - outcome.failed.len(), outcome.all.len());
        for id in outcome.failed.difference(&known) {
            let line = outcome.text.lines().find(|l| l.starts_with(&format!("FAIL {id}:"))).unwrap_or_default();
            wrong.push(format!("{file}: {}", &line[..line.len().min(600)]));
        }
        for id in known.difference(&outcome.failed) {
            wrong.push(if outcome.all.contains(id) {
                format!("{file}: {id} passes now: take it off {}", list.display())
            } else {
                format!("{file}: {id} in {} is no case", list.display())
            });
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const SINGLE: &str = "10.96.0.0/12";
const DUAL: &str = "10.96.0.0/12,fd00:10:96::/108";

/// The recordings of an API server alone made pods without ServiceAccounts.
const ALONE: &[&str] = &["--disable-admission-plugins=ServiceAccount"];
/// With controllers; pods of the recordings are bare objects that nobody schedules or runs.
const CONTROLLERS: &[&str] =
    &["--controllers=*,-scheduler,-pod-garbage-collector-controller", "--disable-admission-plugins=ServiceAccount"];
#[test]
fn api_server_answers_as_recorded() {
    check(SINGLE, ALONE, &["api-apply", "api-objects", "api-patch", "api-tables", "crd"]);
}

#[test]
fn services_are_allocated_as_recorded() {
    check(SINGLE, ALONE, &["services", "servicecidr", "endpoints"]);
}

#[test]
fn single_stack_services_are_allocated_as_recorded() {
    check(SINGLE, &[], &["services-singlestack"]);
}

#[test]
fn dual_stack_services_are_allocated_as_recorded() {
    check(DUAL, ALONE, &["services-dualstack"]);
}

/// These were recorded with controllers, unlike the rest of their file.
fn by_controllers(id: &str) -> bool {
    id.starts_with("api-delete-gc-")
}

#[test]
fn objects_live_as_recorded() {
    check_some(SINGLE, ALONE, &["api-core"], |id| !by_controllers(id));
}

#[test]
fn deleted_objects_take_others_along_as_recorded() {
    check_some(SINGLE, CONTROLLERS, &["api-core"], by_controllers);
}

#[test]
fn endpoints_are_kept_as_recorded() {
    check(DUAL, CONTROLLERS, &["endpointslices", "endpoints-controller", "mirroring", "gc"]);
}

#[test]
fn workloads_run_as_recorded() {
    check(DUAL, CONTROLLERS, &["workloads"]);
}
