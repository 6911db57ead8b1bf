//! Builds a container's environment.
//!
//! The order and the precedence are the kubelet's: service variables, then `envFrom`, then `env`; a later name replaces an
//! earlier one. Expansion follows Kubernetes API, EnvVar.value: `$(NAME)` refers to what is defined before, `$$` is a dollar,
//! and a reference to something undefined stays as written.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;

/// Expands `$(NAME)` references in `text`.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|open| open.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// An environment in order of definition, where a later value replaces an earlier one in its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Environment {
    /// Sets a variable.
    pub fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_string(), value).is_none() {
            self.order.push(name.to_string());
        }
    }

    /// Sets a variable unless there is one of that name.
    pub fn set_default(&mut self, name: &str, value: &str) {
        if !self.values.contains_key(name) {
            self.set(name, value.to_string());
        }
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Expands references to what is defined so far.
    pub fn expand(&self, text: &str) -> String {
        expand(text, |name| self.values.get(name).cloned())
    }

    /// Names and values in order.
    pub fn into_pairs(self) -> Vec<(String, String)> {
        let Environment { order, mut values } = self;
        order.into_iter().filter_map(|name| values.remove(&name).map(|value| (name, value))).collect()
    }
}

/// The variables that describe Services to a container, as Docker links did: `{NAME}_SERVICE_HOST`, `{NAME}_SERVICE_PORT`,
/// `{NAME}_SERVICE_PORT_{PORTNAME}`, `{NAME}_PORT` and `{NAME}_PORT_{PORT}_{PROTO}[_PROTO|_PORT|_ADDR]`.
///
/// Headless and ExternalName Services have none. `services` are those of the pod's namespace; `kubernetes` is
/// `default/kubernetes`, always included; `links` is the pod's `enableServiceLinks`.
pub fn service_variables(services: &[Service], kubernetes: Option<&Service>, links: bool) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    let shown = services.iter().filter(|_| links);
    // The namespace's own Services come last, so that a Service named kubernetes there wins as it does upstream.
    for service in kubernetes.into_iter().chain(shown) {
        let (Some(name), Some(spec)) = (&service.metadata.name, &service.spec) else { continue };
        let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else { continue };
        let ports = spec.ports.as_deref().unwrap_or_default();
        let Some(first) = ports.first() else { continue };
        let prefix = variable_name(name);
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_string() };
        variables.insert(format!("{prefix}_SERVICE_HOST"), ip.to_string());
        variables.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
        for port in ports {
            if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
                variables.insert(format!("{prefix}_SERVICE_PORT_{}", variable_name(port_name)), port.port.to_string());
            }
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
            if std::ptr::eq(port, first) {
                variables.insert(format!("{prefix}_PORT"), url.clone());
            }
            let link = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
            variables.insert(format!("{link}_PROTO"), protocol.to_lowercase());
            variables.insert(format!("{link}_PORT"), port.port.to_string());
            variables.insert(format!("{link}_ADDR"), ip.to_string());
            variables.insert(link, url);
        }
    }
    variables
}

fn variable_name(name: &str) -> String {
    name.to_ascii_uppercase().replace('-', "_")
}

/// Whether `name` may be a variable (Kubernetes accepts any printable ASCII but `=` since 1.34).
pub fn is_variable_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=')
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ServicePort, ServiceSpec};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    #[test]
    fn references_expand_as_in_the_api() {
        let lookup = |name: &str| (name == "A").then(|| "1".to_string());
        for (text, expected) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(B)", "$(B)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("$$", "$"),
            ("$()", "$()"),
            ("é$(A)é", "é1é"),
        ] {
            assert_eq!(expand(text, lookup), expected, "{text}");
        }
    }

    #[test]
    fn a_later_value_replaces_in_place() {
        let mut env = Environment::default();
        env.set("A", "1".into());
        env.set("B", env.expand("$(A)$(C)"));
        env.set("A", "2".into());
        env.set_default("A", "3");
        assert_eq!(env.into_pairs(), [("A".to_string(), "2".to_string()), ("B".into(), "1$(C)".into())]);
    }

    #[test]
    fn services_become_variables() {
        let service = |name: &str, ip: &str, ports: &[(&str, i32, &str)]| Service {
            metadata: ObjectMeta { name: Some(name.into()), ..Default::default() },
            spec: Some(ServiceSpec {
                cluster_ip: Some(ip.into()),
                ports: Some(
                    ports
                        .iter()
                        .map(|(name, port, protocol)| ServicePort {
                            name: Some(name.to_string()),
                            port: *port,
                            protocol: Some(protocol.to_string()),
                            ..Default::default()
                        })
                        .collect(),
                ),
                ..Default::default()
            }),
            status: None,
        };
        let own = [
            service("my-db", "10.96.0.7", &[("", 5432, "TCP"), ("admin-ui", 53, "UDP")]),
            service("headless", "None", &[("", 80, "TCP")]),
        ];
        let kubernetes = service("kubernetes", "10.96.0.1", &[("https", 443, "TCP")]);
        let all = service_variables(&own, Some(&kubernetes), true);
        let expected = [
            ("KUBERNETES_PORT", "tcp://10.96.0.1:443"),
            ("KUBERNETES_SERVICE_PORT_HTTPS", "443"),
            ("MY_DB_PORT_53_UDP_PROTO", "udp"),
            ("MY_DB_SERVICE_HOST", "10.96.0.7"),
            ("MY_DB_SERVICE_PORT", "5432"),
            ("MY_DB_SERVICE_PORT_ADMIN_UI", "53"),
        ];
        for (name, value) in expected {
            assert_eq!(all.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!all.keys().any(|k| k.starts_with("HEADLESS")));
        let without = service_variables(&own, Some(&kubernetes), false);
        assert!(without.contains_key("KUBERNETES_SERVICE_HOST") && !without.keys().any(|k| k.starts_with("MY_DB")));
    }
}
