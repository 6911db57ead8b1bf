//! DNS messages as bytes (RFC 1035, EDNS(0) of RFC 6891): reading queries, writing replies within a size limit.
//!
//! Written for one job, answering: a query is read in place without copying, a reply is written once, in order. Everything
//! read here comes from the network; nothing panics on it.

use std::net::IpAddr;

/// Record types that are treated specially.
#[allow(missing_docs, reason = "the names are those of the IANA registry")]
pub mod rtype {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const DS: u16 = 43;
    pub const IXFR: u16 = 251;
    pub const AXFR: u16 = 252;
}

/// Response codes.
#[allow(missing_docs, reason = "the names are those of the IANA registry")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

impl Rcode {
    /// As tools and dashboards spell it.
    pub fn name(self) -> &'static str {
        match self {
            Rcode::NoError => "NOERROR",
            Rcode::FormErr => "FORMERR",
            Rcode::ServFail => "SERVFAIL",
            Rcode::NxDomain => "NXDOMAIN",
            Rcode::NotImp => "NOTIMP",
            Rcode::Refused => "REFUSED",
            Rcode::BadVers => "BADVERS",
        }
    }
}

pub(crate) const CLASS_IN: u16 = 1;
pub(crate) const CLASS_CH: u16 = 3;
pub(crate) const HEADER: usize = 12;
const QR: u16 = 0x8000;
const AA: u16 = 0x0400;
pub(crate) const TC: u16 = 0x0200;
const RD: u16 = 0x0100;
const CD: u16 = 0x0010;
const OPCODE: u16 = 0x7800;
const OPCODE_NOTIFY: u16 = 4 << 11;

/// A domain name as labels, lower case, at most 255 octets (RFC 1035 section 2.3.4).
#[derive(Clone, Debug)]
pub struct Labels {
    /// Wire form in lower case, with the final zero.
    bytes: [u8; 255],
    len: u8,
    starts: [u8; 128],
    count: u8,
}

impl Labels {
    /// Reads an uncompressed name at `at`; returns it with the offset behind it.
    fn read(message: &[u8], at: usize) -> Option<(Labels, usize)> {
        let mut labels = Labels { bytes: [0; 255], len: 0, starts: [0; 128], count: 0 };
        let mut pos = at;
        let mut used = 0;
        loop {
            let length = usize::from(*message.get(pos)?);
            if length > 63 || used + length + 1 > 255 {
                return None;
            }
            let part = message.get(pos..pos + length + 1)?;
            for (to, from) in labels.bytes[used..].iter_mut().zip(part) {
                *to = from.to_ascii_lowercase();
            }
            // The length octet is at most 63 and thus no letter.
            pos += length + 1;
            if length == 0 {
                labels.len = used as u8 + 1;
                return Some((labels, pos));
            }
            labels.starts[usize::from(labels.count)] = used as u8;
            labels.count += 1;
            used += length + 1;
        }
    }

    /// Reads a name in text form without escapes; a final dot is optional.
    pub fn parse(text: &str) -> Option<Labels> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        encode_name(text, &mut wire).then(|| Labels::read(&wire, 0)).flatten().map(|(labels, _)| labels)
    }

    /// Wire form in lower case.
    pub fn wire(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Number of labels without the root.
    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    /// Offset of label `i` in the wire form; that of the root for `i == count`.
    pub fn offset(&self, i: usize) -> usize {
        if i < self.count() { usize::from(self.starts[i]) } else { usize::from(self.len) - 1 }
    }

    /// Label `i` as text; empty for bytes that occur in no name of ours (a dot inside a label, or not ASCII).
    pub fn get(&self, i: usize) -> &str {
        let start = self.offset(i);
        let length = usize::from(self.bytes[start]);
        let label = &self.bytes[start + 1..start + 1 + length];
        if label.contains(&b'.') || !label.is_ascii() {
            return "";
        }
        std::str::from_utf8(label).unwrap_or_default()
    }

    /// Whether this name is `zone` or below it.
    pub fn is_under(&self, zone: &Labels) -> bool {
        self.count() >= zone.count() && self.wire()[self.offset(self.count() - zone.count())..] == *zone.wire()
    }

    /// Text form without the final dot; bytes that need an escape are written as `\DDD`.
    pub fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for i in 0..self.count() {
            if i > 0 {
                text.push('.');
            }
            let start = self.offset(i);
            for byte in &self.bytes[start + 1..start + 1 + usize::from(self.bytes[start])] {
                if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'*') {
                    text.push(char::from(*byte));
                } else {
                    let _ = write!(text, "\\{byte:03}");
                }
            }
        }
        text
    }
}

