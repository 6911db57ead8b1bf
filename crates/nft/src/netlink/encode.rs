//! The object model as nf_tables messages. Numbers are those of `linux/netfilter/nf_tables.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::message::{Attributes, Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use super::{NFNL_SUBSYS_NFTABLES, family};
use crate::object::*;

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
pub(super) const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
pub(super) const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
pub(super) const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_DELSETELEM: u16 = 14;

/// An attribute's length is 16 bits, so the elements of one message stay below it; nft splits at the same size.
const MAX_ELEMENT_BYTES: usize = 48 << 10;

/// `NFTA_SET_ID` must be unique within a batch.
static SET_ID: AtomicU32 = AtomicU32::new(1);

/// Calls `emit` with a builder for each message of one operation; the builder is given the sequence number.
pub(super) fn op_messages(table: &Table, op: &Op, mut emit: impl FnMut(&mut dyn FnMut(u32) -> Vec<u8>)) {
    let fam = family(table.family);
    let start = |kind: u16, flags: u16, sequence: u32| {
        Message::new(NFNL_SUBSYS_NFTABLES << 8 | kind, NLM_F_REQUEST | flags, sequence, fam, 0)
    };
    match op {
        Op::AddTable => emit(&mut |seq| {
            let mut m = start(NFT_MSG_NEWTABLE, NLM_F_CREATE, seq);
            m.string(1, &table.name);
            m.finish()
        }),
        Op::DeleteTable => emit(&mut |seq| {
            let mut m = start(NFT_MSG_DELTABLE, 0, seq);
            m.string(1, &table.name);
            m.finish()
        }),
        Op::AddChain { name, base } => emit(&mut |seq| {
            let mut m = start(NFT_MSG_NEWCHAIN, NLM_F_CREATE, seq);
            m.string(1, &table.name);
            m.string(3, name);
            if let Some(base) = base {
                m.nest(4, |m| {
                    m.u32(1, hook(base.hook));
                    m.attribute(2, &base.priority.to_be_bytes());
                });
                m.u32(5, 1); // NF_ACCEPT
                m.string(
                    7,
                    match base.chain_type {
                        ChainType::Filter => "filter",
                        ChainType::Nat => "nat",
                    },
                );
            }
            m.finish()
        }),
        Op::FlushChain { name } => emit(&mut |seq| {
            let mut m = start(NFT_MSG_DELRULE, 0, seq);
            m.string(1, &table.name);
            m.string(2, name);
            m.finish()
        }),
        Op::DeleteChain { name } => emit(&mut |seq| {
            let mut m = start(NFT_MSG_DELCHAIN, 0, seq);
            m.string(1, &table.name);
            m.string(3, name);
            m.finish()
        }),
        Op::AddRule { chain, statements } => emit(&mut |seq| {
            let mut m = start(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, seq);
            m.string(1, &table.name);
            m.string(2, chain);
            m.nest(4, |m| {
                for statement in statements {
                    encode_statement(m, table.family, statement);
                }
            });
            m.finish()
        }),
        Op::AddSet(set) => emit(&mut |seq| {
            let mut m = start(NFT_MSG_NEWSET, NLM_F_CREATE, seq);
            encode_set(&mut m, table, set);
            m.finish()
        }),
        Op::AddElements { set, elements } => {
            chunks(table.family, set, elements, |chunk| {
                emit(&mut |seq| {
                    elements_message(start(NFT_MSG_NEWSETELEM, NLM_F_CREATE, seq), table, set, chunk, true)
                });
            });
        }
        Op::DeleteElements { set, elements } => {
            chunks(table.family, set, elements, |chunk| {
                emit(&mut |seq| elements_message(start(NFT_MSG_DELSETELEM, 0, seq), table, set, chunk, false));
            });
        }
        Op::FlushSet { set } => emit(&mut |seq| {
            let mut m = start(NFT_MSG_DELSETELEM, 0, seq);
            m.string(1, &table.name);
            m.string(2, &set.name);
            m.finish()
        }),
    }
    let _ = NLM_F_EXCL; // Nothing here insists on being the first; adoption of an existing table relies on that.
}

