//! The networks of a standalone cluster: a LAN with its router, nodes, and a host outside, all in namespaces of their own.
//!
//! ```text
//!   outside 192.168.60.100 ── ext0 [ fabric: the router ] lan0 ──┬── node-1 192.168.50.11 ── pods 10.244.1.0/24
//!                                    192.168.60.254  .50.254     └── node-2 192.168.50.12 ── pods 10.244.2.0/24
//! ```
//!
//! Addresses repeat between clusters: each has its own namespaces, and nothing of it is visible in the machine's.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net};
use portolan_linux::{Netlink, Netns, RouteTarget, set_sysctl, unmount_all_under};

/// The router's address on the LAN of the nodes.
pub const LAN_ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 254);
/// The router's address on the network of the host outside; its DNS server listens here.
pub const OUTSIDE_ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 60, 254);
/// The host outside the cluster.
pub const OUTSIDE_HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 60, 100);
/// Addresses that the load balancer hands out.
pub const LB_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 70, 0), 28);
/// Cluster IPs.
pub const SERVICE_CIDR: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 12);
/// The cluster IP of kube-system/kube-dns: the tenth of the range.
pub const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Nodes that fit the addressing scheme.
pub const MAX_NODES: u8 = 100;

/// A node's place in the network.
#[derive(Clone, Debug)]
pub struct NodeNet {
    /// Name of the Node object.
    pub name: String,
    /// Topology zone.
    pub zone: String,
    /// Its namespace.
    pub netns: Netns,
    /// InternalIP.
    pub address: Ipv4Addr,
    /// Addresses of its pods.
    pub pod_cidr: Ipv4Net,
}

/// The namespaces of a cluster.
#[derive(Clone, Debug)]
pub struct Fabric {
    /// The router of the LAN.
    pub router: Netns,
    /// The host outside the cluster.
    pub outside: Netns,
    /// The nodes in order.
    pub nodes: Vec<NodeNet>,
}

impl Fabric {
    /// Makes all namespaces under `dir` and connects them. `zones` are given to nodes in turn.
    pub async fn create(dir: &Path, nodes: u8, zones: u8) -> Result<Fabric> {
        let make = |name: &str| {
            Netns::create(dir.join(name)).with_context(|| format!("cannot make the network namespace {name}"))
        };
        let router = make("fabric")?;
        let outside = make("outside")?;
        prepare(&router)?;
        prepare(&outside)?;
        let lan = Netlink::open(&router)?;
        lan.set_up("lo").await?;
        lan.add_bridge("lan0").await?;
        lan.add_address("lan0", net(LAN_ROUTER, 24)).await?;
        lan.set_up("lan0").await?;
        connect(&lan, "ext0", &outside, net(OUTSIDE_HOST, 24), OUTSIDE_ROUTER).await?;
        lan.add_address("ext0", net(OUTSIDE_ROUTER, 24)).await?;
        lan.set_up("ext0").await?;

        let mut made: Vec<NodeNet> = Vec::new();
        for k in 1..=nodes {
            let name = format!("node-{k}");
            let netns = make(&name)?;
            prepare(&netns)?;
            let address = Ipv4Addr::new(192, 168, 50, 10 + k);
            let port = format!("lan-{k}");
            connect(&lan, &port, &netns, net(address, 24), LAN_ROUTER).await?;
            lan.set_controller(&port, "lan0").await?;
            lan.set_up(&port).await?;
            let pod_cidr = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, k, 0), 24);
            lan.set_route(IpNet::V4(pod_cidr), RouteTarget::Via(address.into())).await?;
            let zone = format!("zone-{}", zone_letter((k - 1) % zones));
            made.push(NodeNet { name, zone, netns, address, pod_cidr });
        }
        for node in &made {
            let netlink = Netlink::open(&node.netns)?;
            for other in &made {
                let target = if other.name == node.name {
                    RouteTarget::Unreachable
                } else {
                    RouteTarget::Via(other.address.into())
                };
                netlink.set_route(IpNet::V4(other.pod_cidr), target).await?;
            }
        }
        Ok(Fabric { router, outside, nodes: made })
    }

    /// Removes every namespace and mount under `dir`. Nothing there is no error.
    pub fn destroy(dir: &Path) -> Result<()> {
        if !dir.exists() {
            return Ok(());
        }
        unmount_all_under(dir)?;
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
    }
}

fn zone_letter(index: u8) -> char {
    char::from(b'a' + index)
}

fn net(address: Ipv4Addr, prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(address), prefix)
}

/// Connects `host` (its `eth0`) to the link `port` of the router, with `router` as its default gateway.
async fn connect(lan: &Netlink, port: &str, host: &Netns, address: IpNet, router: Ipv4Addr) -> Result<()> {
    lan.add_veth(port, "eth0", Some(host)).await?;
    let netlink = Netlink::open(host)?;
    netlink.set_up("lo").await?;
    netlink.add_address("eth0", address).await?;
    netlink.set_up("eth0").await?;
    let default = IpNet::new_assert(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    netlink.set_route(default, RouteTarget::Via(router.into())).await?;
    Ok(())
}

/// Forwarding as on a router or node; no redirects, because paths are meant to be as they are; no reverse-path filter, because
/// load-balancer addresses are on no link of a node.
fn prepare(netns: &Netns) -> Result<()> {
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
        ("net/ipv4/conf/all/accept_redirects", "0"),
        ("net/ipv4/conf/default/accept_redirects", "0"),
        // A client of the cluster may use any port below the node ports too; the ranges must not overlap.
        ("net/ipv4/ip_local_port_range", "32768 60999"),
        ("net/ipv4/ping_group_range", "0 2147483647"),
    ] {
        set_sysctl(netns, key, value)?;
    }
    Ok(())
}
