//! Builds `/etc/resolv.conf` of a pod from its DNS policy, its `dnsConfig` and the host's file.
//!
//! Limits and texts are the kubelet's (Kubernetes documentation, "DNS for Services and Pods"; resolv.conf(5)).

use std::net::IpAddr;

use k8s_openapi::api::core::v1::PodSpec;

const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;
const MAX_SEARCH_ENTRY: usize = 253;

/// A resolver configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Addresses of name servers.
    pub nameservers: Vec<String>,
    /// Search list.
    pub searches: Vec<String>,
    /// Options as written (`ndots:5`).
    pub options: Vec<String>,
}

/// A Warning event that the construction calls for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Event reason.
    pub reason: &'static str,
    /// Event message.
    pub message: String,
}

impl ResolvConf {
    /// Reads a resolv.conf: the last `search` wins, options accumulate, a trailing dot of a search entry is dropped.
    pub fn parse(text: &str) -> ResolvConf {
        let mut conf = ResolvConf::default();
        for line in text.lines() {
            let line = line.trim();
            if line.starts_with(['#', ';']) {
                continue;
            }
            let mut fields = line.split_whitespace();
            match fields.next() {
                Some("nameserver") => conf.nameservers.extend(fields.next().map(str::to_string)),
                Some("search") => {
                    conf.searches = fields
                        .map(|entry| entry.trim_end_matches('.').to_string())
                        .filter(|entry| !entry.is_empty())
                        .collect();
                }
                Some("options") => {
                    for option in fields {
                        set_option(&mut conf.options, option.to_string());
                    }
                }
                _ => {}
            }
        }
        conf
    }

