//! Drives the OCI runtime program and keeps hold of what it starts.
//!
//! Every runtime command runs in a mount namespace of its own that is left behind by the command: the container's root file
//! system is mounted there, so no mount of a container ever appears on the host and none can leak. This process is made a
//! child subreaper, so the first process of a container becomes our child when the runtime command ends and its exit status
//! is exact.

use std::collections::{BTreeSet, HashSet};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use nix::mount::{MntFlags, umount2};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::config::{Error as StartError, RuntimeConfig};

/// How often strays are looked for while a container ends.
const SWEEP_PERIOD: Duration = Duration::from_millis(250);

/// How a container's first process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 plus the signal's number.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// When it was noticed.
    pub at: Timestamp,
}

/// Why the runtime did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    /// The program could not be run at all.
    #[error("cannot run {program}: {source}")]
    Spawn {
        program: String,
        #[source]
        source: io::Error,
    },
    /// It ran and refused; the text is the runtime's.
    #[error("{0}")]
    Refused(String),
    /// A file that the runtime reads or writes is not as it should be.
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RuntimeError {
    let path = path.display().to_string();
    move |source| RuntimeError::File { action, path, source }
}

/// The root file system of a container, mounted by [`Runtime::run`].
#[derive(Clone, Debug)]
pub(crate) enum RootFs {
    /// Layers, lowest first, under a writable directory.
    Overlay { lower: Vec<PathBuf>, upper: PathBuf, work: PathBuf },
    /// A directory that is the root file system already (a copy, where overlayfs cannot be used).
    Directory,
}

/// What a container is connected to.
pub(crate) enum Console {
    /// Three descriptors.
    Pipes { stdin: Stdio, stdout: Stdio, stderr: Stdio },
    /// A terminal; its master side is sent to the listening socket at this path.
    Terminal(PathBuf),
}

/// The runtime program with its state directory.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    program: PathBuf,
    root: PathBuf,
    split_cgroups: bool,
}

