//! The proxy subresources: HTTP to a Pod, to an endpoint of a Service, or to the kubelet of a Node, through the API server.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION, UPGRADE};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use portolan_api::meta;
use portolan_api::status::Status;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

use crate::catalog::Entry;
use crate::config::BoxedIo;
use crate::html::Rewriter;
use crate::path::Target;
use crate::response::{Body, BoxError, full};
use crate::server::Inner;
use crate::store::Key;
use crate::stream::{dial_error, forward};

/// Where kubelets listen; the only port of a node whose streams come through [`crate::ClusterDialer::kubelet`].
const KUBELET_PORT: &str = "10250";

/// `[scheme:]name[:port]`.
fn split_proxy_name(text: &str) -> Option<(&str, &str, &str)> {
    match text.split(':').collect::<Vec<_>>().as_slice() {
        [name] => Some(("", name, "")),
        [name, port] => Some(("", name, port)),
        [scheme @ ("" | "http" | "https"), name, port] => Some((scheme, name, port)),
        _ => None,
    }
}

/// The end of what names the proxy in a path: `/api/v1/namespaces/NS/pods/NAME/proxy` or `/api/v1/nodes/NAME/proxy`.
fn base(path: &str, namespaced: bool) -> &str {
    let segments = if namespaced { 7 } else { 5 };
    path.match_indices('/').nth(segments).map_or(path, |(at, _)| &path[..at])
}

/// Carries out a request to a proxy subresource.
pub async fn run(
    inner: &Arc<Inner>,
    entry: &Entry,
    target: &Target,
    mut request: Request<Body>,
) -> Result<Response<Body>, Status> {
    let namespace = target.namespace.as_deref().unwrap_or_default();
    let full_name = target.name.as_deref().unwrap_or_default();
    let (scheme, name, port) = split_proxy_name(full_name).ok_or_else(|| {
        Status::bad_request(format!(
            "invalid {} request {}",
            entry.kind.singular,
            portolan_api::status::quoted(full_name)
        ))
    })?;
    let address = match entry.kind.kind.as_str() {
        "Pod" => Some(pod_address(inner, entry, namespace, name, port)?),
        "Service" => Some(service_address(inner, entry, namespace, name, port)?),
        _ => node_address(inner, entry, name, port)?,
    };
    let base = base(request.uri().path(), entry.kind.namespaced).to_owned();
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let path = request.uri().path()[base.len()..].to_owned();
    let upgrading = request.headers().contains_key(UPGRADE);
    if path.is_empty() && !upgrading {
        // So that relative links in the answer stay below the proxy.
        let mut moved = Response::new(full(""));
        *moved.status_mut() = StatusCode::MOVED_PERMANENTLY;
        let to = HeaderValue::from_str(&format!("{base}/{query}"))
            .map_err(|error| Status::bad_request(format!("the path cannot be sent back: {error}")))?;
        moved.headers_mut().insert(LOCATION, to);
        return Ok(moved);
    }
    let path = if path.is_empty() { format!("/{query}") } else { format!("{path}{query}") };
    let (io, host) = match address {
        None => (inner.dialer.kubelet(name).await.map_err(|error| dial_error(&error))?, name.to_owned()),
        Some(address) => {
            let unreachable = |error: std::io::Error| {
                Status::service_unavailable(format!("error trying to reach service: dial tcp {address}: {error}"))
            };
            let io = inner.dialer.tcp(address).await.map_err(unreachable)?;
            let io = if scheme == "https" { encrypted(io, address.ip()).await.map_err(unreachable)? } else { io };
            (io, address.to_string())
        }
    };
    if !upgrading {
        // Links can be rewritten only in text that is not compressed.
        request.headers_mut().remove(ACCEPT_ENCODING);
    }
    let response = forward(io, &path, &host, request).await?;
    Ok(below(response, base, &host))
}

/// Makes redirects and links of an answer stay below the proxy.
fn below(mut response: Response<Body>, base: String, host: &str) -> Response<Body> {
    let redirect = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    if let Some(location) = redirect
        && let Some(within) = crate::html::rewritten(&location, &base, host)
        && let Ok(value) = HeaderValue::from_str(&within)
    {
        response.headers_mut().insert(LOCATION, value);
    }
    let text = |name| response.headers().get(name).and_then(|v: &HeaderValue| v.to_str().ok()).unwrap_or_default();
    let html = text(CONTENT_TYPE).split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html"));
    if !html
        || !matches!(text(CONTENT_ENCODING), "" | "identity")
        || response.status() == StatusCode::SWITCHING_PROTOCOLS
    {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(CONTENT_LENGTH);
    let state = (body, Some(Rewriter::new(base, host.to_owned())));
    let pieces = futures::stream::unfold(state, |(mut body, mut rewriter)| async move {
        loop {
            let links = rewriter.as_mut()?;
            let piece: Result<Frame<Bytes>, BoxError> = match body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let text = links.push(&data);
                        if text.is_empty() {
                            continue;
                        }
                        Ok(Frame::data(Bytes::from(text)))
                    }
                    Err(trailers) => Ok(trailers),
                },
                Some(Err(error)) => {
                    rewriter = None;
                    Err(error)
                }
                None => {
                    let rest = links.finish();
                    rewriter = None;
                    Ok(Frame::data(Bytes::from(rest)))
                }
            };
            return Some((piece, (body, rewriter)));
        }
    });
    Response::from_parts(parts, StreamBody::new(pieces).boxed_unsync())
}

/// TLS to a backend. Nobody vouches for certificates of Pods, so any will do, as with the API server of Kubernetes.
async fn encrypted(io: BoxedIo, ip: IpAddr) -> std::io::Result<BoxedIo> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(ServerName::IpAddress(ip.into()), io).await?;
    Ok(Box::new(tls))
}

