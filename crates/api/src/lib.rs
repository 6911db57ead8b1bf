//! Kubernetes objects and everything that can be decided about one object without I/O: the registry of kinds,
//! schema, defaults, validation, patches, server-side apply, tables.
//!
//! Documents are `serde_json::Value`; what is known about a kind is data. Nothing here reads a clock, a socket or a file.

pub mod apply;
pub mod defaulting;
pub mod kinds;
pub mod meta;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod quantity;
pub mod schema;
pub mod selector;
pub mod service;
pub mod status;
pub mod strategy;
pub mod strict;
pub mod table;
pub mod validation;
