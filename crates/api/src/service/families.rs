//! IP families and policy of a Service: what follows from what the client said and what the cluster has (KEP-563).

use serde_json::{Value, json};

use super::{Family, NONE, cluster_ips, is_headless, is_selectorless, service_type};
use crate::meta;
use crate::status::FieldError;

/// Brings `clusterIP` and `clusterIPs` in line, and drops empty values.
pub(super) fn sync_cluster_ips(new: &mut Value, old: Option<&Value>) {
    for path in [["spec", "clusterIP"], ["spec", "clusterIPs"], ["spec", "ipFamilies"]] {
        let value = meta::get(new, &path);
        if value.as_str() == Some("") || value.as_array().is_some_and(Vec::is_empty) {
            meta::remove(new, &path);
        }
    }
    let single = meta::text(new, &["spec", "clusterIP"]).to_owned();
    let has_list = !cluster_ips(new).is_empty();
    let Some(old) = old else {
        // The other way round the client has to name the first one twice.
        if !single.is_empty() && !has_list {
            meta::set(new, &["spec", "clusterIPs"], json!([single]));
        }
        return;
    };
    let stored = meta::get(old, &["spec", "clusterIPs"]);
    let same_list = meta::get(new, &["spec", "clusterIPs"]) == stored;
    let same_single = single == meta::text(old, &["spec", "clusterIP"]);
    if same_single {
        // A client that knows only the singular field.
        if !has_list {
            meta::put(new, &["spec", "clusterIPs"], stored.clone());
        }
    } else if same_list {
        if single.is_empty() {
            meta::remove(new, &["spec", "clusterIPs"]);
        } else {
            meta::set(new, &["spec", "clusterIPs"], json!([single]));
        }
    }
}

/// A change of the policy to SingleStack alone drops the second family and address.
fn trim_downgrade(new: &mut Value, old: &Value) {
    for field in ["clusterIPs", "ipFamilies"] {
        let path = ["spec", field];
        if meta::get(new, &path) == meta::get(old, &path)
            && let [first, _] = meta::list(new, &path)
        {
            let first = first.clone();
            meta::set(new, &path, json!([first]));
        }
    }
}

/// Fills `ipFamilyPolicy` and `ipFamilies` in, or says why that cannot be.
pub(super) fn init_families(new: &mut Value, old: Option<&Value>, cluster: &[Family]) -> Vec<FieldError> {
    if service_type(new) == "ExternalName" || is_settled_prefer_dual_stack(new, old) {
        return Vec::new();
    }
    let faults = crate::validation::cluster_ip_fields(new, old);
    if !faults.is_empty() {
        return faults;
    }
    let selectorless_headless = is_headless(new) && is_selectorless(new);
    if meta::get(new, &["spec", "ipFamilyPolicy"]).is_null() {
        let inherited = old.map(|old| meta::text(old, &["spec", "ipFamilyPolicy"])).unwrap_or_default();
        let policy = match inherited {
            "" if selectorless_headless => "RequireDualStack",
            "" => "SingleStack",
            stored => stored,
        };
        meta::set(new, &["spec", "ipFamilyPolicy"], json!(policy));
    }
    let policy = meta::text(new, &["spec", "ipFamilyPolicy"]).to_owned();
    if let Some(old) = old
        && policy == "SingleStack"
    {
        trim_downgrade(new, old);
    }
    let ips: Vec<String> = cluster_ips(new).into_iter().map(str::to_owned).collect();
    let mut families: Vec<Family> =
        meta::list(new, &["spec", "ipFamilies"]).iter().filter_map(|family| Family::parse(family.as_str()?)).collect();

    let policy_error = |why: &str| FieldError::invalid("spec.ipFamilyPolicy", policy.as_str(), why);
    let mut faults = Vec::new();
    if policy == "SingleStack" {
        if ips.len() == 2 {
            faults.push(policy_error(
                "must be 'RequireDualStack' or 'PreferDualStack' when multiple cluster IPs are specified",
            ));
        }
        if families.len() == 2 {
            faults.push(policy_error(
                "must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
            ));
        }
    } else if let Some(old) = old.filter(|old| service_type(old) != "ExternalName") {
        if cluster_ips(old).len() == 2 && ips.len() == 1 {
            faults.push(policy_error("must be 'SingleStack' to release the secondary cluster IP"));
        }
        if meta::list(old, &["spec", "ipFamilies"]).len() == 2 && families.len() == 1 {
            faults.push(policy_error("must be 'SingleStack' to release the secondary IP family"));
        }
    }
    // Families that were not named follow from the addresses.
    for (i, ip) in ips.iter().enumerate() {
        if ip == NONE {
            break;
        }
        let Some(parsed) = meta::parse_ip_sloppy(ip) else { break };
        let family = Family::of(parsed);
        if i < families.len() {
            continue;
        }
        if cluster.contains(&family) {
            families.push(family);
        } else {
            let why = format!("{family} is not configured on this cluster");
            faults.push(FieldError::invalid(format!("spec.clusterIPs[{i}]"), json!(ips), why));
        }
    }
    if !faults.is_empty() {
        return faults;
    }

    let default = cluster.first().copied().unwrap_or(Family::V4);
    if selectorless_headless {
        // Nothing is allocated and the endpoints are written by hand, so the cluster's families do not limit it.
        if families.is_empty() {
            families.push(default);
        }
        if policy != "SingleStack" && families.len() == 1 {
            families.push(families[0].other());
        }
        set_families(new, &families);
        return Vec::new();
    }

    if policy == "RequireDualStack" && cluster.len() < 2 {
        faults.push(policy_error("this cluster is not configured for dual-stack services"));
    }
    for (i, family) in families.iter().enumerate() {
        if !cluster.contains(family) {
            let field = format!("spec.ipFamilies[{i}]");
            faults.push(FieldError::invalid(field, family.to_string(), "not configured on this cluster"));
        }
    }
    if !faults.is_empty() {
        return faults;
    }
    if families.is_empty() {
        families.push(default);
    }
    if policy != "SingleStack" && families.len() == 1 && cluster.len() == 2 {
        families.push(families[0].other());
    }
    set_families(new, &families);
    Vec::new()
}

fn set_families(service: &mut Value, families: &[Family]) {
    let names: Vec<String> = families.iter().map(ToString::to_string).collect();
    meta::set(service, &["spec", "ipFamilies"], json!(names));
}

/// A PreferDualStack Service whose type, policy, families and addresses an update leaves alone: it is not upgraded or
/// downgraded because the cluster has changed meanwhile.
fn is_settled_prefer_dual_stack(new: &Value, old: Option<&Value>) -> bool {
    let Some(old) = old else { return false };
    let same = |field: &str| {
        let path = ["spec", field];
        meta::get(new, &path) == meta::get(old, &path)
    };
    service_type(old) == service_type(new)
        && meta::text(new, &["spec", "ipFamilyPolicy"]) == "PreferDualStack"
        && same("ipFamilyPolicy")
        && same("clusterIPs")
        && same("ipFamilies")
}
