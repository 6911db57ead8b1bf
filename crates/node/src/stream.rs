//! exec, attach and port-forward, over WebSocket or SPDY.
//!
//! Source: Kubernetes "streaming protocols" (`v4.channel.k8s.io`, `v5.channel.k8s.io`, KEP-4006). On a WebSocket the first byte
//! of a message is its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final Status, 4 terminal size, 255 (v5) the closing of another
//! channel. On SPDY each channel is a stream that the client opens, named by its header `streamType`.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{Message, handshake::derive_accept_key};

use crate::container::{self, ConsoleSocket, OUTPUT_GRACE, Running, Terminal};
use crate::kubelet::NodeContext;
use crate::log::Stream;
use crate::sandbox::Sandbox;
use crate::server::{Body, Query, Refusal, wants_spdy, wants_websocket};
use crate::spdy::session::{Reader, Session, Stream as SpdyStream, Writer};

/// Protocols of exec and attach on a WebSocket, best first.
const CHANNELS: &[&str] =
    &["v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io", "v4.base64.channel.k8s.io", "base64.channel.k8s.io"];
/// The same on SPDY; what is new in v5 is for WebSockets.
const SPDY_CHANNELS: &[&str] = &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const SPDY_PORT_FORWARD: &[&str] = &["portforward.k8s.io"];
/// A SPDY connection inside the messages of a WebSocket, as kubectl since 1.31 forwards ports (KEP-4006).
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Names the protocol on SPDY, in the request and in the answer.
const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// Lists what the server knows when it knows none of a client's protocols.
const ACCEPTED_VERSIONS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// Larger messages from a client are refused; clients send 32 KiB at most.
const MAX_MESSAGE: usize = 1 << 20;
const BUFFER: usize = 32 * 1024;
/// How long a client has to open the streams that belong together.
const STREAM_CREATION: Duration = Duration::from_secs(30);
/// More connections at once through one port-forward are refused.
const MAX_FORWARDED: usize = 512;

pub(crate) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// What the client wants connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl StreamOptions {
    pub(crate) fn from_query(query: &Query) -> StreamOptions {
        let tty = query.on(&["tty"]);
        StreamOptions {
            stdin: query.on(&["input", "stdin"]),
            stdout: query.on(&["output", "stdout"]),
            // A terminal has one output.
            stderr: query.on(&["error", "stderr"]) && !tty,
            tty,
        }
    }
}

/// Which encoding the client chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protocol {
    base64: bool,
    /// Whether the final Status is JSON (v4 and later) or an error text.
    status_json: bool,
    /// Whether a terminal's size is sent (on SPDY since v3).
    resize: bool,
}

impl Protocol {
    fn named(name: &str) -> Protocol {
        let status_json = ["v4.", "v5."].iter().any(|version| name.starts_with(version));
        Protocol { base64: name.contains("base64"), status_json, resize: status_json || name.starts_with("v3.") }
    }

    fn message(self, channel: u8, data: &[u8]) -> Message {
        if self.base64 {
            let text = base64::engine::general_purpose::STANDARD.encode(data);
            return Message::text(format!("{channel}{text}"));
        }
        let mut bytes = Vec::with_capacity(data.len() + 1);
        bytes.push(channel);
        bytes.extend_from_slice(data);
        Message::binary(bytes)
    }

    /// The channel and content of a message; `None` for what is not data.
    fn parse(self, message: Message) -> Option<(u8, Bytes)> {
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => Bytes::from(text),
            _ => return None,
        };
        let first = *bytes.first()?;
        let rest = bytes.slice(1..);
        if self.base64 {
            let data = base64::engine::general_purpose::STANDARD.decode(&rest).ok()?;
            return Some((first.checked_sub(b'0')?, data.into()));
        }
        Some((first, rest))
    }
}

/// Answers the handshake of a client of exec or attach and runs `work` for it.
pub(crate) fn connect<F>(
    request: Request<Incoming>,
    options: StreamOptions,
    work: impl FnOnce(Client) -> F + Send + 'static,
) -> Result<Response<Body>, Refusal>
where
    F: Future<Output = ()> + Send,
{
    if !wants_spdy(request.headers()) {
        return upgrade(request, CHANNELS, move |socket, protocol| work(Client::on_websocket(socket, protocol)));
    }
    upgrade_spdy(request, SPDY_CHANNELS, move |session, protocol| async move {
        match tokio::time::timeout(STREAM_CREATION, open_channels(session, options, protocol)).await {
            Ok(Some((session, channels))) => work(Client::on_spdy(session, channels, protocol)).await,
            Ok(None) => tracing::debug!("a client went away before it had opened its streams"),
            Err(_) => tracing::debug!("a client did not open its streams in time"),
        }
    })
}

