//! The addresses of a node's interfaces, and which of them carry node ports.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use portolan_linux::Netns;
use portolan_nft::netlink::socket::Socket;
use portolan_plan::world::{IpFamily, parse_net};
use tokio_util::sync::CancellationToken;

/// Addresses of a node that carry node ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The Node's first InternalIP of each family; kube-proxy's default in nftables mode.
    #[default]
    Primary,
    /// All of the node's addresses but loopback ones.
    All,
    /// Those in one of these networks. A family without a network here falls back to all addresses of that family.
    Networks(Vec<IpNet>),
}

/// A list of node-port addresses that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseError {
    /// Neither a keyword nor a network.
    #[error("node-port address {text:?} is neither a CIDR nor one of primary, all, localhost")]
    Unknown {
        /// The part in question.
        text: String,
    },
    /// Keywords stand for everything that is wanted.
    #[error("node-port addresses {first} and {second} cannot be combined")]
    Combined {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
}

impl NodePortAddresses {
    /// Parses kube-proxy's `--nodeport-addresses`: CIDRs, or one of the keywords `primary` and `all`; `localhost` beside them
    /// asks for node ports on loopback addresses. Answers the addresses and whether `localhost` was there.
    ///
    /// # Errors
    /// For anything else, and for keywords that contradict each other.
    pub fn parse<T: AsRef<str>>(texts: &[T]) -> Result<(NodePortAddresses, bool), ParseError> {
        let mut localhost = false;
        let mut chosen: Option<(NodePortAddresses, &str)> = None;
        for text in texts.iter().map(|t| t.as_ref().trim()).filter(|t| !t.is_empty()) {
            let next = match text {
                "localhost" => {
                    localhost = true;
                    continue;
                }
                "primary" => NodePortAddresses::Primary,
                "all" => NodePortAddresses::All,
                cidr => match parse_net(cidr) {
                    Some(net) => NodePortAddresses::Networks(vec![net]),
                    None => return Err(ParseError::Unknown { text: text.to_owned() }),
                },
            };
            chosen = Some(match (chosen, next) {
                (None, next) => (next, text),
                (Some((NodePortAddresses::Networks(mut nets), first)), NodePortAddresses::Networks(more)) => {
                    nets.extend(more);
                    (NodePortAddresses::Networks(nets), first)
                }
                (Some((known, first)), next) if known == next => (known, first),
                (Some((_, first)), _) => {
                    return Err(ParseError::Combined { first: first.to_owned(), second: text.to_owned() });
                }
            });
        }
        Ok((chosen.map(|(c, _)| c).unwrap_or_default(), localhost))
    }

    /// Chooses among the Node's InternalIPs (`internal`) and the addresses of its interfaces (`local`).
    pub fn select(&self, internal: &[IpAddr], local: &[IpAddr]) -> Vec<IpAddr> {
        let mut chosen: Vec<IpAddr> = match self {
            NodePortAddresses::Primary => {
                let first = |family| internal.iter().find(|a| IpFamily::of(a) == family).copied();
                return IpFamily::ALL.into_iter().filter_map(first).collect();
            }
            NodePortAddresses::All => local.iter().filter(|a| !a.is_loopback()).copied().collect(),
            NodePortAddresses::Networks(nets) => {
                let open = |family| nets.iter().all(|n| IpFamily::of_net(n) != family);
                let fits = |a: &&IpAddr| open(IpFamily::of(a)) || nets.iter().any(|n| n.contains(*a));
                local.iter().filter(|a| !a.is_loopback()).filter(fits).copied().collect()
            }
        };
        chosen.sort();
        chosen.dedup();
        chosen
    }
}

/// The addresses of all interfaces of a namespace, sorted.
pub fn local_addresses(netns: &Netns) -> io::Result<Vec<IpAddr>> {
    let mut all: Vec<IpAddr> = netns.run(|| -> io::Result<Vec<IpAddr>> {
        let of = |storage: nix::sys::socket::SockaddrStorage| {
            let v4 = storage.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
        };
        Ok(nix::ifaddrs::getifaddrs()?.filter_map(|entry| entry.address.and_then(of)).collect())
    })??;
    all.sort();
    all.dedup();
    Ok(all)
}

/// `RTNLGRP_IPV4_IFADDR` and `RTNLGRP_IPV6_IFADDR` of `linux/rtnetlink.h`.
const ADDRESS_GROUPS: [libc::c_int; 2] = [5, 9];
/// How often the thread looks whether it should end.
const TICK: Duration = Duration::from_millis(250);

/// Calls `changed` with the addresses of a namespace now, and whenever the kernel announces that they may be different, until
/// `stop`. Runs on a thread of its own.
pub fn watch(netns: &Netns, stop: CancellationToken, changed: impl Fn(Vec<IpAddr>) + Send + 'static) -> io::Result<()> {
    let socket = netns.run(|| -> io::Result<Socket> {
        let socket = Socket::open(libc::NETLINK_ROUTE)?;
        for group in ADDRESS_GROUPS {
            socket.join(group)?;
        }
        socket.set_receive_timeout(TICK)?;
        Ok(socket)
    })??;
    // Listed after joining, so that nothing is missed in between.
    let mut known = local_addresses(netns)?;
    changed(known.clone());
    let netns = netns.clone();
    std::thread::Builder::new().name("addresses".into()).spawn(move || {
        while !stop.is_cancelled() {
            match socket.receive() {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
                // Announcements were lost in a flood; the list says what they said.
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot watch the node's addresses any more");
                    return;
                }
            }
            match local_addresses(&netns) {
                Ok(now) if now != known => {
                    known = now;
                    changed(known.clone());
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "cannot list the node's addresses"),
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_port_addresses_as_typed() {
        let nets = |list: &[&str]| NodePortAddresses::Networks(list.iter().map(|n| n.parse().unwrap()).collect());
        for (texts, expected) in [
            (&[][..], Ok((NodePortAddresses::Primary, false))),
            (&["primary"], Ok((NodePortAddresses::Primary, false))),
            (&["localhost", "primary"], Ok((NodePortAddresses::Primary, true))),
            (&["all"], Ok((NodePortAddresses::All, false))),
            (&["10.0.0.0/8", "fd00::/8"], Ok((nets(&["10.0.0.0/8", "fd00::/8"]), false))),
            (&["10.0.0.0"], Err(ParseError::Unknown { text: "10.0.0.0".into() })),
            (&["all", "10.0.0.0/8"], Err(ParseError::Combined { first: "all".into(), second: "10.0.0.0/8".into() })),
        ] {
            assert_eq!(NodePortAddresses::parse(texts), expected, "{texts:?}");
        }
    }

    #[test]
    fn node_port_addresses_of_a_node() {
        let ips = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<IpAddr>>();
        let internal = ips(&["192.168.50.11", "10.9.9.9", "fd00:50::11"]);
        let local = ips(&["10.0.0.1", "127.0.0.1", "192.168.50.11", "::1", "fd00:50::11"]);
        for (texts, expected) in [
            (&["primary"][..], &["192.168.50.11", "fd00:50::11"][..]),
            (&["all"], &["10.0.0.1", "192.168.50.11", "fd00:50::11"]),
            (&["10.0.0.0/8"], &["10.0.0.1", "fd00:50::11"]),
            (&["10.0.0.0/8", "fd01::/16"], &["10.0.0.1"]),
            (&["127.0.0.0/8", "::1/128"], &[]),
        ] {
            let (addresses, _) = NodePortAddresses::parse(texts).unwrap();
            assert_eq!(addresses.select(&internal, &local), ips(expected), "{texts:?}");
        }
    }
}
