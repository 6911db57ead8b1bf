//! Applies transactions through an `NETLINK_NETFILTER` socket: one batch a transaction, no program started.
//!
//! The encoding follows the kernel's `include/uapi/linux/netfilter/nf_tables.h` and `nfnetlink.h`. Reading back asks only for
//! the table, sets and chains of the caller; other tables of the machine are never listed.

mod encode;
mod message;
pub mod socket;

use std::collections::BTreeMap;
use std::io;

use crate::object::*;
use crate::{Error, Executor, text};
use encode::{decode_element, op_messages};
use message::{Attributes, Message, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, parse_messages};
use socket::Socket;

pub(crate) const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// An executor that speaks to the kernel; bound to the network namespace of the thread that makes it.
#[derive(Debug)]
pub struct NetlinkExecutor {
    socket: Socket,
    sequence: u32,
}

impl NetlinkExecutor {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn new() -> io::Result<NetlinkExecutor> {
        Ok(NetlinkExecutor { socket: Socket::open(libc::NETLINK_NETFILTER)?, sequence: 1 })
    }

    /// The number by which the kernel names this executor in announcements of its changes.
    pub fn port_id(&self) -> io::Result<u32> {
        self.socket.port_id()
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Sends one dump or get request and collects the attributes of the answers. `None` when the object does not exist.
    fn request(
        &mut self,
        kind: u16,
        table: &Table,
        flags: u16,
        attributes: impl FnOnce(&mut Message),
    ) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let sequence = self.next();
        let mut message =
            Message::new(NFNL_SUBSYS_NFTABLES << 8 | kind, NLM_F_REQUEST | flags, sequence, family(table.family), 0);
        attributes(&mut message);
        self.socket.send(&message.finish())?;
        let mut answers = Vec::new();
        loop {
            let buffer = self.socket.receive()?;
            for answer in parse_messages(&buffer) {
                let answer = answer.ok_or(Error::Protocol { what: "a cut message" })?;
                if answer.sequence != sequence {
                    continue;
                }
                match answer.kind {
                    message::NLMSG_DONE => return Ok(Some(answers)),
                    message::NLMSG_ERROR => match answer.error() {
                        0 => return Ok(Some(answers)),
                        libc::ENOENT => return Ok(None),
                        code => {
                            return Err(Error::Refused {
                                operation: format!("a request of type {kind}"),
                                source: io::Error::from_raw_os_error(code),
                            });
                        }
                    },
                    _ => answers.push(answer.payload.get(4..).unwrap_or_default().to_vec()),
                }
            }
        }
    }

    /// The attributes of every rule of a chain as the kernel holds them, in order; for comparing two ways of making rules.
    /// Handles and positions are left out.
    pub fn raw_rules(&mut self, table: &Table, chain: &str) -> Result<Vec<Vec<u8>>, Error> {
        let rules = self.request(encode::NFT_MSG_GETRULE, table, NLM_F_DUMP, |m| {
            m.string(1, &table.name);
            m.string(2, chain);
        })?;
        Ok(rules
            .unwrap_or_default()
            .iter()
            .filter(|r| {
                Attributes::of(r).any(|(kind, value)| kind == 2 && value.strip_suffix(&[0]) == Some(chain.as_bytes()))
            })
            .filter_map(|r| Attributes::of(r).find(|(kind, _)| *kind == 4).map(|(_, value)| value.to_vec()))
            .collect())
    }
}

/// How many netlink messages a transaction is, the two around it not counted.
pub fn messages(transaction: &Transaction) -> usize {
    let mut count = 0;
    for op in &transaction.ops {
        op_messages(&transaction.table, op, |_| count += 1);
    }
    count
}

pub(crate) fn family(family: Family) -> u8 {
    match family {
        Family::Ip => libc::AF_INET as u8,
        Family::Ip6 => libc::AF_INET6 as u8,
    }
}

impl Executor for NetlinkExecutor {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        if transaction.is_empty() {
            return Ok(());
        }
        let begin = self.next();
        let mut batch =
            Message::new(message::NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, begin, 0, NFNL_SUBSYS_NFTABLES).finish();
        // Which operation a sequence number belongs to, for the error text.
        let mut owners: BTreeMap<u32, usize> = BTreeMap::new();
        let mut last = begin;
        let mut last_at = batch.len();
        for (index, op) in transaction.ops.iter().enumerate() {
            op_messages(&transaction.table, op, |build| {
                last = self.next();
                last_at = batch.len();
                owners.insert(last, index);
                batch.extend_from_slice(&build(last));
            });
        }
        if last == begin {
            return Ok(());
        }
        // The acknowledgement of the last operation comes after the commit, and after all errors.
        message::set_flag(&mut batch[last_at..], NLM_F_ACK);
        let end = self.next();
        batch.extend_from_slice(
            &Message::new(message::NFNL_MSG_BATCH_END, NLM_F_REQUEST, end, 0, NFNL_SUBSYS_NFTABLES).finish(),
        );
        self.socket.send(&batch)?;

        let mut refused: Option<Error> = None;
        loop {
            let buffer = match self.socket.receive() {
                Ok(buffer) => buffer,
                Err(e) => return Err(refused.unwrap_or(Error::Io(e))),
            };
            for answer in parse_messages(&buffer) {
                let answer = answer.ok_or(Error::Protocol { what: "a cut message" })?;
                if answer.kind != message::NLMSG_ERROR {
                    continue;
                }
                let code = answer.error();
                if code != 0 && (answer.sequence == begin || owners.contains_key(&answer.sequence)) && refused.is_none()
                {
                    let operation = match owners.get(&answer.sequence) {
                        Some(index) => shorten(&text::script(&Transaction {
                            table: transaction.table.clone(),
                            ops: vec![transaction.ops[*index].clone()],
                        })),
                        None => "the transaction".into(),
                    };
                    refused = Some(Error::Refused { operation, source: io::Error::from_raw_os_error(code) });
                }
                // An error of the batch itself (out of memory, no permission) comes alone.
                if answer.sequence == last || answer.sequence == begin {
                    return refused.map_or(Ok(()), Err);
                }
            }
        }
    }

    fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error> {
        let answers = self.request(encode::NFT_MSG_GETSETELEM, table, NLM_F_DUMP, |m| {
            m.string(1, &table.name);
            m.string(2, &set.name);
        })?;
        let Some(answers) = answers else { return Ok(None) };
        let mut elements = Vec::new();
        for answer in &answers {
            for (_, list) in Attributes::of(answer).filter(|(kind, _)| *kind == 3) {
                for (_, element) in Attributes::of(list) {
                    elements.push(
                        decode_element(table.family, set, element)
                            .ok_or(Error::Protocol { what: "an element of another shape" })?,
                    );
                }
            }
        }
        Ok(Some(elements))
    }

    fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error> {
        let answers = self.request(encode::NFT_MSG_GETCHAIN, table, NLM_F_DUMP, |m| m.string(1, &table.name))?;
        let name = |answer: &Vec<u8>, wanted: u16| {
            Attributes::of(answer)
                .find(|(kind, _)| *kind == wanted)
                .map(|(_, value)| String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned())
        };
        Ok(answers
            .unwrap_or_default()
            .iter()
            .filter(|a| name(a, 1).as_deref() == Some(&*table.name))
            .filter_map(|a| name(a, 3))
            .collect())
    }
}

fn shorten(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line.to_owned(),
    }
}
