//! Turns a compiled [`ServiceMap`] into transactions on the table of one family.
//!
//! The renderer remembers what it gave out in compact form, so that a change costs what the changed Services cost. It does no
//! I/O: what the kernel holds at start is given to it as a value.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_nft::{Data, Element, Op, Table, Transaction, Value, Verdict};
use portolan_plan::delta::Delta;
use portolan_plan::endpoint::Backend;
use portolan_plan::service::{
    Backends, CompiledService, Frontend, FrontendAddr, FrontendKind, ServiceMap, ServicePortId,
};
use portolan_plan::world::{Affinity, IpFamily, NodeView, TrafficPolicy};

use crate::affinity::Numbers;
use crate::layout::{self, Masquerade, Pick, PickAffinity, SetId, Sets, Side, Space};

/// Elements of one transaction: about a millisecond of the kernel's commit on the machines we know.
const ELEMENTS_PER_COMMIT: usize = 4096;
/// Unused pick chains are kept until there are this many.
const SPARE_CHAINS: usize = 64;

/// Elements by set and key.
pub type Held = HashMap<(SetId, Vec<Value>), Element>;

/// What a table holds, as read back from the kernel.
#[derive(Clone, Debug, Default)]
pub struct Existing {
    /// Names of its chains; empty when there is no table.
    pub chains: BTreeSet<String>,
    /// Elements of its sets.
    pub elements: Held,
}

impl Existing {
    /// Whether it was made by this version's layout, so that it can be kept and corrected.
    pub fn is_ours(&self) -> bool {
        self.chains.contains(layout::MARKER)
    }
}

/// Renders one family.
#[derive(Debug)]
pub struct Renderer {
    family: IpFamily,
    table: Table,
    sets: Sets,
    frontends: BTreeMap<Frontend, Box<Rendered>>,
    frontends_of: BTreeMap<ServicePortId, Vec<Frontend>>,
    shared: BTreeMap<ServicePortId, Shared>,
    hairpin: BTreeMap<IpAddr, usize>,
    /// Addresses that are in the kernel's set but need not be, with the update since which.
    stale_hairpin: BTreeMap<IpAddr, u64>,
    numbers: Numbers,
    uses: BTreeMap<Pick, Use>,
    /// Number of the current update.
    round: u64,
}

/// How a pick chain is used.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    frontends: usize,
    /// The update since which there are none.
    idle_from: u64,
}

/// How a frontend was rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rendered {
    service: ServicePortId,
    way: Way,
    guard: Option<Arc<[IpNet]>>,
    service_mark: Option<u32>,
    inside: Slots,
    outside: Slots,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Same(Step),
    BySource { inside: Step, outside: Step },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Pick(Pick),
    Reject,
    Drop,
}

/// Endpoints by slot number, with their affinity numbers when there is affinity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Slots {
    /// Shared with the compiled Service as long as the order is the same.
    backends: Arc<[Backend]>,
    marks: Box<[u32]>,
}

/// What the frontends of a Service port share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shared {
    hairpin_addrs: Arc<[IpAddr]>,
    live: Box<[(Backend, u32)]>,
    live_local: Box<[(Backend, u32)]>,
}

type Item = (SetId, Element);

#[derive(Debug, Default)]
struct Changes {
    delete: Vec<Item>,
    add: Vec<Item>,
}

impl Changes {
    /// Takes out the deletions of slots that get no new value.
    fn take_surplus_slots(&mut self) -> Changes {
        let kept: Held = self.add.iter().map(|(id, e)| ((*id, e.key.clone()), e.clone())).collect();
        let replaced = |id: SetId, element: &Element| kept.contains_key(&(id, element.key.clone()));
        let (delete, rest) =
            std::mem::take(&mut self.delete).into_iter().partition(|(id, e)| id.is_slots() && !replaced(*id, e));
        self.delete = rest;
        Changes { delete, add: Vec::new() }
    }
}

impl Renderer {
    /// A renderer that has given out nothing yet.
    pub fn new(family: IpFamily) -> Renderer {
        Renderer {
            family,
            table: layout::table(family),
            sets: Sets::default(),
            frontends: BTreeMap::new(),
            frontends_of: BTreeMap::new(),
            shared: BTreeMap::new(),
            hairpin: BTreeMap::new(),
            stale_hairpin: BTreeMap::new(),
            numbers: Numbers::default(),
            uses: BTreeMap::new(),
            round: 0,
        }
    }

