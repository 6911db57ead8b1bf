//! The access log in ingress-nginx's format, which existing parsers read.
//!
//! Lines gather in the worker and go to a writer thread in blocks. A writer that falls behind loses blocks, never delays a
//! request.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// A block goes out when it is this large, or this long after its first line.
const BLOCK_BYTES: usize = 16 << 10;
const DELAY: Duration = Duration::from_millis(50);
/// Blocks that may wait for the writer.
const BLOCKS: usize = 256;

/// Where lines go.
#[derive(Clone, Default)]
pub enum Target {
    /// Nowhere.
    #[default]
    Off,
    /// To standard output.
    Stdout,
    /// To a channel, in blocks of whole lines.
    Channel(SyncSender<Vec<u8>>),
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Target::Off => "Off",
            Target::Stdout => "Stdout",
            Target::Channel(_) => "Channel",
        })
    }
}

/// The process's end of the log.
#[derive(Clone)]
pub(crate) struct Sink {
    blocks: Option<SyncSender<Vec<u8>>>,
    /// Blocks that were lost.
    pub dropped: Arc<AtomicU64>,
}

impl Sink {
    pub fn open(target: Target) -> Sink {
        let blocks = match target {
            Target::Off => None,
            Target::Channel(blocks) => Some(blocks),
            Target::Stdout => {
                let (sender, blocks) = sync_channel::<Vec<u8>>(BLOCKS);
                let write = move || {
                    for block in blocks {
                        // A closed standard output is no reason to stop serving.
                        let _ = std::io::stdout().lock().write_all(&block).and_then(|()| std::io::stdout().flush());
                    }
                };
                std::thread::Builder::new().name("access-log".into()).spawn(write).ok().map(|_| sender)
            }
        };
        Sink { blocks, dropped: Arc::default() }
    }
}

/// What one line says.
pub(crate) struct Line<'a> {
    pub remote: IpAddr,
    pub request: std::fmt::Arguments<'a>,
    pub status: u16,
    pub body_bytes: u64,
    pub referer: &'a [u8],
    pub agent: &'a [u8],
    pub request_length: u64,
    pub request_time: Duration,
    pub upstream_name: std::fmt::Arguments<'a>,
    pub upstream_addr: &'a str,
    pub upstream_length: Option<u64>,
    pub upstream_time: Option<Duration>,
    pub upstream_status: &'a str,
    pub id: &'a [u8],
}

/// One worker's log.
pub(crate) struct AccessLog {
    sink: Sink,
    buffer: RefCell<String>,
    scheduled: Cell<bool>,
    stamp: RefCell<(i64, String)>,
}

impl AccessLog {
    pub fn new(sink: Sink) -> AccessLog {
        AccessLog {
            sink,
            buffer: RefCell::default(),
            scheduled: Cell::new(false),
            stamp: RefCell::new((-1, String::new())),
        }
    }

    pub fn is_on(&self) -> bool {
        self.sink.blocks.is_some()
    }

    /// Adds a line. Must run inside the worker's `LocalSet`.
    pub fn write(self: &std::rc::Rc<Self>, line: &Line) {
        let length = {
            let mut buffer = self.buffer.borrow_mut();
            self.format(&mut buffer, line);
            buffer.len()
        };
        if length >= BLOCK_BYTES {
            self.flush();
        } else if !self.scheduled.replace(true) {
            let log = self.clone();
            tokio::task::spawn_local(async move {
                tokio::time::sleep(DELAY).await;
                log.flush();
            });
        }
    }

    pub fn flush(&self) {
        self.scheduled.set(false);
        let block = std::mem::take(&mut *self.buffer.borrow_mut()).into_bytes();
        if block.is_empty() {
            return;
        }
        if let Some(blocks) = &self.sink.blocks
            && let Err(TrySendError::Full(_)) = blocks.try_send(block)
        {
            self.sink.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn format(&self, out: &mut String, line: &Line) {
        let now = jiff::Timestamp::now();
        let mut stamp = self.stamp.borrow_mut();
        if stamp.0 != now.as_second() {
            *stamp = (now.as_second(), now.strftime("%d/%b/%Y:%H:%M:%S +0000").to_string());
        }
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "{} - - [{}] \"{}\" {} {} \"",
            line.remote, stamp.1, line.request, line.status, line.body_bytes
        );
        escape(out, line.referer);
        out.push_str("\" \"");
        escape(out, line.agent);
        let _ = write!(
            out,
            "\" {} {} [{}] [] {} ",
            line.request_length,
            Seconds(Some(line.request_time)),
            line.upstream_name,
            or_dash(line.upstream_addr)
        );
        match line.upstream_length {
            Some(length) => {
                let _ = write!(out, "{length}");
            }
            None => out.push('-'),
        }
        let _ = write!(out, " {} {} ", Seconds(line.upstream_time), or_dash(line.upstream_status));
        escape(out, line.id);
        out.push('\n');
    }
}

struct Seconds(Option<Duration>);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(time) => write!(f, "{}.{:03}", time.as_secs(), time.subsec_millis()),
            None => f.write_str("-"),
        }
    }
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// nginx's default escaping: quotes, backslashes and everything that is not printable ASCII as `\xXX`; nothing is a dash.
fn escape(out: &mut String, bytes: &[u8]) {
    if bytes.is_empty() {
        out.push('-');
    }
    for &byte in bytes {
        match byte {
            b'"' | b'\\' | 0..=0x1f | 0x7f.. => {
                let _ = write!(out, "\\x{byte:02X}");
            }
            _ => out.push(char::from(byte)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_fields_of_ingress_nginx_in_order() {
        let log = AccessLog::new(Sink::open(Target::Off));
        let mut out = String::new();
        let line = Line {
            remote: "192.0.2.1".parse().expect("address"),
            request: format_args!("GET /a?b HTTP/1.1"),
            status: 200,
            body_bytes: 12,
            referer: b"",
            agent: b"curl/8 \"x\"\n",
            request_length: 80,
            request_time: Duration::from_millis(1042),
            upstream_name: format_args!("shop-web-80"),
            upstream_addr: "10.0.0.1:80",
            upstream_length: Some(12),
            upstream_time: Some(Duration::from_millis(7)),
            upstream_status: "200",
            id: b"abc",
        };
        log.format(&mut out, &line);
        let (start, rest) = out.split_once('[').expect("a time");
        let (time, rest) = rest.split_once(']').expect("a time");
        assert_eq!(start, "192.0.2.1 - - ");
        assert_eq!((time.len(), &time[20..]), (26, " +0000"));
        assert_eq!(
            rest,
            " \"GET /a?b HTTP/1.1\" 200 12 \"-\" \"curl/8 \\x22x\\x22\\x0A\" 80 1.042 [shop-web-80] [] 10.0.0.1:80 12 0.007 200 abc\n"
        );
    }
}
