//! Messages as zone-file lines, decoded independently of the code under test.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Version, size, DO, and options as code and hex digits.
pub type Edns = (u8, u16, bool, Vec<(u16, String)>);

/// A reply in the notation of the recorded cases.
#[derive(Debug, Default)]
pub struct Decoded {
    pub rcode: String,
    pub flags: Vec<&'static str>,
    pub opcode: u16,
    pub question: Vec<String>,
    /// Answer, authority, additional (without OPT).
    pub sections: [Vec<String>; 3],
    /// Version, size, DO, options as `code:hex`.
    pub edns: Option<Edns>,
    pub size: usize,
}

struct Reader<'a> {
    message: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, n: usize) -> &[u8] {
        self.at += n;
        &self.message[self.at - n..self.at]
    }

    fn u8(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn name(&mut self) -> String {
        let (mut text, mut at, mut end) = (String::new(), self.at, None);
        for _ in 0..200 {
            let length = usize::from(self.message[at]);
            match length {
                0 => {
                    self.at = end.unwrap_or(at + 1);
                    return if text.is_empty() { ".".into() } else { text };
                }
                1..=63 => {
                    for byte in &self.message[at + 1..at + 1 + length] {
                        match byte {
                            b'.' | b'\\' => text.extend(['\\', char::from(*byte)]),
                            33..=126 => text.push(char::from(*byte)),
                            _ => text.push_str(&format!("\\{byte:03}")),
                        }
                    }
                    text.push('.');
                    at += length + 1;
                }
                _ => {
                    assert!(length >= 192, "label type {length}");
                    end.get_or_insert(at + 2);
                    let target = (length & 63) << 8 | usize::from(self.message[at + 1]);
                    assert!(target < at, "forward pointer");
                    at = target;
                }
            }
        }
        panic!("pointer loop");
    }
}

fn class(code: u16) -> String {
    match code {
        1 => "IN".into(),
        3 => "CH".into(),
        4 => "HS".into(),
        254 => "NONE".into(),
        255 => "ANY".into(),
        other => format!("CLASS{other}"),
    }
}

const TYPES: [(&str, u16); 31] = [
    ("A", 1),
    ("NS", 2),
    ("CNAME", 5),
    ("SOA", 6),
    ("PTR", 12),
    ("HINFO", 13),
    ("MX", 15),
    ("TXT", 16),
    ("AAAA", 28),
    ("SRV", 33),
    ("NAPTR", 35),
    ("DNAME", 39),
    ("OPT", 41),
    ("DS", 43),
    ("SSHFP", 44),
    ("RRSIG", 46),
    ("NSEC", 47),
    ("DNSKEY", 48),
    ("TLSA", 52),
    ("SVCB", 64),
    ("HTTPS", 65),
    ("SPF", 99),
    ("TKEY", 249),
    ("TSIG", 250),
    ("IXFR", 251),
    ("AXFR", 252),
    ("MAILA", 254),
    ("ANY", 255),
    ("CAA", 257),
    ("TYPE0", 0),
    ("TYPE65280", 65280),
];

pub fn type_code(name: &str) -> u16 {
    let known = TYPES.iter().find(|(n, _)| *n == name).map(|(_, code)| *code);
    known.or_else(|| name.strip_prefix("TYPE")?.parse().ok()).unwrap_or_else(|| panic!("unknown type {name}"))
}

fn type_name(code: u16) -> String {
    TYPES.iter().find(|(_, c)| *c == code).map_or_else(|| format!("TYPE{code}"), |(n, _)| n.to_string())
}

pub fn decode(message: &[u8]) -> Decoded {
    let mut r = Reader { message, at: 2 };
    let flags = r.u16();
    let counts = [r.u16(), r.u16(), r.u16(), r.u16()];
    let mut d = Decoded { opcode: flags >> 11 & 15, size: message.len(), ..Decoded::default() };
    for (bit, name) in [(15, "QR"), (10, "AA"), (9, "TC"), (8, "RD"), (7, "RA"), (6, "Z"), (5, "AD"), (4, "CD")] {
        if flags >> bit & 1 == 1 {
            d.flags.push(name);
        }
    }
    let mut rcode = flags & 15;
    for _ in 0..counts[0] {
        let name = r.name();
        let rtype = r.u16();
        d.question.push(format!("{name} {} {}", class(r.u16()), type_name(rtype)));
    }
    for section in 0..3 {
        for _ in 0..counts[section + 1] {
            let owner = r.name();
            let (rtype, rclass, ttl, length) = (r.u16(), r.u16(), r.u32(), usize::from(r.u16()));
            let end = r.at + length;
            if rtype == 41 {
                assert!(owner == "." && d.edns.is_none() && section == 2);
                rcode |= (ttl >> 24 << 4) as u16;
                let mut options = Vec::new();
                while r.at < end {
                    let code = r.u16();
                    let n = usize::from(r.u16());
                    options.push((code, r.take(n).iter().map(|b| format!("{b:02x}")).collect()));
                }
                assert_eq!(ttl & 0x7FFF, 0, "unknown EDNS flags");
                d.edns = Some(((ttl >> 16) as u8, rclass, ttl & 0x8000 != 0, options));
                continue;
            }
            let data = match rtype {
                1 => Ipv4Addr::from(<[u8; 4]>::try_from(r.take(4)).unwrap()).to_string(),
                28 => Ipv6Addr::from(<[u8; 16]>::try_from(r.take(16)).unwrap()).to_string(),
                2 | 5 | 12 => r.name(),
                6 => format!("{} {} {} {} {} {} {}", r.name(), r.name(), r.u32(), r.u32(), r.u32(), r.u32(), r.u32()),
                16 => {
                    let mut strings = Vec::new();
                    while r.at < end {
                        let n = usize::from(r.u8());
                        strings.push(format!("\"{}\"", String::from_utf8_lossy(r.take(n))));
                    }
                    strings.join(" ")
                }
                33 => format!("{} {} {} {}", r.u16(), r.u16(), r.u16(), r.name()),
                other => panic!("type {other} in a reply"),
            };
            assert_eq!(r.at, end, "length of {owner} {}", type_name(rtype));
            d.sections[section].push(format!("{owner} {ttl} {} {} {data}", class(rclass), type_name(rtype)));
        }
    }
    assert_eq!(r.at, message.len(), "octets behind the message");
    d.rcode = match rcode {
        0 => "NOERROR".into(),
        1 => "FORMERR".into(),
        2 => "SERVFAIL".into(),
        3 => "NXDOMAIN".into(),
        4 => "NOTIMP".into(),
        5 => "REFUSED".into(),
        16 => "BADVERS".into(),
        other => other.to_string(),
    };
    d
}

/// Reads a name with zone-file escapes into wire form.
pub fn name_from_text(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let (mut out, mut label, mut i) = (Vec::new(), Vec::new(), 0);
    while i < bytes.len() {
        match bytes[i] {
            b'\\' if bytes[i + 1].is_ascii_digit() => {
                label.push(text[i + 1..i + 4].parse().unwrap());
                i += 4;
            }
            b'\\' => {
                label.push(bytes[i + 1]);
                i += 2;
            }
            b'.' => {
                if !label.is_empty() {
                    out.push(label.len() as u8);
                    out.append(&mut label);
                }
                i += 1;
            }
            other => {
                label.push(other);
                i += 1;
            }
        }
    }
    if !label.is_empty() {
        out.push(label.len() as u8);
        out.append(&mut label);
    }
    out.push(0);
    out
}