    /// The table that is rendered.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The sets of the table.
    pub fn sets(&self) -> &Sets {
        &self.sets
    }

    /// Emits transactions that lead from `existing` to `map`, whatever was given out before. Traffic that both treat alike is
    /// not touched on the way: elements that are right stay, each frontend changes at once, and what is left over goes last. A
    /// table of another layout is replaced in a single transaction. Answers the chains that are not used, see
    /// [`Renderer::sweep`].
    ///
    /// Transactions are made one by one, because all of them together would be many times the size of what they describe.
    ///
    /// # Errors
    /// The first one of `emit`. What was given out is then unknown, and only another call of this method leads on.
    pub fn full<E>(
        &mut self,
        map: &ServiceMap,
        node: &NodeView,
        existing: Existing,
        emit: &mut dyn FnMut(Transaction) -> Result<(), E>,
    ) -> Result<Vec<Arc<str>>, E> {
        *self = Renderer { round: self.round + 1, ..Renderer::new(self.family) };
        let family = self.family;
        let keep = existing.is_ours();
        let replace = !keep && !existing.chains.is_empty();
        let mut left = if keep { existing.elements } else { HashMap::new() };
        if keep {
            self.adopt_numbers(map, &left);
        }
        for (id, service) in map.services.iter().filter(|(id, _)| id.family == family) {
            self.share(id, Some(service));
        }
        for (frontend, target) in map.frontends.iter().filter(|(f, _)| f.family() == family && !f.is_loopback()) {
            let Some(service) = map.services.get(&target.service) else { continue };
            let before = slots_in(frontend, &left);
            let before = before.as_ref().map(|(inside, outside)| (&inside[..], &outside[..]));
            let rendered = self.render(frontend, target.kind, &target.service, service, node, before);
            self.place(*frontend, Some(rendered));
        }

        let picks: Vec<Pick> = self.uses.keys().copied().collect();
        let mut first = Vec::new();
        if replace {
            // Adding it first makes it no error if it is gone meanwhile.
            first.extend([Op::AddTable, Op::DeleteTable]);
        }
        first.extend(layout::fixed_ops(node, family, &self.sets));
        first.extend(picks.iter().flat_map(|p| p.ops(node, family)));
        // Silence for unused addresses comes after the Services in a new table, and stays as it is in a kept one.
        let last = layout::unallocated_ops(map.service_ranges.get(&family).map_or(&[][..], Vec::as_slice));

        let mut together = Vec::new();
        let mut send = |transaction: Transaction| {
            if replace {
                together.extend(transaction.ops);
                Ok(())
            } else {
                emit(transaction)
            }
        };
        send(self.transaction(first))?;
        let mut packer = Packer::new(self);
        // A packet is translated first and masqueraded later, so what the latter needs is there first.
        let hairpin = self.hairpin.keys().map(|ip| vec![(SetId::Hairpin, pair(*ip))]);
        let mut rest: Vec<Item> = Vec::new();
        let of_family = |ip: &&IpAddr| IpFamily::of(ip) == family;
        rest.extend(map.node_port_addresses.iter().filter(of_family).map(|ip| (SetId::NodePortAddresses, single(*ip))));
        rest.extend(map.cluster_ips.keys().filter(of_family).map(|ip| (SetId::ClusterIps, single(*ip))));
        let shared = self.shared.keys().map(|id| self.shared_items(id));
        let frontends = self.frontends.iter().map(|(frontend, rendered)| items(frontend, rendered));
        let rest = rest.into_iter().map(|item| vec![item]);
        for items in hairpin.chain(shared).chain(frontends).chain(rest) {
            if let Some(transaction) = packer.push(against(items, &mut left)) {
                send(transaction)?;
            }
        }
        if let Some(transaction) = packer.flush() {
            send(transaction)?;
        }
        send(self.transaction(last))?;
        // The memory of clients is the kernel's own; everything else that is left has no place in the new map.
        for ((id, key), element) in left.into_iter().filter(|((id, _), _)| *id != SetId::Affinity) {
            if id == SetId::Hairpin
                && let Some(ip) = key.first().and_then(address_of)
            {
                self.stale_hairpin.insert(ip, self.round);
                continue;
            }
            if let Some(transaction) = packer.push(Changes { delete: vec![(id, element)], add: Vec::new() }) {
                send(transaction)?;
            }
        }
        if let Some(transaction) = packer.flush() {
            send(transaction)?;
        }
        if replace {
            emit(self.transaction(together))?;
        }

        let wanted: BTreeSet<Arc<str>> =
            picks.iter().map(Pick::chain).chain(layout::FIXED_CHAINS.iter().map(|c| Arc::from(*c))).collect();
        let unwanted = existing.chains.iter().map(|c| Arc::from(c.as_str())).filter(|c| keep && !wanted.contains(c));
        Ok(unwanted.collect())
    }

