//! The objects every cluster has from its first moment, and those that are kept right while the server runs.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use portolan_api::meta;
use portolan_api::service;
use portolan_api::status::Status;
use serde_json::{Value, json};

use crate::catalog::Catalog;
use crate::config::ServerConfig;
use crate::rbac;
use crate::server::Inner;
use crate::services::{IP_ADDRESSES, SERVICE_CIDRS};
use crate::store::{Key, Txn};
use crate::verbs::{Change, Pipeline, Tracking};

const NAMESPACES: &[&str] = &["default", "kube-system", "kube-public", "kube-node-lease"];

/// Name of the Service of the API server, of its Endpoints and of its EndpointSlice.
const KUBERNETES: &str = "kubernetes";

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

    /// Creates an object, or makes some of its fields right.
    fn publish(&self, txn: &mut Txn, group: &str, plural: &str, value: Value, fields: &[&str]) -> Result<(), Status> {
        let entry = self.catalog.builtin_entry(group, "v1", plural);
        let namespace = meta::namespace(&value).to_owned();
        let key = Key::new(&namespace, meta::name(&value));
        let Some(old) = txn.get(&entry.collection, &key).cloned() else {
            return self.pipeline.create(txn, &entry, &namespace, value, SILENT).map(|_| ());
        };
        let mut new = old.value.clone();
        for field in fields {
            meta::put(&mut new, &[field], value[*field].clone());
        }
        self.pipeline.update(txn, &entry, &old, new, SILENT).map(|_| ())
    }
}

/// Writes the initial objects in one transaction. `missing` and `surplus` are IPAddress objects that the pools want.
pub async fn run(
    inner: &Arc<Inner>,
    config: &ServerConfig,
    missing: Vec<Value>,
    surplus: Vec<String>,
) -> Result<(), Status> {
    let now = Timestamp::now();
    let catalog = inner.catalog.load_full();
    let boot = Boot { pipeline: Pipeline { server: inner, catalog: &catalog, now, user: None }, catalog: &catalog };
    inner
        .store
        .transact(|txn| {
            for name in surplus {
                txn.delete(IP_ADDRESSES, &Key::new("", &name));
            }
            for value in missing {
                boot.ensure(txn, "networking.k8s.io", "ipaddresses", value)?;
            }
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
            service_range(txn, &boot, config, now)?;
            let port = config.advertise.port();
            let service = service::kubernetes_service(&config.service_cidrs, port);
            boot.ensure(txn, "", "services", service)?;
            let (endpoints, slice) = own_endpoints(config);
            boot.publish(txn, "", "endpoints", endpoints, &["subsets"])?;
            boot.publish(txn, "discovery.k8s.io", "endpointslices", slice, &["endpoints", "ports"])
        })
        .await
}

/// The ServiceCIDR `kubernetes`, with its status, which an ordinary create would drop.
fn service_range(txn: &mut Txn, boot: &Boot<'_>, config: &ServerConfig, now: Timestamp) -> Result<(), Status> {
    let value = service::service_cidr(&config.service_cidrs, now);
    let status = value["status"].clone();
    let key = Key::new("", meta::name(&value));
    if txn.get(SERVICE_CIDRS, &key).is_some() {
        return Ok(());
    }
    boot.ensure(txn, "networking.k8s.io", "servicecidrs", value)?;
    if let Some(object) = txn.get(SERVICE_CIDRS, &key).cloned() {
        let mut new = object.value.clone();
        new["status"] = status;
        put_range(boot.pipeline.server, txn, &key, new);
    }
    Ok(())
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

/// How long events are kept (`--event-ttl`).
const EVENT_TTL_SECONDS: i64 = 3600;

/// How often old events are looked for.
const SWEEP_PERIOD: Duration = Duration::from_secs(300);

/// Keeps ServiceCIDR objects right and removes old events until shutdown.
pub async fn keep(inner: Arc<Inner>) {
    let mut sweep = tokio::time::interval(SWEEP_PERIOD);
    let Ok(mut ranges) = inner.store.watch(SERVICE_CIDRS, inner.store.snapshot().revision) else { return };
    let Ok(mut addresses) = inner.store.watch(IP_ADDRESSES, inner.store.snapshot().revision) else { return };
    loop {
        tokio::select! {
            () = inner.shutdown.cancelled() => return,
            _ = sweep.tick() => sweep_events(&inner).await,
            () = ranges.changed() => {}
            () = addresses.changed() => {}
        }
        // Only that something happened matters; expired events do not.
        let _ = (ranges.read(), addresses.read());
        reconcile_ranges(&inner).await;
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
