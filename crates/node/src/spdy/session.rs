//! A connection with its streams, which the client opens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::frame::{Decoder, Encoder, Frame, FrameError, Headers, PROTOCOL_ERROR, REFUSED_STREAM};

/// More streams at once are refused; a forwarded connection has two.
const MAX_STREAMS: usize = 1024;
/// Pieces of a stream that wait for whoever reads it; then the connection waits.
const QUEUE: usize = 16;
/// Answers that wait for a client that does not read; further pings are not answered.
const ANSWERS: usize = 64;
/// How long a client has to close the connection once everything is sent. If the server closed it first, a client that has
/// not taken everything in could lose the end.
const FAREWELL: Duration = Duration::from_secs(5);
const BUFFER: usize = 64 * 1024;

/// What the two sides of a stream have ended.
struct Entry {
    /// Gone when the client has sent everything.
    incoming: Option<mpsc::Sender<Bytes>>,
    reset: CancellationToken,
    finished_here: bool,
}

/// The open streams by number.
#[derive(Clone, Default)]
struct Streams(Arc<Mutex<HashMap<u32, Entry>>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a stream and forgets it if both sides have ended it.
    fn change(&self, stream: u32, change: impl FnOnce(&mut Entry)) {
        let mut streams = self.lock();
        if let Some(entry) = streams.get_mut(&stream) {
            change(entry);
            if entry.finished_here && entry.incoming.is_none() {
                streams.remove(&stream);
            }
        }
    }
}

/// A connection on which a client opens streams.
pub(crate) struct Session {
    opened: mpsc::Receiver<Stream>,
    frames: mpsc::Sender<Frame>,
    gone: CancellationToken,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Session {
    /// Starts to read from and write to a connection.
    pub(crate) fn start(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Session {
        let (read, write) = tokio::io::split(io);
        let (frames, to_write) = mpsc::channel(8);
        let (answers, to_answer) = mpsc::channel(ANSWERS);
        let (opener, opened) = mpsc::channel(8);
        let gone = CancellationToken::new();
        let receiver = Receiver {
            streams: Streams::default(),
            opener,
            frames: frames.downgrade(),
            answers,
            gone: gone.clone(),
            last: 0,
            ending: false,
        };
        let reader = tokio::spawn(receiver.run(read));
        let writer = tokio::spawn(write_frames(write, to_write, to_answer, gone.clone()));
        Session { opened, frames, gone, reader, writer }
    }

    /// The next stream that the client opens; `None` when the client is gone.
    pub(crate) async fn next(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Cancelled when the client is gone.
    pub(crate) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Ends the connection after what was sent on its streams; these must have been finished.
    pub(crate) async fn close(self) {
        // Later streams are refused.
        drop(self.opened);
        if tokio::time::timeout(FAREWELL, self.gone.cancelled()).await.is_err() {
            tracing::debug!("a client left its connection open");
        }
        self.reader.abort();
        drop(self.frames);
        let mut writer = self.writer;
        if tokio::time::timeout(FAREWELL, &mut writer).await.is_err() {
            writer.abort();
        }
    }
}

/// A stream that the client opened; accept it or refuse it.
pub(crate) struct Stream {
    headers: Headers,
    reader: Reader,
    writer: Writer,
}

impl Stream {
    pub(crate) fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Its number on the connection.
    pub(crate) fn number(&self) -> u32 {
        self.writer.stream
    }

    /// Says yes. Only then does a client take anything from the stream.
    pub(crate) async fn accept(self) -> (Reader, Writer) {
        let reply = Frame::SynReply { stream: self.writer.stream, fin: false, headers: Headers::default() };
        self.writer.put(reply).await;
        (self.reader, self.writer)
    }

    /// Says no.
    pub(crate) async fn refuse(self) {
        self.writer.put(Frame::RstStream { stream: self.writer.stream, status: REFUSED_STREAM }).await;
        self.writer.streams.change(self.writer.stream, |entry| entry.incoming = None);
    }
}

/// What the client sends on a stream.
pub(crate) struct Reader {
    incoming: mpsc::Receiver<Bytes>,
    reset: CancellationToken,
}

impl Reader {
    /// The next piece; `None` at the end, of the stream or of the connection. May be cancelled without a loss.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        tokio::select! {
            biased;
            piece = self.incoming.recv() => piece,
            () = self.reset.cancelled() => None,
        }
    }

    /// Waits until nothing of the stream can be sent any more.
    pub(crate) async fn reset(&self) {
        self.reset.cancelled().await;
    }

    /// Whether the end was not the regular one: nothing of the stream can be sent any more either.
    pub(crate) fn is_reset(&self) -> bool {
        self.reset.is_cancelled()
    }
}

/// Sends on a stream; dropping it ends this side for the connection, [`Writer::finish`] for the client too.
pub(crate) struct Writer {
    stream: u32,
    frames: mpsc::Sender<Frame>,
    reset: CancellationToken,
    streams: Streams,
}

impl Writer {
    /// Waits for a slow client. False when nobody reads the stream any more.
    pub(crate) async fn send(&self, data: Bytes) -> bool {
        self.put(Frame::Data { stream: self.stream, fin: false, data }).await
    }

