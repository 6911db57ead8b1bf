//! What a write of a Service takes and gives back.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;

use super::allocator::{Changes, Refusal, ServiceAllocator};
use super::families::{init_families, sync_cluster_ips};
use super::{
    Family, NONE, allows_node_ports, cluster_ips, health_check_node_port, is_headless, needs_cluster_ip,
    needs_health_check_node_port, needs_node_ports, node_port, ports, set_node_port,
};
use crate::kinds::Kind;
use crate::meta;
use crate::status::{FieldError, Status};

/// What a dry run shows instead of the first automatic port.
const FIRST_STAND_IN_PORT: i64 = 32769;

/// One write being planned.
struct Plan<'a> {
    allocator: &'a ServiceAllocator,
    kind: &'a Kind,
    dry_run: bool,
    pick: &'a mut dyn FnMut(u64) -> u64,
    changes: Changes,
    /// The last port that a dry run has shown instead of an automatic one.
    stand_in: Option<i64>,
}

impl ServiceAllocator {
    /// Fills in a new Service: cluster IPs, families and policy, node ports, health check node port.
    ///
    /// `pick(n)` returns a random number below n. In a dry run automatic values are stand-ins and nothing is taken,
    /// but explicit values are checked.
    pub fn plan_create(
        &self,
        kind: &Kind,
        new: &mut Value,
        dry_run: bool,
        pick: &mut dyn FnMut(u64) -> u64,
    ) -> Result<Changes, Status> {
        let mut plan = Plan { allocator: self, kind, dry_run, pick, changes: Changes::default(), stand_in: None };
        sync_cluster_ips(new, None);
        plan.families(new, None)?;
        if needs_cluster_ip(new) && !is_headless(new) {
            plan.take_cluster_ips(new, 0)?;
        }
        if allows_node_ports(new) {
            plan.create_node_ports(new)?;
        }
        if needs_health_check_node_port(new) {
            plan.health_check_node_port(new)?;
        }
        Ok(plan.finish())
    }

    /// Fills in a changed Service from the stored one: what the client left out is carried over, what the new type
    /// needs is taken, what it no longer needs is given back.
    pub fn plan_update(
        &self,
        kind: &Kind,
        new: &mut Value,
        old: &Value,
        dry_run: bool,
        pick: &mut dyn FnMut(u64) -> u64,
    ) -> Result<Changes, Status> {
        let mut plan = Plan { allocator: self, kind, dry_run, pick, changes: Changes::default(), stand_in: None };
        sync_cluster_ips(new, Some(old));
        carry_over(new, old);
        plan.families(new, Some(old))?;
        plan.update_cluster_ips(new, old)?;
        if allows_node_ports(new) {
            plan.update_node_ports(new, old)?;
        } else if allows_node_ports(old) {
            plan.release_ports(ports(old).iter().map(node_port));
        }
        match (needs_health_check_node_port(old), needs_health_check_node_port(new)) {
            (false, true) => plan.health_check_node_port(new)?,
            (true, false) => plan.release_ports([health_check_node_port(old)]),
            (true, true) | (false, false) => {}
        }
        Ok(plan.finish())
    }

    /// What a removed Service gives back.
    pub fn plan_delete(&self, old: &Value) -> Changes {
        let mut changes = Changes::default();
        if needs_cluster_ip(old) {
            changes.release_ips.extend(cluster_ips(old).into_iter().filter_map(meta::parse_ip_sloppy));
        }
        changes.release_ports.extend(held_ports(old));
        changes
    }
}

/// The node ports a stored Service holds.
pub(super) fn held_ports(service: &Value) -> Vec<u16> {
    let mut held = Vec::new();
    if allows_node_ports(service) {
        held.extend(ports(service).iter().map(node_port));
    }
    if needs_health_check_node_port(service) {
        held.push(health_check_node_port(service));
    }
    held.into_iter().filter(|port| *port > 0).filter_map(|port| u16::try_from(port).ok()).collect()
}

/// Takes allocated values that the client left out from the stored object, so that applying a manifest again changes
/// nothing.
fn carry_over(new: &mut Value, old: &Value) {
    if needs_cluster_ip(old) && needs_cluster_ip(new) {
        let stored = meta::text(old, &["spec", "clusterIP"]);
        if meta::text(new, &["spec", "clusterIP"]).is_empty() && !stored.is_empty() {
            meta::set(new, &["spec", "clusterIP"], json!(stored));
        }
        if cluster_ips(new).is_empty() {
            meta::put(new, &["spec", "clusterIPs"], meta::get(old, &["spec", "clusterIPs"]).clone());
        }
    }
    if needs_node_ports(old) && needs_node_ports(new) {
        let mut used: Vec<i64> = ports(new).iter().map(node_port).filter(|port| *port != 0).collect();
        for index in 0..ports(new).len() {
            let port = &ports(new)[index];
            if node_port(port) != 0 {
                continue;
            }
            let name = meta::text(port, &["name"]);
            let stored = ports(old).iter().find(|p| meta::text(p, &["name"]) == name).map_or(0, node_port);
            if stored != 0 && !used.contains(&stored) {
                used.push(stored);
                set_node_port(new, index, stored);
            }
        }
    }
    if needs_health_check_node_port(old)
        && needs_health_check_node_port(new)
        && health_check_node_port(new) == 0
        && health_check_node_port(old) != 0
    {
        meta::set(new, &["spec", "healthCheckNodePort"], json!(health_check_node_port(old)));
    }
}

