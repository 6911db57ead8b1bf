//! The nf_tables rules of the local provider, as values.
//!
//! One table per family holds everything. Listeners are elements of maps, so that a change of targets touches elements only;
//! rules are written once. For each number of targets there is one chain that picks among so many at random.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use portolan_nft::{
    Base, ChainType, Data, DataType, Element, Family, Field, FieldType, Hook, Op, Rejection, Set, Statement, Table,
    Transaction, Value, Verdict,
};
use portolan_plan::announce::Listener;

/// Name of the tables.
const TABLE: &str = "portolan-lb";
/// Priority of destination translation (NF_IP_PRI_NAT_DST).
const DSTNAT: i32 = -100;
/// Priority of source translation (NF_IP_PRI_NAT_SRC).
const SRCNAT: i32 = 100;
/// Priority of filters.
const FILTER: i32 = 0;

/// The sets and maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum SetId {
    /// Listeners whose clients are limited.
    Guarded,
    /// Which clients those have.
    Allowed,
    /// Listener to the chain that picks a target.
    Listeners,
    /// Listener and number to target.
    Targets,
    /// Pairs of a target with itself: connections to itself through the load balancer.
    Hairpin,
    /// Addresses and protocols that are refused when no listener took the packet.
    Refused,
}

const SETS: [SetId; 6] =
    [SetId::Guarded, SetId::Allowed, SetId::Listeners, SetId::Targets, SetId::Hairpin, SetId::Refused];

impl SetId {
    fn name(self) -> &'static str {
        match self {
            SetId::Guarded => "guarded",
            SetId::Allowed => "allowed",
            SetId::Listeners => "listeners",
            SetId::Targets => "targets",
            SetId::Hairpin => "hairpin",
            SetId::Refused => "refused",
        }
    }

    fn set(self) -> Arc<Set> {
        use FieldType::{Addr, Index, Port, Proto};
        let listener = vec![Addr, Proto, Port];
        let (key, data) = match self {
            SetId::Guarded => (listener, None),
            SetId::Allowed => (vec![Addr, Proto, Port, Addr], None),
            SetId::Listeners => (listener, Some(DataType::Verdict)),
            SetId::Targets => (vec![Addr, Proto, Port, Index], Some(DataType::Values(vec![Addr, Port]))),
            SetId::Hairpin => (vec![Addr, Addr], None),
            SetId::Refused => (vec![Addr, Proto], Some(DataType::Verdict)),
        };
        Arc::new(Set { name: self.name().into(), key, data, interval: self == SetId::Allowed, dynamic: None })
    }
}

fn spread(targets: u32) -> Arc<str> {
    format!("spread-{targets}").into()
}

/// What one table holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    elements: BTreeMap<SetId, BTreeSet<Element>>,
    /// Numbers of targets that have a chain.
    spreads: BTreeSet<u32>,
}

impl Ruleset {
    /// The rules for the listeners of one family.
    pub fn compile<'a>(family: Family, listeners: impl IntoIterator<Item = &'a Listener>) -> Ruleset {
        let mut rules = Ruleset::default();
        let of_family = |address: &IpAddr| address.is_ipv6() == (family == Family::Ip6);
        for listener in listeners.into_iter().filter(|l| of_family(&l.address)) {
            let protocol = listener.protocol.number();
            let key = vec![Value::from(listener.address), Value::Proto(protocol), Value::Port(listener.port)];
            // TCP and UDP are the protocols that a rejection can be spelled for; an SCTP client sees the host refuse.
            if let Some(chain) = match protocol {
                6 => Some("reject-tcp"),
                17 => Some("reject"),
                _ => None,
            } {
                rules.add(SetId::Refused, key[..2].to_vec(), Some(Data::Verdict(Verdict::Goto(chain.into()))));
            }
            if let Some(allowed) = &listener.allowed {
                rules.add(SetId::Guarded, key.clone(), None);
                for net in allowed {
                    rules.add(SetId::Allowed, [&key[..], &[Value::Net(*net)]].concat(), None);
                }
            }
            let Some(count) = u32::try_from(listener.targets.len()).ok().filter(|n| *n > 0) else { continue };
            rules.spreads.insert(count);
            rules.add(SetId::Listeners, key.clone(), Some(Data::Verdict(Verdict::Goto(spread(count)))));
            for (i, (address, port)) in (0u32..).zip(&listener.targets) {
                let data = Data::Values(vec![Value::from(*address), Value::Port(*port)]);
                rules.add(SetId::Targets, [&key[..], &[Value::Index(i)]].concat(), Some(data));
                rules.add(SetId::Hairpin, vec![Value::from(*address); 2], None);
            }
        }
        rules
    }

    fn add(&mut self, set: SetId, key: Vec<Value>, data: Option<Data>) {
        self.elements.entry(set).or_default().insert(Element { key, data, comment: None });
    }

    fn of(&self, set: SetId) -> impl Iterator<Item = &Element> {
        self.elements.get(&set).into_iter().flatten()
    }

    /// Whether there is nothing to hold.
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }
}

