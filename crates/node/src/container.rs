//! Makes and starts one run of a container, and runs commands in it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVar, Pod};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use crate::api::{LookupError, NodeApi};
use crate::env::{Environment, is_variable_name, service_variables};
use crate::image::Image;
use crate::kubelet::NodeContext;
use crate::log::{LogSink, Stream};
use crate::oci::{self, Bind, ContainerSpec, Limits, ProcessSpec, Propagation};
use crate::runtime::{Console, Process, RootFs, RuntimeError, entries, kill_in_container, reap_strays, remove_dir};
use crate::sandbox::Sandbox;
use crate::volume;

/// Output of a probe or hook that is kept (the kubelet's limit).
const MAX_OUTPUT: usize = 10 * 1024;
/// How long the output of a command is awaited after the command has ended.
pub(crate) const OUTPUT_GRACE: Duration = Duration::from_millis(250);
/// How long after a command's end its remains are looked for.
const STRAY_AFTER: Duration = Duration::from_millis(500);
/// A termination message is cut at this length (Kubernetes API, Container.terminationMessagePath).
const MAX_MESSAGE: u64 = 4096;

/// A running container. Shared with the streams that clients open to it.
#[derive(Debug)]
pub(crate) struct Running {
    /// Id in the runtime.
    pub id: String,
    pub process: Process,
    pub sink: LogSink,
    pub started_at: Timestamp,
    /// For commands executed in it.
    pub spec: ProcessSpec,
    /// Directory of its configuration.
    pub bundle: PathBuf,
    /// Standard input, when the pod asks for it.
    pub stdin: Mutex<Option<OwnedFd>>,
    /// The terminal, when the pod asks for one.
    pub terminal: Option<Terminal>,
    /// Cancelled when it has ended.
    pub gone: CancellationToken,
    /// Where its termination message appears.
    pub message_file: PathBuf,
}

/// The master side of a terminal. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Terminal> {
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL)?;
        let flags = nix::fcntl::OFlag::from_bits_truncate(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        // SAFETY: the registration owns the descriptor and closes it itself.
        let registered = unsafe { AsyncFd::register(fd) }?;
        Ok(Terminal(Arc::new(registered)))
    }

    /// Reads what the program printed. The end is reported as zero bytes or EIO.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.async_io(tokio::io::Interest::READABLE, |fd| Ok(nix::unistd::read(fd, buffer)?)).await
    }

    /// Types `bytes`.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = self.0.async_io(tokio::io::Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?)).await?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Tells the program the size of its window.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: a valid descriptor and a winsize that outlives the call.
        unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    }
}

/// A terminal as a stream of bytes, for the log.
struct TerminalReader(Terminal);

impl TerminalReader {
    async fn copy_to(self, sink: LogSink) {
        let (mut writer, reader) = tokio::io::duplex(8 * 1024);
        let copy = sink.copy(Stream::Stdout, reader);
        let feed = async move {
            let mut buffer = vec![0; 8 * 1024];
            while let Ok(n) = self.0.read(&mut buffer).await {
                if n == 0 || tokio::io::AsyncWriteExt::write_all(&mut writer, &buffer[..n]).await.is_err() {
                    break;
                }
            }
        };
        tokio::join!(copy, feed);
    }
}

