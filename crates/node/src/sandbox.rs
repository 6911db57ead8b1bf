//! A pod's namespaces and its link to the node.
//!
//! The network namespace is named by a bind mount in the pod's run directory. Its `eth0` is one end of a veth pair whose other
//! end, `vp…`, lies in the node's namespace and carries the gateway address with a host route to the pod: pods of a node
//! share no link, and every packet of a pod passes the node's forwarding path.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::PodSpec;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use portolan_linux::{Netlink, NetlinkError, Netns, RouteTarget};
use tokio::time::Instant;

use crate::names::veth_name;
use crate::runtime::unmount;

/// How long a released address rests: caches of names and flows may still lead to its last pod.
pub(crate) const ADDRESS_REST: Duration = Duration::from_secs(5);

/// Why a sandbox could not be made; the text goes into event `FailedCreatePodSandBox`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("cannot {action}: {source}")]
    Namespace {
        action: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Link(#[from] NetlinkError),
}

/// The addresses of a node's pods, given out in turn so that an address is used again as late as possible.
#[derive(Debug)]
pub(crate) struct AddressPool {
    range: IpNet,
    used: BTreeSet<IpAddr>,
    resting: VecDeque<(Instant, IpAddr)>,
    next: u128,
}

impl AddressPool {
    pub(crate) fn new(range: IpNet) -> AddressPool {
        AddressPool { range, used: BTreeSet::new(), resting: VecDeque::new(), next: 0 }
    }

    /// The first host address: the pods' gateway. `None` when the range is too small to hold it and a pod.
    pub(crate) fn gateway(range: IpNet) -> Option<IpAddr> {
        (size(range) >= 4).then(|| nth(range, 1))
    }

    /// Takes a free address.
    pub(crate) fn take(&mut self, now: Instant) -> Option<IpAddr> {
        while let Some((until, _)) = self.resting.front()
            && *until <= now
        {
            if let Some((_, ip)) = self.resting.pop_front() {
                self.used.remove(&ip);
            }
        }
        // Network, gateway and (in IPv4) broadcast addresses are not for pods.
        let first = 2;
        let count = size(self.range).saturating_sub(3);
        for _ in 0..count.min(1 << 20) {
            let ip = nth(self.range, first + self.next % count);
            self.next = (self.next + 1) % count;
            if self.used.insert(ip) {
                return Some(ip);
            }
        }
        None
    }

    /// Gives an address back; it rests before it is used again.
    pub(crate) fn release(&mut self, ip: IpAddr, now: Instant) {
        if self.used.contains(&ip) {
            self.resting.push_back((now + ADDRESS_REST, ip));
        }
    }
}

fn size(range: IpNet) -> u128 {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    1u128.checked_shl(bits).unwrap_or(u128::MAX)
}

fn nth(range: IpNet, n: u128) -> IpAddr {
    match range.network() {
        IpAddr::V4(base) => IpAddr::V4((u32::from(base).wrapping_add(n as u32)).into()),
        IpAddr::V6(base) => IpAddr::V6((u128::from(base).wrapping_add(n)).into()),
    }
}

/// The namespaces of a running pod.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    /// Where the pod's processes have their network: its own namespace, or the node's.
    pub netns: Netns,
    /// IPC namespace; `None` for hostIPC.
    pub ipc: Option<PathBuf>,
    /// UTS namespace (host name); with hostNetwork it holds the node's name, which need not be the machine's.
    pub uts: PathBuf,
    /// The pod's address: its own, or the node's.
    pub ip: IpAddr,
    own_network: Option<OwnNetwork>,
}

#[derive(Clone, Debug)]
struct OwnNetwork {
    link: String,
    path: PathBuf,
}

/// What a sandbox is made from.
pub(crate) struct SandboxRequest<'a> {
    /// The pod's run directory; exists.
    pub dir: &'a Path,
    pub uid: &'a str,
    pub spec: &'a PodSpec,
    pub hostname: &'a str,
    /// Used unless the pod has the node's network.
    pub ip: IpAddr,
    pub gateway: IpAddr,
    /// The node's own address, if its namespace has it.
    pub node_ip: Option<IpAddr>,
}

impl Sandbox {
    /// Makes the namespaces and the link. What was made is removed again on an error.
    pub(crate) async fn create(
        request: SandboxRequest<'_>,
        node: &Netns,
        netlink: &Netlink,
    ) -> Result<Sandbox, SandboxError> {
        let made = Sandbox::try_create(&request, node, netlink).await;
        if made.is_err() {
            let _ = netlink.delete_link(&veth_name(request.uid)).await;
            for name in ["net", "ipc", "uts"] {
                let _ = Netns::delete(request.dir.join(name));
            }
        }
        made
    }

