//! Where a standalone cluster keeps its files, and who holds it.
//!
//! `/var/lib/portolan/NAME` survives a restart (objects, keys, images); `/run/portolan/NAME` belongs to one run (namespaces, pods,
//! the lock). A running `up` holds an advisory lock on `/run/portolan/NAME.lock`, which the kernel drops however the process ends.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// Prefix of the per-run folders. Not configurable: `down`, `exec` and `status` find a cluster by its name alone.
const RUN_ROOT: &str = "/run/portolan";
/// Prefix of the data folders, unless `--data-dir` says otherwise.
const DATA_ROOT: &str = "/var/lib/portolan";

/// The name of a standalone cluster: a DNS label, because it becomes part of paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterName(String);

impl std::str::FromStr for ClusterName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let ends = |b: Option<&u8>| b.is_some_and(|b| *b != b'-');
        let bytes = text.as_bytes();
        if bytes.len() <= 40 && bytes.iter().copied().all(label) && ends(bytes.first()) && ends(bytes.last()) {
            Ok(ClusterName(text.to_string()))
        } else {
            Err("a cluster name has 1 to 40 lower-case letters, digits and inner dashes".into())
        }
    }
}

impl std::fmt::Display for ClusterName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The paths of one cluster.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The cluster's name.
    pub name: ClusterName,
    /// Folder of this run.
    pub run: PathBuf,
}

impl Paths {
    /// The paths of the cluster called `name`.
    pub fn new(name: &ClusterName) -> Paths {
        Paths { name: name.clone(), run: Path::new(RUN_ROOT).join(&name.0) }
    }

    /// Default folder for what survives a restart.
    pub fn default_data(&self) -> PathBuf {
        Path::new(DATA_ROOT).join(&self.name.0)
    }

    /// Folder of the named network namespaces.
    pub fn netns(&self) -> PathBuf {
        self.run.join("netns")
    }

    /// File that describes the running cluster.
    pub fn state_file(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// resolv.conf of the host outside the cluster.
    pub fn outside_resolv_conf(&self) -> PathBuf {
        self.run.join("outside-resolv.conf")
    }

    fn lock_file(&self) -> PathBuf {
        Path::new(RUN_ROOT).join(format!("{}.lock", self.name))
    }

    /// Takes the cluster for this process.
    ///
    /// # Errors
    /// `Ok(Err(pid))` when another process holds it; `Err` when the folders cannot be made.
    pub fn lock(&self) -> Result<Result<Lock, u32>> {
        fs::create_dir_all(RUN_ROOT).with_context(|| format!("cannot create {RUN_ROOT}"))?;
        let path = self.lock_file();
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                lock.set_len(0)?;
                lock.rewind()?;
                write!(lock, "{}", std::process::id())?;
                Ok(Ok(Lock { _file: lock }))
            }
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => Ok(Err(pid_in(&mut file)?)),
            Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// The process that holds the cluster, if one does.
    pub fn holder(&self) -> Result<Option<u32>> {
        let path = self.lock_file();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(None),
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => Ok(Some(pid_in(&mut file)?)),
            Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// What the running cluster says about itself.
    ///
    /// # Errors
    /// Fails with the command to start it when it does not run.
    pub fn running(&self) -> Result<State> {
        let state = if self.holder()?.is_some() { self.read_state()? } else { None };
        state.with_context(|| {
            let name = &self.name;
            format!("cluster {name} is not running; start it with: portolan up --name {name} --detach")
        })
    }

    /// Removes the lock's file. The caller holds the lock and nothing else of the cluster is left.
    pub fn forget(&self, lock: Lock) -> Result<()> {
        let path = self.lock_file();
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        drop(lock);
        Ok(())
    }

    /// What the running (or crashed) cluster wrote about itself; `None` when there is none.
    pub fn read_state(&self) -> Result<Option<State>> {
        let path = self.state_file();
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).with_context(|| format!("cannot parse {}", path.display()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes what others may know about the cluster, atomically.
    pub fn write_state(&self, state: &State) -> Result<()> {
        write_private(&self.state_file(), &serde_json::to_vec_pretty(state)?)
    }

    /// Names of all clusters that have a folder under the run root.
    pub fn all() -> Vec<ClusterName> {
        let Ok(entries) = fs::read_dir(RUN_ROOT) else { return Vec::new() };
        let mut names: Vec<ClusterName> = entries
            .flatten()
            .filter(|e| e.path().is_dir())
            .filter_map(|e| e.file_name().to_str()?.parse().ok())
            .collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        names
    }
}

/// The process id that the holder of a lock wrote; 0 when it has not yet.
fn pid_in(file: &mut File) -> io::Result<u32> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text.trim().parse().unwrap_or(0))
}

/// Holds a cluster until dropped.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// What `up` tells other commands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Process id of `up`.
    pub pid: u32,
    /// Folder for what survives a restart.
    pub data_dir: PathBuf,
    /// Kubeconfig of the administrator.
    pub kubeconfig: PathBuf,
    /// Where the API server listens.
    pub api: SocketAddr,
    /// Where the Ingress is published for HTTP.
    pub http: SocketAddr,
    /// Where the Ingress is published for HTTPS.
    pub https: SocketAddr,
    /// Node names with their addresses and zones.
    pub nodes: Vec<NodeState>,
    /// Whether all system pods have been ready.
    pub ready: bool,
}

/// One node of a running cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeState {
    /// Name of the Node object.
    pub name: String,
    /// InternalIP.
    pub address: std::net::IpAddr,
    /// Topology zone.
    pub zone: String,
}

/// Writes a file that only root reads, so that readers see the old or the new content, never a part.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let temporary = dir.join(format!(".{}.{}", path.file_name().unwrap_or_default().display(), std::process::id()));
        fs::write(&temporary, content)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_dns_labels() {
        for good in ["a", "default", "e2e-1", "0"] {
            assert!(good.parse::<ClusterName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a.b", &"x".repeat(41)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
    }
}
