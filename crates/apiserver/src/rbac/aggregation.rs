//! ClusterRoles that are made of others (`aggregationRule`).

use std::sync::Arc;

use jiff::Timestamp;
use portolan_api::meta;
use portolan_api::selector::LabelSelector;
use portolan_api::status::Status;
use serde_json::{Value, json};

use super::CLUSTER_ROLES;
use crate::server::Inner;
use crate::store::{Object, Snapshot, Txn};
use crate::verbs::{Change, Pipeline, Tracking};

/// The rules an aggregated ClusterRole should have, or `None` if it is not aggregated: those of all other roles that
/// one of its selectors matches, by name, each rule once.
fn rules(state: &Snapshot, role: &Value) -> Option<Vec<Value>> {
    let selectors = meta::get(role, &["aggregationRule", "clusterRoleSelectors"]).as_array()?;
    let selectors: Vec<LabelSelector> = selectors.iter().filter_map(LabelSelector::from_object).collect();
    let mut rules: Vec<Value> = Vec::new();
    for other in state.list(CLUSTER_ROLES, None).map(|object| &object.value) {
        if meta::name(other) == meta::name(role) || !selectors.iter().any(|selector| selector.matches(other)) {
            continue;
        }
        for rule in meta::list(other, &["rules"]) {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
        }
    }
    Some(rules)
}

/// Writes the rules of aggregated roles; roles may be made of roles that are aggregated themselves.
pub fn reconcile(txn: &mut Txn, pipeline: Pipeline<'_>) -> Result<(), Status> {
    let entry = pipeline.catalog.builtin_entry("rbac.authorization.k8s.io", "v1", "clusterroles");
    // Chains are short (view, edit, admin); a cycle settles, because rules are only ever copied.
    for _ in 0..4 {
        let wrong: Vec<(Arc<Object>, Vec<Value>)> = txn
            .state()
            .list(CLUSTER_ROLES, None)
            .filter_map(|role| {
                let rules = rules(txn.state(), &role.value)?;
                (meta::list(&role.value, &["rules"]) != rules).then(|| (role.clone(), rules))
            })
            .collect();
        if wrong.is_empty() {
            break;
        }
        for (role, rules) in wrong {
            let mut new = role.value.clone();
            new["rules"] = json!(rules);
            let tracking = Tracking::Update { manager: "clusterrole-aggregation-controller" };
            pipeline.update(txn, &entry, &role, new, Change { subresource: None, dry_run: false, tracking })?;
        }
    }
    Ok(())
}

/// Keeps aggregated roles right until shutdown.
pub async fn keep(inner: Arc<Inner>) {
    let Ok(mut changes) = inner.store.watch(CLUSTER_ROLES, inner.store.snapshot().revision) else { return };
    loop {
        let catalog = inner.catalog.load_full();
        let pipeline = Pipeline { server: &inner, catalog: &catalog, now: Timestamp::now(), user: None };
        let outcome = inner.store.transact(|txn| reconcile(txn, pipeline)).await;
        if let Err(status) = outcome {
            tracing::warn!(error = status.message, "cannot update aggregated ClusterRoles");
        }
        tokio::select! {
            () = inner.shutdown.cancelled() => return,
            () = changes.changed() => {}
        }
        // Only that something happened matters; expired events do not.
        let _ = changes.read();
    }
}
