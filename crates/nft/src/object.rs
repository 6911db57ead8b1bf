//! Tables, chains, sets, elements, rules and the operations on them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

/// Family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

/// A table's family and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// Family.
    pub family: Family,
    /// Name.
    pub name: Arc<str>,
}

/// Type of one part of a key or of a map's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FieldType {
    /// An address of the table's family.
    Addr,
    /// A transport protocol number.
    Proto,
    /// A transport port.
    Port,
    /// A packet mark.
    Mark,
    /// A number as [`Field::Random`] makes it.
    Index,
}

/// A value of one [`FieldType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// IPv4 address.
    V4(Ipv4Addr),
    /// IPv6 address.
    V6(Ipv6Addr),
    /// A network, in keys of interval sets.
    Net(IpNet),
    /// Protocol number.
    Proto(u8),
    /// Port.
    Port(u16),
    /// Mark.
    Mark(u32),
    /// Index.
    Index(u32),
}

impl From<IpAddr> for Value {
    fn from(addr: IpAddr) -> Value {
        match addr {
            IpAddr::V4(v4) => Value::V4(v4),
            IpAddr::V6(v6) => Value::V6(v6),
        }
    }
}

/// The decision of a rule or of a verdict map's element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Lets the packet pass this hook's chain.
    Accept,
    /// Discards the packet.
    Drop,
    /// Back to the calling chain.
    Return,
    /// To another chain, and back after its end.
    Jump(Arc<str>),
    /// To another chain, not back.
    Goto(Arc<str>),
}

/// What the elements of a map hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataType {
    /// A verdict.
    Verdict,
    /// Values side by side.
    Values(Vec<FieldType>),
}

/// A set, or a map when it has data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Name.
    pub name: Arc<str>,
    /// Types of the key's parts.
    pub key: Vec<FieldType>,
    /// Types of the data; `None` for a set.
    pub data: Option<DataType>,
    /// Whether keys may contain networks.
    pub interval: bool,
    /// Whether rules add elements that time out, and how many at most.
    pub dynamic: Option<u32>,
}

/// Data of an element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// A verdict.
    Verdict(Verdict),
    /// Values side by side.
    Values(Vec<Value>),
}

/// An element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// Key.
    pub key: Vec<Value>,
    /// Data; `None` in a set.
    pub data: Option<Data>,
    /// What it is there for, for people who list the table. At most 128 bytes are kept.
    pub comment: Option<Arc<str>>,
}

impl Element {
    /// An element of a set.
    pub fn key(key: Vec<Value>) -> Element {
        Element { key, data: None, comment: None }
    }

    /// An element of a map.
    pub fn new(key: Vec<Value>, data: Data) -> Element {
        Element { key, data: Some(data), comment: None }
    }
}

/// A value that a rule takes from the packet, its state or a generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Source address.
    SourceAddr,
    /// Destination address.
    DestinationAddr,
    /// Transport protocol.
    Proto,
    /// Destination port.
    DestinationPort,
    /// Packet mark, with some bits cleared: `u32::MAX` for all of it.
    Mark {
        /// Bits that are kept.
        mask: u32,
    },
    /// A random number below `modulus`, new at each evaluation.
    Random {
        /// Exclusive upper bound, at least 1.
        modulus: u32,
    },
}

/// What a rejected sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// ICMP or ICMPv6 port unreachable.
    PortUnreachable,
    /// A TCP reset; the rule applies to TCP only.
    TcpReset,
}

