//! The objects every cluster has from its first moment, and those that are kept right while the server runs.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use portolan_api::meta;
use portolan_api::service::{self, Finding};
use portolan_api::status::Status;
use serde_json::{Value, json};

use crate::catalog::Catalog;
use crate::config::ServerConfig;
use crate::rbac;
use crate::server::Inner;
use crate::services::{self, IP_ADDRESSES, Repair, SERVICE_CIDRS, SERVICES};
use crate::store::Change::Deleted as Removed;
use crate::store::{Event, Key, Object, Txn};
use crate::verbs::{Change, Pipeline, Tracking};

const NAMESPACES: &[&str] = &["default", "kube-system", "kube-public", "kube-node-lease"];

/// Name of the Service of the API server, of its Endpoints and of its EndpointSlice.
const KUBERNETES: &str = "kubernetes";

/// Reporters of what is found wrong with the addresses and ports of Services.
const CLUSTER_IP_REPAIR: &str = "ipallocator-repair-controller";
const NODE_PORT_REPAIR: &str = "portallocator-repair-controller";

/// Reporter of what is wrong with the configured service ranges.
const RANGE_KEEPER: &str = "kubernetes-service-cidr-controller";

const SILENT: Change<'static> = Change { subresource: None, dry_run: false, tracking: Tracking::Silent };

struct Boot<'a> {
    pipeline: Pipeline<'a>,
    catalog: &'a Arc<Catalog>,
}

