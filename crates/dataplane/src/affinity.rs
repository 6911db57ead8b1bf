//! Numbers for session affinity: a block per Service port, a number in it per endpoint.
//!
//! The kernel remembers a client's endpoint by number (see `layout`). All numbers of a Service port differ only in their low
//! bits, so that masking one gives the block, which is the memory's key; a number names one endpoint as long as that endpoint
//! may be used and is then left alone for as long as possible.

use std::collections::{BTreeMap, BTreeSet};

use portolan_plan::endpoint::Backend;
use portolan_plan::service::ServicePortId;

use crate::layout::{MASQUERADE, SCRATCH};

/// Blocks are between 2^8 (so that most Services never outgrow theirs) and 2^14 numbers (the mark's low field).
const MIN_BITS: u32 = 8;
const MAX_BITS: u32 = 14;
/// A mark has 30 bits for numbers.
const NUMBER_BITS: u32 = 30;

/// Spreads a number over the mark bits that are free for it: 0–13 and 16–31.
fn mark_of(number: u32) -> u32 {
    (number >> 14) << 16 | (number & 0x3fff) | SCRATCH
}

fn number_of(mark: u32) -> u32 {
    (mark >> 16) << 14 | (mark & 0x3fff)
}

/// The block of one Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    base: u32,
    bits: u32,
    timeout_seconds: u64,
    offsets: BTreeMap<Backend, u32>,
    cursor: u32,
}

impl Block {
    /// How many low bits differ between the numbers of the block.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// The Service port's own number as a mark.
    pub fn service_mark(&self) -> u32 {
        mark_of(self.base)
    }

    /// The number of an endpoint as a mark.
    pub fn mark(&self, backend: &Backend) -> Option<u32> {
        self.offsets.get(backend).map(|offset| mark_of(self.base + offset))
    }

    /// Numbers for exactly these endpoints; known ones keep theirs. False when the block is too small.
    fn cover(&mut self, backends: &BTreeSet<Backend>) -> bool {
        let size = 1u32 << self.bits;
        // Half of the block stays free, so that a number rests before it is used again.
        if backends.len() as u32 > size / 2 && self.bits < MAX_BITS || backends.len() as u32 >= size {
            return false;
        }
        self.offsets.retain(|backend, _| backends.contains(backend));
        let mut used: BTreeSet<u32> = self.offsets.values().copied().collect();
        for backend in backends {
            if self.offsets.contains_key(backend) {
                continue;
            }
            // Offset 0 is the Service port itself.
            loop {
                self.cursor = if self.cursor + 1 >= size { 1 } else { self.cursor + 1 };
                if used.insert(self.cursor) {
                    break;
                }
            }
            self.offsets.insert(*backend, self.cursor);
        }
        true
    }
}

/// All blocks of one family.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    blocks: BTreeMap<ServicePortId, Block>,
    free: BTreeMap<u32, Vec<u32>>,
    next: u32,
}

impl Numbers {
    /// The block of a Service port, with a number for each of `backends`. `None` when there are too many for one block, or
    /// no blocks left: then the Service port goes without affinity.
    ///
    /// A changed timeout gives a new block, so that what was remembered under the old one is forgotten.
    pub fn assign(&mut self, id: &ServicePortId, backends: &BTreeSet<Backend>, timeout_seconds: u64) -> Option<&Block> {
        let fits = match self.blocks.get_mut(id) {
            Some(block) => block.timeout_seconds == timeout_seconds && block.cover(backends),
            None => false,
        };
        if !fits {
            self.release(id);
            let bits = (MIN_BITS..=MAX_BITS)
                .find(|bits| backends.len() as u32 <= (1 << bits) / 2)
                .or_else(|| ((backends.len() as u32) < 1 << MAX_BITS).then_some(MAX_BITS))?;
            let base = self.take(bits)?;
            let mut block = Block { base, bits, timeout_seconds, offsets: BTreeMap::new(), cursor: 0 };
            block.cover(backends);
            self.blocks.insert(id.clone(), block);
        }
        self.blocks.get(id)
    }

    fn take(&mut self, bits: u32) -> Option<u32> {
        let size = 1u32 << bits;
        let aligned = self.next.next_multiple_of(size);
        if aligned + size <= 1 << NUMBER_BITS {
            self.next = aligned + size;
            return Some(aligned);
        }
        let list = self.free.get_mut(&bits)?;
        if list.is_empty() { None } else { Some(list.remove(0)) }
    }

