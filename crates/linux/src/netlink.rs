//! Links, addresses and routes of one namespace through rtnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteScope, RouteType};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::Netns;

/// What went wrong, and on which link or route.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The netlink socket could not be made in the namespace.
    #[error("cannot open a netlink socket in {netns}")]
    Socket {
        /// Path of the namespace.
        netns: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused a request.
    #[error("cannot {action} {subject}: {source}")]
    Request {
        /// What was attempted, as in `add address to`.
        action: &'static str,
        /// The link or route.
        subject: String,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// There is no link of that name.
    #[error("there is no link {0} in this namespace")]
    NoLink(String),
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteTarget<'a> {
    /// Through a gateway on a connected network.
    Via(IpAddr),
    /// Directly out of a link.
    Link(&'a str),
    /// Directly out of a link, and what is sent without an address of its choice gets this one, which the namespace must have.
    LinkFrom(&'a str, IpAddr),
    /// Through a gateway that is reached out of a link although no address of the link covers it.
    OnLink(IpAddr, &'a str),
    /// Answers with ICMP host unreachable.
    Unreachable,
}

/// A link as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
}

/// A netlink connection bound to one namespace. Clone is cheap; the connection task ends with the last clone.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a connection in `netns`. Must be called within a tokio runtime, which drives the connection.
    pub fn open(netns: &Netns) -> Result<Netlink, Error> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns
            .run(move || {
                let _context = runtime.enter();
                rtnetlink::new_connection()
            })
            .and_then(|made| made)
            .map_err(|source| Error::Socket { netns: netns.path().display().to_string(), source })?;
        tokio::spawn(connection);
        Ok(Netlink { handle })
    }

    /// Makes a veth pair with both ends here, or with the peer in another namespace.
    pub async fn add_veth(&self, name: &str, peer: &str, peer_netns: Option<&Netns>) -> Result<(), Error> {
        use rtnetlink::packet_route::link::{InfoData, InfoVeth};
        let mut peer_message = rtnetlink::LinkMessageBuilder::<LinkUnspec>::new().name(peer.to_string());
        if let Some(netns) = peer_netns {
            peer_message = peer_message.setns_by_fd(netns.as_raw_fd());
        }
        let message =
            LinkVeth::new(name, peer).set_info_data(InfoData::Veth(InfoVeth::Peer(peer_message.build()))).build();
        self.handle.link().add(message).execute().await.map_err(request("add veth", name))
    }

    /// Makes a bridge.
    pub async fn add_bridge(&self, name: &str) -> Result<(), Error> {
        self.handle.link().add(LinkBridge::new(name).build()).execute().await.map_err(request("add bridge", name))
    }

    /// Puts `link` into the bridge `controller`.
    pub async fn set_controller(&self, link: &str, controller: &str) -> Result<(), Error> {
        let index = self.index(controller).await?;
        let message = LinkUnspec::new_with_index(self.index(link).await?).controller(index).build();
        self.handle.link().set(message).execute().await.map_err(request("attach to a bridge", link))
    }

    /// Brings `link` up.
    pub async fn set_up(&self, link: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).up().build();
        self.handle.link().set(message).execute().await.map_err(request("bring up", link))
    }

    /// Takes `link` down.
    pub async fn set_down(&self, link: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).down().build();
        self.handle.link().set(message).execute().await.map_err(request("bring down", link))
    }

    /// Deletes `link`; not being there is no error.
    pub async fn delete_link(&self, link: &str) -> Result<(), Error> {
        match self.index(link).await {
            Ok(index) => self.handle.link().del(index).execute().await.map_err(request("delete", link)),
            Err(Error::NoLink(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Adds an address with its prefix length; having it already is no error. IPv6 addresses skip duplicate detection.
    pub async fn add_address(&self, link: &str, address: IpNet) -> Result<(), Error> {
        use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
        let index = self.index(link).await?;
        let mut add = self.handle.address().add(index, address.addr(), address.prefix_len()).replace();
        if address.addr().is_ipv6() {
            // Addresses are assigned by us, on links of ours: waiting a second for duplicates would only delay start-up.
            let message = add.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        add.execute().await.map_err(|source| Error::Request {
            action: "add address",
            subject: format!("{address} to {link}"),
            source,
        })
    }

    /// Removes an address; not being there is no error.
    pub async fn delete_address(&self, link: &str, address: IpNet) -> Result<(), Error> {
        let index = self.index(link).await?;
        let mut list = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .set_address_filter(address.addr())
            .set_prefix_length_filter(address.prefix_len())
            .execute();
        let failed =
            |source| Error::Request { action: "delete address", subject: format!("{address} of {link}"), source };
        while let Some(found) = list.try_next().await.map_err(failed)? {
            self.handle.address().del(found).execute().await.map_err(failed)?;
        }
        Ok(())
    }

    /// Adds or replaces the route to `destination` in the main table.
    pub async fn set_route(&self, destination: IpNet, target: RouteTarget<'_>) -> Result<(), Error> {
        let message = self.route_message(destination, target).await?;
        self.handle.route().add(message).replace().execute().await.map_err(|source| Error::Request {
            action: "set route",
            subject: destination.to_string(),
            source,
        })
    }

    /// Deletes the route to `destination`; not being there is no error.
    pub async fn delete_route(&self, destination: IpNet, target: RouteTarget<'_>) -> Result<(), Error> {
        let message = self.route_message(destination, target).await?;
        match self.handle.route().del(message).execute().await {
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::ESRCH => Ok(()),
            other => other.map_err(|source| Error::Request {
                action: "delete route",
                subject: destination.to_string(),
                source,
            }),
        }
    }

    /// The links of the namespace, by index.
    pub async fn links(&self) -> Result<Vec<LinkInfo>, Error> {
        let mut list = self.handle.link().get().execute();
        let mut links = Vec::new();
        while let Some(link) = list.try_next().await.map_err(request("list", "links"))? {
            let name = link.attributes.iter().find_map(|a| match a {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            links.push(LinkInfo { index: link.header.index, name: name.unwrap_or_default() });
        }
        links.sort_by_key(|l| l.index);
        Ok(links)
    }

    /// The index of `link`.
    pub async fn index(&self, link: &str) -> Result<u32, Error> {
        let mut found = self.handle.link().get().match_name(link.to_string()).execute();
        match found.try_next().await {
            Ok(Some(message)) => Ok(message.header.index),
            Ok(None) => Err(Error::NoLink(link.to_string())),
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::ENODEV => {
                Err(Error::NoLink(link.to_string()))
            }
            Err(source) => Err(Error::Request { action: "look up", subject: link.to_string(), source }),
        }
    }

    async fn route_message(
        &self,
        destination: IpNet,
        target: RouteTarget<'_>,
    ) -> Result<rtnetlink::packet_route::route::RouteMessage, Error> {
        let link = match target {
            RouteTarget::Link(link) | RouteTarget::LinkFrom(link, _) | RouteTarget::OnLink(_, link) => {
                Some(self.index(link).await?)
            }
            RouteTarget::Via(_) | RouteTarget::Unreachable => None,
        };
        let gateway = match target {
            RouteTarget::Via(gateway) | RouteTarget::OnLink(gateway, _) => Some(gateway),
            RouteTarget::Link(_) | RouteTarget::LinkFrom(..) | RouteTarget::Unreachable => None,
        };
        Ok(match destination {
            IpNet::V4(net) => {
                let mut route =
                    RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(net.network(), net.prefix_len());
                if let Some(IpAddr::V4(gateway)) = gateway {
                    route = route.gateway(gateway);
                }
                if let RouteTarget::LinkFrom(_, IpAddr::V4(source)) = target {
                    route = route.pref_source(source);
                }
                finish(route, link, gateway.is_some(), target).build()
            }
            IpNet::V6(net) => {
                let mut route =
                    RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(net.network(), net.prefix_len());
                if let Some(IpAddr::V6(gateway)) = gateway {
                    route = route.gateway(gateway);
                }
                if let RouteTarget::LinkFrom(_, IpAddr::V6(source)) = target {
                    route = route.pref_source(source);
                }
                finish(route, link, gateway.is_some(), target).build()
            }
        })
    }
}

fn finish<T>(
    mut route: RouteMessageBuilder<T>,
    link: Option<u32>,
    has_gateway: bool,
    target: RouteTarget<'_>,
) -> RouteMessageBuilder<T> {
    if let Some(link) = link {
        route = route.output_interface(link);
    }
    match target {
        RouteTarget::Unreachable => route = route.kind(RouteType::Unreachable),
        RouteTarget::OnLink(..) => route = route.onlink(),
        RouteTarget::Link(_) | RouteTarget::LinkFrom(..) if !has_gateway => route = route.scope(RouteScope::Link),
        RouteTarget::Link(_) | RouteTarget::LinkFrom(..) | RouteTarget::Via(_) => {}
    }
    route
}

fn request(action: &'static str, subject: &str) -> impl FnOnce(rtnetlink::Error) -> Error {
    let subject = subject.to_string();
    move |source| Error::Request { action, subject, source }
}