    /// Says that this was all.
    pub(crate) async fn finish(self) {
        self.put(Frame::Data { stream: self.stream, fin: true, data: Bytes::new() }).await;
    }

    async fn put(&self, frame: Frame) -> bool {
        tokio::select! {
            biased;
            () = self.reset.cancelled() => false,
            sent = self.frames.send(frame) => sent.is_ok(),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.streams.change(self.stream, |entry| entry.finished_here = true);
    }
}

/// Takes frames from the client.
struct Receiver {
    streams: Streams,
    opener: mpsc::Sender<Stream>,
    /// Weak: the writer ends when nobody else has something to send.
    frames: mpsc::WeakSender<Frame>,
    answers: mpsc::Sender<Frame>,
    gone: CancellationToken,
    /// The highest stream so far.
    last: u32,
    /// The client opens no more streams.
    ending: bool,
}

impl Receiver {
    async fn run(mut self, mut read: impl AsyncRead + Unpin) {
        // Also when this task is aborted.
        let _gone = self.gone.clone().drop_guard();
        let mut decoder = Decoder::new();
        let mut input = BytesMut::with_capacity(BUFFER);
        loop {
            match read.read_buf(&mut input).await {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => return tracing::debug!(%error, "a SPDY connection ended"),
            }
            loop {
                match decoder.decode(&mut input) {
                    Ok(Some(frame)) => self.take(frame).await,
                    Ok(None) => break,
                    Err(error) => return self.give_up(&error),
                }
            }
            input.reserve(BUFFER);
        }
    }

    fn give_up(&self, error: &FrameError) {
        tracing::debug!(%error, "a SPDY client is not understood");
        self.answer(Frame::GoAway { last_stream: self.last, status: PROTOCOL_ERROR });
    }

    fn answer(&self, frame: Frame) {
        if self.answers.try_send(frame).is_err() {
            tracing::debug!("a SPDY client does not take answers");
        }
    }

    async fn take(&mut self, frame: Frame) {
        match frame {
            Frame::SynStream { stream, fin, unidirectional, headers } => {
                self.open(stream, fin, unidirectional, headers).await;
            }
            Frame::Data { stream, fin, data } => {
                let incoming = self.streams.lock().get(&stream).and_then(|entry| entry.incoming.clone());
                if let Some(incoming) = incoming
                    && !data.is_empty()
                {
                    // An error means that nobody reads it: the rest of the stream is dropped as it comes.
                    let _ = incoming.send(data).await;
                }
                if fin {
                    self.streams.change(stream, |entry| entry.incoming = None);
                }
            }
            Frame::Headers { stream, fin, .. } => {
                if fin {
                    self.streams.change(stream, |entry| entry.incoming = None);
                }
            }
            Frame::RstStream { stream, .. } => self.streams.change(stream, |entry| {
                entry.reset.cancel();
                entry.incoming = None;
                entry.finished_here = true;
            }),
            // Even numbers are those of a server, and this one sends none.
            Frame::Ping { id } => {
                if id % 2 == 1 {
                    self.answer(Frame::Ping { id });
                }
            }
            Frame::GoAway { .. } => self.ending = true,
            // The server opens no streams that could be answered.
            Frame::SynReply { .. } => {}
        }
    }