impl Boot<'_> {
    /// Creates an object unless it is there.
    fn ensure(&self, txn: &mut Txn, group: &str, plural: &str, value: Value) -> Result<(), Status> {
        let entry = self.catalog.builtin_entry(group, "v1", plural);
        let namespace = meta::namespace(&value).to_owned();
        let key = Key::new(&namespace, meta::name(&value));
        if txn.get(&entry.collection, &key).is_some() {
            return Ok(());
        }
        self.pipeline.create(txn, &entry, &namespace, value, SILENT).map(|_| ())
    }

    /// Creates a role or binding, or gives it back what it has lost.
    fn provide(&self, txn: &mut Txn, group: &str, plural: &str, value: Value) -> Result<(), Status> {
        let entry = self.catalog.builtin_entry(group, "v1", plural);
        let Some(old) = txn.get(&entry.collection, &Key::new("", meta::name(&value))).cloned() else {
            return self.ensure(txn, group, plural, value);
        };
        match rbac::bootstrap::repaired(&old.value, &value) {
            Some(new) => self.pipeline.update(txn, &entry, &old, new, SILENT).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Makes the IPAddress objects agree with the Services and tells about what only people can put right.
    fn repair(&self, txn: &mut Txn, repair: &Repair) -> Result<(), Status> {
        for name in &repair.surplus {
            txn.delete(IP_ADDRESSES, &Key::new("", name));
        }
        for value in &repair.missing {
            self.ensure(txn, "networking.k8s.io", "ipaddresses", value.clone())?;
        }
        for finding in &repair.findings {
            self.warn(txn, finding)?;
        }
        Ok(())
    }

    /// A Warning event on a Service.
    fn warn(&self, txn: &mut Txn, finding: &Finding) -> Result<(), Status> {
        let Finding { namespace, name, reason, message } = finding;
        tracing::warn!(namespace, service = name, reason, message, "a stored Service has a bad address or port");
        let Some(service) = txn.get(SERVICES, &Key::new(namespace, name)).cloned() else { return Ok(()) };
        let reporter = if reason.starts_with("Port") { NODE_PORT_REPAIR } else { CLUSTER_IP_REPAIR };
        self.report(txn, &service, ("v1", "Service"), reporter, reason, message)
    }

    /// A Warning event on an object. The same again counts up the event that is there.
    fn report(
        &self,
        txn: &mut Txn,
        object: &Object,
        (api_version, kind): (&str, &str),
        reporter: &str,
        reason: &str,
        message: &str,
    ) -> Result<(), Status> {
        let (name, uid) = (meta::name(&object.value), meta::uid(&object.value));
        // Events about objects without a namespace are kept in this one.
        let namespace = match meta::namespace(&object.value) {
            "" => "default",
            own => own,
        };
        let now = meta::format_time(self.pipeline.now);
        let entry = self.catalog.builtin_entry("", "v1", "events");
        let same = txn
            .state()
            .list(&entry.collection, Some(namespace))
            .find(|event| {
                let text = |path: &[&str]| meta::text(&event.value, path);
                text(&["involvedObject", "uid"]) == uid
                    && text(&["reason"]) == reason
                    && text(&["message"]) == message
                    && text(&["source", "component"]) == reporter
            })
            .cloned();
        if let Some(old) = same {
            let mut new = old.value.clone();
            let count = meta::get(&new, &["count"]).as_i64().unwrap_or(1);
            new["count"] = json!(count + 1);
            new["lastTimestamp"] = json!(now);
            return self.pipeline.update(txn, &entry, &old, new, SILENT).map(|_| ());
        }
        let mut involved = json!({
            "apiVersion": api_version, "kind": kind, "name": name, "uid": uid,
            "resourceVersion": object.revision.to_string(),
        });
        if !meta::namespace(&object.value).is_empty() {
            involved["namespace"] = json!(namespace);
        }
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": format!("{name}.{:016x}", services::pick(u64::MAX)), "namespace": namespace},
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "type": "Warning",
            "source": {"component": reporter},
            "reportingComponent": reporter,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        self.pipeline.create(txn, &entry, namespace, event, SILENT).map(|_| ())
    }

    /// Creates an object, or makes its labels and some of its fields right.
    fn publish(
        &self,
        txn: &mut Txn,
        group: &str,
        plural: &str,
        value: Value,
        fields: &[&[&str]],
    ) -> Result<(), Status> {
        let entry = self.catalog.builtin_entry(group, "v1", plural);
        let namespace = meta::namespace(&value).to_owned();
        let key = Key::new(&namespace, meta::name(&value));
        let Some(old) = txn.get(&entry.collection, &key).cloned() else {
            return self.pipeline.create(txn, &entry, &namespace, value, SILENT).map(|_| ());
        };
        let mut new = old.value.clone();
        for field in fields {
            meta::put(&mut new, field, meta::get(&value, field).clone());
        }
        for (label, text) in value["metadata"]["labels"].as_object().into_iter().flatten() {
            meta::set(&mut new, &["metadata", "labels", label], text.clone());
        }
        self.pipeline.update(txn, &entry, &old, new, SILENT).map(|_| ())
    }
}

/// Writes the initial objects in one transaction, and what the pools want to be put right.
pub async fn run(inner: &Arc<Inner>, config: &ServerConfig, repair: &Repair) -> Result<(), Status> {
    let now = Timestamp::now();
    let catalog = inner.catalog.load_full();
    let boot = Boot { pipeline: Pipeline { server: inner, catalog: &catalog, now, user: None }, catalog: &catalog };
    inner
        .store
        .transact(|txn| {
            for name in NAMESPACES {
                let value = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
                boot.ensure(txn, "", "namespaces", value)?;
            }
            for (name, value, text) in [
                (
                    "system-cluster-critical",
                    2_000_000_000,
                    "Used for system critical pods that must run in the cluster.",
                ),
                (
                    "system-node-critical",
                    2_000_001_000,
                    "Used for system critical pods that must not be moved from their node.",
                ),
            ] {
                let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
                    "metadata": {"name": name}, "value": value, "description": text});
                boot.ensure(txn, "scheduling.k8s.io", "priorityclasses", class)?;
            }
            for (plural, objects) in [
                ("clusterroles", rbac::bootstrap::cluster_roles()),
                ("clusterrolebindings", rbac::bootstrap::cluster_role_bindings()),
            ] {
                for object in objects {
                    boot.provide(txn, "rbac.authorization.k8s.io", plural, object)?;
                }
            }
            rbac::aggregation::reconcile(txn, boot.pipeline)?;
            service_range(txn, &boot, &config.service_cidrs)?;
            check_range(txn, &boot, &config.service_cidrs)?;
            boot.repair(txn, repair)
        })
        .await?;
    // An address that another Service has taken must not keep the server from starting.
    let itself = Itself::new(config);
    republish(inner, &itself, &[&["spec", "ports"]]).await;
    Ok(())
}