    /// Transactions that lead from what was given out to `map`, of which `delta` says what is different.
    pub fn update(&mut self, map: &ServiceMap, node: &NodeView, delta: &Delta) -> Vec<Transaction> {
        self.round += 1;
        let mut chains = Vec::new();
        let mut batches = Vec::new();
        let mut redo: BTreeSet<Frontend> =
            delta.frontends.iter().filter(|f| f.family() == self.family).copied().collect();
        let services: Vec<&ServicePortId> = delta.services.iter().filter(|id| id.family == self.family).collect();
        for id in &services {
            redo.extend(self.frontends_of.get(*id).into_iter().flatten());
        }

        let mut touched: BTreeSet<IpAddr> = services
            .iter()
            .filter_map(|id| self.shared.get(*id))
            .flat_map(|s| s.hairpin_addrs.iter().copied())
            .collect();
        touched.extend(
            services.iter().filter_map(|id| map.services.get(*id)).flat_map(|s| s.hairpin_addrs.iter().copied()),
        );
        let hairpin_before: BTreeSet<IpAddr> =
            touched.iter().filter(|ip| self.hairpin.contains_key(*ip)).copied().collect();
        for id in &services {
            let old = self.shared_items(id);
            self.share(id, map.services.get(*id));
            batches.push(difference(old, self.shared_items(id)));
        }
        let mut ips = Changes::default();
        for ip in touched {
            match (hairpin_before.contains(&ip), self.hairpin.get(&ip)) {
                // A packet that is translated already may still have to find it.
                (true, None) => {
                    self.stale_hairpin.insert(ip, self.round);
                }
                (false, Some(_)) => {
                    self.stale_hairpin.remove(&ip);
                    ips.add.push((SetId::Hairpin, pair(ip)));
                }
                _ => {}
            }
        }
        for ip in delta.cluster_ips.iter().filter(|ip| IpFamily::of(ip) == self.family) {
            let list = if map.cluster_ips.contains_key(ip) { &mut ips.add } else { &mut ips.delete };
            list.push((SetId::ClusterIps, single(*ip)));
        }
        batches.push(ips);

        for frontend in redo {
            let old = self.frontends.get(&frontend);
            let target = map.frontends.get(&frontend).filter(|_| !frontend.is_loopback());
            let service = target.and_then(|t| map.services.get(&t.service));
            let new = match (target, service) {
                (Some(target), Some(service)) => {
                    let before = old.map(|o| (&o.inside.backends[..], &o.outside.backends[..]));
                    Some(self.render(&frontend, target.kind, &target.service, service, node, before))
                }
                _ => None,
            };
            if old.map(|o| &**o) == new.as_ref() {
                continue;
            }
            for pick in new.iter().flat_map(Rendered::picks) {
                if !self.uses.contains_key(&pick) {
                    chains.extend(pick.ops(node, self.family));
                }
            }
            batches.push(difference(
                old.map(|o| items(&frontend, o)).unwrap_or_default(),
                new.as_ref().map(|n| items(&frontend, n)).unwrap_or_default(),
            ));
            self.place(frontend, new);
        }
        if delta.ranges {
            chains.extend(layout::unallocated_ops(map.service_ranges.get(&self.family).map_or(&[][..], Vec::as_slice)));
        }

        // Slots that are not replaced go in commits of their own, after the others: a packet that has drawn its number just before
        // a commit that shrinks a Service looks the number up just after it, and must still find an endpoint there.
        let late: Vec<Changes> = batches.iter_mut().map(Changes::take_surplus_slots).collect();
        let mut packed = self.pack(batches);
        packed.extend(self.pack(late));
        if !chains.is_empty() {
            // In a commit of their own: a packet that is under way sees new elements at once, but the rules of a chain as of
            // the generation that it started in, and a chain of the same commit as still empty.
            packed.insert(0, self.transaction(chains));
        }
        packed
    }

    /// Pick chains that nothing uses any more, once there are many: they cost little, and the next scaling may want them again.
    pub fn spare(&self) -> Vec<Arc<str>> {
        let unused = || self.uses.iter().filter(|(_, u)| u.frontends == 0);
        if unused().count() < SPARE_CHAINS { Vec::new() } else { unused().map(|(pick, _)| pick.chain()).collect() }
    }

