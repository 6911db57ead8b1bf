//! exec, attach and port-forward over WebSocket.
//!
//! Source: Kubernetes "streaming protocols" (`v4.channel.k8s.io`, `v5.channel.k8s.io`, KEP-4006). The first byte of a message is
//! its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final Status, 4 terminal size, 255 (v5) the closing of another channel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use base64::Engine;
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::{broadcast, mpsc};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{Message, handshake::derive_accept_key};

use crate::container::{self, ConsoleSocket, OUTPUT_GRACE, Running, Terminal};
use crate::kubelet::NodeContext;
use crate::log::Stream;
use crate::sandbox::Sandbox;
use crate::server::{Body, Query, Refusal, wants_websocket};

/// Protocols of exec and attach, best first.
pub(crate) const CHANNELS: &[&str] =
    &["v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io", "v4.base64.channel.k8s.io", "base64.channel.k8s.io"];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// Larger messages from a client are refused; clients send 32 KiB at most.
const MAX_MESSAGE: usize = 1 << 20;
const BUFFER: usize = 32 * 1024;

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
}

impl Protocol {
    fn named(name: &str) -> Protocol {
        Protocol { base64: name.contains("base64"), status_json: name.starts_with('v') }
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

/// Answers a WebSocket handshake and runs `work` on the socket.
pub(crate) fn upgrade<F>(
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

/// Sends messages to the client from several tasks. Full means that the client is slow, and the container waits.
#[derive(Clone)]
struct Outgoing {
    sender: mpsc::Sender<Message>,
    protocol: Protocol,
}

impl Outgoing {
    /// Starts the task that writes; it ends when all senders are gone or the client is.
    fn start(mut sink: SplitSink<Socket, Message>, protocol: Protocol) -> (Outgoing, tokio::task::JoinHandle<()>) {
        let (sender, mut receiver) = mpsc::channel::<Message>(8);
        let task = tokio::spawn(async move {
            while let Some(message) = receiver.recv().await {
                if sink.send(message).await.is_err() {
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
        self.sender.send(self.protocol.message(channel, data)).await.is_ok()
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
        if self.protocol.status_json {
            self.send(ERROR, final_status(result).to_string().as_bytes()).await;
        } else if let Err(reason) = result {
            self.send(ERROR, reason.as_bytes()).await;
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

/// Reads the client's messages until it goes away.
async fn take_input(mut source: SplitStream<Socket>, protocol: Protocol, mut input: Input, terminal: Option<Terminal>) {
    while let Some(Ok(message)) = source.next().await {
        if matches!(message, Message::Close(_)) {
            return;
        }
        let Some((channel, data)) = protocol.parse(message) else { continue };
        match channel {
            STDIN => match &mut input {
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
            RESIZE => {
                if let Some(terminal) = &terminal
                    && let Some((columns, rows)) = window(&data)
                {
                    terminal.resize(columns, rows);
                }
            }
            // Only the input can be closed by a client.
            CLOSE if data.first() == Some(&STDIN) => {
                if let Input::Terminal(terminal) = &input {
                    // End of file is a key on a terminal.
                    let _ = terminal.write_all(&[4]).await;
                }
                input = Input::None;
            }
            _ => {}
        }
    }
}

fn window(data: &[u8]) -> Option<(u16, u16)> {
    let size: Value = serde_json::from_slice(data).ok()?;
    let get = |name: &str| size.get(name).and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok());
    Some((get("Width")?, get("Height")?))
}

/// Runs a command in a container for a client.
pub(crate) async fn exec(
    context: Arc<NodeContext>,
    run: Arc<Running>,
    command: Vec<String>,
    options: StreamOptions,
    socket: Socket,
    protocol: Protocol,
) {
    let (sink, source) = socket.split();
    let (out, writer) = Outgoing::start(sink, protocol);
    let result = run_command(&context, &run, &command, options, source, &out).await;
    if let Some(result) = result {
        out.finish(&result).await;
    }
    drop(out);
    let _ = tokio::time::timeout(std::time::Duration::from_secs(10), writer).await;
}

/// The exit code, or why it could not be run; `None` when the client went away.
async fn run_command(
    context: &NodeContext,
    run: &Running,
    command: &[String],
    options: StreamOptions,
    source: SplitStream<Socket>,
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
        return attend(&mut exec, output, take_input(source, out.protocol, input, Some(terminal))).await;
    }
    let input = match exec.child.stdin.take() {
        Some(stdin) => Input::Pipe(Box::new(stdin)),
        None => Input::None,
    };
    let (stdout, stderr) = (exec.child.stdout.take(), exec.child.stderr.take());
    let output = async { tokio::join!(out.copy(STDOUT, stdout), out.copy(STDERR, stderr)) };
    attend(&mut exec, output, take_input(source, out.protocol, input, None)).await
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
pub(crate) async fn attach(
    run: Arc<Running>,
    stdin_once: bool,
    options: StreamOptions,
    socket: Socket,
    protocol: Protocol,
) {
    let mut live = run.sink.subscribe();
    let (sink, source) = socket.split();
    let (out, writer) = Outgoing::start(sink, protocol);
    let pipe = options.stdin.then(|| container::take_stdin(&run)).flatten();
    let input = match (&run.terminal, pipe.as_ref().and_then(|fd| fd.try_clone().ok())) {
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
    let input = take_input(source, protocol, input, terminal);
    let ended = tokio::select! {
        () = run.gone.cancelled() => true,
        () = output.as_mut() => false,
        () = input => false,
    };
    if let Some(fd) = pipe
        && !stdin_once
    {
        container::return_stdin(&run, fd);
    }
    if ended {
        let mut progress = run.sink.progress();
        let rest = async {
            tokio::select! {
                () = output.as_mut() => {}
                _ = async {
                    let _ = progress.wait_for(|p| p.closed).await;
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                } => {}
            }
        };
        let _ = tokio::time::timeout(OUTPUT_GRACE, rest).await;
        out.finish(&Ok(0)).await;
    }
    drop(output);
    drop(out);
    let _ = tokio::time::timeout(std::time::Duration::from_secs(10), writer).await;
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

/// Port-forward over WebSocket channels: for the i-th port, channel 2i is data and 2i+1 is its error.
pub(crate) fn port_forward(
    request: Request<Incoming>,
    sandbox: Sandbox,
    query: &Query,
) -> Result<Response<Body>, Refusal> {
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
    let _ = tokio::time::timeout(std::time::Duration::from_secs(10), writer).await;
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
    fn window_sizes_are_read() {
        assert_eq!(window(br#"{"Width":80,"Height":24}"#), Some((80, 24)));
        assert_eq!(window(b"{}"), None);
        assert_eq!(window(br#"{"Width":70000,"Height":24}"#), None);
    }
}
