//! The node agent of the standalone cluster: pods as OCI containers, probes, logs, exec.
//!
//! A [`Kubelet`] watches the pods bound to its node, runs each as a group of containers of the `crun` program inside a
//! network namespace that hangs on the node's, and writes back what it sees as pod status and events. Several kubelets live
//! in one process; each is given its node's namespace and never touches another. What a pod needs next is decided by plain
//! functions ([`lifecycle`], [`status`], [`mod@env`], [`resolv`], [`oci`]); the rest of the crate carries it out.
//!
//! It does not schedule, does not route between nodes, and does not re-adopt containers of a dead agent: see
//! `docs/adr/0002-oci-runtime.md`.

mod api;
mod config;
mod container;
pub mod echo;
pub mod env;
mod hosts;
pub mod image;
mod kubelet;
pub mod lifecycle;
mod log;
mod names;
pub mod oci;
mod probe;
pub mod resolv;
mod runtime;
mod sandbox;
mod server;
mod spdy;
pub mod status;
mod storage;
mod stream;
mod volume;
mod worker;

pub use api::{BoundToken, EventType, KubeApi, LookupError, NodeApi};
pub use config::{Error, NodeConfig, RuntimeConfig};
pub use container::image_users;
pub use image::ImageStore;
pub use kubelet::Kubelet;
pub use names::{pod_netns, pod_netns_in};
pub use runtime::cleanup;
