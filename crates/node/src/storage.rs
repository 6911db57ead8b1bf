//! Local ephemeral storage: what the pods of a node write to its disk, held to their limits by eviction
//! (Kubernetes documentation, "Local ephemeral storage"). Limits are looked at now and then, so a pod can exceed one for a while.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, PodSpec};

use crate::volume::quantity_bytes;

/// A limit: how the pod spells it, and what that is in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    text: String,
    bytes: u64,
}

impl Limit {
    fn parse(text: &str) -> Option<Limit> {
        quantity_bytes(text).map(|bytes| Limit { text: text.to_string(), bytes })
    }
}

/// The limits of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sum of the containers' limits, if each has one.
    pod: Option<u64>,
    containers: Vec<(String, Limit)>,
    /// Of emptyDir volumes on the disk; those in memory are bounded by the kernel.
    volumes: Vec<(String, Limit)>,
}

impl Limits {
    /// Whether there is nothing to look after.
    pub(crate) fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.volumes.is_empty()
    }
}

/// What a pod uses, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Writable layer and logs, by container.
    pub containers: Vec<(String, u64)>,
    /// By emptyDir volume.
    pub volumes: Vec<(String, u64)>,
}

/// The emptyDir volumes that lie on the disk.
pub(crate) fn disk_volumes(spec: &PodSpec) -> impl Iterator<Item = (&str, Option<&str>)> {
    spec.volumes.iter().flatten().filter_map(|volume| {
        let source = volume.empty_dir.as_ref().filter(|s| s.medium.as_deref().unwrap_or_default().is_empty())?;
        Some((volume.name.as_str(), source.size_limit.as_ref().map(|q| q.0.as_str())))
    })
}

/// The limits that a pod asks for.
pub(crate) fn limits(spec: &PodSpec) -> Limits {
    let limit = |container: &Container| {
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        Limit::parse(&limits.get("ephemeral-storage")?.0)
    };
    let containers: Vec<(String, Limit)> =
        spec.containers.iter().filter_map(|c| Some((c.name.clone(), limit(c)?))).collect();
    let all = !containers.is_empty() && containers.len() == spec.containers.len();
    Limits {
        pod: all.then(|| containers.iter().map(|(_, limit)| limit.bytes).sum()),
        containers,
        volumes: disk_volumes(spec).filter_map(|(name, text)| Some((name.to_string(), Limit::parse(text?)?))).collect(),
    }
}

/// Why the pod has to go, if it does: the kubelet's message of the first limit that is exceeded.
pub(crate) fn excess(limits: &Limits, usage: &Usage) -> Option<String> {
    let used = |list: &[(String, u64)], name: &str| list.iter().find(|(n, _)| n == name).map_or(0, |(_, bytes)| *bytes);
    if let Some((name, limit)) = limits.volumes.iter().find(|(name, limit)| used(&usage.volumes, name) > limit.bytes) {
        return Some(format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{}\". ", limit.text));
    }
    let total: u64 = usage.containers.iter().chain(&usage.volumes).map(|(_, bytes)| bytes).sum();
    if limits.pod.is_some_and(|limit| total > limit) {
        let text = match limits.containers.as_slice() {
            [(_, only)] => only.text.clone(),
            _ => limits.pod.unwrap_or_default().to_string(),
        };
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {text}. "));
    }
    let (name, limit) = limits.containers.iter().find(|(name, limit)| used(&usage.containers, name) > limit.bytes)?;
    Some(format!("Container {name} exceeded its local ephemeral storage limit \"{}\". ", limit.text))
}

/// Where a pod's files are: each name with its directories.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    pub containers: Vec<(String, Vec<PathBuf>)>,
    pub volumes: Vec<(String, Vec<PathBuf>)>,
}

/// Measures; reads directories, so it may take a while.
pub(crate) fn measure(places: &Places) -> Usage {
    let sum = |list: &[(String, Vec<PathBuf>)]| {
        list.iter().map(|(name, dirs)| (name.clone(), dirs.iter().map(|dir| disk_usage(dir)).sum())).collect()
    };
    Usage { containers: sum(&places.containers), volumes: sum(&places.volumes) }
}

