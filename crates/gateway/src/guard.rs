//! The strict reader in front of the HTTP/1 parser.
//!
//! A proxy and its backend must agree where one request ends and the next begins. The parser behind this guard is lenient (it
//! takes bare line feeds, prefers `Transfer-Encoding` to `Content-Length`, skips a folded line), so the guard reads every head and
//! every chunk first and hands on only what every reader understands in one way (RFC 9112; ingress.md 4.3). A head that fails is
//! replaced by a request that only the guard can have written, so that the answer comes in order, is logged, and closes the
//! connection. The guard also keeps the time limits of reading and writing.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::timers::{Timer, Timers};

/// Longest request line (nginx: one buffer of `large_client_header_buffers`).
const MAX_REQUEST_LINE: usize = 8 << 10;
/// Longest head: four such buffers.
const MAX_HEAD: usize = 32 << 10;
/// Most header fields of a request.
const MAX_FIELDS: u32 = 200;
/// Longest chunk extension, and all line overhead of one trailer section.
const MAX_EXTENSION: u32 = 256;
const MAX_TRAILERS: u32 = 16 << 10;
/// A head must be complete this long after its first byte, a body must go on within it, and a client must take what it asked for
/// (nginx: `client_header_timeout`, `client_body_timeout`, `send_timeout`).
const PATIENCE: Duration = Duration::from_secs(60);
/// What every HTTP/2 connection begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the guard, the connection's driver and the request handler share about one connection.
#[derive(Debug)]
pub struct Conn {
    /// The client.
    pub peer: SocketAddr,
    /// The port that the client connected to.
    pub port: u16,
    /// Whether the connection is over TLS.
    pub https: bool,
    /// Requests being handled.
    pub active: Cell<u32>,
    /// When the last request ended, on the worker's clock.
    pub rested_ms: Cell<u64>,
    /// What became of a request to switch protocols.
    pub upgrade: Cell<Upgrade>,
    /// The path of the request that stands for a refused head, and the status to refuse it with.
    pub refused: RefCell<Option<(String, u16)>>,
    held: RefCell<Option<Waker>>,
}

/// The state of a request to switch protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// None was made, or it was answered with another response.
    None,
    /// The guard hands on nothing more until it is answered.
    Asked,
    /// The bytes that follow are not HTTP.
    Accepted,
}

impl Conn {
    /// A connection before its first request.
    pub fn new(peer: SocketAddr, port: u16, https: bool) -> Conn {
        Conn {
            peer,
            port,
            https,
            active: Cell::new(0),
            rested_ms: Cell::new(0),
            upgrade: Cell::new(Upgrade::None),
            refused: RefCell::new(None),
            held: RefCell::new(None),
        }
    }

    /// Answers a request to switch protocols.
    pub fn answer_upgrade(&self, accepted: bool) {
        if self.upgrade.get() == Upgrade::Asked {
            self.upgrade.set(if accepted { Upgrade::Accepted } else { Upgrade::None });
            if let Some(waker) = self.held.borrow_mut().take() {
                waker.wake();
            }
        }
    }
}

/// Reads from `T` what is well formed.
pub struct Guard<T> {
    io: T,
    conn: std::rc::Rc<Conn>,
    /// Bytes read and not handed on: `buffer[start..]`, of which the first `approved` are well formed.
    buffer: Vec<u8>,
    start: usize,
    approved: usize,
    state: State,
    reading: Timer,
    writing: Timer,
}

/// Which protocol a plain connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Where in the stream of bytes the guard is.
#[derive(Debug, Default)]
enum State {
    /// Before or in a head.
    Head(Head),
    /// In a body of known length.
    Length(u64),
    /// In a chunked body.
    Chunked(Chunk),
    /// After a head that asks for another protocol.
    Held,
    /// Everything is handed on: HTTP/2 checks itself.
    Raw,
    /// Nothing is handed on any more.
    #[default]
    Closed,
}