/// Answers a SPDY handshake and runs `work` on the connection.
fn upgrade_spdy<F>(
    mut request: Request<Incoming>,
    protocols: &[&'static str],
    work: impl FnOnce(Session, Protocol) -> F + Send + 'static,
) -> Result<Response<Body>, Refusal>
where
    F: Future<Output = ()> + Send,
{
    let offered = list(&request, PROTOCOL_VERSION);
    // The client's order is its preference; one that offers nothing speaks the oldest form.
    let chosen = if offered.is_empty() {
        protocols.last().copied()
    } else {
        offered.iter().find_map(|offer| protocols.iter().find(|p| *p == offer).copied())
    };
    let Some(chosen) = chosen else {
        let text = format!(
            "unable to upgrade: unable to negotiate protocol: client supports [{}], server accepts [{}]",
            offered.join(" "),
            protocols.join(" ")
        );
        let mut response = Response::new(Full::new(Bytes::from(text)).boxed());
        *response.status_mut() = StatusCode::FORBIDDEN;
        for protocol in protocols {
            response.headers_mut().append(ACCEPTED_VERSIONS, HeaderValue::from_static(protocol));
        }
        return Ok(response);
    };
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrading.await {
            Ok(upgraded) => work(Session::start(TokioIo::new(upgraded)), Protocol::named(chosen)).await,
            Err(error) => tracing::debug!(%error, "upgrade failed"),
        }
    });
    let mut response = Response::new(Empty::new().boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    headers.insert(PROTOCOL_VERSION, HeaderValue::from_static(chosen));
    Ok(response)
}

/// The streams of an exec or attach, by channel.
type Channels = [Option<(Reader, Writer)>; 5];

/// Which channels a client of these options opens.
fn expected_channels(options: StreamOptions, protocol: Protocol) -> [bool; 5] {
    [options.stdin, options.stdout, options.stderr, true, options.tty && protocol.resize]
}

fn channel_named(name: &str) -> Option<u8> {
    match name {
        "stdin" => Some(STDIN),
        "stdout" => Some(STDOUT),
        "stderr" => Some(STDERR),
        "error" => Some(ERROR),
        "resize" => Some(RESIZE),
        _ => None,
    }
}

/// Accepts the expected streams and refuses others; `None` when the client goes away.
async fn open_channels(
    mut session: Session,
    options: StreamOptions,
    protocol: Protocol,
) -> Option<(Session, Channels)> {
    let expected = expected_channels(options, protocol);
    let mut channels = Channels::default();
    while expected.iter().zip(&channels).any(|(expected, channel)| *expected && channel.is_none()) {
        let stream = session.next().await?;
        let index = stream.headers().get("streamtype").and_then(channel_named).map(usize::from);
        match index.filter(|i| expected[*i] && channels[*i].is_none()) {
            Some(i) => channels[i] = Some(stream.accept().await),
            None => {
                tracing::debug!(headers = ?stream.headers(), "a stream that does not belong here is refused");
                stream.refuse().await;
            }
        }
    }
    Some((session, channels))
}

/// What a client says.
enum Said {
    Input(Bytes),
    EndOfInput,
    Window(u16, u16),
}

/// Where it says it.
enum Source {
    WebSocket(SplitStream<Socket>, Protocol),
    Spdy { input: Option<Reader>, sizes: Option<Reader>, size: Vec<u8>, gone: tokio_util::sync::CancellationToken },
}

impl Source {
    /// What comes next; `None` when the client is gone.
    async fn next(&mut self) -> Option<Said> {
        match self {
            Source::WebSocket(source, protocol) => loop {
                let message = source.next().await?.ok()?;
                if matches!(message, Message::Close(_)) {
                    return None;
                }
                let Some((channel, data)) = protocol.parse(message) else { continue };
                match channel {
                    STDIN => return Some(Said::Input(data)),
                    RESIZE => {
                        if let Some((columns, rows)) = window(&data) {
                            return Some(Said::Window(columns, rows));
                        }
                    }
                    // Only the input can be closed by a client.
                    CLOSE if data.first() == Some(&STDIN) => return Some(Said::EndOfInput),
                    _ => {}
                }
            },
            Source::Spdy { input, sizes, size, gone } => loop {
                tokio::select! {
                    biased;
                    Some(piece) = next_piece(sizes) => match piece {
                        Some(piece) => if let Some((columns, rows)) = last_window(size, &piece) {
                            return Some(Said::Window(columns, rows));
                        },
                        None => *sizes = None,
                    },
                    Some(piece) = next_piece(input) => match piece {
                        Some(piece) => return Some(Said::Input(piece)),
                        None => {
                            *input = None;
                            if !gone.is_cancelled() {
                                return Some(Said::EndOfInput);
                            }
                        }
                    },
                    () = gone.cancelled() => return None,
                }
            },
        }
    }
}

