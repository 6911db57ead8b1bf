//! The engine on loopback with raw sockets and curl, and the whole gateway against the embedded API server.

#![allow(clippy::unwrap_used)]

mod cluster;
mod engine;
mod harness;
mod raw;
