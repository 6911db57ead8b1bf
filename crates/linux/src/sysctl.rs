//! Kernel parameters of a network namespace.

use crate::Netns;
use std::io;

/// Sets `/proc/sys/{key}` (as in `net/ipv4/ip_forward`) as seen from inside the namespace.
pub fn set_sysctl(netns: &Netns, key: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{key}");
    netns
        .run(|| std::fs::write(&path, value))?
        .map_err(|e| io::Error::new(e.kind(), format!("cannot write {value:?} to {path}: {e}")))
}