    /// Writes the file: search, name servers, options (sorted, because their order has no meaning).
    pub fn render(&self) -> String {
        let mut out = String::new();
        if !self.searches.is_empty() {
            out.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.nameservers {
            out.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            let mut options = self.options.clone();
            options.sort();
            out.push_str(&format!("options {}\n", options.join(" ")));
        }
        out
    }
}

fn set_option(options: &mut Vec<String>, option: String) {
    let name = |o: &str| o.split(':').next().unwrap_or_default().to_string();
    match options.iter_mut().find(|o| name(o) == name(&option)) {
        Some(existing) => *existing = option,
        None => options.push(option),
    }
}

/// The resolver configuration of a pod.
pub fn pod_resolv_conf(
    pod: &PodSpec,
    namespace: &str,
    host: &ResolvConf,
    cluster_dns: &[IpAddr],
    cluster_domain: &str,
) -> (ResolvConf, Vec<Warning>) {
    let mut warnings = Vec::new();
    let host_network = pod.host_network == Some(true);
    let policy = pod.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let cluster = match policy {
        "ClusterFirst" => !host_network,
        "ClusterFirstWithHostNet" => true,
        _ => false,
    };
    let mut conf = if policy == "None" {
        ResolvConf::default()
    } else if cluster && cluster_dns.is_empty() {
        warnings.push(Warning {
            reason: "MissingClusterDNS",
            message: format!(
                "kubelet does not have ClusterDNS IP configured and cannot create Pod using \"{policy}\" policy. Falling back to \"Default\" policy."
            ),
        });
        host.clone()
    } else if cluster {
        let mut searches = Vec::new();
        if !cluster_domain.is_empty() {
            searches.push(format!("{namespace}.svc.{cluster_domain}"));
            searches.push(format!("svc.{cluster_domain}"));
            searches.push(cluster_domain.to_string());
        }
        extend_unique(&mut searches, &host.searches);
        ResolvConf {
            nameservers: cluster_dns.iter().map(IpAddr::to_string).collect(),
            searches,
            options: vec!["ndots:5".to_string()],
        }
    } else {
        host.clone()
    };
    if let Some(extra) = &pod.dns_config {
        extend_unique(&mut conf.nameservers, extra.nameservers.as_deref().unwrap_or_default());
        extend_unique(&mut conf.searches, extra.searches.as_deref().unwrap_or_default());
        for option in extra.options.iter().flatten() {
            let Some(name) = option.name.as_deref() else { continue };
            set_option(
                &mut conf.options,
                match option.value.as_deref() {
                    Some(value) => format!("{name}:{value}"),
                    None => name.to_string(),
                },
            );
        }
    }
    trim(&mut conf, &mut warnings);
    (conf, warnings)
}

fn extend_unique(list: &mut Vec<String>, more: &[String]) {
    for entry in more {
        if !list.contains(entry) {
            list.push(entry.clone());
        }
    }
}

fn trim(conf: &mut ResolvConf, warnings: &mut Vec<Warning>) {
    if conf.nameservers.len() > MAX_NAMESERVERS {
        conf.nameservers.truncate(MAX_NAMESERVERS);
        warnings.push(Warning {
            reason: "DNSConfigForming",
            message: format!(
                "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
                conf.nameservers.join(" ")
            ),
        });
    }
    let before = conf.searches.len();
    conf.searches.truncate(MAX_SEARCHES);
    conf.searches.retain(|entry| entry.len() <= MAX_SEARCH_ENTRY);
    while conf.searches.join(" ").len() > MAX_SEARCH_CHARS {
        conf.searches.pop();
    }
    if conf.searches.len() < before {
        warnings.push(Warning {
            reason: "DNSConfigForming",
            message: format!(
                "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
                conf.searches.join(" ")
            ),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{PodDNSConfig, PodDNSConfigOption};

    const HOST: &str = "# host\nnameserver 192.0.2.1\nsearch old.example\nsearch corp.example. .\noptions timeout:2 rotate\noptions timeout:3\n";

    fn built(spec: &PodSpec, dns: &[&str]) -> (String, Vec<Warning>) {
        let dns: Vec<IpAddr> = dns.iter().map(|d| d.parse().unwrap()).collect();
        let (conf, warnings) = pod_resolv_conf(spec, "shop", &ResolvConf::parse(HOST), &dns, "cluster.local");
        (conf.render(), warnings)
    }

    #[test]
    fn each_policy_has_its_file() {
        let cluster = "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\nnameserver 10.96.0.10\noptions ndots:5\n";
        let default = "search corp.example\nnameserver 192.0.2.1\noptions rotate timeout:3\n";
        for (policy, host_network, expected) in [
            (None, false, cluster),
            (Some("ClusterFirst"), false, cluster),
            (Some("ClusterFirst"), true, default),
            (Some("ClusterFirstWithHostNet"), true, cluster),
            (Some("Default"), false, default),
            (Some("None"), false, ""),
        ] {
            let spec = PodSpec {
                dns_policy: policy.map(str::to_string),
                host_network: Some(host_network),
                ..Default::default()
            };
            assert_eq!(built(&spec, &["10.96.0.10"]).0, expected, "{policy:?} hostNetwork={host_network}");
        }
    }

    #[test]
    fn dns_config_is_appended_and_options_replace() {
        let spec = PodSpec {
            dns_config: Some(PodDNSConfig {
                nameservers: Some(vec!["1.1.1.1".into(), "10.96.0.10".into()]),
                searches: Some(vec!["my.example".into()]),
                options: Some(vec![
                    PodDNSConfigOption { name: Some("ndots".into()), value: Some("2".into()) },
                    PodDNSConfigOption { name: Some("edns0".into()), value: None },
                ]),
            }),
            ..Default::default()
        };
        let (text, warnings) = built(&spec, &["10.96.0.10"]);
        assert_eq!(
            text,
            "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example my.example\nnameserver 10.96.0.10\nnameserver 1.1.1.1\noptions edns0 ndots:2\n"
        );
        assert!(warnings.is_empty());
    }

    #[test]
    fn limits_trim_with_a_warning() {
        let spec = PodSpec {
            dns_policy: Some("None".into()),
            dns_config: Some(PodDNSConfig {
                nameservers: Some((1..=5).map(|i| format!("192.0.2.{i}")).collect()),
                searches: Some((0..40).map(|i| format!("s{i}.example")).collect()),
                options: None,
            }),
            ..Default::default()
        };
        let (text, warnings) = built(&spec, &[]);
        assert_eq!(text.matches("nameserver").count(), 3);
        assert_eq!(text.lines().next().unwrap().split(' ').count(), 33);
        assert_eq!(warnings.iter().map(|w| w.reason).collect::<Vec<_>>(), ["DNSConfigForming"; 2]);
        assert!(warnings[0].message.ends_with("is: 192.0.2.1 192.0.2.2 192.0.2.3"));
    }

    #[test]
    fn no_cluster_dns_falls_back_with_a_warning() {
        let (text, warnings) = built(&PodSpec::default(), &[]);
        assert!(text.contains("nameserver 192.0.2.1"));
        assert_eq!(warnings[0].reason, "MissingClusterDNS");
    }
}