fn chunks<'a>(fam: Family, set: &Set, elements: &'a [Element], mut each: impl FnMut(&'a [Element])) {
    let per_element = 64 + 2 * key_len(fam, &set.key) + 48 + 136;
    for chunk in elements.chunks((MAX_ELEMENT_BYTES / per_element).max(1)) {
        each(chunk);
    }
}

fn hook(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

fn field_len(fam: Family, field: FieldType) -> usize {
    match field {
        FieldType::Addr => match fam {
            Family::Ip => 4,
            Family::Ip6 => 16,
        },
        FieldType::Proto => 1,
        FieldType::Port => 2,
        FieldType::Mark | FieldType::Index => 4,
    }
}

/// Fields side by side occupy whole 32-bit registers each.
fn key_len(fam: Family, fields: &[FieldType]) -> usize {
    match fields {
        [single] => field_len(fam, *single),
        several => several.iter().map(|f| field_len(fam, *f).next_multiple_of(4)).sum(),
    }
}

/// The number by which nft remembers a type, for listings; the kernel only stores it.
fn type_number(fam: Family, fields: &[FieldType]) -> u32 {
    fields.iter().fold(0, |number, field| {
        number << 6
            | match (field, fam) {
                (FieldType::Addr, Family::Ip) => 7,
                (FieldType::Addr, Family::Ip6) => 8,
                (FieldType::Proto, _) => 12,
                (FieldType::Port, _) => 13,
                (FieldType::Mark, _) => 19,
                // Not 4, nft's plain integer: that has no length of its own, on which nft 1.0.6 aborts when it lists
                // the elements. A mark also is a 32-bit number.
                (FieldType::Index, _) => 19,
            }
    })
}

const NFT_SET_INTERVAL: u32 = 4;
const NFT_SET_MAP: u32 = 8;
const NFT_SET_TIMEOUT: u32 = 0x10;
const NFT_SET_EVAL: u32 = 0x20;
const NFT_SET_CONCAT: u32 = 0x80;
const NFT_DATA_VERDICT: u32 = 0xffff_ff00;

fn encode_set(m: &mut Message, table: &Table, set: &Set) {
    let mut flags = 0;
    if set.interval {
        flags |= NFT_SET_INTERVAL;
    }
    if set.data.is_some() {
        flags |= NFT_SET_MAP;
    }
    if set.dynamic.is_some() {
        flags |= NFT_SET_EVAL | NFT_SET_TIMEOUT;
    }
    if set.interval && set.key.len() > 1 {
        flags |= NFT_SET_CONCAT;
    }
    m.string(1, &table.name);
    m.string(2, &set.name);
    m.u32(3, flags);
    m.u32(4, type_number(table.family, &set.key));
    m.u32(5, key_len(table.family, &set.key) as u32);
    match &set.data {
        None => {}
        Some(DataType::Verdict) => {
            m.u32(6, NFT_DATA_VERDICT);
            m.u32(7, 16);
        }
        Some(DataType::Values(fields)) => {
            m.u32(6, type_number(table.family, fields));
            m.u32(7, key_len(table.family, fields) as u32);
        }
    }
    m.u32(10, SET_ID.fetch_add(1, Ordering::Relaxed));
    if set.dynamic.is_some() || (set.interval && set.key.len() > 1) {
        m.nest(9, |m| {
            if let Some(size) = set.dynamic {
                m.u32(1, size);
            }
            if set.interval && set.key.len() > 1 {
                m.nest(2, |m| {
                    for field in &set.key {
                        m.nest(1, |m| m.u32(1, field_len(table.family, *field) as u32));
                    }
                });
            }
        });
    }
}

fn elements_message(mut m: Message, table: &Table, set: &Set, elements: &[Element], with_data: bool) -> Vec<u8> {
    m.string(1, &table.name);
    m.string(2, &set.name);
    m.nest(3, |m| {
        let before = m.len();
        for element in elements {
            m.nest(1, |m| {
                m.nest(1, |m| m.attribute(1, &key_bytes(&element.key, End::First)));
                if set.interval {
                    m.nest(10, |m| m.attribute(1, &key_bytes(&element.key, End::Last)));
                }
                if let Some(comment) = element.comment.as_deref().filter(|_| with_data) {
                    // A type-length-value of nft's own: 0 is a comment, its end a zero byte.
                    let comment = crate::text::shorten_comment(comment);
                    let mut data = vec![0, comment.len() as u8 + 1];
                    data.extend_from_slice(comment.as_bytes());
                    data.push(0);
                    m.attribute(6, &data);
                }
                match element.data.as_ref().filter(|_| with_data) {
                    None => {}
                    Some(Data::Verdict(verdict)) => m.nest(2, |m| encode_verdict(m, verdict)),
                    Some(Data::Values(values)) => m.nest(2, |m| m.attribute(1, &key_bytes(values, End::First))),
                }
            });
        }
        debug_assert!(m.len() - before < usize::from(u16::MAX), "elements of one message fit its attribute");
    });
    m.finish()
}

#[derive(Clone, Copy)]
enum End {
    First,
    Last,
}

fn key_bytes(values: &[Value], end: End) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    for value in values {
        match value {
            Value::V4(addr) => bytes.extend_from_slice(&addr.octets()),
            Value::V6(addr) => bytes.extend_from_slice(&addr.octets()),
            Value::Net(net) => match (end, net.network(), net.broadcast()) {
                (End::First, IpAddr::V4(a), _) | (End::Last, _, IpAddr::V4(a)) => bytes.extend_from_slice(&a.octets()),
                (End::First, IpAddr::V6(a), _) | (End::Last, _, IpAddr::V6(a)) => bytes.extend_from_slice(&a.octets()),
            },
            Value::Proto(n) => bytes.push(*n),
            Value::Port(n) => bytes.extend_from_slice(&n.to_be_bytes()),
            Value::Mark(n) | Value::Index(n) => bytes.extend_from_slice(&n.to_ne_bytes()),
        }
        if values.len() > 1 {
            while !bytes.len().is_multiple_of(4) {
                bytes.push(0);
            }
        }
    }
    bytes
}