/// A head as far as it has been read.
#[derive(Debug, Default)]
struct Head {
    /// Start of the line that is not complete.
    line: usize,
    /// No line end before this.
    searched: usize,
    fields: u32,
    started: bool,
    http10: bool,
    hosts: u32,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
    connection_upgrade: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size {
        digits: u8,
        value: u64,
    },
    Extension {
        value: u64,
        length: u32,
    },
    SizeLf {
        value: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// At the start of a trailer line; all lines so far have this length.
    Trailer {
        length: u32,
    },
    TrailerLine {
        length: u32,
    },
    TrailerLf {
        length: u32,
    },
    EndLf,
}

/// What the guard makes of some bytes.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// So many bytes are well formed.
    Pass(usize),
    /// More must be read before anything can be said.
    More,
    /// The head is refused with this status.
    Refuse(u16),
    /// The body is malformed; so many bytes before are not.
    Broken(usize),
}

impl State {
    fn scan(&mut self, bytes: &[u8]) -> Verdict {
        match self {
            State::Head(head) => match head.scan(bytes) {
                Ok(Some((length, next))) => {
                    *self = next;
                    Verdict::Pass(length)
                }
                Ok(None) => Verdict::More,
                Err(status) => Verdict::Refuse(status),
            },
            State::Length(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= take as u64;
                if *left == 0 {
                    *self = State::Head(Head::default());
                }
                Verdict::Pass(take)
            }
            State::Chunked(chunk) => match scan_chunks(chunk, bytes) {
                Ok((passed, false)) => Verdict::Pass(passed),
                Ok((passed, true)) => {
                    *self = State::Head(Head::default());
                    Verdict::Pass(passed)
                }
                Err(good) => Verdict::Broken(good),
            },
            State::Raw => Verdict::Pass(bytes.len()),
            State::Held | State::Closed => Verdict::More,
        }
    }
}

impl Head {
    /// Reads on in a head that begins at the start of `bytes`: its length and what follows it, nothing if it is not complete, or
    /// the status that refuses it.
    fn scan(&mut self, bytes: &[u8]) -> Result<Option<(usize, State)>, u16> {
        while let Some(found) = memchr::memchr(b'\n', &bytes[self.searched..]) {
            let end = self.searched + found;
            let line = match bytes[self.line..end].split_last() {
                Some((b'\r', line)) => line,
                // A bare line feed ends a line for some readers and not for others.
                _ => return Err(400),
            };
            let next = end + 1;
            self.searched = next;
            let blank = line.is_empty();
            if !self.started {
                // An empty line before the request is skipped (RFC 9112 section 2.2).
                if !blank {
                    self.request_line(line)?;
                    self.started = true;
                }
            } else if blank {
                return Ok(Some((next, self.finish()?)));
            } else {
                self.field(line)?;
            }
            self.line = next;
            if next > MAX_HEAD {
                return Err(431);
            }
        }
        self.searched = bytes.len();
        let pending = bytes.len() - self.line;
        if !self.started && pending > MAX_REQUEST_LINE {
            return Err(414);
        }
        if bytes.len() > MAX_HEAD {
            return Err(431);
        }
        Ok(None)
    }

    fn request_line(&mut self, line: &[u8]) -> Result<(), u16> {
        if line.len() > MAX_REQUEST_LINE {
            return Err(414);
        }
        let mut parts = line.split(|b| *b == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(400);
        };
        if method.is_empty() || !method.iter().all(|b| is_token(*b)) || target.is_empty() {
            return Err(400);
        }
        if target.iter().any(|b| *b <= b' ' || *b == 0x7f) {
            return Err(400);
        }
        match version {
            b"HTTP/1.1" => {}
            b"HTTP/1.0" => self.http10 = true,
            other if other.starts_with(b"HTTP/") && other.len() > 5 && other[5].is_ascii_digit() => return Err(505),
            _ => return Err(400),
        }
        // A tunnel through an Ingress controller has no meaning, and TRACE echoes secrets; nginx refuses both.
        if matches!(method, b"CONNECT" | b"TRACE") { Err(405) } else { Ok(()) }
    }

