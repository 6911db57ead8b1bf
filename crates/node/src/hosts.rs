//! Builds `/etc/hosts` and the host name of a pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::PodSpec;

/// The host name of a pod: `spec.hostname`, else the pod's name cut to 63 characters (Kubernetes API, PodSpec.hostname).
pub(crate) fn hostname(pod: &PodSpec, pod_name: &str) -> String {
    if let Some(name) = pod.hostname_override.as_deref().filter(|n| !n.is_empty()) {
        return name.chars().take(64).collect();
    }
    let name = pod.hostname.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod_name);
    let cut: String = name.chars().take(63).collect();
    cut.trim_end_matches(['-', '.']).to_string()
}

/// The fully qualified name inside the cluster, if the pod has a subdomain.
pub(crate) fn qualified(pod: &PodSpec, hostname: &str, namespace: &str, domain: &str) -> Option<String> {
    let subdomain = pod.subdomain.as_deref().filter(|s| !s.is_empty())?;
    Some(format!("{hostname}.{subdomain}.{namespace}.svc.{domain}"))
}

/// The file: loopback names, the pod's own name, and `hostAliases`.
pub(crate) fn hosts_file(pod: &PodSpec, ip: IpAddr, hostname: &str, qualified: Option<&str>) -> String {
    let mut out = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    match qualified {
        Some(qualified) => out.push_str(&format!("{ip}\t{qualified}\t{hostname}\n")),
        None => out.push_str(&format!("{ip}\t{hostname}\n")),
    }
    out.push_str(&aliases(pod));
    out
}

/// The lines of `hostAliases`.
pub(crate) fn aliases(pod: &PodSpec) -> String {
    let mut out = String::new();
    let aliases = pod.host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        out.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        out.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::HostAlias;

    #[test]
    fn names_are_cut_to_a_label() {
        let long = "a".repeat(70);
        assert_eq!(hostname(&PodSpec::default(), &long).len(), 63);
        let cut_at_dash = format!("{}-{}", "a".repeat(62), "b");
        assert_eq!(hostname(&PodSpec::default(), &cut_at_dash), "a".repeat(62));
        let named = PodSpec { hostname: Some("db".into()), ..Default::default() };
        assert_eq!(hostname(&named, "pod-1"), "db");
    }

    #[test]
    fn the_file_names_the_pod_and_its_aliases() {
        let pod = PodSpec {
            subdomain: Some("postgres".into()),
            host_aliases: Some(vec![HostAlias {
                ip: "192.0.2.9".into(),
                hostnames: Some(vec!["a".into(), "b".into()]),
            }]),
            ..Default::default()
        };
        let qualified = qualified(&pod, "db-0", "shop", "cluster.local");
        let file = hosts_file(&pod, "10.244.1.5".parse().unwrap(), "db-0", qualified.as_deref());
        assert!(file.contains("10.244.1.5\tdb-0.postgres.shop.svc.cluster.local\tdb-0\n"), "{file}");
        assert!(file.ends_with("192.0.2.9\ta\tb\n"), "{file}");
    }
}
