//! Provider `local`: the kernel of one network namespace forwards to the targets.
//!
//! Addresses of load balancers are held as /32 or /128 on `lo` of the namespace, so that it answers for them; nf_tables
//! translates their listeners to targets and keeps the client's address, because answers come back through the namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, PortStatus, Service};
use portolan_dataplane::conntrack::{Conntrack, Flow};
use portolan_linux::{Netlink, Netns};
use portolan_nft::{Executor, Family, NetlinkExecutor};
use portolan_plan::announce::{
    Allocator, Ignored, Key, Listener, Pool, Protocol, Request, ignored_annotations, listeners, service_key,
};

use crate::provider::{Provider, ProviderError, TargetSet};
use crate::rules::{self, Ruleset};

/// The provider for one namespace.
pub struct Local {
    netns: Netns,
    netlink: Netlink,
    allocator: Allocator,
    /// What each Service wants of the data path.
    wanted: BTreeMap<Key, Vec<Listener>>,
    kernel: Kernel,
}

/// What was put into the kernel.
struct Kernel {
    executor: Option<Box<NetlinkExecutor>>,
    /// By family; `None` until installed by this process, and after a refusal: then it is made anew.
    tables: [Option<Ruleset>; 2],
    /// Whether there may be flows of UDP listeners that are gone.
    had_udp: bool,
    /// Addresses on `lo`, those of an earlier process included.
    addresses: BTreeSet<IpAddr>,
}

const FAMILIES: [Family; 2] = [Family::Ip, Family::Ip6];

impl Local {
    /// Takes the pools' addresses that the namespace holds already as those of an earlier process. Needs a tokio runtime.
    ///
    /// # Errors
    /// Fails when the namespace cannot be entered or its netlink sockets cannot be made.
    pub fn new(netns: Netns, pools: Vec<Pool>) -> Result<Local, ProviderError> {
        let allocator = Allocator::new(pools);
        let held = netns.run(|| {
            let interfaces = nix::ifaddrs::getifaddrs()?.filter(|i| i.interface_name == "lo");
            let addresses = interfaces.filter_map(|i| {
                let address = i.address?;
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
            });
            Ok::<Vec<IpAddr>, std::io::Error>(addresses.collect())
        })??;
        let executor = netns.run(NetlinkExecutor::new)??;
        let kernel = Kernel {
            executor: Some(Box::new(executor)),
            tables: [None, None],
            had_udp: true,
            addresses: held.into_iter().filter(|a| allocator.covers(*a)).collect(),
        };
        Ok(Local { netlink: Netlink::open(&netns)?, netns, allocator, wanted: BTreeMap::new(), kernel })
    }

    /// Makes kernel and wishes agree: new addresses first, then rules, then old addresses, so that no packet meets an address
    /// without rules for longer than it takes to write them.
    async fn apply(&mut self) -> Result<(), ProviderError> {
        let wanted: BTreeSet<IpAddr> = self.allocator.holders().keys().copied().collect();
        for address in wanted.difference(&self.kernel.addresses.clone()) {
            self.netlink.add_address("lo", IpNet::from(*address)).await?;
            self.kernel.addresses.insert(*address);
        }
        let mut changed = false;
        for (i, family) in FAMILIES.into_iter().enumerate() {
            let mut new = Ruleset::compile(family, self.wanted.values().flatten());
            if self.kernel.tables[i].is_none() && new.is_empty() && family == Family::Ip6 {
                // Nothing to say about a family that is not in use, and maybe not in the kernel.
                continue;
            }
            let transaction = match &self.kernel.tables[i] {
                Some(old) => rules::change(family, old, &mut new),
                None => rules::install(family, &new),
            };
            if transaction.is_empty() {
                continue;
            }
            match self.commit(transaction).await {
                Ok(()) => {
                    self.kernel.tables[i] = Some(new);
                    changed = true;
                }
                Err(error) => {
                    // Somebody else may have changed the table: next time it is made anew.
                    self.kernel.tables[i] = None;
                    return Err(error);
                }
            }
        }
        for address in self.kernel.addresses.clone().difference(&wanted) {
            self.netlink.delete_address("lo", IpNet::from(*address)).await?;
            self.kernel.addresses.remove(address);
        }
        let udp = self.wanted.values().flatten().any(|l| l.protocol == Protocol::Udp);
        if changed && (std::mem::replace(&mut self.kernel.had_udp, udp) || udp) {
            self.end_stale_flows().await;
        }
        Ok(())
    }

    /// A UDP client that keeps its port would stay with a target that is gone, because only the first packet of a flow is
    /// translated anew. TCP clients see their connection end. A failure is logged: the rules are in effect all the same.
    async fn end_stale_flows(&self) {
        let netns = self.netns.clone();
        let listeners: Vec<Listener> = self.wanted.values().flatten().cloned().collect();
        let allocator = self.allocator.clone();
        let work = move || -> std::io::Result<usize> {
            let mut conntrack = Conntrack::open(&netns)?;
            let mut ended = 0;
            let flows = conntrack.udp_flows()?;
            for flow in stale(&listeners, |address| allocator.covers(address), &flows) {
                conntrack.delete(&flow)?;
                ended += 1;
            }
            Ok(ended)
        };
        match tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other).flatten() {
            Ok(ended) => tracing::debug!(ended, "ended stale UDP flows"),
            Err(error) => tracing::warn!(%error, "cannot end stale UDP flows"),
        }
    }

    async fn commit(&mut self, transaction: portolan_nft::Transaction) -> Result<(), ProviderError> {
        let mut executor = match self.kernel.executor.take() {
            Some(executor) => executor,
            None => Box::new(self.netns.run(NetlinkExecutor::new)??),
        };
        let work = move || {
            let result = executor.commit(&transaction);
            (executor, result)
        };
        let (executor, result) = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?;
        self.kernel.executor = Some(executor);
        Ok(result?)
    }

    fn set_listeners(&mut self, service: &Service, targets: TargetSet<'_>, addresses: &[IpAddr]) {
        let found = listeners(service, targets.slices, targets.nodes, addresses);
        self.wanted.insert(service_key(service), found);
    }
}