/// Appends the wire form of a name given as text; false (and nothing written) if it is not a name.
pub(crate) fn encode_name(text: &str, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let text = text.strip_suffix('.').unwrap_or(text);
    for label in text.split('.').filter(|_| !text.is_empty()) {
        if label.is_empty() || label.len() > 63 || out.len() - start + label.len() + 2 > 255 {
            out.truncate(start);
            return false;
        }
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    true
}

/// The EDNS part of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns<'a> {
    /// UDP payload size that the client accepts.
    pub size: u16,
    /// Version; only 0 is known.
    pub version: u8,
    /// DNSSEC OK.
    pub dnssec_ok: bool,
    /// Options, undecoded.
    pub options: &'a [u8],
}

/// A query that can be answered.
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// The whole message.
    pub message: &'a [u8],
    /// The name asked for.
    pub name: Labels,
    /// The type asked for.
    pub rtype: u16,
    /// The class asked in.
    pub class: u16,
    /// Where the question ends.
    pub question_end: usize,
    /// EDNS, if the query has it.
    pub edns: Option<Edns<'a>>,
}

/// What a datagram or a TCP message is.
#[derive(Debug)]
pub enum Parsed<'a> {
    /// Nothing to reply to: a response, or less than a header.
    Ignore,
    /// Not a query that can be answered: a bare header with this code goes back.
    Reject(Rcode),
    /// A query.
    Query(Box<Query<'a>>),
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Skips a possibly compressed name.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += usize::from(length) + 1,
            192..=255 => return message.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
    }
}

/// Reads a message from a client.
pub fn parse(message: &[u8]) -> Parsed<'_> {
    let (Some(flags), Some(questions)) = (u16_at(message, 2), u16_at(message, 4)) else { return Parsed::Ignore };
    if message.len() < HEADER || flags & QR != 0 {
        return Parsed::Ignore;
    }
    if flags & OPCODE != 0 && flags & OPCODE != OPCODE_NOTIFY {
        return Parsed::Reject(Rcode::NotImp);
    }
    if questions != 1 {
        return Parsed::Reject(Rcode::FormErr);
    }
    if message.len() == HEADER {
        return Parsed::Reject(Rcode::ServFail);
    }
    match parse_query(message) {
        Some(query) => Parsed::Query(Box::new(query)),
        None => Parsed::Reject(Rcode::FormErr),
    }
}

fn parse_query(message: &[u8]) -> Option<Query<'_>> {
    let (name, at) = Labels::read(message, HEADER)?;
    let (rtype, class) = (u16_at(message, at)?, u16_at(message, at + 2)?);
    let question_end = at + 4;
    let mut edns = None;
    let mut at = question_end;
    let records: u32 = [6, 8, 10].iter().filter_map(|at| u16_at(message, *at)).map(u32::from).sum();
    for _ in 0..records {
        let fixed = skip_name(message, at)?;
        let length = usize::from(u16_at(message, fixed + 8)?);
        let data = message.get(fixed + 10..fixed + 10 + length)?;
        if u16_at(message, fixed)? == rtype::OPT && edns.is_none() {
            edns = Some(Edns {
                size: u16_at(message, fixed + 2)?,
                version: message[fixed + 5],
                dnssec_ok: message[fixed + 6] & 0x80 != 0,
                options: data,
            });
        }
        at = fixed + 10 + length;
    }
    Some(Query { message, name, rtype, class, question_end, edns })
}

