//! The shape of the table: fixed chains, data maps, and one chain per way of picking an endpoint.
//!
//! Rules never name a Service. A frontend's element in a verdict map leads to a *pick chain*, of which there is one per
//! combination of key shape, endpoint set, masquerading, number of endpoints and affinity that is in use: a handful in a
//! cluster of any size. A pick chain looks the endpoint up under the frontend's own key and a random number. So a change of a
//! Service is a change of a few elements, and the kernel has few rules to check at each commit (docs/adr).
//!
//! Marks: bit 14 asks for masquerading and is cleared when that happens. Session affinity uses the whole mark as scratch
//! space between two rules of the first packet of a flow, with bit 15 to say so, and cleans up right after translation;
//! other flows' marks are left alone.

use std::sync::Arc;
use std::time::Duration;

use portolan_nft::{
    Base, ChainType, DataType, Family, Field, FieldType, Hook, Op, Rejection, Set, Statement, Table, Verdict,
};
use portolan_plan::world::{IpFamily, LocalDetection, NodeView};

/// Asks for masquerading; the bit that kube-proxy uses by default, so that other software avoids it already.
pub const MASQUERADE: u32 = 1 << 14;
/// The mark holds an affinity number.
pub const SCRATCH: u32 = 1 << 15;
/// Entries of one node's affinity memory; the oldest expire first.
const AFFINITY_ENTRIES: u32 = 1 << 20;

/// A chain whose existence says which layout a table found at start has. Change the number with the layout.
pub const MARKER: &str = "layout-3";

/// Name of the table in both families.
pub const TABLE: &str = "portolan-services";

/// The sets and maps of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Named as in the table; described in `declare`.
pub enum SetId {
    Frontends,
    NodePorts,
    HostPorts,
    Guarded,
    SourceRanges,
    Inside,
    Outside,
    NodePortsInside,
    NodePortsOutside,
    Slots,
    SlotsOutside,
    NodePortSlots,
    NodePortSlotsOutside,
    HostPortSlots,
    ClusterIps,
    NodePortAddresses,
    Hairpin,
    AffinityServices,
    NodePortAffinityServices,
    AffinitySlots,
    AffinitySlotsOutside,
    NodePortAffinitySlots,
    NodePortAffinitySlotsOutside,
    AffinityLive,
    AffinityLiveLocal,
    Affinity,
}

impl SetId {
    /// Whether the map leads from a drawn number to an endpoint.
    pub fn is_slots(self) -> bool {
        matches!(
            self,
            SetId::Slots
                | SetId::SlotsOutside
                | SetId::NodePortSlots
                | SetId::NodePortSlotsOutside
                | SetId::HostPortSlots
                | SetId::AffinitySlots
                | SetId::AffinitySlotsOutside
                | SetId::NodePortAffinitySlots
                | SetId::NodePortAffinitySlotsOutside
        )
    }
}

impl SetId {
    /// All of them, in the order of declaration.
    pub const ALL: [SetId; 26] = [
        SetId::Frontends,
        SetId::NodePorts,
        SetId::HostPorts,
        SetId::Guarded,
        SetId::SourceRanges,
        SetId::Inside,
        SetId::Outside,
        SetId::NodePortsInside,
        SetId::NodePortsOutside,
        SetId::Slots,
        SetId::SlotsOutside,
        SetId::NodePortSlots,
        SetId::NodePortSlotsOutside,
        SetId::HostPortSlots,
        SetId::ClusterIps,
        SetId::NodePortAddresses,
        SetId::Hairpin,
        SetId::AffinityServices,
        SetId::NodePortAffinityServices,
        SetId::AffinitySlots,
        SetId::AffinitySlotsOutside,
        SetId::NodePortAffinitySlots,
        SetId::NodePortAffinitySlotsOutside,
        SetId::AffinityLive,
        SetId::AffinityLiveLocal,
        SetId::Affinity,
    ];

