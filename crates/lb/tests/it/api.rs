//! An API server in memory: lists, watches, merge patches with optimistic locking, and events that are only recorded.
//! Like the real one it keeps an object with finalizers until they are gone.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use http_body_util::StreamBody;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::broadcast;

type Objects = BTreeMap<(String, String), Value>;

/// Clones share one state.
#[derive(Clone)]
pub struct Api {
    objects: Arc<Mutex<(u64, Objects)>>,
    events: broadcast::Sender<(u64, String, Value)>,
    /// Name of the object, and reason with message.
    recorded: Arc<Mutex<Vec<(String, String)>>>,
}

/// JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: &Value) {
    match patch {
        Value::Object(fields) => {
            if !target.is_object() {
                *target = json!({});
            }
            for (name, value) in fields {
                if value.is_null() {
                    target.as_object_mut().unwrap().remove(name);
                } else {
                    merge(&mut target[name], value);
                }
            }
        }
        other => *target = other.clone(),
    }
}

/// The plural of a kind as it stands at the end of a path.
fn plural(kind: &str) -> String {
    match kind {
        "Ingress" => "ingresses".into(),
        other => format!("{}s", other.to_ascii_lowercase()),
    }
}

fn key(object: &Value) -> (String, String) {
    let meta = &object["metadata"];
    let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
    (plural(object["kind"].as_str().unwrap()), format!("{}/{}", text(&meta["namespace"]), text(&meta["name"])))
}

impl Api {
    pub fn new() -> Api {
        Api {
            objects: Arc::new(Mutex::new((1, Objects::new()))),
            events: broadcast::channel(1024).0,
            recorded: Arc::default(),
        }
    }

    /// Creates or replaces an object.
    pub fn apply(&self, mut object: Value) {
        let mut state = self.objects.lock().unwrap();
        state.0 += 1;
        object["metadata"]["resourceVersion"] = json!(state.0.to_string());
        let key = key(&object);
        let known = state.1.insert(key.clone(), object.clone()).is_some();
        let event = json!({"type": if known { "MODIFIED" } else { "ADDED" }, "object": object});
        let _ = self.events.send((state.0, key.0, event));
    }

    /// The object as stored.
    pub fn get(&self, kind: &str, name: &str) -> Option<Value> {
        self.objects.lock().unwrap().1.get(&(plural(kind), name.to_string())).cloned()
    }

    /// Reason and message of the events about an object, oldest first, each once.
    pub fn events_of(&self, name: &str) -> Vec<String> {
        self.recorded.lock().unwrap().iter().filter(|(n, _)| n == name).map(|(_, text)| text.clone()).collect()
    }

    /// Changes an object as a user would: reads it, edits it, writes it.
    pub fn edit(&self, kind: &str, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut object = self.get(kind, name).unwrap();
        edit(&mut object);
        self.apply(object);
    }

    /// Deletes an object; with finalizers it stays, marked.
    pub fn delete(&self, kind: &str, name: &str) {
        let Some(mut object) = self.get(kind, name) else { return };
        if object["metadata"]["finalizers"].as_array().is_some_and(|f| !f.is_empty()) {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            self.apply(object);
        } else {
            self.remove(kind, name);
        }
    }

    fn remove(&self, kind: &str, name: &str) {
        let mut state = self.objects.lock().unwrap();
        state.0 += 1;
        if let Some(mut object) = state.1.remove(&(plural(kind), name.to_string())) {
            object["metadata"]["resourceVersion"] = json!(state.0.to_string());
            let _ = self.events.send((state.0, plural(kind), json!({"type": "DELETED", "object": object})));
        }
    }

