//! Rows of Pods: the STATUS column is what people look at, so it follows kubectl's own reading of container states.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Layout, STRING, age, name, or_none};
use crate::meta;

pub(super) const POD: Layout = (
    &[
        ("Name", STRING, 0),
        ("Ready", STRING, 0),
        ("Status", STRING, 0),
        ("Restarts", STRING, 0),
        ("Age", STRING, 0),
        ("IP", STRING, 1),
        ("Node", STRING, 1),
        ("Nominated Node", STRING, 1),
        ("Readiness Gates", STRING, 1),
    ],
    cells,
);

fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summarize(pod);
    let restarts = match summary.last_restart {
        Some(at) if summary.restarts != 0 => {
            format!("{} ({} ago)", summary.restarts, meta::age(&meta::format_time(at), now))
        }
        _ => summary.restarts.to_string(),
    };
    let ip = match meta::list(pod, &["status", "podIPs"]).first() {
        Some(first) => meta::text(first, &["ip"]),
        None => meta::text(pod, &["status", "podIP"]),
    };
    let gates = meta::list(pod, &["spec", "readinessGates"]);
    let met = gates.iter().filter(|gate| condition_is_true(pod, meta::text(gate, &["conditionType"]))).count();
    let gates = if gates.is_empty() { "<none>".to_owned() } else { format!("{met}/{}", gates.len()) };
    vec![
        name(pod),
        json!(format!("{}/{}", summary.ready, summary.total)),
        json!(summary.status),
        json!(restarts),
        age(pod, now),
        json!(or_none(ip)),
        json!(or_none(meta::text(pod, &["spec", "nodeName"]))),
        json!(or_none(meta::text(pod, &["status", "nominatedNodeName"]))),
        json!(gates),
    ]
}

/// The row condition of a finished Pod.
pub(super) fn conditions(pod: &Value) -> Vec<Value> {
    let message = match meta::text(pod, &["status", "phase"]) {
        "Succeeded" => "The pod has completed successfully.",
        "Failed" => "The pod failed.",
        _ => return Vec::new(),
    };
    let reason = meta::text(pod, &["status", "phase"]);
    vec![json!({ "type": "Completed", "status": "True", "reason": reason, "message": message })]
}

struct Summary {
    status: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

fn condition_is_true(pod: &Value, type_: &str) -> bool {
    meta::list(pod, &["status", "conditions"])
        .iter()
        .any(|c| meta::text(c, &["type"]) == type_ && meta::text(c, &["status"]) == "True")
}

/// When a container last ended before its present run.
fn last_end(status: &Value) -> Option<Timestamp> {
    meta::parse_time(meta::text(status, &["lastState", "terminated", "finishedAt"]))
}

/// `ExitCode:n` or `Signal:n`, for a terminated container without a reason.
fn exit_text(terminated: &Value) -> String {
    match meta::get(terminated, &["signal"]).as_i64().unwrap_or(0) {
        0 => format!("ExitCode:{}", meta::get(terminated, &["exitCode"]).as_i64().unwrap_or(0)),
        signal => format!("Signal:{signal}"),
    }
}

fn summarize(pod: &Value) -> Summary {
    let inits = meta::list(pod, &["spec", "initContainers"]);
    let is_sidecar = |name: &str| {
        inits.iter().any(|c| meta::text(c, &["name"]) == name && meta::text(c, &["restartPolicy"]) == "Always")
    };
    let sidecars = inits.iter().filter(|c| meta::text(c, &["restartPolicy"]) == "Always").count();
    let total = meta::list(pod, &["spec", "containers"]).len() + sidecars;
    let phase = meta::text(pod, &["status", "phase"]);
    let mut status = match meta::text(pod, &["status", "reason"]) {
        "" => phase.to_owned(),
        reason => reason.to_owned(),
    };
    let gated = meta::list(pod, &["status", "conditions"])
        .iter()
        .any(|c| meta::text(c, &["type"]) == "PodScheduled" && meta::text(c, &["reason"]) == "SchedulingGated");
    if gated {
        status = "SchedulingGated".to_owned();
    }

    let (mut ready, mut restarts, mut last_restart) = (0, 0, None);
    let (mut sidecar_restarts, mut sidecar_last) = (0, None);
    let mut initializing = false;
    for (i, container) in meta::list(pod, &["status", "initContainerStatuses"]).iter().enumerate() {
        let count = meta::get(container, &["restartCount"]).as_i64().unwrap_or(0);
        let sidecar = is_sidecar(meta::text(container, &["name"]));
        restarts += count;
        last_restart = last_restart.max(last_end(container));
        if sidecar {
            sidecar_restarts += count;
            sidecar_last = sidecar_last.max(last_end(container));
        }
        let terminated = meta::get(container, &["state", "terminated"]);
        let waiting = meta::text(container, &["state", "waiting", "reason"]);
        let exit_code = meta::get(terminated, &["exitCode"]).as_i64().unwrap_or(0);
        if !terminated.is_null() && exit_code == 0 {
            continue;
        }
        if sidecar && meta::get(container, &["started"]) == true {
            ready += usize::from(meta::get(container, &["ready"]) == true);
            continue;
        }
        status = if !terminated.is_null() {
            match meta::text(terminated, &["reason"]) {
                "" => format!("Init:{}", exit_text(terminated)),
                reason => format!("Init:{reason}"),
            }
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{i}/{}", inits.len())
        };
        initializing = true;
        break;
    }

    if !initializing || condition_is_true(pod, "Initialized") {
        (restarts, last_restart) = (sidecar_restarts, sidecar_last);
        let mut running = false;
        let mut failure: Option<String> = None;
        for container in meta::list(pod, &["status", "containerStatuses"]).iter().rev() {
            restarts += meta::get(container, &["restartCount"]).as_i64().unwrap_or(0);
            last_restart = last_restart.max(last_end(container));
            let terminated = meta::get(container, &["state", "terminated"]);
            let waiting = meta::text(container, &["state", "waiting", "reason"]);
            if !waiting.is_empty() {
                status = waiting.to_owned();
            } else if !terminated.is_null() {
                status = match meta::text(terminated, &["reason"]) {
                    "" => exit_text(terminated),
                    reason => reason.to_owned(),
                };
                if meta::get(terminated, &["exitCode"]).as_i64().unwrap_or(0) != 0 {
                    failure = Some(status.clone());
                }
            } else if meta::get(container, &["ready"]) == true && !meta::get(container, &["state", "running"]).is_null()
            {
                running = true;
                ready += 1;
            }
        }
        if status == "Completed" {
            status = match (running, failure) {
                (true, _) if condition_is_true(pod, "Ready") => "Running".to_owned(),
                (_, Some(failure)) => failure,
                (true, None) => "NotReady".to_owned(),
                (false, None) => status,
            };
        }
    }

    if meta::is_deleting(pod) {
        if meta::text(pod, &["status", "reason"]) == "NodeLost" {
            status = "Unknown".to_owned();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            status = "Terminating".to_owned();
        }
    }
    Summary { status, ready, total, restarts, last_restart }
}

#[cfg(test)]
mod tests {
    use super::super::tests::cells;
    use serde_json::{Value, json};

