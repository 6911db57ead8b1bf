//! Rules of the kinds that make Pods.

use serde_json::{Value, json};

use super::{Faults, metadata, pod, same, selector_text};
use crate::meta;
use crate::selector::LabelSelector;
use crate::status::FieldError;

fn spec<'a>(object: &'a Value, field: &str) -> &'a Value {
    meta::get(object, &["spec", field])
}

/// A selector that must be there and not be empty.
fn selector(faults: &mut Faults, object: &Value, what: &str) {
    let selector = spec(object, "selector");
    if selector.is_null() {
        faults.required("spec.selector", "");
        return;
    }
    faults.label_selector("spec.selector", selector);
    if same(selector, &Value::Null) {
        let text = format!("empty selector is invalid for {what}");
        faults.add(FieldError::invalid_text("spec.selector", selector_text(selector), text));
    }
}

/// A template whose labels the selector must match and whose Pods are restarted for ever.
fn template(faults: &mut Faults, object: &Value) {
    let selector = spec(object, "selector");
    let labels = meta::get(object, &["spec", "template", "metadata", "labels"]);
    let matches = match LabelSelector::from_object(selector) {
        // A malformed selector has been reported already.
        None => true,
        Some(_) if selector.is_null() => false,
        Some(selector) => selector.matches_labels(labels),
    };
    if !matches {
        let field = "spec.template.metadata.labels";
        faults.invalid(field, labels.clone(), "`selector` does not match template `labels`");
    }
    pod_template_spec(faults, "spec.template", spec(object, "template"));
    always(faults, object);
}

fn always(faults: &mut Faults, object: &Value) {
    let pod = meta::get(object, &["spec", "template", "spec"]);
    let policy = meta::text(pod, &["restartPolicy"]);
    if matches!(policy, "OnFailure" | "Never") {
        faults.one_of("spec.template.spec.restartPolicy", policy, &["Always"]);
    }
    if !meta::get(pod, &["activeDeadlineSeconds"]).is_null() {
        let text = format!("activeDeadlineSeconds in {} is not Supported", meta::text(object, &["kind"]));
        faults.forbidden("spec.template.spec.activeDeadlineSeconds", text);
    }
}

fn pod_template_spec(faults: &mut Faults, field: &str, template: &Value) {
    faults.labels(&format!("{field}.labels"), meta::get(template, &["metadata", "labels"]));
    metadata::annotations(faults, &format!("{field}.annotations"), meta::get(template, &["metadata", "annotations"]));
    pod::pod_spec(faults, &format!("{field}.spec"), meta::get(template, &["spec"]));
    if !meta::list(template, &["spec", "ephemeralContainers"]).is_empty() {
        let text = "ephemeral containers not allowed in pod template";
        faults.forbidden(format!("{field}.spec.ephemeralContainers"), text);
    }
}

/// A PodTemplate object.
pub(super) fn pod_template(faults: &mut Faults, new: &Value) {
    pod_template_spec(faults, "template", meta::get(new, &["template"]));
}

/// A Deployment.
pub(super) fn deployment(faults: &mut Faults, new: &Value) {
    faults.non_negative("spec.replicas", spec(new, "replicas"));
    selector(faults, new, "deployment");
    template(faults, new);
    strategy(faults, "spec.strategy", spec(new, "strategy"));
    faults.non_negative("spec.minReadySeconds", spec(new, "minReadySeconds"));
    faults.non_negative("spec.revisionHistoryLimit", spec(new, "revisionHistoryLimit"));
    let deadline = spec(new, "progressDeadlineSeconds");
    faults.non_negative("spec.progressDeadlineSeconds", deadline);
    if let Some(deadline) = deadline.as_i64()
        && deadline <= spec(new, "minReadySeconds").as_i64().unwrap_or(0)
    {
        faults.invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds");
    }
}

fn strategy(faults: &mut Faults, field: &str, strategy: &Value) {
    let rolling = meta::get(strategy, &["rollingUpdate"]);
    match meta::text(strategy, &["type"]) {
        "Recreate" => {
            if !rolling.is_null() {
                let text = "may not be specified when strategy `type` is 'Recreate'";
                faults.forbidden(format!("{field}.rollingUpdate"), text);
            }
        }
        "RollingUpdate" => {
            if rolling.is_null() {
                faults.required(format!("{field}.rollingUpdate"), "this should be defaulted and never be nil");
            } else {
                rolling_update(faults, &format!("{field}.rollingUpdate"), rolling);
            }
        }
        other => {
            let text = format!("{{\"Type\":{},\"RollingUpdate\":{rolling}}}", json!(other));
            let detail = "supported values: \"Recreate\", \"RollingUpdate\"".to_owned();
            faults.add(FieldError { field: field.to_owned(), fault: crate::status::Fault::NotSupported(text), detail });
        }
    }
}

