//! Certificates: read from Secrets, chosen by server name, replaced without touching a connection.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use k8s_openapi::ByteString;
use portolan_plan::route::{Certificate, host};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::snapshot::Snapshot;

/// Reads the certificate of a Secret: what routing needs to know of it, and the key to sign with.
///
/// # Errors
/// Why the Secret cannot be used, in words for an event. They contain nothing of its content.
pub fn read(data: &BTreeMap<String, ByteString>) -> Result<(Certificate, Arc<CertifiedKey>), String> {
    let entry =
        |name: &str| data.get(name).filter(|d| !d.0.is_empty()).ok_or_else(|| format!("it has no key {name:?}"));
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&entry("tls.crt")?.0)
        .collect::<Result<_, _>>()
        .map_err(|_| "tls.crt is not PEM".to_string())?;
    let leaf = chain.first().ok_or("tls.crt holds no certificate")?.clone();
    let key = PrivateKeyDer::from_pem_slice(&entry("tls.key")?.0)
        .map_err(|_| "tls.key holds no private key in PEM".to_string())?;
    let certified =
        CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => "tls.key does not belong to tls.crt".to_string(),
            _ => "tls.crt or tls.key has a form that cannot be used".to_string(),
        })?;
    Ok((describe(&leaf)?, Arc::new(certified)))
}

fn describe(leaf: &CertificateDer) -> Result<Certificate, String> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| "tls.crt is not an X.509 certificate".to_string())?;
    let mut dns_names = Vec::new();
    if let Ok(Some(names)) = parsed.subject_alternative_name() {
        for name in &names.value.general_names {
            if let GeneralName::DNSName(name) = name {
                dns_names.push(name.to_string());
            }
        }
    }
    let common_name = parsed.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok()).map(str::to_string);
    Ok(Certificate { dns_names, common_name, not_after: parsed.validity().not_after.timestamp() })
}

/// The certificate for names that have none: self-signed, made anew at every start. Its name is the one that tools look for.
///
/// # Errors
/// Those of the cryptographic library.
pub fn fake() -> Result<Arc<CertifiedKey>, Box<dyn std::error::Error + Send + Sync>> {
    let mut parameters = rcgen::CertificateParams::new(vec!["ingress.local".to_string()])?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "Kubernetes Ingress Controller Fake Certificate");
    let key = rcgen::KeyPair::generate()?;
    let certificate = parameters.self_signed(&key)?;
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Arc::new(CertifiedKey::from_der(vec![certificate.der().clone()], der, &aws_lc_rs::default_provider())?))
}

/// Chooses by server name among the certificates of the current snapshot.
struct Resolver {
    snapshot: Arc<ArcSwap<Snapshot>>,
    default: Arc<CertifiedKey>,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let snapshot = self.snapshot.load();
        let name = hello.server_name().and_then(host::normalize);
        let secret = snapshot
            .table
            .host_by_server_name(name.as_deref())
            .and_then(|h| h.tls.as_ref())
            .and_then(|t| t.secret.as_ref());
        Some(secret.and_then(|key| snapshot.certificates.get(key)).unwrap_or(&self.default).clone())
    }
}

/// The server side of TLS: 1.2 and 1.3, HTTP/2 preferred, tickets whose keys change by themselves.
///
/// # Errors
/// Those of the cryptographic library.
pub fn server_config(
    snapshot: Arc<ArcSwap<Snapshot>>,
    default: Arc<CertifiedKey>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Resolver { snapshot, default }));
    config.alpn_protocols = [&b"h2"[..], b"http/1.1", b"http/1.0"].map(<[u8]>::to_vec).to_vec();
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(names: &[&str]) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("key");
        let parameters =
            rcgen::CertificateParams::new(names.iter().map(|n| n.to_string()).collect::<Vec<_>>()).expect("names");
        (parameters.self_signed(&key).expect("certificate").pem(), key.serialize_pem())
    }

    fn data(entries: &[(&str, &str)]) -> BTreeMap<String, ByteString> {
        entries.iter().map(|(k, v)| (k.to_string(), ByteString(v.as_bytes().to_vec()))).collect()
    }

    #[test]
    fn secrets_are_read_or_refused_with_a_reason() {
        let (certificate, key) = pair(&["a.example", "*.b.example"]);
        let (_, other) = pair(&["a.example"]);
        let (read_certificate, _) =
            read(&data(&[("tls.crt", &certificate), ("tls.key", &key)])).expect("a good Secret");
        assert_eq!(read_certificate.dns_names, ["a.example", "*.b.example"]);
        assert!(read_certificate.not_after > 0);
        let table = [
            (data(&[]), "it has no key \"tls.crt\""),
            (data(&[("tls.crt", &certificate)]), "it has no key \"tls.key\""),
            (data(&[("tls.crt", &certificate), ("tls.key", "")]), "it has no key \"tls.key\""),
            (data(&[("tls.crt", "garbage"), ("tls.key", &key)]), "tls.crt holds no certificate"),
            (data(&[("tls.crt", &certificate), ("tls.key", "garbage")]), "tls.key holds no private key in PEM"),
            (data(&[("tls.crt", &certificate), ("tls.key", &other)]), "tls.key does not belong to tls.crt"),
        ];
        for (data, expected) in table {
            assert_eq!(read(&data).map(|_| ()).expect_err("refused"), expected);
        }
    }
}