/// Makes sure of the ServiceCIDR `kubernetes`. A stored one stays as it is, whatever the configuration says now; only a
/// second range is added to it when the cluster becomes dual-stack.
fn service_range(txn: &mut Txn, boot: &Boot<'_>, ranges: &[IpNet]) -> Result<(), Status> {
    let wanted = service::service_cidr(ranges, boot.pipeline.now);
    let key = Key::new("", meta::name(&wanted));
    match txn.get(SERVICE_CIDRS, &key).cloned() {
        None => {
            boot.ensure(txn, "networking.k8s.io", "servicecidrs", wanted.clone())?;
            let Some(made) = txn.get(SERVICE_CIDRS, &key).cloned() else { return Ok(()) };
            // An ordinary create drops the status.
            let mut new = made.value.clone();
            new["status"] = wanted["status"].clone();
            put_range(boot.pipeline.server, txn, &key, new);
        }
        Some(stored) => {
            let (now, before) =
                (meta::list(&wanted, &["spec", "cidrs"]), meta::list(&stored.value, &["spec", "cidrs"]));
            if let ([first, _], [only]) = (now, before)
                && first == only
            {
                let mut new = stored.value.clone();
                new["spec"] = wanted["spec"].clone();
                put_range(boot.pipeline.server, txn, &key, new);
            }
        }
    }
    Ok(())
}

/// Tells of a configuration that the stored ServiceCIDR `kubernetes` contradicts.
fn check_range(txn: &mut Txn, boot: &Boot<'_>, ranges: &[IpNet]) -> Result<(), Status> {
    let wanted = service::service_cidr(ranges, boot.pipeline.now);
    let Some(stored) = txn.get(SERVICE_CIDRS, &Key::new("", meta::name(&wanted))).cloned() else { return Ok(()) };
    let texts = |object: &Value| -> String {
        let cidrs = meta::list(object, &["spec", "cidrs"]).iter().filter_map(Value::as_str);
        format!("[{}]", cidrs.collect::<Vec<_>>().join(" "))
    };
    let (have, want) = (texts(&stored.value), texts(&wanted));
    if have == want {
        return Ok(());
    }
    let message = format!("The default ServiceCIDR {have} does not match the flag configurations {want}");
    tracing::warn!(message, "the service ranges of the cluster stay as they are stored");
    let kind = ("networking.k8s.io/v1", "ServiceCIDR");
    boot.report(txn, &stored, kind, RANGE_KEEPER, "KubernetesDefaultServiceCIDRInconsistent", &message)
}

/// Endpoints and EndpointSlice of Service default/kubernetes: the advertised address of this server.
fn own_endpoints(config: &ServerConfig) -> (Value, Value) {
    let (ip, port) = (config.advertise.ip(), config.advertise.port());
    let mirror = "endpointslice.kubernetes.io/skip-mirror";
    let endpoints = json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": KUBERNETES, "namespace": "default", "labels": {mirror: "true"}},
        "subsets": [{
            "addresses": [{"ip": ip.to_string()}],
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        }],
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": KUBERNETES,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": KUBERNETES},
        },
        "addressType": match ip { IpAddr::V4(_) => "IPv4", IpAddr::V6(_) => "IPv6" },
        "endpoints": [{"addresses": [ip.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    });
    (endpoints, slice)
}

/// How clients inside the cluster find the API server.
#[derive(Clone, Debug)]
pub struct Itself {
    ranges: Vec<IpNet>,
    service: Value,
    endpoints: Value,
    slice: Value,
}

