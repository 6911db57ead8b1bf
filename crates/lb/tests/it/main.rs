//! The service controller with provider `local` on real packets. Needs root.

mod api;
mod lab;
mod packets;
