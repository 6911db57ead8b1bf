//! The data plane against real kernels: the recorded traffic of `conformance/golden/traffic.jsonl` in namespaces, and through
//! the evaluator.
#![allow(clippy::unwrap_used)]

mod case;
mod echo;
mod evaluate;
mod lab;
mod probe;
mod traffic;