    /// Whether there is something besides chains that [`Renderer::sweep`] would remove.
    pub fn has_stale(&self) -> bool {
        !self.stale_hairpin.is_empty()
    }

    /// Number of the current update, for [`Renderer::sweep`].
    pub fn round(&self) -> u64 {
        self.round
    }

    fn is_idle(&self, chain: &Arc<str>, round: u64) -> bool {
        self.uses
            .iter()
            .find(|(pick, _)| pick.chain() == *chain)
            .is_none_or(|(_, u)| u.frontends == 0 && u.idle_from <= round)
    }

    fn stale_since(&self, round: u64) -> impl Iterator<Item = IpAddr> {
        self.stale_hairpin.iter().filter(move |(_, since)| **since <= round).map(|(ip, _)| *ip)
    }

    /// Deletes those of `chains` that have not been used since `round`, and addresses that hairpin traffic has not needed since
    /// then. That has to be a while ago: a packet that was under way when a chain fell out of use may still be about to enter
    /// it, and must not find it empty. May be refused by a kernel that still holds a reference for a moment; that is no
    /// failure, and all is tried again the next time.
    pub fn sweep(&self, chains: &[Arc<str>], round: u64) -> Transaction {
        let mut ops = delete_chains(chains.iter().filter(|c| self.is_idle(c, round)).cloned());
        let elements: Vec<Element> = self.stale_since(round).map(pair).collect();
        if !elements.is_empty() {
            ops.push(Op::DeleteElements { set: self.sets.get(SetId::Hairpin).clone(), elements });
        }
        self.transaction(ops)
    }

    /// Forgets what [`Renderer::sweep`] deleted.
    pub fn swept(&mut self, chains: &[Arc<str>], round: u64) {
        let gone: BTreeSet<&Arc<str>> = chains.iter().collect();
        self.uses.retain(|pick, u| u.frontends > 0 || u.idle_from > round || !gone.contains(&pick.chain()));
        self.stale_hairpin.retain(|_, since| *since > round);
    }

    /// How many elements and chains are given out; for metrics and tests.
    pub fn size(&self) -> (usize, usize) {
        let elements = self.frontends.iter().map(|(f, r)| items(f, r).len()).sum();
        (elements, self.uses.len())
    }

    fn transaction(&self, ops: Vec<Op>) -> Transaction {
        Transaction { table: self.table.clone(), ops }
    }

    /// Groups changes into transactions without splitting one.
    fn pack(&self, batches: Vec<Changes>) -> Vec<Transaction> {
        let mut packer = Packer::new(self);
        let mut transactions: Vec<Transaction> = batches.into_iter().filter_map(|c| packer.push(c)).collect();
        transactions.extend(packer.flush());
        transactions
    }

    fn place(&mut self, frontend: Frontend, rendered: Option<Rendered>) {
        if let Some(old) = self.frontends.remove(&frontend) {
            for pick in old.picks() {
                if let Some(of) = self.uses.get_mut(&pick) {
                    of.frontends -= 1; // Kept at zero until swept: the chain is still there.
                    of.idle_from = self.round;
                }
            }
            if let Some(of) = self.frontends_of.get_mut(&old.service) {
                of.retain(|f| *f != frontend);
                if of.is_empty() {
                    self.frontends_of.remove(&old.service);
                }
            }
        }
        if let Some(new) = rendered {
            for pick in new.picks() {
                self.uses.entry(pick).or_default().frontends += 1;
            }
            let of = self.frontends_of.entry(new.service.clone()).or_insert_with(|| Vec::with_capacity(1));
            of.push(frontend);
            self.frontends.insert(frontend, Box::new(new));
        }
    }

