//! Rules of Pods and of pod templates.

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

use super::{Faults, pod_text, same, strings};
use crate::meta;
use crate::status::FieldError;

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_BYTES: usize = 2048;

/// Volume sources in the order in which they are judged; only the first may be there.
const VOLUME_SOURCES: [&str; 30] = [
    "emptyDir",
    "hostPath",
    "gitRepo",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "secret",
    "nfs",
    "iscsi",
    "glusterfs",
    "flocker",
    "persistentVolumeClaim",
    "rbd",
    "cephfs",
    "cinder",
    "quobyte",
    "downwardAPI",
    "fc",
    "configMap",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "storageos",
    "projected",
    "scaleIO",
    "csi",
    "ephemeral",
    "image",
    "flexVolume",
];

/// What a Pod update may change, as its refusal says.
const UPDATABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,\
                         `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only \
                         additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set \
                         to 1 if it was previously negative)";

/// Rules of a new Pod.
pub(super) fn create(faults: &mut Faults, new: &Value) {
    let spec = meta::get(new, &["spec"]);
    if !meta::list(spec, &["ephemeralContainers"]).is_empty() {
        faults.forbidden("spec.ephemeralContainers", "cannot be set on create");
    }
    if !meta::text(spec, &["nodeName"]).is_empty() && !meta::list(spec, &["schedulingGates"]).is_empty() {
        faults.forbidden("spec.nodeName", "cannot be set until all schedulingGates have been cleared");
    }
    self::spec(faults, new);
}

/// Rules of a Pod's spec.
pub(super) fn spec(faults: &mut Faults, new: &Value) {
    pod_spec(faults, "spec", meta::get(new, &["spec"]));
}

/// Rules of a write to `/ephemeralcontainers`: they may be added, not changed or removed.
pub(super) fn ephemeral_containers(faults: &mut Faults, new: &Value, old: &Value) {
    spec(faults, new);
    if meta::annotation(old, "kubernetes.io/config.mirror").is_some() {
        faults.list.clear();
        faults.forbidden("", "static pods do not support ephemeral containers");
        return;
    }
    let field = "spec.ephemeralContainers";
    let path = ["spec", "ephemeralContainers"];
    for before in meta::list(old, &path) {
        let name = meta::text(before, &["name"]);
        let quoted = crate::status::quoted(name);
        match meta::list(new, &path).iter().find(|now| meta::text(now, &["name"]) == name) {
            None => faults.forbidden(field, format!("existing ephemeral containers {quoted} may not be removed\n")),
            Some(now) if !same(now, before) => {
                let diff = pod_text::ephemeral_diff(before, now);
                let text = format!("existing ephemeral containers {quoted} may not be changed\n{diff}");
                faults.forbidden(field, text);
            }
            Some(_) => {}
        }
    }
}

/// Rules of the status a node agent reports.
pub(super) fn status(faults: &mut Faults, new: &Value) {
    let node = meta::text(new, &["status", "nominatedNodeName"]);
    if !node.is_empty() {
        faults.syntax("status.nominatedNodeName", node, meta::dns1123_subdomain(node));
    }
    for (list, part) in [("podIPs", "ip"), ("hostIPs", "ip")] {
        for (i, entry) in meta::list(new, &["status", list]).iter().enumerate() {
            let ip = meta::text(entry, &[part]);
            faults.syntax(&format!("status.{list}[{i}]"), ip, meta::ip_sloppy(ip));
        }
    }
}

/// Rules of a changed Pod: few fields may differ.
pub(super) fn update(faults: &mut Faults, new: &Value, old: &Value) {
    let (spec, stored) = (meta::get(new, &["spec"]), meta::get(old, &["spec"]));
    pod_spec(faults, "spec", spec);
    for list in ["containers", "initContainers"] {
        if meta::list(spec, &[list]).len() != meta::list(stored, &[list]).len() {
            faults.list.clear();
            faults.forbidden(format!("spec.{list}"), "pod updates may not add or remove containers");
            return;
        }
    }
    // The image is judged once more as a field that may change.
    for list in ["containers", "initContainers"] {
        for (i, container) in meta::list(spec, &[list]).iter().enumerate() {
            if meta::text(container, &["image"]).is_empty() {
                faults.required(format!("spec.{list}[{i}].image"), "");
            }
        }
    }
    if let Some(before) = stored.get("activeDeadlineSeconds").and_then(Value::as_i64) {
        match spec.get("activeDeadlineSeconds").and_then(Value::as_i64) {
            None => faults.invalid(
                "spec.activeDeadlineSeconds",
                Value::Null,
                "must not update from a positive integer to nil value",
            ),
            Some(now) if now > before => faults.invalid(
                "spec.activeDeadlineSeconds",
                now,
                format!("must be less than or equal to previous value {before}"),
            ),
            Some(_) => {}
        }
    }
    let tolerations = meta::list(spec, &["tolerations"]);
    let kept = meta::list(stored, &["tolerations"]).iter().all(|before| {
        tolerations.iter().any(|now| {
            ["key", "operator", "value", "effect"]
                .iter()
                .all(|part| same(meta::get(now, &[part]), meta::get(before, &[part])))
        })
    });
    if !kept {
        faults.forbidden("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds");
    }
    let gates = |spec: &'_ Value| -> BTreeSet<String> {
        meta::list(spec, &["schedulingGates"]).iter().map(|g| meta::text(g, &["name"]).to_owned()).collect()
    };
    let added: Vec<String> = gates(spec).difference(&gates(stored)).cloned().collect();
    if !added.is_empty() {
        let text = format!("only deletion is allowed, but found new scheduling gates '{}'", added.join(","));
        faults.forbidden("spec.schedulingGates", text);
    }
    if !faults.list.is_empty() {
        return;
    }

    let mut allowed = spec.clone();
    for list in ["containers", "initContainers"] {
        for (i, container) in meta::list(stored, &[list]).iter().enumerate() {
            if let Some(place) = allowed.pointer_mut(&format!("/{list}/{i}/image")) {
                *place = meta::get(container, &["image"]).clone();
            }
        }
    }
    for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        meta::put(&mut allowed, &[field], meta::get(stored, &[field]).clone());
    }
    let grace = |spec: &Value| spec.get("terminationGracePeriodSeconds").and_then(Value::as_i64);
    if grace(stored).is_some_and(|seconds| seconds < 0) && grace(spec) == Some(1) {
        meta::put(&mut allowed, &["terminationGracePeriodSeconds"], json!(grace(stored)));
    }
    if !gates(stored).is_empty() {
        // A gated Pod has no node yet, so where it may go can still be narrowed.
        for field in ["nodeSelector", "affinity"] {
            meta::put(&mut allowed, &[field], meta::get(stored, &[field]).clone());
        }
    }
    if !same(&allowed, stored) {
        faults.forbidden("spec", format!("{UPDATABLE}\n{}", pod_text::diff(stored, &allowed)));
    }
}

/// Rules of a pod spec at a path, of a Pod or of a template.
pub(super) fn pod_spec(faults: &mut Faults, field: &str, spec: &Value) {
    let at = |part: &str| format!("{field}.{part}");
    let volumes = volumes(faults, &at("volumes"), spec);
    let host_network = spec.get("hostNetwork").and_then(Value::as_bool).unwrap_or(false);

    let containers = meta::list(spec, &["containers"]);
    if containers.is_empty() {
        faults.required(at("containers"), "");
    }
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for (list, kind) in
        [("containers", Role::Main), ("initContainers", Role::Init), ("ephemeralContainers", Role::Ephemeral)]
    {
        for (i, container) in meta::list(spec, &[list]).iter().enumerate() {
            let field = format!("{}[{i}]", at(list));
            self::container(faults, &field, container, kind, &volumes, host_network);
            let name = meta::text(container, &["name"]);
            if !name.is_empty() && !names.insert(name) {
                faults.add(FieldError::duplicate(format!("{field}.name"), name));
            }
        }
        if kind == Role::Ephemeral {
            for (i, container) in meta::list(spec, &[list]).iter().enumerate() {
                let target = meta::text(container, &["targetContainerName"]);
                let known = ["containers", "initContainers"]
                    .iter()
                    .any(|list| meta::list(spec, &[list]).iter().any(|c| meta::text(c, &["name"]) == target));
                if !target.is_empty() && !known {
                    let field = format!("{}[{i}].targetContainerName", at(list));
                    faults.add(FieldError::not_found(field, target));
                }
            }
        }
        if kind == Role::Main {
            host_ports(faults, &at(list), meta::list(spec, &[list]));
        }
    }

    match meta::text(spec, &["restartPolicy"]) {
        "" => faults.required(at("restartPolicy"), ""),
        policy => faults.one_of(at("restartPolicy"), policy, &["Always", "OnFailure", "Never"]),
    }
    match meta::text(spec, &["dnsPolicy"]) {
        "" => faults.required(at("dnsPolicy"), ""),
        policy => {
            let known = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
            faults.one_of(at("dnsPolicy"), policy, &known);
        }
    }
    faults.labels(&at("nodeSelector"), meta::get(spec, &["nodeSelector"]));
    for (i, secret) in meta::list(spec, &["imagePullSecrets"]).iter().enumerate() {
        if meta::text(secret, &["name"]).is_empty() {
            faults.required(format!("{}[{i}].name", at("imagePullSecrets")), "");
        }
    }
    dns_config(faults, &at("dnsConfig"), spec);
    topology_spread(faults, &at("topologySpreadConstraints"), spec);
    let account = meta::text(spec, &["serviceAccountName"]);
    if !account.is_empty() {
        faults.syntax(&at("serviceAccountName"), account, meta::dns1123_subdomain(account));
    }
    let node = meta::text(spec, &["nodeName"]);
    if !node.is_empty() {
        faults.syntax(&at("nodeName"), node, meta::dns1123_subdomain(node));
    }
    if let Some(seconds) = spec.get("activeDeadlineSeconds").and_then(Value::as_i64)
        && !(1..=i64::from(i32::MAX)).contains(&seconds)
    {
        faults.invalid(at("activeDeadlineSeconds"), seconds, "must be between 1 and 2147483647, inclusive");
    }
    for part in ["hostname", "subdomain"] {
        let name = meta::text(spec, &[part]);
        if !name.is_empty() {
            faults.syntax(&at(part), name, meta::dns1123_label(name));
        }
    }
    tolerations(faults, &at("tolerations"), spec);
    for (i, alias) in meta::list(spec, &["hostAliases"]).iter().enumerate() {
        let field = format!("{}[{i}]", at("hostAliases"));
        let ip = meta::text(alias, &["ip"]);
        faults.syntax(&format!("{field}.ip"), ip, meta::ip(ip));
        for (h, name) in strings(alias, &["hostnames"]).into_iter().enumerate() {
            faults.syntax(&format!("{field}.hostnames[{h}]"), name, meta::dns1123_subdomain(name));
        }
    }
    for part in ["priorityClassName", "runtimeClassName"] {
        let name = meta::text(spec, &[part]);
        if !name.is_empty() {
            faults.syntax(&at(part), name, meta::dns1123_subdomain(name));
        }
    }
    for (i, gate) in meta::list(spec, &["schedulingGates"]).iter().enumerate() {
        let name = meta::text(gate, &["name"]);
        faults.syntax(&format!("{}[{i}]", at("schedulingGates")), name, meta::qualified_name(name));
    }
    for (i, gate) in meta::list(spec, &["readinessGates"]).iter().enumerate() {
        let name = meta::text(gate, &["conditionType"]);
        faults.syntax(&format!("{}[{i}].conditionType", at("readinessGates")), name, meta::qualified_name(name));
    }
}

fn tolerations(faults: &mut Faults, field: &str, spec: &Value) {
    for (i, toleration) in meta::list(spec, &["tolerations"]).iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let (key, value) = (meta::text(toleration, &["key"]), meta::text(toleration, &["value"]));
        let operator = meta::text(toleration, &["operator"]);
        let effect = meta::text(toleration, &["effect"]);
        if !key.is_empty() {
            faults.syntax(&at("key"), key, meta::qualified_name(key));
        } else if operator != "Exists" {
            faults.invalid(
                at("operator"),
                operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if !meta::get(toleration, &["tolerationSeconds"]).is_null() && effect != "NoExecute" {
            faults.invalid(at("effect"), effect, "effect must be 'NoExecute' when `tolerationSeconds` is set");
        }
        match operator {
            "Equal" | "" => faults.syntax(&at("operator"), value, meta::label_value(value)),
            "Exists" => {
                if !value.is_empty() {
                    faults.invalid(at("operator"), value, "value must be empty when `operator` is 'Exists'");
                }
            }
            other => faults.one_of(at("operator"), other, &["Equal", "Exists"]),
        }
        if !effect.is_empty() {
            faults.one_of(at("effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        }
    }
}

fn topology_spread(faults: &mut Faults, field: &str, spec: &Value) {
    for (i, constraint) in meta::list(spec, &["topologySpreadConstraints"]).iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let skew = constraint.get("maxSkew").and_then(Value::as_i64).unwrap_or(0);
        if skew <= 0 {
            faults.invalid(at("maxSkew"), skew, "must be greater than zero");
        }
        let key = meta::text(constraint, &["topologyKey"]);
        if key.is_empty() {
            faults.required(at("topologyKey"), "can not be empty");
        } else {
            faults.syntax(&at("topologyKey"), key, meta::qualified_name(key));
        }
        let action = meta::text(constraint, &["whenUnsatisfiable"]);
        faults.one_of(at("whenUnsatisfiable"), action, &["DoNotSchedule", "ScheduleAnyway"]);
        faults.label_selector(&at("labelSelector"), meta::get(constraint, &["labelSelector"]));
    }
}

fn dns_config(faults: &mut Faults, field: &str, spec: &Value) {
    let config = meta::get(spec, &["dnsConfig"]);
    let nameservers = strings(config, &["nameservers"]);
    if meta::text(spec, &["dnsPolicy"]) == "None" {
        if config.is_null() {
            faults.required(field, "must provide `dnsConfig` when `dnsPolicy` is None");
            return;
        }
        if nameservers.is_empty() {
            let text = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            faults.required(format!("{field}.nameservers"), text);
            return;
        }
    }
    if nameservers.len() > MAX_NAMESERVERS {
        let text = format!("must not have more than {MAX_NAMESERVERS} nameservers");
        faults.invalid(format!("{field}.nameservers"), json!(nameservers), text);
    }
    for (i, server) in nameservers.iter().enumerate() {
        faults.syntax(&format!("{field}.nameservers[{i}]"), server, meta::ip(server));
    }
    let searches = strings(config, &["searches"]);
    if searches.len() > MAX_SEARCHES {
        let text = format!("must not have more than {MAX_SEARCHES} search paths");
        faults.invalid(format!("{field}.searches"), json!(searches), text);
    }
    if searches.join(" ").len() > MAX_SEARCH_BYTES {
        let text =
            format!("must not have more than {MAX_SEARCH_BYTES} characters (including spaces) in the search list");
        faults.invalid(format!("{field}.searches"), json!(searches), text);
    }
    for (i, search) in searches.iter().enumerate() {
        // A lone dot is the root.
        if *search != "." {
            let name = search.strip_suffix('.').unwrap_or(search);
            faults.syntax(&format!("{field}.searches[{i}]"), search, meta::dns_search_path(name));
        }
    }
    for (i, option) in meta::list(config, &["options"]).iter().enumerate() {
        if meta::text(option, &["name"]).is_empty() {
            faults.required(format!("{field}.options[{i}]"), "must not be empty");
        }
    }
}

/// Names of the volumes, for the mounts.
fn volumes<'a>(faults: &mut Faults, field: &str, spec: &'a Value) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    let has_account = !meta::text(spec, &["serviceAccountName"]).is_empty();
    for (i, volume) in meta::list(spec, &["volumes"]).iter().enumerate() {
        let at = format!("{field}[{i}]");
        let mut sources = 0;
        for source in VOLUME_SOURCES {
            let value = meta::get(volume, &[source]);
            if value.is_null() {
                continue;
            }
            sources += 1;
            let at = format!("{at}.{source}");
            if sources > 1 {
                faults.forbidden(at, "may not specify more than 1 volume type");
            } else {
                volume_source(faults, &at, source, value, has_account);
            }
        }
        if sources == 0 {
            faults.required(at.as_str(), "must specify a volume type");
        }
        let name = meta::text(volume, &["name"]);
        faults.required_syntax(&format!("{at}.name"), name, meta::dns1123_label);
        if !name.is_empty() && !names.insert(name) {
            faults.add(FieldError::duplicate(format!("{at}.name"), name));
        }
    }
    names
}

fn volume_source(faults: &mut Faults, field: &str, kind: &str, source: &Value, has_account: bool) {
    let at = |part: &str| format!("{field}.{part}");
    let require = |faults: &mut Faults, part: &str| {
        if meta::text(source, &[part]).is_empty() {
            faults.required(at(part), "");
        }
    };
    match kind {
        "secret" => {
            require(faults, "secretName");
            mode(faults, &at("defaultMode"), source.get("defaultMode"));
            key_paths(faults, &at("items"), meta::list(source, &["items"]));
        }
        "configMap" => {
            require(faults, "name");
            mode(faults, &at("defaultMode"), source.get("defaultMode"));
            key_paths(faults, &at("items"), meta::list(source, &["items"]));
        }
        "hostPath" => {
            require(faults, "path");
            no_backsteps(faults, &at("path"), meta::text(source, &["path"]));
            let kind = meta::text(source, &["type"]);
            let known =
                ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
            faults.one_of(at("type"), kind, &known);
        }
        "nfs" => {
            require(faults, "server");
            require(faults, "path");
        }
        "persistentVolumeClaim" => require(faults, "claimName"),
        "csi" => require(faults, "driver"),
        "downwardAPI" => {
            mode(faults, &at("defaultMode"), source.get("defaultMode"));
            downward_items(faults, &at("items"), meta::list(source, &["items"]));
        }
        "projected" => projected(faults, field, source, has_account),
        _ => {}
    }
}

fn projected(faults: &mut Faults, field: &str, source: &Value, has_account: bool) {
    mode(faults, &format!("{field}.defaultMode"), source.get("defaultMode"));
    for (i, one) in meta::list(source, &["sources"]).iter().enumerate() {
        let at = |part: &str| format!("{field}.sources[{i}].{part}");
        for part in ["secret", "configMap"] {
            let value = meta::get(one, &[part]);
            if value.is_null() {
                continue;
            }
            if meta::text(value, &["name"]).is_empty() {
                faults.required(format!("{}.name", at(part)), "");
            }
            key_paths(faults, &format!("{}.items", at(part)), meta::list(value, &["items"]));
        }
        let downward = meta::get(one, &["downwardAPI"]);
        if !downward.is_null() {
            downward_items(faults, &at("downwardAPI.items"), meta::list(downward, &["items"]));
        }
        let token = meta::get(one, &["serviceAccountToken"]);
        if !token.is_null() {
            let field = at("serviceAccountToken");
            if !has_account {
                faults.forbidden(field.as_str(), "must not be specified when serviceAccountName is not set");
            }
            if let Some(seconds) = token.get("expirationSeconds").and_then(Value::as_i64)
                && seconds < 600
            {
                faults.invalid(
                    format!("{field}.expirationSeconds"),
                    seconds,
                    "may not specify a duration less than 10 minutes",
                );
            }
            file_path(faults, &format!("{field}.path"), meta::text(token, &["path"]));
        }
    }
}

fn mode(faults: &mut Faults, field: &str, mode: Option<&Value>) {
    if let Some(mode) = mode.and_then(Value::as_i64)
        && !(0..=0o777).contains(&mode)
    {
        faults.invalid(field, mode, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

fn key_paths(faults: &mut Faults, field: &str, items: &[Value]) {
    for (i, item) in items.iter().enumerate() {
        if meta::text(item, &["key"]).is_empty() {
            faults.required(format!("{field}[{i}].key"), "");
        }
        file_path(faults, &format!("{field}[{i}].path"), meta::text(item, &["path"]));
        mode(faults, &format!("{field}[{i}].mode"), item.get("mode"));
    }
}

fn downward_items(faults: &mut Faults, field: &str, items: &[Value]) {
    for (i, item) in items.iter().enumerate() {
        file_path(faults, &format!("{field}[{i}].path"), meta::text(item, &["path"]));
        let (reference, resource) = (meta::get(item, &["fieldRef"]), meta::get(item, &["resourceFieldRef"]));
        match (reference.is_null(), resource.is_null()) {
            (false, false) => {
                let text = "fieldRef and resourceFieldRef can not be specified simultaneously";
                faults.invalid(format!("{field}[{i}]"), "resource", text);
            }
            (false, true) => {
                let path = meta::text(reference, &["fieldPath"]);
                field_path(
                    faults,
                    &format!("{field}[{i}].fieldRef.fieldPath"),
                    path,
                    &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"],
                );
            }
            (true, false) => {}
            (true, true) => {
                faults.required(format!("{field}[{i}].fieldRef"), "one of fieldRef and resourceFieldRef is required");
            }
        }
        mode(faults, &format!("{field}[{i}].mode"), item.get("mode"));
    }
}

/// A relative path of a file that stays below its root.
fn file_path(faults: &mut Faults, field: &str, path: &str) {
    if path.is_empty() {
        faults.required(field, "");
        return;
    }
    if path.starts_with('/') {
        faults.invalid(field, path, "must be a relative path");
    }
    no_backsteps(faults, field, path);
    if path.starts_with("..") && !path.split('/').any(|part| part == "..") {
        faults.invalid(field, path, "must not start with '..'");
    }
}

fn no_backsteps(faults: &mut Faults, field: &str, path: &str) {
    if path.split('/').any(|part| part == "..") {
        faults.invalid(field, path, "must not contain '..'");
    }
}

/// Which list a container is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Main,
    Init,
    Ephemeral,
}

fn container(
    faults: &mut Faults,
    field: &str,
    container: &Value,
    role: Role,
    volumes: &BTreeSet<&str>,
    host_network: bool,
) {
    let at = |part: &str| format!("{field}.{part}");
    faults.required_syntax(&at("name"), meta::text(container, &["name"]), meta::dns1123_label);
    let image = meta::text(container, &["image"]);
    if image.is_empty() {
        faults.required(at("image"), "");
    } else if image.trim() != image {
        faults.invalid(at("image"), image, "must not have leading or trailing whitespace");
    }
    match meta::text(container, &["terminationMessagePolicy"]) {
        "" => faults.required(at("terminationMessagePolicy"), ""),
        policy => faults.one_of(at("terminationMessagePolicy"), policy, &["FallbackToLogsOnError", "File"]),
    }
    ports(faults, &at("ports"), meta::list(container, &["ports"]), host_network);
    env(faults, &at("env"), meta::list(container, &["env"]));
    env_from(faults, &at("envFrom"), meta::list(container, &["envFrom"]));
    mounts(faults, &at("volumeMounts"), meta::list(container, &["volumeMounts"]), volumes);
    match meta::text(container, &["imagePullPolicy"]) {
        "" => faults.required(at("imagePullPolicy"), ""),
        policy => faults.one_of(at("imagePullPolicy"), policy, &["Always", "IfNotPresent", "Never"]),
    }
    resources(faults, &at("resources"), meta::get(container, &["resources"]));

    let restart = meta::get(container, &["restartPolicy"]);
    let restartable = role == Role::Init && restart == "Always";
    if let Some(policy) = restart.as_str() {
        match role {
            Role::Init => faults.one_of(at("restartPolicy"), policy, &["Always"]),
            Role::Main | Role::Ephemeral => {
                faults.forbidden(at("restartPolicy"), "may not be set for non-init containers");
            }
        }
    }
    let lifecycle = meta::get(container, &["lifecycle"]);
    match role {
        Role::Main => {}
        Role::Init if restartable => {}
        Role::Init => {
            for part in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                if !meta::get(container, &[part]).is_null() {
                    faults.forbidden(at(part), "may not be set for init containers without restartPolicy=Always");
                }
            }
            return;
        }
        Role::Ephemeral => {
            for part in
                ["ports", "resources", "resizePolicy", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle"]
            {
                if !same(meta::get(container, &[part]), &Value::Null) {
                    faults.forbidden(at(part), "cannot be set for an Ephemeral Container");
                }
            }
            for (i, mount) in meta::list(container, &["volumeMounts"]).iter().enumerate() {
                for part in ["subPath", "subPathExpr"] {
                    if !meta::text(mount, &[part]).is_empty() {
                        let field = format!("{}[{i}].{part}", at("volumeMounts"));
                        faults.forbidden(field, "cannot be set for an Ephemeral Container");
                    }
                }
            }
            return;
        }
    }
    for part in ["postStart", "preStop"] {
        let hook = meta::get(lifecycle, &[part]);
        if !hook.is_null() {
            handler(faults, &at(&format!("lifecycle.{part}")), hook);
        }
    }
    for part in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = meta::get(container, &[part]);
        if !probe.is_null() {
            self::probe(faults, &at(part), probe, part);
        }
    }
}

fn ports(faults: &mut Faults, field: &str, ports: &[Value], host_network: bool) {
    let mut names = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let name = meta::text(port, &["name"]);
        if !name.is_empty() {
            let texts = meta::port_name(name);
            let good = texts.is_empty();
            faults.syntax(&at("name"), name, texts);
            if good && !names.insert(name) {
                faults.add(FieldError::duplicate(at("name"), name));
            }
        }
        let number = port.get("containerPort").and_then(Value::as_i64).unwrap_or(0);
        if number == 0 {
            faults.required(at("containerPort"), "");
        } else {
            faults.port_number(at("containerPort"), &json!(number));
        }
        let host = port.get("hostPort").and_then(Value::as_i64).unwrap_or(0);
        if host != 0 {
            faults.port_number(at("hostPort"), &json!(host));
            if host_network && host != number {
                faults.invalid(at("hostPort"), host, "must match `containerPort` when `hostNetwork` is true");
            }
        }
        match meta::text(port, &["protocol"]) {
            "" => faults.required(at("protocol"), ""),
            protocol => faults.one_of(at("protocol"), protocol, &PROTOCOLS),
        }
    }
}

/// A host port may be used once for each protocol and host address, by all containers together.
fn host_ports(faults: &mut Faults, field: &str, containers: &[Value]) {
    let mut seen = BTreeSet::new();
    for (c, container) in containers.iter().enumerate() {
        for (p, port) in meta::list(container, &["ports"]).iter().enumerate() {
            let number = port.get("hostPort").and_then(Value::as_i64).unwrap_or(0);
            if number == 0 {
                continue;
            }
            let key = format!("{}/{}/{number}", meta::text(port, &["protocol"]), meta::text(port, &["hostIP"]));
            if !seen.insert(key.clone()) {
                faults.add(FieldError::duplicate(format!("{field}[{c}].ports[{p}].hostPort"), key));
            }
        }
    }
}

const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// Fields that the downward API knows at all; a place may offer fewer.
const KNOWN_FIELDS: [&str; 14] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.serviceAccountName",
    "spec.schedulerName",
    "status.phase",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn field_path(faults: &mut Faults, field: &str, path: &str, supported: &[&str]) {
    if path.is_empty() {
        faults.required(field, "");
        return;
    }
    if let Some((base, key)) = path.split_once("['").and_then(|(base, rest)| Some((base, rest.strip_suffix("']")?))) {
        match base {
            "metadata.annotations" => faults.syntax(field, path, meta::qualified_name(&key.to_lowercase())),
            "metadata.labels" => faults.syntax(field, path, meta::qualified_name(key)),
            _ => faults.invalid(field, path, "does not support subscript"),
        }
        return;
    }
    if !KNOWN_FIELDS.contains(&path) {
        faults.invalid(field, path, format!("error converting fieldPath: field label not supported: {path}"));
    } else {
        faults.one_of(field, path, supported);
    }
}

fn env(faults: &mut Faults, field: &str, env: &[Value]) {
    for (i, variable) in env.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        faults.required_syntax(&at("name"), meta::text(variable, &["name"]), meta::env_var_name);
        let from = meta::get(variable, &["valueFrom"]);
        if from.is_null() {
            continue;
        }
        let mut sources = 0;
        for source in ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"] {
            let value = meta::get(from, &[source]);
            if value.is_null() {
                continue;
            }
            sources += 1;
            let at = at(&format!("valueFrom.{source}"));
            match source {
                "fieldRef" => {
                    let path = meta::text(value, &["fieldPath"]);
                    field_path(faults, &format!("{at}.fieldPath"), path, &ENV_FIELDS);
                }
                "resourceFieldRef" => {
                    if meta::text(value, &["resource"]).is_empty() {
                        faults.required(format!("{at}.resource"), "");
                    }
                }
                _ => {
                    let key = meta::text(value, &["key"]);
                    faults.required_syntax(&format!("{at}.key"), key, meta::config_map_key);
                }
            }
        }
        if sources == 0 {
            faults.invalid(
                at("valueFrom"),
                "",
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
            );
        } else if !meta::text(variable, &["value"]).is_empty() {
            faults.invalid(at("valueFrom"), "", "may not be specified when `value` is not empty");
        } else if sources > 1 {
            faults.invalid(at("valueFrom"), "", "may not have more than one field specified at a time");
        }
    }
}

fn env_from(faults: &mut Faults, field: &str, sources: &[Value]) {
    for (i, source) in sources.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let prefix = meta::text(source, &["prefix"]);
        if !prefix.is_empty() {
            faults.syntax(&at("prefix"), prefix, meta::env_var_name(prefix));
        }
        let mut count = 0;
        for part in ["configMapRef", "secretRef"] {
            let reference = meta::get(source, &[part]);
            if reference.is_null() {
                continue;
            }
            count += 1;
            if meta::text(reference, &["name"]).is_empty() {
                faults.required(at(&format!("{part}.name")), "");
            }
        }
        match count {
            0 => faults.invalid(format!("{field}[{i}]"), "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => faults.invalid(format!("{field}[{i}]"), "", "may not have more than one field specified at a time"),
        }
    }
}

fn mounts(faults: &mut Faults, field: &str, mounts: &[Value], volumes: &BTreeSet<&str>) {
    let mut paths = BTreeSet::new();
    for (i, mount) in mounts.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let name = meta::text(mount, &["name"]);
        if name.is_empty() {
            faults.required(at("name"), "");
        } else if !volumes.contains(name) {
            faults.add(FieldError::not_found(at("name"), name));
        }
        let path = meta::text(mount, &["mountPath"]);
        if path.is_empty() {
            faults.required(at("mountPath"), "");
        }
        if !paths.insert(path) {
            faults.invalid(at("mountPath"), path, "must be unique");
        }
        for part in ["subPath", "subPathExpr"] {
            let sub = meta::text(mount, &[part]);
            if sub.starts_with('/') {
                faults.invalid(at(part), sub, "must be a relative path");
            }
            no_backsteps(faults, &at(part), sub);
        }
        if !meta::text(mount, &["subPath"]).is_empty() && !meta::text(mount, &["subPathExpr"]).is_empty() {
            let text = "subPathExpr and subPath are mutually exclusive";
            faults.invalid(at("subPathExpr"), meta::text(mount, &["subPathExpr"]), text);
        }
    }
}

fn resources(faults: &mut Faults, field: &str, resources: &Value) {
    let mut amounts: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    for list in ["limits", "requests"] {
        for (name, amount) in meta::get(resources, &[list]).as_object().into_iter().flatten() {
            let at = format!("{field}.{list}");
            for text in meta::qualified_name(name) {
                faults.invalid(at.as_str(), name.as_str(), text);
            }
            let text = amount.as_str().map_or_else(|| amount.to_string(), str::to_owned);
            let Some(number) = rough_amount(&text) else { continue };
            if number < 0.0 {
                faults.invalid(format!("{at}[{name}]"), text, "must be greater than or equal to 0");
            }
            amounts.insert((list, name), number);
        }
    }
    for (name, request) in meta::get(resources, &["requests"]).as_object().into_iter().flatten() {
        if let (Some(asked), Some(limit)) =
            (amounts.get(&("requests", name.as_str())), amounts.get(&("limits", name.as_str())))
            && asked > limit
        {
            let limit = meta::text(resources, &["limits", name]);
            faults.invalid(
                format!("{field}.requests"),
                request.clone(),
                format!("must be less than or equal to {name} limit of {limit}"),
            );
        }
    }
}

/// The size of a quantity, near enough to compare a request with its limit.
fn rough_amount(text: &str) -> Option<f64> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-' | '+'))).unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    let factor = match &text[end..] {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        "Ei" => 1024f64.powi(6),
        exponent => return format!("{number}{exponent}").parse().ok(),
    };
    Some(number * factor)
}

fn probe(faults: &mut Faults, field: &str, probe: &Value, which: &str) {
    let at = |part: &str| format!("{field}.{part}");
    handler(faults, field, probe);
    for part in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        faults.non_negative(at(part), meta::get(probe, &[part]));
    }
    let threshold = probe.get("successThreshold").and_then(Value::as_i64).unwrap_or(1);
    if which != "readinessProbe" && threshold != 1 && threshold >= 0 {
        faults.invalid(at("successThreshold"), threshold, "must be 1");
    }
    if let Some(seconds) = probe.get("terminationGracePeriodSeconds").and_then(Value::as_i64) {
        if which == "readinessProbe" {
            faults.invalid(at("terminationGracePeriodSeconds"), seconds, "must not be set for readinessProbes");
        } else if seconds <= 0 {
            faults.invalid(at("terminationGracePeriodSeconds"), seconds, "must be greater than 0");
        }
    }
}

fn handler(faults: &mut Faults, field: &str, handler: &Value) {
    let mut count = 0;
    for part in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let action = meta::get(handler, &[part]);
        if action.is_null() {
            continue;
        }
        count += 1;
        let at = format!("{field}.{part}");
        if count > 1 {
            faults.forbidden(at, "may not specify more than 1 handler type");
            continue;
        }
        match part {
            "exec" => {
                if meta::list(action, &["command"]).is_empty() {
                    faults.required(format!("{at}.command"), "");
                }
            }
            "httpGet" => {
                if meta::text(action, &["path"]).is_empty() {
                    faults.required(format!("{at}.path"), "");
                }
                faults.port_number_or_name(&format!("{at}.port"), meta::get(action, &["port"]));
                faults.one_of(format!("{at}.scheme"), meta::text(action, &["scheme"]), &["HTTP", "HTTPS"]);
                for header in meta::list(action, &["httpHeaders"]) {
                    let name = meta::text(header, &["name"]);
                    faults.syntax(&format!("{at}.httpHeaders"), name, meta::http_header_name(name));
                }
            }
            "tcpSocket" => faults.port_number_or_name(&format!("{at}.port"), meta::get(action, &["port"])),
            "grpc" => faults.port_number(format!("{at}.port"), meta::get(action, &["port"])),
            _ => {
                if action.get("seconds").and_then(Value::as_i64).unwrap_or(0) < 0 {
                    faults.invalid(
                        format!("{at}.seconds"),
                        meta::get(action, &["seconds"]).clone(),
                        "must be non-negative",
                    );
                }
            }
        }
    }
    if count == 0 {
        faults.required(field, "must specify a handler type");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_compare_by_size() {
        assert!(rough_amount("1500m") > rough_amount("1"));
        assert!(rough_amount("1Gi") > rough_amount("1G"));
        assert_eq!(rough_amount("1e3"), Some(1000.0));
        assert_eq!(rough_amount("é"), None);
    }
}