/// A listening socket that receives a terminal from the runtime (OCI runtime command line, `--console-socket`).
pub(crate) struct ConsoleSocket {
    listener: tokio::net::UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub(crate) fn bind(path: PathBuf) -> io::Result<ConsoleSocket> {
        let _ = fs::remove_file(&path);
        Ok(ConsoleSocket { listener: tokio::net::UnixListener::bind(&path)?, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the runtime to send the terminal.
    pub(crate) async fn receive(&self) -> io::Result<Terminal> {
        let (stream, _) = self.listener.accept().await?;
        loop {
            stream.readable().await?;
            match stream.try_io(tokio::io::Interest::READABLE, || receive_fd(stream.as_raw_fd())) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return Terminal::new(other?),
            }
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn receive_fd(socket: i32) -> io::Result<OwnedFd> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::FromRawFd;
    let mut data = [0u8; 256];
    let mut parts = [io::IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!([i32; 4]);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut found = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel just put these descriptors into this process and nobody else knows them.
                found = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    found.ok_or_else(|| io::Error::other("the runtime sent no terminal"))
}

/// Why a run did not start.
#[derive(Debug)]
pub(crate) enum StartError {
    /// Something it refers to is missing or wrong: reason `CreateContainerConfigError`, tried again.
    Config(String),
    /// It could not be made: reason `CreateContainerError`, tried again.
    Create(String),
    /// Its image was removed from the store since it was found.
    ImageGone,
    /// The runtime could not start its program: the run counts as ended with code 128 and reason `StartError`.
    Start(String),
}

/// What a run is made from.
pub(crate) struct StartRequest<'a> {
    pub context: &'a NodeContext,
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub image: &'a Image,
    pub sandbox: &'a Sandbox,
    pub volumes: &'a BTreeMap<String, PathBuf>,
    /// The pod's run directory, with `hosts` and `resolv.conf`.
    pub run_dir: &'a Path,
    /// The pod's state directory.
    pub state_dir: &'a Path,
    /// Number of this run, from 0.
    pub attempt: u32,
}

impl StartRequest<'_> {
    /// The log file of a run.
    fn log_path(&self) -> PathBuf {
        log_path(self.state_dir, &self.container.name, self.attempt)
    }
}

/// Where run `attempt` of a container logs to.
pub(crate) fn log_path(state_dir: &Path, container: &str, attempt: u32) -> PathBuf {
    state_dir.join("logs").join(container).join(format!("{attempt}.log"))
}

/// Makes and starts a run.
pub(crate) async fn start(request: &StartRequest<'_>) -> Result<Running, StartError> {
    let StartRequest { context, pod, container, image, .. } = *request;
    let user = resolve_user(pod, container, image).map_err(StartError::Config)?;
    let environment = environment(request).await.map_err(StartError::Config)?;
    let expand = |list: Option<&Vec<String>>| list.map(|l| l.iter().map(|t| environment.expand(t)).collect::<Vec<_>>());
    let args = oci::command_line(
        expand(container.command.as_ref()).as_deref(),
        expand(container.args.as_ref()).as_deref(),
        &image.config.entrypoint,
        &image.config.cmd,
    )
    .ok_or_else(|| StartError::Create("no command specified".to_string()))?;

    let create = |what: &str, e: io::Error| StartError::Create(format!("cannot {what}: {e}"));
    let id = uuid::Uuid::new_v4().simple().to_string();
    let bundle = request.run_dir.join("c").join(&id);
    fs::create_dir_all(bundle.join("rootfs")).map_err(|e| create("make the bundle", e))?;
    if !claim(request, &bundle).map_err(|e| create("claim the image", e))? {
        let _ = remove_dir(&bundle);
        return Err(StartError::ImageGone);
    }
    let layer_dir = request.state_dir.join("c").join(&id);
    fs::create_dir_all(&layer_dir).map_err(|e| create("make the writable layer", e))?;
    let rootfs = if context.overlay {
        let (upper, work) = (layer_dir.join("upper"), layer_dir.join("work"));
        for dir in [&upper, &work] {
            fs::create_dir_all(dir).map_err(|e| create("make the writable layer", e))?;
            fs::set_permissions(dir, PermissionsExt::from_mode(0o755))
                .map_err(|e| create("make the writable layer", e))?;
        }
        RootFs::Overlay { lower: image.layers.clone(), upper, work }
    } else {
        copy_layers(&image.layers, &bundle.join("rootfs")).await.map_err(|e| create("copy the image", e))?;
        RootFs::Directory
    };

    let message_file = layer_dir.join("message");
    fs::write(&message_file, "").map_err(|e| create("make the termination message file", e))?;
    // Any user of the container may write its last words.
    fs::set_permissions(&message_file, PermissionsExt::from_mode(0o666))
        .map_err(|e| create("make the termination message file", e))?;

    let security = container.security_context.as_ref();
    let privileged = security.and_then(|s| s.privileged) == Some(true);
    let terminal = container.tty == Some(true);
    let cwd =
        container.working_dir.clone().filter(|d| !d.is_empty()).unwrap_or_else(|| image.config.working_dir.clone());
    let process = ProcessSpec {
        args,
        env: environment.clone().into_pairs(),
        cwd: if cwd.is_empty() { "/".to_string() } else { cwd },
        user,
        terminal,
        capabilities: oci::capabilities(security, &oci::held()).map_err(StartError::Config)?,
        no_new_privileges: security.and_then(|s| s.allow_privilege_escalation) == Some(false) && !privileged,
        oom_score_adj: 0,
    };
    let limits = limits(container).filter(|_| context.limits_available);
    let spec = ContainerSpec {
        read_only_root: security.and_then(|s| s.read_only_root_filesystem) == Some(true),
        privileged,
        network: request.sandbox.netns.path().to_path_buf(),
        ipc: request.sandbox.ipc.clone(),
        uts: Some(request.sandbox.uts.clone()),
        host_pid: pod.spec.as_ref().and_then(|s| s.host_pid) == Some(true),
        binds: binds(request, &environment, &message_file).map_err(StartError::Config)?,
        limits,
        shm: None,
        cgroup_path: limits.map(|_| format!("{}/{id}", context.cgroup_parent)),
        process,
    };
    let config = serde_json::to_vec(&oci::config(&spec)).map_err(|e| create("write the configuration", e.into()))?;
    fs::write(bundle.join("config.json"), config).map_err(|e| create("write the configuration", e))?;

    let sink = LogSink::create(request.log_path()).map_err(|e| create("open the log", e))?;
    let started = connect_and_run(request, &id, &bundle, &rootfs, limits.is_some(), terminal, &sink).await;
    let (process, stdin, terminal) = match started {
        Ok(started) => started,
        Err(e) => {
            sink.close();
            let _ = remove_dir(&bundle);
            let _ = remove_dir(&layer_dir);
            return Err(StartError::Start(e.to_string()));
        }
    };
    Ok(Running {
        id,
        process,
        sink,
        started_at: Timestamp::now(),
        spec: spec.process,
        bundle,
        stdin: Mutex::new(stdin),
        terminal,
        gone: CancellationToken::new(),
        message_file,
    })
}

/// What a bundle says about its image, for whoever wants to remove that. See [`image_users`].
#[derive(serde::Serialize, serde::Deserialize)]
struct Claim {
    image: String,
    user: String,
}

const CLAIM: &str = "image.json";

/// Notes that this run uses its image and then looks whether that is still there: whoever removes an image looks for notes
/// afterwards, so one of the two sees the other.
fn claim(request: &StartRequest<'_>, bundle: &Path) -> io::Result<bool> {
    let meta = &request.pod.metadata;
    let claim = Claim {
        image: request.image.id.clone(),
        user: format!(
            "container {} of pod {}/{}",
            request.container.name,
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default()
        ),
    };
    fs::write(bundle.join(CLAIM), serde_json::to_vec(&claim)?)?;
    request.context.config.images.holds(request.image).map_err(io::Error::other)
}

/// The containers that run from each image, by image id, of all kubelets that keep their run-time state in `run_dir`. Works
/// beside them, from another process too.
///
/// # Errors
/// A directory cannot be read.
pub fn image_users(run_dir: &Path) -> io::Result<BTreeMap<String, Vec<String>>> {
    let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in entries(&run_dir.join("node"))? {
        for pod in entries(&node.join("pods"))? {
            for bundle in entries(&pod.join("c"))? {
                // A bundle may go away while we look.
                let Ok(bytes) = fs::read(bundle.join(CLAIM)) else { continue };
                let Ok(claim) = serde_json::from_slice::<Claim>(&bytes) else { continue };
                users.entry(claim.image).or_default().push(claim.user);
            }
        }
    }
    users.values_mut().for_each(|list| list.sort());
    Ok(users)
}

type Connected = (Process, Option<OwnedFd>, Option<Terminal>);

async fn connect_and_run(
    request: &StartRequest<'_>,
    id: &str,
    bundle: &Path,
    rootfs: &RootFs,
    cgroup: bool,
    terminal: bool,
    sink: &LogSink,
) -> Result<Connected, RuntimeError> {
    let runtime = &request.context.runtime;
    let pipe_error = |source| RuntimeError::File { action: "make a pipe for", path: id.to_string(), source };
    if terminal {
        let socket = ConsoleSocket::bind(request.context.socket_path(id)).map_err(pipe_error)?;
        let run = runtime.run(id, bundle, rootfs, cgroup, Console::Terminal(socket.path().to_path_buf()));
        let (process, terminal) =
            tokio::join!(run, async { tokio::time::timeout(Duration::from_secs(10), socket.receive()).await });
        let process = process?;
        let terminal = terminal.map_err(io::Error::other).and_then(|t| t).map_err(pipe_error)?;
        let reader = TerminalReader(terminal.clone());
        let sink = sink.clone();
        tokio::spawn(async move {
            reader.copy_to(sink.clone()).await;
            sink.close();
        });
        return Ok((process, None, Some(terminal)));
    }
    let (out_read, out_write) = pipe().map_err(pipe_error)?;
    let (err_read, err_write) = pipe().map_err(pipe_error)?;
    let (stdin, stdin_write) = if request.container.stdin == Some(true) {
        let (read, write) = pipe().map_err(pipe_error)?;
        (Stdio::from(read), Some(write))
    } else {
        (Stdio::null(), None)
    };
    let console = Console::Pipes { stdin, stdout: Stdio::from(out_write), stderr: Stdio::from(err_write) };
    let process = runtime.run(id, bundle, rootfs, cgroup, console).await?;
    let out = tokio::net::unix::pipe::Receiver::from_owned_fd(out_read).map_err(pipe_error)?;
    let err = tokio::net::unix::pipe::Receiver::from_owned_fd(err_read).map_err(pipe_error)?;
    let sink = sink.clone();
    tokio::spawn(async move {
        tokio::join!(sink.copy(Stream::Stdout, out), sink.copy(Stream::Stderr, err));
        sink.close();
    });
    Ok((process, stdin_write, None))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Where the machine cannot stack file systems, each container gets a copy of its image.
async fn copy_layers(layers: &[PathBuf], target: &Path) -> io::Result<()> {
    let (layers, target) = (layers.to_vec(), target.to_path_buf());
    tokio::task::spawn_blocking(move || layers.iter().try_for_each(|layer| copy_layer(layer, &target)))
        .await
        .map_err(io::Error::other)?
}

fn copy_layer(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, lchown};
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = fs::symlink_metadata(&source)?;
        let kind = meta.file_type();
        if !kind.is_dir() && fs::symlink_metadata(&target).is_ok() {
            if target.is_dir() { fs::remove_dir_all(&target)? } else { fs::remove_file(&target)? }
        }
        if kind.is_char_device() && meta.rdev() == 0 {
            let _ = fs::remove_dir_all(&target);
            continue;
        }
        if kind.is_dir() {
            copy_layer(&source, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else {
            continue;
        }
        lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
        if !kind.is_symlink() {
            fs::set_permissions(&target, meta.permissions())?;
        }
    }
    Ok(())
}

fn resolve_user(pod: &Pod, container: &Container, image: &Image) -> Result<oci::User, String> {
    let read = |name: &str| read_in_layers(&image.layers, Path::new(name)).unwrap_or_default();
    oci::user(
        container.security_context.as_ref(),
        pod.spec.as_ref().and_then(|s| s.security_context.as_ref()),
        &image.config.user,
        &read("etc/passwd"),
        &read("etc/group"),
    )
}

/// The text of a file of an image, from the topmost layer that has it. Only a plain file counts, so that a link in an image
/// cannot make us read a file of the host.
fn read_in_layers(layers: &[PathBuf], name: &Path) -> Option<String> {
    for layer in layers.iter().rev() {
        let mut path = layer.clone();
        let mut usable = true;
        for component in name.components() {
            path.push(component);
            match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() || meta.is_file() => {}
                Ok(_) => return None,
                Err(_) => {
                    usable = false;
                    break;
                }
            }
        }
        if usable {
            return fs::read_to_string(path).ok();
        }
    }
    None
}

/// Limits that the container asks for, if any.
fn limits(container: &Container) -> Option<Limits> {
    let resources = container.resources.as_ref()?;
    let get = |map: Option<&BTreeMap<String, _>>, name: &str| {
        map.and_then(|m| m.get(name)).map(|q: &k8s_openapi::apimachinery::pkg::api::resource::Quantity| q.0.clone())
    };
    let memory = get(resources.limits.as_ref(), "memory").and_then(|q| volume::quantity_bytes(&q));
    let cpu = get(resources.limits.as_ref(), "cpu").and_then(|q| volume::quantity_milli(&q));
    let requested = get(resources.requests.as_ref(), "cpu").and_then(|q| volume::quantity_milli(&q)).or(cpu);
    if memory.is_none() && cpu.is_none() {
        return None;
    }
    Some(Limits {
        memory_bytes: memory.and_then(|b| i64::try_from(b).ok()),
        // The kernel takes no quota below one millisecond.
        cpu_quota_us: cpu.and_then(|m| i64::try_from((m * 100).max(1000)).ok()),
        cpu_shares: requested.map(|m| (m * 1024 / 1000).max(2)),
    })
}

fn missing(error: LookupError, kind: &str, name: &str) -> String {
    match error {
        LookupError::NotFound(_) => format!("{kind} \"{name}\" not found"),
        LookupError::Failed(reason) => reason,
    }
}

async fn environment(request: &StartRequest<'_>) -> Result<Environment, String> {
    let StartRequest { context, pod, container, image, sandbox, .. } = *request;
    let api = context.api.as_ref();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut env = Environment::default();
    for pair in &image.config.env {
        if let Some((name, value)) = pair.split_once('=') {
            env.set(name, value.to_string());
        }
    }
    env.set_default("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let hostname = match &pod.spec {
        Some(spec) if spec.host_network != Some(true) => {
            crate::hosts::hostname(spec, pod.metadata.name.as_deref().unwrap_or_default())
        }
        _ => context.config.name.clone(),
    };
    env.set("HOSTNAME", hostname);
    if container.tty == Some(true) {
        env.set_default("TERM", "xterm");
    }
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links).unwrap_or(true);
    let kubernetes = api.service("default", "kubernetes").await.ok();
    let services = if links { api.services(namespace).await.map_err(|e| e.to_string())? } else { Vec::new() };
    for (name, value) in service_variables(&services, kubernetes.as_ref(), links) {
        env.set(&name, value);
    }
    if image.wants_identity {
        let own = [
            ("POD_NAME", pod.metadata.name.clone().unwrap_or_default()),
            ("POD_NAMESPACE", namespace.to_string()),
            ("NODE_NAME", context.config.name.clone()),
            ("NODE_ZONE", context.config.zone.clone()),
        ];
        for (name, value) in own {
            env.set(name, value);
        }
    }
    for source in container.env_from.iter().flatten() {
        env_from(api, namespace, source, &mut env).await?;
    }
    let host_ip = context.config.node_ip.to_string();
    let pod_ip = sandbox.ip.to_string();
    for variable in container.env.iter().flatten() {
        let value = env_value(context, pod, container, variable, &env, &host_ip, &pod_ip).await?;
        if let Some(value) = value {
            env.set(&variable.name, value);
        }
    }
    Ok(env)
}

async fn env_from(
    api: &dyn NodeApi,
    namespace: &str,
    source: &EnvFromSource,
    env: &mut Environment,
) -> Result<(), String> {
    let prefix = source.prefix.as_deref().unwrap_or_default();
    let mut pairs: BTreeMap<String, String> = BTreeMap::new();
    if let Some(reference) = &source.config_map_ref {
        match api.config_map(namespace, &reference.name).await {
            Ok(map) => pairs.extend(map.data.unwrap_or_default()),
            Err(LookupError::NotFound(_)) if reference.optional == Some(true) => {}
            Err(e) => return Err(missing(e, "configmap", &reference.name)),
        }
    }
    if let Some(reference) = &source.secret_ref {
        match api.secret(namespace, &reference.name).await {
            Ok(secret) => pairs.extend(text_values(secret.data.unwrap_or_default())),
            Err(LookupError::NotFound(_)) if reference.optional == Some(true) => {}
            Err(e) => return Err(missing(e, "secret", &reference.name)),
        }
    }
    for (key, value) in pairs {
        let name = format!("{prefix}{key}");
        if is_variable_name(&name) {
            env.set(&name, value);
        }
    }
    Ok(())
}

fn text_values(data: BTreeMap<String, k8s_openapi::ByteString>) -> impl Iterator<Item = (String, String)> {
    data.into_iter().map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
}

async fn env_value(
    context: &NodeContext,
    pod: &Pod,
    container: &Container,
    variable: &EnvVar,
    env: &Environment,
    host_ip: &str,
    pod_ip: &str,
) -> Result<Option<String>, String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let Some(source) = &variable.value_from else {
        return Ok(Some(env.expand(variable.value.as_deref().unwrap_or_default())));
    };
    if let Some(field) = &source.field_ref {
        return volume::field_value(pod, field, host_ip, Some(pod_ip)).map(Some);
    }
    if let Some(field) = &source.resource_field_ref {
        let name = field.container_name.as_deref().filter(|n| !n.is_empty()).unwrap_or(&container.name);
        let divisor = field.divisor.as_ref().map(|q| q.0.as_str());
        return volume::resource_value(pod, name, &field.resource, divisor, context.cpus, context.memory_bytes)
            .map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let optional = key.optional == Some(true);
        return match context.api.config_map(namespace, &key.name).await {
            Ok(map) => match map.data.unwrap_or_default().remove(&key.key) {
                Some(value) => Ok(Some(value)),
                None if optional => Ok(None),
                None => Err(format!("couldn't find key {} in ConfigMap {namespace}/{}", key.key, key.name)),
            },
            Err(LookupError::NotFound(_)) if optional => Ok(None),
            Err(e) => Err(missing(e, "configmap", &key.name)),
        };
    }
    if let Some(key) = &source.secret_key_ref {
        let optional = key.optional == Some(true);
        return match context.api.secret(namespace, &key.name).await {
            Ok(secret) => match secret.data.unwrap_or_default().remove(&key.key) {
                Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
                None if optional => Ok(None),
                None => Err(format!("couldn't find key {} in Secret {namespace}/{}", key.key, key.name)),
            },
            Err(LookupError::NotFound(_)) if optional => Ok(None),
            Err(e) => Err(missing(e, "secret", &key.name)),
        };
    }
    Err(format!("environment variable {} has a source that this node does not support", variable.name))
}

fn binds(request: &StartRequest<'_>, environment: &Environment, message_file: &Path) -> Result<Vec<Bind>, String> {
    let StartRequest { container, image, run_dir, volumes, .. } = *request;
    let mut binds = image.binds.clone();
    let mut own = |source: PathBuf, destination: &str, writable: bool| {
        let mounted =
            container.volume_mounts.iter().flatten().any(|m| m.mount_path.trim_end_matches('/') == destination);
        if !mounted {
            binds.push(Bind { source, destination: destination.into(), writable, propagation: Propagation::None });
        }
    };
    own(run_dir.join("resolv.conf"), "/etc/resolv.conf", true);
    own(run_dir.join("hostname"), "/etc/hostname", true);
    own(run_dir.join("hosts"), "/etc/hosts", true);
    let message_path = container.termination_message_path.as_deref().filter(|p| !p.is_empty());
    own(message_file.to_path_buf(), message_path.unwrap_or("/dev/termination-log"), true);
    if let Some(device) = container.volume_devices.iter().flatten().next() {
        return Err(format!("volumeDevices ({}) are not supported by this node", device.name));
    }
    let mut mounts: Vec<_> = container.volume_mounts.iter().flatten().collect();
    // A mount below another one must come after it.
    mounts.sort_by_key(|m| Path::new(&m.mount_path).components().count());
    for mount in mounts {
        let volume = volumes.get(&mount.name).ok_or_else(|| format!("volume {:?} is not defined", mount.name))?;
        let sub = match (&mount.sub_path, &mount.sub_path_expr) {
            (Some(sub), _) if !sub.is_empty() => Some(sub.clone()),
            (_, Some(expression)) if !expression.is_empty() => Some(environment.expand(expression)),
            _ => None,
        };
        let source = match sub {
            Some(sub) => volume::sub_path(volume, &sub)?,
            None => volume.clone(),
        };
        let destination = if mount.mount_path.starts_with('/') {
            PathBuf::from(&mount.mount_path)
        } else {
            Path::new("/").join(&mount.mount_path)
        };
        binds.push(Bind {
            source,
            destination,
            writable: mount.read_only != Some(true),
            propagation: match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => Propagation::HostToContainer,
                Some("Bidirectional") => Propagation::Bidirectional,
                _ => Propagation::None,
            },
        });
    }
    Ok(binds)
}