    /// Brings what the frontends of a Service port share up to date.
    fn share(&mut self, id: &ServicePortId, service: Option<&Arc<CompiledService>>) {
        let mut new = Shared::default();
        if let Some(service) = service {
            new.hairpin_addrs = service.hairpin_addrs.clone();
            let cluster = service.short_circuit.usable();
            let local = local_set(service);
            match service.affinity {
                Affinity::None => self.numbers.release(id),
                Affinity::ClientIp { timeout } => {
                    let all: BTreeSet<Backend> = cluster.iter().chain(local).copied().collect();
                    if let Some(block) = self.numbers.assign(id, &all, timeout.as_secs().max(1)) {
                        let marked =
                            |set: &[Backend]| set.iter().filter_map(|b| block.mark(b).map(|m| (*b, m))).collect();
                        new.live = marked(cluster);
                        new.live_local = marked(local);
                    }
                }
            }
        } else {
            self.numbers.release(id);
        }
        let old = self.shared.remove(id).unwrap_or_default();
        for ip in old.hairpin_addrs.iter() {
            if let Some(count) = self.hairpin.get_mut(ip) {
                *count -= 1;
                if *count == 0 {
                    self.hairpin.remove(ip);
                }
            }
        }
        for ip in new.hairpin_addrs.iter() {
            *self.hairpin.entry(*ip).or_default() += 1;
        }
        if new != Shared::default() {
            self.shared.insert(id.clone(), new);
        }
    }

    fn shared_items(&self, id: &ServicePortId) -> Vec<Item> {
        let Some(shared) = self.shared.get(id) else { return Vec::new() };
        let item = |set: SetId, (backend, mark): &(Backend, u32)| {
            let key = vec![Value::Proto(id.protocol.number()), Value::Mark(*mark)];
            (set, Element::new(key, Data::Values(vec![backend.addr.into(), Value::Port(backend.port.get())])))
        };
        let live = shared.live.iter().map(|e| item(SetId::AffinityLive, e));
        live.chain(shared.live_local.iter().map(|e| item(SetId::AffinityLiveLocal, e))).collect()
    }

    fn render(
        &self,
        frontend: &Frontend,
        kind: FrontendKind,
        id: &ServicePortId,
        service: &CompiledService,
        node: &NodeView,
        before: Option<(&[Backend], &[Backend])>,
    ) -> Rendered {
        let space = match frontend.addr {
            FrontendAddr::Address(_) => Space::Address,
            FrontendAddr::NodePort(_) => Space::NodePort,
            FrontendAddr::HostPort(_) => Space::HostPort,
        };
        let block = match service.affinity {
            Affinity::None => None,
            Affinity::ClientIp { timeout } => self.numbers.get(id).map(|b| (b, timeout.as_secs().max(1))),
        };
        let (before_inside, before_outside) = before.unwrap_or_default();
        let step =
            |backends: &Backends, side: Side, masquerade: Masquerade, local: bool, previous: &[Backend]| match backends
            {
                Backends::Reject => (Step::Reject, Slots::default()),
                Backends::Drop => (Step::Drop, Slots::default()),
                Backends::Usable(set) => {
                    let backends = arrange(previous, set);
                    let marks = match block {
                        // Every usable endpoint has a number: they were assigned from the same sets.
                        Some((block, _)) => backends.iter().filter_map(|b| block.mark(b)).collect(),
                        None => Box::default(),
                    };
                    let affinity =
                        block.filter(|_| marks.len() == backends.len()).map(|(block, timeout)| PickAffinity {
                            timeout_seconds: u32::try_from(timeout).unwrap_or(u32::MAX),
                            bits: block.bits() as u8, // at most 14
                            local,
                        });
                    let pick = Pick { space, side, masquerade, n: backends.len() as u32, affinity };
                    let marks = if affinity.is_some() { marks } else { Box::default() };
                    (Step::Pick(pick), Slots { backends, marks })
                }
            };
        let to_cluster_ip = if node.masquerade_all {
            Masquerade::Always
        } else if layout::pods_known(node, self.family) {
            Masquerade::UnlessPod
        } else {
            Masquerade::Never
        };
        let (way, inside, outside) = match (kind, service.external_policy) {
            (FrontendKind::ClusterIp, _) => {
                let local = service.internal_policy == TrafficPolicy::Local;
                let (step, slots) = step(&service.internal, Side::Inside, to_cluster_ip, local, before_inside);
                (Way::Same(step), slots, Slots::default())
            }
            (FrontendKind::HostPort, _) => {
                let (step, slots) = step(&service.external, Side::Inside, Masquerade::Never, false, before_inside);
                (Way::Same(step), slots, Slots::default())
            }
            (_, TrafficPolicy::Cluster) => {
                let (step, slots) = step(&service.external, Side::Inside, Masquerade::Always, false, before_inside);
                (Way::Same(step), slots, Slots::default())
            }
            (_, TrafficPolicy::Local) => {
                let (inside, slots) =
                    step(&service.short_circuit, Side::Inside, Masquerade::IfHost, false, before_inside);
                let (outside, slots_outside) =
                    step(&service.external, Side::Outside, Masquerade::Never, true, before_outside);
                (Way::BySource { inside, outside }, slots, slots_outside)
            }
        };
        Rendered {
            service: id.clone(),
            way,
            guard: (kind == FrontendKind::LoadBalancer).then(|| service.source_ranges.clone()).flatten(),
            service_mark: block.map(|(block, _)| block.service_mark()),
            inside,
            outside,
        }
    }