/// Writes the bare header that answers a message which is no query.
pub fn reject(message: &[u8], rcode: Rcode, out: &mut Vec<u8>) {
    out.clear();
    let flags = u16_at(message, 2).unwrap_or_default();
    out.extend_from_slice(&message[..2]);
    out.extend_from_slice(&(QR | flags & (OPCODE | RD | CD) | rcode as u16).to_be_bytes());
    out.extend_from_slice(&[0; 8]);
}

/// A section of a reply after the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// What was asked for.
    Answer = 0,
    /// The zone's SOA, for negative answers.
    Authority = 1,
    /// Addresses of names in the other sections.
    Additional = 2,
}

/// A name to be written.
#[derive(Clone, Copy, Debug)]
pub enum Owner<'a> {
    /// The question's name.
    Question,
    /// The name that stands at this offset of the reply.
    At(usize),
    /// An uncompressed name.
    Wire(&'a [u8]),
}

/// A reply being written. Records that do not fit are left out and set TC.
#[derive(Debug)]
pub struct Reply<'q, 'o> {
    query: &'q Query<'q>,
    out: &'o mut Vec<u8>,
    limit: usize,
    counts: [u16; 3],
    truncated: bool,
}

/// Options that go back to the client as they came: NSID, EXPIRE, COOKIE, TCP keepalive, padding.
const ECHOED_OPTIONS: [u16; 5] = [3, 9, 10, 11, 12];

fn echoed_options(options: &[u8]) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut rest = options;
    while let (Some(code), Some(length)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let end = 4 + usize::from(length);
        let Some(option) = rest.get(..end) else { break };
        if ECHOED_OPTIONS.contains(&code) {
            kept.extend_from_slice(option);
        }
        rest = &rest[end..];
    }
    kept
}

impl<'q, 'o> Reply<'q, 'o> {
    /// Begins a reply of at most `limit` octets in `out`: header and question.
    pub fn new(query: &'q Query<'q>, limit: usize, out: &'o mut Vec<u8>) -> Reply<'q, 'o> {
        out.clear();
        out.extend_from_slice(&query.message[..2]);
        out.extend_from_slice(&[0; HEADER - 2]);
        out.extend_from_slice(&query.message[HEADER..query.question_end]);
        // OPT is never dropped: keep room for it.
        let reserved = query.edns.map_or(0, |e| 11 + echoed_options(e.options).len());
        Reply { query, out, limit: limit.saturating_sub(reserved), counts: [0; 3], truncated: false }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> usize {
        self.out.len()
    }

    /// Whether a record was left out.
    pub fn truncated(&self) -> bool {
        self.truncated
    }

    /// Marks the reply as cut.
    pub fn set_truncated(&mut self) {
        self.truncated = true;
    }

    /// Writes a record in class `class`; `data` writes its data. False when it did not fit.
    pub fn record_in(
        &mut self,
        class: u16,
        section: Section,
        owner: Owner<'_>,
        rtype: u16,
        ttl: u32,
        data: impl FnOnce(&mut Vec<u8>),
    ) -> bool {
        if self.truncated {
            return false;
        }
        let start = self.out.len();
        match owner {
            Owner::Question => self.out.extend_from_slice(&[0xC0, HEADER as u8]),
            Owner::At(at) => self.out.extend_from_slice(&(0xC000 | at as u16).to_be_bytes()),
            Owner::Wire(name) => self.out.extend_from_slice(name),
        }
        self.out.extend_from_slice(&rtype.to_be_bytes());
        self.out.extend_from_slice(&class.to_be_bytes());
        self.out.extend_from_slice(&ttl.to_be_bytes());
        let length_at = self.out.len();
        self.out.extend_from_slice(&[0; 2]);
        data(self.out);
        let length = self.out.len() - length_at - 2;
        if self.out.len() > self.limit || length > usize::from(u16::MAX) {
            self.out.truncate(start);
            self.truncated = true;
            return false;
        }
        self.out[length_at..length_at + 2].copy_from_slice(&(length as u16).to_be_bytes());
        self.counts[section as usize] += 1;
        true
    }

    /// Writes a record of class IN; `data` writes its data. False when it did not fit.
    pub fn record(
        &mut self,
        section: Section,
        owner: Owner<'_>,
        rtype: u16,
        ttl: u32,
        data: impl FnOnce(&mut Vec<u8>),
    ) -> bool {
        self.record_in(CLASS_IN, section, owner, rtype, ttl, data)
    }

    /// Writes an address record.
    pub fn address(&mut self, section: Section, owner: Owner<'_>, ttl: u32, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.record(section, owner, rtype::A, ttl, |out| out.extend_from_slice(&a.octets())),
            IpAddr::V6(a) => self.record(section, owner, rtype::AAAA, ttl, |out| out.extend_from_slice(&a.octets())),
        }
    }

