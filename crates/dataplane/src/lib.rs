//! Programs compiled Services into the kernel of one node.
//!
//! Input are Services, EndpointSlices, ServiceCIDRs and the own Node from an API server; output is one nf_tables table per
//! family in the node's network namespace, conntrack entries removed, health-check ports, and relays on loopback addresses. What to program is decided in
//! `portolan-plan`; how it looks in the kernel in [`layout`] and [`render`]; [`ServiceProxy`] puts the two together, and
//! [`run`] feeds it from a cluster. Nothing is removed at exit: existing rules go on serving, and the next start takes
//! over from them.

pub mod addresses;
pub mod affinity;
mod agent;
pub mod applier;
pub mod conntrack;
pub mod health;
pub mod layout;
pub mod loopback;
mod metrics;
pub mod monitor;
pub mod proxy;
pub mod render;
mod watched;

pub use addresses::NodePortAddresses;
pub use agent::{AgentConfig, Error, run};
pub use metrics::Metrics;
pub use proxy::{Change, FamilyReport, ServiceProxy, SyncReport};
pub use watched::SliceChange;