fn decode_values(fam: Family, types: &[FieldType], bytes: &[u8], last: Option<&[u8]>) -> Option<Vec<Value>> {
    let mut values = Vec::with_capacity(types.len());
    let mut at = 0;
    for field in types {
        let len = field_len(fam, *field);
        let part = bytes.get(at..at + len)?;
        let word = || part.try_into().ok().map(u32::from_ne_bytes);
        values.push(match field {
            FieldType::Addr => {
                let first = addr(part)?;
                match last {
                    Some(last) => Value::Net(net_between(first, addr(last.get(at..at + len)?)?)?),
                    None => first.into(),
                }
            }
            FieldType::Proto => Value::Proto(part[0]),
            FieldType::Port => Value::Port(u16::from_be_bytes([part[0], part[1]])),
            FieldType::Mark => Value::Mark(word()?),
            FieldType::Index => Value::Index(word()?),
        });
        at += if types.len() > 1 { len.next_multiple_of(4) } else { len };
    }
    Some(values)
}

fn addr(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|b| Ipv4Addr::from(b).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|b| Ipv6Addr::from(b).into()),
        _ => None,
    }
}

/// The network from its first and last address; `None` when they are not the ends of one.
fn net_between(first: IpAddr, last: IpAddr) -> Option<ipnet::IpNet> {
    let prefix = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
        _ => return None,
    };
    let net = ipnet::IpNet::new(first, prefix as u8).ok()?;
    (net.network() == first && net.broadcast() == last).then_some(net)
}