    /// Name in the kernel.
    pub fn name(self) -> &'static str {
        match self {
            SetId::Frontends => "frontends",
            SetId::NodePorts => "node-ports",
            SetId::HostPorts => "host-ports",
            SetId::Guarded => "guarded",
            SetId::SourceRanges => "source-ranges",
            SetId::Inside => "inside",
            SetId::Outside => "outside",
            SetId::NodePortsInside => "node-ports-inside",
            SetId::NodePortsOutside => "node-ports-outside",
            SetId::Slots => "slots",
            SetId::SlotsOutside => "slots-outside",
            SetId::NodePortSlots => "node-port-slots",
            SetId::NodePortSlotsOutside => "node-port-slots-outside",
            SetId::HostPortSlots => "host-port-slots",
            SetId::ClusterIps => "cluster-ips",
            SetId::NodePortAddresses => "node-port-addresses",
            SetId::Hairpin => "hairpin",
            SetId::AffinityServices => "affinity-services",
            SetId::NodePortAffinityServices => "node-port-affinity-services",
            SetId::AffinitySlots => "affinity-slots",
            SetId::AffinitySlotsOutside => "affinity-slots-outside",
            SetId::NodePortAffinitySlots => "node-port-affinity-slots",
            SetId::NodePortAffinitySlotsOutside => "node-port-affinity-slots-outside",
            SetId::AffinityLive => "affinity-live",
            SetId::AffinityLiveLocal => "affinity-live-local",
            SetId::Affinity => "affinity",
        }
    }

    fn declare(self) -> Set {
        use FieldType::{Addr, Index, Mark, Port, Proto};
        let address = vec![Addr, Proto, Port];
        let node_port = vec![Proto, Port];
        let slot = vec![Addr, Proto, Port, Index];
        let node_port_slot = vec![Proto, Port, Index];
        let endpoint = Some(DataType::Values(vec![Addr, Port]));
        let number = Some(DataType::Values(vec![Mark]));
        let verdict = Some(DataType::Verdict);
        let (key, data) = match self {
            // What an address and port, a node port, or a host port leads to.
            SetId::Frontends => (address, verdict),
            SetId::NodePorts | SetId::HostPorts => (node_port, verdict),
            // Load-balancer addresses whose clients are restricted: to what, once the client is known to be allowed.
            SetId::Guarded => (address, verdict),
            SetId::SourceRanges => (vec![Addr, Proto, Port, Addr], None),
            // External frontends with policy Local: for clients of this node, and for all others.
            SetId::Inside | SetId::Outside => (address, verdict),
            SetId::NodePortsInside | SetId::NodePortsOutside => (node_port, verdict),
            // Endpoints by number.
            SetId::Slots | SetId::SlotsOutside => (slot, endpoint),
            SetId::NodePortSlots | SetId::NodePortSlotsOutside | SetId::HostPortSlots => (node_port_slot, endpoint),
            // Addresses.
            SetId::ClusterIps | SetId::NodePortAddresses => (vec![Addr], None),
            SetId::Hairpin => (vec![Addr, Addr], None),
            // Affinity: the Service port's number, endpoints' numbers by slot, endpoints by number, and the memory.
            SetId::AffinityServices => (address, number),
            SetId::NodePortAffinityServices => (node_port, number),
            SetId::AffinitySlots | SetId::AffinitySlotsOutside => (slot, number),
            SetId::NodePortAffinitySlots | SetId::NodePortAffinitySlotsOutside => (node_port_slot, number),
            SetId::AffinityLive | SetId::AffinityLiveLocal => (vec![Proto, Mark], endpoint),
            SetId::Affinity => (vec![Addr, Mark], number),
        };
        Set {
            name: self.name().into(),
            key,
            data,
            interval: self == SetId::SourceRanges,
            dynamic: (self == SetId::Affinity).then_some(AFFINITY_ENTRIES),
        }
    }
}

