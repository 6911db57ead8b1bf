//! Checks, before anything is made, that the machine can carry a cluster; each failure says what to do.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use nix::sched::{CloneFlags, unshare};

/// Checks privileges, kernel features and the OCI runtime program.
pub fn check(runtime: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("must run as root, because a cluster is made of network namespaces; try: sudo portolan up");
    }
    namespaces()?;
    if !Path::new("/proc/sys/net/ipv4/ip_forward").exists() {
        bail!("the kernel has no IPv4 forwarding (/proc/sys/net/ipv4/ip_forward is missing)");
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.ends_with("overlay")) && modprobe("overlay").is_none() {
        tracing::info!("the kernel has no overlayfs: image layers are copied for each container");
    }
    if find_program(runtime).is_none() {
        bail!(
            "cannot find the OCI runtime {}: install the Debian package crun, or name another with --runtime",
            runtime.display()
        );
    }
    Ok(())
}

/// Tries to make each kind of namespace on a thread that ends with it.
fn namespaces() -> Result<()> {
    for (flag, name) in [
        (CloneFlags::CLONE_NEWNET, "network"),
        (CloneFlags::CLONE_NEWNS, "mount"),
        (CloneFlags::CLONE_NEWUTS, "UTS"),
        (CloneFlags::CLONE_NEWIPC, "IPC"),
    ] {
        let made = std::thread::spawn(move || unshare(flag)).join();
        match made {
            Ok(Ok(())) => {}
            Ok(Err(error)) => bail!(
                "cannot make a {name} namespace: {error}; run as root outside of a restricted container \
                 (CAP_SYS_ADMIN is needed)"
            ),
            Err(_) => bail!("cannot check for {name} namespaces"),
        }
    }
    Ok(())
}

fn modprobe(module: &str) -> Option<()> {
    let status = std::process::Command::new("modprobe").arg("-q").arg(module).status().ok()?;
    status.success().then_some(())
}

/// Finds a program through PATH, or as a path when it has a slash.
pub fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_path_buf());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|candidate| candidate.is_file())
}
