//! Bytes in both directions after a change of protocols.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::proxy::Tunnel;
use crate::timers::{Timer, Timers};

/// Enough for a TLS record (RFC 8446 section 5.1).
const BUFFER_BYTES: usize = 16 << 10;

/// Carries bytes between a client and the backend it was switched to until both have ended, or nothing moved for too long. `first`
/// is what the client sent already. The end of one side is passed on; the other may go on.
pub(crate) async fn tunnel<T>(timers: &Timers, client: T, first: Vec<u8>, to: Tunnel)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let Ok(parts) = to.remains.await else { return };
    let backend = parts.io.into_inner();
    let (client_read, client_write) = tokio::io::split(client);
    let (backend_read, backend_write) = tokio::io::split(backend);
    let timer = timers.after(to.idle);
    let up = pump(client_read, backend_write, &first, &timer, to.idle);
    let down = pump(backend_read, client_write, &parts.read_buf, &timer, to.idle);
    match timer.limit(async { tokio::try_join!(up, down) }).await {
        Some(Ok(_)) => {}
        Some(Err(error)) => tracing::trace!(%error, "tunnel ended"),
        None => tracing::debug!("closing a tunnel without traffic"),
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    first: &[u8],
    timer: &Timer,
    idle: Duration,
) -> std::io::Result<()> {
    if !first.is_empty() {
        to.write_all(first).await?;
        to.flush().await?;
    }
    let mut buffer = vec![0u8; BUFFER_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        timer.set(idle);
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
        timer.set(idle);
    }
}
