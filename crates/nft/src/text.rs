//! nft syntax: prints transactions, and applies them with the `nft` program.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::object::*;
use crate::{Error, Executor};

/// Prints a transaction as a script for `nft -f`.
pub fn script(transaction: &Transaction) -> String {
    let printer = Printer { table: &transaction.table };
    let mut out = String::new();
    for op in &transaction.ops {
        printer.op(&mut out, op);
    }
    out
}

/// Prints one rule without its chain.
pub fn rule(family: Family, statements: &[Statement]) -> String {
    let table = Table { family, name: "".into() };
    let mut out = String::new();
    Printer { table: &table }.statements(&mut out, statements);
    out
}

struct Printer<'a> {
    table: &'a Table,
}

impl Printer<'_> {
    fn ip(&self) -> &'static str {
        match self.table.family {
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
        }
    }

    fn op(&self, out: &mut String, op: &Op) {
        let table = format!("{} {}", self.ip(), self.table.name);
        match op {
            Op::AddTable => {
                let _ = writeln!(out, "add table {table}");
            }
            Op::DeleteTable => {
                let _ = writeln!(out, "delete table {table}");
            }
            Op::AddChain { name, base: None } => {
                let _ = writeln!(out, "add chain {table} {name}");
            }
            Op::AddChain { name, base: Some(base) } => {
                let kind = match base.chain_type {
                    ChainType::Filter => "filter",
                    ChainType::Nat => "nat",
                };
                let hook = match base.hook {
                    Hook::Prerouting => "prerouting",
                    Hook::Input => "input",
                    Hook::Forward => "forward",
                    Hook::Output => "output",
                    Hook::Postrouting => "postrouting",
                };
                let _ = writeln!(
                    out,
                    "add chain {table} {name} {{ type {kind} hook {hook} priority {}; policy accept; }}",
                    base.priority
                );
            }
            Op::FlushChain { name } => {
                let _ = writeln!(out, "flush chain {table} {name}");
            }
            Op::DeleteChain { name } => {
                let _ = writeln!(out, "delete chain {table} {name}");
            }
            Op::AddRule { chain, statements } => {
                let _ = write!(out, "add rule {table} {chain} ");
                self.statements(out, statements);
                out.push('\n');
            }
            Op::AddSet(set) => self.set(out, &table, set),
            Op::AddElements { set, elements } => self.elements(out, "add", &table, set, elements, true),
            Op::DeleteElements { set, elements } => self.elements(out, "delete", &table, set, elements, false),
            Op::FlushSet { set } => {
                let _ = writeln!(out, "flush {} {table} {}", kind(set), set.name);
            }
        }
    }

    fn set(&self, out: &mut String, table: &str, set: &Set) {
        // Numbers from generators have no type name; such sets are declared by example.
        let by_example = set.key.contains(&FieldType::Index);
        let types = |fields: &[FieldType]| {
            let names: Vec<&str> = fields.iter().map(|f| self.type_name(*f, by_example)).collect();
            names.join(" . ")
        };
        let _ =
            write!(out, "add {} {table} {} {{ {} ", kind(set), set.name, if by_example { "typeof" } else { "type" });
        out.push_str(&types(&set.key));
        match &set.data {
            None => {}
            Some(DataType::Verdict) => out.push_str(" : verdict"),
            Some(DataType::Values(fields)) => {
                out.push_str(" : ");
                out.push_str(&types(fields));
            }
        }
        out.push_str("; ");
        if set.interval {
            out.push_str("flags interval; ");
        }
        if let Some(size) = set.dynamic {
            let _ = write!(out, "flags dynamic,timeout; size {size}; ");
        }
        out.push_str("}\n");
    }

    fn type_name(&self, field: FieldType, by_example: bool) -> &'static str {
        match (field, by_example, self.table.family) {
            (FieldType::Addr, false, Family::Ip) => "ipv4_addr",
            (FieldType::Addr, false, Family::Ip6) => "ipv6_addr",
            (FieldType::Addr, true, Family::Ip) => "ip daddr",
            (FieldType::Addr, true, Family::Ip6) => "ip6 daddr",
            (FieldType::Proto, false, _) => "inet_proto",
            (FieldType::Proto, true, _) => "meta l4proto",
            (FieldType::Port, false, _) => "inet_service",
            (FieldType::Port, true, _) => "th dport",
            (FieldType::Mark, false, _) => "mark",
            (FieldType::Mark, true, _) => "meta mark",
            (FieldType::Index, _, _) => "numgen random mod 65536",
        }
    }

    fn elements(&self, out: &mut String, verb: &str, table: &str, set: &Set, elements: &[Element], with_data: bool) {
        if elements.is_empty() {
            return;
        }
        let _ = write!(out, "{verb} element {table} {} {{ ", set.name);
        for (i, element) in elements.iter().enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            values(out, &element.key);
            if let Some(comment) = element.comment.as_deref().filter(|_| with_data) {
                let _ = write!(out, " comment \"{}\"", shorten_comment(comment));
            }
            match element.data.as_ref().filter(|_| with_data) {
                None => {}
                Some(Data::Verdict(v)) => {
                    out.push_str(" : ");
                    verdict(out, v);
                }
                Some(Data::Values(v)) => {
                    out.push_str(" : ");
                    values(out, v);
                }
            }
        }
        out.push_str(" }\n");
    }

    fn statements(&self, out: &mut String, statements: &[Statement]) {
        for (i, statement) in statements.iter().enumerate() {
            if i > 0 {
                out.push(' ');
            }
            self.statement(out, statement);
        }
    }

    fn statement(&self, out: &mut String, statement: &Statement) {
        let ne = |negated: bool| if negated { "!= " } else { "" };
        let _ = match statement {
            Statement::InputInterface { prefix, negated } => write!(out, "iifname {}\"{prefix}*\"", ne(*negated)),
            Statement::InNetwork { field, net, negated } => write!(out, "{} {}{net}", self.field(field), ne(*negated)),
            Statement::SourceIsLocal => write!(out, "fib saddr type local"),
            Statement::DestinationIsLocal => write!(out, "fib daddr type local"),
            Statement::IsDestinationTranslated => write!(out, "ct status dnat"),
            Statement::MarkHas { mask } => write!(out, "meta mark & {mask:#x} != 0"),
            Statement::InSet { key, set, negated } => write!(out, "{} {}@{set}", self.key(key), ne(*negated)),
            Statement::VerdictMap { key, map } => write!(out, "{} vmap @{map}", self.key(key)),
            Statement::SetMarkFromMap { key, map } => write!(out, "meta mark set {} map @{map}", self.key(key)),
            Statement::ChangeMark { keep: u32::MAX, set } => write!(out, "meta mark set meta mark | {set:#x}"),
            Statement::ChangeMark { keep, set: 0 } => write!(out, "meta mark set meta mark & {keep:#x}"),
            Statement::ChangeMark { keep, set } => write!(out, "meta mark set meta mark & {keep:#x} | {set:#x}"),
            Statement::Update { map, key, data, timeout } => {
                write!(
                    out,
                    "update @{map} {{ {} timeout {}s : {} }}",
                    self.key(key),
                    timeout.as_secs(),
                    self.field(data)
                )
            }
            Statement::Forget { map, key, data } => {
                write!(out, "delete @{map} {{ {} : {} }}", self.key(key), self.field(data))
            }
            Statement::TranslateDestination { key, map } => {
                write!(out, "dnat {} to {} map @{map}", self.ip(), self.key(key))
            }
            Statement::Masquerade => write!(out, "masquerade fully-random"),
            Statement::Reject(Rejection::PortUnreachable) => {
                write!(
                    out,
                    "reject with {} type port-unreachable",
                    if self.table.family == Family::Ip { "icmp" } else { "icmpv6" }
                )
            }
            Statement::Reject(Rejection::TcpReset) => write!(out, "meta l4proto tcp reject with tcp reset"),
            Statement::Verdict(v) => {
                verdict(out, v);
                Ok(())
            }
        };
    }

    fn key(&self, fields: &[Field]) -> String {
        let parts: Vec<String> = fields
            .iter()
            .map(|f| match f {
                // Only in front may a mask go without parentheses.
                Field::Mark { mask } if *mask != u32::MAX && fields.len() > 1 => format!("({})", self.field(f)),
                _ => self.field(f),
            })
            .collect();
        parts.join(" . ")
    }

    fn field(&self, field: &Field) -> String {
        match field {
            Field::SourceAddr => format!("{} saddr", self.ip()),
            Field::DestinationAddr => format!("{} daddr", self.ip()),
            Field::Proto => "meta l4proto".into(),
            Field::DestinationPort => "th dport".into(),
            Field::Mark { mask: u32::MAX } => "meta mark".into(),
            Field::Mark { mask } => format!("meta mark & {mask:#x}"),
            Field::Random { modulus } => format!("numgen random mod {modulus}"),
        }
    }
}