    /// Takes over the affinity numbers of a table found at start.
    fn adopt_numbers(&mut self, map: &ServiceMap, existing: &Held) {
        // Endpoints by protocol and number, so that each Service finds its own without looking at all.
        let mut live: BTreeMap<(u8, u32), Backend> = BTreeMap::new();
        for ((_, key), element) in
            existing.iter().filter(|((id, _), _)| matches!(id, SetId::AffinityLive | SetId::AffinityLiveLocal))
        {
            if let ([Value::Proto(proto), Value::Mark(mark)], Some(Data::Values(values))) = (&key[..], &element.data)
                && let Some(backend) = backend_of(values)
            {
                live.insert((*proto, *mark), backend);
            }
        }
        for (frontend, target) in map.frontends.iter().filter(|(f, _)| f.family() == self.family) {
            if self.numbers.get(&target.service).is_some() {
                continue;
            }
            let Some(service) = map.services.get(&target.service) else { continue };
            let Affinity::ClientIp { timeout } = service.affinity else { continue };
            let services = match frontend.addr {
                FrontendAddr::Address(_) => SetId::AffinityServices,
                FrontendAddr::NodePort(_) => SetId::NodePortAffinityServices,
                FrontendAddr::HostPort(_) => continue,
            };
            let Some(Data::Values(values)) = data_of(existing, services, key(frontend)) else { continue };
            let [Value::Mark(service_mark)] = values[..] else { continue };
            // The number of bits is in the name of the chain that the frontend leads to.
            let verdicts = [SetId::Frontends, SetId::NodePorts, SetId::Guarded, SetId::Inside, SetId::NodePortsInside];
            let bits = verdicts.iter().find_map(|set| match data_of(existing, *set, key(frontend)) {
                Some(Data::Verdict(Verdict::Goto(chain))) => affinity_of_chain(chain),
                _ => None,
            });
            let Some((seconds, bits)) = bits else { continue };
            // The numbers of a block differ in their low bits, so they are neighbours, whatever the bits in between are for.
            let proto = frontend.protocol.number();
            let block = (proto, service_mark)..=(proto, service_mark | ((1u32 << bits) - 1));
            let endpoints: Vec<(Backend, u32)> = live.range(block).map(|((_, mark), b)| (*b, *mark)).collect();
            if seconds == timeout.as_secs().max(1) {
                self.numbers.adopt(&target.service, seconds, bits, service_mark, &endpoints);
            }
        }
    }
}

impl Rendered {
    fn picks(&self) -> Vec<Pick> {
        let steps = match self.way {
            Way::Same(step) => vec![step],
            Way::BySource { inside, outside } => vec![inside, outside],
        };
        steps
            .into_iter()
            .filter_map(|s| match s {
                Step::Pick(pick) => Some(pick),
                Step::Reject | Step::Drop => None,
            })
            .collect()
    }
}

impl Step {
    fn verdict(&self) -> Verdict {
        match self {
            Step::Pick(pick) => Verdict::Goto(pick.chain()),
            Step::Reject => Verdict::Goto(layout::REJECT.into()),
            Step::Drop => Verdict::Drop,
        }
    }
}

/// Reads timeout and bits from the name that [`Pick::chain`] gives.
fn affinity_of_chain(chain: &str) -> Option<(u64, u32)> {
    let (seconds, bits) = chain.split_once("-affinity-")?.1.split_once("s-")?;
    Some((seconds.parse().ok()?, bits.trim_end_matches("-local").parse().ok()?))
}

fn local_set(service: &CompiledService) -> &[Backend] {
    if service.external_policy == TrafficPolicy::Local {
        service.external.usable()
    } else if service.internal_policy == TrafficPolicy::Local {
        service.internal.usable()
    } else {
        &[]
    }
}

