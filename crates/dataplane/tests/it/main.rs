//! The data plane against real kernels: the recorded traffic of `conformance/golden/traffic.jsonl` in namespaces and through
//! the evaluator, random histories against a fake, restarts, interference, and size.
#![allow(clippy::unwrap_used)]

mod agent;
mod case;
mod crash;
mod echo;
mod evaluate;
mod history;
mod hostile;
mod lab;
mod life;
mod oracle;
mod ports;
mod probe;
mod traffic;
