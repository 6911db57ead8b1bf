//! Recorded conversations with the reference API server, replayed against the pure pipeline of this crate.
//!
//! There is no server here: a map of documents stands in for the store, and a request is decoded, defaulted, planned,
//! prepared, validated and kept, in that order. What needs more than one object at a time (namespaces, watches,
//! garbage collection, server-side apply) is replayed against the real server elsewhere.

mod golden;
mod hostile;
mod server;