/// The declared sets of one family.
#[derive(Clone, Debug)]
pub struct Sets(Vec<Arc<Set>>);

impl Default for Sets {
    fn default() -> Sets {
        Sets(SetId::ALL.iter().map(|id| Arc::new(id.declare())).collect())
    }
}

impl Sets {
    /// The declaration of one set.
    pub fn get(&self, id: SetId) -> &Arc<Set> {
        &self.0[id as usize]
    }
}

/// Which key a lookup uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Destination address, protocol and port.
    Address,
    /// Protocol and port, on any address that carries node ports.
    NodePort,
    /// Protocol and port, on any address of the node.
    HostPort,
}

impl Space {
    fn key(self) -> Vec<Field> {
        match self {
            Space::Address => vec![Field::DestinationAddr, Field::Proto, Field::DestinationPort],
            Space::NodePort | Space::HostPort => vec![Field::Proto, Field::DestinationPort],
        }
    }

    fn key_with(self, field: Field) -> Vec<Field> {
        let mut key = self.key();
        key.push(field);
        key
    }
}

/// Which of the two endpoint sets of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The only one, or the one for clients of this node.
    Inside,
    /// The one for other clients under policy Local.
    Outside,
}

/// Whose source address is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Masquerade {
    /// Nobody's.
    Never,
    /// Everybody's.
    Always,
    /// That of everything but this node's pods.
    UnlessPod,
    /// This node's own.
    IfHost,
}

/// Session affinity of a pick chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PickAffinity {
    /// Timeout in seconds.
    pub timeout_seconds: u32,
    /// Endpoint numbers of a Service port differ in this many low bits.
    pub bits: u8,
    /// Whether only endpoints of this node may be remembered.
    pub local: bool,
}

/// A way of picking one of `n` endpoints; each in use has a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pick {
    /// Key.
    pub space: Space,
    /// Endpoint set.
    pub side: Side,
    /// Masquerading.
    pub masquerade: Masquerade,
    /// Number of endpoints, at least 1.
    pub n: u32,
    /// Session affinity.
    pub affinity: Option<PickAffinity>,
}

impl Pick {
    /// Name of the chain.
    pub fn chain(&self) -> Arc<str> {
        let space = match self.space {
            Space::Address => "address",
            Space::NodePort => "node-port",
            Space::HostPort => "host-port",
        };
        let side = match self.side {
            Side::Inside => "",
            Side::Outside => "-outside",
        };
        let masquerade = match self.masquerade {
            Masquerade::Never => "",
            Masquerade::Always => "-snat",
            Masquerade::UnlessPod => "-snat-unless-pod",
            Masquerade::IfHost => "-snat-if-host",
        };
        let affinity = match self.affinity {
            None => String::new(),
            Some(a) => format!("-affinity-{}s-{}{}", a.timeout_seconds, a.bits, if a.local { "-local" } else { "" }),
        };
        format!("pick-{space}{side}{masquerade}-{}{affinity}", self.n).into()
    }

    /// The slots map that the chain reads.
    pub fn slots(&self) -> SetId {
        if self.space == Space::HostPort {
            // One pod: no second set, no affinity.
            return SetId::HostPortSlots;
        }
        match (self.space, self.side, self.affinity.is_some()) {
            (Space::Address, Side::Inside, false) => SetId::Slots,
            (Space::Address, Side::Outside, false) => SetId::SlotsOutside,
            (_, Side::Inside, false) => SetId::NodePortSlots,
            (_, Side::Outside, false) => SetId::NodePortSlotsOutside,
            (Space::Address, Side::Inside, true) => SetId::AffinitySlots,
            (Space::Address, Side::Outside, true) => SetId::AffinitySlotsOutside,
            (_, Side::Inside, true) => SetId::NodePortAffinitySlots,
            (_, Side::Outside, true) => SetId::NodePortAffinitySlotsOutside,
        }
    }

