//! The pools of addresses and ports: what is taken, and what to give next.

use ipnet::IpNet;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use super::Family;
use crate::meta;

/// What one write takes from the pools and gives back to them once it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Addresses to take; each becomes an IPAddress object.
    pub take_ips: BTreeSet<IpAddr>,
    /// Addresses to give back; their IPAddress objects go.
    pub release_ips: BTreeSet<IpAddr>,
    /// Node ports to take.
    pub take_ports: BTreeSet<u16>,
    /// Node ports to give back.
    pub release_ports: BTreeSet<u16>,
}

impl Changes {
    /// Whether nothing is taken or given back.
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

/// Why an address or a port cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    IpTaken,
    IpOutOfRange,
    IpRangeFull,
    NoRange,
    PortTaken,
    PortOutOfRange,
    PortRangeFull,
}

/// What is taken of the service ranges and of the node port range.
///
/// A plain value: clone it to try something out. Two clients that race for one address are serialised by the single
/// writer that owns the value.
#[derive(Clone, Debug)]
pub struct ServiceAllocator {
    families: Vec<Family>,
    ranges: BTreeMap<String, Range>,
    taken_ips: BTreeSet<IpAddr>,
    node_ports: RangeInclusive<u16>,
    taken_ports: BTreeSet<u16>,
}

/// One ServiceCIDR.
#[derive(Clone, Debug)]
struct Range {
    nets: Vec<IpNet>,
    usable: bool,
}

/// Name of the ServiceCIDR that holds the configured ranges.
pub(super) const DEFAULT_CIDR: &str = "kubernetes";

impl ServiceAllocator {
    /// Empty pools over the configured service ranges, the first of which gives the cluster's default family, and the
    /// node port range.
    pub fn new(service_cidrs: &[IpNet], node_ports: RangeInclusive<u16>) -> ServiceAllocator {
        let mut families = Vec::new();
        for net in service_cidrs {
            let family = Family::of(net.addr());
            if !families.contains(&family) {
                families.push(family);
            }
        }
        if families.is_empty() {
            families.push(Family::V4);
        }
        let default = Range { nets: service_cidrs.iter().map(IpNet::trunc).collect(), usable: true };
        ServiceAllocator {
            families,
            ranges: BTreeMap::from([(DEFAULT_CIDR.to_owned(), default)]),
            taken_ips: BTreeSet::new(),
            node_ports,
            taken_ports: BTreeSet::new(),
        }
    }

    /// The cluster's families, the default one first.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// The node port range.
    pub fn node_ports(&self) -> RangeInclusive<u16> {
        self.node_ports.clone()
    }

    /// Takes note of a stored ServiceCIDR object: its ranges are used while it is Ready and not being deleted.
    pub fn observe_service_cidr(&mut self, object: &Value) {
        let nets = meta::list(object, &["spec", "cidrs"])
            .iter()
            .filter_map(|cidr| cidr.as_str()?.parse::<IpNet>().ok())
            .map(|net| net.trunc())
            .collect();
        let ready = meta::list(object, &["status", "conditions"])
            .iter()
            .find(|c| meta::text(c, &["type"]) == "Ready")
            .map(|c| meta::text(c, &["status"]) == "True");
        // The configured ranges are in use from the start; added ones when they are found to be ready.
        let ready = ready.unwrap_or(meta::name(object) == DEFAULT_CIDR);
        let usable = ready && !meta::is_deleting(object);
        self.ranges.insert(meta::name(object).to_owned(), Range { nets, usable });
    }

    /// Forgets a removed ServiceCIDR object.
    pub fn forget_service_cidr(&mut self, name: &str) {
        self.ranges.remove(name);
    }

    /// Takes note of an IPAddress object, by whomever it was made: the address is taken.
    pub fn observe_ip_address(&mut self, name: &str) {
        self.taken_ips.extend(name.parse::<IpAddr>());
    }

    /// Forgets a removed IPAddress object: the address is free.
    pub fn forget_ip_address(&mut self, name: &str) {
        if let Ok(ip) = name.parse::<IpAddr>() {
            self.taken_ips.remove(&ip);
        }
    }