    /// Completes header and OPT.
    pub fn finish(self, rcode: Rcode, authoritative: bool) -> Rcode {
        let request = u16_at(self.query.message, 2).unwrap_or_default();
        let mut flags = QR | request & (OPCODE | RD | CD) | (rcode as u16 & 0xF);
        if request & OPCODE == OPCODE_NOTIFY {
            flags &= !RD;
        }
        if authoritative {
            flags |= AA;
        }
        if self.truncated {
            flags |= TC;
        }
        let mut additional = self.counts[2];
        if let Some(edns) = self.query.edns {
            write_opt(edns, rcode, self.out);
            additional += 1;
        }
        self.out[2..4].copy_from_slice(&flags.to_be_bytes());
        let counts = [1, self.counts[0], self.counts[1], additional];
        for (i, count) in counts.iter().enumerate() {
            self.out[4 + 2 * i..6 + 2 * i].copy_from_slice(&count.to_be_bytes());
        }
        rcode
    }
}

/// A record of a reply from an upstream: names decompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub owner: Vec<u8>,
    pub rtype: u16,
    pub ttl: u32,
    pub data: Vec<u8>,
}

/// Reads a possibly compressed name into wire form; returns where it ends.
fn read_name(message: &[u8], mut at: usize, out: &mut Vec<u8>) -> Option<usize> {
    let start = out.len();
    let mut end = None;
    loop {
        match *message.get(at)? {
            0 => {
                out.push(0);
                return Some(end.unwrap_or(at + 1));
            }
            length @ 1..=63 => {
                out.extend_from_slice(message.get(at..at + usize::from(length) + 1)?);
                // Also ends loops of pointers.
                if out.len() - start > 254 {
                    return None;
                }
                at += usize::from(length) + 1;
            }
            192..=255 => {
                let target = usize::from(u16_at(message, at)? & 0x3FFF);
                end.get_or_insert(at + 2);
                // Names point to what came before (RFC 1035 section 4.1.4), so a chain of pointers ends.
                if target >= at {
                    return None;
                }
                at = target;
            }
            _ => return None,
        }
    }
}

/// A reply from an upstream, as far as it is needed to complete an alias.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub rcode: u16,
    pub truncated: bool,
    /// Addresses and aliases of the answer section.
    pub answers: Vec<Record>,
}

pub(crate) fn parse_upstream(message: &[u8]) -> Option<Upstream> {
    let flags = u16_at(message, 2)?;
    let (questions, answers) = (u16_at(message, 4)?, u16_at(message, 6)?);
    let mut at = HEADER;
    for _ in 0..questions {
        at = skip_name(message, at)? + 4;
    }
    let mut records = Vec::new();
    for _ in 0..answers {
        let mut owner = Vec::new();
        let fixed = read_name(message, at, &mut owner)?;
        let rtype = u16_at(message, fixed)?;
        let ttl = u32::from_be_bytes(message.get(fixed + 4..fixed + 8)?.try_into().ok()?);
        let length = usize::from(u16_at(message, fixed + 8)?);
        let raw = message.get(fixed + 10..fixed + 10 + length)?;
        at = fixed + 10 + length;
        let mut data = Vec::new();
        match rtype {
            rtype::A | rtype::AAAA => data.extend_from_slice(raw),
            rtype::CNAME => drop(read_name(message, fixed + 10, &mut data)?),
            _ => continue,
        }
        records.push(Record { owner, rtype, ttl, data });
    }
    Some(Upstream { rcode: flags & 0xF, truncated: flags & TC != 0, answers: records })
}

