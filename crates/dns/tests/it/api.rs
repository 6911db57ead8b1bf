//! An API server of lists and watches in memory, as far as watchers need one.

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
        Api { objects: Arc::new(Mutex::new((1, Objects::new()))), events: broadcast::channel(1024).0 }
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

    /// Deletes an object.
    pub fn delete(&self, object: &Value) {
        let mut state = self.objects.lock().unwrap();
        state.0 += 1;
        let key = key(object);
        if let Some(mut object) = state.1.remove(&key) {
            object["metadata"]["resourceVersion"] = json!(state.0.to_string());
            let _ = self.events.send((state.0, key.0, json!({"type": "DELETED", "object": object})));
        }
    }

    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        kube::Client::new(
            tower::service_fn(move |request: http::Request<kube::client::Body>| {
                let response = api.answer(&request);
                async move { Ok::<_, Infallible>(response) }
            }),
            "default",
        )
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
