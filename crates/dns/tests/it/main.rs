//! Answers of the real CoreDNS replayed, and the server asked through real sockets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod api;
mod decode;
mod golden;
mod memory;
mod server;
mod upstream;
