//! The Linux parts that other crates share: network namespaces, links, addresses, routes, sysctls.
//!
//! A namespace is entered only to make something (a socket, a file): the descriptor then works from any thread, so one
//! process serves many namespaces and no thread stays pinned to one. Nothing here knows Kubernetes.

mod netlink;
mod netns;
mod sysctl;

pub use netlink::{Error as NetlinkError, LinkInfo, Netlink, RouteTarget};
pub use netns::{Netns, is_mount_point, unmount_all_under};
pub use sysctl::set_sysctl;