    async fn open(&mut self, stream: u32, fin: bool, unidirectional: bool, headers: Headers) {
        let reset = |status| Frame::RstStream { stream, status };
        // A client's streams are odd and count up (section 2.3.2).
        if stream.is_multiple_of(2) || stream <= self.last || unidirectional {
            return self.answer(reset(PROTOCOL_ERROR));
        }
        self.last = stream;
        let Some(frames) = self.frames.upgrade() else { return };
        let full = self.streams.lock().len() >= MAX_STREAMS;
        if self.ending || full || self.opener.is_closed() {
            return self.answer(reset(REFUSED_STREAM));
        }
        let (sender, incoming) = mpsc::channel(QUEUE);
        let token = self.gone.child_token();
        let entry = Entry { incoming: (!fin).then_some(sender), reset: token.clone(), finished_here: false };
        self.streams.lock().insert(stream, entry);
        let opened = Stream {
            headers,
            reader: Reader { incoming, reset: token.clone() },
            writer: Writer { stream, frames, reset: token, streams: self.streams.clone() },
        };
        if let Err(refused) = self.opener.send(opened).await {
            drop(refused);
            self.streams.change(stream, |entry| entry.incoming = None);
            self.answer(reset(REFUSED_STREAM));
        }
    }
}

/// Writes frames until nobody has any, answers first.
async fn write_frames(
    mut write: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Frame>,
    mut answers: mpsc::Receiver<Frame>,
    gone: CancellationToken,
) {
    let mut encoder = Encoder::new();
    let mut out = BytesMut::new();
    loop {
        let frame = tokio::select! {
            biased;
            Some(answer) = answers.recv() => answer,
            frame = frames.recv() => match frame {
                Some(frame) => frame,
                None => break,
            },
        };
        encoder.encode(&frame, &mut out);
        while out.len() < BUFFER
            && let Ok(frame) = answers.try_recv().or_else(|_| frames.try_recv())
        {
            encoder.encode(&frame, &mut out);
        }
        let written = async {
            write.write_all(&out).await?;
            write.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "a SPDY connection cannot be written to");
            // Whoever sends on a stream learns that it is in vain.
            gone.cancel();
            break;
        }
        out.clear();
    }
    let _ = write.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::DuplexStream;

    /// A client by hand.
    struct Client {
        io: DuplexStream,
        encoder: Encoder,
        decoder: Decoder,
        input: BytesMut,
    }

    impl Client {
        fn connect() -> (Client, Session) {
            let (io, server) = tokio::io::duplex(4096);
            let client = Client { io, encoder: Encoder::new(), decoder: Decoder::new(), input: BytesMut::new() };
            (client, Session::start(server))
        }

        async fn send(&mut self, frame: Frame) {
            let mut bytes = BytesMut::new();
            self.encoder.encode(&frame, &mut bytes);
            self.io.write_all(&bytes).await.unwrap();
        }

        async fn open(&mut self, stream: u32) {
            let headers = [("streamType", "data")].into_iter().collect();
            self.send(Frame::SynStream { stream, fin: false, unidirectional: false, headers }).await;
        }