    fn rules(&self, node: &NodeView, family: IpFamily) -> Vec<Vec<Statement>> {
        let slots: Arc<str> = self.slots().name().into();
        let masquerade = || {
            let condition = match self.masquerade {
                Masquerade::Never => return None,
                Masquerade::Always => Vec::new(),
                Masquerade::UnlessPod => not_from_pod(node, family),
                Masquerade::IfHost => {
                    let mut condition = not_from_pod(node, family);
                    condition.push(Statement::SourceIsLocal);
                    condition
                }
            };
            let mut rule = condition;
            rule.push(Statement::ChangeMark { keep: u32::MAX, set: MASQUERADE });
            Some(rule)
        };
        let mut rules = Vec::new();
        match self.affinity {
            None => {
                rules.extend(masquerade());
                // The second try is for a packet that met an old verdict and new slots while a change was taking effect:
                // slot 0 is always there.
                for modulus in [self.n, 1] {
                    rules.push(vec![Statement::TranslateDestination {
                        key: self.space.key_with(Field::Random { modulus }),
                        map: slots.clone(),
                    }]);
                }
            }
            Some(affinity) => {
                let memory: Arc<str> = SetId::Affinity.name().into();
                let number = Field::Mark { mask: u32::MAX };
                // The Service port's own number: what its endpoints' numbers have in common.
                let client =
                    vec![Field::SourceAddr, Field::Mark { mask: !((1u32 << affinity.bits) - 1) & !MASQUERADE }];
                let timeout = Duration::from_secs(affinity.timeout_seconds.into());
                let services = match self.space {
                    Space::Address => SetId::AffinityServices,
                    Space::NodePort | Space::HostPort => SetId::NodePortAffinityServices,
                };
                let live = if affinity.local { SetId::AffinityLiveLocal } else { SetId::AffinityLive };
                let translate = || {
                    vec![Statement::TranslateDestination {
                        key: vec![Field::Proto, Field::Mark { mask: !MASQUERADE }],
                        map: live.name().into(),
                    }]
                };
                rules.push(vec![Statement::SetMarkFromMap { key: self.space.key(), map: services.name().into() }]);
                // A known client: its endpoint's number, and the timeout starts again. A number of an endpoint that is gone
                // is not among the live ones and falls through to a fresh choice.
                rules.push(vec![
                    Statement::SetMarkFromMap { key: client.clone(), map: memory.clone() },
                    Statement::Update { map: memory.clone(), key: client.clone(), data: number, timeout },
                ]);
                rules.extend(masquerade());
                rules.push(translate());
                for modulus in [self.n, 1] {
                    rules.push(vec![
                        Statement::SetMarkFromMap {
                            key: self.space.key_with(Field::Random { modulus }),
                            map: slots.clone(),
                        },
                        Statement::Forget { map: memory.clone(), key: client.clone(), data: number },
                        Statement::Update { map: memory.clone(), key: client.clone(), data: number, timeout },
                    ]);
                    rules.extend(masquerade());
                    rules.push(translate());
                }
            }
        }
        rules.push(vec![Statement::Verdict(Verdict::Drop)]);
        rules
    }

    /// Makes the chain, or makes it as it should be.
    pub fn ops(&self, node: &NodeView, family: IpFamily) -> Vec<Op> {
        chain_ops(&self.chain(), None, self.rules(node, family))
    }
}

fn chain_ops(name: &Arc<str>, base: Option<Base>, rules: Vec<Vec<Statement>>) -> Vec<Op> {
    let mut ops = vec![Op::AddChain { name: name.clone(), base }, Op::FlushChain { name: name.clone() }];
    ops.extend(rules.into_iter().map(|statements| Op::AddRule { chain: name.clone(), statements }));
    ops
}