fn table(family: Family) -> Table {
    Table { family, name: TABLE.into() }
}

fn listener_key() -> Vec<Field> {
    vec![Field::DestinationAddr, Field::Proto, Field::DestinationPort]
}

/// Makes the table anew, whatever was there before. One transaction: traffic sees the old table or the new one.
pub fn install(family: Family, rules: &Ruleset) -> Transaction {
    let mut t = Transaction::new(table(family));
    // Adding first makes sure that deleting finds something.
    t.ops.extend([Op::AddTable, Op::DeleteTable, Op::AddTable]);
    t.ops.extend(SETS.map(|id| Op::AddSet(id.set())));
    let base = |chain_type, hook, priority| Some(Base { chain_type, hook, priority });
    let chains = [
        ("services", None),
        ("reject-tcp", None),
        ("reject", None),
        ("prerouting", base(ChainType::Nat, Hook::Prerouting, DSTNAT)),
        ("output", base(ChainType::Nat, Hook::Output, DSTNAT)),
        ("postrouting", base(ChainType::Nat, Hook::Postrouting, SRCNAT)),
        ("input", base(ChainType::Filter, Hook::Input, FILTER)),
    ];
    t.ops.extend(chains.map(|(name, base)| Op::AddChain { name: name.into(), base }));
    let in_set = |key, set: SetId, negated| Statement::InSet { key, set: set.name().into(), negated };
    let source = [listener_key(), vec![Field::SourceAddr]].concat();
    let jump = || vec![Statement::Verdict(Verdict::Jump("services".into()))];
    let rule = [
        // Only the first packet of a flow comes here, so a change of ranges does not cut what is established.
        (
            "services",
            vec![
                in_set(listener_key(), SetId::Guarded, false),
                in_set(source, SetId::Allowed, true),
                Statement::Verdict(Verdict::Drop),
            ],
        ),
        ("services", vec![Statement::VerdictMap { key: listener_key(), map: SetId::Listeners.name().into() }]),
        ("prerouting", jump()),
        ("output", jump()),
        // Without this the target would answer itself directly, past the translation.
        (
            "postrouting",
            vec![
                Statement::IsDestinationTranslated,
                in_set(vec![Field::SourceAddr, Field::DestinationAddr], SetId::Hairpin, false),
                Statement::Masquerade,
            ],
        ),
        // Answers to connections that this host made to a load balancer come back to the balancer's address.
        ("input", vec![Statement::IsDestinationTranslated, Statement::Verdict(Verdict::Accept)]),
        // What else has the load balancer's address as its destination here found no listener or no target.
        (
            "input",
            vec![Statement::VerdictMap {
                key: vec![Field::DestinationAddr, Field::Proto],
                map: SetId::Refused.name().into(),
            }],
        ),
        ("reject-tcp", vec![Statement::Reject(Rejection::TcpReset)]),
        ("reject", vec![Statement::Reject(Rejection::PortUnreachable)]),
    ];
    t.ops.extend(rule.map(|(chain, statements)| Op::AddRule { chain: chain.into(), statements }));
    t.ops.extend(rules.spreads.iter().flat_map(|n| spread_chain(*n)));
    for id in SETS {
        let elements: Vec<Element> = rules.of(id).cloned().collect();
        if !elements.is_empty() {
            t.ops.push(Op::AddElements { set: id.set(), elements });
        }
    }
    t
}

