//! What every namespace has: the ServiceAccount `default` and a ConfigMap with the cluster's root certificate.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;

use crate::Context;
use crate::cache::ROOT_CA;
use crate::queue::{Key, Next, Queue};
use crate::util::{already_exists, is_namespace_terminating, is_not_found};

const DESCRIPTION: &str = "kubernetes.io/description";
const DESCRIPTION_TEXT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of \
Kubernetes clusters.";

/// The ConfigMap with the root certificate that a namespace should have, if the present one differs.
pub fn root_ca(namespace: &str, ca: &str, existing: Option<&ConfigMap>) -> Option<ConfigMap> {
    let data = BTreeMap::from([("ca.crt".to_string(), ca.to_string())]);
    let described =
        existing.is_some_and(|m| m.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(DESCRIPTION)));
    if described && existing.and_then(|m| m.data.as_ref()) == Some(&data) {
        return None;
    }
    let mut metadata = existing.map(|m| m.metadata.clone()).unwrap_or_else(|| ObjectMeta {
        name: Some(ROOT_CA.into()),
        namespace: Some(namespace.into()),
        ..Default::default()
    });
    metadata.annotations.get_or_insert_default().insert(DESCRIPTION.into(), DESCRIPTION_TEXT.into());
    Some(ConfigMap { metadata, data: Some(data), ..Default::default() })
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context, accounts: bool, ca: Option<String>) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("serviceaccount");
    let add = queue.clone();
    context.caches.namespaces.on_change(move |_, new| {
        if let Some(name) = new.and_then(|n| n.metadata.name.clone()) {
            add.add(Key::new("", name));
        }
    });
    if accounts {
        let add = queue.clone();
        context.caches.service_accounts.on_change(move |old, new| {
            if let (Some(old), None) = (old, new) {
                add.add(Key::new("", old.metadata.namespace.clone().unwrap_or_default()));
            }
        });
    }
    if ca.is_some() {
        let add = queue.clone();
        context.caches.root_cas.on_change(move |old, new| {
            if let Some(map) = new.or(old) {
                add.add(Key::new("", map.metadata.namespace.clone().unwrap_or_default()));
            }
        });
    }
    async move {
        let stop = context.shutdown.clone();
        let ca = ca.map(Arc::<str>::from);
        queue.work(2, stop, move |key| sync(context.clone(), accounts, ca.clone(), key.name)).await;
    }
}

fn is_active(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_none()
        && namespace.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Terminating")
}

async fn sync(context: Context, accounts: bool, ca: Option<Arc<str>>, namespace: String) -> anyhow::Result<Next> {
    let caches = &context.caches;
    if caches.namespaces.get("", &namespace).is_none_or(|n| !is_active(&n)) {
        return Ok(Next::Wait);
    }
    if accounts && caches.service_accounts.get(&namespace, "default").is_none() {
        let api: Api<ServiceAccount> = Api::namespaced(context.client.clone(), &namespace);
        let account = ServiceAccount {
            metadata: ObjectMeta {
                name: Some("default".into()),
                namespace: Some(namespace.clone()),
                ..Default::default()
            },
            ..Default::default()
        };
        match api.create(&PostParams::default(), &account).await {
            Ok(made) => caches.service_accounts.wrote_quietly(made),
            Err(error) if already_exists(&error) || is_namespace_terminating(&error) || is_not_found(&error) => {}
            Err(error) => return Err(error).context("cannot create the default service account"),
        }
    }
    if let Some(ca) = ca {
        let existing = caches.root_cas.get(&namespace, ROOT_CA);
        if let Some(wanted) = root_ca(&namespace, &ca, existing.as_deref()) {
            let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), &namespace);
            let written = match existing {
                None => api.create(&PostParams::default(), &wanted).await,
                Some(_) => api.replace(ROOT_CA, &PostParams::default(), &wanted).await,
            };
            match written {
                Ok(written) => caches.root_cas.wrote_quietly(written),
                Err(error) if is_namespace_terminating(&error) || is_not_found(&error) => {}
                Err(error) => return Err(error).context("cannot publish the root certificate"),
            }
        }
    }
    Ok(Next::Wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_is_published_and_put_back() {
        let fresh = root_ca("ns", "CERT", None).unwrap();
        assert_eq!(fresh.data.as_ref().unwrap()["ca.crt"], "CERT");
        assert!(root_ca("ns", "CERT", Some(&fresh)).is_none());
        let mut edited = fresh.clone();
        edited.data = Some(BTreeMap::from([("ca.crt".to_string(), "other".to_string())]));
        edited.metadata.resource_version = Some("7".into());
        let back = root_ca("ns", "CERT", Some(&edited)).unwrap();
        assert_eq!(back.metadata.resource_version.as_deref(), Some("7"), "an edit is replaced, not made anew");
    }
}