    /// Applies the changes of a stored write.
    pub fn commit(&mut self, changes: &Changes) {
        for ip in &changes.release_ips {
            self.taken_ips.remove(ip);
        }
        for port in &changes.release_ports {
            self.taken_ports.remove(port);
        }
        self.taken_ips.extend(&changes.take_ips);
        self.taken_ports.extend(&changes.take_ports);
    }

    /// Whether an address is taken.
    pub fn has_ip(&self, ip: IpAddr) -> bool {
        self.taken_ips.contains(&ip)
    }

    /// Whether a node port is taken.
    pub fn has_port(&self, port: u16) -> bool {
        self.taken_ports.contains(&port)
    }

    /// Whether an address is a usable host address of any known range, ready or not.
    pub fn in_some_range(&self, ip: IpAddr) -> bool {
        self.ranges.values().flat_map(|range| &range.nets).any(|net| usable_hosts(net).contains(ip))
    }

    /// The usable networks of a family, the configured ones first.
    fn nets(&self, family: Family) -> impl Iterator<Item = &IpNet> {
        let default = self.ranges.get(DEFAULT_CIDR).into_iter();
        let others = self.ranges.iter().filter(|(name, _)| name.as_str() != DEFAULT_CIDR).map(|(_, range)| range);
        default
            .chain(others)
            .filter(|range| range.usable)
            .flat_map(|range| &range.nets)
            .filter(move |net| Family::of(net.addr()) == family && is_allocatable(net))
    }

    /// Whether this address may be taken; `changes` holds what the same write has already taken.
    pub(super) fn check_ip(&self, ip: IpAddr, changes: &Changes) -> Result<(), Refusal> {
        let family = Family::of(ip);
        if self.nets(family).next().is_none() {
            return Err(Refusal::NoRange);
        }
        if !self.nets(family).any(|net| usable_hosts(net).contains(ip)) {
            return Err(Refusal::IpOutOfRange);
        }
        if self.taken_ips.contains(&ip) || changes.take_ips.contains(&ip) {
            return Err(Refusal::IpTaken);
        }
        Ok(())
    }

    /// A free address: a random place in the dynamic band and onwards, then the static band (KEP-3070).
    pub(super) fn next_ip(
        &self,
        family: Family,
        changes: &Changes,
        pick: &mut dyn FnMut(u64) -> u64,
    ) -> Result<IpAddr, Refusal> {
        let mut any = false;
        for net in self.nets(family) {
            any = true;
            let hosts = usable_hosts(net);
            let offset = static_band(hosts.size, 16, 256);
            let dynamic = hosts.band(offset, hosts.count());
            let fixed = hosts.band(0, offset.min(hosts.count()));
            let free = |ip: &IpAddr| !self.taken_ips.contains(ip) && !changes.take_ips.contains(ip);
            if let Some(ip) = dynamic.scan(pick).chain(fixed.scan(pick)).find(free) {
                return Ok(ip);
            }
        }
        Err(if any { Refusal::IpRangeFull } else { Refusal::NoRange })
    }

    /// What a dry run shows instead of an address it would be given: the base of the range.
    pub(super) fn stand_in_ip(&self, family: Family) -> Option<IpAddr> {
        self.nets(family).next().map(IpNet::network)
    }

    pub(super) fn check_port(&self, port: i64, changes: &Changes) -> Result<u16, Refusal> {
        let number = u16::try_from(port).map_err(|_| Refusal::PortOutOfRange)?;
        if !self.node_ports.contains(&number) {
            return Err(Refusal::PortOutOfRange);
        }
        if self.taken_ports.contains(&number) || changes.take_ports.contains(&number) {
            return Err(Refusal::PortTaken);
        }
        Ok(number)
    }

