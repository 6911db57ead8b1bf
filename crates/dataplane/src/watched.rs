//! Objects as the watches deliver them: parsed into what the proxy needs while they are decoded.
//!
//! A cluster's Services and EndpointSlices are many times the size of what decides about packets. So neither a page of a list
//! nor the mailbox ever holds them whole, and a field that the proxy does not read costs no allocation.

use std::borrow::Cow;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use portolan_plan::world::{HostPortPod, ServiceSpec, Slice, SliceManifest};
use serde::{Deserialize, Deserializer};

/// Annotation with the time of the change that made an EndpointSlice as it is (KEP of network programming latency).
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// An object of which only name, version and what `T` keeps are left.
#[derive(Clone, Debug)]
pub(crate) struct Watched<T> {
    meta: ObjectMeta,
    pub(crate) parsed: T,
}

/// A Service; `None` when it is not this proxy's.
pub(crate) type WatchedService = Watched<Option<Arc<ServiceSpec>>>;
/// A pod; `None` when it has no host ports.
pub(crate) type WatchedPod = Watched<Option<Arc<HostPortPod>>>;
/// An EndpointSlice.
pub(crate) type WatchedSlice = Watched<SliceChange>;

/// An EndpointSlice as it is now.
#[derive(Clone, Debug, Default)]
pub struct SliceChange {
    /// What the proxy needs of it; `None` when it is gone or ignored.
    pub slice: Option<Arc<Slice>>,
    /// When the change of the world happened that it was written for.
    pub triggered: Option<Timestamp>,
}

impl From<&SliceManifest> for SliceChange {
    fn from(manifest: &SliceManifest) -> SliceChange {
        SliceChange {
            slice: Slice::parse(manifest).map(Arc::new),
            triggered: manifest.metadata.annotations.get(TRIGGER_TIME).and_then(|t| t.parse().ok()),
        }
    }
}

fn identity(meta: ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        name: meta.name,
        namespace: meta.namespace,
        resource_version: meta.resource_version,
        ..ObjectMeta::default()
    }
}

impl<'de> Deserialize<'de> for WatchedService {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<WatchedService, D::Error> {
        let service = Service::deserialize(from)?;
        let parsed = ServiceSpec::parse(&service).map(Arc::new);
        Ok(Watched { meta: identity(service.metadata), parsed })
    }
}

impl<'de> Deserialize<'de> for WatchedPod {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<WatchedPod, D::Error> {
        let pod = Pod::deserialize(from)?;
        let parsed = HostPortPod::parse(&pod).map(Arc::new);
        Ok(Watched { meta: identity(pod.metadata), parsed })
    }
}

impl<'de> Deserialize<'de> for WatchedSlice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<WatchedSlice, D::Error> {
        let manifest = SliceManifest::deserialize(from)?;
        let parsed = SliceChange::from(&manifest);
        let meta = manifest.metadata;
        let meta = ObjectMeta {
            name: Some(meta.name),
            namespace: Some(meta.namespace).filter(|n| !n.is_empty()),
            resource_version: meta.resource_version,
            ..ObjectMeta::default()
        };
        Ok(Watched { meta, parsed })
    }
}

/// The kind that a [`Watched`] stands for.
pub(crate) trait Stands {
    type Kind: Resource<DynamicType = ()>;
}

impl Stands for Option<Arc<ServiceSpec>> {
    type Kind = Service;
}

impl Stands for Option<Arc<HostPortPod>> {
    type Kind = Pod;
}

impl Stands for SliceChange {
    type Kind = EndpointSlice;
}

impl<T: Stands> Resource for Watched<T> {
    type DynamicType = ();
    type Scope = <T::Kind as Resource>::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        T::Kind::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        T::Kind::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        T::Kind::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        T::Kind::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a lenient decoder reads must be what the API's own type says.
    #[test]
    fn a_slice_is_read_as_its_api_type_is() {
        let texts = [
            r#"{"kind":"EndpointSlice","metadata":{"namespace":"ns","name":"s-1","uid":"u","resourceVersion":"7","generation":3,
                "labels":{"kubernetes.io/service-name":"s"},"managedFields":[{"manager":"x","fieldsV1":{"f:a":{}}}],
                "annotations":{"endpoints.kubernetes.io/last-change-trigger-time":"2026-01-01T00:00:00Z"}},
                "addressType":"IPv4","ports":[{"name":"http","port":8080,"protocol":"TCP","appProtocol":"x"},{"port":null}],
                "endpoints":[{"addresses":["10.0.0.1","10.0.0.2"],"conditions":{"ready":false,"serving":null},"nodeName":"n1","zone":"a",
                  "targetRef":{"kind":"Pod","name":"p"},"hints":{"forZones":[{"name":"a"}],"forNodes":null}},
                 {"addresses":["10.0.0.1"],"conditions":null,"hints":{}},{"addresses":["127.0.0.1"]},{"addresses":["x"]},{"addresses":[]}]}"#,
            r#"{"metadata":{"namespace":"ns","name":"s-2","labels":{"kubernetes.io/service-name":"s"}},"addressType":"FQDN","endpoints":[{"addresses":["a.b"]}],"ports":null}"#,
            r#"{"metadata":{"namespace":"ns","name":"s-3","labels":null},"addressType":"IPv6","endpoints":null}"#,
            r#"{"metadata":{"namespace":"ns","name":"s-4","labels":{"kubernetes.io/service-name":"s","service.kubernetes.io/headless":""}},"addressType":"IPv6","endpoints":[]}"#,
        ];
        for text in texts {
            let lenient: WatchedSlice = serde_json::from_str(text).unwrap();
            let strict: EndpointSlice = serde_json::from_str(text).unwrap();
            let manifest = SliceManifest::from(&strict);
            assert_eq!(lenient.parsed.slice, Slice::parse(&manifest).map(Arc::new), "{text}");
            assert_eq!(lenient.meta.name, strict.metadata.name);
            assert_eq!(lenient.meta.resource_version, strict.metadata.resource_version);
            assert_eq!(lenient.parsed.triggered.is_some(), text.contains("trigger-time"));
        }
    }
}
