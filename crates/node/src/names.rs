//! Names and paths that the agent gives to what it makes.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The directory that holds everything of one pod: `NAMESPACE_NAME_UID`, unambiguous because names have no underscore.
pub(crate) fn pod_dir_name(namespace: &str, name: &str, uid: &str) -> String {
    format!("{namespace}_{name}_{uid}")
}

/// The path of the network namespace of pod `namespace/name` on any node of the cluster that runs in `run_dir`.
///
/// `None` when no such pod runs. Host-network pods have none of their own.
pub fn pod_netns(run_dir: &Path, namespace: &str, name: &str) -> Option<PathBuf> {
    let nodes = std::fs::read_dir(run_dir.join("node")).ok()?;
    nodes.flatten().find_map(|node| pod_netns_in(&node.path(), namespace, name))
}

/// Like [`pod_netns`], but looks only in one node's directory (`{run_dir}/node/{node}`).
pub fn pod_netns_in(node_dir: &Path, namespace: &str, name: &str) -> Option<PathBuf> {
    let prefix = format!("{namespace}_{name}_");
    let mut found: Vec<_> = std::fs::read_dir(node_dir.join("pods"))
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path().join("net"))
        .filter(|path| path.exists())
        .collect();
    // A StatefulSet's next pod may start while the last one is being removed: the newest is meant.
    found.sort_by_key(|path| std::fs::metadata(path.parent().unwrap_or(path)).and_then(|m| m.modified()).ok());
    found.pop()
}

/// Name of the node's end of a pod's veth pair: `vp` and ten hexadecimal digits of a hash of the pod's uid.
///
/// Interface names hold 15 bytes; the prefix tells the service proxy that traffic comes from a local pod.
pub(crate) fn veth_name(uid: &str) -> String {
    let digest = Sha256::digest(uid.as_bytes());
    format!("vp{}", hex(&digest[..5]))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn veth_names_fit_an_interface_name() {
        let name = veth_name("0d5e6ae2-3c5c-4b3e-9a7f-0c4dc1a1e111");
        assert_eq!(name.len(), 12);
        assert!(name.starts_with("vp"));
        assert_ne!(name, veth_name("0d5e6ae2-3c5c-4b3e-9a7f-0c4dc1a1e112"));
    }

    #[test]
    fn a_pod_is_found_by_namespace_and_name_only() {
        let dir = std::env::temp_dir().join(format!("portolan-names-{}", std::process::id()));
        let pod = dir.join("node/node-1/pods").join(pod_dir_name("shop", "web-1", "u1"));
        std::fs::create_dir_all(&pod).unwrap();
        assert_eq!(pod_netns(&dir, "shop", "web-1"), None, "a pod without a namespace");
        std::fs::write(pod.join("net"), "").unwrap();
        assert_eq!(pod_netns(&dir, "shop", "web-1"), Some(pod.join("net")));
        assert_eq!(pod_netns(&dir, "shop", "web"), None, "no prefix match of names");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
