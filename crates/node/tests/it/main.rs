//! Pods in real namespaces with the real runtime. Needs root and `crun`.

// A test that cannot go on fails by an unwrap.
#![allow(clippy::unwrap_used)]

mod api;
mod cluster;
mod images;
mod pods;
mod pull;
mod server;
mod streams;
mod teardown;
