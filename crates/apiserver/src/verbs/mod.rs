//! The verbs: from a parsed request to an answer.

mod delete;
mod options;
mod read;
mod render;
mod subresource;
mod watch;
mod write;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::Response;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, USER_AGENT};
use jiff::Timestamp;
use portolan_api::status::Status;
use serde_json::Value;

use crate::auth::User;
use crate::catalog::{Catalog, Entry};
use crate::negotiate::{self, Representation};
use crate::path::{Query, Target};
use crate::response::Body;
use crate::server::Inner;
use crate::store::{Key, Txn};

pub use options::{DeleteOptions, WriteOptions};
pub use render::value_in;
pub use subresource::binding;
pub use write::{Change, Pipeline, Tracking};

/// One request about objects.
pub struct Call {
    /// The server.
    pub server: Arc<Inner>,
    /// Kinds as they were when the request came.
    pub catalog: Arc<Catalog>,
    /// The kind it is about.
    pub entry: Arc<Entry>,
    /// The objects it is about.
    pub target: Target,
    /// The verb, as in authorization.
    pub verb: &'static str,
    /// Query parameters.
    pub query: Query,
    /// Headers.
    pub headers: HeaderMap,
    /// Who asks.
    pub user: User,
    /// The body; empty for requests without one.
    pub body: Bytes,
    /// When it came.
    pub now: Timestamp,
}

impl Call {
    fn header(&self, name: http::HeaderName) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    fn accept(&self) -> &str {
        self.header(ACCEPT)
    }

    /// Content-Type of the body.
    pub fn content_type(&self) -> &str {
        self.header(CONTENT_TYPE)
    }

    fn representation(&self) -> Result<Representation, Status> {
        negotiate::representation(self.accept())
    }

    /// Namespace of the path; empty for cluster-scoped objects and for all namespaces.
    fn namespace(&self) -> &str {
        self.target.namespace.as_deref().unwrap_or_default()
    }

    fn name(&self) -> &str {
        self.target.name.as_deref().unwrap_or_default()
    }

    fn key(&self) -> Key {
        Key::new(self.namespace(), self.name())
    }

    fn subresource(&self) -> Option<&str> {
        self.target.subresource.as_deref()
    }

    /// The field manager: as given, else the program's name from the User-Agent.
    fn manager(&self) -> String {
        let given = self.query.get("fieldManager");
        if !given.is_empty() {
            return given.to_owned();
        }
        let agent = self.header(USER_AGENT).split('/').next().unwrap_or_default();
        let name: String = agent.chars().filter(|c| !c.is_control()).take(128).collect();
        if name.is_empty() { "unknown".to_owned() } else { name }
    }

    /// Runs a transaction, or only tries it.
    fn commit<T: Send + 'static>(
        &self,
        dry_run: bool,
        decide: impl FnOnce(&mut Txn) -> Result<T, Status>,
    ) -> BoxFuture<'static, Result<T, Status>> {
        if dry_run {
            return Box::pin(std::future::ready(self.server.store.simulate(decide)));
        }
        self.server.store.transact(decide)
    }

    /// Fields a custom kind offers to field selectors.
    fn selectable_fields(&self) -> &[String] {
        &self.entry.selectable_fields
    }

    fn pipeline(&self) -> Pipeline<'_> {
        Pipeline { server: &self.server, catalog: &self.catalog, now: self.now, user: Some(&self.user) }
    }
}

/// Carries out a request whose kind and verb are known to exist.
pub async fn run(call: Call) -> Result<Response<Body>, Status> {
    if let Some(subresource) = call.subresource().map(str::to_owned) {
        return subresource::run(call, &subresource).await;
    }
    if call.entry.collection.is_empty() {
        return crate::review::run(&call).await;
    }
    match call.verb {
        "get" => read::get(&call),
        "list" => read::list(&call).await,
        "watch" => watch::watch(call).await,
        "create" => write::create(&call).await,
        "update" => write::update(&call, None).await,
        "patch" => write::patch(&call, None).await,
        "delete" => delete::delete(&call).await,
        "deletecollection" => delete::delete_collection(&call).await,
        _ => Err(Status::method_not_allowed()),
    }
}

/// Parameters of a create.
pub fn write_options(call: &Call) -> Result<WriteOptions, Status> {
    WriteOptions::parse(&call.query, "CreateOptions", false)
}

/// Answers with a document that is not stored.
pub fn answer_value(call: &Call, code: u16, value: &Value, warnings: &[String]) -> Result<Response<Body>, Status> {
    let encoding = call.representation()?.encoding;
    let mut response = render::encoded(code, value, encoding)?;
    crate::headers::add_warnings(response.headers_mut(), warnings);
    Ok(response)
}

/// Answers a write with a document of the call's kind.
fn write_answer(call: &Call, code: u16, value: &Value, warnings: &[String]) -> Result<Response<Body>, Status> {
    let mut response = render::document(call, code, value)?;
    crate::headers::add_warnings(response.headers_mut(), warnings);
    Ok(response)
}