/// Bytes of disk below a directory. Files that vanish meanwhile do not count, hard links count once, links are not followed.
fn disk_usage(dir: &Path) -> u64 {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    let mut left = vec![dir.to_path_buf()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                left.push(entry.path());
            }
            if meta.nlink() <= 1 || meta.is_dir() || seen.insert((meta.dev(), meta.ino())) {
                bytes += meta.blocks() * 512;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: &[(&str, Option<&str>)], volumes: serde_json::Value) -> PodSpec {
        let containers: Vec<_> = containers
            .iter()
            .map(|(name, limit)| json!({"name": name, "resources": {"limits": limit.map(|l| json!({"ephemeral-storage": l}))}}))
            .collect();
        serde_json::from_value(json!({"containers": containers, "volumes": volumes})).unwrap()
    }

    #[test]
    fn the_first_limit_exceeded_is_told() {
        const MI: u64 = 1 << 20;
        let one = pod(&[("a", Some("5Mi"))], json!([]));
        let two = pod(&[("a", Some("5Mi")), ("b", Some("1Mi"))], json!([]));
        let some = pod(&[("a", Some("5Mi")), ("b", None)], json!([]));
        let volumes = pod(
            &[("a", None)],
            json!([{"name": "v", "emptyDir": {"sizeLimit": "2Mi"}}, {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "w", "emptyDir": {}}]),
        );
        type Sizes = &'static [(&'static str, u64)];
        let rows: &[(&PodSpec, Sizes, Sizes, Option<&str>)] = &[
            (&one, &[("a", 5 * MI)], &[], None),
            (
                &one,
                &[("a", 5 * MI + 1)],
                &[],
                Some("Pod ephemeral local storage usage exceeds the total limit of containers 5Mi. "),
            ),
            (
                &one,
                &[("a", 4 * MI)],
                &[("w", 2 * MI)],
                Some("Pod ephemeral local storage usage exceeds the total limit of containers 5Mi. "),
            ),
            (
                &two,
                &[("a", MI), ("b", 2 * MI)],
                &[],
                Some("Container b exceeded its local ephemeral storage limit \"1Mi\". "),
            ),
            (
                &two,
                &[("a", 5 * MI), ("b", 2 * MI)],
                &[],
                Some("Pod ephemeral local storage usage exceeds the total limit of containers 6291456. "),
            ),
            (&some, &[("a", MI), ("b", 900 * MI)], &[], None),
            (
                &some,
                &[("a", 6 * MI), ("b", 0)],
                &[],
                Some("Container a exceeded its local ephemeral storage limit \"5Mi\". "),
            ),
            (
                &volumes,
                &[("a", 900 * MI)],
                &[("v", 3 * MI)],
                Some("Usage of EmptyDir volume \"v\" exceeds the limit \"2Mi\". "),
            ),
            (&volumes, &[("a", 900 * MI)], &[("v", MI), ("w", 900 * MI)], None),
        ];
        for (spec, containers, disk, expected) in rows {
            let own = |list: &[(&str, u64)]| list.iter().map(|(name, bytes)| (name.to_string(), *bytes)).collect();
            let usage = Usage { containers: own(containers), volumes: own(disk) };
            assert_eq!(excess(&limits(spec), &usage).as_deref(), *expected, "{usage:?}");
        }
        assert!(limits(&pod(&[("a", None)], json!([{"name": "w", "emptyDir": {}}]))).is_empty());
    }

    #[test]
    fn files_are_counted_once_and_links_not_followed() {
        let dir = std::env::temp_dir().join(format!("portolan-storage-{}", uuid::Uuid::new_v4().simple()));
        let file = dir.join("sub/file");
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(&file, vec![1; 1 << 20]).unwrap();
        let base = disk_usage(&dir);
        assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&base), "{base}");
        fs::hard_link(&file, dir.join("again")).unwrap();
        std::os::unix::fs::symlink("/usr", dir.join("away")).unwrap();
        assert!(disk_usage(&dir) < base + (64 << 10));
        assert_eq!(disk_usage(&dir.join("none")), 0);
        fs::remove_dir_all(&dir).unwrap();
    }
}