    /// Gives a block back. It is used again only when no fresh ones are left.
    pub fn release(&mut self, id: &ServicePortId) {
        if let Some(block) = self.blocks.remove(id) {
            self.free.entry(block.bits).or_default().push(block.base);
        }
    }

    /// The block of a Service port.
    pub fn get(&self, id: &ServicePortId) -> Option<&Block> {
        self.blocks.get(id)
    }

    /// Takes over a block that a table found at start uses, so that clients keep their endpoints.
    pub fn adopt(
        &mut self,
        id: &ServicePortId,
        timeout_seconds: u64,
        bits: u32,
        service_mark: u32,
        endpoints: &[(Backend, u32)],
    ) {
        if !(MIN_BITS..=MAX_BITS).contains(&bits) || service_mark & MASQUERADE != 0 {
            return;
        }
        let base = number_of(service_mark);
        let size = 1u32 << bits;
        let offsets: BTreeMap<Backend, u32> = endpoints
            .iter()
            .filter_map(|(backend, mark)| {
                let offset = number_of(*mark).checked_sub(base).filter(|o| *o > 0 && *o < size)?;
                Some((*backend, offset))
            })
            .collect();
        let overlaps = self.blocks.values().any(|b| b.base < base + size && base < b.base + (1 << b.bits));
        if !base.is_multiple_of(size) || overlaps {
            return;
        }
        self.next = self.next.max(base + size);
        let cursor = offsets.values().copied().max().unwrap_or(0);
        self.blocks.insert(id.clone(), Block { base, bits, timeout_seconds, offsets, cursor });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_plan::world::{IpFamily, L4, ObjectKey};

    fn id(name: &str) -> ServicePortId {
        ServicePortId {
            service: std::sync::Arc::new(ObjectKey::new("ns", name)),
            port_name: "".into(),
            protocol: L4::Tcp,
            family: IpFamily::V4,
        }
    }

    fn backends(lasts: &[u8]) -> BTreeSet<Backend> {
        lasts.iter().map(|l| Backend { addr: [10, 0, 0, *l].into(), port: 80.try_into().unwrap() }).collect()
    }

    #[test]
    fn numbers_stay_while_the_endpoint_stays_and_rest_afterwards() {
        let mut numbers = Numbers::default();
        let first = numbers.assign(&id("a"), &backends(&[1, 2]), 60).unwrap().clone();
        let one = backends(&[1]).pop_first().unwrap();
        let two = backends(&[2]).pop_first().unwrap();
        let second = numbers.assign(&id("a"), &backends(&[2, 3]), 60).unwrap().clone();
        assert_eq!(first.mark(&two), second.mark(&two));
        let third = numbers.assign(&id("a"), &backends(&[1, 2, 3]), 60).unwrap();
        assert_ne!(first.mark(&one), third.mark(&one), "a forgotten endpoint comes back as another");
        let mask = !((1u32 << third.bits()) - 1) & !MASQUERADE;
        assert_eq!(third.mark(&one).unwrap() & mask, third.service_mark());
        assert_ne!(third.mark(&one).unwrap(), third.service_mark());
    }

    #[test]
    fn another_timeout_is_another_block() {
        let mut numbers = Numbers::default();
        let first = numbers.assign(&id("a"), &backends(&[1]), 60).unwrap().service_mark();
        let other = numbers.assign(&id("b"), &backends(&[1]), 60).unwrap().service_mark();
        let second = numbers.assign(&id("a"), &backends(&[1]), 61).unwrap().service_mark();
        assert!(first != second && first != other && second != other);
    }

    #[test]
    fn an_adopted_block_goes_on() {
        let mut before = Numbers::default();
        before.assign(&id("x"), &backends(&[9]), 60).unwrap();
        let block = before.assign(&id("a"), &backends(&[1, 2]), 60).unwrap();
        let endpoints: Vec<(Backend, u32)> =
            backends(&[1, 2]).into_iter().map(|b| (b, block.mark(&b).unwrap())).collect();
        let mut after = Numbers::default();
        after.adopt(&id("a"), 60, block.bits(), block.service_mark(), &endpoints);
        let again = after.assign(&id("a"), &backends(&[1, 2]), 60).unwrap().clone();
        for (backend, mark) in &endpoints {
            assert_eq!(again.mark(backend), Some(*mark));
        }
        assert_ne!(after.assign(&id("b"), &backends(&[1]), 60).unwrap().service_mark(), again.service_mark());
    }
}