/// A comment as far as nft keeps it, without characters that would end it.
pub(crate) fn shorten_comment(comment: &str) -> String {
    let mut kept: String = comment.chars().filter(|c| !c.is_control() && *c != '"').collect();
    while kept.len() > COMMENT_BYTES {
        kept.pop();
    }
    kept
}

/// nft's limit for comments (NFTNL_UDATA_COMMENT_MAXLEN), which includes nothing but the text.
const COMMENT_BYTES: usize = 127;

fn kind(set: &Set) -> &'static str {
    if set.data.is_some() { "map" } else { "set" }
}

fn values(out: &mut String, values: &[Value]) {
    for (i, value) in values.iter().enumerate() {
        if i > 0 {
            out.push_str(" . ");
        }
        let _ = match value {
            Value::V4(addr) => write!(out, "{addr}"),
            Value::V6(addr) => write!(out, "{addr}"),
            Value::Net(net) if net.prefix_len() == net.max_prefix_len() => write!(out, "{}", net.addr()),
            Value::Net(net) => write!(out, "{net}"),
            Value::Proto(6) => write!(out, "tcp"),
            Value::Proto(17) => write!(out, "udp"),
            Value::Proto(132) => write!(out, "sctp"),
            Value::Proto(n) => write!(out, "{n}"),
            Value::Port(n) => write!(out, "{n}"),
            Value::Mark(n) => write!(out, "{n:#x}"),
            Value::Index(n) => write!(out, "{n}"),
        };
    }
}