/// Conditions that together say: not from a pod of this node.
fn not_from_pod(node: &NodeView, family: IpFamily) -> Vec<Statement> {
    match &node.local_detection {
        LocalDetection::Off => Vec::new(),
        LocalDetection::InterfacePrefix(prefix) => {
            vec![Statement::InputInterface { prefix: prefix.clone(), negated: true }]
        }
        LocalDetection::Networks(nets) => nets
            .iter()
            .filter(|n| IpFamily::of_net(n) == family)
            .map(|net| Statement::InNetwork { field: Field::SourceAddr, net: *net, negated: true })
            .collect(),
    }
}

/// Alternatives that each say: from a pod of this node.
fn from_pod(node: &NodeView, family: IpFamily) -> Vec<Statement> {
    match &node.local_detection {
        LocalDetection::Off => Vec::new(),
        LocalDetection::InterfacePrefix(prefix) => {
            vec![Statement::InputInterface { prefix: prefix.clone(), negated: false }]
        }
        LocalDetection::Networks(nets) => nets
            .iter()
            .filter(|n| IpFamily::of_net(n) == family)
            .map(|net| Statement::InNetwork { field: Field::SourceAddr, net: *net, negated: false })
            .collect(),
    }
}

/// Whether pods of this node can be recognised in a family.
pub fn pods_known(node: &NodeView, family: IpFamily) -> bool {
    !from_pod(node, family).is_empty()
}

/// Whether a chain's name is one that [`Pick::chain`] gives.
pub fn is_pick_chain(name: &str) -> bool {
    name.starts_with("pick-")
}

/// The table of a family.
pub fn table(family: IpFamily) -> Table {
    Table {
        family: match family {
            IpFamily::V4 => Family::Ip,
            IpFamily::V6 => Family::Ip6,
        },
        name: TABLE.into(),
    }
}

/// Chain that refuses. Not `reject`: that is a word of nft's grammar, and a listing with it could not be loaded again.
pub const REJECT: &str = "refuse";
/// Chain for external frontends with policy Local.
pub const LOCAL_POLICY: &str = "local-policy";
/// The same for node ports.
pub const NODE_PORT_LOCAL_POLICY: &str = "node-port-local-policy";
/// Chain for load-balancer addresses with restricted clients.
pub const GUARD: &str = "guard";
/// Chain that is silent about addresses of the service ranges without a Service.
pub const UNALLOCATED: &str = "unallocated";

/// Names of the chains that exist in every table.
pub const FIXED_CHAINS: [&str; 12] = [
    MARKER,
    REJECT,
    LOCAL_POLICY,
    NODE_PORT_LOCAL_POLICY,
    GUARD,
    UNALLOCATED,
    "services",
    "prerouting",
    "output",
    "postrouting",
    "prerouting-cleanup",
    "output-cleanup",
];

fn loopback(family: IpFamily) -> ipnet::IpNet {
    match family {
        IpFamily::V4 => ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8).into(),
        IpFamily::V6 => ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128).into(),
    }
}