pub(super) fn decode_element(fam: Family, set: &Set, bytes: &[u8]) -> Option<Element> {
    let value = |kind: u16| Attributes::find(bytes, kind).and_then(|nested| Attributes::find(nested, 1));
    let first = value(1)?;
    let last = if set.interval { Some(value(10).unwrap_or(first)) } else { None };
    let mut key = decode_values(fam, &set.key, first, last)?;
    if set.interval {
        // Only the part that callers write as a network comes back as one.
        let count = key.len();
        for value in &mut key[..count - 1] {
            if let Value::Net(net) = value
                && net.prefix_len() == net.max_prefix_len()
            {
                *value = net.addr().into();
            }
        }
    }
    let data = match &set.data {
        None => None,
        Some(DataType::Values(types)) => Some(Data::Values(decode_values(fam, types, value(2)?, None)?)),
        Some(DataType::Verdict) => {
            let verdict = Attributes::find(Attributes::find(bytes, 2)?, 2)?;
            let code = i32::from_be_bytes(Attributes::find(verdict, 1)?.try_into().ok()?);
            let chain = || -> Option<Arc<str>> {
                let name = Attributes::find(verdict, 2)?;
                std::str::from_utf8(name.strip_suffix(&[0]).unwrap_or(name)).ok().map(Arc::from)
            };
            Some(Data::Verdict(match code {
                0 => Verdict::Drop,
                1 => Verdict::Accept,
                -3 => Verdict::Jump(chain()?),
                -4 => Verdict::Goto(chain()?),
                -5 => Verdict::Return,
                _ => return None,
            }))
        }
    };
    let comment = Attributes::find(bytes, 6).and_then(|user| match user {
        [0, len, text @ ..] => {
            std::str::from_utf8(text.get(..usize::from(*len))?.strip_suffix(&[0])?).ok().map(Arc::from)
        }
        _ => None,
    });
    Some(Element { key, data, comment })
}

fn encode_verdict(m: &mut Message, verdict: &Verdict) {
    let (code, chain): (i32, Option<&Arc<str>>) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    m.nest(2, |m| {
        m.attribute(1, &code.to_be_bytes());
        if let Some(chain) = chain {
            m.string(2, chain);
        }
    });
}

fn expression(m: &mut Message, name: &str, data: impl FnOnce(&mut Message)) {
    m.nest(1, |m| {
        m.string(1, name);
        m.nest(2, data);
    });
}

/// Number of the 32-bit register that is the `word`th of the register file.
fn register(word: usize) -> u32 {
    8 + word as u32 // NFT_REG32_00
}

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_L4PROTO: u32 = 16;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const VERDICT_REGISTER: u32 = 0;

fn load_meta(m: &mut Message, key: u32, word: usize) {
    expression(m, "meta", |m| {
        m.u32(2, key);
        m.u32(1, register(word));
    });
}

fn set_mark(m: &mut Message, word: usize) {
    expression(m, "meta", |m| {
        m.u32(2, META_MARK);
        m.u32(3, register(word));
    });
}

fn load_payload(m: &mut Message, base: u32, offset: u32, len: u32, word: usize) {
    expression(m, "payload", |m| {
        m.u32(1, register(word));
        m.u32(2, base);
        m.u32(3, offset);
        m.u32(4, len);
    });
}

fn bitwise(m: &mut Message, word: usize, mask: &[u8], xor: &[u8]) {
    expression(m, "bitwise", |m| {
        m.u32(1, register(word));
        m.u32(2, register(word));
        m.u32(3, mask.len() as u32);
        m.u32(6, 0); // NFT_BITWISE_MASK_XOR
        m.nest(4, |m| m.attribute(1, mask));
        m.nest(5, |m| m.attribute(1, xor));
    });
}

