//! What differs between two pod specs, as the refusal of a Pod update shows it: the specs in the notation of the
//! reference implementation's own structures, compared line by line.
//!
//! Fields that are rarely set are written with their document's names, capitalised.

use serde_json::{Value, json};
use std::collections::BTreeMap;

use crate::meta;

/// How a field looks when it is not set.
#[derive(Clone, Copy)]
enum Shape {
    /// `null`.
    Any,
    /// `""`.
    Text,
    /// `0`.
    Number,
    /// `false`.
    Flag,
    /// A structure that is always there.
    Struct(&'static [(&'static str, Shape)]),
    /// `null`, or a list of structures.
    List(&'static [(&'static str, Shape)]),
}

use Shape::{Any, Flag, List, Number, Struct, Text};

type Fields = &'static [(&'static str, Shape)];

const PORT: Fields =
    &[("Name", Text), ("HostPort", Number), ("ContainerPort", Number), ("Protocol", Text), ("HostIP", Text)];
const ENV: Fields = &[("Name", Text), ("Value", Text), ("ValueFrom", Any)];
const MOUNT: Fields = &[
    ("Name", Text),
    ("ReadOnly", Flag),
    ("RecursiveReadOnly", Any),
    ("MountPath", Text),
    ("SubPath", Text),
    ("MountPropagation", Any),
    ("SubPathExpr", Text),
];
const RESOURCES: Fields = &[("Limits", Any), ("Requests", Any), ("Claims", Any)];

/// The fields of containers; ephemeral ones have one more.
macro_rules! container {
    ($($more:expr)?) => {
        &[
            ("Name", Text),
            ("Image", Text),
            ("Command", Any),
            ("Args", Any),
            ("WorkingDir", Text),
            ("Ports", List(PORT)),
            ("EnvFrom", Any),
            ("Env", List(ENV)),
            ("Resources", Struct(RESOURCES)),
            ("ResizePolicy", Any),
            ("RestartPolicy", Any),
            ("RestartPolicyRules", Any),
            ("VolumeMounts", List(MOUNT)),
            ("VolumeDevices", Any),
            ("LivenessProbe", Any),
            ("ReadinessProbe", Any),
            ("StartupProbe", Any),
            ("Lifecycle", Any),
            ("TerminationMessagePath", Text),
            ("TerminationMessagePolicy", Text),
            ("ImagePullPolicy", Text),
            ("SecurityContext", Any),
            ("Stdin", Flag),
            ("StdinOnce", Flag),
            ("TTY", Flag),
            $($more)?
        ]
    };
}

const CONTAINER: Fields = container!();
const EPHEMERAL: Fields = container!(("TargetContainerName", Text));

const SECURITY: Fields = &[
    ("HostNetwork", Flag),
    ("HostPID", Flag),
    ("HostIPC", Flag),
    ("ShareProcessNamespace", Any),
    ("HostUsers", Any),
    ("SELinuxOptions", Any),
    ("WindowsOptions", Any),
    ("RunAsUser", Any),
    ("RunAsGroup", Any),
    ("RunAsNonRoot", Any),
    ("SupplementalGroups", Any),
    ("SupplementalGroupsPolicy", Any),
    ("FSGroup", Any),
    ("FSGroupChangePolicy", Any),
    ("Sysctls", Any),
    ("SeccompProfile", Any),
    ("AppArmorProfile", Any),
    ("SELinuxChangePolicy", Any),
];

const TOLERATION: Fields =
    &[("Key", Text), ("Operator", Text), ("Value", Text), ("Effect", Text), ("TolerationSeconds", Any)];

const POD: Fields = &[
    ("Volumes", Any),
    ("InitContainers", List(CONTAINER)),
    ("Containers", List(CONTAINER)),
    ("EphemeralContainers", List(EPHEMERAL)),
    ("RestartPolicy", Text),
    ("TerminationGracePeriodSeconds", Any),
    ("ActiveDeadlineSeconds", Any),
    ("DNSPolicy", Text),
    ("NodeSelector", Any),
    ("ServiceAccountName", Text),
    ("AutomountServiceAccountToken", Any),
    ("NodeName", Text),
    ("SecurityContext", Struct(SECURITY)),
    ("ImagePullSecrets", Any),
    ("Hostname", Text),
    ("Subdomain", Text),
    ("SetHostnameAsFQDN", Any),
    ("Affinity", Any),
    ("SchedulerName", Text),
    ("Tolerations", List(TOLERATION)),
    ("HostAliases", Any),
    ("PriorityClassName", Text),
    ("Priority", Any),
    ("PreemptionPolicy", Any),
    ("DNSConfig", Any),
    ("ReadinessGates", Any),
    ("RuntimeClassName", Any),
    ("Overhead", Any),
    ("EnableServiceLinks", Any),
    ("TopologySpreadConstraints", Any),
    ("OS", Any),
    ("SchedulingGates", Any),
    ("ResourceClaims", Any),
    ("Resources", Any),
    ("HostnameOverride", Any),
];

