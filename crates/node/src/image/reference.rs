//! Image references and their normal form.

use std::fmt;

/// An image reference in normal form: registry, repository, and a tag or a digest.
///
/// Follows the grammar of the OCI distribution specification with Docker's short forms: `nginx` is
/// `docker.io/library/nginx:latest`, `me/app:1` is `docker.io/me/app:1`; the first component is a registry when it holds a dot
/// or a colon or is `localhost`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl Reference {
    /// Parses and normalises.
    ///
    /// # Errors
    /// Gives what Kubernetes shows for reason `InvalidImageName`.
    pub fn parse(text: &str) -> Result<Reference, String> {
        let invalid = || format!("couldn't parse image name {text:?}: invalid reference format");
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            let (algorithm, hex) = digest.split_once(':').ok_or_else(invalid)?;
            let long = match algorithm {
                "sha256" => 64,
                "sha512" => 128,
                _ => return Err(invalid()),
            };
            if hex.len() != long || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(invalid());
            }
        }
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && (tag.is_empty()
                || tag.len() > 128
                || tag.starts_with(['.', '-'])
                || !tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')))
        {
            return Err(invalid());
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest.to_string()),
            Some(_) => ("docker.io", name.to_string()),
            None => ("docker.io", format!("library/{name}")),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let repository = if registry == "docker.io" && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository
        };
        let component = |c: &str| {
            !c.is_empty()
                && c.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
                && c.starts_with(|f: char| f.is_ascii_alphanumeric())
                && c.ends_with(|f: char| f.is_ascii_alphanumeric())
        };
        let host = !registry.is_empty()
            && registry.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b':' | b'-' | b'[' | b']'));
        if !host || !repository.split('/').all(component) {
            return Err(invalid());
        }
        Ok(Reference {
            registry: registry.to_string(),
            repository,
            tag: match (tag, digest) {
                (None, None) => Some("latest".to_string()),
                (tag, _) => tag.map(str::to_string),
            },
            digest: digest.map(str::to_string),
        })
    }

    /// The digest, if the reference has one; it decides alone then.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// The registry's host, with a port if given.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Registry and repository without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The pull policy of a container that names none: Always for `latest`, else IfNotPresent (Kubernetes API,
    /// Container.imagePullPolicy).
    pub fn default_pull_policy(&self) -> &'static str {
        if self.digest.is_none() && self.tag.as_deref() == Some("latest") { "Always" } else { "IfNotPresent" }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms_are_docker_s() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, expected) in [
            ("nginx", "docker.io/library/nginx:latest".to_string()),
            ("nginx:1.27", "docker.io/library/nginx:1.27".to_string()),
            ("docker.io/nginx", "docker.io/library/nginx:latest".to_string()),
            ("index.docker.io/library/nginx", "docker.io/library/nginx:latest".to_string()),
            ("me/app", "docker.io/me/app:latest".to_string()),
            ("portolan.dev/echo", "portolan.dev/echo:latest".to_string()),
            ("localhost/a", "localhost/a:latest".to_string()),
            ("reg:5000/a/b:v1", "reg:5000/a/b:v1".to_string()),
            (&format!("nginx@{digest}"), format!("docker.io/library/nginx@{digest}")),
            (&format!("nginx:1@{digest}"), format!("docker.io/library/nginx:1@{digest}")),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        for text in [
            "",
            "UPPER",
            "a:",
            "a b",
            "a/../b",
            "/a",
            "a/",
            "a@sha256:12",
            "a@md5:00",
            "-a",
            "a:t/",
            "reg.io/",
            "a:-t",
            "http://a/b",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn only_latest_is_pulled_always() {
        assert_eq!(Reference::parse("a").unwrap().default_pull_policy(), "Always");
        assert_eq!(Reference::parse("a:1").unwrap().default_pull_policy(), "IfNotPresent");
    }
}
