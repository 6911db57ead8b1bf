//! Annotations of load balancers: those that are honoured, and those whose author must be told that nothing will happen.

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;

const PREFIX: &str = "service.beta.kubernetes.io/";

/// What the local provider does with an annotation.
enum Support {
    /// Does what it says, or what it says is the case anyway.
    Honoured,
    /// Only with this value; the text says why not with others.
    OnlyValue(&'static str, &'static str),
    /// Nothing, for this reason.
    Ignored(&'static str),
}

use Support::{Honoured, Ignored as Not, OnlyValue};

const TLS: &str = "TLS is not terminated at the load balancer; terminate it in an Ingress or in the pods";
const CHECKS: &str = "targets are taken from the readiness of their pods";
const PLUMBING: &str = "there are no cloud security groups or networks here";
const IDLE: &str = "idle connections end with the kernel's connection tracking timeouts";

/// The annotations of AWS load balancers (cloud-provider-aws and aws-load-balancer-controller), by the name behind the prefix.
const AWS: &[(&str, Support)] = &[
    ("aws-load-balancer-type", Honoured),
    ("aws-load-balancer-nlb-target-type", Honoured),
    ("aws-load-balancer-name", Honoured),
    ("aws-load-balancer-additional-resource-tags", Honoured),
    ("aws-load-balancer-scheme", Not("the pools do not tell internal from internet-facing addresses")),
    ("aws-load-balancer-internal", Not("the pools do not tell internal from internet-facing addresses")),
    ("aws-load-balancer-ssl-cert", Not(TLS)),
    ("aws-load-balancer-ssl-ports", Not(TLS)),
    ("aws-load-balancer-ssl-negotiation-policy", Not(TLS)),
    ("aws-load-balancer-alpn-policy", Not(TLS)),
    ("aws-load-balancer-backend-protocol", OnlyValue("tcp", TLS)),
    ("aws-load-balancer-cross-zone-load-balancing-enabled", OnlyValue("true", "targets of all zones are used alike")),
    (
        "aws-load-balancer-attributes",
        OnlyValue("load_balancing.cross_zone.enabled=true", "targets of all zones are used alike"),
    ),
    (
        "aws-load-balancer-target-group-attributes",
        OnlyValue(
            "preserve_client_ip.enabled=true",
            "targets always see the client's address and keep their connections",
        ),
    ),
    ("aws-load-balancer-listener-attributes", Not(IDLE)),
    ("aws-load-balancer-proxy-protocol", Not("connections are forwarded as they are, with the client's address")),
    (
        "aws-load-balancer-proxy-protocol-per-target-group",
        Not("connections are forwarded as they are, with the client's address"),
    ),
    ("aws-load-balancer-healthcheck-protocol", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-port", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-path", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-interval", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-timeout", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-healthy-threshold", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-unhealthy-threshold", Not(CHECKS)),
    ("aws-load-balancer-healthcheck-success-codes", Not(CHECKS)),
    ("aws-load-balancer-connection-idle-timeout", Not(IDLE)),
    (
        "aws-load-balancer-connection-draining-enabled",
        OnlyValue("true", "established connections always stay with their target"),
    ),
    (
        "aws-load-balancer-connection-draining-timeout",
        Not("established connections stay with their target until they end"),
    ),
    ("aws-load-balancer-access-log-enabled", OnlyValue("false", "connections are not logged")),
    ("aws-load-balancer-access-log-s3-bucket-name", Not("connections are not logged")),
    ("aws-load-balancer-access-log-s3-bucket-prefix", Not("connections are not logged")),
    ("aws-load-balancer-access-log-emit-interval", Not("connections are not logged")),
    ("aws-load-balancer-subnets", Not(PLUMBING)),
    ("aws-load-balancer-eip-allocations", Not("ask for an address with metallb.io/loadBalancerIPs")),
    ("aws-load-balancer-private-ipv4-addresses", Not("ask for an address with metallb.io/loadBalancerIPs")),
    ("aws-load-balancer-ipv6-addresses", Not("ask for an address with metallb.io/loadBalancerIPs")),
    ("aws-load-balancer-ip-address-type", Not("the Service's ipFamilies decide")),
    ("aws-load-balancer-security-groups", Not(PLUMBING)),
    ("aws-load-balancer-extra-security-groups", Not(PLUMBING)),
    ("aws-load-balancer-target-node-labels", Not("all nodes are targets")),
    ("aws-load-balancer-enable-tcp-udp-listener", Honoured),
    ("aws-load-balancer-quic-enabled-ports", Not("UDP flows are told apart by address and port only")),
    ("aws-load-balancer-multi-cluster-target-group", Not(PLUMBING)),
    ("aws-load-balancer-minimum-load-balancer-capacity", Not(PLUMBING)),
    ("aws-load-balancer-security-group-prefix-lists", Honoured),
    ("aws-load-balancer-manage-backend-security-group-rules", Honoured),
    ("aws-load-balancer-inbound-sg-rules-on-private-link-traffic", Honoured),
    ("aws-load-balancer-disable-nlb-sg", Honoured),
    ("load-balancer-source-ranges", Honoured),
];

/// An annotation without effect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ignored {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Why it has no effect here.
    pub why: String,
}