    fn status_of(spec: Value, status: Value) -> String {
        let text = cells("", "pods", json!({"metadata": {"name": "a"}, "spec": spec, "status": status}));
        text.split(" | ").skip(1).take(3).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_status_of_a_pod_reads_as_kubectl_prints_it() {
        let one = json!({"containers": [{"name": "c"}]});
        let two_inits = json!({"containers": [{"name": "c"}], "initContainers": [{"name": "i"}, {"name": "j"}]});
        let running = json!({"name": "c", "ready": true, "restartCount": 0, "state": {"running": {}}});
        let rows = [
            ("a_phase_alone", one.clone(), json!({"phase": "Pending"}), "0/1 Pending 0"),
            ("running", one.clone(), json!({"phase": "Running", "containerStatuses": [running]}), "1/1 Running 0"),
            (
                "a_waiting_reason_wins",
                one.clone(),
                json!({"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ErrImageNeverPull"}}}]}),
                "0/1 ErrImageNeverPull 0",
            ),
            (
                "a_restart_tells_when",
                one.clone(),
                json!({"phase": "Running", "containerStatuses": [{"ready": true, "restartCount": 2, "state": {"running": {}},
                    "lastState": {"terminated": {"finishedAt": "2026-01-01T23:55:00Z"}}}]}),
                "1/1 Running 2 (5m ago)",
            ),
            (
                "the_first_init_container_has_not_run",
                two_inits.clone(),
                json!({"phase": "Pending", "initContainerStatuses": [
                    {"name": "i", "state": {"waiting": {"reason": "PodInitializing"}}}, {"name": "j", "state": {}}]}),
                "0/1 Init:0/2 0",
            ),
            (
                "the_second_init_container_fails",
                two_inits.clone(),
                json!({"phase": "Pending", "initContainerStatuses": [
                    {"name": "i", "state": {"terminated": {"exitCode": 0}}},
                    {"name": "j", "restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
                "0/1 Init:CrashLoopBackOff 4",
            ),
            (
                "an_init_container_is_killed",
                two_inits,
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 137, "signal": 9}}}]}),
                "0/1 Init:Signal:9 0",
            ),
            (
                "a_failed_container_wins_over_a_completed_one",
                json!({"containers": [{"name": "c"}, {"name": "d"}]}),
                json!({"phase": "Failed", "containerStatuses": [
                    {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
                    {"state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]}),
                "0/2 Error 0",
            ),
        ];
        for (name, spec, status, want) in rows {
            assert_eq!(status_of(spec, status), want, "{name}");
        }
    }

    #[test]
    fn a_pod_being_deleted_is_terminating_unless_it_has_ended() {
        let pod = |phase: &str, reason: &str| {
            let text = cells(
                "",
                "pods",
                json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": phase, "reason": reason}}),
            );
            text.split(" | ").nth(2).unwrap_or_default().to_owned()
        };
        assert_eq!(pod("Running", ""), "Terminating");
        assert_eq!(pod("Running", "NodeLost"), "Unknown");
        assert_eq!(pod("Succeeded", ""), "Succeeded");
    }
}
