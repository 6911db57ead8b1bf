//! The upstream server of the recordings, as a function from query to reply.

use crate::decode::{decode, name_from_text};

/// The reply of the recordings' upstream; `None` where it never answers. `udp` matters to the one name that is cut there.
pub fn reply(query: &[u8], udp: bool) -> Option<Vec<u8>> {
    let asked = decode(query);
    let question = asked.question.first()?;
    let mut words = question.split(' ');
    let (name, rtype) = (words.next()?.to_ascii_lowercase(), words.nth(1)?);
    let parent = name.split_once('.').map(|(_, p)| p.to_string()).unwrap_or_default();
    let mut answers: Vec<(String, &str, u32)> = Vec::new();
    let mut rcode = 0;
    let mut cut = false;
    let mut negative = Some(".".to_string());
    match (name.as_str(), rtype) {
        ("db.corp.example.", "A") => answers.push((name.clone(), "192.0.2.53", 120)),
        ("www.example.org.", "A") => answers.push((name.clone(), "192.0.2.80", 300)),
        ("gold.corp.example.", "A") => answers.push((name.clone(), "192.0.2.81", 60)),
        ("hop.example.", "A") => {
            answers.push((name.clone(), "db.corp.example.", 60));
            answers.push(("db.corp.example.".into(), "192.0.2.53", 120));
        }
        ("back.example.", "A") => answers.push((name.clone(), "web.shop.svc.cluster.local.", 60)),
        ("tc.example.", "A") => {
            answers.push((name.clone(), "192.0.2.60", 60));
            cut = udp;
        }
        ("9.1.244.10.in-addr.arpa.", "PTR") => answers.push((name.clone(), "curl.corp.example.", 60)),
        (
            "db.corp.example."
            | "www.example.org."
            | "gold.corp.example."
            | "hop.example."
            | "back.example."
            | "tc.example."
            | "9.1.244.10.in-addr.arpa.",
            _,
        ) => negative = Some(parent),
        ("servfail.example.", _) => (rcode, negative) = (2, None),
        ("refused.example.", _) => (rcode, negative) = (5, None),
        ("dead.example.", _) => return None,
        _ => rcode = 3,
    }
    if !answers.is_empty() {
        negative = None;
    }
    let question_end = 12 + name_from_text(&name).len() + 4;
    let mut out = query[..question_end].to_vec();
    let flags = u16::from_be_bytes([query[2], query[3]]) & 0x0100 | 0x8080 | rcode | if cut { 0x0200 } else { 0 };
    out[2..4].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&(answers.len() as u16).to_be_bytes());
    out[8..10].copy_from_slice(&u16::from(negative.is_some()).to_be_bytes());
    out[10..12].copy_from_slice(&[0, u8::from(asked.edns.is_some())]);
    let mut record = |owner: &str, rtype: u16, ttl: u32, data: &[u8]| {
        // The question's name goes back in the client's case.
        if owner == name {
            out.extend([0xC0, 12])
        } else {
            out.extend(name_from_text(owner))
        }
        out.extend(rtype.to_be_bytes());
        out.extend(1u16.to_be_bytes());
        out.extend(ttl.to_be_bytes());
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
    };
    for (owner, data, ttl) in &answers {
        match data.parse::<std::net::Ipv4Addr>() {
            Ok(a) => record(owner, 1, *ttl, &a.octets()),
            Err(_) if owner.ends_with("arpa.") => record(owner, 12, *ttl, &name_from_text(data)),
            Err(_) => record(owner, 5, *ttl, &name_from_text(data)),
        }
    }
    if let Some(zone) = negative {
        let below =
            |label: &str| name_from_text(&if zone == "." { format!("{label}.") } else { format!("{label}.{zone}") });
        let mut data = [below("ns"), below("h")].concat();
        data.extend([1u32, 2, 3, 4, 60].iter().flat_map(|n| n.to_be_bytes()));
        record(&zone, 6, 60, &data);
    }
    if asked.edns.is_some() {
        out.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    }
    Some(out)
}
