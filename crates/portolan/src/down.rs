//! `portolan down`: stops a cluster and removes what it made, also what a killed one left.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::args;
use crate::fabric::Fabric;
use crate::state::{Lock, Paths};

/// How long `up` may take to stop its pods; their own grace periods are cut short.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// Runs the command.
pub fn run(args: &args::Down) -> Result<()> {
    let paths = Paths::new(&args.named.name);
    let state = paths.read_state().unwrap_or_default();
    let ran = state.is_some() || paths.run.exists();
    let lock = stop(&paths)?;
    let data = state.map_or_else(|| paths.default_data(), |s| s.data_dir);
    clean(&paths, &data)?;
    let purged = args.purge && data.exists();
    if purged {
        fs::remove_dir_all(&data).with_context(|| format!("cannot remove {}", data.display()))?;
    }
    if args.purge {
        paths.forget(lock)?;
    }
    match (ran, purged) {
        (true, true) => println!("cluster {} is down, its data removed", paths.name),
        (true, false) => println!("cluster {} is down", paths.name),
        (false, true) => println!("cluster {} was not running; its data is removed", paths.name),
        (false, false) => println!("cluster {} was not running", paths.name),
    }
    Ok(())
}

/// Removes pods, namespaces, mounts and files of a run. The caller holds the lock, so no `up` is at work.
pub fn clean(paths: &Paths, data: &Path) -> Result<()> {
    portolan_node::cleanup(&paths.run, data).context("cannot remove the pods of an earlier run")?;
    Fabric::destroy(&paths.netns())?;
    if paths.run.exists() {
        portolan_linux::unmount_all_under(&paths.run)?;
        fs::remove_dir_all(&paths.run).with_context(|| format!("cannot remove {}", paths.run.display()))?;
    }
    Ok(())
}

/// Asks the process that holds the cluster to stop, insists after the deadline, and takes the lock.
fn stop(paths: &Paths) -> Result<Lock> {
    let pid = match paths.lock()? {
        Ok(lock) => return Ok(lock),
        Err(pid) => pid,
    };
    let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1).map(Pid::from_raw) else {
        bail!("cluster {} is held by a process that did not say who it is", paths.name);
    };
    for (signal, patience) in [(Signal::SIGTERM, STOP_DEADLINE), (Signal::SIGKILL, Duration::from_secs(5))] {
        match kill(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot stop process {pid}")),
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Ok(lock) = paths.lock()? {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    bail!("process {pid} of cluster {} does not stop", paths.name)
}