/// `None` if there is no such stream, and `Some(None)` when it has ended.
async fn next_piece(reader: &mut Option<Reader>) -> Option<Option<Bytes>> {
    match reader {
        Some(reader) => Some(reader.next().await),
        None => None,
    }
}

/// Adds to a stream of JSON objects and takes out the last whole terminal size.
fn last_window(pending: &mut Vec<u8>, piece: &[u8]) -> Option<(u16, u16)> {
    pending.extend_from_slice(piece);
    let mut objects = serde_json::Deserializer::from_slice(pending).into_iter::<Value>();
    let mut last = None;
    let mut broken = false;
    let mut taken = 0;
    while let Some(object) = objects.next() {
        match object {
            Ok(size) => {
                last = window_of(&size).or(last);
                taken = objects.byte_offset();
            }
            Err(error) => {
                broken = !error.is_eof();
                break;
            }
        }
    }
    // What can never become a size is dropped.
    if broken || pending.len() - taken > 4096 {
        pending.clear();
    } else {
        pending.drain(..taken);
    }
    last
}

/// Somebody to whom a command or a container is connected, whatever the transport.
pub(crate) struct Client {
    source: Source,
    out: Outgoing,
    writer: JoinHandle<()>,
}

impl Client {
    fn on_websocket(socket: Socket, protocol: Protocol) -> Client {
        let (sink, source) = socket.split();
        let (out, writer) = Outgoing::start(sink, protocol);
        Client { source: Source::WebSocket(source, protocol), out, writer }
    }

    fn on_spdy(session: Session, channels: Channels, protocol: Protocol) -> Client {
        let (readers, writers): (Vec<_>, Vec<_>) =
            channels.into_iter().map(|channel| channel.map_or((None, None), |(r, w)| (Some(r), Some(w)))).unzip();
        let mut readers = readers.into_iter();
        let (input, sizes) = (readers.next().flatten(), readers.last().flatten());
        let source = Source::Spdy { input, sizes, size: Vec::new(), gone: session.gone() };
        let (sender, mut receiver) = mpsc::channel::<(u8, Bytes)>(8);
        let writer = tokio::spawn(async move {
            while let Some((channel, data)) = receiver.recv().await {
                if let Some(Some(writer)) = writers.get(usize::from(channel)) {
                    writer.send(data).await;
                }
            }
            for writer in writers.into_iter().flatten() {
                writer.finish().await;
            }
            session.close().await;
        });
        Client { source, out: Outgoing { sender, protocol }, writer }
    }
}

/// Answers a WebSocket handshake and runs `work` on the socket.
fn upgrade<F>(
    mut request: Request<Incoming>,
    protocols: &[&'static str],
    work: impl FnOnce(Socket, Protocol) -> F + Send + 'static,
) -> Result<Response<Body>, Refusal>
where
    F: Future<Output = ()> + Send,
{
    if !wants_websocket(request.headers()) {
        return Err(Refusal::bad_request("Upgrade request required"));
    }
    let key =
        request.headers().get(SEC_WEBSOCKET_KEY).ok_or_else(|| Refusal::bad_request("Sec-WebSocket-Key is missing"))?;
    let accept = derive_accept_key(key.as_bytes());
    let offered: Vec<String> = list(&request, SEC_WEBSOCKET_PROTOCOL);
    // A client that offers nothing speaks the oldest form.
    let chosen = if offered.is_empty() {
        None
    } else {
        let found = protocols.iter().find(|p| offered.iter().any(|o| o == *p));
        Some(*found.ok_or_else(|| {
            Refusal::bad_request(format!("none of the offered protocols is supported: {}", offered.join(", ")))
        })?)
    };
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrading.await {
            Ok(upgraded) => {
                let config =
                    WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
                let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
                work(socket, Protocol::named(chosen.unwrap_or("channel.k8s.io"))).await;
            }
            Err(error) => tracing::debug!(%error, "upgrade failed"),
        }
    });
    let mut response = Response::new(Empty::new().boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_str(&accept).map_err(|e| Refusal::internal(e.to_string()))?);
    if let Some(chosen) = chosen {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(chosen));
    }
    Ok(response)
}

fn list(request: &Request<Incoming>, name: HeaderName) -> Vec<String> {
    let values = request.headers().get_all(name);
    let parts = values.iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    parts.map(|p| p.trim().to_string()).filter(|p| !p.is_empty()).collect()
}

/// Sends to the channels of a client from several tasks. Full means that the client is slow, and the container waits.
#[derive(Clone)]
struct Outgoing {
    sender: mpsc::Sender<(u8, Bytes)>,
    protocol: Protocol,
}

