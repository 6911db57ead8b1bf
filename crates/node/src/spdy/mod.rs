//! SPDY/3.1, the server's side, as far as Kubernetes clients use it: kubectl before 1.31 carries exec, attach, port-forward and
//! cp over streams of such a connection.
//!
//! Source: SPDY Protocol Draft 3.1 (The Chromium Projects). [`frame`] turns bytes into frames and back and does nothing else;
//! [`session`] moves them over a connection. Flow control is the connection's own, as in the implementations in use: neither side
//! waits for WINDOW_UPDATE, and a slow reader holds up the connection.

mod dictionary;
pub(crate) mod frame;
pub(crate) mod session;