impl Runtime {
    /// Checks that the program runs, and makes this process the reaper of what it starts.
    pub(crate) async fn new(config: &RuntimeConfig, root: PathBuf) -> Result<Runtime, StartError> {
        let made = |source| StartError::Runtime { program: config.program.clone(), source };
        let output = tokio::process::Command::new(&config.program).arg("--version").stdin(Stdio::null()).output().await;
        let output = output.map_err(made)?;
        if !output.status.success() {
            return Err(made(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_string())));
        }
        fs::create_dir_all(&root).map_err(|source| StartError::File {
            action: "create",
            path: root.clone(),
            source,
        })?;
        nix::sys::prctl::set_child_subreaper(true).map_err(|e| made(e.into()))?;
        let name = config.program.file_name().map(|n| n.to_string_lossy().chars().take(15).collect());
        children().programs.extend(name);
        Ok(Runtime { program: config.program.clone(), root, split_cgroups: cgroups_are_split() })
    }

    /// Creates and starts a container from a bundle directory that holds `config.json` and an empty `rootfs`.
    pub(crate) async fn run(
        &self,
        id: &str,
        bundle: &Path,
        rootfs: &RootFs,
        cgroup: bool,
        console: Console,
    ) -> Result<Process, RuntimeError> {
        let log = bundle.join("runtime.log");
        let pid_file = bundle.join("pid");
        let mut command = self.command(&log, Some((bundle, rootfs)), cgroup)?;
        command.arg("run").arg("--detach").arg("--pid-file").arg(&pid_file).arg("--bundle").arg(bundle);
        match console {
            Console::Pipes { stdin, stdout, stderr } => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
            Console::Terminal(socket) => {
                command.arg("--console-socket").arg(socket);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        command.arg(id);
        let starting = Starting::begin();
        let status = self.status(command).await?;
        if !status.success() {
            let reason = last_line(&log).unwrap_or_else(|| format!("the runtime ended with {status}"));
            // A container that failed half way leaves its directory.
            let _ = self.delete(id).await;
            return Err(RuntimeError::Refused(reason));
        }
        let pid: i32 = fs::read_to_string(&pid_file)
            .and_then(|text| text.trim().parse().map_err(io::Error::other))
            .map_err(file_error("read", &pid_file))?;
        let process = Process::adopt(pid).await.map_err(file_error("watch the process in", &pid_file));
        drop(starting);
        reap_strays();
        process
    }

    /// Prepares a command inside a running container. The caller connects its streams, spawns and waits.
    ///
    /// The exit status of the command is that of the process. `pid_file` gets the process id as the host sees it.
    pub(crate) fn exec(
        &self,
        id: &str,
        process: &Path,
        pid_file: &Path,
        log: &Path,
        console: Option<&Path>,
    ) -> Result<tokio::process::Command, RuntimeError> {
        let mut command = self.command(log, None, false)?;
        command.arg("exec").arg("--pid-file").arg(pid_file).arg("--process").arg(process);
        if let Some(socket) = console {
            command.arg("--tty").arg("--console-socket").arg(socket);
        }
        command.arg(id);
        Ok(command)
    }

    /// Removes a container and kills what runs in it; not being there is no error.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        if !self.root.join(id).exists() {
            return Ok(());
        }
        let log = self.root.join(format!("{id}.log"));
        let mut command = self.command(&log, None, true)?;
        command.arg("delete").arg("--force").arg(id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = self.status(command).await;
        let reason = last_line(&log);
        let _ = fs::remove_file(&log);
        match status? {
            status if status.success() || !self.root.join(id).exists() => Ok(()),
            status => Err(RuntimeError::Refused(reason.unwrap_or_else(|| format!("the runtime ended with {status}")))),
        }
    }

    async fn status(&self, mut command: tokio::process::Command) -> Result<std::process::ExitStatus, RuntimeError> {
        command
            .status()
            .await
            .map_err(|source| RuntimeError::Spawn { program: self.program.display().to_string(), source })
    }

    /// A command of the runtime in a mount namespace of its own, with `rootfs` mounted at `bundle/rootfs` there.
    fn command(
        &self,
        log: &Path,
        root: Option<(&Path, &RootFs)>,
        cgroup: bool,
    ) -> Result<tokio::process::Command, RuntimeError> {
        let mut command = tokio::process::Command::new(&self.program);
        command.arg("--root").arg(&self.root);
        command.arg(if cgroup { "--cgroup-manager=cgroupfs" } else { "--cgroup-manager=disabled" });
        command.arg("--log").arg(log);
        let overlay = match root {
            Some((bundle, RootFs::Overlay { lower, upper, work })) => {
                Some(Overlay::new(&bundle.join("rootfs"), lower, upper, work).map_err(file_error("mount", bundle))?)
            }
            Some((_, RootFs::Directory)) | None => None,
        };
        let split_cgroups = self.split_cgroups;
        // SAFETY: between fork and exec the closure makes only system calls (unshare, mount, umount2) with memory that was
        // prepared before the fork; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                private_mounts(split_cgroups)?;
                overlay.as_ref().map_or(Ok(()), Overlay::mount)
            });
        }
        Ok(command)
    }
}

/// Gives the calling process a mount namespace that follows the host's changes but keeps its own to itself.
///
/// crun 1.8 refuses to run at all when the unified cgroup hierarchy is mounted beside the old ones and has a controller, even
/// when it is told to leave cgroups alone; hiding that mount from the command is enough.
fn private_mounts(split_cgroups: bool) -> io::Result<()> {
    // SAFETY: plain system calls with constant, NUL-terminated strings.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0
            || libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_SLAVE,
                std::ptr::null(),
            ) != 0
        {
            return Err(io::Error::last_os_error());
        }
        if split_cgroups && libc::umount2(c"/sys/fs/cgroup/unified".as_ptr(), libc::MNT_DETACH) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn cgroups_are_split() -> bool {
    let unified = Path::new("/sys/fs/cgroup/unified");
    portolan_linux::is_mount_point(unified).unwrap_or(false)
}

/// An overlay mount whose arguments are ready for use between fork and exec.
struct Overlay {
    target: CString,
    options: CString,
}

