//! Tests of the server as clients see it: in process, over TLS, and across `kill -9`.

mod access;
mod crash;
mod load;
mod repair;
mod requests;
mod services;
mod streams;
mod support;