/// The termination message of a run that ended with `code`, as the container's policy says.
pub(crate) fn termination_message(container: &Container, running: &Running, code: i32) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    let read_end = |path: &Path, limit: u64| -> Option<String> {
        let mut file = fs::File::open(path).ok()?;
        let size = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(limit))).ok()?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned()).filter(|text| !text.is_empty())
    };
    // The message's beginning counts; the log's end does.
    let message = fs::File::open(&running.message_file)
        .ok()
        .and_then(|file| {
            let mut bytes = Vec::new();
            file.take(MAX_MESSAGE).read_to_end(&mut bytes).ok()?;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        })
        .filter(|text| !text.is_empty());
    let fall_back = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError") && code != 0;
    match message {
        None if fall_back => {
            let text = read_end(running.sink.path(), 2048)?;
            // Without the log's own columns.
            let lines: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
            Some(lines.join("\n") + "\n").filter(|text| text.len() > 1)
        }
        other => other,
    }
}

/// Removes what a run leaves behind once its process has ended. The log stays.
pub(crate) async fn remove(context: &NodeContext, running: &Running) {
    if let Err(error) = context.runtime.delete(&running.id).await {
        tracing::warn!(container = %running.id, %error, "cannot remove a container");
    }
    for dir in [Some(running.bundle.as_path()), running.message_file.parent()].into_iter().flatten() {
        if let Err(error) = remove_dir(dir) {
            tracing::warn!(container = %running.id, %error, "cannot remove a container's files");
        }
    }
}