impl Plan<'_> {
    fn finish(self) -> Changes {
        if self.dry_run { Changes::default() } else { self.changes }
    }

    fn invalid(&self, service: &Value, errors: &[FieldError]) -> Status {
        Status::invalid(self.kind, meta::name(service), errors)
    }

    fn families(&self, new: &mut Value, old: Option<&Value>) -> Result<(), Status> {
        let faults = init_families(new, old, self.allocator.families());
        if faults.is_empty() { Ok(()) } else { Err(self.invalid(new, &faults)) }
    }

    /// Takes the addresses from the given place on: those the client asked for, then automatic ones.
    fn take_cluster_ips(&mut self, service: &mut Value, from: usize) -> Result<(), Status> {
        let families: Vec<Family> = meta::list(service, &["spec", "ipFamilies"])
            .iter()
            .filter_map(|family| Family::parse(family.as_str()?))
            .collect();
        let mut ips: Vec<String> = cluster_ips(service).into_iter().map(str::to_owned).collect();
        for (i, family) in families.iter().enumerate().skip(from) {
            if let Some(asked) = ips.get(i).filter(|ip| !ip.is_empty()) {
                let ip = meta::parse_ip_sloppy(asked).ok_or(Refusal::IpOutOfRange);
                let taken = ip.and_then(|ip| self.allocator.check_ip(ip, &self.changes).map(|()| ip));
                match taken {
                    // A dry run looks at the ranges only, not at who has the address.
                    Err(Refusal::IpTaken) if self.dry_run => {}
                    Ok(ip) => {
                        self.changes.take_ips.insert(ip);
                    }
                    Err(refusal) => {
                        let why = format!("failed to allocate IP {asked}: {}", self.allocator.refusal_text(refusal));
                        // Addresses that are still to be given show as empty.
                        let mut shown = ips.clone();
                        shown.resize(shown.len().max(families.len()), String::new());
                        let error = FieldError::invalid("spec.clusterIPs", json!(shown), why);
                        return Err(self.invalid(service, &[error]));
                    }
                }
            } else {
                let ip = self.next_ip(*family).map_err(|refusal| self.no_ip(service, refusal))?;
                let text = ip.to_string();
                if i < ips.len() { ips[i] = text } else { ips.push(text) }
            }
        }
        if let Some(first) = ips.first() {
            meta::set(service, &["spec", "clusterIP"], json!(first));
            meta::set(service, &["spec", "clusterIPs"], json!(ips));
        }
        Ok(())
    }

    fn next_ip(&mut self, family: Family) -> Result<IpAddr, Refusal> {
        if self.dry_run {
            return self.allocator.stand_in_ip(family).ok_or(Refusal::NoRange);
        }
        let ip = self.allocator.next_ip(family, &self.changes, self.pick)?;
        self.changes.take_ips.insert(ip);
        Ok(ip)
    }

    fn no_ip(&self, service: &Value, refusal: Refusal) -> Status {
        let text = self.allocator.refusal_text(refusal);
        match refusal {
            Refusal::IpRangeFull => Status::internal(format!(
                "failed to allocate a serviceIP for Service \"{}\": {text}",
                meta::name(service)
            )),
            _ => Status::internal(format!("failed to allocate a serviceIP: {text}")),
        }
    }

    fn update_cluster_ips(&mut self, new: &mut Value, old: &Value) -> Result<(), Status> {
        let had = needs_cluster_ip(old);
        if had && is_headless(old) {
            return Ok(());
        }
        let held: Vec<IpAddr> = cluster_ips(old).into_iter().filter_map(meta::parse_ip_sloppy).collect();
        if !needs_cluster_ip(new) {
            if had {
                self.changes.release_ips.extend(held);
            }
            return Ok(());
        }
        if !had {
            return if is_headless(new) { Ok(()) } else { self.take_cluster_ips(new, 0) };
        }
        let count = |service: &Value| meta::list(service, &["spec", "ipFamilies"]).len();
        match (count(old), count(new)) {
            (1, 2) if cluster_ips(new).first() != Some(&NONE) => self.take_cluster_ips(new, 1)?,
            (2, 1) => self.changes.release_ips.extend(held.get(1)),
            _ => {}
        }
        Ok(())
    }

    fn take_port(&mut self, asked: i64) -> Result<(), Refusal> {
        let port = self.allocator.check_port(asked, &self.changes)?;
        self.changes.take_ports.insert(port);
        Ok(())
    }

    fn next_port(&mut self) -> Result<i64, Refusal> {
        if self.dry_run {
            // Counted on from the highest port of this write, so that no two of its ports are shown the same number.
            let highest = self.changes.take_ports.last().map(|port| i64::from(*port)).max(self.stand_in);
            let port = highest.unwrap_or(FIRST_STAND_IN_PORT - 1) + 1;
            self.stand_in = Some(port);
            return Ok(port);
        }
        let port = self.allocator.next_port(&self.changes, self.pick)?;
        self.changes.take_ports.insert(port);
        Ok(i64::from(port))
    }

    fn port_refused(&self, service: &Value, index: usize, port: i64, refusal: Refusal) -> Status {
        let field = format!("spec.ports[{index}].nodePort");
        self.invalid(service, &[FieldError::invalid(field, port, self.allocator.refusal_text(refusal))])
    }

    fn no_port(&self, refusal: Refusal) -> Status {
        Status::internal(format!("failed to allocate a nodePort: {}", self.allocator.refusal_text(refusal)))
    }

    /// Entries with one port number share one node port, so that TCP and UDP of a protocol like DNS go together; an
    /// explicit one anywhere in the list is the one they share.
    fn create_node_ports(&mut self, service: &mut Value) -> Result<(), Status> {
        let automatic = needs_node_ports(service);
        let mut shared: BTreeMap<i64, i64> = BTreeMap::new();
        for index in 0..ports(service).len() {
            let entry = &ports(service)[index];
            let asked = node_port(entry);
            if asked == 0 && !automatic {
                continue;
            }
            let number = entry.get("port").and_then(Value::as_i64).unwrap_or(0);
            let explicit = ports(service)
                .iter()
                .filter(|p| p.get("port").and_then(Value::as_i64).unwrap_or(0) == number)
                .map(node_port)
                .find(|port| *port != 0);
            match (shared.get(&number).copied(), explicit) {
                (None, Some(port)) => {
                    self.take_port(port).map_err(|r| self.port_refused(service, index, port, r))?;
                    shared.insert(number, port);
                    if asked == 0 {
                        set_node_port(service, index, port);
                    }
                }
                (None, None) => {
                    let port = self.next_port().map_err(|r| self.no_port(r))?;
                    shared.insert(number, port);
                    set_node_port(service, index, port);
                }
                (Some(port), _) if asked == 0 => set_node_port(service, index, port),
                (Some(port), _) if asked != port => {
                    self.take_port(asked).map_err(|r| self.port_refused(service, index, asked, r))?;
                }
                (Some(_), _) => {}
            }
        }
        Ok(())
    }

    fn update_node_ports(&mut self, new: &mut Value, old: &Value) -> Result<(), Status> {
        let automatic = needs_node_ports(new);
        let held: Vec<i64> = if allows_node_ports(old) {
            ports(old).iter().map(node_port).filter(|port| *port != 0).collect()
        } else {
            Vec::new()
        };
        let mut taken: Vec<i64> = Vec::new();
        for index in 0..ports(new).len() {
            let asked = node_port(&ports(new)[index]);
            if asked == 0 {
                if automatic {
                    let port = self.next_port().map_err(|r| self.no_port(r))?;
                    set_node_port(new, index, port);
                }
            } else if !held.contains(&asked) && !taken.contains(&asked) {
                self.take_port(asked).map_err(|r| self.port_refused(new, index, asked, r))?;
                taken.push(asked);
            }
        }
        let kept: Vec<i64> = ports(new).iter().map(node_port).collect();
        self.release_ports(held.into_iter().filter(|port| !kept.contains(port)));
        Ok(())
    }

    fn release_ports(&mut self, ports: impl IntoIterator<Item = i64>) {
        self.changes
            .release_ports
            .extend(ports.into_iter().filter(|port| *port > 0).filter_map(|port| u16::try_from(port).ok()));
    }

    fn health_check_node_port(&mut self, service: &mut Value) -> Result<(), Status> {
        let asked = health_check_node_port(service);
        if asked != 0 {
            return self.take_port(asked).map_err(|refusal| {
                Status::internal(format!(
                    "failed to allocate requested HealthCheck NodePort {asked}: {}",
                    self.allocator.refusal_text(refusal)
                ))
            });
        }
        let port = self.next_port().map_err(|refusal| {
            Status::internal(format!(
                "failed to allocate a HealthCheck NodePort 0: {}",
                self.allocator.refusal_text(refusal)
            ))
        })?;
        meta::set(service, &["spec", "healthCheckNodePort"], json!(port));
        Ok(())
    }
}