fn verdict(out: &mut String, verdict: &Verdict) {
    let _ = match verdict {
        Verdict::Accept => write!(out, "accept"),
        Verdict::Drop => write!(out, "drop"),
        Verdict::Return => write!(out, "return"),
        Verdict::Jump(chain) => write!(out, "jump {chain}"),
        Verdict::Goto(chain) => write!(out, "goto {chain}"),
    };
}

/// Applies transactions with the `nft` program, which must be installed. Slower than netlink by the start of a process;
/// there to check the netlink encoding against, and for people who want to read along.
///
/// The program runs in the network namespace of the calling thread. nft 1.0.6 cannot read a set back whose key has an address
/// and a transport port by example, so with that version only the first transactions on a table with such sets succeed: those
/// that make it.
#[derive(Debug, Default)]
pub struct TextExecutor;

impl Executor for TextExecutor {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(script(transaction).as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            Ok(())
        } else {
            Err(Error::Text { message: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
        }
    }

    fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error> {
        // Parsing nft's output would be a second reading of the kernel's state; there is one already.
        crate::NetlinkExecutor::new()?.elements(table, set)
    }

    fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error> {
        crate::NetlinkExecutor::new()?.chains(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_as_nft_writes_them() {
        let key = [Field::DestinationAddr, Field::Proto, Field::DestinationPort];
        let with = |field| key.iter().copied().chain([field]).collect::<Vec<_>>();
        for (statements, expected) in [
            (
                vec![Statement::TranslateDestination { key: with(Field::Random { modulus: 3 }), map: "slots".into() }],
                "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @slots",
            ),
            (
                vec![
                    Statement::InputInterface { prefix: "vp".into(), negated: true },
                    Statement::ChangeMark { keep: u32::MAX, set: 0x4000 },
                ],
                "iifname != \"vp*\" meta mark set meta mark | 0x4000",
            ),
            (
                vec![
                    Statement::InSet { key: with(Field::SourceAddr), set: "ranges".into(), negated: true },
                    Statement::Verdict(Verdict::Drop),
                ],
                "ip daddr . meta l4proto . th dport . ip saddr != @ranges drop",
            ),
            (
                vec![Statement::TranslateDestination {
                    key: vec![Field::Proto, Field::Mark { mask: 0xffff_bfff }],
                    map: "live".into(),
                }],
                "dnat ip to meta l4proto . (meta mark & 0xffffbfff) map @live",
            ),
        ] {
            assert_eq!(rule(Family::Ip, &statements), expected);
        }
    }
}
