//! Which change a write answers: the annotation that programming latency is measured from.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::jiff::Timestamp;

/// Remembers, for one Service, the readiness changes that earlier writes have already answered.
#[derive(Clone, Debug, Default)]
pub struct TriggerTimes {
    known: bool,
    pods: BTreeMap<String, Timestamp>,
}

impl TriggerTimes {
    /// The time to annotate in this sync: the Service's creation the first time, afterwards the oldest readiness change of a pod
    /// that is newer than the one remembered for it. `pods` are those that the Service selects.
    pub fn observe(&mut self, service: &Service, pods: &[&Arc<Pod>]) -> Option<Timestamp> {
        let seen: BTreeMap<String, Timestamp> = pods
            .iter()
            .filter_map(|pod| {
                let conditions = pod.status.as_ref()?.conditions.as_ref()?;
                let at = conditions.iter().find(|c| c.type_ == "Ready")?.last_transition_time.as_ref()?.0;
                Some((pod.metadata.name.clone()?, at))
            })
            .collect();
        let oldest_new =
            seen.iter().filter(|(name, at)| self.pods.get(*name).is_none_or(|old| *at > old)).map(|(_, at)| *at).min();
        self.pods = seen;
        if std::mem::replace(&mut self.known, true) {
            oldest_new
        } else {
            service.metadata.creation_timestamp.as_ref().map(|t| t.0)
        }
    }
}
