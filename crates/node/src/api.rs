//! What the agent asks of the API server, behind a trait so that pods can be run without one.

use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference, Pod, PodStatus, Secret, Service, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use portolan_client::EventRecorder;
pub use portolan_client::EventType;
use serde_json::{Value, json};

/// Why an object could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// There is none of that name; the text is the server's (`configmaps "x" not found`).
    #[error("{0}")]
    NotFound(String),
    /// The server did not answer or refused.
    #[error("{0}")]
    Failed(String),
}

impl From<kube::Error> for LookupError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 404 => LookupError::NotFound(status.message.clone()),
            kube::Error::Api(status) => LookupError::Failed(status.message.clone()),
            other => LookupError::Failed(other.to_string()),
        }
    }
}

/// A token for a pod's service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundToken {
    /// The bearer token.
    pub token: String,
    /// When it ends.
    pub expires: Timestamp,
}

/// The part of the API that running a pod needs.
pub trait NodeApi: Send + Sync + 'static {
    /// Records an event about a pod, one of its containers, or the node.
    fn event(&self, object: &ObjectReference, kind: EventType, reason: &str, message: String);
    /// A ConfigMap.
    fn config_map(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<ConfigMap, LookupError>>;
    /// A Secret.
    fn secret(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<Secret, LookupError>>;
    /// A Service.
    fn service(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<Service, LookupError>>;
    /// The Services of a namespace.
    fn services(&self, namespace: &str) -> BoxFuture<'static, Result<Vec<Service>, LookupError>>;
    /// A token of the pod's service account, bound to the pod. An empty audience means the API server's own.
    fn token(&self, pod: &Pod, audience: &str, seconds: i64) -> BoxFuture<'static, Result<BoundToken, LookupError>>;
    /// Writes a pod's status. Conditions of types that are not in `status` stay as they are.
    fn write_status(&self, pod: &Pod, status: PodStatus) -> BoxFuture<'static, Result<(), LookupError>>;
    /// Removes a pod that has been stopped, if it is still the one with this uid.
    fn delete_pod(&self, pod: &Pod) -> BoxFuture<'static, Result<(), LookupError>>;
}

/// The API through a Kubernetes client.
#[derive(Clone)]
pub struct KubeApi {
    client: Client,
    events: EventRecorder,
}

impl KubeApi {
    /// Events come from component `kubelet` on host `node`.
    pub fn new(client: Client, node: &str) -> KubeApi {
        let events = EventRecorder::new(client.clone(), "kubelet", Some(node.to_string()));
        KubeApi { client, events }
    }
}

fn names(pod: &Pod) -> (String, String, String) {
    let meta = &pod.metadata;
    (
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
        meta.uid.clone().unwrap_or_default(),
    )
}

impl NodeApi for KubeApi {
    fn event(&self, object: &ObjectReference, kind: EventType, reason: &str, message: String) {
        self.events.event(object, kind, reason, message);
    }

    fn config_map(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<ConfigMap, LookupError>> {
        let (api, name) = (Api::namespaced(self.client.clone(), namespace), name.to_string());
        Box::pin(async move { Ok(api.get(&name).await?) })
    }

    fn secret(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<Secret, LookupError>> {
        let (api, name) = (Api::namespaced(self.client.clone(), namespace), name.to_string());
        Box::pin(async move { Ok(api.get(&name).await?) })
    }

    fn service(&self, namespace: &str, name: &str) -> BoxFuture<'static, Result<Service, LookupError>> {
        let (api, name) = (Api::namespaced(self.client.clone(), namespace), name.to_string());
        Box::pin(async move { Ok(api.get(&name).await?) })
    }

    fn services(&self, namespace: &str) -> BoxFuture<'static, Result<Vec<Service>, LookupError>> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        Box::pin(async move { Ok(api.list(&ListParams::default()).await?.items) })
    }

    fn token(&self, pod: &Pod, audience: &str, seconds: i64) -> BoxFuture<'static, Result<BoundToken, LookupError>> {
        let (namespace, name, uid) = names(pod);
        let account = pod.spec.as_ref().and_then(|s| s.service_account_name.clone()).filter(|a| !a.is_empty());
        let account = account.unwrap_or_else(|| "default".to_string());
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &namespace);
        let request = TokenRequest {
            metadata: ObjectMeta::default(),
            spec: Some(TokenRequestSpec {
                audiences: (!audience.is_empty()).then(|| vec![audience.to_string()]),
                expiration_seconds: Some(seconds),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_string()),
                    kind: Some("Pod".to_string()),
                    name: Some(name),
                    uid: Some(uid),
                }),
            }),
            status: None,
        };
        Box::pin(async move {
            let made = api.create_token_request(&account, &PostParams::default(), &request).await?;
            let status = made.status.ok_or_else(|| LookupError::Failed("the server gave no token".to_string()))?;
            match (status.token, status.expiration_timestamp) {
                (Some(token), Some(expires)) => Ok(BoundToken { token, expires: expires.0 }),
                _ => Err(LookupError::Failed("the server gave no token".to_string())),
            }
        })
    }

    fn write_status(&self, pod: &Pod, status: PodStatus) -> BoxFuture<'static, Result<(), LookupError>> {
        let (namespace, name, uid) = names(pod);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        Box::pin(async move {
            let patch = status_patch(&uid, &status)?;
            api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
            Ok(())
        })
    }

    fn delete_pod(&self, pod: &Pod) -> BoxFuture<'static, Result<(), LookupError>> {
        let (namespace, name, uid) = names(pod);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
            ..DeleteParams::default()
        };
        Box::pin(async move {
            match api.delete(&name, &params).await {
                // 409: a new pod of that name exists already, so ours is gone.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
                other => Ok(other.map(|_| ())?),
            }
        })
    }
}

/// The patch that makes a stored status equal to ours: fields that we no longer have are removed, and the uid makes the
/// server refuse it for a later pod of the same name.
fn status_patch(uid: &str, status: &PodStatus) -> Result<Value, LookupError> {
    let mut status = serde_json::to_value(status).map_err(|e| LookupError::Failed(e.to_string()))?;
    if let Some(fields) = status.as_object_mut() {
        for name in ["reason", "message", "podIP", "podIPs"] {
            fields.entry(name).or_insert(Value::Null);
        }
        // Condition fields that disappear must be named too: conditions merge by type.
        for condition in fields.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(condition) = condition.as_object_mut() {
                for name in ["reason", "message"] {
                    condition.entry(name).or_insert(Value::Null);
                }
            }
        }
    }
    Ok(json!({"metadata": {"uid": uid}, "status": status}))
}

/// A reference for events about a pod, or about one of its containers when `container` is `(field, name)` as in
/// `("containers", "web")`.
pub(crate) fn pod_reference(pod: &Pod, container: Option<(&str, &str)>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_string()),
        kind: Some("Pod".to_string()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: container.map(|(field, name)| format!("spec.{field}{{{name}}}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_removes_what_is_no_longer_so() {
        let status = PodStatus { phase: Some("Running".into()), ..Default::default() };
        let patch = status_patch("u1", &status).unwrap();
        assert_eq!(patch["metadata"]["uid"], "u1");
        assert_eq!(patch["status"]["phase"], "Running");
        assert!(patch["status"].as_object().unwrap().get("reason").unwrap().is_null());
    }
}