/// Fields whose document name is not the structure's with a small first letter.
fn document_name(field: &str) -> String {
    match field {
        "DNSPolicy" => "dnsPolicy".to_owned(),
        "DNSConfig" => "dnsConfig".to_owned(),
        "SELinuxOptions" => "seLinuxOptions".to_owned(),
        "SELinuxChangePolicy" => "seLinuxChangePolicy".to_owned(),
        "FSGroup" => "fsGroup".to_owned(),
        "FSGroupChangePolicy" => "fsGroupChangePolicy".to_owned(),
        "TTY" => "tty".to_owned(),
        "OS" => "os".to_owned(),
        other => {
            let mut chars = other.chars();
            chars.next().map(|c| c.to_ascii_lowercase()).into_iter().chain(chars).collect()
        }
    }
}

/// The difference of two pod specs.
pub(super) fn diff(old: &Value, new: &Value) -> String {
    unified(&lines(old), &lines(new))
}

/// The difference of two ephemeral containers.
pub(super) fn ephemeral_diff(old: &Value, new: &Value) -> String {
    let lines = |container: &Value| {
        let mut out = Vec::new();
        structure(&mut out, 0, "", container, EPHEMERAL);
        if let Some(last) = out.last_mut() {
            last.truncate(last.trim_end_matches(',').len());
        }
        out
    };
    unified(&lines(old), &lines(new))
}

fn lines(spec: &Value) -> Vec<String> {
    let mut spec = spec.clone();
    // The host's namespaces belong to the security context there.
    for field in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "hostUsers"] {
        if let Some(value) = meta::remove(&mut spec, &[field]) {
            meta::set(&mut spec, &["securityContext", field], value);
        }
    }
    let mut out = Vec::new();
    structure(&mut out, 0, "", &spec, POD);
    if let Some(last) = out.last_mut() {
        last.truncate(last.trim_end_matches(',').len());
    }
    out
}

fn line(out: &mut Vec<String>, indent: usize, text: impl Into<String>) {
    out.push(format!("{}{}", " ".repeat(indent), text.into()));
}

fn structure(out: &mut Vec<String>, indent: usize, label: &str, value: &Value, fields: Fields) {
    line(out, indent, format!("{label}{{"));
    for (i, (name, shape)) in fields.iter().enumerate() {
        let member = value.get(document_name(name)).unwrap_or(&Value::Null);
        let comma = if i + 1 < fields.len() { "," } else { "" };
        field(out, indent + 1, name, member, *shape);
        if let Some(last) = out.last_mut() {
            last.push_str(comma);
        }
    }
    line(out, indent, "}");
}

fn field(out: &mut Vec<String>, indent: usize, name: &str, value: &Value, shape: Shape) {
    let label = format!("\"{name}\": ");
    match (shape, value) {
        (Text, Value::Null) => line(out, indent, format!("{label}\"\"")),
        (Number, Value::Null) => line(out, indent, format!("{label}0")),
        (Flag, Value::Null) => line(out, indent, format!("{label}false")),
        (Struct(fields), value) => structure(out, indent, &label, value, fields),
        (List(fields), Value::Array(items)) if !items.is_empty() => {
            line(out, indent, format!("{label}["));
            for (i, item) in items.iter().enumerate() {
                structure(out, indent + 1, "", item, fields);
                if let (true, Some(last)) = (i + 1 < items.len(), out.last_mut()) {
                    last.push(',');
                }
            }
            line(out, indent, "]");
        }
        (List(_), _) => line(out, indent, format!("{label}null")),
        (Any | Text | Number | Flag, value) => any(out, indent, &label, value),
    }
}

fn any(out: &mut Vec<String>, indent: usize, label: &str, value: &Value) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            line(out, indent, format!("{label}["));
            for (i, item) in items.iter().enumerate() {
                any(out, indent + 1, "", item);
                if let (true, Some(last)) = (i + 1 < items.len(), out.last_mut()) {
                    last.push(',');
                }
            }
            line(out, indent, "]");
        }
        Value::Object(map) if !map.is_empty() => {
            line(out, indent, format!("{label}{{"));
            for (i, (key, member)) in map.iter().enumerate() {
                let mut chars = key.chars();
                let name: String = chars.next().map(|c| c.to_ascii_uppercase()).into_iter().chain(chars).collect();
                any(out, indent + 1, &format!("{}: ", json!(name)), member);
                if let (true, Some(last)) = (i + 1 < map.len(), out.last_mut()) {
                    last.push(',');
                }
            }
            line(out, indent, "}");
        }
        scalar => line(out, indent, format!("{label}{scalar}")),
    }
}

/// Lines before and after a change that are shown with it.
const CONTEXT: usize = 3;

/// A stretch of lines in both texts: from and to in the old one, from and to in the new one.
type Stretch = (usize, usize, usize, usize);