fn spread_chain(count: u32) -> [Op; 2] {
    let key = [listener_key(), vec![Field::Random { modulus: count }]].concat();
    let pick = Statement::TranslateDestination { key, map: SetId::Targets.name().into() };
    [Op::AddChain { name: spread(count), base: None }, Op::AddRule { chain: spread(count), statements: vec![pick] }]
}

/// Turns what the table holds from `old` into `new`. Chains for numbers of targets stay once made.
pub fn change(family: Family, old: &Ruleset, new: &mut Ruleset) -> Transaction {
    let mut t = Transaction::new(table(family));
    t.ops.extend(new.spreads.difference(&old.spreads).flat_map(|n| spread_chain(*n)));
    new.spreads.extend(&old.spreads);
    let differs = |a: &Ruleset, b: &Ruleset, id| -> Vec<Element> {
        a.of(id).filter(|e| !b.elements.get(&id).is_some_and(|s| s.contains(e))).cloned().collect()
    };
    // Elements that only change their data are removed and added within the transaction.
    for id in SETS {
        let elements = differs(old, new, id);
        if !elements.is_empty() {
            t.ops.push(Op::DeleteElements { set: id.set(), elements });
        }
    }
    for id in SETS {
        let elements = differs(new, old, id);
        if !elements.is_empty() {
            t.ops.push(Op::AddElements { set: id.set(), elements });
        }
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_nft::{Executor, Fake};
    use portolan_plan::announce::Protocol;

    fn listener(port: u16, targets: &[&str], allowed: Option<&[&str]>) -> Listener {
        Listener {
            address: "192.168.70.1".parse().unwrap(),
            protocol: if port == 53 { Protocol::Udp } else { Protocol::Tcp },
            port,
            targets: targets.iter().map(|t| (t.parse().unwrap(), 8080)).collect(),
            allowed: allowed.map(|nets| nets.iter().map(|n| n.parse().unwrap()).collect()),
        }
    }

    /// The elements of every set that the fake kernel holds.
    fn held(fake: &mut Fake) -> BTreeMap<SetId, BTreeSet<Element>> {
        let sets =
            SETS.map(|id| (id, fake.elements(&table(Family::Ip), &id.set()).unwrap().unwrap().into_iter().collect()));
        sets.into_iter().filter(|(_, e): &(_, BTreeSet<_>)| !e.is_empty()).collect()
    }

    #[test]
    fn changes_lead_to_what_a_fresh_table_has() {
        let states: Vec<Vec<Listener>> = vec![
            vec![],
            vec![listener(80, &["10.0.0.1"], None)],
            vec![listener(80, &["10.0.0.1", "10.0.0.2"], None), listener(53, &[], None)],
            vec![
                listener(80, &["10.0.0.2"], Some(&["198.51.100.0/24", "203.0.113.7/32"])),
                listener(53, &["10.0.0.9"], None),
            ],
            vec![listener(80, &[], Some(&["203.0.113.7/32"]))],
            vec![],
        ];
        for (i, from) in states.iter().enumerate() {
            for (j, to) in states.iter().enumerate() {
                let mut fake = Fake::default();
                let old = Ruleset::compile(Family::Ip, from);
                fake.commit(&install(Family::Ip, &old)).unwrap();
                let mut new = Ruleset::compile(Family::Ip, to);
                let transaction = change(Family::Ip, &old, &mut new);
                assert_eq!(transaction.is_empty(), from == to, "{i} {j}");
                fake.commit(&transaction).unwrap();
                assert_eq!(held(&mut fake), Ruleset::compile(Family::Ip, to).elements, "{i} {j}");
                // Installing over what is there gives the same.
                fake.commit(&install(Family::Ip, &new)).unwrap();
                assert_eq!(held(&mut fake), new.elements, "{i} {j}");
            }
        }
    }
}