#[async_trait]
impl Provider for Local {
    fn name(&self) -> &'static str {
        "local"
    }

    fn ignored(&self, service: &Service) -> Vec<Ignored> {
        ignored_annotations(service)
    }

    fn adopt(&mut self, service: &Service, targets: TargetSet<'_>) {
        let Ok(request) = Request::parse(service) else { return };
        if request.current.is_empty() {
            return;
        }
        if let Ok(addresses) = self.allocator.allocate(&request) {
            self.set_listeners(service, targets, &addresses);
        }
    }

    async fn ensure(
        &mut self,
        service: &Service,
        targets: TargetSet<'_>,
    ) -> Result<Vec<LoadBalancerIngress>, ProviderError> {
        let request = Request::parse(service)?;
        let addresses = self.allocator.allocate(&request)?;
        self.set_listeners(service, targets, &addresses);
        self.apply().await?;
        let ports = service.spec.iter().flat_map(|s| s.ports.iter().flatten());
        let ports: Vec<PortStatus> = ports
            .map(|p| PortStatus {
                port: p.port,
                protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
                ..PortStatus::default()
            })
            .collect();
        let entry = |address: &IpAddr| LoadBalancerIngress {
            ip: Some(address.to_string()),
            // Packets arrive at nodes with the balancer's address or a pod's, never with a proxy's (KEP-1860).
            ip_mode: Some("VIP".into()),
            ports: Some(ports.clone()),
            ..LoadBalancerIngress::default()
        };
        Ok(addresses.iter().map(entry).collect())
    }

    async fn update(&mut self, service: &Service, targets: TargetSet<'_>) -> Result<(), ProviderError> {
        let addresses = self.allocator.addresses(&service_key(service)).to_vec();
        if addresses.is_empty() {
            return Ok(());
        }
        self.set_listeners(service, targets, &addresses);
        self.apply().await
    }

    async fn ensure_deleted(&mut self, service: &Service) -> Result<bool, ProviderError> {
        let key = service_key(service);
        self.wanted.remove(&key);
        let freed = self.allocator.release(&key);
        self.apply().await?;
        Ok(freed)
    }

    fn exists(&self, service: &Service) -> bool {
        !self.allocator.addresses(&service_key(service)).is_empty()
    }
}

/// The UDP flows to addresses of ours that lead to no target of their listener, or to a target of a listener that is gone.
fn stale(listeners: &[Listener], covers: impl Fn(IpAddr) -> bool, flows: &[Flow]) -> Vec<Flow> {
    let udp = listeners.iter().filter(|l| l.protocol == Protocol::Udp);
    let by_address: BTreeMap<(IpAddr, u16), &Listener> = udp.map(|l| ((l.address, l.port), l)).collect();
    let is_stale = |flow: &&Flow| {
        let target = (flow.reply_source, flow.reply_source_port);
        let addressed = (flow.destination, flow.destination_port);
        match by_address.get(&addressed) {
            Some(listener) => !listener.targets.contains(&target),
            None => covers(flow.destination) && target != addressed,
        }
    };
    flows.iter().filter(is_stale).copied().collect()
}

// Netlink sockets are used by one task at a time; the executor travels to a blocking thread and back.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Local>();
    is_send::<Arc<Netns>>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_to_targets_that_are_gone_end() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let flow = |destination: &str, port: u16, target: &str, target_port: u16| Flow {
            source: ip("192.168.60.100"),
            source_port: 4000,
            destination: ip(destination),
            destination_port: port,
            reply_source: ip(target),
            reply_source_port: target_port,
        };
        let listener = |port: u16, protocol: Protocol, targets: &[&str]| Listener {
            address: ip("192.168.70.1"),
            protocol,
            port,
            targets: targets.iter().map(|t| (ip(t), 8080)).collect(),
            allowed: None,
        };
        let listeners = [
            listener(53, Protocol::Udp, &["10.0.0.1"]),
            listener(54, Protocol::Udp, &[]),
            listener(55, Protocol::Tcp, &["10.0.0.1"]),
        ];
        let rows = [
            ("to a target", flow("192.168.70.1", 53, "10.0.0.1", 8080), false),
            ("to a former target", flow("192.168.70.1", 53, "10.0.0.2", 8080), true),
            ("to a former port of a target", flow("192.168.70.1", 53, "10.0.0.1", 8081), true),
            ("before there was a target", flow("192.168.70.1", 53, "192.168.70.1", 53), true),
            ("no target is left", flow("192.168.70.1", 54, "10.0.0.1", 8080), true),
            ("the listener is gone", flow("192.168.70.1", 55, "10.0.0.1", 8080), true),
            ("the address is nobody's", flow("192.168.70.2", 53, "10.0.0.1", 8080), true),
            ("of somebody else", flow("203.0.113.1", 53, "10.0.0.1", 8080), false),
        ];
        for (name, flow, expected) in rows {
            let found = stale(&listeners, |a| a == ip("192.168.70.1") || a == ip("192.168.70.2"), &[flow]);
            assert_eq!(!found.is_empty(), expected, "{name}");
        }
    }
}