impl Ignored {
    /// The sentence for an event.
    pub fn message(&self) -> String {
        format!("annotation {}={} is not supported by provider \"local\": {}", self.name, self.value, self.why)
    }
}

/// The load-balancer annotations of a Service that have no effect, by name.
pub fn ignored_annotations(service: &Service) -> Vec<Ignored> {
    let annotations = service.metadata.annotations.iter().flatten();
    annotations
        .filter_map(|(name, value)| {
            Some(Ignored { name: name.clone(), value: value.clone(), why: why_ignored(name, value)? })
        })
        .collect()
}

fn why_ignored(name: &str, value: &str) -> Option<String> {
    let known = |short: &str| {
        AWS.iter().find(|(n, _)| *n == short || short.strip_prefix(n).is_some_and(|r| r.starts_with('.')))
    };
    match name.strip_prefix(PREFIX) {
        Some(short) => match known(short) {
            Some((_, Honoured)) => None,
            Some((_, OnlyValue(wanted, why))) => (value.trim() != *wanted).then(|| why.to_string()),
            Some((_, Not(why))) => Some(why.to_string()),
            None if short.starts_with("aws-load-balancer-") => Some(unknown(short)),
            None => Some("it belongs to another cloud's load balancer".into()),
        },
        // A common slip: the name without its prefix.
        None if name.starts_with("aws-load-balancer-") => {
            Some(format!("unknown annotation; did you mean {PREFIX}{name}?"))
        }
        None => None,
    }
}

fn unknown(short: &str) -> String {
    let nearest = AWS.iter().map(|(n, _)| (distance(n, short), *n)).min();
    match nearest {
        Some((d, name)) if d <= 2 => format!("unknown annotation; did you mean {PREFIX}{name}?"),
        _ => "unknown annotation".into(),
    }
}

/// Edits between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The networks that may reach a Service: the field, else the annotation, else everybody (`None`). Entries that are no
/// network are left out; the API server has refused them already.
pub fn source_ranges(service: &Service) -> Option<Vec<IpNet>> {
    let field = service.spec.as_ref().and_then(|s| s.load_balancer_source_ranges.clone()).filter(|r| !r.is_empty());
    let annotation = || {
        let value =
            service.metadata.annotations.as_ref()?.get("service.beta.kubernetes.io/load-balancer-source-ranges")?;
        Some(value.split(',').map(str::to_string).collect::<Vec<_>>()).filter(|_| !value.trim().is_empty())
    };
    let listed = field.or_else(annotation)?;
    let mut nets: Vec<IpNet> =
        listed.iter().filter_map(|r| r.trim().parse::<IpNet>().ok()).map(|n| n.trunc()).collect();
    nets.sort();
    nets.dedup();
    Some(nets)
}

/// Whether connections go to node ports instead of pods, as the Service's annotations ask.
pub fn wants_instances(service: &Service) -> bool {
    let annotations = service.metadata.annotations.as_ref();
    let value = annotations.and_then(|a| a.get("service.beta.kubernetes.io/aws-load-balancer-nlb-target-type"));
    value.is_some_and(|v| v.trim() == "instance")
}