    /// A free node port: random in the dynamic band, then in the static band.
    pub(super) fn next_port(&self, changes: &Changes, pick: &mut dyn FnMut(u64) -> u64) -> Result<u16, Refusal> {
        let (first, last) = (u64::from(*self.node_ports.start()), u64::from(*self.node_ports.end()));
        let size = (last + 1).saturating_sub(first);
        let offset = u64::try_from(static_band(u128::from(size), 32, 128)).unwrap_or(size);
        let free = |port: &u16| !self.taken_ports.contains(port) && !changes.take_ports.contains(port);
        for (from, to) in [(first + offset, first + size), (first, first + offset)] {
            let span = to - from;
            if span == 0 {
                continue;
            }
            let start = pick(span) % span;
            let found = (0..span)
                .map(|i| from + (start + i) % span)
                .filter_map(|port| u16::try_from(port).ok())
                .find(|port| free(port));
            if let Some(port) = found {
                return Ok(port);
            }
        }
        Err(Refusal::PortRangeFull)
    }

    /// The text clients know for a refusal.
    pub(super) fn refusal_text(&self, refusal: Refusal) -> String {
        match refusal {
            Refusal::IpTaken => "provided IP is already allocated".to_owned(),
            Refusal::IpOutOfRange => "the provided network does not match the current range".to_owned(),
            Refusal::IpRangeFull | Refusal::PortRangeFull => "range is full".to_owned(),
            Refusal::NoRange => "allocator not ready".to_owned(),
            Refusal::PortTaken => "provided port is already allocated".to_owned(),
            Refusal::PortOutOfRange => format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                self.node_ports.start(),
                self.node_ports.end()
            ),
        }
    }
}

/// Longer IPv6 ranges than /64 can be declared, but nothing is given from them, as in the reference implementation.
fn is_allocatable(net: &IpNet) -> bool {
    net.addr().is_ipv4() || net.prefix_len() >= 64
}

/// Size of the band that is given automatically only when the rest is full: `size / divisor` within 16 and `max`, none
/// for tiny ranges (KEP-3070, KEP-3668).
fn static_band(size: u128, divisor: u128, max: u128) -> u128 {
    if size <= 16 { 0 } else { (size / divisor).clamp(16, max) }
}

/// Consecutive addresses of one family.
struct Hosts {
    family: Family,
    first: u128,
    /// Exclusive.
    end: u128,
    /// Number of addresses of the whole network, usable or not.
    size: u128,
}

/// The addresses of a network that may be given: not its base, and for IPv4 not its broadcast address.
fn usable_hosts(net: &IpNet) -> Hosts {
    let family = Family::of(net.addr());
    let base = number(net.network());
    let bits = if family == Family::V4 { 32 } else { 128 } - u32::from(net.prefix_len());
    let size = 1u128.checked_shl(bits).unwrap_or(u128::MAX);
    let end = base.saturating_add(size) - u128::from(family == Family::V4);
    Hosts { family, first: base.saturating_add(1), end: end.max(base.saturating_add(1)), size }
}

impl Hosts {
    fn count(&self) -> u128 {
        self.end - self.first
    }

    fn contains(&self, ip: IpAddr) -> bool {
        Family::of(ip) == self.family && (self.first..self.end).contains(&number(ip))
    }

    fn band(&self, from: u128, to: u128) -> Hosts {
        let first = (self.first + from).min(self.end);
        Hosts { family: self.family, first, end: (self.first + to).clamp(first, self.end), size: self.size }
    }