#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `None` for the kubelet itself, else an address of the node.
fn node_address(inner: &Inner, entry: &Entry, name: &str, port: &str) -> Result<Option<SocketAddr>, Status> {
    let snapshot = inner.store.snapshot();
    let node = snapshot.get("nodes", &Key::new("", name)).ok_or_else(|| Status::not_found(&entry.kind, name))?;
    if matches!(port, "" | KUBELET_PORT) {
        return Ok(None);
    }
    let port = port
        .parse()
        .map_err(|_| Status::bad_request(format!("invalid port {}", portolan_api::status::quoted(port))))?;
    meta::list(&node.value, &["status", "addresses"])
        .iter()
        .filter(|address| meta::text(address, &["type"]) == "InternalIP")
        .find_map(|address| meta::text(address, &["address"]).parse().ok())
        .map(|ip| Some(SocketAddr::new(ip, port)))
        .ok_or_else(|| Status::service_unavailable(format!("no address of node \"{name}\" is known")))
}

fn pod_address(inner: &Inner, entry: &Entry, namespace: &str, name: &str, port: &str) -> Result<SocketAddr, Status> {
    let snapshot = inner.store.snapshot();
    let pod = snapshot.get("pods", &Key::new(namespace, name)).ok_or_else(|| Status::not_found(&entry.kind, name))?;
    let ip: IpAddr =
        meta::text(&pod.value, &["status", "podIP"]).parse().map_err(|_| Status::bad_request("address not allowed"))?;
    let port = if port.is_empty() {
        // The first declared port, as upstream takes it; 80 if none is declared.
        meta::list(&pod.value, &["spec", "containers"])
            .iter()
            .flat_map(|container| meta::list(container, &["ports"]))
            .find_map(|port| port["containerPort"].as_u64())
            .and_then(|port| u16::try_from(port).ok())
            .unwrap_or(80)
    } else {
        port.parse().map_err(|_| Status::bad_request(format!("invalid port {}", portolan_api::status::quoted(port))))?
    };
    Ok(SocketAddr::new(ip, port))
}

/// A ready endpoint of a Service's port, any of them.
fn service_address(
    inner: &Inner,
    entry: &Entry,
    namespace: &str,
    name: &str,
    port: &str,
) -> Result<SocketAddr, Status> {
    let snapshot = inner.store.snapshot();
    let service =
        snapshot.get("services", &Key::new(namespace, name)).ok_or_else(|| Status::not_found(&entry.kind, name))?;
    let none = || Status::service_unavailable(format!("no endpoints available for service \"{name}\""));
    let ports = meta::list(&service.value, &["spec", "ports"]);
    let port_name = match port {
        "" if ports.len() == 1 => meta::text(&ports[0], &["name"]).to_owned(),
        "" => String::new(),
        wanted => ports
            .iter()
            .find(|port| {
                let number = wanted.parse::<u64>().ok();
                meta::text(port, &["name"]) == wanted || (number.is_some() && port["port"].as_u64() == number)
            })
            .map(|port| meta::text(port, &["name"]).to_owned())
            .ok_or_else(|| {
                Status::service_unavailable(format!(
                    "no service port {} found for service \"{name}\"",
                    portolan_api::status::quoted(wanted)
                ))
            })?,
    };
    let candidates: Vec<SocketAddr> = snapshot
        .list("endpointslices.discovery.k8s.io", Some(namespace))
        .map(|slice| &slice.value)
        .filter(|slice| meta::label(slice, "kubernetes.io/service-name") == Some(name))
        .flat_map(|slice| {
            let port = meta::list(slice, &["ports"])
                .iter()
                .find(|port| meta::text(port, &["name"]) == port_name)
                .and_then(|port| u16::try_from(port["port"].as_u64()?).ok());
            meta::list(slice, &["endpoints"])
                .iter()
                .filter(|endpoint| endpoint["conditions"]["ready"].as_bool().unwrap_or(true))
                .filter_map(move |endpoint| {
                    let ip: IpAddr = meta::list(endpoint, &["addresses"]).first()?.as_str()?.parse().ok()?;
                    Some(SocketAddr::new(ip, port?))
                })
        })
        .collect();
    let count = u64::try_from(candidates.len()).unwrap_or(0);
    if count == 0 {
        return Err(none());
    }
    let picked = usize::try_from(crate::services::pick(count)).unwrap_or(0);
    candidates.get(picked).copied().ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_is_found_by_its_place() {
        for (path, namespaced, expected) in [
            ("/api/v1/namespaces/a/pods/p/proxy/x/y", true, "/api/v1/namespaces/a/pods/p/proxy"),
            ("/api/v1/namespaces/proxy-1/pods/proxy/proxy/proxy", true, "/api/v1/namespaces/proxy-1/pods/proxy/proxy"),
            ("/api/v1/namespaces/a/pods/p/proxy", true, "/api/v1/namespaces/a/pods/p/proxy"),
            ("/api/v1/nodes/proxy/proxy/logs/", false, "/api/v1/nodes/proxy/proxy"),
        ] {
            assert_eq!(base(path, namespaced), expected);
        }
    }

    #[test]
    fn proxy_names_have_scheme_and_port() {
        assert_eq!(split_proxy_name("web"), Some(("", "web", "")));
        assert_eq!(split_proxy_name("web:80"), Some(("", "web", "80")));
        assert_eq!(split_proxy_name("http:web:80"), Some(("http", "web", "80")));
        assert_eq!(split_proxy_name("ftp:web:80"), None);
    }
}
