//! Pods in real namespaces with the real runtime. Needs root and `crun`.

mod api;
mod cluster;
mod pods;
mod streams;
mod teardown;
