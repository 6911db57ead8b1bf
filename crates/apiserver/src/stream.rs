//! Subresources that are streams: log, exec, attach and port-forward.
//!
//! The server decides what is asked for and whether it can be had; the bytes go to and from the kubelet (or what is proxied)
//! unchanged, through [`crate::ClusterDialer`]. Upgraded connections are copied both ways.

use std::sync::Arc;

use http::header::{AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use portolan_api::meta;
use portolan_api::status::Status;
use serde_json::Value;

use crate::catalog::Entry;
use crate::config::BoxedIo;
use crate::path::{Query, Target, encode};
use crate::response::{Body, BoxError, full};
use crate::server::Inner;
use crate::store::Key;

/// Carries out a streaming request. The request still has its body, and its connection can be upgraded.
pub async fn run(
    inner: Arc<Inner>,
    entry: Arc<Entry>,
    target: Target,
    subresource: &str,
    query: Query,
    request: Request<Body>,
) -> Result<Response<Body>, Status> {
    let namespace = target.namespace.as_deref().unwrap_or_default();
    let name = target.name.as_deref().unwrap_or_default();
    if subresource == "proxy" {
        return crate::proxy::run(&inner, &entry, &target, request).await;
    }
    let snapshot = inner.store.snapshot();
    let pod = snapshot
        .get("pods", &Key::new(namespace, name))
        .cloned()
        .ok_or_else(|| Status::not_found(&entry.kind, name))?;
    let pod = &pod.value;
    let container = if subresource == "portforward" { String::new() } else { container(pod, &query, subresource)? };
    let node = meta::text(pod, &["spec", "nodeName"]);
    if node.is_empty() {
        if subresource == "log" {
            // A Pod that has never run has no log.
            return Ok(Response::new(full("")));
        }
        return Err(Status::bad_request(format!("pod {name} does not have a host assigned")));
    }
    let path = kubelet_path(subresource, namespace, name, &container, &query)?;
    let io = inner.dialer.kubelet(node).await.map_err(|error| dial_error(&error))?;
    let response = forward(io, &path, node, request).await?;
    if subresource == "log" && response.status().as_u16() >= 400 {
        return Err(kubelet_error(response).await);
    }
    Ok(response)
}

pub fn dial_error(error: &std::io::Error) -> Status {
    Status::internal(format!("error dialing backend: {error}"))
}

/// What the kubelet says as a Status, which is what clients of logs can read.
async fn kubelet_error(response: Response<Body>) -> Status {
    let code = response.status().as_u16();
    let text = match response.into_body().collect().await {
        Ok(collected) => String::from_utf8_lossy(&collected.to_bytes()).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    // The kubelet answers with a Status of its own, whose message is what to pass on.
    let text = match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(status) if status["kind"] == "Status" => status["message"].as_str().map(str::to_owned).unwrap_or(text),
        _ => text,
    };
    match code {
        400 => Status::bad_request(text),
        404 => Status::new(404, "NotFound", text),
        _ => Status::internal(text),
    }
}

/// The container a request means (registry/core/pod/strategy.go).
fn container(pod: &Value, query: &Query, subresource: &str) -> Result<String, Status> {
    let name = meta::name(pod);
    let names = |list: &str| -> Vec<&str> {
        meta::list(pod, &["spec", list]).iter().map(|container| meta::text(container, &["name"])).collect()
    };
    let (containers, init, ephemeral) = (names("containers"), names("initContainers"), names("ephemeralContainers"));
    let wanted = query.get("container");
    if wanted.is_empty() {
        if let [only] = containers.as_slice()
            && init.is_empty()
            && ephemeral.is_empty()
        {
            return Ok((*only).to_owned());
        }
        if let Some(default) = meta::annotation(pod, "kubectl.kubernetes.io/default-container")
            && containers.contains(&default)
        {
            return Ok(default.to_owned());
        }
        if subresource != "log"
            && let Some(first) = containers.first()
        {
            return Ok((*first).to_owned());
        }
        let mut text =
            format!("a container name must be specified for pod {name}, choose one of: [{}]", containers.join(" "));
        for (label, list) in [("init containers", &init), ("ephemeral containers", &ephemeral)] {
            if !list.is_empty() {
                text.push_str(&format!(" or one of the {label}: [{}]", list.join(" ")));
            }
        }
        return Err(Status::bad_request(text));
    }
    if containers.iter().chain(&init).chain(&ephemeral).any(|container| *container == wanted) {
        Ok(wanted.to_owned())
    } else {
        Err(Status::bad_request(format!("container {wanted} is not valid for pod {name}")))
    }
}

/// The request in the words of the kubelet's API.
fn kubelet_path(
    subresource: &str,
    namespace: &str,
    pod: &str,
    container: &str,
    query: &Query,
) -> Result<String, Status> {
    let (namespace, pod, container) = (encode(namespace), encode(pod), encode(container));
    let mut pairs: Vec<(&str, String)> = Vec::new();
    let path = match subresource {
        "log" => {
            for key in ["follow", "previous", "timestamps"] {
                if query.flag(key) {
                    pairs.push((key, "true".to_owned()));
                }
            }
            for key in ["sinceSeconds", "tailLines", "limitBytes"] {
                let text = query.get(key);
                if text.is_empty() {
                    continue;
                }
                let number: i64 = text.parse().map_err(|_| {
                    let text = portolan_api::status::quoted(text);
                    Status::bad_request(format!("strconv.ParseInt: parsing {text}: invalid syntax"))
                })?;
                let lowest = i64::from(key != "tailLines");
                if number < lowest {
                    let fault = portolan_api::status::FieldError::invalid(
                        key,
                        number,
                        if lowest == 0 { "must be greater than or equal to 0" } else { "must be greater than 0" },
                    );
                    return Err(Status::invalid_kind("", "PodLogOptions", "", &[fault]));
                }
                pairs.push((key, number.to_string()));
            }
            for key in ["sinceTime", "stream"] {
                if query.has(key) {
                    pairs.push((key, query.get(key).to_owned()));
                }
            }
            format!("/containerLogs/{namespace}/{pod}/{container}")
        }
        "exec" | "attach" => {
            let given = ["stdin", "stdout", "stderr"].iter().any(|key| query.flag(key));
            if !given {
                return Err(Status::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
            }
            for (ours, theirs) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
                if query.flag(ours) {
                    pairs.push((theirs, "1".to_owned()));
                }
            }
            if subresource == "exec" {
                pairs.extend(query.all("command").map(|word| ("command", word.to_owned())));
            }
            format!("/{subresource}/{namespace}/{pod}/{container}")
        }
        _ => {
            for ports in query.all("ports") {
                pairs.extend(ports.split(',').filter(|port| !port.is_empty()).map(|port| ("port", port.to_owned())));
            }
            format!("/portForward/{namespace}/{pod}")
        }
    };
    let query: Vec<String> = pairs.into_iter().map(|(key, value)| format!("{key}={}", encode(&value))).collect();
    Ok(if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) })
}

