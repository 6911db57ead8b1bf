//! The service controller with provider `local` on real packets. Needs root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod api;
mod lab;
mod packets;