impl Outgoing {
    /// Starts the task that writes; it ends when all senders are gone or the client is.
    fn start(mut sink: SplitSink<Socket, Message>, protocol: Protocol) -> (Outgoing, JoinHandle<()>) {
        let (sender, mut receiver) = mpsc::channel::<(u8, Bytes)>(8);
        let task = tokio::spawn(async move {
            while let Some((channel, data)) = receiver.recv().await {
                if sink.send(protocol.message(channel, &data)).await.is_err() {
                    return;
                }
            }
            let close = CloseFrame { code: CloseCode::Normal, reason: "".into() };
            let _ = sink.send(Message::Close(Some(close))).await;
            let _ = sink.close().await;
        });
        (Outgoing { sender, protocol }, task)
    }

    async fn send(&self, channel: u8, data: &[u8]) -> bool {
        self.sender.send((channel, Bytes::copy_from_slice(data))).await.is_ok()
    }

    async fn copy(&self, channel: u8, stream: Option<impl AsyncRead + Unpin>) {
        let Some(mut stream) = stream else { return };
        let mut buffer = vec![0; BUFFER];
        while let Ok(n) = stream.read(&mut buffer).await {
            if n == 0 || !self.send(channel, &buffer[..n]).await {
                break;
            }
        }
    }

    async fn finish(&self, result: &Result<i32, String>) {
        let status = final_status(result);
        if self.protocol.status_json {
            self.send(ERROR, status.to_string().as_bytes()).await;
        } else if let Some(message) = status["message"].as_str() {
            self.send(ERROR, message.as_bytes()).await;
        }
    }
}

/// The Status that ends an exec.
fn final_status(result: &Result<i32, String>) -> Value {
    match result {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(reason) => json!({
            "metadata": {}, "status": "Failure", "reason": "InternalError",
            "message": format!("Internal error occurred: error executing command in container: {reason}"),
            "details": {"causes": [{"message": format!("error executing command in container: {reason}")}]},
            "code": 500,
        }),
    }
}

/// Where a client's input goes.
enum Input {
    Pipe(Box<dyn tokio::io::AsyncWrite + Send + Unpin>),
    Terminal(Terminal),
    None,
}

/// Passes on what the client says until it goes away.
async fn take_input(mut source: Source, mut input: Input, terminal: Option<Terminal>) {
    while let Some(said) = source.next().await {
        match said {
            Said::Input(data) => match &mut input {
                Input::Pipe(pipe) => {
                    if pipe.write_all(&data).await.is_err() || pipe.flush().await.is_err() {
                        // The program does not read any more; it may still run and print.
                        input = Input::None;
                    }
                }
                Input::Terminal(terminal) => {
                    let _ = terminal.write_all(&data).await;
                }
                Input::None => {}
            },
            Said::Window(columns, rows) => {
                if let Some(terminal) = &terminal {
                    terminal.resize(columns, rows);
                }
            }
            Said::EndOfInput => {
                if let Input::Terminal(terminal) = &input {
                    // End of file is a key on a terminal.
                    let _ = terminal.write_all(&[4]).await;
                }
                input = Input::None;
            }
        }
    }
}

fn window(data: &[u8]) -> Option<(u16, u16)> {
    window_of(&serde_json::from_slice(data).ok()?)
}

fn window_of(size: &Value) -> Option<(u16, u16)> {
    let get = |name: &str| size.get(name).and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok());
    Some((get("Width")?, get("Height")?))
}

/// Runs a command in a container for a client.
pub(crate) async fn exec(
    context: Arc<NodeContext>,
    run: Arc<Running>,
    command: Vec<String>,
    options: StreamOptions,
    client: Client,
) {
    let Client { source, out, writer } = client;
    let result = run_command(&context, &run, &command, options, source, &out).await;
    if let Some(result) = result {
        out.finish(&result).await;
    }
    drop(out);
    let _ = tokio::time::timeout(Duration::from_secs(10), writer).await;
}

