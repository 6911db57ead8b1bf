//! Container logs: written as the container speaks, read for `kubectl logs`.
//!
//! The files have the CRI log format (Kubernetes, "CRI logging"): time, stream, `F` for a full or `P` for a partial line, text.
//! A file that grows past its limit is renamed and a new one begun; readers see both.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{broadcast, watch};

/// A file is rotated beyond this size (the kubelet's default containerLogMaxSize).
const MAX_FILE_BYTES: u64 = 10 << 20;
/// Longest text in one record; longer lines are continued (CRI uses 16 KiB).
const MAX_RECORD_BYTES: usize = 16 * 1024;
/// Chunks kept for an attached client that reads slowly; it misses the oldest beyond that.
const ATTACH_BACKLOG: usize = 256;

/// Which of a container's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

/// Where one run of a container logs to. Clones write to the same file.
#[derive(Clone, Debug)]
pub(crate) struct LogSink {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    file: Mutex<(File, u64)>,
    /// Bumped after each write; closed streams are counted down.
    grown: watch::Sender<Progress>,
    live: broadcast::Sender<(Stream, Bytes)>,
}

/// How far a log has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    writes: u64,
    /// No more will be written.
    pub closed: bool,
}

impl LogSink {
    /// Begins a log file.
    pub(crate) fn create(path: PathBuf) -> io::Result<LogSink> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let file = File::options().create(true).append(true).open(&path)?;
        let size = file.metadata()?.len();
        let (grown, _) = watch::channel(Progress::default());
        let (live, _) = broadcast::channel(ATTACH_BACKLOG);
        Ok(LogSink { shared: Arc::new(Shared { path, file: Mutex::new((file, size)), grown, live }) })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Follows growth.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.shared.grown.subscribe()
    }

    /// Receives what the container says from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<(Stream, Bytes)> {
        self.shared.live.subscribe()
    }

    /// Says that nothing more comes.
    pub(crate) fn close(&self) {
        self.shared.grown.send_modify(|progress| progress.closed = true);
    }

    /// Copies a stream into the log until it ends.
    pub(crate) async fn copy(&self, stream: Stream, mut reader: impl AsyncRead + Unpin) {
        let mut buffer = vec![0u8; 8 * 1024];
        let mut pending: Vec<u8> = Vec::new();
        loop {
            // A terminal reports the end of its other side as an error.
            let n = match reader.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(n) => n,
            };
            if self.shared.live.receiver_count() > 0 {
                let _ = self.shared.live.send((stream, Bytes::copy_from_slice(&buffer[..n])));
            }
            pending.extend_from_slice(&buffer[..n]);
            let records = take_records(&mut pending, stream, Timestamp::now());
            self.write(&records);
        }
        if !pending.is_empty() {
            let mut record = Vec::new();
            push_record(&mut record, stream, Timestamp::now(), true, &pending);
            self.write(&record);
        }
    }

    fn write(&self, records: &[u8]) {
        if records.is_empty() {
            return;
        }
        let mut guard = self.shared.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, size) = &mut *guard;
        if let Err(error) = file.write_all(records) {
            tracing::warn!(path = %self.shared.path.display(), %error, "cannot write a container log");
        }
        *size += records.len() as u64;
        if *size > MAX_FILE_BYTES {
            let _ = fs::rename(&self.shared.path, rotated(&self.shared.path));
            if let Ok(fresh) = File::options().create(true).append(true).open(&self.shared.path) {
                *guard = (fresh, 0);
            }
        }
        drop(guard);
        self.shared.grown.send_modify(|progress| progress.writes += 1);
    }
}

fn rotated(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Takes whole lines, and the beginnings of over-long ones, from `pending` as log records.
fn take_records(pending: &mut Vec<u8>, stream: Stream, now: Timestamp) -> Vec<u8> {
    let mut out = Vec::new();
    let mut start = 0;
    loop {
        let rest = &pending[start..];
        let newline = rest.iter().take(MAX_RECORD_BYTES + 1).position(|&b| b == b'\n');
        match newline {
            Some(end) => {
                push_record(&mut out, stream, now, true, &rest[..end]);
                start += end + 1;
            }
            None if rest.len() >= MAX_RECORD_BYTES => {
                push_record(&mut out, stream, now, false, &rest[..MAX_RECORD_BYTES]);
                start += MAX_RECORD_BYTES;
            }
            None => break,
        }
    }
    pending.drain(..start);
    out
}

fn push_record(out: &mut Vec<u8>, stream: Stream, now: Timestamp, full: bool, text: &[u8]) {
    // Nine digits always, so that the text begins at a fixed column.
    out.extend(format!("{now:.9} {} {} ", stream.name(), if full { 'F' } else { 'P' }).as_bytes());
    out.extend(text);
    out.push(b'\n');
}

/// What `kubectl logs` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogOptions {
    pub follow: bool,
    pub timestamps: bool,
    pub tail_lines: Option<usize>,
    pub since: Option<Timestamp>,
    pub limit_bytes: Option<usize>,
    /// Only this stream.
    pub stream: Option<Stream>,
}