fn rolling_update(faults: &mut Faults, field: &str, rolling: &Value) {
    let (surge, unavailable) = (meta::get(rolling, &["maxSurge"]), meta::get(rolling, &["maxUnavailable"]));
    int_or_percent(faults, &format!("{field}.maxUnavailable"), unavailable);
    int_or_percent(faults, &format!("{field}.maxSurge"), surge);
    if is_zero(unavailable) && is_zero(surge) {
        let text = "may not be 0 when `maxSurge` is 0";
        faults.invalid(format!("{field}.maxUnavailable"), unavailable.clone(), text);
    }
    at_most_all(faults, &format!("{field}.maxUnavailable"), unavailable);
}

fn int_or_percent(faults: &mut Faults, field: &str, value: &Value) {
    match value {
        Value::String(text) => faults.syntax(field, text, meta::percent(text)),
        other => faults.non_negative(field, other),
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(text) => text.trim_end_matches('%').trim_start_matches('0').is_empty() && text.ends_with('%'),
        other => other.as_i64().unwrap_or(0) == 0,
    }
}

fn at_most_all(faults: &mut Faults, field: &str, value: &Value) {
    if let Some(percent) = value.as_str().and_then(|text| text.strip_suffix('%')?.parse::<u64>().ok())
        && percent > 100
    {
        faults.invalid(field, value.clone(), "must not be greater than 100%");
    }
}

/// A ReplicaSet.
pub(super) fn replica_set(faults: &mut Faults, new: &Value) {
    faults.non_negative("spec.replicas", spec(new, "replicas"));
    faults.non_negative("spec.minReadySeconds", spec(new, "minReadySeconds"));
    selector(faults, new, "deployment");
    template(faults, new);
}

/// A ReplicationController.
pub(super) fn replication_controller(faults: &mut Faults, new: &Value) {
    faults.non_negative("spec.minReadySeconds", spec(new, "minReadySeconds"));
    let selector = spec(new, "selector");
    if same(selector, &Value::Null) {
        faults.required("spec.selector", "");
    }
    faults.non_negative("spec.replicas", spec(new, "replicas"));
    if spec(new, "template").is_null() {
        faults.required("spec.template", "");
        return;
    }
    let labels = meta::get(new, &["spec", "template", "metadata", "labels"]);
    if !LabelSelector::from_map(selector).matches_labels(labels) {
        let text = "`selector` does not match template `labels`";
        faults.invalid("spec.template.metadata.labels", labels.clone(), text);
    }
    pod_template_spec(faults, "spec.template", spec(new, "template"));
    always(faults, new);
}

/// A StatefulSet.
pub(super) fn stateful_set(faults: &mut Faults, new: &Value) {
    match meta::text(new, &["spec", "podManagementPolicy"]) {
        "" => faults.required("spec.podManagementPolicy", ""),
        "OrderedReady" | "Parallel" => {}
        other => faults.invalid("spec.podManagementPolicy", other, "must be 'OrderedReady' or 'Parallel'"),
    }
    let rolling = meta::get(new, &["spec", "updateStrategy", "rollingUpdate"]);
    match meta::text(new, &["spec", "updateStrategy", "type"]) {
        "" => faults.required("spec.updateStrategy", ""),
        "OnDelete" => {
            if !rolling.is_null() {
                let text = "only allowed for updateStrategy 'RollingUpdate'";
                faults.invalid("spec.updateStrategy.rollingUpdate", rolling.clone(), text);
            }
        }
        "RollingUpdate" => {
            let field = "spec.updateStrategy.rollingUpdate";
            faults.non_negative(format!("{field}.partition"), meta::get(rolling, &["partition"]));
            let unavailable = meta::get(rolling, &["maxUnavailable"]);
            int_or_percent(faults, &format!("{field}.maxUnavailable"), unavailable);
            at_most_all(faults, &format!("{field}.maxUnavailable"), unavailable);
        }
        other => faults.invalid("spec.updateStrategy", other, "must be 'RollingUpdate' or 'OnDelete'"),
    }
    for part in ["whenDeleted", "whenScaled"] {
        if let Some(policy) = meta::get(new, &["spec", "persistentVolumeClaimRetentionPolicy", part]).as_str() {
            let field = format!("spec.persistentVolumeClaimRetentionPolicy.{part}");
            faults.one_of(field, policy, &["Delete", "Retain"]);
        }
    }
    faults.non_negative("spec.replicas", spec(new, "replicas"));
    faults.non_negative("spec.minReadySeconds", spec(new, "minReadySeconds"));
    faults.non_negative("spec.ordinals.start", meta::get(new, &["spec", "ordinals", "start"]));
    selector(faults, new, "statefulset");
    let service = meta::text(new, &["spec", "serviceName"]);
    if !service.is_empty() {
        faults.syntax("spec.serviceName", service, meta::dns1123_subdomain(service));
    }
    template(faults, new);
}

