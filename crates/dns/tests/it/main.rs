//! Answers of the real CoreDNS replayed, and the server asked through real sockets.

mod api;
mod decode;
mod golden;
mod server;
mod upstream;