/// The exit code, or why it could not be run; `None` when the client went away.
async fn run_command(
    context: &NodeContext,
    run: &Running,
    command: &[String],
    options: StreamOptions,
    source: Source,
    out: &Outgoing,
) -> Option<Result<i32, String>> {
    let console = if options.tty {
        let key = uuid::Uuid::new_v4().simple().to_string();
        match ConsoleSocket::bind(context.socket_path(&key)) {
            Ok(socket) => Some(socket),
            Err(e) => return Some(Err(format!("cannot make a terminal: {e}"))),
        }
    } else {
        None
    };
    let path = console.as_ref().map(ConsoleSocket::path);
    let started = container::exec(context, run, command, options.stdin, options.stdout, options.stderr, path);
    let mut exec = match started {
        Ok(exec) => exec,
        Err(e) => return Some(Err(e.to_string())),
    };
    if let Some(console) = console {
        let terminal = tokio::select! {
            terminal = console.receive() => terminal,
            ended = exec.wait() => return Some(ended.and_then(|code| Err(format!("it ended with code {code} before it had a terminal")))),
        };
        let terminal = match terminal {
            Ok(terminal) => terminal,
            Err(e) => return Some(Err(format!("cannot get a terminal: {e}"))),
        };
        let input = if options.stdin { Input::Terminal(terminal.clone()) } else { Input::None };
        let reader = terminal.clone();
        let output = async {
            let mut buffer = vec![0; BUFFER];
            while let Ok(n) = reader.read(&mut buffer).await {
                if n == 0 || !out.send(STDOUT, &buffer[..n]).await {
                    break;
                }
            }
        };
        return attend(&mut exec, output, take_input(source, input, Some(terminal))).await;
    }
    let input = match exec.child.stdin.take() {
        Some(stdin) => Input::Pipe(Box::new(stdin)),
        None => Input::None,
    };
    let (stdout, stderr) = (exec.child.stdout.take(), exec.child.stderr.take());
    let output = async { tokio::join!(out.copy(STDOUT, stdout), out.copy(STDERR, stderr)) };
    attend(&mut exec, output, take_input(source, input, None)).await
}

/// Moves data both ways until the command ends or the client goes away.
async fn attend<T>(
    exec: &mut container::Exec,
    output: impl Future<Output = T>,
    input: impl Future<Output = ()>,
) -> Option<Result<i32, String>> {
    tokio::pin!(output, input);
    let mut output_open = true;
    let ended = loop {
        tokio::select! {
            ended = exec.wait() => break ended,
            _ = output.as_mut(), if output_open => output_open = false,
            () = input.as_mut() => {
                exec.kill();
                return None;
            }
        }
    };
    if output_open {
        // What the command printed last; a process that it left behind may hold the stream open for ever.
        let _ = tokio::time::timeout(OUTPUT_GRACE, output).await;
    }
    Some(ended)
}

/// Connects a client to the main process of a container.
pub(crate) async fn attach(run: Arc<Running>, stdin_once: bool, options: StreamOptions, client: Client) {
    let mut live = run.sink.subscribe();
    let Client { source, out, writer } = client;
    let mut pipe = options.stdin.then(|| container::take_stdin(&run)).flatten();
    // With stdinOnce the end of this client's input is the end of the container's: no other copy may stay open.
    let own = if stdin_once { pipe.take() } else { pipe.as_ref().and_then(|fd| fd.try_clone().ok()) };
    let input = match (&run.terminal, own) {
        (Some(terminal), _) if options.stdin => Input::Terminal(terminal.clone()),
        (_, Some(copy)) => pipe_sender(copy).map_or(Input::None, |sender| Input::Pipe(Box::new(sender))),
        _ => Input::None,
    };
    let terminal = run.terminal.clone();
    let sender = out.clone();
    let mut output = Box::pin(async move {
        loop {
            match live.recv().await {
                Ok((Stream::Stdout, data)) if options.stdout => {
                    if !sender.send(STDOUT, &data).await {
                        break;
                    }
                }
                Ok((Stream::Stderr, data)) if options.stderr => {
                    if !sender.send(STDERR, &data).await {
                        break;
                    }
                }
                // Too slow: what was missed is in the log.
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => break,
            }
        }
    });
    let input = take_input(source, input, terminal);
    let ended = tokio::select! {
        () = run.gone.cancelled() => true,
        () = output.as_mut() => false,
        () = input => false,
    };
    if let Some(fd) = pipe {
        container::return_stdin(&run, fd);
    }
    if ended {
        let mut progress = run.sink.progress();
        let rest = async {
            tokio::select! {
                () = output.as_mut() => {}
                _ = async {
                    let _ = progress.wait_for(|p| p.closed).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                } => {}
            }
        };
        let _ = tokio::time::timeout(OUTPUT_GRACE, rest).await;
        out.finish(&Ok(0)).await;
    }
    drop(output);
    drop(out);
    let _ = tokio::time::timeout(Duration::from_secs(10), writer).await;
}

fn pipe_sender(fd: OwnedFd) -> Option<tokio::net::unix::pipe::Sender> {
    tokio::net::unix::pipe::Sender::from_owned_fd(fd).ok()
}

/// Connects inside the pod to its loopback address, as `kubectl port-forward` does.
async fn dial_inside(sandbox: &Sandbox, port: u16) -> std::io::Result<tokio::net::TcpStream> {
    let mut last = None;
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        match crate::probe::connect(&sandbox.netns, SocketAddr::new(ip, port)).await {
            Ok(stream) => return Ok(stream),
            Err(e) => last = last.or(Some(e)),
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other("no address")))
}

