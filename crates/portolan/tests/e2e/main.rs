//! Real kubectl, curl and dig against the real binary. Each test has a cluster of its own and they run in parallel.

#![allow(clippy::unwrap_used)]

mod bad_input;
mod details;
mod images;
mod kubectl;
mod lifecycle;
mod path;
mod services;

use portolan_testkit::Cluster;
use std::time::Duration;

const BINARY: &str = env!("CARGO_BIN_EXE_portolan");
/// Longest wait for anything in these tests; they share two cores with each other.
const LIMIT: Duration = Duration::from_secs(60);

fn up(test: &str) -> Cluster {
    Cluster::up(BINARY, test)
}