impl Overlay {
    /// The mount's option string must fit a page (mount(2)); the error says so.
    fn new(target: &Path, lower: &[PathBuf], upper: &Path, work: &Path) -> io::Result<Overlay> {
        let mut options = b"lowerdir=".to_vec();
        // overlayfs lists the topmost layer first.
        for (i, layer) in lower.iter().rev().enumerate() {
            if i > 0 {
                options.push(b':');
            }
            options.extend(escape_overlay(layer));
        }
        options.extend(b",upperdir=");
        options.extend(escape_overlay(upper));
        options.extend(b",workdir=");
        options.extend(escape_overlay(work));
        if options.len() >= 4096 {
            return Err(io::Error::other(format!("{} layers are too many for one overlay mount", lower.len())));
        }
        Ok(Overlay { target: CString::new(target.as_os_str().as_bytes())?, options: CString::new(options)? })
    }

    fn mount(&self) -> io::Result<()> {
        // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
        let done = unsafe {
            libc::mount(c"overlay".as_ptr(), self.target.as_ptr(), c"overlay".as_ptr(), 0, self.options.as_ptr().cast())
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Colons and backslashes separate layers, commas separate options (kernel Documentation/filesystems/overlayfs.rst).
fn escape_overlay(path: &Path) -> Vec<u8> {
    let mut out = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b':' | b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    out
}

/// Whether overlayfs works with its writable directory in `dir` (it does not on another overlay, for example).
pub(crate) fn overlay_works_in(dir: &Path) -> bool {
    let probe = dir.join(".overlay-probe");
    let parts = ["lower", "upper", "work", "merged"].map(|part| probe.join(part));
    let made = parts.iter().all(|part| fs::create_dir_all(part).is_ok());
    let works = made
        && Overlay::new(&parts[3], &parts[..1], &parts[1], &parts[2]).is_ok_and(|overlay| {
            // A thread of its own, because the mount namespace of the process must not change.
            std::thread::spawn(move || {
                // A thread shares its working directory and root with its siblings until it unshares them (unshare(2)).
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_ok()
                    && private_mounts(false).is_ok()
                    && overlay.mount().is_ok()
            })
            .join()
            .unwrap_or(false)
        });
    let _ = fs::remove_dir_all(&probe);
    works
}

fn last_line(log: &Path) -> Option<String> {
    let text = fs::read_to_string(log).ok()?;
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.trim().to_string())
}

/// The first process of a running container. Clones watch the same process.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    /// As the host sees it.
    pub pid: i32,
    fd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

/// What the sweep for strays must leave alone. One for the process, because children belong to the process.
static CHILDREN: LazyLock<Mutex<Children>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct Children {
    /// First processes of containers, which have their waiters.
    adopted: HashSet<i32>,
    /// Names of runtime programs, as the kernel shows them (15 bytes).
    programs: BTreeSet<String>,
    /// Starts under way: a container that ends at once is our child before it is adopted.
    starting: usize,
}

/// Holds off the sweep while a container is being started.
struct Starting;

impl Starting {
    fn begin() -> Starting {
        children().starting += 1;
        Starting
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        children().starting -= 1;
    }
}

impl Process {
    /// Takes over the waiting for a process that the runtime left to us.
    ///
    /// A runtime that detaches forks once more, and that fork may outlive the command by a moment: only when it has ended is
    /// the container's process our child.
    async fn adopt(pid: i32) -> io::Result<Process> {
        let fd = Arc::new(pidfd_open(pid)?);
        children().adopted.insert(pid);
        let parent = stat_field(pid, 1).and_then(|ppid| i32::try_from(ppid).ok()).unwrap_or(0);
        if parent > 1
            && u32::try_from(parent) != Ok(std::process::id())
            && let Ok(parent) = pidfd_open(parent)
        {
            // SAFETY: the registration owns the descriptor.
            let waiter = unsafe { AsyncFd::register_with_interest(parent, tokio::io::Interest::READABLE) }?;
            if tokio::time::timeout(Duration::from_secs(5), waiter.readable()).await.is_ok() {
                reap(waiter.get_ref());
            }
        }
        let (sender, exit) = watch::channel(None);
        // SAFETY: the descriptor is owned by the registration and by nobody who closes it before.
        let waiter = unsafe { AsyncFd::register_with_interest(fd.clone(), tokio::io::Interest::READABLE) }?;
        tokio::spawn(async move {
            let _ = waiter.readable().await;
            let exit = reap(waiter.get_ref());
            children().adopted.remove(&pid);
            reap_strays();
            let _ = sender.send(Some(exit));
        });
        Ok(Process { pid, fd, exit })
    }

    /// Sends a signal; a process that is gone is no error.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: a valid descriptor and no siginfo.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match io::Error::last_os_error() {
            _ if sent == 0 => Ok(()),
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        }
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end of a process that has been told to end, and removes what would hold it up.
    pub(crate) async fn wait_swept(&self) -> Exit {
        loop {
            match tokio::time::timeout(SWEEP_PERIOD, self.wait()).await {
                Ok(exit) => return exit,
                Err(_) => reap_strays(),
            }
        }
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        match ended {
            Ok(Some(exit)) => exit,
            // The waiting task only goes away with the runtime, so nobody is left to be told.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}

fn children() -> std::sync::MutexGuard<'static, Children> {
    CHILDREN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; the result is checked before it is owned.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn reap(fd: &OwnedFd) -> Exit {
    use std::os::fd::AsFd;
    let at = Timestamp::now();
    match waitid(Id::PIDFd(fd.as_fd()), WaitPidFlag::WEXITED) {
        Ok(WaitStatus::Exited(_, code)) => Exit { code, signal: None, at },
        Ok(WaitStatus::Signaled(_, signal, _)) => Exit { code: 128 + signal as i32, signal: Some(signal as i32), at },
        // Not our child after all (another reaper was nearer): that it ended is certain, how is not.
        Ok(_) | Err(_) => Exit { code: 255, signal: None, at },
    }
}

/// Reaps processes that became our children without anybody waiting for them: the runtime's own forks, and processes of
/// containers whose `exec` was killed. Recognised by what no other child of ours has: a session of its own together with a
/// nested pid namespace or the runtime's name. All other children belong to code that waits for them.
///
/// A stray that nobody reaps keeps the first process of its container from ending: the kernel waits until a pid namespace is
/// empty. So whoever waits for such an end sweeps meanwhile.
pub(crate) fn reap_strays() {
    // Held to the end, so that no start begins meanwhile.
    let children = children();
    // A container that is being started may be our child already and have ended, but then it has another name by now.
    let starting = children.starting > 0;
    // SAFETY: no memory is involved.
    let session = unsafe { libc::getsid(0) };
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return };
    for task in tasks.flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in list.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()) {
            if children.adopted.contains(&pid) || stat_field(pid, 3) == u64::try_from(session).ok() {
                continue;
            }
            let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
            let nested = field("NSpid:").split_whitespace().count() > 1;
            let runtime = children.programs.iter().any(|program| program == field("Name:"));
            if (runtime || nested && !starting) && field("State:").starts_with('Z') {
                let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
            }
        }
    }
}

/// A number of `/proc/{pid}/stat`, counted after the state (proc_pid_stat(5)): 1 is the parent, 3 the session, 19 the start.
/// The command's name before it may itself hold spaces and parentheses.
fn stat_field(pid: i32, index: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(index)?.parse().ok()
}

/// Kills a command inside a container by the process id that its `exec` wrote, if it is still that container's.
pub(crate) fn kill_in_container(pid_file: &Path, init: i32) {
    let Some(pid) = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok()) else { return };
    let Ok(fd) = pidfd_open(pid) else { return };
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    // The descriptor pins the process, so what is compared is what is signalled.
    if namespace(pid).is_some_and(|ns| Some(ns) == namespace(init)) {
        // SAFETY: a valid descriptor and no siginfo.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                fd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }
}

/// Removes everything that kubelets with these directories made: containers, mounts, namespaces, files.
///
/// Works without the process that made them and may be repeated. Touches nothing outside `{run_dir}/node` and
/// `{state_dir}/node`, and no process that the runtime's own records there do not name. Call it before deleting the nodes'
/// network namespaces or after; both work. Blocks for a few milliseconds per container.
pub fn cleanup(run_dir: &Path, state_dir: &Path) -> io::Result<()> {
    let run = run_dir.join("node");
    for node in entries(&run)? {
        cleanup_node(&node)?;
    }
    for dir in [run, state_dir.join("node")] {
        portolan_linux::unmount_all_under(&dir)?;
        remove_dir(&dir)?;
    }
    Ok(())
}

/// Removes what one kubelet made: `dir` is `{run_dir}/node/{name}`. Files below the state directory stay.
pub(crate) fn cleanup_node(dir: &Path) -> io::Result<()> {
    let root = dir.join("crun");
    let mut killed = Vec::new();
    for container in entries(&root)? {
        if let Some((pid, pidfd)) = recorded_process(&container) {
            // SAFETY: a valid descriptor and no siginfo.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    pidfd.as_raw_fd(),
                    libc::SIGKILL,
                    std::ptr::null::<libc::siginfo_t>(),
                    0,
                );
            }
            killed.push((pid, pidfd));
        }
    }
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    for (pid, fd) in killed {
        // Killing the first process of a pid namespace kills the others; the kernel reports its end after theirs.
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        while unsafe { libc::poll(&mut poll, 1, 100) } == 0 && std::time::Instant::now() < deadline {
            reap_strays();
        }
        reap(&fd);
        // Who waited for it may be gone with the agent that started it.
        children().adopted.remove(&pid);
    }
    remove_cgroups(dir)?;
    portolan_linux::unmount_all_under(dir)?;
    remove_dir(dir)
}