/// Port-forward. On a WebSocket channel 2i is the data of the i-th port of the query and 2i+1 its error; on SPDY the client opens
/// a pair of streams for each connection that it forwards.
pub(crate) fn port_forward(
    request: Request<Incoming>,
    sandbox: Sandbox,
    pod: String,
    query: &Query,
) -> Result<Response<Body>, Refusal> {
    if wants_spdy(request.headers()) {
        return upgrade_spdy(request, SPDY_PORT_FORWARD, move |session, _| forward_pairs(sandbox, pod, session));
    }
    if list(&request, SEC_WEBSOCKET_PROTOCOL).iter().any(|offer| offer == TUNNEL) {
        return upgrade(request, &[TUNNEL], move |socket, _| async move {
            let (inside, outside) = tokio::io::duplex(2 * BUFFER);
            tokio::join!(tunnel(socket, outside), forward_pairs(sandbox, pod, Session::start(inside)));
        });
    }
    let mut ports = Vec::new();
    for text in query.all("ports").chain(query.all("port")).flat_map(|list| list.split(',')) {
        let port = text.trim().parse::<u16>().ok().filter(|p| *p > 0);
        ports.push(port.ok_or_else(|| Refusal::bad_request(format!("invalid port {text:?}")))?);
    }
    if ports.is_empty() {
        return Err(Refusal::bad_request("at least one port must be given in query parameter ports"));
    }
    if ports.len() > 127 {
        return Err(Refusal::bad_request("at most 127 ports can be forwarded on one connection"));
    }
    upgrade(request, &["v5.channel.k8s.io", "v4.channel.k8s.io", "portforward.k8s.io"], move |socket, protocol| {
        forward(sandbox, ports, socket, protocol)
    })
}

async fn forward(sandbox: Sandbox, ports: Vec<u16>, socket: Socket, protocol: Protocol) {
    let (sink, mut source) = socket.split();
    let (out, writer) = Outgoing::start(sink, protocol);
    // Each channel begins with its port, so that a client can check the order.
    for (i, port) in (0u8..).zip(&ports) {
        for channel in [2 * i, 2 * i + 1] {
            out.send(channel, &port.to_le_bytes()).await;
        }
    }
    let mut tasks = tokio::task::JoinSet::new();
    let mut senders: Vec<Option<mpsc::Sender<Bytes>>> = Vec::new();
    for (i, port) in (0u8..).zip(&ports) {
        let (sender, receiver) = mpsc::channel(8);
        senders.push(Some(sender));
        tasks.spawn(forward_one(sandbox.clone(), *port, i, receiver, out.clone()));
    }
    drop(out);
    loop {
        tokio::select! {
            message = source.next() => {
                let Some(Ok(message)) = message else { break };
                if matches!(message, Message::Close(_)) {
                    break;
                }
                let Some((channel, data)) = protocol.parse(message) else { continue };
                if channel == CLOSE {
                    if let Some(sender) = data.first().and_then(|c| senders.get_mut(usize::from(c / 2))) {
                        *sender = None;
                    }
                    continue;
                }
                if channel % 2 == 1 {
                    continue;
                }
                if let Some(Some(sender)) = senders.get(usize::from(channel / 2)) {
                    // The client's data waits for the slowest of its ports, as one connection must.
                    let _ = sender.send(data).await;
                }
            }
            done = tasks.join_next() => if done.is_none() { break },
        }
    }
    senders.clear();
    tasks.shutdown().await;
    let _ = tokio::time::timeout(Duration::from_secs(10), writer).await;
}

