//! Notices when somebody else touches our table, and asks for it to be put right.
//!
//! nf_tables announces every change with the socket that asked for it. What others do to a table of our name is a reason to
//! read the table back and compare.

use std::io;
use std::time::{Duration, Instant};

use portolan_linux::Netns;
use portolan_nft::netlink::socket::Socket;
use tokio_util::sync::CancellationToken;

use crate::applier::Mailbox;
use crate::layout::TABLE;

const NFNLGRP_NFTABLES: libc::c_int = 7;
const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// How often the thread looks whether it should end.
const TICK: Duration = Duration::from_millis(250);
/// Interference is answered at most this often, so that a quarrel between two programs costs little.
const QUIET: Duration = Duration::from_millis(200);

/// Holds the monitor's thread; it ends soon after this is dropped.
#[derive(Debug)]
pub struct Monitor {
    stop: CancellationToken,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Starts to watch the namespace's nf_tables announcements. `own` is the socket of the applier, see
/// [`crate::ServiceProxy::port_id`].
pub fn watch(netns: &Netns, own: u32, mailbox: Mailbox) -> io::Result<Monitor> {
    let socket = netns.run(|| -> io::Result<Socket> {
        let socket = Socket::open(libc::NETLINK_NETFILTER)?;
        socket.ignore_sender(own)?;
        socket.join(NFNLGRP_NFTABLES)?;
        socket.set_receive_timeout(TICK)?;
        Ok(socket)
    })??;
    let stop = CancellationToken::new();
    let monitor = Monitor { stop: stop.clone() };
    std::thread::Builder::new().name("nft-monitor".into()).spawn(move || {
        let mut interfered = false;
        let mut asked = None::<Instant>;
        while !stop.is_cancelled() {
            interfered |= match socket.receive() {
                Ok(buffer) => is_interference(&buffer, own),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => false,
                // Announcements were lost in a flood; what they said is unknown.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => true,
                Err(error) => {
                    tracing::warn!(%error, "cannot watch nf_tables any more");
                    return;
                }
            };
            // The announcement comes after the commit, so the applier sees its effect.
            if interfered && asked.is_none_or(|at| at.elapsed() > QUIET) {
                asked = Some(Instant::now());
                interfered = false;
                mailbox.interfered();
            }
        }
    })?;
    Ok(monitor)
}

/// Whether a datagram announces a change of a table of our name by another socket than `own`.
fn is_interference(buffer: &[u8], own: u32) -> bool {
    let mut rest = buffer;
    while let Some(header) = rest.get(..16) {
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let subsystem = header[5];
        let port = u32::from_ne_bytes([header[12], header[13], header[14], header[15]]);
        let Some(body) = rest.get(20..len) else { return false };
        // In all announcements but that of a generation the first attribute is the table's name.
        let name = body.get(4..5 + TABLE.len()).and_then(|name| name.strip_suffix(&[0]));
        if subsystem == NFNL_SUBSYS_NFTABLES && port != own && name == Some(TABLE.as_bytes()) {
            return true;
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}
