//! Rows of the kinds that make Pods.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{INTEGER, Layout, STRING, age, labels, name, number, or_none, selector};
use crate::meta;

/// Names and images of the containers of a template.
fn containers(template: &Value) -> (String, String) {
    let list = meta::list(template, &["spec", "containers"]);
    let join = |field: &str| list.iter().map(|c| meta::text(c, &[field])).collect::<Vec<_>>().join(",");
    (join("name"), join("image"))
}

fn template_cells(object: &Value) -> [Value; 2] {
    let (names, images) = containers(meta::get(object, &["spec", "template"]));
    [json!(names), json!(images)]
}

pub(super) const DEPLOYMENT: Layout = (
    &[
        ("Name", STRING, 0),
        ("Ready", STRING, 0),
        ("Up-to-date", STRING, 0),
        ("Available", STRING, 0),
        ("Age", STRING, 0),
        ("Containers", STRING, 1),
        ("Images", STRING, 1),
        ("Selector", STRING, 1),
    ],
    deployment,
);

fn deployment(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object);
    vec![
        name(object),
        json!(ready_of(object)),
        json!(number(object, &["status", "updatedReplicas"])),
        json!(number(object, &["status", "availableReplicas"])),
        age(object, now),
        names,
        images,
        json!(selector(meta::get(object, &["spec", "selector"]))),
    ]
}

fn ready_of(object: &Value) -> String {
    format!("{}/{}", number(object, &["status", "readyReplicas"]), number(object, &["spec", "replicas"]))
}

pub(super) const REPLICA_SET: Layout = (
    &[
        ("Name", STRING, 0),
        ("Desired", INTEGER, 0),
        ("Current", INTEGER, 0),
        ("Ready", INTEGER, 0),
        ("Age", STRING, 0),
        ("Containers", STRING, 1),
        ("Images", STRING, 1),
        ("Selector", STRING, 1),
    ],
    replica_set,
);

fn replica_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object);
    // A ReplicationController has a plain map.
    let chosen = meta::get(object, &["spec", "selector"]);
    let plain = chosen.as_object().is_some_and(|map| map.values().all(Value::is_string) && !map.is_empty());
    vec![
        name(object),
        json!(number(object, &["spec", "replicas"])),
        json!(number(object, &["status", "replicas"])),
        json!(number(object, &["status", "readyReplicas"])),
        age(object, now),
        names,
        images,
        json!(if plain { labels(chosen) } else { selector(chosen) }),
    ]
}

pub(super) const STATEFUL_SET: Layout = (
    &[("Name", STRING, 0), ("Ready", STRING, 0), ("Age", STRING, 0), ("Containers", STRING, 1), ("Images", STRING, 1)],
    stateful_set,
);

fn stateful_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object);
    vec![name(object), json!(ready_of(object)), age(object, now), names, images]
}

pub(super) const DAEMON_SET: Layout = (
    &[
        ("Name", STRING, 0),
        ("Desired", INTEGER, 0),
        ("Current", INTEGER, 0),
        ("Ready", INTEGER, 0),
        ("Up-to-date", INTEGER, 0),
        ("Available", INTEGER, 0),
        ("Node Selector", STRING, 0),
        ("Age", STRING, 0),
        ("Containers", STRING, 1),
        ("Images", STRING, 1),
        ("Selector", STRING, 1),
    ],
    daemon_set,
);

fn daemon_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object);
    let status = |field: &str| json!(number(object, &["status", field]));
    vec![
        name(object),
        status("desiredNumberScheduled"),
        status("currentNumberScheduled"),
        status("numberReady"),
        status("updatedNumberScheduled"),
        status("numberAvailable"),
        json!(labels(meta::get(object, &["spec", "template", "spec", "nodeSelector"]))),
        age(object, now),
        names,
        images,
        json!(selector(meta::get(object, &["spec", "selector"]))),
    ]
}

pub(super) const CONTROLLER_REVISION: Layout = (
    &[("Name", STRING, 0), ("Controller", STRING, 0), ("Revision", STRING, 0), ("Age", STRING, 0)],
    controller_revision,
);

fn controller_revision(object: &Value, now: Timestamp) -> Vec<Value> {
    let controller = meta::list(object, &["metadata", "ownerReferences"])
        .iter()
        .find(|reference| meta::get(reference, &["controller"]) == true)
        .map_or_else(
            || "<none>".to_owned(),
            |reference| {
                let kind = meta::text(reference, &["kind"]).to_lowercase();
                let group = meta::text(reference, &["apiVersion"]).split_once('/').map_or("", |(group, _)| group);
                let dot = if group.is_empty() { "" } else { "." };
                format!("{kind}{dot}{group}/{}", meta::text(reference, &["name"]))
            },
        );
    vec![name(object), json!(controller), json!(number(object, &["revision"])), age(object, now)]
}

pub(super) const JOB: Layout = (
    &[
        ("Name", STRING, 0),
        ("Status", STRING, 0),
        ("Completions", STRING, 0),
        ("Duration", STRING, 0),
        ("Age", STRING, 0),
        ("Containers", STRING, 1),
        ("Images", STRING, 1),
        ("Selector", STRING, 1),
    ],
    job,
);