async fn forward_one(sandbox: Sandbox, port: u16, index: u8, mut incoming: mpsc::Receiver<Bytes>, out: Outgoing) {
    let stream = match dial_inside(&sandbox, port).await {
        Ok(stream) => stream,
        Err(e) => {
            let text = format!("failed to connect to localhost:{port} inside the pod: {e}");
            out.send(2 * index + 1, text.as_bytes()).await;
            return;
        }
    };
    let (read, mut write) = stream.into_split();
    let up = async {
        while let Some(data) = incoming.recv().await {
            if write.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = out.copy(2 * index, Some(read)) => {}
        () = up => {}
    }
}

/// Carries a connection in the binary messages of a WebSocket, whose boundaries mean nothing.
async fn tunnel(socket: Socket, io: tokio::io::DuplexStream) {
    let (mut sink, mut source) = socket.split();
    let (mut read, mut write) = tokio::io::split(io);
    let up = async {
        while let Some(Ok(message)) = source.next().await {
            let data = match message {
                Message::Binary(data) => data,
                Message::Close(_) => break,
                _ => continue,
            };
            if write.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    let down = async {
        let mut buffer = vec![0; BUFFER];
        while let Ok(n) = read.read(&mut buffer).await {
            if n == 0 || sink.send(Message::binary(buffer[..n].to_vec())).await.is_err() {
                break;
            }
        }
        let close = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        let _ = sink.send(Message::Close(Some(close))).await;
        let _ = sink.close().await;
    };
    tokio::pin!(up, down);
    tokio::select! {
        () = &mut up => down.await,
        // The client's own Close, which it may not send.
        () = &mut down => drop(tokio::time::timeout(Duration::from_secs(1), up).await),
    }
}

/// Whether a stream of a port-forward carries data or errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PairPart {
    Data,
    Error,
}

/// What the headers of a stream of a port-forward say: which half of which pair it is, and the port.
///
/// Clients that send no `requestID` open the error stream directly before the data stream, so that their numbers tell.
fn pair_part(
    stream_type: Option<&str>,
    port: Option<&str>,
    request: Option<&str>,
    number: u32,
) -> Result<(PairPart, String, u16), String> {
    let port = port.filter(|p| !p.is_empty()).ok_or("\"port\" header is required")?;
    let port = port.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| format!("invalid port {port:?}"))?;
    let part = match stream_type {
        Some("data") => PairPart::Data,
        Some("error") => PairPart::Error,
        None | Some("") => return Err("\"streamType\" header is required".into()),
        Some(other) => return Err(format!("invalid stream type {other:?}")),
    };
    let pair = match request.filter(|id| !id.is_empty()) {
        Some(id) => id.to_string(),
        None => match part {
            PairPart::Error => number.to_string(),
            PairPart::Data => number.saturating_sub(2).to_string(),
        },
    };
    Ok((part, pair, port))
}

/// A pair of which one stream has come.
struct HalfPair {
    part: PairPart,
    stream: (Reader, Writer),
    deadline: Instant,
}

/// Forwards connections, each with a data stream and an error stream, until the client is gone.
async fn forward_pairs(sandbox: Sandbox, pod: String, mut session: Session) {
    let gone = session.gone();
    let mut halves: HashMap<String, HalfPair> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let deadline = halves.values().map(|half| half.deadline).min();
        tokio::select! {
            stream = session.next() => {
                let Some(stream) = stream else { break };
                let Some((data, error, port)) = match_pair(stream, &mut halves, tasks.len()).await else { continue };
                tasks.spawn(forward_pair(sandbox.clone(), pod.clone(), port, data, error));
            }
            Some(_) = tasks.join_next() => {}
            () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                let now = Instant::now();
                for (id, half) in halves.extract_if(|_, half| half.deadline <= now) {
                    tracing::debug!(id, "the other stream of a forwarded connection did not come in time");
                    let (_, writer) = half.stream;
                    if half.part == PairPart::Error {
                        writer.send(Bytes::from_static(b"timeout waiting for pair")).await;
                    }
                    writer.finish().await;
                }
            }
            () = gone.cancelled() => break,
        }
    }
    halves.clear();
    tasks.shutdown().await;
    session.close().await;
}

/// Accepts a stream and gives the pair that it completes: data, error and port.
async fn match_pair(
    stream: SpdyStream,
    halves: &mut HashMap<String, HalfPair>,
    forwarding: usize,
) -> Option<((Reader, Writer), (Reader, Writer), u16)> {
    let headers = stream.headers();
    let found = pair_part(headers.get("streamtype"), headers.get("port"), headers.get("requestid"), stream.number());
    let (part, id, port) = match found {
        Ok(found) if forwarding + halves.len() < MAX_FORWARDED => found,
        Ok(_) => {
            stream.refuse().await;
            return None;
        }
        Err(reason) => {
            tracing::debug!(reason, "a stream of a port-forward is refused");
            stream.refuse().await;
            return None;
        }
    };
    match halves.remove(&id) {
        None => {
            let half = HalfPair { part, stream: stream.accept().await, deadline: Instant::now() + STREAM_CREATION };
            halves.insert(id, half);
            None
        }
        Some(half) if half.part == part => {
            tracing::debug!(id, "a stream of a port-forward came twice");
            stream.refuse().await;
            halves.insert(id, half);
            None
        }
        Some(half) => {
            let stream = stream.accept().await;
            let (data, error) = if part == PairPart::Data { (stream, half.stream) } else { (half.stream, stream) };
            Some((data, error, port))
        }
    }
}

