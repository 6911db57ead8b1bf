//! A server in process and a small client for it.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use portolan_apiserver::{Body, LocalService, Server, ServerConfig, User};
use serde_json::Value;
use tower::Service as _;

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(20);

/// An API server in memory, without a socket.
pub struct Fixture {
    pub server: Server,
    service: LocalService,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub body: Value,
    pub warnings: Vec<String>,
}

impl Fixture {
    pub async fn start() -> Fixture {
        let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
        config.disable_admission_plugins = vec!["ServiceAccount".to_owned()];
        Fixture::with(config).await
    }

    pub async fn with(config: ServerConfig) -> Fixture {
        let server = Server::start(config).await.expect("a server");
        let service = server.local_service(User::admin());
        Fixture { server, service }
    }

    pub async fn raw(&self, request: Request<Full<Bytes>>) -> Response<Body> {
        self.service.clone().call(request).await.expect("local calls do not fail")
    }

    pub async fn send(&self, method: Method, path: &str, content_type: &str, body: &str) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content_type)
            .body(Full::new(Bytes::from(body.to_owned())))
            .expect("a request");
        answer(self.raw(request).await).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, "application/json", "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::POST, path, "application/json", &body.to_string()).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::PUT, path, "application/json", &body.to_string()).await
    }

    pub async fn merge(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::PATCH, path, "application/merge-patch+json", &body.to_string()).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, "application/json", "").await
    }

    /// Reads `count` lines of a watch.
    pub async fn watch(&self, path: &str, count: usize) -> Vec<Value> {
        let request = Request::get(path).body(Full::new(Bytes::new())).expect("a request");
        let mut body = self.raw(request).await.into_body();
        let mut text = Vec::new();
        let lines = async {
            while text.iter().filter(|byte| **byte == b'\n').count() < count {
                let Some(frame) = body.frame().await else { break };
                text.extend_from_slice(frame.expect("a frame").data_ref().expect("data"));
            }
        };
        tokio::time::timeout(LIMIT, lines).await.expect("the events in time");
        String::from_utf8(text).expect("text").lines().map(|line| serde_json::from_str(line).expect("json")).collect()
    }
}

pub async fn answer(response: Response<Body>) -> Answer {
    let code = response.status().as_u16();
    let warnings =
        response.headers().get_all("warning").iter().map(|value| value.to_str().expect("text").to_owned()).collect();
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    let body =
        serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
    Answer { code, body, warnings }
}