    fn patch(&self, path: &str, patch: &Value) -> (u16, Value) {
        let words: Vec<&str> = path.trim_matches('/').split('/').collect();
        // /api/v1/namespaces/NS/services/NAME[/status]
        let (namespace, name, of_status) = (words[3], words[5], words.get(6) == Some(&"status"));
        let full = format!("{namespace}/{name}");
        let Some(mut object) = self.get("Service", &full) else {
            return (
                404,
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}),
            );
        };
        let version = &patch["metadata"]["resourceVersion"];
        if version.is_string() && *version != object["metadata"]["resourceVersion"] {
            return (
                409,
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Conflict", "code": 409}),
            );
        }
        let before = object.clone();
        merge(&mut object, patch);
        if of_status {
            object["spec"] = before["spec"].clone();
        } else {
            object["status"] = before["status"].clone();
        }
        let empty = object["metadata"]["finalizers"].as_array().is_none_or(|f| f.is_empty());
        if empty && object["metadata"]["deletionTimestamp"].is_string() {
            self.remove("Service", &full);
        } else {
            self.apply(object.clone());
        }
        (200, object)
    }

    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        kube::Client::new(
            tower::service_fn(move |request: http::Request<kube::client::Body>| {
                let api = api.clone();
                async move { Ok::<_, Infallible>(api.serve(request).await) }
            }),
            "default",
        )
    }

    async fn serve(
        &self,
        request: http::Request<kube::client::Body>,
    ) -> http::Response<UnsyncBoxBody<Bytes, Infallible>> {
        if request.method() == http::Method::GET {
            return self.answer(&request);
        }
        let (parts, body) = request.into_parts();
        let body: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
        let (status, answer) = match parts.method {
            http::Method::POST if parts.uri.path().ends_with("/events") => {
                let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
                let of = &body["involvedObject"];
                let line = format!("{} {}: {}", text(&body["type"]), text(&body["reason"]), text(&body["message"]));
                self.recorded.lock().unwrap().push((format!("{}/{}", text(&of["namespace"]), text(&of["name"])), line));
                (201, body)
            }
            http::Method::PATCH if parts.uri.path().contains("/events/") => (200, body),
            http::Method::PATCH => self.patch(parts.uri.path(), &body),
            other => panic!("{other} {}", parts.uri),
        };
        let body = futures::stream::iter([Ok(Frame::data(Bytes::from(answer.to_string())))]);
        let mut response = http::Response::new(UnsyncBoxBody::new(StreamBody::new(body)));
        *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
        response
    }

    fn answer(&self, request: &http::Request<kube::client::Body>) -> http::Response<UnsyncBoxBody<Bytes, Infallible>> {
        let kind = request.uri().path().rsplit('/').next().unwrap_or_default().to_string();
        let query = request.uri().query().unwrap_or_default();
        let state = self.objects.lock().unwrap();
        let frames: futures::stream::BoxStream<'static, String> = if query.contains("watch=true") {
            let receiver = self.events.subscribe();
            let since = query.split('&').find_map(|p| p.strip_prefix("resourceVersion=")).and_then(|v| v.parse().ok());
            let since: u64 = since.unwrap_or(0);
            // What happened between the list and this watch.
            let late = state.1.iter().filter(|((k, _), _)| *k == kind).filter_map(|(_, object)| {
                let version: u64 = object["metadata"]["resourceVersion"].as_str()?.parse().ok()?;
                (version > since).then(|| format!("{}\n", json!({"type": "MODIFIED", "object": object})))
            });
            let late: Vec<String> = late.collect();
            let live = futures::stream::unfold((receiver, kind), |(mut receiver, kind)| async move {
                loop {
                    let (_, of, event) = receiver.recv().await.ok()?;
                    if of == kind {
                        return Some((format!("{event}\n"), (receiver, kind)));
                    }
                }
            });
            futures::stream::iter(late).chain(live).boxed()
        } else {
            let items: Vec<&Value> = state.1.iter().filter(|((k, _), _)| *k == kind).map(|(_, o)| o).collect();
            let list = json!({"metadata": {"resourceVersion": state.0.to_string()}, "items": items});
            futures::stream::iter([list.to_string()]).boxed()
        };
        let frames = frames.map(|text| Ok(Frame::data(Bytes::from(text))));
        http::Response::new(UnsyncBoxBody::new(StreamBody::new(frames)))
    }
}
