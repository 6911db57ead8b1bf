//! Query parameters that belong to verbs.

use portolan_api::kinds::Kind;
use portolan_api::selector::{FieldSelector, LabelSelector};
use portolan_api::status::{FieldError, Status};
use portolan_api::strict::FieldValidation;
use serde_json::Value;

use crate::path::Query;

/// Longest `fieldManager`, in bytes (meta/v1 validation).
const MANAGER_MAX: usize = 128;

/// Parameters of create, update and patch.
#[derive(Clone, Copy, Debug)]
pub struct WriteOptions {
    /// Nothing is to be kept.
    pub dry_run: bool,
    /// What happens to unknown and duplicate fields.
    pub validation: FieldValidation,
}

/// Faults of a `fieldManager`.
fn manager_faults(manager: &str) -> Vec<FieldError> {
    let mut faults = Vec::new();
    if manager.len() > MANAGER_MAX {
        faults.push(FieldError::too_long("fieldManager", MANAGER_MAX));
    }
    for (position, c) in manager.char_indices() {
        if c.is_control() {
            let why = format!("invalid character U+{:04X} (at position {position})", u32::from(c));
            faults.push(FieldError::invalid_text("fieldManager", go_quoted(manager), why));
        }
    }
    faults
}

/// A text as Go's `%q` prints it: control characters by their escapes.
fn go_quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Reads `dryRun`; the only value is `All`.
fn dry_run_faults<'a>(values: impl Iterator<Item = &'a str>) -> (bool, Vec<FieldError>) {
    let values: Vec<&str> = values.filter(|value| !value.is_empty()).collect();
    let faults = values
        .iter()
        .any(|value| *value != "All")
        .then(|| FieldError::not_supported("dryRun", serde_json::json!(values), &["All"]))
        .into_iter()
        .collect();
    (!values.is_empty(), faults)
}

impl WriteOptions {
    /// Reads and checks the parameters; `kind` is `CreateOptions`, `UpdateOptions` or `PatchOptions`.
    pub fn parse(query: &Query, kind: &str, apply: bool) -> Result<WriteOptions, Status> {
        let mut faults = Vec::new();
        if kind == "PatchOptions" {
            if apply {
                if query.get("fieldManager").is_empty() {
                    faults.push(FieldError::required("fieldManager", "is required for apply patch"));
                }
            } else if query.has("force") {
                faults.push(FieldError::forbidden("force", "may not be specified for non-apply patch"));
            }
        }
        faults.extend(manager_faults(query.get("fieldManager")));
        let (dry_run, wrong) = dry_run_faults(query.all("dryRun"));
        faults.extend(wrong);
        let text = query.get("fieldValidation");
        let validation = FieldValidation::parse(text);
        if validation.is_none() {
            faults.push(FieldError::not_supported("fieldValidation", text, &["", "Ignore", "Strict", "Warn"]));
        }
        if !faults.is_empty() {
            return Err(Status::invalid_kind("meta.k8s.io", kind, "", &faults));
        }
        Ok(WriteOptions { dry_run, validation: validation.unwrap_or_default() })
    }
}

/// How dependents of a deleted object are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The object stays until its dependents are gone.
    Foreground,
    /// They are collected afterwards.
    Background,
    /// They are kept.
    Orphan,
}

/// Parameters of deletions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Seconds a Pod gets.
    pub grace_seconds: Option<i64>,
    /// What happens to dependents.
    pub policy: Option<Policy>,
    /// The old form of the policy was given, as false.
    pub orphan_false: bool,
    /// The uid the object must have.
    pub uid: Option<String>,
    /// The resourceVersion the object must have.
    pub resource_version: Option<String>,
    /// Nothing is to be kept.
    pub dry_run: bool,
}

impl DeleteOptions {
    /// Reads them from the query, which counts only if there is no body.
    pub fn from_query(query: &Query) -> Result<DeleteOptions, Status> {
        let mut value = serde_json::json!({});
        let grace = query.get("gracePeriodSeconds");
        if !grace.is_empty() {
            let seconds: i64 = grace.parse().map_err(|_| {
                Status::bad_request(format!(
                    "strconv.ParseInt: parsing {}: invalid syntax",
                    portolan_api::status::quoted(grace)
                ))
            })?;
            value["gracePeriodSeconds"] = seconds.into();
        }
        if query.has("propagationPolicy") {
            value["propagationPolicy"] = query.get("propagationPolicy").into();
        }
        if query.has("orphanDependents") {
            value["orphanDependents"] = query.flag("orphanDependents").into();
        }
        let dry_run: Vec<&str> = query.all("dryRun").collect();
        value["dryRun"] = dry_run.into();
        DeleteOptions::from_value(&value)
    }