    /// All addresses once, from a random one onwards.
    fn scan(&self, pick: &mut dyn FnMut(u64) -> u64) -> impl Iterator<Item = IpAddr> + use<> {
        let (first, count, family) = (self.first, self.count(), self.family);
        let span = u64::try_from(count).unwrap_or(u64::MAX);
        let start = if span == 0 { 0 } else { u128::from(pick(span) % span) };
        (0..count).map(move |i| address(first + (start + i) % count, family))
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn address(number: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX))),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator(cidrs: &[&str], ports: RangeInclusive<u16>) -> ServiceAllocator {
        let nets: Vec<IpNet> = cidrs.iter().map(|c| c.parse().expect("a network")).collect();
        ServiceAllocator::new(&nets, ports)
    }

    #[test]
    fn static_bands_have_the_documented_sizes() {
        let rows = [
            ("a_28_has_none", 16u128, 16u128, 256u128, 0u128),
            ("a_24_has_16", 256, 16, 256, 16),
            ("a_20_has_256", 4096, 16, 256, 256),
            ("a_12_has_256", 1 << 20, 16, 256, 256),
            ("the_default_node_ports_have_86", 2768, 32, 128, 86),
        ];
        for (name, size, divisor, max, want) in rows {
            assert_eq!(static_band(size, divisor, max), want, "{name}");
        }
    }

    #[test]
    fn the_first_dynamic_address_follows_the_static_band() {
        let rows = [
            ("10.96.0.0/24", "10.96.0.17"),
            ("10.96.0.0/12", "10.96.1.1"),
            ("192.0.2.0/28", "192.0.2.1"),
            ("fd00:10:96::/108", "fd00:10:96::101"),
            ("fd00::/64", "fd00::101"),
        ];
        for (net, want) in rows {
            let allocator = allocator(&[net], 1..=2);
            let family = Family::of(want.parse::<IpAddr>().expect("an address"));
            let got = allocator.next_ip(family, &Changes::default(), &mut |_| 0);
            assert_eq!(got.map(|ip| ip.to_string()).as_deref(), Ok(want), "{net}");
        }
    }

    #[test]
    fn a_range_gives_every_usable_address_once_and_then_is_full() {
        let mut allocator = allocator(&["192.0.2.0/27"], 30000..=30040);
        let mut pick = |n: u64| n / 2;
        let mut seen = Vec::new();
        loop {
            match allocator.next_ip(Family::V4, &Changes::default(), &mut pick) {
                Ok(ip) => {
                    allocator.commit(&Changes { take_ips: BTreeSet::from([ip]), ..Changes::default() });
                    seen.push(ip);
                }
                Err(refusal) => {
                    assert_eq!(refusal, Refusal::IpRangeFull);
                    break;
                }
            }
        }
        assert_eq!(seen.len(), 30);
        // Static addresses come last.
        assert!(seen[..14].iter().all(|ip| *ip > "192.0.2.16".parse::<IpAddr>().expect("an address")));
        let mut ports = 0;
        while let Ok(port) = allocator.next_port(&Changes::default(), &mut pick) {
            allocator.commit(&Changes { take_ports: BTreeSet::from([port]), ..Changes::default() });
            ports += 1;
        }
        assert_eq!(ports, 41);
    }

    #[test]
    fn tiny_ranges_do_not_overflow() {
        for net in ["192.0.2.1/32", "192.0.2.0/31", "0.0.0.0/0", "::/0", "2001:db8::1/128"] {
            let allocator = allocator(&[net], 30000..=30000);
            let family = Family::of(net.parse::<IpNet>().expect("a network").addr());
            let _ = allocator.next_ip(family, &Changes::default(), &mut |n| n - 1);
        }
    }

    #[test]
    fn network_and_broadcast_addresses_are_not_given() {
        let allocator = allocator(&["10.96.0.0/12"], 1..=2);
        let check = |ip: &str| allocator.check_ip(ip.parse().expect("an address"), &Changes::default());
        assert_eq!(check("10.96.0.0"), Err(Refusal::IpOutOfRange));
        assert_eq!(check("10.111.255.255"), Err(Refusal::IpOutOfRange));
        assert_eq!(check("10.111.255.254"), Ok(()));
        assert_eq!(check("fd00::1"), Err(Refusal::NoRange));
    }

    #[test]
    fn added_ranges_count_while_ready() {
        let mut allocator = allocator(&["10.96.0.0/12"], 1..=2);
        let ip: IpAddr = "198.18.21.9".parse().expect("an address");
        let mut object = serde_json::json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["198.18.21.0/24"]}});
        allocator.observe_service_cidr(&object);
        assert_eq!(allocator.check_ip(ip, &Changes::default()), Err(Refusal::IpOutOfRange));
        object["status"] = serde_json::json!({"conditions": [{"type": "Ready", "status": "True"}]});
        allocator.observe_service_cidr(&object);
        assert_eq!(allocator.check_ip(ip, &Changes::default()), Ok(()));
        object["metadata"]["deletionTimestamp"] = serde_json::json!("2026-01-01T00:00:00Z");
        allocator.observe_service_cidr(&object);
        assert_eq!(allocator.check_ip(ip, &Changes::default()), Err(Refusal::IpOutOfRange));
    }
}
