//! Rules of Endpoints and EndpointSlices.

use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::{Faults, same, strings};
use crate::meta;
use crate::status::FieldError;

const MAX_ENDPOINTS: usize = 1000;
const MAX_ADDRESSES: usize = 100;
const MAX_PORTS: usize = 20_000;
const MAX_ZONE_HINTS: usize = 8;
const MAX_NODE_HINTS: usize = 8;
const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];

pub(super) fn endpoints(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let subsets = meta::get(new, &["subsets"]);
    if old.is_some_and(|old| same(meta::get(old, &["subsets"]), subsets)) {
        return;
    }
    let stored: Vec<&str> = old
        .into_iter()
        .flat_map(|old| meta::list(old, &["subsets"]))
        .flat_map(|subset| ["addresses", "notReadyAddresses"].map(|list| meta::list(subset, &[list])))
        .flatten()
        .map(|address| meta::text(address, &["ip"]))
        .collect();
    for (s, subset) in meta::list(new, &["subsets"]).iter().enumerate() {
        let (ready, not_ready) = (meta::list(subset, &["addresses"]), meta::list(subset, &["notReadyAddresses"]));
        if ready.is_empty() && not_ready.is_empty() {
            faults.required(format!("subsets[{s}]"), "must specify `addresses` or `notReadyAddresses`");
        }
        for (list, addresses) in [("addresses", ready), ("notReadyAddresses", not_ready)] {
            for (i, address) in addresses.iter().enumerate() {
                self::address(faults, &format!("subsets[{s}].{list}[{i}]"), address, &stored);
            }
        }
        let ports = meta::list(subset, &["ports"]);
        for (i, port) in ports.iter().enumerate() {
            let at = |part: &str| format!("subsets[{s}].ports[{i}].{part}");
            let name = meta::text(port, &["name"]);
            if name.is_empty() {
                if ports.len() > 1 {
                    faults.required(at("name"), "");
                }
            } else {
                faults.syntax(&at("name"), name, meta::dns1123_label(name));
            }
            faults.port_number(at("port"), meta::get(port, &["port"]));
            match meta::text(port, &["protocol"]) {
                "" => faults.required(at("protocol"), ""),
                protocol => faults.one_of(at("protocol"), protocol, &PROTOCOLS),
            }
            if let Some(protocol) = meta::get(port, &["appProtocol"]).as_str() {
                faults.syntax(&at("appProtocol"), protocol, meta::qualified_name(protocol));
            }
        }
    }
}

fn address(faults: &mut Faults, field: &str, address: &Value, stored: &[&str]) {
    let ip = meta::text(address, &["ip"]);
    let at = format!("{field}.ip");
    let readable = meta::parse_ip_sloppy(ip).is_some();
    let texts = if stored.contains(&ip) { meta::ip_sloppy(ip) } else { meta::ip(ip) };
    faults.syntax(&at, ip, texts);
    let hostname = meta::text(address, &["hostname"]);
    if !hostname.is_empty() {
        faults.syntax(&format!("{field}.hostname"), hostname, meta::dns1123_label(hostname));
    }
    if let Some(node) = meta::get(address, &["nodeName"]).as_str() {
        faults.syntax(&format!("{field}.nodeName"), node, meta::dns1123_subdomain(node));
    }
    if readable {
        faults.special_ip(&at, ip);
    } else {
        // The check for special ranges reports unreadable text in its own words.
        faults.invalid(at, ip, "must be a valid IP address");
    }
}

pub(super) fn slice(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let address_type = meta::text(new, &["addressType"]);
    match address_type {
        "" => faults.required("addressType", ""),
        type_ => faults.one_of("addressType", type_, &["FQDN", "IPv4", "IPv6"]),
    }
    ports(faults, meta::list(new, &["ports"]));
    let endpoints = meta::list(new, &["endpoints"]);
    if endpoints.len() > MAX_ENDPOINTS {
        faults.add(FieldError::too_many("endpoints", endpoints.len(), MAX_ENDPOINTS));
    } else if old.is_none_or(|old| !same(meta::get(old, &["endpoints"]), meta::get(new, &["endpoints"]))) {
        for (i, endpoint) in endpoints.iter().enumerate() {
            self::endpoint(faults, &format!("endpoints[{i}]"), endpoint, address_type);
        }
    }
    if let Some(old) = old {
        faults.unchanged("addressType", &json!(address_type), &json!(meta::text(old, &["addressType"])));
    }
}