/// Keeps endpoints in their slots where possible: holes are filled with new endpoints, then from the end.
fn arrange(previous: &[Backend], now: &Arc<[Backend]>) -> Arc<[Backend]> {
    if previous.is_empty() || *previous == **now {
        return now.clone();
    }
    let wanted: BTreeSet<&Backend> = now.iter().collect();
    let known: BTreeSet<&Backend> = previous.iter().collect();
    let mut slots: Vec<Option<Backend>> = previous.iter().map(|b| wanted.contains(b).then_some(*b)).collect();
    let mut fresh = now.iter().filter(|b| !known.contains(b)).copied();
    for slot in slots.iter_mut().filter(|s| s.is_none()) {
        *slot = fresh.next();
    }
    slots.extend(fresh.map(Some));
    let mut at = 0;
    while at < slots.len() {
        if slots[at].is_none() {
            slots.swap_remove(at);
        } else {
            at += 1;
        }
    }
    slots.into_iter().flatten().collect()
}

/// Collects changes into transactions of bounded size.
struct Packer {
    table: Table,
    sets: Sets,
    delete: BTreeMap<SetId, Vec<Element>>,
    add: BTreeMap<SetId, Vec<Element>>,
    count: usize,
}

impl Packer {
    fn new(renderer: &Renderer) -> Packer {
        Packer {
            table: renderer.table.clone(),
            sets: renderer.sets.clone(),
            delete: BTreeMap::new(),
            add: BTreeMap::new(),
            count: 0,
        }
    }

    /// Takes changes that belong together; answers a transaction of those before them when it is full.
    fn push(&mut self, changes: Changes) -> Option<Transaction> {
        let size = changes.delete.len() + changes.add.len();
        let full = if self.count > 0 && self.count + size > ELEMENTS_PER_COMMIT { self.flush() } else { None };
        self.count += size;
        for (id, element) in changes.delete {
            self.delete.entry(id).or_default().push(element);
        }
        for (id, element) in changes.add {
            self.add.entry(id).or_default().push(element);
        }
        full
    }

    fn flush(&mut self) -> Option<Transaction> {
        self.count = 0;
        let mut ops = Vec::new();
        for (id, elements) in std::mem::take(&mut self.delete) {
            ops.push(Op::DeleteElements { set: self.sets.get(id).clone(), elements });
        }
        for (id, elements) in std::mem::take(&mut self.add) {
            ops.push(Op::AddElements { set: self.sets.get(id).clone(), elements });
        }
        (!ops.is_empty()).then(|| Transaction { table: self.table.clone(), ops })
    }
}

/// What leads from what is left of a table to some elements, which are then no longer left.
fn against(new: Vec<Item>, left: &mut Held) -> Changes {
    let mut changes = Changes::default();
    if left.is_empty() {
        changes.add = new;
        return changes;
    }
    for (id, element) in new {
        match left.remove(&(id, element.key.clone())) {
            Some(held) if held == element => {}
            Some(_) => {
                changes.delete.push((id, element.clone()));
                changes.add.push((id, element));
            }
            None => changes.add.push((id, element)),
        }
    }
    changes
}

fn key(frontend: &Frontend) -> Vec<Value> {
    let mut key = Vec::with_capacity(4);
    if let FrontendAddr::Address(addr) = frontend.addr {
        key.push(addr.into());
    }
    key.push(Value::Proto(frontend.protocol.number()));
    key.push(Value::Port(frontend.port.get()));
    key
}

fn data_of(held: &Held, id: SetId, key: Vec<Value>) -> Option<&Data> {
    held.get(&(id, key))?.data.as_ref()
}

fn single(ip: IpAddr) -> Element {
    Element::key(vec![ip.into()])
}

fn pair(ip: IpAddr) -> Element {
    Element::key(vec![ip.into(), ip.into()])
}

fn address_of(value: &Value) -> Option<IpAddr> {
    match value {
        Value::V4(a) => Some(IpAddr::from(*a)),
        Value::V6(a) => Some(IpAddr::from(*a)),
        _ => None,
    }
}

fn backend_of(values: &[Value]) -> Option<Backend> {
    let addr = address_of(values.first()?)?;
    match values.get(1)? {
        Value::Port(port) => Some(Backend { addr, port: (*port).try_into().ok()? }),
        _ => None,
    }
}

