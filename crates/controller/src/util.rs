//! Small helpers around API objects and errors.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;

/// A reference to an object, for events about it.
pub(crate) fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    let meta = object.meta();
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        ..Default::default()
    }
}

/// The owner reference of a controller on what it makes.
pub(crate) fn controller_reference<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    let meta = owner.meta();
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The reference to the controlling owner, if there is one.
pub(crate) fn controller_of<K: Resource>(object: &K) -> Option<&OwnerReference> {
    object.meta().owner_references.iter().flatten().find(|o| o.controller == Some(true))
}

/// Whether `object` is controlled by the object with this uid.
pub(crate) fn is_controlled_by<K: Resource>(object: &K, uid: Option<&str>) -> bool {
    uid.is_some() && controller_of(object).map(|o| o.uid.as_str()) == uid
}

/// Whether the API server refused a creation because the namespace is being deleted, or has been.
pub(crate) fn is_namespace_terminating(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.details.as_ref().is_some_and(|details| {
            status.code == 404 && details.kind == "namespaces"
                || details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating")
        }),
        _ => false,
    }
}

/// Whether the API server does not know the object (or the namespace).
pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether the object has changed since it was read.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 && status.reason != "AlreadyExists")
}

/// Whether a patch that names a uid was refused because another object has the name by now.
pub(crate) fn is_replaced(error: &kube::Error) -> bool {
    let immutable = |status: &kube::core::Status| {
        let causes = status.details.iter().flat_map(|details| &details.causes);
        status.code == 422 && causes.into_iter().any(|cause| cause.field == "metadata.uid")
    };
    is_conflict(error) || matches!(error, kube::Error::Api(status) if immutable(status))
}

/// Whether an object of this name is there.
pub(crate) fn already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists")
}

/// The text of an API error for an event: the server's message alone.
pub(crate) fn message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}