/// Makes the table with its sets and fixed chains, or makes those as they should be. Elements stay.
pub fn fixed_ops(node: &NodeView, family: IpFamily, sets: &Sets) -> Vec<Op> {
    let goto = |chain: &str| Statement::Verdict(Verdict::Goto(chain.into()));
    let vmap = |space: Space, id: SetId| Statement::VerdictMap { key: space.key(), map: id.name().into() };
    let mut ops = vec![Op::AddTable];
    ops.extend(SetId::ALL.iter().map(|id| Op::AddSet(sets.get(*id).clone())));
    // Chains exist before anything leads to them.
    for name in [MARKER, REJECT, LOCAL_POLICY, NODE_PORT_LOCAL_POLICY, GUARD, UNALLOCATED, "services"] {
        ops.push(Op::AddChain { name: name.into(), base: None });
    }
    let mut chain = |name: &str, base: Option<Base>, rules: Vec<Vec<Statement>>| {
        ops.extend(chain_ops(&name.into(), base, rules));
    };

    chain(
        REJECT,
        None,
        vec![vec![Statement::Reject(Rejection::TcpReset)], vec![Statement::Reject(Rejection::PortUnreachable)]],
    );
    for (name, space, inside, outside) in [
        (LOCAL_POLICY, Space::Address, SetId::Inside, SetId::Outside),
        (NODE_PORT_LOCAL_POLICY, Space::NodePort, SetId::NodePortsInside, SetId::NodePortsOutside),
    ] {
        let mut rules: Vec<Vec<Statement>> =
            from_pod(node, family).into_iter().map(|pod| vec![pod, vmap(space, inside)]).collect();
        rules.push(vec![Statement::SourceIsLocal, vmap(space, inside)]);
        rules.push(vec![vmap(space, outside)]);
        rules.push(vec![Statement::Verdict(Verdict::Drop)]);
        chain(name, None, rules);
    }
    chain(
        GUARD,
        None,
        vec![
            vec![
                Statement::InSet {
                    key: Space::Address.key_with(Field::SourceAddr),
                    set: SetId::SourceRanges.name().into(),
                    negated: true,
                },
                Statement::Verdict(Verdict::Drop),
            ],
            vec![vmap(Space::Address, SetId::Guarded)],
            vec![Statement::Verdict(Verdict::Drop)],
        ],
    );
    chain(
        "services",
        None,
        vec![
            vec![vmap(Space::Address, SetId::Frontends)],
            vec![
                Statement::InSet {
                    key: vec![Field::DestinationAddr],
                    set: SetId::NodePortAddresses.name().into(),
                    negated: false,
                },
                vmap(Space::NodePort, SetId::NodePorts),
            ],
            vec![
                Statement::InNetwork { field: Field::DestinationAddr, net: loopback(family), negated: true },
                Statement::DestinationIsLocal,
                vmap(Space::HostPort, SetId::HostPorts),
            ],
            vec![
                Statement::InSet {
                    key: vec![Field::DestinationAddr],
                    set: SetId::ClusterIps.name().into(),
                    negated: false,
                },
                goto(REJECT),
            ],
            vec![goto(UNALLOCATED)],
        ],
    );
    let nat = |hook, priority| Some(Base { chain_type: ChainType::Nat, hook, priority });
    let filter = |hook, priority| Some(Base { chain_type: ChainType::Filter, hook, priority });
    let services = || vec![vec![Statement::Verdict(Verdict::Jump("services".into()))]];
    // Priorities: the kernel's own for destination and source translation (NF_IP_PRI_NAT_DST, NF_IP_PRI_NAT_SRC).
    chain("prerouting", nat(Hook::Prerouting, -100), services());
    chain("output", nat(Hook::Output, -100), services());
    let cleanup =
        || vec![vec![Statement::MarkHas { mask: SCRATCH }, Statement::ChangeMark { keep: MASQUERADE, set: 0 }]];
    chain("prerouting-cleanup", filter(Hook::Prerouting, -99), cleanup());
    chain("output-cleanup", filter(Hook::Output, -99), cleanup());
    chain(
        "postrouting",
        nat(Hook::Postrouting, 100),
        vec![
            vec![
                Statement::MarkHas { mask: MASQUERADE },
                Statement::ChangeMark { keep: !MASQUERADE, set: 0 },
                Statement::Masquerade,
            ],
            vec![
                Statement::IsDestinationTranslated,
                Statement::InSet {
                    key: vec![Field::SourceAddr, Field::DestinationAddr],
                    set: SetId::Hairpin.name().into(),
                    negated: false,
                },
                Statement::Masquerade,
            ],
        ],
    );
    ops
}

/// Makes the chain of the service ranges as it should be.
pub fn unallocated_ops(ranges: &[ipnet::IpNet]) -> Vec<Op> {
    let rules = ranges
        .iter()
        .map(|net| {
            vec![
                Statement::InNetwork { field: Field::DestinationAddr, net: *net, negated: false },
                Statement::Verdict(Verdict::Drop),
            ]
        })
        .collect();
    chain_ops(&UNALLOCATED.into(), None, rules)
}