/// The process that the runtime recorded for a container, if it is still that one: the start time must agree, because
/// process ids are used again.
fn recorded_process(container: &Path) -> Option<(i32, OwnedFd)> {
    let status: serde_json::Value = serde_json::from_slice(&fs::read(container.join("status")).ok()?).ok()?;
    let pid = i32::try_from(status.get("pid")?.as_i64()?).ok()?;
    let started = status.get("process-start-time")?.as_u64()?;
    let fd = pidfd_open(pid).ok()?;
    (stat_field(pid, 19)? == started).then_some((pid, fd))
}

/// The cgroup path below each hierarchy for containers of the node that keeps its runtime state in `node_dir`.
pub(crate) fn cgroup_parent(node_dir: &Path) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(node_dir.as_os_str().as_bytes());
    format!("/portolan-{}", crate::names::hex(&digest[..6]))
}

fn remove_cgroups(node_dir: &Path) -> io::Result<()> {
    let parent = cgroup_parent(node_dir);
    let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
    roots.extend(entries(Path::new("/sys/fs/cgroup"))?);
    for root in roots {
        let dir = root.join(parent.trim_start_matches('/'));
        for child in entries(&dir)?.into_iter().filter(|child| child.is_dir()) {
            let _ = fs::remove_dir(child);
        }
        match fs::remove_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound && e.raw_os_error() != Some(libc::ENOTDIR) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// The entries of a directory; none if it does not exist.
pub(crate) fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(list) => list.map(|entry| entry.map(|e| e.path())).collect(),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Removes a directory with its content; not being there is no error. Does not follow links out of it.
pub(crate) fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(e.kind(), format!("cannot remove {}: {e}", dir.display())))
        }
        _ => Ok(()),
    }
}

/// Unmounts `path` if something is mounted there.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_lists_the_topmost_layer_first_and_escapes_separators() {
        let overlay =
            Overlay::new(Path::new("/m"), &["/a:b".into(), "/c,d".into()], Path::new("/u"), Path::new("/w")).unwrap();
        assert_eq!(overlay.options.to_str().unwrap(), "lowerdir=/c\\,d:/a\\:b,upperdir=/u,workdir=/w");
    }

    #[test]
    fn too_many_layers_are_refused_rather_than_cut() {
        let layers: Vec<PathBuf> =
            (0..200).map(|i| PathBuf::from(format!("/var/lib/portolan/images/{i:032}"))).collect();
        assert!(Overlay::new(Path::new("/m"), &layers, Path::new("/u"), Path::new("/w")).is_err());
    }

    #[test]
    fn a_process_that_took_over_an_id_is_not_the_recorded_one() {
        let dir = std::env::temp_dir().join(format!("portolan-recorded-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let pid = std::process::id();
        fs::write(dir.join("status"), format!(r#"{{"pid":{pid},"process-start-time":1}}"#)).unwrap();
        assert!(recorded_process(&dir).is_none());
        fs::remove_dir_all(&dir).unwrap();
    }
}
