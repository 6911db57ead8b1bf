//! Logins for registries, from Secrets of type `kubernetes.io/dockerconfigjson` and `kubernetes.io/dockercfg`.
//!
//! Source: Kubernetes documentation "Pull an Image from a Private Registry" and the rules for names in "Images" (wildcards in
//! each part of the host, a path as a prefix). Which login is tried for an image is a pure function of the Secrets.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

use super::Reference;

/// A user name and password for a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user's name.
    pub username: String,
    /// The password or access token.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Logins by the names that Secrets give to registries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keyring {
    /// `host[:port][/path]`, in the order of the Secrets.
    entries: Vec<(String, Login)>,
}

#[derive(Deserialize)]
struct DockerConfigJson {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

impl Keyring {
    /// Adds the logins of a Secret; Secrets of other types have none.
    ///
    /// # Errors
    /// The content is not what its type says. The text names the Secret and never its content.
    pub fn add(&mut self, secret: &Secret) -> Result<(), String> {
        let name = secret.metadata.name.as_deref().unwrap_or_default();
        let data = |key: &str| secret.data.as_ref().and_then(|d| d.get(key)).map(|b| b.0.as_slice());
        let broken = || format!("secret {name:?} does not hold a usable Docker configuration");
        let auths = match secret.type_.as_deref() {
            Some("kubernetes.io/dockerconfigjson") => match data(".dockerconfigjson") {
                Some(bytes) => serde_json::from_slice::<DockerConfigJson>(bytes).map_err(|_| broken())?.auths,
                None => return Ok(()),
            },
            Some("kubernetes.io/dockercfg") => match data(".dockercfg") {
                Some(bytes) => serde_json::from_slice(bytes).map_err(|_| broken())?,
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        for (registry, entry) in auths {
            self.entries.push((key(&registry), entry.login().ok_or_else(broken)?));
        }
        Ok(())
    }

    /// The logins to try for an image, the most specific name first. Empty means that it is asked for without one.
    pub fn logins(&self, image: &Reference) -> Vec<Login> {
        let mut found: Vec<&(String, Login)> = self.entries.iter().filter(|(key, _)| matches(key, image)).collect();
        found.sort_by(|(a, _), (b, _)| b.cmp(a));
        let mut logins: Vec<Login> = Vec::new();
        for (_, login) in found {
            if !logins.contains(login) {
                logins.push(login.clone());
            }
        }
        logins
    }
}

impl Entry {
    /// `auth` is `user:password` in base64 and wins, as in Docker's own files.
    fn login(self) -> Option<Login> {
        if self.auth.is_empty() {
            return Some(Login { username: self.username, password: self.password });
        }
        let bytes = base64::engine::general_purpose::STANDARD.decode(self.auth.trim()).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (username, password) = text.split_once(':')?;
        Some(Login { username: username.to_string(), password: password.trim_end_matches('\0').to_string() })
    }
}

/// The name of a registry without what is not part of an image's name: `https://index.docker.io/v1/` is `index.docker.io`.
fn key(registry: &str) -> String {
    let bare = registry.strip_prefix("https://").or_else(|| registry.strip_prefix("http://")).unwrap_or(registry);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let path = ["v1/", "v2/"].iter().find_map(|version| path.strip_prefix(version)).unwrap_or(match path {
        "v1" | "v2" => "",
        other => other,
    });
    if path.is_empty() { host.to_string() } else { format!("{host}/{path}") }
}

fn matches(key: &str, image: &Reference) -> bool {
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let name = image.name();
    let (own_host, own_path) = name.split_once('/').unwrap_or((&name, ""));
    // Docker's own registry has two names.
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let split = |host: &str| match host.rsplit_once(':') {
        Some((host, port)) => (host.to_string(), port.to_string()),
        None => (host.to_string(), String::new()),
    };
    let ((pattern, port), (own, own_port)) = (split(host), split(own_host));
    let (pattern, own): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), own.split('.').collect());
    port == own_port
        && pattern.len() == own.len()
        && pattern.iter().zip(own).all(|(pattern, part)| glob(pattern.as_bytes(), part.as_bytes()))
        && own_path.starts_with(path)
}

/// Shell patterns within one part of a host's name: `*` and `?`.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=text.len()).any(|n| glob(rest, &text[n..])),
        (Some((b'?', pattern)), Some((_, text))) => glob(pattern, text),
        (Some((a, pattern)), Some((b, text))) => a == b && glob(pattern, text),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;
    use serde_json::json;

    fn secret(kind: &str, key: &str, content: &str) -> Secret {
        Secret {
            type_: Some(kind.into()),
            data: Some([(key.to_string(), ByteString(content.as_bytes().to_vec()))].into()),
            ..Secret::default()
        }
    }

    #[test]
    fn names_match_as_documented() {
        for (key_text, image, expected) in [
            ("reg.example", "reg.example/app", true),
            ("https://reg.example/v2/", "reg.example/app", true),
            ("reg.example:5000", "reg.example:5000/app", true),
            ("reg.example:5000", "reg.example/app", false),
            ("reg.example", "reg.example:5000/app", false),
            ("*.example", "reg.example/app", true),
            ("*.example", "a.reg.example/app", false),
            ("r?g.example", "reg.example/app", true),
            ("reg.example/team", "reg.example/team/app", true),
            ("reg.example/team", "reg.example/other/app", false),
            ("https://index.docker.io/v1/", "nginx", true),
            ("docker.io", "me/app:1", true),
            ("other.io", "nginx", false),
        ] {
            let image = Reference::parse(image).unwrap();
            assert_eq!(matches(&key(key_text), &image), expected, "{key_text} {image}");
        }
    }

    #[test]
    fn both_types_of_secret_are_read_and_the_most_specific_login_comes_first() {
        let auth = base64::engine::general_purpose::STANDARD.encode("robot:s3:cret");
        let mut keyring = Keyring::default();
        let new = json!({"auths": {"reg.example": {"username": "any", "password": "one"}, "reg.example/team": {"auth": auth}}});
        keyring.add(&secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", &new.to_string())).unwrap();
        let old = json!({"old.example": {"username": "u", "password": "p", "email": "x"}});
        keyring.add(&secret("kubernetes.io/dockercfg", ".dockercfg", &old.to_string())).unwrap();
        keyring.add(&secret("Opaque", ".dockercfg", "not read")).unwrap();
        let names = |image: &str| {
            let logins = keyring.logins(&Reference::parse(image).unwrap());
            logins.into_iter().map(|l| format!("{}/{}", l.username, l.password)).collect::<Vec<_>>()
        };
        assert_eq!(names("reg.example/team/app"), ["robot/s3:cret", "any/one"]);
        assert_eq!(names("reg.example/app"), ["any/one"]);
        assert_eq!(names("old.example/app"), ["u/p"]);
        assert!(names("nginx").is_empty());
        assert!(!format!("{keyring:?}").contains("cret"), "passwords are not printed");
    }

    #[test]
    fn a_broken_secret_is_named_without_its_content() {
        let broken =
            secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", "{\"auths\": {\"a\": {\"auth\": \"!\"}}}");
        let error = Keyring::default().add(&broken).unwrap_err();
        assert!(error.contains("Docker configuration") && !error.contains('!'), "{error}");
    }
}
