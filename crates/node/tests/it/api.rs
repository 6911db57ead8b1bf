//! A stand-in for the API server: keeps what the agent writes and hands out what the test put in.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference, Pod, PodStatus, Secret, Service};
use portolan_node::{BoundToken, EventType, LookupError, NodeApi};
use tokio::sync::Notify;

#[derive(Default)]
pub struct Store {
    pub config_maps: HashMap<String, ConfigMap>,
    pub secrets: HashMap<String, Secret>,
    pub services: Vec<Service>,
    pub statuses: HashMap<String, PodStatus>,
    pub history: Vec<(String, String)>,
    pub events: Vec<(String, String, String)>,
    pub deleted: Vec<String>,
}

#[derive(Default)]
pub struct FakeApi {
    store: Mutex<Store>,
    changed: Notify,
}

fn name_of(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap_or_default()
}

impl FakeApi {
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    /// Waits until `check` gives something; panics with the store's statuses and events after the deadline.
    pub async fn wait<T>(&self, what: &str, seconds: u64, check: impl Fn(&Store) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(seconds);
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if let Some(found) = check(&self.store()) {
                return found;
            }
            if tokio::time::timeout_at(deadline, notified).await.is_err() {
                let store = self.store();
                panic!("{what} did not happen; statuses {:#?}\nevents {:#?}", store.statuses, store.events);
            }
        }
    }

    /// Waits until the pod's status satisfies `check`.
    pub async fn status(&self, pod: &str, what: &str, check: impl Fn(&PodStatus) -> bool) -> PodStatus {
        self.wait(&format!("pod {pod}: {what}"), 20, |s| s.statuses.get(pod).filter(|s| check(s)).cloned()).await
    }

    pub async fn ready(&self, pod: &str) -> PodStatus {
        self.status(pod, "ready", |s| condition(s, "Ready") == "True").await
    }

    pub async fn phase(&self, pod: &str, phase: &str) -> PodStatus {
        self.status(pod, phase, |s| s.phase.as_deref() == Some(phase)).await
    }

    /// Waits for an event whose message contains `text`.
    pub async fn event(&self, reason: &str, text: &str) -> String {
        self.wait(&format!("event {reason} {text:?}"), 20, |s| {
            s.events.iter().find(|(_, r, m)| r == reason && m.contains(text)).map(|(_, _, m)| m.clone())
        })
        .await
    }

    pub fn reasons(&self, pod: &str) -> Vec<String> {
        self.store().events.iter().filter(|(name, ..)| name == pod).map(|(_, reason, _)| reason.clone()).collect()
    }
}

pub fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a str {
    let list = status.conditions.as_deref().unwrap_or_default();
    list.iter().find(|c| c.type_ == kind).map_or("", |c| c.status.as_str())
}

impl NodeApi for FakeApi {
    fn event(&self, object: &ObjectReference, _kind: EventType, reason: &str, message: String) {
        let name = object.name.clone().unwrap_or_default();
        self.store().events.push((name, reason.to_string(), message));
        self.changed.notify_waiters();
    }

    fn config_map(&self, _namespace: &str, name: &str) -> BoxFuture<'static, Result<ConfigMap, LookupError>> {
        let found = self.store().config_maps.get(name).cloned();
        let missing = LookupError::NotFound(format!("configmaps \"{name}\" not found"));
        Box::pin(async move { found.ok_or(missing) })
    }

    fn secret(&self, _namespace: &str, name: &str) -> BoxFuture<'static, Result<Secret, LookupError>> {
        let found = self.store().secrets.get(name).cloned();
        let missing = LookupError::NotFound(format!("secrets \"{name}\" not found"));
        Box::pin(async move { found.ok_or(missing) })
    }

    fn service(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<Service, LookupError>> {
        let wanted = (Some(namespace.to_string()), Some(name.to_string()));
        let store = self.store();
        let found = store.services.iter().find(|s| (s.metadata.namespace.clone(), s.metadata.name.clone()) == wanted);
        let found = found.cloned().ok_or_else(|| LookupError::NotFound(format!("services \"{name}\" not found")));
        Box::pin(async move { found })
    }

    fn services(&self, namespace: &str) -> BoxFuture<'static, Result<Vec<Service>, LookupError>> {
        let store = self.store();
        let own = store.services.iter().filter(|s| s.metadata.namespace.as_deref() == Some(namespace));
        let own: Vec<Service> = own.cloned().collect();
        Box::pin(async move { Ok(own) })
    }

    fn token(&self, pod: &Pod, audience: &str, seconds: i64) -> BoxFuture<'static, Result<BoundToken, LookupError>> {
        let token = format!("token-of-{}-for-{audience}", name_of(pod));
        let expires = Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        Box::pin(async move { Ok(BoundToken { token, expires }) })
    }

    fn write_status(&self, pod: &Pod, status: PodStatus) -> BoxFuture<'static, Result<(), LookupError>> {
        let mut store = self.store();
        let phase = status.phase.clone().unwrap_or_default();
        let ready = condition(&status, "Ready").to_string();
        store.history.push((name_of(pod), format!("{phase} {ready}")));
        store.statuses.insert(name_of(pod), status);
        drop(store);
        self.changed.notify_waiters();
        Box::pin(async { Ok(()) })
    }

    fn delete_pod(&self, pod: &Pod) -> BoxFuture<'static, Result<(), LookupError>> {
        self.store().deleted.push(name_of(pod));
        self.changed.notify_waiters();
        Box::pin(async { Ok(()) })
    }
}