    fn field(&mut self, line: &[u8]) -> Result<(), u16> {
        self.fields += 1;
        if self.fields > MAX_FIELDS {
            return Err(431);
        }
        // A line that begins with a space continues the one before for some readers (obs-fold): it has no valid name.
        let colon = line.iter().position(|b| !is_token(*b)).filter(|at| *at > 0 && line[*at] == b':').ok_or(400u16)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if value.iter().any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f) {
            return Err(400);
        }
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => self.hosts += 1,
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.upgrade = !has_item(value, b"h2c"),
            10 if name.eq_ignore_ascii_case(b"connection") => self.connection_upgrade |= has_item(value, b"upgrade"),
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let digits = !value.is_empty() && value.len() <= 18 && value.iter().all(u8::is_ascii_digit);
                if !digits || self.length.is_some() {
                    return Err(400);
                }
                self.length = Some(value.iter().fold(0, |n, b| n * 10 + u64::from(b - b'0')));
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.http10 || self.chunked {
                    return Err(400);
                }
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(501);
                }
                self.chunked = true;
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(&self) -> Result<State, u16> {
        if self.hosts > 1 || (self.hosts == 0 && !self.http10) {
            return Err(400);
        }
        match (self.chunked, self.length) {
            (true, Some(_)) => Err(400),
            (true, None) => Ok(State::Chunked(Chunk::Size { digits: 0, value: 0 })),
            (false, Some(length)) if length > 0 => Ok(State::Length(length)),
            (false, _) if self.upgrade && self.connection_upgrade && !self.http10 => Ok(State::Held),
            (false, _) => Ok(State::Head(Head::default())),
        }
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn has_item(list: &[u8], item: &[u8]) -> bool {
    list.split(|b| *b == b',').any(|i| i.trim_ascii().eq_ignore_ascii_case(item))
}

/// Reads on in a chunked body: how many bytes belong to it and whether it ends there, or how many are well formed before one that
/// is not.
fn scan_chunks(chunk: &mut Chunk, bytes: &[u8]) -> Result<(usize, bool), usize> {
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        *chunk = match (*chunk, byte) {
            (Chunk::Data { left }, _) => {
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at);
                at += take;
                *chunk = match left - take as u64 {
                    0 => Chunk::DataCr,
                    left => Chunk::Data { left },
                };
                continue;
            }
            (Chunk::Size { digits, value }, byte) if byte.is_ascii_hexdigit() => {
                let digit = u64::from(char::from(byte).to_digit(16).unwrap_or(0));
                match (digits < 16).then(|| value.checked_mul(16)).flatten() {
                    Some(value) => Chunk::Size { digits: digits + 1, value: value | digit },
                    None => return Err(at),
                }
            }
            (Chunk::Size { digits: 1.., value }, b'\r') => Chunk::SizeLf { value },
            (Chunk::Size { digits: 1.., value }, b';') => Chunk::Extension { value, length: 1 },
            (Chunk::Extension { value, .. }, b'\r') => Chunk::SizeLf { value },
            (Chunk::Extension { value, length }, byte)
                if length < MAX_EXTENSION && (byte >= b' ' || byte == b'\t') && byte != 0x7f =>
            {
                Chunk::Extension { value, length: length + 1 }
            }
            (Chunk::SizeLf { value: 0 }, b'\n') => Chunk::Trailer { length: 0 },
            (Chunk::SizeLf { value }, b'\n') => Chunk::Data { left: value },
            (Chunk::DataCr, b'\r') => Chunk::DataLf,
            (Chunk::DataLf, b'\n') => Chunk::Size { digits: 0, value: 0 },
            (Chunk::Trailer { .. }, b'\r') => Chunk::EndLf,
            (Chunk::Trailer { length }, byte) if is_token(byte) => Chunk::TrailerLine { length: length + 1 },
            (Chunk::TrailerLine { length }, b'\r') => Chunk::TrailerLf { length },
            (Chunk::TrailerLine { length }, byte)
                if length < MAX_TRAILERS && (byte >= b' ' || byte == b'\t') && byte != 0x7f =>
            {
                Chunk::TrailerLine { length: length + 1 }
            }
            (Chunk::TrailerLf { length }, b'\n') => Chunk::Trailer { length },
            (Chunk::EndLf, b'\n') => return Ok((at + 1, true)),
            _ => return Err(at),
        };
        at += 1;
    }
    Ok((at, false))
}

