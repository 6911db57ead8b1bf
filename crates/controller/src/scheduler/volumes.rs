//! Whether a pod's PersistentVolumeClaims let it run, and where.
//!
//! Nothing here binds claims to volumes: that is left to a volume controller of the cluster's owner. A pod waits until its claims
//! are bound, with the words of kube-scheduler's plugin VolumeBinding.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod, VolumeNodeAffinity};
use k8s_openapi::api::storage::v1::StorageClass;

use super::term_matches;
use crate::util::is_controlled_by;

/// What is to be known about claims, volumes and classes.
pub trait Storage {
    /// The claim of this namespace and name.
    fn claim(&self, namespace: &str, name: &str) -> Option<Arc<PersistentVolumeClaim>>;
    /// The volume of this name.
    fn volume(&self, name: &str) -> Option<Arc<PersistentVolume>>;
    /// The class of this name.
    fn class(&self, name: &str) -> Option<Arc<StorageClass>>;
}

/// What the volumes of a pod ask of nodes.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    affinities: Vec<VolumeNodeAffinity>,
    /// A claim waits for a node before it is bound, but nothing here binds it.
    unbound: bool,
    /// A claim is bound to a volume that does not exist.
    lost: bool,
}

/// The names of the claims that a pod uses, and whether each was made for it (an ephemeral volume).
pub(super) fn claim_names(pod: &Pod) -> Vec<(String, bool)> {
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_deref()).unwrap_or_default();
    let of_volume = |volume: &k8s_openapi::api::core::v1::Volume| {
        if let Some(source) = &volume.persistent_volume_claim {
            return Some((source.claim_name.clone(), false));
        }
        // KEP-1698: the claim of an ephemeral volume is named after pod and volume.
        volume
            .ephemeral
            .as_ref()
            .map(|_| (format!("{}-{}", pod.metadata.name.as_deref().unwrap_or_default(), volume.name), true))
    };
    volumes.iter().filter_map(of_volume).collect()
}

impl Volumes {
    /// Looks at all claims of a pod. The error is why it cannot run anywhere yet.
    pub fn of(pod: &Pod, storage: &dyn Storage) -> Result<Volumes, String> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut volumes = Volumes::default();
        let mut immediate = false;
        for (name, ephemeral) in claim_names(pod) {
            let Some(claim) = storage.claim(namespace, &name) else {
                return Err(if ephemeral {
                    format!("waiting for ephemeral volume controller to create the persistentvolumeclaim \"{name}\"")
                } else {
                    format!("persistentvolumeclaim \"{name}\" not found")
                });
            };
            let spec = claim.spec.clone().unwrap_or_default();
            let volume = spec.volume_name.unwrap_or_default();
            let phase = claim.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
            if phase == "Lost" {
                return Err(format!(
                    "persistentvolumeclaim \"{name}\" bound to non-existent persistentvolume \"{volume}\""
                ));
            }
            if claim.metadata.deletion_timestamp.is_some() {
                return Err(format!("persistentvolumeclaim \"{name}\" is being deleted"));
            }
            if ephemeral && !is_controlled_by(&*claim, pod.metadata.uid.as_deref()) {
                return Err(format!(
                    "PVC {namespace}/{name} was not created for pod {namespace}/{} (pod is not owner)",
                    pod.metadata.name.as_deref().unwrap_or_default()
                ));
            }
            const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
            let completed = claim.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(BIND_COMPLETED));
            if volume.is_empty() || !completed && phase != "Bound" {
                let class = spec.storage_class_name.as_deref().and_then(|class| storage.class(class));
                let waits = class.is_some_and(|c| c.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"));
                if waits && volume.is_empty() {
                    volumes.unbound = true;
                } else {
                    immediate = true;
                }
                continue;
            }
            match storage.volume(&volume) {
                Some(found) => volumes.affinities.extend(found.spec.as_ref().and_then(|s| s.node_affinity.clone())),
                None => volumes.lost = true,
            }
        }
        if immediate {
            return Err("pod has unbound immediate PersistentVolumeClaims".into());
        }
        Ok(volumes)
    }

    /// Why a node cannot serve the volumes. Moving pods away never helps.
    pub fn refusals(&self, node: &Node) -> Vec<&'static str> {
        let mut reasons = Vec::new();
        if self.lost {
            reasons.push("node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)");
        }
        let matches = |affinity: &VolumeNodeAffinity| {
            affinity.required.as_ref().is_none_or(|r| r.node_selector_terms.iter().any(|t| term_matches(t, node)))
        };
        if !self.affinities.iter().all(matches) {
            reasons.push("node(s) didn't match PersistentVolume's node affinity");
        }
        if self.unbound {
            reasons.push("node(s) didn't find available persistent volumes to bind");
        }
        reasons
    }
}
