//! Bodies and answers.

use std::convert::Infallible;

use bytes::Bytes;
use futures::Stream;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use portolan_api::status::Status;
use serde_json::Value;

/// Any error, as bodies carry it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Body of requests and answers inside the server.
pub type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, BoxError>;

/// `application/json`.
pub const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// `text/plain`.
pub const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// A body that is all there.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// A body that arrives in pieces; it ends without an error.
pub fn streamed(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    use futures::StreamExt as _;
    StreamBody::new(pieces.map(|piece| Ok::<_, BoxError>(Frame::data(piece)))).boxed_unsync()
}

/// An answer of some type.
pub fn answer(code: u16, content_type: HeaderValue, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// An answer in JSON.
pub fn json(code: u16, value: &Value) -> Response<Body> {
    answer(code, JSON, full(value.to_string()))
}

/// A failure in JSON.
pub fn failure(status: &Status) -> Response<Body> {
    let mut response = json(status.code, &status.to_value());
    if let Some(seconds) = status.retry_after_seconds {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    crate::headers::add_warnings(response.headers_mut(), &status.warnings);
    response
}

/// The plain 404 for paths that belong to no group.
pub fn no_such_page() -> Response<Body> {
    answer(404, TEXT, full("404 page not found\n"))
}
