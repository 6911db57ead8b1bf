//! Fetches images from registries (only when the operator allows it).
//!
//! Source: OCI distribution specification; the texts of errors are containerd's, because they are what users of Kubernetes
//! find in events. Layers that the store has already are not fetched again.

use std::io::Seek;
use std::path::Path;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::{DigestError, OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use tokio::io::AsyncWriteExt;

use super::archive::{
    Descriptor, MAX_JSON_BYTES, OciConfig, OciIndex, OciManifest, architecture, check_digest, decompress,
};
use super::credentials::Login;
use super::{ImageError, NewImage, Reference, StoredImage, layer};

/// What we can read, in the order of preference.
const MANIFEST_TYPES: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Layers fetched at the same time (containerd's default).
const DOWNLOADS: usize = 3;
/// How long a connection may take, and how long a registry may fall silent (containerd's defaults).
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
const SILENCE_LIMIT: Duration = Duration::from_secs(300);

/// Why one attempt failed, before the image's name is put to it.
#[derive(Debug)]
struct Failure {
    /// The status code that a container runtime gives; `None` where it has nothing better than "unknown".
    code: Option<&'static str>,
    reason: String,
}

impl Failure {
    fn other(reason: impl std::fmt::Display) -> Failure {
        Failure { code: None, reason: reason.to_string() }
    }
}

/// An image as its registry describes it.
pub(super) struct Fetched {
    pub(super) image: NewImage,
    /// Bytes of its blobs as they are in the registry.
    pub(super) size_bytes: u64,
}

/// Fetches an image into `store`, with each of the logins until one works, or without one if there are none.
pub(super) async fn pull(reference: &Reference, logins: &[Login], store: &Path) -> Result<Fetched, ImageError> {
    let registry = Registry::new(reference)?;
    let mut last = None;
    for auth in auths(logins) {
        match registry.fetch(&auth, store).await {
            Ok(fetched) => return Ok(fetched),
            Err(failure) => last = Some(failure),
        }
    }
    let Failure { code, reason } = last.unwrap_or_else(|| Failure::other("there is no login to try"));
    Err(ImageError::Pull { code, reference: reference.to_string(), reason })
}

fn auths(logins: &[Login]) -> Vec<RegistryAuth> {
    if logins.is_empty() {
        return vec![RegistryAuth::Anonymous];
    }
    logins.iter().map(|l| RegistryAuth::Basic(l.username.clone(), l.password.clone())).collect()
}

struct Registry<'a> {
    reference: &'a Reference,
    target: oci_client::Reference,
    https: bool,
}

impl<'a> Registry<'a> {
    fn new(reference: &'a Reference) -> Result<Registry<'a>, ImageError> {
        let target = reference.to_string().parse().map_err(|e: oci_client::ParseError| ImageError::Pull {
            code: None,
            reference: reference.to_string(),
            reason: e.to_string(),
        })?;
        Ok(Registry { reference, target, https: !on_this_machine(reference.registry()) })
    }

    fn client(&self) -> Result<oci_client::Client, Failure> {
        let config = ClientConfig {
            protocol: if self.https { ClientProtocol::Https } else { ClientProtocol::Http },
            connect_timeout: Some(CONNECT_LIMIT),
            read_timeout: Some(SILENCE_LIMIT),
            user_agent: concat!("portolan/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        oci_client::Client::try_from(config).map_err(Failure::other)
    }

    async fn fetch(&self, auth: &RegistryAuth, store: &Path) -> Result<Fetched, Failure> {
        // A client of its own for each login: it remembers the first one.
        let client = self.client()?;
        let resolved = self.manifest(&client, auth, &self.target).await;
        let (bytes, digest) = resolved.map_err(|failure| Failure {
            reason: format!("failed to resolve reference \"{}\": {}", self.reference, failure.reason),
            ..failure
        })?;
        let mut digests = vec![digest];
        let manifest = self.for_this_machine(&client, auth, bytes, &mut digests).await?;

        let config_bytes = self.small_blob(&client, &manifest.config).await?;
        let config: OciConfig = serde_json::from_slice(&config_bytes)
            .map_err(|e| Failure::other(format!("its configuration cannot be read: {e}")))?;
        config.check_platform().map_err(Failure::other)?;
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            let reason = "mismatched image rootfs and manifest layers";
            return Err(Failure::other(reason));
        }
        let downloads: Vec<_> = diff_ids
            .iter()
            .zip(&manifest.layers)
            .map(|(diff_id, descriptor)| self.layer(&client, descriptor, diff_id, store))
            .collect();
        // In order whatever arrives first: a later layer lies over an earlier one.
        let layers: Vec<(String, u64)> = futures::stream::iter(downloads).buffered(DOWNLOADS).try_collect().await?;
        let size_bytes = manifest.layers.iter().map(|l| l.size).sum::<u64>() + manifest.config.size;
        let image = NewImage {
            id: manifest.config.digest,
            references: vec![self.reference.to_string()],
            stored: StoredImage {
                config: config.config.unwrap_or_default(),
                size_bytes: layers.iter().map(|(_, bytes)| bytes).sum(),
                layers: layers.into_iter().map(|(name, _)| name).collect(),
                digests,
                from_registry: true,
            },
        };
        Ok(Fetched { image, size_bytes })
    }

    async fn manifest(
        &self,
        client: &oci_client::Client,
        auth: &RegistryAuth,
        target: &oci_client::Reference,
    ) -> Result<(Vec<u8>, String), Failure> {
        let path = format!("manifests/{}", target.digest().or(target.tag()).unwrap_or("latest"));
        let (bytes, digest) =
            client.pull_manifest_raw(target, auth, MANIFEST_TYPES).await.map_err(|e| self.failure(e, &path))?;
        Ok((bytes.to_vec(), digest))
    }

    /// Follows indexes down to the manifest for this machine; `digests` gets the names of all on the way.
    async fn for_this_machine(
        &self,
        client: &oci_client::Client,
        auth: &RegistryAuth,
        mut bytes: Vec<u8>,
        digests: &mut Vec<String>,
    ) -> Result<OciManifest, Failure> {
        let unreadable = |e: serde_json::Error| Failure::other(format!("its manifest cannot be read: {e}"));
        // An index in an index happens, a deeper nest does not.
        for _ in 0..4 {
            let Ok(index) = serde_json::from_slice::<OciIndex>(&bytes) else {
                return serde_json::from_slice(&bytes).map_err(unreadable);
            };
            let Some(chosen) = index.manifests.iter().find(|m| m.is_for_this_machine()) else {
                let reason = format!("no match for platform linux/{} in manifest: not found", architecture());
                return Err(Failure { code: Some("NotFound"), reason });
            };
            let target = self.target.clone_with_digest(chosen.digest.clone());
            let (next, _) = self.manifest(client, auth, &target).await?;
            digests.push(chosen.digest.clone());
            bytes = next;
        }
        Err(Failure::other("its indexes are nested too deeply"))
    }

    async fn small_blob(&self, client: &oci_client::Client, descriptor: &Descriptor) -> Result<Vec<u8>, Failure> {
        if descriptor.size > MAX_JSON_BYTES {
            return Err(Failure::other(format!("its configuration has {} bytes, which is too many", descriptor.size)));
        }
        let path = format!("blobs/{}", descriptor.digest);
        let mut stream = client
            .pull_blob_stream(&self.target, descriptor.digest.as_str())
            .await
            .map_err(|e| self.failure(e, &path))?;
        let mut bytes = Vec::new();
        while let Some(part) = stream.try_next().await.map_err(|e| self.broken_blob(e, descriptor))? {
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > MAX_JSON_BYTES {
                return Err(Failure::other("its configuration is larger than its manifest says"));
            }
        }
        check_digest(&descriptor.digest, &bytes).map_err(Failure::other)?;
        Ok(bytes)
    }

    /// Fetches and unpacks one layer, unless it is there.
    async fn layer(
        &self,
        client: &oci_client::Client,
        descriptor: &Descriptor,
        diff_id: &str,
        store: &Path,
    ) -> Result<(String, u64), Failure> {
        if let Some(present) = layer::present(store, diff_id) {
            return Ok(present);
        }
        let file = self.download(client, descriptor, store).await?;
        let (store, diff_id, media_type) = (store.to_path_buf(), diff_id.to_string(), descriptor.media_type.clone());
        let digest = descriptor.digest.clone();
        let unpacked = tokio::task::spawn_blocking(move || layer::unpack(&store, &diff_id, move || decompress(file)));
        unpacked.await.map_err(Failure::other)?.map_err(|e| {
            Failure::other(format!("failed to extract layer ({media_type} {digest}): {}", crate::worker::chain(&e)))
        })
    }

    /// A blob in a file without a name, checked against its digest, ready to be read from its beginning.
    async fn download(
        &self,
        client: &oci_client::Client,
        descriptor: &Descriptor,
        store: &Path,
    ) -> Result<std::fs::File, Failure> {
        let path = format!("blobs/{}", descriptor.digest);
        let mut stream = client
            .pull_blob_stream(&self.target, descriptor.digest.as_str())
            .await
            .map_err(|e| self.failure(e, &path))?;
        let unnamed = super::unnamed_file(store).map_err(Failure::other)?;
        let mut file = tokio::fs::File::from_std(unnamed);
        while let Some(part) = stream.try_next().await.map_err(|e| self.broken_blob(e, descriptor))? {
            file.write_all(&part).await.map_err(Failure::other)?;
        }
        file.flush().await.map_err(Failure::other)?;
        let mut file = file.into_std().await;
        file.rewind().map_err(Failure::other)?;
        Ok(file)
    }

    fn broken_blob(&self, error: std::io::Error, descriptor: &Descriptor) -> Failure {
        let text = crate::worker::chain(&error);
        let wrong = error.get_ref().and_then(|inner| inner.downcast_ref::<DigestError>());
        match wrong {
            Some(DigestError::VerificationError { expected, actual }) => Failure {
                code: Some("FailedPrecondition"),
                reason: format!(
                    "failed commit on ref \"layer-{}\": unexpected commit digest {actual}, expected {expected}: failed precondition",
                    descriptor.digest
                ),
            },
            _ => Failure::other(format!("failed to copy: {text}")),
        }
    }

    /// What the registry's answer, or its absence, means.
    fn failure(&self, error: OciDistributionError, path: &str) -> Failure {
        let denied = || {
            Failure::other(
                "pull access denied, repository does not exist or may require authorization: authorization failed",
            )
        };
        let missing = || Failure { code: Some("NotFound"), reason: format!("{}: not found", self.reference) };
        let url = format!(
            "{}://{}/v2/{}/{path}",
            if self.https { "https" } else { "http" },
            self.target.resolve_registry(),
            self.target.repository()
        );
        match error {
            OciDistributionError::RegistryError { ref envelope, .. } => {
                let has = |codes: &[OciErrorCode]| envelope.errors.iter().any(|e| codes.contains(&e.code));
                if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    denied()
                } else if has(&[
                    OciErrorCode::ManifestUnknown,
                    OciErrorCode::NameUnknown,
                    OciErrorCode::BlobUnknown,
                    OciErrorCode::NotFound,
                ]) {
                    missing()
                } else {
                    let texts: Vec<&str> = envelope.errors.iter().map(|e| e.message.as_str()).collect();
                    Failure::other(format!("unexpected answer to GET request to {url}: {}", texts.join(", ")))
                }
            }
            OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => denied(),
            OciDistributionError::ServerError { code: 404, .. } => missing(),
            OciDistributionError::ServerError { code: 401 | 403, .. } => denied(),
            OciDistributionError::ServerError { code, .. } => {
                let reason =
                    http::StatusCode::from_u16(code).ok().and_then(|s| s.canonical_reason()).unwrap_or_default();
                Failure::other(format!("unexpected status from GET request to {url}: {code} {reason}"))
            }
            OciDistributionError::DigestError(DigestError::VerificationError { expected, actual }) => Failure {
                code: Some("FailedPrecondition"),
                reason: format!("unexpected digest {actual}, expected {expected}: failed precondition"),
            },
            OciDistributionError::RequestError(ref e) => {
                let timed_out = e.is_timeout();
                let cause = request_cause(e, self.target.resolve_registry());
                Failure {
                    code: timed_out.then_some("DeadlineExceeded"),
                    reason: format!("failed to do request: Get \"{url}\": {cause}"),
                }
            }
            other => Failure::other(crate::worker::chain(&other)),
        }
    }
}

/// The innermost reason of a request that got no answer, in the words that Go programs use for it.
fn request_cause(error: &(dyn std::error::Error + 'static), host: &str) -> String {
    let mut innermost = error;
    let mut refused = false;
    while let Some(source) = innermost.source() {
        innermost = source;
        refused |=
            source.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
    }
    if refused { format!("dial tcp {host}: connect: connection refused") } else { innermost.to_string() }
}

/// A registry on this machine speaks plain HTTP, as Docker and containerd assume too.
fn on_this_machine(host: &str) -> bool {
    let name = host
        .strip_prefix('[')
        .and_then(|h| h.split_once(']'))
        .map_or_else(|| host.rsplit_once(':').map_or(host, |(name, _)| name), |(name, _)| name);
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_asked_without_tls() {
        for (host, local) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.1:5000", true),
            ("127.9.9.9", true),
            ("[::1]:5000", true),
            ("127.example.org", false),
            ("localhost.example:5000", false),
            ("192.0.2.1:5000", false),
            ("docker.io", false),
        ] {
            assert_eq!(on_this_machine(host), local, "{host}");
        }
    }

    #[test]
    fn without_logins_nobody_is_named() {
        assert_eq!(auths(&[]), [RegistryAuth::Anonymous]);
        let login = Login { username: "u".into(), password: "p".into() };
        assert_eq!(auths(&[login]), [RegistryAuth::Basic("u".into(), "p".into())]);
    }
}