/// Turns records into the text for a client.
#[derive(Debug)]
pub(crate) struct Formatter {
    options: LogOptions,
    left: usize,
    continued: bool,
}

impl Formatter {
    pub(crate) fn new(options: &LogOptions) -> Formatter {
        Formatter { left: options.limit_bytes.unwrap_or(usize::MAX), options: options.clone(), continued: false }
    }

    /// Whether the byte limit is used up.
    pub(crate) fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Appends the text of one record (without its newline) to `out`, if it is wanted.
    pub(crate) fn push(&mut self, record: &[u8], out: &mut Vec<u8>) {
        let Some((time, stream, full, text)) = parse(record) else { return };
        if self.options.stream.is_some_and(|wanted| wanted.name() != stream) {
            return;
        }
        if let Some(since) = self.options.since
            && time.parse::<Timestamp>().is_ok_and(|at| at < since)
        {
            return;
        }
        let mut line = Vec::new();
        if self.options.timestamps && !self.continued {
            line.extend(time.as_bytes());
            line.push(b' ');
        }
        line.extend(text);
        if full {
            line.push(b'\n');
        }
        self.continued = !full;
        line.truncate(self.left);
        self.left -= line.len();
        out.extend(line);
    }
}

/// Splits a record into time, stream, whether the line ends here, and text.
fn parse(record: &[u8]) -> Option<(&str, &str, bool, &[u8])> {
    let mut fields = record.splitn(4, |&b| b == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    let stream = std::str::from_utf8(fields.next()?).ok()?;
    let full = fields.next()? == b"F";
    Some((time, stream, full, fields.next()?))
}

/// Reads the records of a log, old file first, and goes on where it stopped.
#[derive(Debug)]
pub(crate) struct LogReader {
    path: PathBuf,
    file: Option<BufReader<File>>,
    partial: Vec<u8>,
    backlog: VecDeque<Vec<u8>>,
}

impl LogReader {
    /// Opens a log. With `tail`, only that many records of the end come.
    pub(crate) fn open(path: &Path, options: &LogOptions) -> io::Result<LogReader> {
        let mut reader =
            LogReader { path: path.to_path_buf(), file: None, partial: Vec::new(), backlog: VecDeque::new() };
        let mut old = Vec::new();
        match File::open(rotated(path)) {
            Ok(mut file) => {
                file.read_to_end(&mut old)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let mut file = BufReader::new(File::open(path)?);
        if let Some(lines) = options.tail_lines {
            let start = tail_start(file.get_mut(), lines, options.stream)?;
            file.seek(SeekFrom::Start(start.offset))?;
            let missing = lines.saturating_sub(start.found);
            if missing > 0 && !old.is_empty() {
                let from = tail_start(&mut io::Cursor::new(&old), missing, options.stream)?;
                old.drain(..usize::try_from(from.offset).unwrap_or(old.len()));
            } else {
                old.clear();
            }
        }
        reader.backlog.extend(old.split(|&b| b == b'\n').filter(|r| !r.is_empty()).map(<[u8]>::to_vec));
        reader.file = Some(file);
        Ok(reader)
    }

    /// The next whole record; `None` when there is no more for now.
    pub(crate) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        if let Some(record) = self.backlog.pop_front() {
            return Ok(Some(record));
        }
        loop {
            let Some(file) = &mut self.file else { return Ok(None) };
            let n = file.read_until(b'\n', &mut self.partial)?;
            if n > 0 && self.partial.ends_with(b"\n") {
                self.partial.pop();
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
            if n > 0 {
                continue;
            }
            if !self.was_rotated()? {
                return Ok(None);
            }
            self.file = Some(BufReader::new(File::open(&self.path)?));
        }
    }

    fn was_rotated(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let Some(file) = &self.file else { return Ok(false) };
        let ours = file.get_ref().metadata()?;
        match fs::metadata(&self.path) {
            Ok(current) => Ok(current.ino() != ours.ino()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
}

struct TailStart {
    offset: u64,
    found: usize,
}

/// The offset from which exactly `lines` lines of the stream remain, or 0 with the number that there are. Reads blocks from
/// the end, so that the cost follows what is asked for.
fn tail_start(file: &mut (impl Read + Seek), lines: usize, stream: Option<Stream>) -> io::Result<TailStart> {
    const BLOCK: u64 = 64 * 1024;
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(TailStart { offset: end, found: 0 });
    }
    let mut from = end;
    let mut tail: Vec<u8> = Vec::new();
    loop {
        let size = from.min(BLOCK);
        from -= size;
        file.seek(SeekFrom::Start(from))?;
        let mut block = vec![0; usize::try_from(size).unwrap_or(0)];
        file.read_exact(&mut block)?;
        block.extend(&tail);
        tail = block;
        // The first record of the block may be cut unless the file begins here.
        let mut starts = Vec::new();
        let mut offset = 0;
        let mut continued = false;
        for (i, record) in tail.split_inclusive(|&b| b == b'\n').enumerate() {
            let whole = i > 0 || from == 0;
            if whole
                && let Some((_, name, full, _)) = parse(record)
                && stream.is_none_or(|s| s.name() == name)
            {
                if !continued {
                    starts.push(offset);
                }
                continued = !full;
            }
            offset += record.len();
        }
        if starts.len() >= lines {
            let start = starts[starts.len() - lines];
            return Ok(TailStart { offset: from + start as u64, found: lines });
        }
        if from == 0 {
            return Ok(TailStart { offset: 0, found: starts.len() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn lines_become_records_and_long_ones_are_continued() {
        let mut pending = b"one\ntwo\nthr".to_vec();
        let out = take_records(&mut pending, Stream::Stdout, at(0));
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "1970-01-01T00:00:00.000000000Z stdout F one\n1970-01-01T00:00:00.000000000Z stdout F two\n"
        );
        assert_eq!(pending, b"thr");
        let mut long = vec![b'x'; MAX_RECORD_BYTES + 5];
        let out = take_records(&mut long, Stream::Stderr, at(0));
        assert!(out.starts_with(b"1970-01-01T00:00:00.000000000Z stderr P xxx"));
        assert_eq!(long.len(), 5);
    }

    fn log_with(lines: usize) -> (PathBuf, PathBuf) {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("portolan-log-{}-{n}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("0.log");
        let mut out = Vec::new();
        for i in 0..lines {
            let stream = if i % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            push_record(&mut out, stream, at(i as i64), true, format!("line {i}").as_bytes());
        }
        fs::write(&path, out).unwrap();
        (dir, path)
    }

    fn read(path: &Path, options: &LogOptions) -> String {
        let mut reader = LogReader::open(path, options).unwrap();
        let mut formatter = Formatter::new(options);
        let mut out = Vec::new();
        while let Some(record) = reader.next().unwrap() {
            formatter.push(&record, &mut out);
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn options_choose_what_is_shown() {
        let (dir, path) = log_with(5);
        let all = LogOptions::default();
        for (name, options, expected) in [
            ("all", all.clone(), "line 0\nline 1\nline 2\nline 3\nline 4\n"),
            ("tail", LogOptions { tail_lines: Some(2), ..all.clone() }, "line 3\nline 4\n"),
            (
                "more than there is",
                LogOptions { tail_lines: Some(99), ..all.clone() },
                "line 0\nline 1\nline 2\nline 3\nline 4\n",
            ),
            ("no lines", LogOptions { tail_lines: Some(0), ..all.clone() }, ""),
            ("since", LogOptions { since: Some(at(3)), ..all.clone() }, "line 3\nline 4\n"),
            ("limit", LogOptions { limit_bytes: Some(9), ..all.clone() }, "line 0\nli"),
            ("one stream", LogOptions { stream: Some(Stream::Stderr), tail_lines: Some(1), ..all.clone() }, "line 3\n"),
            (
                "times",
                LogOptions { timestamps: true, tail_lines: Some(1), ..all.clone() },
                "1970-01-01T00:00:04.000000000Z line 4\n",
            ),
        ] {
            assert_eq!(read(&path, &options), expected, "{name}");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_tail_longer_than_a_block_is_found() {
        let (dir, path) = log_with(10_000);
        let text = read(&path, &LogOptions { tail_lines: Some(5_000), ..LogOptions::default() });
        assert_eq!(text.lines().count(), 5_000);
        assert!(text.starts_with("line 5000\n"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_reader_goes_on_and_survives_rotation() {
        let (dir, path) = log_with(2);
        let options = LogOptions::default();
        let mut reader = LogReader::open(&path, &options).unwrap();
        assert!(reader.next().unwrap().is_some() && reader.next().unwrap().is_some());
        assert!(reader.next().unwrap().is_none());
        fs::rename(&path, rotated(&path)).unwrap();
        let mut record = Vec::new();
        push_record(&mut record, Stream::Stdout, at(9), true, b"after");
        fs::write(&path, record).unwrap();
        assert!(reader.next().unwrap().unwrap().ends_with(b"after"));
        assert_eq!(read(&path, &options), "line 0\nline 1\nafter\n", "a new reader sees both files");
        assert_eq!(read(&path, &LogOptions { tail_lines: Some(2), ..options }), "line 1\nafter\n");
        fs::remove_dir_all(dir).unwrap();
    }
}