/// Headers that concern one connection only (RFC 9110 section 7.6.1), without those of an upgrade.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn clean(headers: &HeaderMap, upgrading: bool) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        let hop = HOP_BY_HOP.contains(&name.as_str());
        let impersonation = name.as_str().starts_with("impersonate-");
        if hop || impersonation || *name == AUTHORIZATION || *name == HOST {
            continue;
        }
        kept.append(name.clone(), value.clone());
    }
    if upgrading {
        kept.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        if let Some(value) = headers.get(UPGRADE) {
            kept.insert(UPGRADE, value.clone());
        }
    }
    kept
}

/// Sends a request over a fresh stream and returns the answer; after a 101 the two connections are joined.
pub async fn forward(
    io: BoxedIo,
    path_and_query: &str,
    host: &str,
    mut request: Request<Body>,
) -> Result<Response<Body>, Status> {
    let bad_gateway = |error: &dyn std::fmt::Display| Status::internal(format!("error dialing backend: {error}"));
    let upgrading = request.headers().contains_key(UPGRADE);
    let downstream = upgrading.then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let uri: Uri =
        path_and_query.parse().map_err(|error| Status::bad_request(format!("the path cannot be sent on: {error}")))?;
    let mut onward = Request::new(body);
    *onward.method_mut() = parts.method;
    *onward.uri_mut() = uri;
    *onward.headers_mut() = clean(&parts.headers, upgrading);
    if let Ok(host) = HeaderValue::from_str(host) {
        onward.headers_mut().insert(HOST, host);
    }
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|error| bad_gateway(&error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "the connection to a backend ended");
        }
    });
    let mut response = sender.send_request(onward).await.map_err(|error| bad_gateway(&error))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let upstream = hyper::upgrade::on(&mut response);
        if let Some(downstream) = downstream {
            tokio::spawn(join(downstream, upstream));
        }
        let mut answer = Response::new(full(""));
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *answer.headers_mut() = response.headers().clone();
        return Ok(answer);
    }
    let (mut parts, body) = response.into_parts();
    for name in HOP_BY_HOP {
        parts.headers.remove(HeaderName::from_static(name));
    }
    Ok(Response::from_parts(parts, body.map_err(|error| Box::new(error) as BoxError).boxed_unsync()))
}

