//! What types and fields mean, taken at run time from the client types.

use k8s_openapi::api as k8s;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use schemars::SchemaGenerator;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::OnceLock;

/// Texts about one type.
#[derive(Debug, Default)]
pub(super) struct Described {
    /// About the type itself.
    pub(super) text: Option<String>,
    /// About its fields.
    pub(super) fields: HashMap<String, String>,
}

/// The texts about the type of that OpenAPI name.
pub(super) fn of(name: &str) -> Option<&'static Described> {
    static DESCRIPTIONS: OnceLock<HashMap<String, Described>> = OnceLock::new();
    DESCRIPTIONS.get_or_init(collect).get(name)
}

macro_rules! schemas {
    ($generator:ident: $($ty:path),* $(,)?) => { $( let _ = $generator.subschema_for::<$ty>(); )* };
}

fn collect() -> HashMap<String, Described> {
    let mut generator = SchemaGenerator::default();
    schemas!(generator:
        k8s::core::v1::Binding, k8s::core::v1::ConfigMap, k8s::core::v1::Endpoints, k8s::core::v1::Event,
        k8s::core::v1::LimitRange, k8s::core::v1::Namespace, k8s::core::v1::Node, k8s::core::v1::PersistentVolume,
        k8s::core::v1::PersistentVolumeClaim, k8s::core::v1::Pod, k8s::core::v1::PodTemplate,
        k8s::core::v1::ReplicationController, k8s::core::v1::ResourceQuota, k8s::core::v1::Secret,
        k8s::core::v1::Service, k8s::core::v1::ServiceAccount,
        k8s::apps::v1::ControllerRevision, k8s::apps::v1::DaemonSet, k8s::apps::v1::Deployment,
        k8s::apps::v1::ReplicaSet, k8s::apps::v1::StatefulSet,
        k8s::batch::v1::CronJob, k8s::batch::v1::Job,
        k8s::autoscaling::v1::Scale, k8s::autoscaling::v2::HorizontalPodAutoscaler,
        k8s::authentication::v1::SelfSubjectReview, k8s::authentication::v1::TokenRequest,
        k8s::authentication::v1::TokenReview,
        k8s::authorization::v1::LocalSubjectAccessReview, k8s::authorization::v1::SelfSubjectAccessReview,
        k8s::authorization::v1::SelfSubjectRulesReview, k8s::authorization::v1::SubjectAccessReview,
        k8s::coordination::v1::Lease, k8s::discovery::v1::EndpointSlice, k8s::events::v1::Event,
        k8s::networking::v1::IPAddress, k8s::networking::v1::Ingress, k8s::networking::v1::IngressClass,
        k8s::networking::v1::NetworkPolicy, k8s::networking::v1::ServiceCIDR,
        k8s::node::v1::RuntimeClass, k8s::policy::v1::Eviction, k8s::policy::v1::PodDisruptionBudget,
        k8s::rbac::v1::ClusterRole, k8s::rbac::v1::ClusterRoleBinding, k8s::rbac::v1::Role, k8s::rbac::v1::RoleBinding,
        k8s::scheduling::v1::PriorityClass, k8s::storage::v1::StorageClass,
        k8s::admissionregistration::v1::MutatingWebhookConfiguration,
        k8s::admissionregistration::v1::ValidatingWebhookConfiguration,
        apiextensions::CustomResourceDefinition,
        meta::DeleteOptions, meta::Status, meta::ListMeta,
    );
    generator.take_definitions(false).into_iter().map(|(name, schema)| (name, describe(&schema))).collect()
}

fn describe(schema: &Value) -> Described {
    let text = |value: &Value| value.get("description").and_then(Value::as_str).map(str::to_owned);
    let properties = schema.get("properties").and_then(Value::as_object);
    let fields = properties.into_iter().flatten().filter_map(|(name, property)| Some((name.clone(), text(property)?)));
    Described { text: text(schema), fields: fields.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_found_by_their_openapi_names() {
        let service = of("io.k8s.api.core.v1.ServiceSpec").unwrap();
        assert!(service.fields["clusterIP"].contains("IP address"));
        assert!(of("io.k8s.api.core.v1.Service").unwrap().text.is_some());
        assert!(of("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta").unwrap().fields.contains_key("labels"));
        assert!(of("nope").is_none());
    }
}