/// What may change in a StatefulSet.
pub(super) fn stateful_set_update(faults: &mut Faults, new: &Value, old: &Value) {
    const MUTABLE: [&str; 7] = [
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
    ];
    let mut allowed = meta::get(new, &["spec"]).clone();
    for field in MUTABLE {
        meta::put(&mut allowed, &[field], spec(old, field).clone());
    }
    if !same(&allowed, meta::get(old, &["spec"])) {
        faults.forbidden(
            "spec",
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', \
             'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
        );
    }
}

/// A DaemonSet.
pub(super) fn daemon_set(faults: &mut Faults, new: &Value) {
    selector(faults, new, "daemonset");
    template(faults, new);
    faults.non_negative("spec.minReadySeconds", spec(new, "minReadySeconds"));
    let rolling = meta::get(new, &["spec", "updateStrategy", "rollingUpdate"]);
    match meta::text(new, &["spec", "updateStrategy", "type"]) {
        "OnDelete" => {}
        "RollingUpdate" => {
            if rolling.is_null() {
                faults.required("spec.updateStrategy.rollingUpdate", "");
            } else {
                rolling_update(faults, "spec.updateStrategy.rollingUpdate", rolling);
            }
        }
        other => faults.one_of("spec.updateStrategy", other, &["RollingUpdate", "OnDelete"]),
    }
    faults.non_negative("spec.revisionHistoryLimit", spec(new, "revisionHistoryLimit"));
}

/// A ControllerRevision.
pub(super) fn controller_revision(faults: &mut Faults, new: &Value) {
    if meta::get(new, &["data"]).is_null() {
        faults.required("data", "data is mandatory");
    }
    faults.non_negative("revision", meta::get(new, &["revision"]));
}

/// The selector of a Deployment, ReplicaSet or DaemonSet stays.
pub(super) fn selector_unchanged(faults: &mut Faults, new: &Value, old: &Value) {
    if !same(spec(new, "selector"), spec(old, "selector")) {
        let text = selector_text(spec(new, "selector"));
        faults.add(FieldError::invalid_text("spec.selector", text, "field is immutable"));
    }
}

/// A Job.
pub(super) fn job(faults: &mut Faults, new: &Value) {
    job_spec(faults, "spec", meta::get(new, &["spec"]));
}

fn job_spec(faults: &mut Faults, field: &str, spec: &Value) {
    for part in ["parallelism", "completions", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"] {
        faults.non_negative(format!("{field}.{part}"), meta::get(spec, &[part]));
    }
    pod_template_spec(faults, &format!("{field}.template"), meta::get(spec, &["template"]));
    let policy = meta::text(spec, &["template", "spec", "restartPolicy"]);
    if !matches!(policy, "OnFailure" | "Never") {
        let at = format!("{field}.template.spec.restartPolicy");
        if policy.is_empty() || policy == "Always" {
            faults.add(FieldError {
                field: at,
                fault: crate::status::Fault::Required,
                detail: "valid values: \"OnFailure\", \"Never\"".to_owned(),
            });
        }
    }
}

/// What may not change in a Job.
pub(super) fn job_update(faults: &mut Faults, new: &Value, old: &Value) {
    for field in ["completions", "selector", "template", "completionMode", "podFailurePolicy"] {
        faults.unchanged(&format!("spec.{field}"), spec(new, field), spec(old, field));
    }
}

/// A CronJob.
pub(super) fn cron_job(faults: &mut Faults, new: &Value) {
    if meta::text(new, &["spec", "schedule"]).is_empty() {
        faults.required("spec.schedule", "");
    }
    match meta::text(new, &["spec", "concurrencyPolicy"]) {
        "" => faults.required("spec.concurrencyPolicy", ""),
        policy => faults.one_of("spec.concurrencyPolicy", policy, &["Allow", "Forbid", "Replace"]),
    }
    for part in ["startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
        faults.non_negative(format!("spec.{part}"), spec(new, part));
    }
    job_spec(faults, "spec.jobTemplate.spec", meta::get(new, &["spec", "jobTemplate", "spec"]));
}