/// How a command in a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ExecOutcome {
    /// With an exit code and the beginning of its output.
    Exited { code: i32, output: String },
    /// Not within the time; it has been killed.
    TimedOut,
    /// It could not be started.
    NotStarted(String),
}

/// A command that runs in a container with its streams connected.
pub(crate) struct Exec {
    pub child: tokio::process::Child,
    pid_file: PathBuf,
    process_file: PathBuf,
    log: PathBuf,
    init: i32,
}

/// Starts a command. Streams that are not piped are closed; with a terminal none is piped.
pub(crate) fn exec(
    context: &NodeContext,
    running: &Running,
    args: &[String],
    stdin: bool,
    stdout: bool,
    stderr: bool,
    console: Option<&Path>,
) -> Result<Exec, RuntimeError> {
    let key = uuid::Uuid::new_v4().simple().to_string();
    let file = |suffix: &str| running.bundle.join(format!("exec-{key}.{suffix}"));
    let (process_file, pid_file, log) = (file("json"), file("pid"), file("log"));
    let mut spec = running.spec.clone();
    spec.args = args.to_vec();
    spec.terminal = console.is_some();
    if spec.terminal && !spec.env.iter().any(|(name, _)| name == "TERM") {
        spec.env.push(("TERM".to_string(), "xterm".to_string()));
    }
    let write = serde_json::to_vec(&oci::process(&spec))
        .map_err(io::Error::from)
        .and_then(|json| fs::write(&process_file, json));
    write.map_err(|source| RuntimeError::File { action: "write", path: process_file.display().to_string(), source })?;
    let mut command = context.runtime.exec(&running.id, &process_file, &pid_file, &log, console)?;
    let stream = |wanted: bool| if wanted && console.is_none() { Stdio::piped() } else { Stdio::null() };
    command.stdin(stream(stdin)).stdout(stream(stdout)).stderr(stream(stderr));
    let child = command.spawn().map_err(|source| RuntimeError::Spawn { program: "the runtime".to_string(), source })?;
    Ok(Exec { child, pid_file, process_file, log, init: running.process.pid })
}

