//! Notices when somebody else touches our table, and asks for it to be looked at.
//!
//! nf_tables announces every change; changes by others than the applier to a table of our name are a reason to compare.

use std::io;
use std::time::{Duration, Instant};

use portolan_linux::Netns;
use portolan_nft::netlink::socket::Socket;
use tokio_util::sync::CancellationToken;

use crate::applier::Mailbox;
use crate::layout::TABLE;

const NFNLGRP_NFTABLES: libc::c_int = 7;
const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Messages that take something away: table, chain, rule, set, elements.
const REMOVALS: [u8; 5] = [2, 5, 8, 11, 14];
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

/// Starts to watch the namespace's nf_tables announcements.
pub fn watch(netns: &Netns, mailbox: Mailbox, shutdown: CancellationToken) -> io::Result<Monitor> {
    let socket = netns.run(|| -> io::Result<Socket> {
        let socket = Socket::open(libc::NETLINK_NETFILTER)?;
        socket.join(NFNLGRP_NFTABLES)?;
        socket.set_receive_timeout(TICK)?;
        Ok(socket)
    })??;
    let stop = shutdown.child_token();
    let monitor = Monitor { stop: stop.clone() };
    std::thread::Builder::new().name("nft-monitor".into()).spawn(move || {
        let mut asked = None::<Instant>;
        while !stop.is_cancelled() {
            let interfered = match socket.receive() {
                Ok(buffer) => is_foreign_removal(&buffer),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => false,
                // Announcements were lost in a flood; what they said is unknown.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => true,
                Err(error) => {
                    tracing::warn!(%error, "cannot watch nf_tables any more");
                    return;
                }
            };
            if interfered && asked.is_none_or(|at| at.elapsed() > QUIET) {
                asked = Some(Instant::now());
                // The announcement comes after the commit, so the check sees its effect.
                mailbox.check();
            }
        }
    })?;
    Ok(monitor)
}

/// Whether a datagram says that something was taken away from a table of our name, other than elements.
///
/// The applier's own commits look the same from here; that they leave the table intact is what the check finds out.
fn is_foreign_removal(buffer: &[u8]) -> bool {
    let mut rest = buffer;
    while let Some(header) = rest.get(..16) {
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let (kind, subsystem) = (header[4], header[5]);
        let Some(body) = rest.get(20..len) else { return false };
        // Elements come and go with every change of an endpoint; only structure is worth a look.
        if subsystem == NFNL_SUBSYS_NFTABLES && REMOVALS.contains(&kind) && kind != 14 {
            let name = body.get(4..4 + TABLE.len());
            if name == Some(TABLE.as_bytes()) {
                return true;
            }
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}