fn compare(m: &mut Message, word: usize, op: u32, data: &[u8]) {
    expression(m, "cmp", |m| {
        m.u32(1, register(word));
        m.u32(2, op);
        m.nest(3, |m| m.attribute(1, data));
    });
}

fn lookup(m: &mut Message, set: &str, destination: Option<u32>, invert: bool) {
    expression(m, "lookup", |m| {
        m.string(1, set);
        m.u32(2, register(0));
        if let Some(destination) = destination {
            m.u32(3, destination);
        }
        if invert {
            m.u32(5, 1); // NFT_LOOKUP_F_INV
        }
    });
}

/// Offset of the source or destination address in the network header, and its length.
fn address_place(fam: Family, source: bool) -> (u32, u32) {
    match (fam, source) {
        (Family::Ip, true) => (12, 4),
        (Family::Ip, false) => (16, 4),
        (Family::Ip6, true) => (8, 16),
        (Family::Ip6, false) => (24, 16),
    }
}

/// Loads a field at a word of the register file and answers how many words it takes.
fn load_field(m: &mut Message, fam: Family, field: &Field, word: usize) -> usize {
    match field {
        Field::SourceAddr | Field::DestinationAddr => {
            let (offset, len) = address_place(fam, *field == Field::SourceAddr);
            load_payload(m, 1, offset, len, word);
            len as usize / 4
        }
        Field::Proto => {
            load_meta(m, META_L4PROTO, word);
            1
        }
        Field::DestinationPort => {
            load_payload(m, 2, 2, 2, word);
            1
        }
        Field::Mark { mask } => {
            load_meta(m, META_MARK, word);
            if *mask != u32::MAX {
                bitwise(m, word, &mask.to_ne_bytes(), &[0; 4]);
            }
            1
        }
        Field::Random { modulus } => {
            expression(m, "numgen", |m| {
                m.u32(1, register(word));
                m.u32(2, *modulus);
                m.u32(3, 1); // NFT_NG_RANDOM
                m.u32(4, 0);
            });
            1
        }
    }
}

/// Loads a key from the first register on and answers the word after it.
fn load_key(m: &mut Message, fam: Family, key: &[Field]) -> usize {
    key.iter().fold(0, |word, field| word + load_field(m, fam, field, word))
}