impl Itself {
    /// What a server with this configuration publishes.
    pub fn new(config: &ServerConfig) -> Itself {
        let service = service::kubernetes_service(&config.service_cidrs, config.advertise.port());
        let (endpoints, slice) = own_endpoints(config);
        Itself { ranges: config.service_cidrs.clone(), service, endpoints, slice }
    }
}

/// `fields`: those of the Service that are made right if they differ.
fn publish_itself(txn: &mut Txn, boot: &Boot<'_>, itself: &Itself, fields: &[&[&str]]) -> Result<(), Status> {
    boot.publish(txn, "", "services", itself.service.clone(), fields)?;
    boot.publish(txn, "", "endpoints", itself.endpoints.clone(), &[&["subsets"]])?;
    boot.publish(txn, "discovery.k8s.io", "endpointslices", itself.slice.clone(), &[&["endpoints"], &["ports"]])
}

/// Brings back the Service of the API server, which pods are told about, its endpoints and the default service range.
async fn republish(inner: &Arc<Inner>, itself: &Itself, fields: &[&[&str]]) {
    let catalog = inner.catalog.load_full();
    let pipeline = Pipeline { server: inner, catalog: &catalog, now: Timestamp::now(), user: None };
    let boot = Boot { pipeline, catalog: &catalog };
    let outcome = inner.store.transact(|txn| {
        service_range(txn, &boot, &itself.ranges)?;
        publish_itself(txn, &boot, itself, fields)
    });
    if let Err(status) = outcome.await {
        tracing::warn!(error = status.message, "cannot publish the Service of the API server");
    }
}

/// How long events are kept (`--event-ttl`).
const EVENT_TTL_SECONDS: i64 = 3600;

/// How often old events are looked for.
const SWEEP_PERIOD: Duration = Duration::from_secs(300);

/// How often addresses and ports are compared with the Services (the reference implementation's interval).
const REPAIR_PERIOD: Duration = Duration::from_secs(180);

/// How often the server looks after the objects by which clients find it (likewise).
const PUBLISH_PERIOD: Duration = Duration::from_secs(10);

/// Keeps ServiceCIDR and IPAddress objects and the server's own Service right, and removes old events, until shutdown.
///
/// `since` is a revision at which all was right.
pub async fn keep(inner: Arc<Inner>, itself: Itself, since: u64) {
    let mut sweep = tokio::time::interval(SWEEP_PERIOD);
    let mut repair = tokio::time::interval(REPAIR_PERIOD);
    // The first one has been done before the server was ready.
    repair.reset();
    let mut publish = tokio::time::interval(PUBLISH_PERIOD);
    publish.reset();
    let Ok(mut ranges) = inner.store.watch(SERVICE_CIDRS, since) else { return };
    let Ok(mut addresses) = inner.store.watch(IP_ADDRESSES, since) else { return };
    let Ok(mut services) = inner.store.watch(SERVICES, since) else { return };
    loop {
        tokio::select! {
            () = inner.shutdown.cancelled() => return,
            _ = sweep.tick() => sweep_events(&inner).await,
            _ = repair.tick() => repair_allocations(&inner).await,
            _ = publish.tick() => republish(&inner, &itself, &[]).await,
            () = ranges.changed() => {}
            () = addresses.changed() => {}
            () = services.changed() => {}
        }
        // Only that something happened matters; expired events do not.
        let _ = ranges.read();
        // An address deleted by hand is back before another Service can get it.
        let state = inner.store.snapshot();
        let lost = |event: &Event| event.change == Removed && services::is_needed(&state, &event.object.value);
        if addresses.read().map_or(true, |events| events.iter().any(|event| lost(event))) {
            repair_allocations(&inner).await;
        }
        let own = |event: &Event| {
            let object = &event.object.value;
            event.change == Removed && meta::namespace(object) == "default" && meta::name(object) == KUBERNETES
        };
        if services.read().map_or(true, |events| events.iter().any(|event| own(event))) {
            republish(&inner, &itself, &[]).await;
        }
        reconcile_ranges(&inner).await;
    }
}

