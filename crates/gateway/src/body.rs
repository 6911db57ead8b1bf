//! Bodies in both directions, streamed with their trailers.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderMap, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::proxy::Exchange;
use crate::timers::Timer;
use crate::upstream::Lease;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// What is left of an HTTP/2 request's body after its answer is read and dropped up to this time and size.
const REST_TIME: Duration = Duration::from_secs(5);
const REST_BYTES: usize = 64 << 20;

/// A request's body as it comes from the client.
///
/// Dropping it before its end would end an HTTP/2 stream at once, and clients that are still sending take that for a failure instead
/// of reading the answer, so the rest is read on for a while. The stream then ends with `NO_ERROR` (RFC 9113 section 8.1). On
/// HTTP/1 the connection lingers instead.
pub(crate) struct Received {
    inner: Option<Incoming>,
    lingers: bool,
}

impl Received {
    pub fn new(inner: Incoming, version: Version) -> Received {
        Received { inner: Some(inner), lingers: version == Version::HTTP_2 }
    }

    pub fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if !self.lingers || self.is_end_stream() {
            return;
        }
        let Some(mut rest) = self.inner.take() else { return };
        tokio::task::spawn_local(async move {
            let read = async {
                let mut bytes = 0;
                while let Some(Ok(frame)) = rest.frame().await
                    && bytes < REST_BYTES
                {
                    bytes += frame.data_ref().map_or(0, Bytes::len);
                }
            };
            let _ = tokio::time::timeout(REST_TIME, read).await;
        });
    }
}

/// What is known of a request's body while it goes upstream, and the timeout that its progress renews.
pub(crate) struct Progress {
    pub timer: Timer,
    pub patience: Cell<Duration>,
    pub bytes: Cell<u64>,
    pub complete: Cell<bool>,
    pub too_large: Cell<bool>,
    pub failed: Cell<bool>,
}

impl Progress {
    pub fn new(timer: Timer) -> Progress {
        Progress {
            timer,
            patience: Cell::new(Duration::from_secs(60)),
            bytes: Cell::new(0),
            complete: Cell::new(false),
            too_large: Cell::new(false),
            failed: Cell::new(false),
        }
    }
}

/// A request's body on its way upstream.
pub(crate) enum Upload {
    Empty,
    Stream { inner: Received, progress: Rc<Progress>, limit: u64 },
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Upload::Stream { inner, progress, limit } = &mut *self else { return Poll::Ready(None) };
        let frame = match inner.poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(frame) => frame,
        };
        // A slow upload is no slow backend.
        progress.timer.set(progress.patience.get());
        Poll::Ready(match frame {
            None => {
                progress.complete.set(true);
                None
            }
            Some(Err(error)) => {
                progress.failed.set(true);
                Some(Err(error.into()))
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    progress.bytes.set(progress.bytes.get() + data.remaining() as u64);
                    if progress.bytes.get() > *limit {
                        progress.too_large.set(true);
                        return Poll::Ready(Some(Err("request body too large".into())));
                    }
                }
                Some(Ok(clean(frame)))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Upload::Empty => true,
            Upload::Stream { inner, progress, .. } => {
                let ended = inner.is_end_stream();
                if ended {
                    progress.complete.set(true);
                }
                ended
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Upload::Empty => SizeHint::with_exact(0),
            Upload::Stream { inner, .. } => inner.size_hint(),
        }
    }
}

/// A response's body. Dropping it ends the exchange: the log line is written, and a connection whose response was read to its end
/// goes back to the pool.
pub(crate) enum Body {
    /// Ours.
    Own(Option<Bytes>, #[expect(dead_code, reason = "ends the exchange when dropped")] Box<Exchange>),
    /// The backend's.
    Relay(Box<Relay>),
}

pub(crate) struct Relay {
    pub inner: Incoming,
    pub lease: Option<Lease>,
    pub exchange: Box<Exchange>,
    pub patience: Duration,
    pub ended: bool,
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let relay = match &mut *self {
            Body::Own(bytes, _) => {
                return Poll::Ready(bytes.take().filter(|b| !b.is_empty()).map(|b| Ok(Frame::data(b))));
            }
            Body::Relay(relay) => relay,
        };
        let timer = &relay.exchange.progress.timer;
        match Pin::new(&mut relay.inner).poll_frame(cx) {
            Poll::Pending => {
                if !timer.is_set() {
                    timer.set(relay.patience);
                }
                match timer.poll_expired(cx) {
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(()) => {
                        tracing::debug!(
                            upstream = relay.exchange.upstream_addr,
                            "upstream stopped in the middle of a response"
                        );
                        Poll::Ready(Some(Err("upstream timed out".into())))
                    }
                }
            }
            Poll::Ready(frame) => {
                timer.clear();
                match &frame {
                    Some(Ok(frame)) => {
                        let length = frame.data_ref().map_or(0, |d| d.remaining() as u64);
                        relay.exchange.body_bytes += length;
                    }
                    Some(Err(_)) => {}
                    None => relay.ended = true,
                }
                Poll::Ready(frame.map(|f| f.map(clean).map_err(Into::into)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Own(bytes, _) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Body::Relay(relay) => relay.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Own(bytes, _) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Body::Relay(relay) => relay.inner.size_hint(),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.exchange.progress.timer.clear();
        if let Some(lease) = self.lease.take()
            && (self.ended || self.inner.is_end_stream())
        {
            lease.give_back(&self.exchange);
        }
    }
}

/// Drops trailer fields that could change how a message is framed, routed or authorised (RFC 9110 section 6.5.1).
fn clean(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            remove_forbidden(&mut trailers);
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    }
}

fn remove_forbidden(trailers: &mut HeaderMap) {
    use http::header::*;
    const FORBIDDEN: [HeaderName; 16] = [
        TRANSFER_ENCODING,
        CONTENT_LENGTH,
        HOST,
        CONNECTION,
        UPGRADE,
        TE,
        TRAILER,
        AUTHORIZATION,
        PROXY_AUTHORIZATION,
        WWW_AUTHENTICATE,
        COOKIE,
        SET_COOKIE,
        CACHE_CONTROL,
        CONTENT_TYPE,
        CONTENT_ENCODING,
        CONTENT_RANGE,
    ];
    for name in FORBIDDEN {
        trailers.remove(name);
    }
}