async fn forward_pair(
    sandbox: Sandbox,
    pod: String,
    port: u16,
    (mut incoming, out): (Reader, Writer),
    (_, errors): (Reader, Writer),
) {
    match dial_inside(&sandbox, port).await {
        Err(e) => {
            let text = format!(
                "error forwarding port {port} to pod {pod}: failed to connect to localhost:{port} inside the pod: {e}"
            );
            errors.send(text.into()).await;
        }
        Ok(connection) => {
            let (mut read, mut write) = connection.into_split();
            let up = async {
                while let Some(data) = incoming.next().await {
                    if write.write_all(&data).await.is_err() {
                        break;
                    }
                }
                if !incoming.is_reset() {
                    let _ = write.shutdown().await;
                    // The pod may go on sending; the client may still give up.
                    while incoming.next().await.is_some() {}
                    incoming.reset().await;
                }
            };
            let down = async {
                let mut buffer = vec![0; BUFFER];
                while let Ok(n) = read.read(&mut buffer).await {
                    if n == 0 || !out.send(Bytes::copy_from_slice(&buffer[..n])).await {
                        break;
                    }
                }
            };
            tokio::select! {
                () = up => {}
                () = down => {}
            }
        }
    }
    out.finish().await;
    errors.finish().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_their_channel() {
        let plain = Protocol::named("v5.channel.k8s.io");
        assert_eq!(plain.message(1, b"hi"), Message::binary(vec![1, b'h', b'i']));
        assert_eq!(plain.parse(Message::binary(vec![0, b'x'])), Some((0, Bytes::from_static(b"x"))));
        assert_eq!(plain.parse(Message::binary(vec![])), None);
        let encoded = Protocol::named("base64.channel.k8s.io");
        assert_eq!(encoded.message(1, b"hi"), Message::text("1aGk="));
        assert_eq!(encoded.parse(Message::text("0aGk=")), Some((0, Bytes::from_static(b"hi"))));
        assert_eq!(encoded.parse(Message::text("0%%")), None);
    }

    #[test]
    fn exit_codes_are_reported_as_clients_read_them() {
        assert_eq!(final_status(&Ok(0)), json!({"metadata": {}, "status": "Success"}));
        let failed = final_status(&Ok(7));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0], json!({"reason": "ExitCode", "message": "7"}));
        assert_eq!(final_status(&Err("x".into()))["reason"], "InternalError");
    }

    #[test]
    fn old_protocols_get_less() {
        let rows = [
            ("v5.channel.k8s.io", true, true),
            ("v4.channel.k8s.io", true, true),
            ("v3.channel.k8s.io", false, true),
            ("v2.channel.k8s.io", false, false),
            ("channel.k8s.io", false, false),
        ];
        for (name, status_json, resize) in rows {
            assert_eq!(Protocol::named(name), Protocol { base64: false, status_json, resize }, "{name}");
        }
        let tty = StreamOptions { stdin: true, stdout: true, stderr: false, tty: true };
        assert_eq!(expected_channels(tty, Protocol::named("v4.channel.k8s.io")), [true, true, false, true, true]);
        assert_eq!(expected_channels(tty, Protocol::named("v2.channel.k8s.io")), [true, true, false, true, false]);
    }

    #[test]
    fn streams_of_a_forwarded_connection_find_each_other() {
        let data = |id: &str| Ok((PairPart::Data, id.to_string(), 80));
        let error = |id: &str| Ok((PairPart::Error, id.to_string(), 80));
        let no = |reason: &str| Err(reason.to_string());
        let rows = [
            ((Some("data"), Some("80"), Some("7")), data("7")),
            ((Some("error"), Some("80"), Some("7")), error("7")),
            ((Some("error"), Some("80"), None), error("5")),
            ((Some("data"), Some("80"), None), data("3")),
            ((Some("data"), None, Some("7")), no("\"port\" header is required")),
            ((Some("data"), Some("0"), Some("7")), no("invalid port \"0\"")),
            ((Some("data"), Some("65536"), Some("7")), no("invalid port \"65536\"")),
            ((None, Some("80"), Some("7")), no("\"streamType\" header is required")),
            ((Some("stdin"), Some("80"), Some("7")), no("invalid stream type \"stdin\"")),
        ];
        for ((stream_type, port, request), want) in rows {
            assert_eq!(pair_part(stream_type, port, request, 5), want, "{stream_type:?} {port:?} {request:?}");
        }
    }

    #[test]
    fn window_sizes_come_in_any_pieces() {
        let mut pending = Vec::new();
        assert_eq!(last_window(&mut pending, br#"{"Width":80,"Hei"#), None);
        assert_eq!(last_window(&mut pending, b"ght\":24}\n{\"Width\":81,\"Height\":25}\n{"), Some((81, 25)));
        assert_eq!(last_window(&mut pending, br#""Width":1,"Height":2}"#), Some((1, 2)));
        assert_eq!(last_window(&mut pending, b"nonsense"), None);
        assert_eq!(last_window(&mut pending, br#"{"Width":3,"Height":4}"#), Some((3, 4)));
    }

    #[test]
    fn window_sizes_are_read() {
        assert_eq!(window(br#"{"Width":80,"Height":24}"#), Some((80, 24)));
        assert_eq!(window(b"{}"), None);
        assert_eq!(window(br#"{"Width":70000,"Height":24}"#), None);
    }
}
