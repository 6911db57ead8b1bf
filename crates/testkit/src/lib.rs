//! Helpers of the tests: waiting with a deadline, running commands, a standalone cluster of a test's own.

pub mod registry;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Repeats `probe` until it returns `Ok`, and panics with the last `Err` when that did not happen within `limit`.
pub fn eventually<T, E: std::fmt::Display>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= deadline => panic!("{what}: not within {limit:?}; last seen: {last}"),
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
}

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Standard output of a command that succeeded; panics otherwise.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == Some(0), "{self}");
        self.stdout
    }

    /// Standard error of a command that failed; panics if it succeeded.
    #[track_caller]
    pub fn failed(self) -> String {
        assert!(self.code != Some(0), "should have failed: {self}");
        self.stderr
    }

    /// `Ok` with the output if it succeeded and contains `text`, for use with [`eventually`].
    pub fn has(self, text: &str) -> Result<String, String> {
        if self.code == Some(0) && self.stdout.contains(text) { Ok(self.stdout) } else { Err(self.to_string()) }
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "$ {}\n{}{}(exit code {:?})", self.line, self.stdout, self.stderr, self.code)
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ran {
    let line = format!("{command:?}");
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|e| panic!("cannot run {line}: {e}"));
    Ran {
        line,
        code: status.code(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

static CLUSTERS: AtomicU32 = AtomicU32::new(0);

/// A standalone cluster of a test's own, removed with its data when dropped.
#[derive(Debug)]
pub struct Cluster {
    binary: PathBuf,
    /// Its unique name.
    pub name: String,
    /// Kubeconfig of the administrator; empty until [`Cluster::start`].
    pub kubeconfig: PathBuf,
}

impl Cluster {
    /// Names a cluster after `test` and this process; starts nothing.
    pub fn new(binary: &str, test: &str) -> Cluster {
        let number = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{test}-{}-{number}", std::process::id());
        Cluster { binary: binary.into(), name, kubeconfig: PathBuf::new() }
    }

    /// Starts it on free ports and waits until it is ready.
    pub fn up(binary: &str, test: &str) -> Cluster {
        let mut cluster = Cluster::new(binary, test);
        cluster.start(&[]).ok();
        cluster
    }

    /// Runs `portolan up --detach` on free ports with further arguments.
    pub fn start(&mut self, arguments: &[&str]) -> Ran {
        let ports = ["--detach", "--api-port=0", "--http-port=0", "--https-port=0"];
        let ran = self.portolan("up", &[&ports[..], arguments].concat());
        if ran.code == Some(0) {
            self.kubeconfig = self.portolan("kubeconfig", &[]).ok().trim().into();
        }
        ran
    }

    /// Runs a `portolan` command for this cluster.
    pub fn portolan(&self, command: &str, arguments: &[&str]) -> Ran {
        run(Command::new(&self.binary).arg(command).args(["--name", &self.name]).args(arguments))
    }

    /// Runs a command of the machine in a place of the cluster's network (`outside`, `node/NAME`, `pod/NS/NAME`).
    pub fn exec(&self, place: &str, command: &[&str]) -> Ran {
        let mut arguments = vec!["--in", place, "--"];
        arguments.extend(command);
        self.portolan("exec", &arguments)
    }

    /// Runs kubectl with words split at spaces, as one would type it.
    pub fn kubectl(&self, words: &str) -> Ran {
        self.kubectl_args(words.split_whitespace())
    }

    /// Runs kubectl with arguments as they are.
    pub fn kubectl_args<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        run(self.kubectl_command().args(arguments))
    }

    /// kubectl with this cluster's kubeconfig and a cache of its own.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new("kubectl");
        command.env("KUBECONFIG", &self.kubeconfig);
        command.arg("--cache-dir").arg(self.kubeconfig.with_file_name("kubectl-cache"));
        command
    }

    /// Applies manifests given as text.
    pub fn apply(&self, manifests: &str) -> Ran {
        self.kubectl_stdin(&["apply", "-f", "-"], manifests)
    }

    /// Runs kubectl with something to read on standard input.
    pub fn kubectl_stdin(&self, arguments: &[&str], input: &str) -> Ran {
        use std::io::Write;
        use std::process::Stdio;
        let mut command = self.kubectl_command();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let line = format!("{command:?} <<END\n{input}\nEND");
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot run {line}: {e}"));
        let mut stdin = child.stdin.take().expect("was piped");
        // kubectl takes anything that begins with a brace for JSON; a document marker says that it is YAML.
        let input = if input.starts_with('{') { format!("---\n{input}") } else { input.to_string() };
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().expect("kubectl ends");
        // kubectl may stop reading early on an error; that shows in its output.
        let _ = writer.join();
        Ran {
            line,
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The process id of `up`.
    pub fn pid(&self) -> i32 {
        let status = self.portolan("status", &["-o", "json"]);
        let report: serde_json::Value =
            serde_json::from_str(&status.stdout).unwrap_or_else(|e| panic!("{e}: {status}"));
        report["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_else(|| panic!("no pid: {status}"))
    }

    /// The cgroups of this cluster's nodes, which are named after a digest of the node's run-time directory.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let names: Vec<String> = (1..=8)
            .map(|node| registry::digest(format!("/run/portolan/{}/node/node-{node}", self.name).as_bytes()))
            .map(|digest| format!("portolan-{}", &digest["sha256:".len()..][..12]))
            .collect();
        let roots = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
        let places = roots.chain(["/sys/fs/cgroup".into()]).flat_map(|root| names.iter().map(move |n| root.join(n)));
        places.filter(|path| path.is_dir()).collect()
    }

    /// What is left on the machine of this cluster: cgroups, mounts, and processes that name it or run in its namespaces.
    pub fn leftovers(&self) -> Vec<String> {
        let run = format!("/run/portolan/{}", self.name);
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut found: Vec<String> =
            mounts.lines().filter(|l| l.contains(&format!("{run}/"))).map(|l| format!("mount: {l}")).collect();
        if Path::new(&run).exists() {
            found.push(format!("folder: {run}"));
        }
        for cgroup in self.cgroups() {
            found.push(format!("cgroup: {}", cgroup.display()));
        }
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let text = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            if text.contains(&self.name) && entry.file_name() != *std::process::id().to_string() {
                found.push(format!("process {}: {text}", entry.file_name().display()));
            }
        }
        found
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = format!("/var/lib/portolan/{}/up.log", self.name);
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(40).collect();
            eprintln!("last lines of {log}:");
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
            if std::env::var_os("PORTOLAN_KEEP").is_some() {
                eprintln!("kept cluster {}", self.name);
                return;
            }
        }
        let down = self.portolan("down", &["--purge"]);
        if down.code != Some(0) {
            eprintln!("{down}");
        }
    }
}