fn job(object: &Value, now: Timestamp) -> Vec<Value> {
    let has = |type_: &str| {
        meta::list(object, &["status", "conditions"])
            .iter()
            .any(|c| meta::text(c, &["type"]) == type_ && meta::text(c, &["status"]) == "True")
    };
    let status = if has("Complete") {
        "Complete"
    } else if has("Failed") {
        "Failed"
    } else if meta::is_deleting(object) {
        "Terminating"
    } else if has("Suspended") {
        "Suspended"
    } else if has("FailureTarget") {
        "FailureTarget"
    } else if has("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    };
    let done = number(object, &["status", "succeeded"]);
    let completions = match meta::get(object, &["spec", "completions"]).as_i64() {
        Some(wanted) => format!("{done}/{wanted}"),
        None => match number(object, &["spec", "parallelism"]) {
            ..=1 => format!("{done}/1"),
            parallel => format!("{done}/1 of {parallel}"),
        },
    };
    let started = meta::parse_time(meta::text(object, &["status", "startTime"]));
    let ended = meta::parse_time(meta::text(object, &["status", "completionTime"]));
    let duration = started.map_or_else(String::new, |at| {
        meta::human_duration(ended.unwrap_or(now).as_second().saturating_sub(at.as_second()))
    });
    let [names, images] = template_cells(object);
    vec![
        name(object),
        json!(status),
        json!(completions),
        json!(duration),
        age(object, now),
        names,
        images,
        json!(selector(meta::get(object, &["spec", "selector"]))),
    ]
}

pub(super) const CRON_JOB: Layout = (
    &[
        ("Name", STRING, 0),
        ("Schedule", STRING, 0),
        ("Timezone", STRING, 0),
        ("Suspend", "boolean", 0),
        ("Active", INTEGER, 0),
        ("Last Schedule", STRING, 0),
        ("Age", STRING, 0),
        ("Containers", STRING, 1),
        ("Images", STRING, 1),
        ("Selector", STRING, 1),
    ],
    cron_job,
);

fn cron_job(object: &Value, now: Timestamp) -> Vec<Value> {
    let last = match meta::text(object, &["status", "lastScheduleTime"]) {
        "" => "<none>".to_owned(),
        at => meta::age(at, now),
    };
    let job = meta::get(object, &["spec", "jobTemplate", "spec"]);
    let (names, images) = containers(meta::get(job, &["template"]));
    vec![
        name(object),
        json!(meta::text(object, &["spec", "schedule"])),
        json!(or_none(meta::text(object, &["spec", "timeZone"]))),
        json!(if meta::get(object, &["spec", "suspend"]) == true { "True" } else { "False" }),
        json!(meta::list(object, &["status", "active"]).len()),
        json!(last),
        age(object, now),
        json!(names),
        json!(images),
        json!(selector(meta::get(job, &["selector"]))),
    ]
}

pub(super) const DISRUPTION_BUDGET: Layout = (
    &[
        ("Name", STRING, 0),
        ("Min Available", STRING, 0),
        ("Max Unavailable", STRING, 0),
        ("Allowed Disruptions", INTEGER, 0),
        ("Age", STRING, 0),
    ],
    disruption_budget,
);

fn disruption_budget(object: &Value, now: Timestamp) -> Vec<Value> {
    let amount = |field: &str| match meta::get(object, &["spec", field]) {
        Value::Null => json!("N/A"),
        Value::String(text) => json!(text),
        other => json!(other.to_string()),
    };
    vec![
        name(object),
        amount("minAvailable"),
        amount("maxUnavailable"),
        json!(number(object, &["status", "disruptionsAllowed"])),
        age(object, now),
    ]
}

pub(super) const AUTOSCALER: Layout = (
    &[
        ("Name", STRING, 0),
        ("Reference", STRING, 0),
        ("MinPods", STRING, 0),
        ("MaxPods", STRING, 0),
        ("Replicas", STRING, 0),
        ("Age", STRING, 0),
    ],
    autoscaler,
);

fn autoscaler(object: &Value, now: Timestamp) -> Vec<Value> {
    let target = meta::get(object, &["spec", "scaleTargetRef"]);
    let least = meta::get(object, &["spec", "minReplicas"]).as_i64().map_or("<unset>".to_owned(), |n| n.to_string());
    vec![
        name(object),
        json!(format!("{}/{}", meta::text(target, &["kind"]), meta::text(target, &["name"]))),
        json!(least),
        json!(number(object, &["spec", "maxReplicas"])),
        json!(number(object, &["status", "currentReplicas"])),
        age(object, now),
    ]
}

pub(super) const POD_TEMPLATE: Layout =
    (&[("Name", STRING, 0), ("Containers", STRING, 0), ("Images", STRING, 0), ("Pod Labels", STRING, 0)], pod_template);

fn pod_template(object: &Value, _now: Timestamp) -> Vec<Value> {
    let template = meta::get(object, &["template"]);
    let (names, images) = containers(template);
    vec![name(object), json!(names), json!(images), json!(labels(meta::get(template, &["metadata", "labels"])))]
}