        /// The next frame, `None` at the end of the connection.
        async fn next(&mut self) -> Option<Frame> {
            let next = async {
                loop {
                    if let Some(frame) = self.decoder.decode(&mut self.input).unwrap() {
                        return Some(frame);
                    }
                    if self.io.read_buf(&mut self.input).await.unwrap() == 0 {
                        return None;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(5), next).await.expect("the server answers")
        }
    }

    fn data(stream: u32, fin: bool, text: &'static str) -> Frame {
        Frame::Data { stream, fin, data: Bytes::from_static(text.as_bytes()) }
    }

    #[tokio::test]
    async fn a_stream_carries_data_both_ways() {
        let (mut client, mut session) = Client::connect();
        client.open(1).await;
        client.send(data(1, false, "hel")).await;
        client.send(data(1, true, "lo")).await;
        let stream = session.next().await.unwrap();
        assert_eq!((stream.headers().get("streamtype"), stream.number()), (Some("data"), 1));
        let (mut reader, writer) = stream.accept().await;
        assert_eq!(reader.next().await.as_deref(), Some(&b"hel"[..]));
        assert_eq!(reader.next().await.as_deref(), Some(&b"lo"[..]));
        assert_eq!((reader.next().await, reader.is_reset()), (None, false));
        assert!(writer.send(Bytes::from_static(b"bye")).await);
        writer.finish().await;
        assert!(matches!(client.next().await, Some(Frame::SynReply { stream: 1, .. })));
        assert_eq!(client.next().await, Some(data(1, false, "bye")));
        assert_eq!(client.next().await, Some(data(1, true, "")));
        client.send(Frame::Ping { id: 9 }).await;
        assert_eq!(client.next().await, Some(Frame::Ping { id: 9 }));
        // The session waits for its client, and ends when it is gone.
        let closing = tokio::spawn(session.close());
        drop(client);
        tokio::time::timeout(Duration::from_secs(5), closing).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn wrong_streams_are_reset_and_do_no_harm() {
        let (mut client, mut session) = Client::connect();
        client.open(3).await;
        let (mut reader, writer) = session.next().await.unwrap().accept().await;
        assert!(matches!(client.next().await, Some(Frame::SynReply { stream: 3, .. })));
        for wrong in [2, 1, 3] {
            client.open(wrong).await;
            assert_eq!(client.next().await, Some(Frame::RstStream { stream: wrong, status: PROTOCOL_ERROR }));
        }
        client.send(data(77, false, "to nobody")).await;
        client.open(5).await;
        session.next().await.unwrap().refuse().await;
        assert_eq!(client.next().await, Some(Frame::RstStream { stream: 5, status: REFUSED_STREAM }));
        client.send(data(5, true, "in vain")).await;
        client.send(Frame::RstStream { stream: 3, status: 5 }).await;
        assert_eq!((reader.next().await, reader.is_reset()), (None, true));
        assert!(!writer.send(Bytes::from_static(b"x")).await);
        client.send(Frame::GoAway { last_stream: 0, status: 0 }).await;
        client.open(7).await;
        assert_eq!(client.next().await, Some(Frame::RstStream { stream: 7, status: REFUSED_STREAM }));
    }

    #[tokio::test]
    async fn a_client_that_opens_streams_without_end_is_stopped() {
        let (mut client, mut session) = Client::connect();
        let kept = tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Some(stream) = session.next().await {
                kept.push(stream);
            }
            kept.len()
        });
        let most = u32::try_from(MAX_STREAMS).unwrap();
        for i in 0..=most {
            client.open(2 * i + 1).await;
        }
        let refused = Frame::RstStream { stream: 2 * most + 1, status: REFUSED_STREAM };
        assert_eq!(client.next().await, Some(refused));
        drop(client);
        assert_eq!(kept.await.unwrap(), MAX_STREAMS);
    }

    #[tokio::test]
    async fn what_is_not_spdy_ends_the_connection_and_its_streams() {
        let (mut client, mut session) = Client::connect();
        client.open(1).await;
        let (mut reader, writer) = session.next().await.unwrap().accept().await;
        assert!(matches!(client.next().await, Some(Frame::SynReply { stream: 1, .. })));
        client.io.write_all(b"\x80GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert_eq!(client.next().await, Some(Frame::GoAway { last_stream: 1, status: PROTOCOL_ERROR }));
        assert_eq!((reader.next().await, reader.is_reset()), (None, true));
        assert!(!writer.send(Bytes::from_static(b"x")).await);
        assert!(session.next().await.is_none() && session.gone().is_cancelled());
        drop(writer);
        session.close().await;
        assert_eq!(client.next().await, None);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_up_the_sender_only() {
        let (mut client, mut session) = Client::connect();
        client.open(1).await;
        let (mut reader, writer) = session.next().await.unwrap().accept().await;
        let sending = tokio::spawn(async move {
            let piece = Bytes::from(vec![b'x'; 32 * 1024]);
            for _ in 0..32 {
                assert!(writer.send(piece.clone()).await);
            }
            writer.finish().await;
        });
        client.send(data(1, false, "still heard")).await;
        assert_eq!(reader.next().await.as_deref(), Some(&b"still heard"[..]));
        assert!(!sending.is_finished());
        let mut seen = 0;
        loop {
            match client.next().await {
                Some(Frame::Data { data, fin, .. }) => {
                    seen += data.len();
                    if fin {
                        break;
                    }
                }
                Some(Frame::SynReply { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen, 32 * 32 * 1024);
        sending.await.unwrap();
    }
}