/// One step of a rule. A step that does not hold ends the rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// Holds when the name of the incoming interface starts with `prefix`, or does not when `negated`. A packet of the host
    /// itself has an empty name.
    InputInterface {
        /// Start of the name.
        prefix: String,
        /// Turn the answer round.
        negated: bool,
    },
    /// Holds when an address is in a network.
    InNetwork {
        /// [`Field::SourceAddr`] or [`Field::DestinationAddr`].
        field: Field,
        /// Network of the table's family.
        net: IpNet,
        /// Turn the answer round.
        negated: bool,
    },
    /// Holds when the source address belongs to this host.
    SourceIsLocal,
    /// Holds when the destination address belongs to this host.
    DestinationIsLocal,
    /// Holds when the flow's destination was translated.
    IsDestinationTranslated,
    /// Holds when some bit of the mask is set.
    MarkHas {
        /// Bits.
        mask: u32,
    },
    /// Holds when the key is in the set, or is not when `negated`.
    InSet {
        /// Key.
        key: Vec<Field>,
        /// Set.
        set: Arc<str>,
        /// Turn the answer round.
        negated: bool,
    },
    /// Takes the verdict that the map has for the key; does not hold without one.
    VerdictMap {
        /// Key.
        key: Vec<Field>,
        /// Map.
        map: Arc<str>,
    },
    /// Sets the packet mark to what the map has for the key; does not hold without.
    SetMarkFromMap {
        /// Key.
        key: Vec<Field>,
        /// Map.
        map: Arc<str>,
    },
    /// Clears the bits outside `keep` and sets those of `set`.
    ChangeMark {
        /// Bits that stay.
        keep: u32,
        /// Bits that are set.
        set: u32,
    },
    /// Adds an element, or starts the timeout of the one with this key again (its data stays).
    Update {
        /// Dynamic map.
        map: Arc<str>,
        /// Key.
        key: Vec<Field>,
        /// Data.
        data: Field,
        /// From now.
        timeout: Duration,
    },
    /// Removes the element with this key.
    Forget {
        /// Dynamic map.
        map: Arc<str>,
        /// Key.
        key: Vec<Field>,
        /// The data field, which text needs and the kernel ignores.
        data: Field,
    },
    /// Translates the destination to the address and port that the map has for the key; does not hold without.
    TranslateDestination {
        /// Key.
        key: Vec<Field>,
        /// Map to address and port.
        map: Arc<str>,
    },
    /// Translates the source to the outgoing interface's address and a random free port.
    Masquerade,
    /// Discards the packet and tells the sender.
    Reject(Rejection),
    /// A verdict.
    Verdict(Verdict),
}

/// Where in the packet path a base chain is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// For this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainType {
    /// Sees every packet.
    Filter,
    /// Sees the first packet of each flow and may translate.
    Nat,
}

/// What makes a chain a base chain. Its policy is to accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Type.
    pub chain_type: ChainType,
    /// Hook.
    pub hook: Hook,
    /// Order among the chains of the hook, lower first.
    pub priority: i32,
}

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Makes the table unless it exists.
    AddTable,
    /// Removes the table with all that is in it; fails when it does not exist.
    DeleteTable,
    /// Makes a chain unless it exists.
    AddChain {
        /// Name.
        name: Arc<str>,
        /// Makes it a base chain.
        base: Option<Base>,
    },
    /// Removes the rules of a chain.
    FlushChain {
        /// Name.
        name: Arc<str>,
    },
    /// Removes an empty chain that nothing refers to.
    DeleteChain {
        /// Name.
        name: Arc<str>,
    },
    /// Appends a rule to a chain.
    AddRule {
        /// Chain.
        chain: Arc<str>,
        /// The rule.
        statements: Vec<Statement>,
    },
    /// Makes a set or map unless it exists.
    AddSet(Arc<Set>),
    /// Adds elements. One that exists with the same data is no error; with other data it is.
    AddElements {
        /// The set or map.
        set: Arc<Set>,
        /// Elements.
        elements: Vec<Element>,
    },
    /// Removes elements; it is an error if one does not exist.
    DeleteElements {
        /// The set or map.
        set: Arc<Set>,
        /// Elements; only keys count.
        elements: Vec<Element>,
    },
    /// Removes all elements.
    FlushSet {
        /// The set or map.
        set: Arc<Set>,
    },
}

/// Steps on one table that take effect together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// The table.
    pub table: Table,
    /// Steps, in order.
    pub ops: Vec<Op>,
}

impl Transaction {
    /// An empty transaction.
    pub fn new(table: Table) -> Transaction {
        Transaction { table, ops: Vec::new() }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}