impl<T: AsyncRead + AsyncWrite + Unpin> Guard<T> {
    /// A guard for HTTP/1.
    pub fn http1(io: T, conn: std::rc::Rc<Conn>, timers: &Timers) -> Guard<T> {
        Guard {
            io,
            conn,
            buffer: Vec::new(),
            start: 0,
            approved: 0,
            state: State::Head(Head::default()),
            reading: timers.timer(),
            writing: timers.timer(),
        }
    }

    /// A guard that only keeps time, for HTTP/2.
    pub fn http2(io: T, conn: std::rc::Rc<Conn>, timers: &Timers) -> Guard<T> {
        Guard { state: State::Raw, ..Guard::http1(io, conn, timers) }
    }

    /// Reads until it is clear which protocol the client speaks (HTTP/2 with prior knowledge, RFC 9113 section 3.3).
    ///
    /// # Errors
    /// Those of reading.
    pub async fn sniff(&mut self) -> io::Result<Protocol> {
        use tokio::io::AsyncReadExt;
        loop {
            let seen = self.buffer.len().min(PREFACE.len());
            if self.buffer[..seen] != PREFACE[..seen] {
                return Ok(Protocol::Http1);
            }
            if seen == PREFACE.len() {
                self.state = State::Raw;
                return Ok(Protocol::Http2);
            }
            self.buffer.reserve(1024);
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return Ok(Protocol::Http1);
            }
        }
    }

    /// The connection after HTTP, and what was read of what follows.
    pub fn into_parts(mut self) -> (T, Vec<u8>) {
        (self.io, self.buffer.split_off(self.start))
    }

    fn refuse(&mut self, status: u16) {
        let path = format!("/{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        self.buffer = format!("GET {path} HTTP/1.1\r\nHost: refused\r\n\r\n").into_bytes();
        (self.start, self.approved) = (0, self.buffer.len());
        *self.conn.refused.borrow_mut() = Some((path, status));
        self.state = State::Closed;
        self.reading.clear();
    }

    /// Judges the bytes that were read last, of which `length` lie in `fresh` or, if that is `None`, in the buffer.
    fn judge(&mut self, fresh: &[u8]) -> usize {
        match self.state.scan(fresh) {
            Verdict::Pass(length) => {
                if matches!(self.state, State::Held) {
                    self.conn.upgrade.set(Upgrade::Asked);
                }
                self.reading.clear();
                length
            }
            Verdict::More => 0,
            Verdict::Refuse(status) => {
                self.refuse(status);
                0
            }
            Verdict::Broken(good) => {
                // A byte that no chunk may have makes the parser fail where this guard did.
                self.buffer = fresh[..good].to_vec();
                self.buffer.push(b'!');
                (self.start, self.approved) = (0, self.buffer.len());
                self.state = State::Closed;
                0
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Read for Guard<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut cursor: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.approved > 0 {
                let take = this.approved.min(cursor.remaining());
                cursor.put_slice(&this.buffer[this.start..this.start + take]);
                this.start += take;
                this.approved -= take;
                if this.start == this.buffer.len() {
                    this.buffer = Vec::new();
                    this.start = 0;
                }
                return Poll::Ready(Ok(()));
            }
            if matches!(this.state, State::Held) {
                match this.conn.upgrade.get() {
                    Upgrade::None => this.state = State::Head(Head::default()),
                    Upgrade::Asked | Upgrade::Accepted => {
                        *this.conn.held.borrow_mut() = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
            }
            if matches!(this.state, State::Closed) {
                // The answer to a refused head closes the connection; reading the end now would lose it.
                return Poll::Pending;
            }
            let known = this.buffer.len() - this.start;
            let fresh_head = matches!(&this.state, State::Head(head) if head.searched == 0);
            if known > 0 && (fresh_head || !matches!(this.state, State::Head(_))) {
                let bytes = this.buffer.split_off(this.start);
                (this.buffer, this.start) = (Vec::new(), 0);
                let passed = this.judge(&bytes);
                if this.buffer.is_empty() {
                    this.buffer = bytes;
                    this.approved = passed;
                }
                if this.approved > 0 {
                    continue;
                }
            }
            // SAFETY: the slice is only written to through ReadBuf, which never de-initialises a byte.
            let free = unsafe { cursor.as_mut() };
            if free.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let mut read = ReadBuf::uninit(free);
            match Pin::new(&mut this.io).poll_read(cx, &mut read) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => match this.wait(cx) {
                    Poll::Ready(Ok(())) => continue,
                    other => return other,
                },
            }
            let filled = read.filled();
            if filled.is_empty() {
                // The end. Half a head that was read is of no use to anyone.
                return Poll::Ready(Ok(()));
            }
            if this.buffer.is_empty() {
                let length = filled.len();
                let passed = this.judge(filled);
                if this.buffer.is_empty() {
                    if passed < length {
                        this.buffer.extend_from_slice(&filled[passed..]);
                    }
                    if passed > 0 {
                        // SAFETY: `filled` says that the reader initialised at least this many bytes of the unfilled part.
                        unsafe { cursor.advance(passed) };
                        return Poll::Ready(Ok(()));
                    }
                }
            } else {
                // In the middle of a head.
                this.buffer.extend_from_slice(filled);
                let bytes = std::mem::take(&mut this.buffer);
                let start = std::mem::take(&mut this.start);
                let passed = this.judge(&bytes[start..]);
                if this.buffer.is_empty() {
                    (this.buffer, this.start, this.approved) = (bytes, start, passed);
                }
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Guard<T> {
    /// Nothing can be read: how long may that last? `Ok` means that the state has changed and reading may go on.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waiting = match &self.state {
            State::Head(_) => !self.buffer.is_empty(),
            State::Length(_) | State::Chunked(_) => true,
            State::Held | State::Raw | State::Closed => false,
        };
        if !waiting {
            self.reading.clear();
            return Poll::Pending;
        }
        if !self.reading.is_set() {
            self.reading.set(PATIENCE);
        }
        match self.reading.poll_expired(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) if matches!(self.state, State::Head(_)) => {
                self.refuse(408);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
        }
    }

    fn written<R>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if result.is_ready() {
            self.writing.clear();
            return result;
        }
        if !self.writing.is_set() {
            self.writing.set(PATIENCE);
        }
        match self.writing.poll_expired(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Write for Guard<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write(cx, bytes);
        if result.is_ready() && !this.writing.is_set() { result } else { this.written(cx, result) }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
        if result.is_ready() && !this.writing.is_set() { result } else { this.written(cx, result) }
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_flush(cx);
        if result.is_ready() && !this.writing.is_set() { result } else { this.written(cx, result) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that a fresh connection makes of `input`, given in pieces of `step` bytes: bytes passed, or the status.
    fn feed(input: &[u8], step: usize) -> Result<usize, u16> {
        let mut state = State::Head(Head::default());
        let (mut passed, mut pending) = (0, Vec::new());
        for piece in input.chunks(step) {
            pending.extend_from_slice(piece);
            while !pending.is_empty() {
                match state.scan(&pending) {
                    Verdict::Pass(n) => {
                        passed += n;
                        pending.drain(..n);
                    }
                    Verdict::More => break,
                    Verdict::Refuse(status) => return Err(status),
                    Verdict::Broken(_) => return Err(0),
                }
            }
        }
        Ok(passed)
    }

    #[test]
    fn heads_and_bodies_are_judged_alike_however_they_arrive() {
        let host = "Host: a\r\n";
        let long = "x".repeat(9000);
        let many = "A: b\r\n".repeat(201);
        let table: Vec<(String, Result<(), u16>)> = vec![
            (format!("GET / HTTP/1.1\r\n{host}\r\n"), Ok(())),
            (format!("\r\nGET / HTTP/1.1\r\n{host}\r\nGET / HTTP/1.1\r\n{host}\r\n"), Ok(())),
            ("GET / HTTP/1.0\r\n\r\n".into(), Ok(())),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n{host}\r\n"), Ok(())),
            (
                format!(
                    "POST / HTTP/1.1\r\n{host}Transfer-Encoding: Chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nT: x\r\n\r\nGET / HTTP/1.1\r\n{host}\r\n"
                ),
                Ok(()),
            ),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: 5\r\nContent-Length: 6\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: 5, 5\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: +5\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: 0x5\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: \r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Content-Length: 99999999999999999999\r\n\r\n"), Err(400)),
            (format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: gzip, chunked\r\n\r\n"), Err(501)),
            (format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: xchunked\r\n\r\n"), Err(501)),
            (
                format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
                Err(400),
            ),
            (format!("POST / HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\n\r\n"), Err(400)),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n".into(), Err(400)),
            ("GET / HTTP/1.1\r\nHost: a\n\n".into(), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}A: b\r\n c\r\n\r\n"), Err(400)),
            (format!("GET / HTTP/1.1\r\n Host: a\r\n\r\n{host}"), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}A : b\r\n\r\n"), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}: b\r\n\r\n"), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}A\r\n\r\n"), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}A: b\0c\r\n\r\n"), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}A: b\rc\r\n\r\n"), Err(400)),
            (format!("GET / HTTP/1.1\r\n{host}{host}\r\n"), Err(400)),
            ("GET / HTTP/1.1\r\n\r\n".into(), Err(400)),
            (format!("GET  / HTTP/1.1\r\n{host}\r\n"), Err(400)),
            (format!("GET / x HTTP/1.1\r\n{host}\r\n"), Err(400)),
            ("GET /\r\n\r\n".into(), Err(400)),
            (format!("GET / HTTP/2.0\r\n{host}\r\n"), Err(505)),
            (format!("GET / FTP/1.1\r\n{host}\r\n"), Err(400)),
            (format!("CONNECT a:1 HTTP/1.1\r\n{host}\r\n"), Err(405)),
            (format!("TRACE / HTTP/1.1\r\n{host}\r\n"), Err(405)),
            (format!("GET /{long} HTTP/1.1\r\n{host}\r\n"), Err(414)),
            (format!("GET / HTTP/1.1\r\n{host}A: {}\r\n\r\n", "x".repeat(40000)), Err(431)),
            (format!("GET / HTTP/1.1\r\n{host}{many}\r\n"), Err(431)),
        ];
        let chunked = |body: &str| format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n{body}");
        let broken = [
            "5 \r\nhello\r\n0\r\n\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "\r\n",
            "g\r\n",
            "-5\r\n",
            "0x5\r\nhello",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "00000000000000005\r\nhello\r\n",
            "5;a\nb\r\nhello\r\n",
            "0\r\nA: b\n\r\n",
            "0\r\n A: b\r\n\r\n",
        ];
        let extension = format!("5;{}\r\nhello\r\n0\r\n\r\n", "e".repeat(300));
        let broken = broken.iter().map(|b| b.to_string()).chain([extension]).map(|body| (chunked(&body), Err(0)));
        for (input, expected) in table.into_iter().chain(broken) {
            for step in [1, 7, input.len()] {
                let expected = expected.map(|()| input.len());
                assert_eq!(feed(input.as_bytes(), step), expected, "step {step}: {:?}", &input[..input.len().min(120)]);
            }
        }
    }

    #[test]
    fn a_request_to_switch_protocols_holds_what_follows() {
        let ask = |extra: &str| {
            let mut state = State::Head(Head::default());
            let head =
                format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: {extra}\r\n\r\n");
            assert_eq!(state.scan(head.as_bytes()), Verdict::Pass(head.len()));
            matches!(state, State::Held)
        };
        assert!(ask("websocket"));
        assert!(!ask("h2c"), "HTTP/2 is not reached by an upgrade");
    }
}