/// Copies both ways until one side ends.
async fn join(downstream: hyper::upgrade::OnUpgrade, upstream: hyper::upgrade::OnUpgrade) {
    let (downstream, upstream) = match tokio::try_join!(downstream, upstream) {
        Ok(both) => both,
        Err(error) => return tracing::debug!(%error, "an upgrade failed"),
    };
    let (mut downstream, mut upstream) = (TokioIo::new(downstream), TokioIo::new(upstream));
    if let Err(error) = tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await {
        tracing::debug!(%error, "a stream ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_are_said_in_the_kubelets_words() {
        let rows = [
            ("log", "follow=true&tailLines=5", "/containerLogs/a/p/c?follow=true&tailLines=5"),
            ("log", "follow=false", "/containerLogs/a/p/c"),
            (
                "exec",
                "command=sh&command=-c&stdin=true&stdout=1&tty=false",
                "/exec/a/p/c?input=1&output=1&command=sh&command=-c",
            ),
            ("attach", "stdout=true&stderr=true", "/attach/a/p/c?output=1&error=1"),
            ("portforward", "ports=80,81&ports=82", "/portForward/a/p?port=80&port=81&port=82"),
            ("portforward", "", "/portForward/a/p"),
        ];
        for (subresource, query, want) in rows {
            let got = kubelet_path(subresource, "a", "p", "c", &Query::parse(query)).expect("valid");
            assert_eq!(got, want, "{subresource} {query}");
        }
        for (subresource, query) in [("exec", "command=x"), ("log", "tailLines=x"), ("log", "sinceSeconds=0")] {
            assert!(kubelet_path(subresource, "a", "p", "c", &Query::parse(query)).is_err(), "{subresource} {query}");
        }
    }

    #[test]
    fn the_container_is_found_or_asked_for() {
        let one = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}});
        let two = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}],
            "initContainers": [{"name": "i"}]}});
        let find =
            |pod: &Value, query: &str, sub: &str| container(pod, &Query::parse(query), sub).map_err(|e| e.message);
        assert_eq!(find(&one, "", "log").as_deref(), Ok("c"));
        assert_eq!(find(&two, "container=i", "log").as_deref(), Ok("i"));
        assert_eq!(find(&two, "", "exec").as_deref(), Ok("a"));
        assert_eq!(
            find(&two, "", "log").expect_err("ambiguous"),
            "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]"
        );
        assert_eq!(find(&two, "container=x", "log").expect_err("unknown"), "container x is not valid for pod p");
    }
}