fn ports(faults: &mut Faults, ports: &[Value]) {
    if ports.len() > MAX_PORTS {
        faults.add(FieldError::too_many("ports", ports.len(), MAX_PORTS));
        return;
    }
    let mut names = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = |part: &str| format!("ports[{i}].{part}");
        let name = meta::text(port, &["name"]);
        if !name.is_empty() {
            faults.syntax(&at("name"), name, meta::dns1123_label(name));
        }
        if !names.insert(name) {
            faults.add(FieldError::duplicate(at("name"), name));
        }
        if let Some(protocol) = meta::get(port, &["protocol"]).as_str() {
            faults.one_of(at("protocol"), protocol, &PROTOCOLS);
        } else {
            faults.required(at("protocol"), "");
        }
        if let Some(protocol) = meta::get(port, &["appProtocol"]).as_str() {
            faults.syntax(&at("appProtocol"), protocol, meta::qualified_name(protocol));
        }
    }
}

fn endpoint(faults: &mut Faults, field: &str, endpoint: &Value, address_type: &str) {
    let addresses = strings(endpoint, &["addresses"]);
    let at = format!("{field}.addresses");
    if addresses.is_empty() {
        faults.required(at.as_str(), "must contain at least 1 address");
    } else if addresses.len() > MAX_ADDRESSES {
        faults.add(FieldError::too_many(at.as_str(), addresses.len(), MAX_ADDRESSES));
    }
    for (i, address) in addresses.iter().enumerate() {
        let one = format!("{at}[{i}]");
        match address_type {
            "IPv4" | "IPv6" => {}
            "FQDN" => {
                domain_name(faults, &one, address);
                continue;
            }
            _ => continue,
        }
        let texts = meta::ip(address);
        if !texts.is_empty() {
            faults.syntax(&one, address, texts);
            continue;
        }
        let Ok(ip) = address.parse::<std::net::IpAddr>() else { continue };
        if ip.to_string() != *address {
            faults.invalid(one.as_str(), *address, format!("must be in canonical form (\"{ip}\")"));
            continue;
        }
        if address_type == "IPv4" && ip.is_ipv6() {
            faults.invalid(at.as_str(), *address, "must be an IPv4 address");
        } else if address_type == "IPv6" && ip.is_ipv4() {
            faults.invalid(at.as_str(), *address, "must be an IPv6 address");
        }
        faults.special_ip(&one, address);
    }
    if let Some(node) = meta::get(endpoint, &["nodeName"]).as_str() {
        faults.syntax(&format!("{field}.nodeName"), node, meta::dns1123_subdomain(node));
    }
    if let Some(hostname) = meta::get(endpoint, &["hostname"]).as_str() {
        faults.syntax(&format!("{field}.hostname"), hostname, meta::dns1123_label(hostname));
    }
    hints(
        faults,
        &format!("{field}.hints.forZones"),
        meta::list(endpoint, &["hints", "forZones"]),
        MAX_ZONE_HINTS,
        meta::label_value,
    );
    hints(
        faults,
        &format!("{field}.hints.forNodes"),
        meta::list(endpoint, &["hints", "forNodes"]),
        MAX_NODE_HINTS,
        meta::dns1123_subdomain,
    );
}

/// A domain name of two labels at least; a dot may end it.
fn domain_name(faults: &mut Faults, field: &str, name: &str) {
    if name.is_empty() {
        faults.required(field, "");
        return;
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    let texts = meta::dns1123_subdomain(name);
    if !texts.is_empty() {
        faults.invalid(field, name, texts.join(","));
    } else if !name.contains('.') {
        faults.invalid(field, name, "should be a domain with at least two segments separated by dots");
    } else {
        for label in name.split('.') {
            let texts = meta::dns1123_label(label);
            if !texts.is_empty() {
                faults.invalid(field, label, texts.join(","));
            }
        }
    }
}

fn hints(faults: &mut Faults, field: &str, hints: &[Value], max: usize, rule: fn(&str) -> Vec<String>) {
    if hints.len() > max {
        faults.add(FieldError::too_many(field, hints.len(), max));
        return;
    }
    let mut seen = BTreeSet::new();
    for (i, hint) in hints.iter().enumerate() {
        let at = format!("{field}[{i}].name");
        let name = meta::text(hint, &["name"]);
        if !seen.insert(name) {
            faults.add(FieldError::duplicate(at, name));
        } else {
            faults.syntax(&at, name, rule(name));
        }
    }
}
