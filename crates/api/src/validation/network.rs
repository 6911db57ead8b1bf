//! Rules of NetworkPolicies, ServiceCIDRs and IPAddresses.

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Faults, strings};
use crate::meta;
use crate::status::FieldError;

pub(super) fn policy(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let stored: Vec<&str> = old.map(all_cidrs).unwrap_or_default();
    faults.label_selector("spec.podSelector", meta::get(new, &["spec", "podSelector"]));
    for (list, peers) in [("ingress", "from"), ("egress", "to")] {
        for (i, rule) in meta::list(new, &["spec", list]).iter().enumerate() {
            let field = format!("spec.{list}[{i}]");
            for (p, port) in meta::list(rule, &["ports"]).iter().enumerate() {
                self::port(faults, &format!("{field}.ports[{p}]"), port);
            }
            for (p, peer) in meta::list(rule, &[peers]).iter().enumerate() {
                self::peer(faults, &format!("{field}.{peers}[{p}]"), peer, &stored);
            }
        }
    }
    let types = strings(new, &["spec", "policyTypes"]);
    if types.len() > 2 {
        faults.invalid("spec.policyTypes", json!(types), "may not specify more than two policyTypes");
        return;
    }
    for (i, type_) in types.into_iter().enumerate() {
        faults.one_of(format!("spec.policyTypes[{i}]"), type_, &["Ingress", "Egress"]);
    }
}

/// Every CIDR text of a stored policy: what is there stays acceptable, wherever it moves.
fn all_cidrs(policy: &Value) -> Vec<&str> {
    [("ingress", "from"), ("egress", "to")]
        .iter()
        .flat_map(|(list, peers)| {
            meta::list(policy, &["spec", list]).iter().flat_map(move |rule| meta::list(rule, &[peers]))
        })
        .flat_map(|peer| {
            let block = meta::get(peer, &["ipBlock"]);
            std::iter::once(meta::text(block, &["cidr"])).chain(strings(block, &["except"]))
        })
        .collect()
}

fn port(faults: &mut Faults, field: &str, port: &Value) {
    if let Some(protocol) = meta::get(port, &["protocol"]).as_str() {
        faults.one_of(format!("{field}.protocol"), protocol, &["TCP", "UDP", "SCTP"]);
    }
    let number = meta::get(port, &["port"]);
    let end = meta::get(port, &["endPort"]);
    let at = format!("{field}.endPort");
    if !number.is_null() {
        faults.port_number_or_name(&format!("{field}.port"), number);
    }
    let Some(end) = end.as_i64() else { return };
    if number.is_null() {
        faults.invalid(at, end, "may not be specified when `port` is not specified");
    } else if let Some(start) = number.as_i64() {
        if end < start {
            // The value printed is the start, as the reference implementation does.
            faults.invalid(at.as_str(), start, "must be greater than or equal to `port`");
        }
        for text in meta::port_number(end) {
            faults.invalid(at.as_str(), end, text);
        }
    } else {
        faults.invalid(at, end, "may not be specified when `port` is non-numeric");
    }
}

fn peer(faults: &mut Faults, field: &str, peer: &Value, stored: &[&str]) {
    let mut parts = 0;
    for part in ["podSelector", "namespaceSelector"] {
        let selector = meta::get(peer, &[part]);
        if !selector.is_null() {
            parts += 1;
            faults.label_selector(&format!("{field}.{part}"), selector);
        }
    }
    let block = meta::get(peer, &["ipBlock"]);
    if !block.is_null() {
        parts += 1;
        ip_block(faults, &format!("{field}.ipBlock"), block, stored);
    }
    if parts == 0 {
        faults.required(field, "must specify a peer");
    } else if parts > 1 && !block.is_null() {
        faults.forbidden(field, "may not specify both ipBlock and another peer");
    }
}

fn ip_block(faults: &mut Faults, field: &str, block: &Value, stored: &[&str]) {
    let rule = |text: &str| if stored.contains(&text) { meta::cidr_sloppy(text) } else { meta::cidr(text) };
    let cidr = meta::text(block, &["cidr"]);
    if cidr.is_empty() {
        faults.required(format!("{field}.cidr"), "");
        return;
    }
    faults.syntax(&format!("{field}.cidr"), cidr, rule(cidr));
    let net = |text: &str| meta::parse_cidr_sloppy(text).and_then(|(ip, bits)| IpNet::new(ip, bits).ok());
    let outer = net(cidr);
    for (i, except) in strings(block, &["except"]).into_iter().enumerate() {
        let at = format!("{field}.except[{i}]");
        let texts = rule(except);
        let readable = texts.is_empty();
        faults.syntax(&at, except, texts);
        if let (true, Some(outer), Some(inner)) = (readable, outer, net(except))
            && !(outer.contains(&inner.network()) && outer.prefix_len() < inner.prefix_len())
        {
            faults.invalid(at, except, "must be a strict subset of `cidr`");
        }
    }
}

pub(super) fn service_cidr(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let cidrs = strings(new, &["spec", "cidrs"]);
    let field = "spec.cidrs";
    if let Some(old) = old {
        let before = strings(old, &["spec", "cidrs"]);
        // Only growth by a second family is possible.
        if cidrs.len() < before.len() || (cidrs.len() == before.len() && cidrs != before) {
            faults.invalid(field, json!(cidrs), "field is immutable");
            return;
        }
        for (i, (now, stored)) in cidrs.iter().zip(&before).enumerate() {
            if now != stored {
                faults.invalid(format!("{field}[{i}]"), *now, "field is immutable");
            }
        }
        if cidrs == before || !faults.list.is_empty() {
            return;
        }
    }
    if cidrs.is_empty() {
        faults.required(field, "at least one CIDR required");
        return;
    }
    if cidrs.len() > 2 {
        let text = format!("{{\"CIDRs\":{}}}", json!(cidrs));
        faults.add(FieldError::invalid_text(field, text, "may only hold up to 2 values"));
        return;
    }
    let parsed: Vec<Option<IpNet>> = cidrs
        .iter()
        .map(|text| meta::parse_cidr_sloppy(text).and_then(|(ip, bits)| IpNet::new(ip, bits).ok()))
        .collect();
    if let [Some(a), Some(b)] = parsed.as_slice()
        && a.addr().is_ipv4() == b.addr().is_ipv4()
    {
        faults.invalid(
            field,
            json!(cidrs),
            "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64",
        );
    }
    for (i, (text, net)) in cidrs.iter().zip(parsed).enumerate() {
        let at = format!("{field}[{i}]");
        let texts = meta::cidr(text);
        let readable = texts.is_empty();
        faults.syntax(&at, text, texts);
        if let (true, Some(net)) = (readable, net)
            && net.trunc().to_string() != *text
        {
            faults.invalid(at, *text, format!("must be in canonical form (\"{}\")", net.trunc()));
        }
    }
}

pub(super) fn ip_address(faults: &mut Faults, new: &Value) {
    let parent = meta::get(new, &["spec", "parentRef"]);
    let at = |part: &str| format!("spec.parentRef.{part}");
    if parent.is_null() {
        faults.required("spec.parentRef", "");
        return;
    }
    let group = meta::text(parent, &["group"]);
    if !group.is_empty() {
        faults.syntax(&at("group"), group, meta::dns1123_subdomain(group));
    }
    for part in ["resource", "name"] {
        faults.required_syntax(&at(part), meta::text(parent, &[part]), meta::path_segment);
    }
    let namespace = meta::text(parent, &["namespace"]);
    if !namespace.is_empty() {
        faults.syntax(&at("namespace"), namespace, meta::path_segment(namespace));
    }
}