impl Exec {
    /// Kills the command; `child` ends by itself then.
    pub(crate) fn kill(&self) {
        kill_in_container(&self.pid_file, self.init);
    }

    /// Waits for the end. `Err` means that the command could not be started, with the runtime's reason.
    pub(crate) async fn wait(&mut self) -> Result<i32, String> {
        use std::os::unix::process::ExitStatusExt;
        let status = self.child.wait().await.map_err(|e| e.to_string())?;
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let reason = log.lines().rev().find(|line| !line.trim().is_empty());
        match reason {
            // The runtime writes its log only when it fails itself.
            Some(reason) if code != 0 => Err(reason.trim().to_string()),
            _ => Ok(code),
        }
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        // A client that went away does not leave its command behind.
        self.kill();
        for file in [&self.pid_file, &self.process_file, &self.log] {
            let _ = fs::remove_file(file);
        }
        // What the runtime leaves of the command becomes our child a moment later.
        if let Ok(handle) = tokio::runtime::Handle::try_current() {
            handle.spawn(async {
                tokio::time::sleep(STRAY_AFTER).await;
                reap_strays();
            });
        }
    }
}

/// Runs a command to its end, for probes and hooks.
pub(crate) async fn exec_to_end(
    context: &NodeContext,
    running: &Running,
    args: &[String],
    limit: Duration,
) -> ExecOutcome {
    let mut exec = match exec(context, running, args, false, true, true, None) {
        Ok(exec) => exec,
        Err(e) => return ExecOutcome::NotStarted(e.to_string()),
    };
    let (stdout, stderr) = (exec.child.stdout.take(), exec.child.stderr.take());
    let output = Arc::new(Mutex::new(Vec::new()));
    let collect = {
        let output = output.clone();
        async move { tokio::join!(read_some(stdout, &output), read_some(stderr, &output)) }
    };
    let whole = async {
        tokio::pin!(collect);
        tokio::select! {
            code = exec.wait() => {
                // A process that it left behind may hold its output open for ever.
                let _ = tokio::time::timeout(OUTPUT_GRACE, collect).await;
                code
            }
            _ = collect.as_mut() => exec.wait().await,
        }
    };
    let ended = tokio::time::timeout(limit, whole).await;
    match ended {
        Ok(Ok(code)) => {
            let output = output.lock().unwrap_or_else(PoisonError::into_inner);
            ExecOutcome::Exited { code, output: String::from_utf8_lossy(&output).into_owned() }
        }
        Ok(Err(reason)) => ExecOutcome::NotStarted(reason),
        Err(_) => {
            exec.kill();
            // The runtime command ends with the process that it waits for; a second is long for that.
            if tokio::time::timeout(Duration::from_secs(1), exec.child.wait()).await.is_err() {
                let _ = exec.child.kill().await;
            }
            ExecOutcome::TimedOut
        }
    }
}

/// Reads to the end but keeps only the beginning.
async fn read_some(stream: Option<impl tokio::io::AsyncRead + Unpin>, kept: &Mutex<Vec<u8>>) {
    let Some(mut stream) = stream else { return };
    let mut buffer = [0u8; 4096];
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_OUTPUT.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..n.min(room)]);
    }
}

/// Takes the write end of a container's standard input for one client (`stdinOnce` closes it with that client).
pub(crate) fn take_stdin(running: &Running) -> Option<OwnedFd> {
    running.stdin.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Gives it back for the next client.
pub(crate) fn return_stdin(running: &Running, fd: OwnedFd) {
    *running.stdin.lock().unwrap_or_else(PoisonError::into_inner) = Some(fd);
}
