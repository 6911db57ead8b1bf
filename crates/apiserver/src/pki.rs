//! The cluster's certificate authority and what it signs.
//!
//! The authority's key and the key of ServiceAccount tokens live in the data directory and outlast restarts. Serving and
//! client certificates are made fresh at every start, so that a new address or an expiry needs no rotation.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::config::Error;

/// How long the authority is valid.
const CA_DAYS: i64 = 3650;

/// How long the certificates it signs are valid; a server restarts more often than that.
const LEAF_DAYS: i64 = 365;

/// Clocks of clients may be behind by this much.
const SKEW_HOURS: i64 = 1;

/// A certificate with its key, in PEM.
#[derive(Clone)]
pub struct Identity {
    /// Certificate.
    pub certificate_pem: String,
    /// PKCS #8 key.
    pub key_pem: String,
}

/// The certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    der: CertificateDer<'static>,
}

fn failed(error: rcgen::Error) -> Error {
    Error::Certificates(error.to_string())
}

/// Reads a file, or makes it with `0600` from `create`.
fn load_or_create(
    directory: Option<&Path>,
    name: &str,
    create: impl FnOnce() -> Result<String, Error>,
) -> Result<String, Error> {
    let Some(directory) = directory else { return create() };
    let path = directory.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => return Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::File { path, source }),
    }
    let text = create()?;
    // Written beside and renamed, so that a crash leaves either no file or a whole one.
    let beside = directory.join(format!("{name}.new"));
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, &path)
    };
    write().map_err(|source| Error::File { path: path.clone(), source })?;
    Ok(text)
}

fn new_key_pem() -> Result<String, Error> {
    Ok(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?.serialize_pem())
}

/// The key that signs ServiceAccount tokens, as PKCS #8 DER.
pub fn token_key(directory: Option<&Path>) -> Result<Vec<u8>, Error> {
    let pem = load_or_create(directory, "sa.key", new_key_pem)?;
    Ok(KeyPair::from_pem(&pem).map_err(failed)?.serialize_der())
}

fn validity(params: &mut CertificateParams, days: i64) {
    let now = jiff::Timestamp::now().as_second();
    let date = |seconds: i64| {
        let day = jiff::Timestamp::from_second(seconds)
            .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
            .to_zoned(jiff::tz::TimeZone::UTC)
            .date();
        rcgen::date_time_ymd(i32::from(day.year()), day.month().unsigned_abs(), day.day().unsigned_abs())
    };
    // Dates are whole days: yesterday covers the skew.
    params.not_before = date(now - SKEW_HOURS * 3600 - 86_400);
    params.not_after = date(now + days * 86_400);
}

impl Authority {
    /// Reads the authority from `ca.crt` and `ca.key`, or makes both.
    pub fn load(directory: Option<&Path>) -> Result<Authority, Error> {
        let key_pem = load_or_create(directory, "ca.key", new_key_pem)?;
        let pem = load_or_create(directory, "ca.crt", || {
            let key = KeyPair::from_pem(&key_pem).map_err(failed)?;
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, "portolan-ca");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages =
                vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
            validity(&mut params, CA_DAYS);
            Ok(params.self_signed(&key).map_err(failed)?.pem())
        })?;
        let key = KeyPair::from_pem(&key_pem).map_err(failed)?;
        let der = certificate_der(&pem)?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(failed)?;
        Ok(Authority { issuer, pem, der })
    }

    /// The authority's certificate in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A client certificate for a user in a group.
    pub fn client(&self, user: &str, group: &str) -> Result<Identity, Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Result<Identity, Error> {
        validity(&mut params, LEAF_DAYS);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Identity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// The TLS settings of the server: a certificate for all `names` (DNS names or addresses), client certificates of
    /// this authority accepted but not demanded, HTTP/2 offered first.
    pub fn server_config(&self, names: &[String]) -> Result<rustls::ServerConfig, Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        for name in names {
            let san = match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(failed)?),
            };
            if !params.subject_alt_names.contains(&san) {
                params.subject_alt_names.push(san);
            }
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let identity = self.sign(params)?;
        let key = KeyPair::from_pem(&identity.key_pem).map_err(failed)?.serialize_der();
        let tls = |error: rustls::Error| Error::Certificates(error.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.der.clone()).map_err(tls)?;
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|error| Error::Certificates(error.to_string()))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![certificate_der(&identity.certificate_pem)?],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)),
            )
            .map_err(tls)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn certificate_der(pem: &str) -> Result<CertificateDer<'static>, Error> {
    use rustls::pki_types::pem::PemObject as _;
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| Error::Certificates(error.to_string()))
}

/// User and groups that a client certificate names: common name and organizations.
pub fn subject(certificate: &[u8]) -> Option<(String, Vec<String>)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let subject = certificate.subject();
    let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|group| group.as_str().ok().map(str::to_owned)).collect();
    Some((user, groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_certificates_carry_user_and_groups() {
        let authority = Authority::load(None).expect("authority");
        let identity = authority.client("jane", "dev").expect("certificate");
        let der = certificate_der(&identity.certificate_pem).expect("pem");
        assert_eq!(subject(&der), Some(("jane".to_owned(), vec!["dev".to_owned()])));
    }

    #[test]
    fn the_authority_outlasts_a_restart_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = std::env::temp_dir().join(format!("portolan-pki-{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(&directory).expect("directory");
        let first = Authority::load(Some(&directory)).expect("made");
        let second = Authority::load(Some(&directory)).expect("read");
        assert_eq!(first.pem(), second.pem());
        assert_eq!(token_key(Some(&directory)).expect("made"), token_key(Some(&directory)).expect("read"));
        let mode = fs::metadata(directory.join("ca.key")).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        first.server_config(&["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]).expect("tls");
        fs::remove_dir_all(&directory).expect("cleaned up");
    }
}