    /// Reads them from a body.
    pub fn from_value(value: &Value) -> Result<DeleteOptions, Status> {
        let mut faults = Vec::new();
        let text = |path: &[&str]| portolan_api::meta::get(value, path).as_str().map(str::to_owned);
        let orphan = value.get("orphanDependents").and_then(Value::as_bool);
        let policy = text(&["propagationPolicy"]);
        if let (Some(_), Some(policy)) = (orphan, &policy) {
            let why = "orphanDependents and deletionPropagation cannot be both set";
            faults.push(FieldError::invalid("propagationPolicy", policy.as_str(), why));
        }
        let policy = match policy.as_deref() {
            None => orphan.map(|orphan| if orphan { Policy::Orphan } else { Policy::Background }),
            Some("Foreground") => Some(Policy::Foreground),
            Some("Background") => Some(Policy::Background),
            Some("Orphan") => Some(Policy::Orphan),
            Some(other) => {
                let known = ["Foreground", "Background", "Orphan", "nil"];
                faults.push(FieldError::not_supported("propagationPolicy", other, &known));
                None
            }
        };
        let dry_run = portolan_api::meta::list(value, &["dryRun"]);
        let (dry_run, wrong) = dry_run_faults(dry_run.iter().map(|v| v.as_str().unwrap_or("?")));
        faults.extend(wrong);
        if !faults.is_empty() {
            return Err(Status::invalid_kind("meta.k8s.io", "DeleteOptions", "", &faults));
        }
        Ok(DeleteOptions {
            grace_seconds: value.get("gracePeriodSeconds").and_then(Value::as_i64),
            policy,
            orphan_false: orphan == Some(false),
            uid: text(&["preconditions", "uid"]),
            resource_version: text(&["preconditions", "resourceVersion"]),
            dry_run,
        })
    }
}

/// Parameters of list, watch and deletecollection.
#[derive(Clone, Debug)]
pub struct ListOptions {
    /// Label selector.
    pub labels: LabelSelector,
    /// Field selector.
    pub fields: FieldSelector,
    /// Most items of a page; 0 for no limit.
    pub limit: usize,
    /// Where the page begins.
    pub continue_token: String,
    /// As given; empty if absent.
    pub resource_version: String,
    /// As given; empty if absent.
    pub resource_version_match: String,
    /// As given.
    pub send_initial_events: Option<bool>,
    /// Bookmarks are wanted.
    pub bookmarks: bool,
    /// Length of a watch.
    pub timeout_seconds: Option<u64>,
}

impl ListOptions {
    /// Reads and checks the parameters. `name` is that of a single object watched by its own path.
    pub fn parse(
        query: &Query,
        kind: &Kind,
        custom_fields: &[String],
        name: Option<&str>,
    ) -> Result<ListOptions, Status> {
        let number = |key: &str| -> Result<Option<i64>, Status> {
            let text = query.get(key);
            if text.is_empty() {
                return Ok(None);
            }
            text.parse().map(Some).map_err(|_| {
                let text = portolan_api::status::quoted(text);
                Status::bad_request(format!("strconv.ParseInt: parsing {text}: invalid syntax"))
            })
        };
        let limit = number("limit")?;
        let timeout = number("timeoutSeconds")?;
        let labels = LabelSelector::parse(query.get("labelSelector"))?;
        let mut fields = query.get("fieldSelector").to_owned();
        if let Some(name) = name {
            if !fields.is_empty() {
                fields.push(',');
            }
            fields.push_str("metadata.name=");
            fields.push_str(name);
        }
        let fields = FieldSelector::parse(&fields, kind, custom_fields)?;
        let send = query.has("sendInitialEvents").then(|| query.flag("sendInitialEvents"));
        Ok(ListOptions {
            labels,
            fields,
            limit: limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0),
            continue_token: query.get("continue").to_owned(),
            resource_version: query.get("resourceVersion").to_owned(),
            resource_version_match: query.get("resourceVersionMatch").to_owned(),
            send_initial_events: send,
            bookmarks: query.flag("allowWatchBookmarks"),
            timeout_seconds: timeout.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0),
        })
    }

    /// Checks the parameters that depend on each other (meta/internalversion validation).
    pub fn check(&self, watch: bool) -> Result<(), Status> {
        let mut faults = Vec::new();
        let matching = self.resource_version_match.as_str();
        let field = "resourceVersionMatch";
        if let (true, Some(_)) = (watch, self.send_initial_events) {
            if matching != "NotOlderThan" {
                let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                faults.push(FieldError::forbidden(field, why));
            }
            if !matching.is_empty() && matching != "NotOlderThan" {
                faults.push(FieldError::not_supported(field, matching, &["NotOlderThan"]));
            }
        } else if watch && !matching.is_empty() {
            faults.push(FieldError::forbidden(
                field,
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        if !watch {
            if self.send_initial_events.is_some() {
                faults.push(FieldError::forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
            }
            if !matching.is_empty() {
                if self.resource_version.is_empty() {
                    let why = "resourceVersionMatch is forbidden unless resourceVersion is provided";
                    faults.push(FieldError::forbidden(field, why));
                }
                if !self.continue_token.is_empty() {
                    let why = "resourceVersionMatch is forbidden when continue is provided";
                    faults.push(FieldError::forbidden(field, why));
                }
                if !matches!(matching, "Exact" | "NotOlderThan") {
                    faults.push(FieldError::not_supported(field, matching, &["Exact", "NotOlderThan", ""]));
                }
                if matching == "Exact" && self.resource_version == "0" {
                    let why = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
                    faults.push(FieldError::forbidden(field, why));
                }
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        Err(Status::invalid_kind("meta.k8s.io", "ListOptions", "", &faults))
    }

    /// Whether an object is selected.
    pub fn matches(&self, kind: &Kind, object: &Value) -> bool {
        self.labels.matches(object) && self.fields.matches(kind, object)
    }

    /// Whether every object is selected.
    pub fn selects_all(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }
}

/// A resourceVersion as a number.
pub fn revision(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("strconv.ParseUint: parsing {}: invalid syntax", portolan_api::status::quoted(text)))
}