/// The differences as `diff -u` writes them, without file names.
fn unified(old: &[String], new: &[String]) -> String {
    let mut equal = Vec::new();
    matches(old, new, (0, old.len(), 0, new.len()), &mut equal);
    let mut changes: Vec<Stretch> = Vec::new();
    let (mut a, mut b) = (0, 0);
    for (start, to, other) in equal.into_iter().chain([(old.len(), old.len(), new.len())]) {
        if start > a || other > b {
            changes.push((a, start, b, other));
        }
        (a, b) = (to, other + (to - start));
    }
    let mut text = String::new();
    let mut rest = changes.as_slice();
    while let Some(first) = rest.first() {
        // Changes whose context would touch are one hunk.
        let mut count = 1;
        while count < rest.len() && rest[count].0 - rest[count - 1].1 <= 2 * CONTEXT {
            count += 1;
        }
        let (hunk, later) = rest.split_at(count);
        rest = later;
        let last = hunk[count - 1];
        let from = first.0.saturating_sub(CONTEXT);
        let to = (last.1 + CONTEXT).min(old.len());
        let new_from = first.2 - (first.0 - from);
        let new_to = last.3 + (to - last.1);
        text.push_str(&format!("@@ -{},{} +{},{} @@\n", from + 1, to - from, new_from + 1, new_to - new_from));
        let mut push = |mark: char, lines: &[String]| {
            for line in lines {
                text.push(mark);
                text.push_str(line);
                text.push('\n');
            }
        };
        let mut at = from;
        for (a, a_to, b, b_to) in hunk {
            push(' ', &old[at..*a]);
            push('-', &old[*a..*a_to]);
            push('+', &new[*b..*b_to]);
            at = *a_to;
        }
        push(' ', &old[at..to]);
    }
    text
}

/// Equal stretches in order, the longest one first found and then those on its two sides: (from, to, place in new).
fn matches(old: &[String], new: &[String], within: Stretch, found: &mut Vec<(usize, usize, usize)>) {
    let (a_from, a_to, b_from, b_to) = within;
    let mut places: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (b, line) in new[b_from..b_to].iter().enumerate() {
        places.entry(line).or_default().push(b_from + b);
    }
    let (mut best_a, mut best_b, mut best) = (a_from, b_from, 0);
    let mut ending: BTreeMap<usize, usize> = BTreeMap::new();
    for (a, line) in old.iter().enumerate().take(a_to).skip(a_from) {
        let mut now = BTreeMap::new();
        for &b in places.get(line.as_str()).into_iter().flatten() {
            let length = b.checked_sub(1).and_then(|before| ending.get(&before)).copied().unwrap_or(0) + 1;
            now.insert(b, length);
            if length > best {
                (best_a, best_b, best) = (a + 1 - length, b + 1 - length, length);
            }
        }
        ending = now;
    }
    if best == 0 {
        return;
    }
    matches(old, new, (a_from, best_a, b_from, best_b), found);
    found.push((best_a, best_a + best, best_b));
    matches(old, new, (best_a + best, a_to, best_b + best, b_to), found);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(lines: &str) -> Vec<String> {
        lines.chars().map(|c| c.to_string()).collect()
    }

    #[test]
    fn differences_are_shown_in_hunks_with_context() {
        let rows = [
            ("nothing", "abc", "abc", ""),
            ("a_change", "abcdefghi", "abcdXfghi", "@@ -2,7 +2,7 @@\n b\n c\n d\n-e\n+X\n f\n g\n h\n"),
            ("an_insertion_at_the_start", "ab", "Xab", "@@ -1,2 +1,3 @@\n+X\n a\n b\n"),
            ("a_removal_at_the_end", "ab", "a", "@@ -1,2 +1,1 @@\n a\n-b\n"),
            ("nothing_in_common", "a", "b", "@@ -1,1 +1,1 @@\n-a\n+b\n"),
            (
                "two_hunks",
                "1abcdefgh2",
                "XabcdefghY",
                "@@ -1,4 +1,4 @@\n-1\n+X\n a\n b\n c\n@@ -7,4 +7,4 @@\n f\n g\n h\n-2\n+Y\n",
            ),
        ];
        for (name, old, new, want) in rows {
            assert_eq!(unified(&text(old), &text(new)), want, "{name}");
        }
    }

    #[test]
    fn a_spec_is_written_with_every_field() {
        let written =
            lines(&json!({"containers": [{"name": "c", "ports": [{"containerPort": 80}]}], "hostNetwork": true}));
        assert_eq!(&written[..4], ["{", " \"Volumes\": null,", " \"InitContainers\": null,", " \"Containers\": ["]);
        assert!(written.contains(&"     \"ContainerPort\": 80,".to_owned()));
        assert!(written.contains(&"  \"HostNetwork\": true,".to_owned()));
        assert_eq!(written.last().map(String::as_str), Some("}"));
    }
}