fn encode_statement(m: &mut Message, fam: Family, statement: &Statement) {
    match statement {
        Statement::InputInterface { prefix, negated } => {
            load_meta(m, META_IIFNAME, 0);
            compare(m, 0, if *negated { CMP_NEQ } else { CMP_EQ }, prefix.as_bytes());
        }
        Statement::InNetwork { field, net, negated } => {
            let (offset, len) = address_place(fam, *field == Field::SourceAddr);
            let op = if *negated { CMP_NEQ } else { CMP_EQ };
            let network = key_bytes(&[Value::Net(net.trunc())], End::First);
            let prefix = usize::from(net.prefix_len());
            if prefix > 0 && prefix.is_multiple_of(8) {
                // Whole bytes need no mask; nft writes it the same way.
                load_payload(m, 1, offset, prefix as u32 / 8, 0);
                compare(m, 0, op, &network[..prefix / 8]);
            } else {
                load_payload(m, 1, offset, len, 0);
                let mask: Vec<u8> = (0..len as usize)
                    .map(|byte| {
                        let bits = prefix.saturating_sub(byte * 8).min(8);
                        !(0xffu16 >> bits) as u8
                    })
                    .collect();
                bitwise(m, 0, &mask, &vec![0; len as usize]);
                compare(m, 0, op, &network);
            }
        }
        Statement::SourceIsLocal | Statement::DestinationIsLocal => {
            expression(m, "fib", |m| {
                m.u32(1, register(0));
                m.u32(2, 3); // NFT_FIB_RESULT_ADDRTYPE
                m.u32(3, if *statement == Statement::SourceIsLocal { 1 } else { 2 }); // NFTA_FIB_F_SADDR, _DADDR
            });
            compare(m, 0, CMP_EQ, &2u32.to_ne_bytes()); // RTN_LOCAL
        }
        Statement::IsDestinationTranslated => {
            expression(m, "ct", |m| {
                m.u32(2, 2); // NFT_CT_STATUS
                m.u32(1, register(0));
            });
            bitwise(m, 0, &0x20u32.to_ne_bytes(), &[0; 4]); // IPS_DST_NAT
            compare(m, 0, CMP_NEQ, &[0; 4]);
        }
        Statement::MarkHas { mask } => {
            load_field(m, fam, &Field::Mark { mask: *mask }, 0);
            compare(m, 0, CMP_NEQ, &[0; 4]);
        }
        Statement::InSet { key, set, negated } => {
            load_key(m, fam, key);
            lookup(m, set, None, *negated);
        }
        Statement::VerdictMap { key, map } => {
            load_key(m, fam, key);
            lookup(m, map, Some(VERDICT_REGISTER), false);
        }
        Statement::SetMarkFromMap { key, map } => {
            load_key(m, fam, key);
            lookup(m, map, Some(register(0)), false);
            set_mark(m, 0);
        }
        Statement::ChangeMark { keep, set } => {
            load_meta(m, META_MARK, 0);
            // (mark & mask) ^ xor: bits to be set are cleared first.
            bitwise(m, 0, &(keep & !set).to_ne_bytes(), &set.to_ne_bytes());
            set_mark(m, 0);
        }
        Statement::Update { map, key, data, timeout } => {
            let after = load_key(m, fam, key);
            load_field(m, fam, data, after.next_multiple_of(4));
            let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            dynset(m, map, 1, after.next_multiple_of(4), Some(millis));
        }
        Statement::Forget { map, key, data } => {
            let after = load_key(m, fam, key);
            load_field(m, fam, data, after.next_multiple_of(4));
            dynset(m, map, 2, after.next_multiple_of(4), None);
        }
        Statement::TranslateDestination { key, map } => {
            load_key(m, fam, key);
            lookup(m, map, Some(register(0)), false);
            expression(m, "nat", |m| {
                m.u32(1, 1); // NFT_NAT_DNAT
                m.u32(2, u32::from(family(fam)));
                m.u32(3, register(0));
                m.u32(5, register(field_len(fam, FieldType::Addr) / 4));
            });
        }
        Statement::Masquerade => expression(m, "masq", |m| m.u32(1, 0x10)), // NF_NAT_RANGE_PROTO_RANDOM_FULLY
        Statement::Reject(Rejection::TcpReset) => {
            load_meta(m, META_L4PROTO, 0);
            compare(m, 0, CMP_EQ, &[6]);
            expression(m, "reject", |m| {
                m.u32(1, 1); // NFT_REJECT_TCP_RST
                m.attribute(2, &[0]);
            });
        }
        Statement::Reject(Rejection::PortUnreachable) => expression(m, "reject", |m| {
            m.u32(1, 0); // NFT_REJECT_ICMP_UNREACH
            m.attribute(2, &[if fam == Family::Ip { 3 } else { 4 }]);
        }),
        Statement::Verdict(verdict) => expression(m, "immediate", |m| {
            m.u32(1, VERDICT_REGISTER);
            m.nest(2, |m| encode_verdict(m, verdict));
        }),
    }
}

fn dynset(m: &mut Message, map: &str, op: u32, data_word: usize, timeout_millis: Option<u64>) {
    expression(m, "dynset", |m| {
        m.string(1, map);
        m.u32(3, op);
        m.u32(4, register(0));
        m.u32(5, register(data_word));
        if let Some(millis) = timeout_millis {
            m.attribute(6, &millis.to_be_bytes());
        }
    });
}