/// Compares Services, IPAddress objects and pools, and puts right what can be.
pub async fn repair_allocations(inner: &Arc<Inner>) {
    let catalog = inner.catalog.load_full();
    let pipeline = Pipeline { server: inner, catalog: &catalog, now: Timestamp::now(), user: None };
    let boot = Boot { pipeline, catalog: &catalog };
    let outcome = inner
        .store
        .transact(|txn| {
            let repair = inner.pools.repair(txn.state());
            boot.repair(txn, &repair)
        })
        .await;
    if let Err(status) = outcome {
        tracing::warn!(error = status.message, "cannot repair the addresses and ports of Services");
    }
}

/// Makes new ServiceCIDRs ready and lets go of deleted ones whose addresses are free (KEP-1880).
async fn reconcile_ranges(inner: &Arc<Inner>) {
    let now = Timestamp::now();
    let outcome = inner
        .store
        .transact(|txn| {
            let objects: Vec<_> = txn.state().list(SERVICE_CIDRS, None).cloned().collect();
            for object in &objects {
                let key = Key::new("", meta::name(&object.value));
                let mut new = object.value.clone();
                if meta::is_deleting(&new) {
                    let others = objects.iter().map(|o| &o.value);
                    let addresses: Vec<_> = txn.state().list(IP_ADDRESSES, None).cloned().collect();
                    if service::deletion_blocked(&new, others, addresses.iter().map(|o| &o.value)) {
                        if service::mark_terminating(&mut new, now) {
                            put_range(inner, txn, &key, new);
                        }
                        continue;
                    }
                    let mut finalizers = meta::list(&new, &["metadata", "finalizers"]).to_vec();
                    finalizers.retain(|f| f != service::SERVICE_CIDR_FINALIZER);
                    let finished = finalizers.is_empty();
                    meta::set(&mut new, &["metadata", "finalizers"], Value::Array(finalizers));
                    if finished {
                        txn.delete(SERVICE_CIDRS, &key);
                        let inner = inner.clone();
                        txn.after_commit(move || inner.pools.forget(SERVICE_CIDRS, &new));
                    } else if new != object.value {
                        put_range(inner, txn, &key, new);
                    }
                } else if service::mark_ready(&mut new, now) {
                    put_range(inner, txn, &key, new);
                }
            }
            Ok(())
        })
        .await;
    if let Err(status) = outcome {
        tracing::warn!(error = status.message, "cannot update ServiceCIDR objects");
    }
}

fn put_range(inner: &Arc<Inner>, txn: &mut Txn, key: &Key, value: Value) {
    let object = txn.put(SERVICE_CIDRS, key, value);
    let inner = inner.clone();
    txn.after_commit(move || inner.pools.observe(SERVICE_CIDRS, &object.value));
}

async fn sweep_events(inner: &Arc<Inner>) {
    let oldest = Timestamp::now().as_second() - EVENT_TTL_SECONDS;
    let outcome = inner
        .store
        .transact(|txn| {
            let old: Vec<Key> = txn
                .state()
                .list("events", None)
                .filter(|event| last_seen(&event.value).is_some_and(|at| at < oldest))
                .map(|event| Key::new(meta::namespace(&event.value), meta::name(&event.value)))
                .collect();
            for key in old {
                txn.delete("events", &key);
            }
            Ok(())
        })
        .await;
    if let Err(status) = outcome {
        tracing::warn!(error = status.message, "cannot remove old events");
    }
}

/// When an event was last written, in seconds.
fn last_seen(event: &Value) -> Option<i64> {
    [&["series", "lastObservedTime"][..], &["lastTimestamp"], &["eventTime"], &["metadata", "creationTimestamp"]]
        .iter()
        .filter_map(|path| meta::parse_time(meta::text(event, path)))
        .map(|at| at.as_second())
        .max()
}