    async fn try_create(
        request: &SandboxRequest<'_>,
        node: &Netns,
        netlink: &Netlink,
    ) -> Result<Sandbox, SandboxError> {
        let host_network = request.spec.host_network == Some(true);
        let own_ipc = request.spec.host_ipc != Some(true);
        let sysctls: Vec<(String, String)> = request
            .spec
            .security_context
            .iter()
            .flat_map(|c| c.sysctls.iter().flatten())
            .map(|s| (s.name.clone(), s.value.clone()))
            .collect();
        let ipc = own_ipc.then(|| request.dir.join("ipc"));
        let uts = request.dir.join("uts");
        let hostname = request.hostname.to_string();
        name_namespaces(ipc.as_deref(), &uts, &hostname, &sysctls)
            .map_err(|source| SandboxError::Namespace { action: "make the pod's namespaces".to_string(), source })?;
        if host_network {
            return Ok(Sandbox { netns: node.clone(), ipc, uts, ip: request.ip, own_network: None });
        }

        let path = request.dir.join("net");
        let netns = Netns::create(&path).map_err(|source| SandboxError::Namespace {
            action: "make the pod's network namespace".to_string(),
            source,
        })?;
        netns
            .run(|| set_network_sysctls(&sysctls))
            .and_then(|done| done)
            .map_err(|source| SandboxError::Namespace { action: "set kernel parameters".to_string(), source })?;

        let link = veth_name(request.uid);
        let host = |ip: IpAddr| IpNet::from(ip);
        netlink.add_veth(&link, "eth0", Some(&netns)).await?;
        netlink.add_address(&link, host(request.gateway)).await?;
        netlink.set_up(&link).await?;
        // The node speaks to its pods as itself, not as their gateway: a datagram that a host-network server sends back without
        // choosing an address must come from the address that it was sent to.
        let route = match request.node_ip {
            Some(own) if own.is_ipv4() == request.ip.is_ipv4() => RouteTarget::LinkFrom(&link, own),
            _ => RouteTarget::Link(&link),
        };
        netlink.set_route(host(request.ip), route).await?;

        let inside = Netlink::open(&netns)?;
        inside.set_up("lo").await?;
        inside.add_address("eth0", host(request.ip)).await?;
        inside.set_up("eth0").await?;
        inside.set_route(host(request.gateway), RouteTarget::Link("eth0")).await?;
        let everywhere = match request.ip {
            IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
        };
        inside.set_route(everywhere, RouteTarget::OnLink(request.gateway, "eth0")).await?;
        Ok(Sandbox { netns, ipc, uts, ip: request.ip, own_network: Some(OwnNetwork { link, path }) })
    }

    /// Removes the link and the names of the namespaces; all of the pod's processes must be gone.
    pub(crate) async fn remove(self, netlink: &Netlink) -> Result<(), SandboxError> {
        if let Some(own) = &self.own_network {
            // Explicitly, because the kernel destroys a namespace some time after its last user.
            netlink.delete_link(&own.link).await?;
        }
        let paths = self.own_network.as_ref().map(|own| own.path.clone()).into_iter().chain(self.ipc).chain([self.uts]);
        for path in paths {
            unmount(&path)
                .and_then(|()| fs::remove_file(&path))
                .map_err(|source| SandboxError::Namespace { action: format!("remove {}", path.display()), source })?;
        }
        Ok(())
    }
}

/// Makes IPC and UTS namespaces and names them by bind mounts. A thread of its own: unshare changes only the caller.
fn name_namespaces(ipc: Option<&Path>, uts: &Path, hostname: &str, sysctls: &[(String, String)]) -> io::Result<()> {
    std::thread::scope(|scope| {
        let work = move || -> io::Result<()> {
            for (path, flag, kind) in
                [(ipc, CloneFlags::CLONE_NEWIPC, "ipc"), (Some(uts), CloneFlags::CLONE_NEWUTS, "uts")]
            {
                let Some(path) = path else { continue };
                unshare(flag)?;
                fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
                let source = PathBuf::from(format!("/proc/thread-self/ns/{kind}"));
                mount(Some(&source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            }
            nix::unistd::sethostname(hostname)?;
            if ipc.is_some() {
                for (name, value) in sysctls.iter().filter(|(name, _)| !name.starts_with("net.")) {
                    set_sysctl(name, value)?;
                }
            }
            Ok(())
        };
        match std::thread::Builder::new().name("sandbox".into()).spawn_scoped(scope, work)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn set_network_sysctls(sysctls: &[(String, String)]) -> io::Result<()> {
    // Runtimes let pods bind low ports and ping without privileges; the parameters are the namespace's own.
    for (name, value) in [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")] {
        set_sysctl(name, value)?;
    }
    for (name, value) in sysctls.iter().filter(|(name, _)| name.starts_with("net.")) {
        set_sysctl(name, value)?;
    }
    Ok(())
}

fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    // Slashes and dots are both separators (sysctl(8)); a name must not lead elsewhere.
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    if path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(io::Error::other(format!("kernel parameter {name:?} is not a name")));
    }
    fs::write(&path, value).map_err(|e| io::Error::new(e.kind(), format!("cannot set {name} to {value:?}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_given_in_turn_and_rest_after_use() {
        let range: IpNet = "10.244.1.0/29".parse().unwrap();
        let mut pool = AddressPool::new(range);
        let now = Instant::now();
        assert_eq!(AddressPool::gateway(range), Some("10.244.1.1".parse().unwrap()));
        let all: Vec<String> = std::iter::from_fn(|| pool.take(now)).map(|ip| ip.to_string()).collect();
        assert_eq!(all, ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5", "10.244.1.6"]);
        let ip: IpAddr = "10.244.1.4".parse().unwrap();
        pool.release(ip, now);
        assert_eq!(pool.take(now), None, "a released address rests");
        assert_eq!(pool.take(now + ADDRESS_REST), Some(ip));
    }

    #[test]
    fn a_range_without_room_is_refused() {
        assert_eq!(AddressPool::gateway("10.0.0.0/31".parse().unwrap()), None);
        assert_eq!(AddressPool::gateway("fd00::/64".parse().unwrap()), Some("fd00::1".parse().unwrap()));
    }
}