/// The slots that a table holds for a frontend, in order.
fn slots_in(frontend: &Frontend, existing: &Held) -> Option<(Vec<Backend>, Vec<Backend>)> {
    if existing.is_empty() {
        return None;
    }
    let ids = match frontend.addr {
        FrontendAddr::Address(_) => [SetId::Slots, SetId::SlotsOutside],
        FrontendAddr::NodePort(_) => [SetId::NodePortSlots, SetId::NodePortSlotsOutside],
        FrontendAddr::HostPort(_) => [SetId::HostPortSlots, SetId::HostPortSlots],
    };
    let [inside, outside] = ids.map(|id| {
        let slot = |index: u32| {
            let mut key = key(frontend);
            key.push(Value::Index(index));
            match data_of(existing, id, key) {
                Some(Data::Values(values)) => backend_of(values),
                _ => None,
            }
        };
        (0..).map_while(slot).collect::<Vec<Backend>>()
    });
    Some((inside, outside))
}

/// The elements of one frontend.
fn items(frontend: &Frontend, rendered: &Rendered) -> Vec<Item> {
    let address = matches!(frontend.addr, FrontendAddr::Address(_));
    let frontends = match frontend.addr {
        FrontendAddr::Address(_) => SetId::Frontends,
        FrontendAddr::NodePort(_) => SetId::NodePorts,
        FrontendAddr::HostPort(_) => SetId::HostPorts,
    };
    let element = |data: Verdict| Element::new(key(frontend), Data::Verdict(data));
    // The one element of a frontend that everybody meets first says whose it is.
    let named = |data: Verdict| Element { comment: Some(rendered.service.to_string().into()), ..element(data) };
    let mut items = Vec::with_capacity(2 + rendered.inside.backends.len() + rendered.outside.backends.len());

    let verdict = match &rendered.way {
        Way::Same(step) => step.verdict(),
        Way::BySource { inside, outside } => {
            let (set_inside, set_outside, chain) = if address {
                (SetId::Inside, SetId::Outside, layout::LOCAL_POLICY)
            } else {
                (SetId::NodePortsInside, SetId::NodePortsOutside, layout::NODE_PORT_LOCAL_POLICY)
            };
            items.push((set_inside, element(inside.verdict())));
            items.push((set_outside, element(outside.verdict())));
            Verdict::Goto(chain.into())
        }
    };
    match &rendered.guard {
        None => items.push((frontends, named(verdict))),
        Some(nets) => {
            items.push((SetId::Guarded, element(verdict)));
            items.push((frontends, named(Verdict::Goto(layout::GUARD.into()))));
            for net in nets.iter() {
                let mut key = key(frontend);
                key.push(Value::Net(*net));
                items.push((SetId::SourceRanges, Element::key(key)));
            }
        }
    }

    let mut has_affinity = false;
    for (step, slots) in match &rendered.way {
        Way::Same(step) => vec![(step, &rendered.inside)],
        Way::BySource { inside, outside } => vec![(inside, &rendered.inside), (outside, &rendered.outside)],
    } {
        let Step::Pick(pick) = step else { continue };
        has_affinity |= pick.affinity.is_some();
        for (index, backend) in slots.backends.iter().enumerate() {
            let mut key = key(frontend);
            key.push(Value::Index(index as u32));
            let data = match slots.marks.get(index) {
                Some(mark) => Data::Values(vec![Value::Mark(*mark)]),
                None => Data::Values(vec![backend.addr.into(), Value::Port(backend.port.get())]),
            };
            items.push((pick.slots(), Element::new(key, data)));
        }
    }
    if let Some(mark) = rendered.service_mark.filter(|_| has_affinity) {
        let id = if address { SetId::AffinityServices } else { SetId::NodePortAffinityServices };
        items.push((id, Element::new(key(frontend), Data::Values(vec![Value::Mark(mark)]))));
    }
    items
}

fn difference(old: Vec<Item>, new: Vec<Item>) -> Changes {
    let mut left: Held = old.into_iter().map(|(id, e)| ((id, e.key.clone()), e)).collect();
    let mut changes = Changes::default();
    for (id, element) in new {
        match left.remove(&(id, element.key.clone())) {
            Some(held) if held == element => {}
            Some(_) => {
                changes.delete.push((id, element.clone()));
                changes.add.push((id, element));
            }
            None => changes.add.push((id, element)),
        }
    }
    changes.delete.extend(left.into_iter().map(|((id, _), element)| (id, element)));
    changes
}

fn delete_chains(names: impl Iterator<Item = Arc<str>>) -> Vec<Op> {
    let names: Vec<Arc<str>> = names.collect();
    let flush = names.iter().map(|name| Op::FlushChain { name: name.clone() });
    flush.chain(names.iter().map(|name| Op::DeleteChain { name: name.clone() })).collect()
}