/// Puts the reply of an upstream in `out` with the client's id and our own OPT record in place of the upstream's: OPT is
/// between two neighbours only (RFC 6891 section 6.2.6). A reply that cannot be read goes on as it is.
pub(crate) fn relay(query: &Query<'_>, upstream: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(upstream);
    let Some(opt) = find_opt(upstream) else {
        out[..2].copy_from_slice(&query.message[..2]);
        return;
    };
    let mut additional = u16_at(upstream, 10).unwrap_or_default();
    if let Some((start, end)) = opt {
        if end != upstream.len() {
            // Something stands behind it that may be pointed to; leave the message alone.
            out[..2].copy_from_slice(&query.message[..2]);
            return;
        }
        out.truncate(start);
        additional -= 1;
    }
    if let Some(edns) = query.edns {
        write_opt(edns, Rcode::NoError, out);
        additional += 1;
    }
    out[..2].copy_from_slice(&query.message[..2]);
    out[10..12].copy_from_slice(&additional.to_be_bytes());
}

/// Where the OPT record of a message stands; the outer `None` for a message that cannot be read.
fn find_opt(message: &[u8]) -> Option<Option<(usize, usize)>> {
    let mut at = HEADER;
    for _ in 0..u16_at(message, 4)? {
        at = skip_name(message, at)? + 4;
    }
    let mut found = None;
    let records: u32 = [6, 8, 10].iter().filter_map(|at| u16_at(message, *at)).map(u32::from).sum();
    for _ in 0..records {
        let fixed = skip_name(message, at)?;
        let end = fixed + 10 + usize::from(u16_at(message, fixed + 8)?);
        message.get(..end)?;
        if u16_at(message, fixed)? == rtype::OPT {
            found = Some((at, end));
        }
        at = end;
    }
    Some(found)
}

fn write_opt(edns: Edns<'_>, rcode: Rcode, out: &mut Vec<u8>) {
    let bad_version = rcode == Rcode::BadVers;
    let size = if bad_version { 0 } else { edns.size.min(super::answer::MAX_UDP) };
    let dnssec_ok = edns.dnssec_ok && !bad_version;
    out.push(0);
    out.extend_from_slice(&rtype::OPT.to_be_bytes());
    out.extend_from_slice(&size.to_be_bytes());
    out.extend_from_slice(&[(rcode as u16 >> 4) as u8, 0, if dnssec_ok { 0x80 } else { 0 }, 0]);
    let options = if bad_version { Vec::new() } else { echoed_options(edns.options) };
    out.extend_from_slice(&(options.len() as u16).to_be_bytes());
    out.extend_from_slice(&options);
}

/// Whether `reply` answers `query`: response bit, id, and the question octet by octet but for case.
pub(crate) fn is_reply_to(reply: &[u8], query: &[u8]) -> bool {
    let Some(end) = skip_name(query, HEADER).map(|end| end + 4) else { return false };
    u16_at(reply, 2).is_some_and(|flags| flags & QR != 0)
        && reply.get(..2) == query.get(..2)
        && u16_at(reply, 4) == Some(1)
        && match (reply.get(HEADER..end), query.get(HEADER..end)) {
            (Some(ours), Some(theirs)) => ours.eq_ignore_ascii_case(theirs),
            _ => false,
        }
}

/// A query for one name, as sent upstream.
pub(crate) fn build_query(id: u16, name: &[u8], rtype: u16) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + name.len() + 4);
    message.extend_from_slice(&id.to_be_bytes());
    message.extend_from_slice(&RD.to_be_bytes());
    message.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend_from_slice(name);
    message.extend_from_slice(&rtype.to_be_bytes());
    message.extend_from_slice(&CLASS_IN.to_be_bytes());
    message
}
