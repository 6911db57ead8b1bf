//! Replays answers recorded from CoreDNS (conformance/golden/README.md, section DNS) on the pure answer function.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use portolan_dns::answer::{self, Fallthrough, Outcome, Settings, Transport, Unhandled, Zone};
use portolan_plan::zone::{Exposure, Options, PodMode, ZoneBuilder, ZoneSet};
use serde_json::{Value, json};

use crate::decode::{Decoded, decode, name_from_text, type_code};
use crate::upstream;

fn conformance(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../conformance").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn lines(file: &str) -> Vec<Value> {
    conformance(file).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn apply(builder: &mut ZoneBuilder, object: &Value) {
    fn typed<T: serde::de::DeserializeOwned>(v: &Value) -> T {
        serde_json::from_value(v.clone()).unwrap()
    }
    match object["kind"].as_str().unwrap() {
        "Namespace" => drop(builder.set_namespace(&typed(object))),
        "Service" => drop(builder.set_service(&typed(object))),
        "EndpointSlice" => drop(builder.set_slice(&typed(object))),
        "Pod" => drop(builder.set_pod(&typed(object))),
        _ => {}
    }
}

fn delete(builder: &mut ZoneBuilder, object: &Value) {
    let (ns, name) = (object["metadata"]["namespace"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
    match object["kind"].as_str().unwrap() {
        "Service" => drop(builder.delete_service(ns, name)),
        "EndpointSlice" => drop(builder.delete_slice(ns, name)),
        // Deleted with a grace period: the pod goes on existing, with a deletionTimestamp.
        "Pod" if object["gracePeriodSeconds"].as_u64().unwrap_or(0) > 0 => {
            let leaving = json!({"kind": "Pod", "metadata": {"namespace": ns, "name": name,
                "deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": "Running"}});
            apply(builder, &leaving);
        }
        "Pod" => drop(builder.delete_pod(ns, name)),
        other => panic!("delete {other}"),
    }
}

/// The cluster of the recordings in each of its states.
fn states(options: Options) -> BTreeMap<String, ZoneSet> {
    let mut builder = ZoneBuilder::new(options);
    builder.set_synced();
    for object in [
        json!({"kind": "Namespace", "metadata": {"name": "default"}}),
        json!({"kind": "Namespace", "metadata": {"name": "kube-system"}}),
        json!({"kind": "Service", "metadata": {"namespace": "default", "name": "kubernetes"},
            "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{"name": "https", "port": 443}]}}),
        json!({"kind": "EndpointSlice", "metadata": {"namespace": "default", "name": "kubernetes",
            "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["203.0.113.10"]}], "ports": [{"name": "https", "port": 6443}]}),
    ] {
        apply(&mut builder, &object);
    }
    let mut states = BTreeMap::new();
    for line in lines("golden/dns-fixture.jsonl") {
        match line["step"].as_str() {
            None => {
                apply(&mut builder, &line);
                states.insert("base".to_string(), builder.set().clone());
            }
            Some(step) => {
                line["apply"].as_array().into_iter().flatten().for_each(|o| apply(&mut builder, o));
                line["delete"].as_array().into_iter().flatten().for_each(|o| delete(&mut builder, o));
                states.insert(step.to_string(), builder.set().clone());
            }
        }
    }
    states
}

struct Server {
    settings: Settings,
    states: BTreeMap<String, ZoneSet>,
}

/// The configurations of the recordings (README, "Servers").
fn server(name: &str) -> Server {
    let zones = |names: &[&str]| -> Vec<Zone> { names.iter().map(|n| Zone::new(n).unwrap()).collect() };
    let mut options = Options::default();
    let mut settings = Settings::new(match name {
        "cidr" => {
            let nets = ["10.96.0.0/12", "10.244.0.0/16", "fd00:10:96::/108"].map(|n| n.parse().unwrap());
            zones(&["cluster.local"]).into_iter().chain(nets.into_iter().flat_map(Zone::reverse)).collect()
        }
        "twozones" => zones(&["corp.local", "cluster.local", "in-addr.arpa"]),
        _ => zones(&["cluster.local", "in-addr.arpa", "ip6.arpa"]),
    });
    settings.own_addresses = vec!["10.244.0.5".parse().unwrap()];
    settings.unhandled = if name == "zoned" { Unhandled::Refused } else { Unhandled::ServFail };
    let reverse = || Fallthrough::Zones(zones(&["in-addr.arpa", "ip6.arpa"]));
    match name {
        "main" | "autopath" | "cached" | "unsynced" | "deadup" => {
            settings.fallthrough = reverse();
            settings.forwards = true;
            if name != "deadup" {
                options.pods = PodMode::Verified;
            }
        }
        "stock" => {
            options.pods = PodMode::Insecure;
            settings.fallthrough = reverse();
            settings.ttl = 30;
        }
        "allfall" | "unsyncedfall" => {
            settings.fallthrough = Fallthrough::All;
            settings.forwards = true;
        }
        "capped" => settings.forwards = true,
        "insecure" => options.pods = PodMode::Insecure,
        "emptysvc" => settings.ignore_empty_service = true,
        "podnames" => options.endpoint_pod_names = true,
        "ttl0" => settings.ttl = 0,
        "twozones" => settings.ttl = 600,
        "nslist" | "nslabel" => {
            options.pods = PodMode::Insecure;
            options.exposure = match name {
                "nslist" => Exposure::Named(["shop", "default"].map(String::from).into()),
                _ => Exposure::Labelled([("team".to_string(), "front".to_string())].into()),
            };
        }
        "noself" => settings.own_addresses = vec!["10.244.0.99".parse().unwrap()],
        "chaos" => settings.chaos = Some(("example-1".into(), "host".into())),
        "minimal" => settings.minimal = true,
        "disabled" | "zoned" | "cidr" | "transfer" => {}
        other => panic!("unknown server {other}"),
    }
    let states = match name {
        "unsynced" | "unsyncedfall" => BTreeMap::from([("base".to_string(), ZoneBuilder::new(options).set().clone())]),
        _ => states(options),
    };
    Server { settings, states }
}

fn message(query: &Value) -> Vec<u8> {
    if let Some(hex) = query["message"].as_str() {
        let bytes = hex.strip_prefix("<id>").unwrap_or(hex);
        let mut message = if hex.is_empty() { Vec::new() } else { vec![0x12, 0x34] };
        message.extend((0..bytes.len() / 2).map(|i| u8::from_str_radix(&bytes[2 * i..2 * i + 2], 16).unwrap()));
        return message;
    }
    let flag = |name: &str, bit: u16| u16::from(query[name] == json!(true)) << bit;
    let flags =
        flag("aa", 10) | flag("tc", 9) | flag("rd", 8) | flag("ra", 7) | flag("z", 6) | flag("ad", 5) | flag("cd", 4);
    let mut m = vec![0x12, 0x34];
    m.extend(flags.to_be_bytes());
    m.extend([0, 1, 0, 0, 0, 0, 0, u8::from(query["edns"].is_object())]);
    m.extend(name_from_text(query["name"].as_str().unwrap()));
    m.extend(type_code(query["type"].as_str().unwrap()).to_be_bytes());
    let class: u16 = match query["class"].as_str().unwrap() {
        "IN" => 1,
        "CH" => 3,
        "HS" => 4,
        "NONE" => 254,
        "ANY" => 255,
        other => panic!("class {other}"),
    };
    m.extend(class.to_be_bytes());
    if let Some(edns) = query["edns"].as_object() {
        let mut options = Vec::new();
        for option in edns["options"].as_array().unwrap() {
            let hex = option[1].as_str().unwrap();
            options.extend((option[0].as_u64().unwrap() as u16).to_be_bytes());
            options.extend((hex.len() as u16 / 2).to_be_bytes());
            options.extend((0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()));
        }
        m.extend([0, 0, 41]);
        m.extend((edns["size"].as_u64().unwrap() as u16).to_be_bytes());
        m.extend([0, edns["version"].as_u64().unwrap() as u8]);
        let flags = edns.get("flags").and_then(Value::as_u64).unwrap_or(0) as u16 & 0x7FFF;
        m.extend((flags | u16::from(edns["do"] == json!(true)) << 15).to_be_bytes());
        m.extend((options.len() as u16).to_be_bytes());
        m.extend(options);
    }
    m
}

/// Asks the pure function, with the recordings' upstream behind it.
fn ask(server: &Server, name: &str, state: &str, request: &[u8], transport: Transport) -> Option<Vec<u8>> {
    let set = &server.states[state];
    let udp = transport == Transport::Udp;
    let upstream = |query: &[u8]| if name == "deadup" { None } else { upstream::reply(query, udp) };
    let mut out = Vec::new();
    match answer::answer(&server.settings, set, request, transport, 7, &mut out) {
        Outcome::Reply(_) => {}
        Outcome::Ignore => return None,
        Outcome::Forward => match upstream(request) {
            Some(reply) => drop(answer::relay(request, transport, &reply, &mut out)),
            None => drop(answer::fail(request, transport, portolan_dns::wire::Rcode::ServFail, &mut out)),
        },
        Outcome::Chase(chain) => {
            let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            query.extend(name_from_text(chain.target()));
            let question = decode(&strip(request)).question[0].clone();
            query.extend(type_code(question.rsplit(' ').next().unwrap()).to_be_bytes());
            query.extend([0, 1]);
            drop(answer::complete(&chain, request, transport, upstream(&query).as_deref(), &mut out));
        }
    }
    Some(out)
}

/// The header and question alone.
fn strip(request: &[u8]) -> Vec<u8> {
    let end = 12 + request[12..].iter().position(|b| *b == 0).unwrap() + 5;
    let mut m = request[..end].to_vec();
    m[6..12].fill(0);
    m
}

fn same(expected: &str, got: &str) -> bool {
    let (e, g): (Vec<_>, Vec<_>) = (expected.split(' ').collect(), got.split(' ').collect());
    e.len() == g.len() && e.iter().zip(&g).all(|(e, g)| e == g || *e == "<any>")
}

fn same_sections(expected: &[String], got: &[String], order: &str) -> bool {
    let is_alias = |l: &&String| l.contains(" CNAME ");
    if order == "cname-first" {
        let (aliases, n) = (expected.iter().filter(is_alias), expected.iter().filter(is_alias).count());
        if got.len() < n || !aliases.zip(got).all(|(e, g)| same(e, g)) {
            return false;
        }
    }
    let mut rest: Vec<&String> = got.iter().collect();
    let all = expected.iter().all(|e| rest.iter().position(|g| same(e, g)).map(|i| rest.swap_remove(i)).is_some());
    all && rest.is_empty()
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(|v| v.as_str().unwrap().to_string()).collect()
}

fn compare(case: &Value, reply: Option<Vec<u8>>) -> Result<(), String> {
    let expect = if case["agree"] == json!(false) { &case["ours"] } else { &case["expect"] };
    let none = expect["none"] == json!(true);
    let Some(reply) = reply else { return if none { Ok(()) } else { Err("no reply".into()) } };
    let got = decode(&reply);
    let wrong = |what: &str| Err(format!("{what}: expected {expect}\n  got {got:?}"));
    if none {
        return wrong("a reply");
    }
    if got.rcode != expect["rcode"].as_str().unwrap() {
        return wrong("rcode");
    }
    let flags: BTreeSet<String> = strings(&expect["flags"]).into_iter().collect();
    if flags != got.flags.iter().map(|f| f.to_string()).collect() {
        return wrong("flags");
    }
    if u64::from(got.opcode) != expect["opcode"].as_u64().unwrap_or(0) {
        return wrong("opcode");
    }
    if strings(&expect["question"]) != got.question {
        return wrong("question");
    }
    let edns = expect["edns"].as_object().map(|e| {
        let options = e["options"].as_array().unwrap().iter();
        let options = options.map(|o| (o[0].as_u64().unwrap() as u16, o[1].as_str().unwrap().to_string())).collect();
        (e["version"].as_u64().unwrap() as u8, e["size"].as_u64().unwrap() as u16, e["do"] == json!(true), options)
    });
    if edns != got.edns {
        return wrong("edns");
    }
    if expect["answer"] == json!("<subset>") {
        return cut(case, expect, &got)
            .map_err(|e| format!("{e}; {} answers, {} octets", got.sections[0].len(), got.size));
    }
    let order = case["order"].as_str().unwrap();
    for (i, section) in ["answer", "authority", "additional"].iter().enumerate() {
        if !same_sections(&strings(&expect[*section]), &got.sections[i], order) {
            return wrong(section);
        }
    }
    Ok(())
}

fn cut(case: &Value, expect: &Value, got: &Decoded) -> Result<(), String> {
    if got.size > expect["limit"].as_u64().unwrap() as usize {
        return Err("too large".into());
    }
    let count = expect["answer_count"].as_u64().unwrap() as usize;
    let right = match case["query"]["type"].as_str().unwrap() {
        "A" => got.sections[0].len() == count,
        _ => got.sections[0].len() >= count,
    };
    if !right {
        return Err(format!("expected {count} answers"));
    }
    let member = |line: &String| {
        let address = line.rsplit(' ').next().unwrap_or_default();
        let first = address.split('.').next().unwrap_or_default();
        let separator = if first.contains('-') { '-' } else { '.' };
        let text = if separator == '-' { first } else { address };
        let octets: Vec<u8> = text.split(separator).filter_map(|o| o.parse().ok()).collect();
        matches!(octets[..], [10, 245, 0..=2, 1..=100])
    };
    let distinct: BTreeSet<_> = got.sections[0].iter().collect();
    if distinct.len() != got.sections[0].len() || !got.sections[0].iter().all(member) {
        return Err("a record that is not of the whole answer".into());
    }
    Ok(())
}

fn known_failing() -> BTreeSet<String> {
    let text = conformance("known-failing/dns.txt");
    text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).map(String::from).collect()
}

#[test]
fn recorded_answers() {
    let known = known_failing();
    let mut servers = BTreeMap::new();
    let (mut failed, mut fixed, mut ids) = (Vec::new(), Vec::new(), BTreeSet::new());
    for case in lines("golden/dns.jsonl") {
        let (id, name) = (case["id"].as_str().unwrap().to_string(), case["server"].as_str().unwrap().to_string());
        let server = servers.entry(name.clone()).or_insert_with(|| server(&name));
        let transport = if case["query"]["proto"] == "tcp" { Transport::Tcp } else { Transport::Udp };
        let reply = ask(server, &name, case["state"].as_str().unwrap(), &message(&case["query"]), transport);
        match (compare(&case, reply), known.contains(&id)) {
            (Err(why), false) => failed.push(format!("{id}: {why}")),
            (Ok(()), true) => fixed.push(id.clone()),
            _ => {}
        }
        ids.insert(id);
    }
    let unknown: Vec<_> = known.difference(&ids).collect();
    assert!(unknown.is_empty(), "listed in known-failing/dns.txt but not recorded: {unknown:?}");
    assert!(failed.is_empty(), "{} of {} recorded answers differ:\n{}", failed.len(), ids.len(), failed.join("\n"));
    assert!(fixed.is_empty(), "these pass now, take them off known-failing/dns.txt: {fixed:?}");
}

/// Rows of the specification's table of 116 queries that have no recorded case of their own number.
#[test]
fn table_of_queries() {
    // Row, server, state, name, type, transport, response code, TC, what the answer section has (addresses, targets, codes).
    type Row = (u32, &'static str, &'static str, &'static str, &'static str, &'static str, &'static [&'static str]);
    let rows: &[Row] = &[
        (1, "main", "base", "web.shop.svc~", "A", "NOERROR", &["10.96.20.11"]),
        (12, "main", "base", "nosuch.shop.svc~", "AAAA", "NXDOMAIN", &[]),
        (17, "main", "base", "_http._udp.web.shop.svc~", "SRV", "NXDOMAIN", &[]),
        (21, "main", "base", "_http._tcp.plain.shop.svc~", "SRV", "NXDOMAIN", &[]),
        (23, "main", "base", "_http._tcp.web6.shop.svc~", "SRV", "NOERROR", &["0 100 80 web6.shop.svc~"]),
        (28, "main", "base", "db.data.svc~", "A", "NOERROR", &["10.244.1.21", "10.244.2.22"]),
        (30, "main", "base", "db-0.db.data.svc~", "A", "NOERROR", &["10.244.1.21"]),
        (32, "main", "base", "db-7.db.data.svc~", "A", "NXDOMAIN", &[]),
        (38, "main", "base", "10-244-3-23.db-all.data.svc~", "A", "NOERROR", &["10.244.3.23"]),
        (40, "podnames", "base", "db-2.db-all.data.svc~", "A", "NOERROR", &["10.244.3.23"]),
        (46, "main", "base", "_p._tcp.pair.data.svc~", "SRV", "NOERROR", &["0 50 81 mate.pair.data.svc~"]),
        (48, "main", "base", "void.data.svc~", "AAAA", "NXDOMAIN", &[]),
        (52, "main", "base", "_ldap._tcp.manual.data.svc~", "SRV", "NOERROR", &["0 100 389 old.manual.data.svc~"]),
        (62, "main", "base", "alias.shop.svc~", "AAAA", "NOERROR", &[]),
        (64, "main", "base", "ipname.shop.svc~", "A", "NXDOMAIN", &[]),
        (66, "main", "base", "web.shop.svc~", "CNAME", "NOERROR", &[]),
        (90, "main", "base", "9.1.244.10.in-addr.arpa.", "PTR", "NOERROR", &["curl.corp.example."]),
        (97, "main", "base", "10-244-9-9.shop.pod~", "A", "NXDOMAIN", &[]),
        (97, "insecure", "base", "10-244-9-9.shop.pod~", "A", "NOERROR", &["10.244.9.9"]),
        (111, "main", "base", "www.example.org.", "A", "NOERROR", &["192.0.2.80"]),
        (112, "deadup", "base", "www.example.org.", "A", "SERVFAIL", &[]),
        (114, "main", "db2-ready", "db-2.db.data.svc~", "A", "NOERROR", &["10.244.3.23"]),
        (115, "main", "db0-leaving", "db.data.svc~", "A", "NOERROR", &["10.244.2.22", "10.244.3.23"]),
        (
            116,
            "main",
            "db0-leaving",
            "db-all.data.svc~",
            "A",
            "NOERROR",
            &["10.244.1.21", "10.244.2.22", "10.244.3.23"],
        ),
    ];
    let mut covered: BTreeSet<u32> = rows.iter().map(|r| r.0).collect();
    let mut servers = BTreeMap::new();
    for (row, name, state, asked, rtype, rcode, answers) in rows {
        let full = |text: &str| text.replace('~', ".cluster.local.");
        let query = json!({"name": full(asked), "type": rtype, "class": "IN", "rd": true});
        let server = servers.entry(*name).or_insert_with(|| server(name));
        let got = decode(&ask(server, name, state, &message(&query), Transport::Udp).unwrap());
        assert_eq!(got.rcode, *rcode, "row {row}");
        let data = |line: &String| line.splitn(5, ' ').nth(4).unwrap().to_string();
        let got: BTreeSet<String> = got.sections[0].iter().map(data).collect();
        assert_eq!(got, answers.iter().map(|a| full(a)).collect(), "row {row}");
    }
    // Wide answers: all over TCP (row 105), cut to size over UDP (rows 103 and 104).
    let main = servers.get("main").unwrap();
    let wide = |transport, edns: Option<u16>| {
        let mut query = json!({"name": "wide.data.svc.cluster.local.", "type": "A", "class": "IN", "rd": true});
        if let Some(size) = edns {
            query["edns"] = json!({"size": size, "do": false, "version": 0, "options": []});
        }
        let got = decode(&ask(main, "main", "base", &message(&query), transport).unwrap());
        (got.sections[0].len(), got.flags.contains(&"TC"), got.edns.is_some())
    };
    assert_eq!(wide(Transport::Udp, None), (29, true, false));
    assert_eq!(wide(Transport::Udp, Some(1232)), (73, true, true));
    assert_eq!(wide(Transport::Tcp, None), (300, false, false));
    covered.extend([103, 104, 105]);
    let known = known_failing();
    for case in lines("golden/dns.jsonl").iter().filter(|c| !known.contains(c["id"].as_str().unwrap())) {
        let rows = case["row"].as_array().cloned().unwrap_or_else(|| vec![case["row"].clone()]);
        covered.extend(rows.iter().filter_map(Value::as_u64).map(|r| r as u32));
    }
    // Row 113 (more forwards at once than allowed) needs a forwarder; the server's test has it.
    let missing: Vec<u32> = (1..=116).filter(|r| *r != 113 && !covered.contains(r)).collect();
    assert!(missing.is_empty(), "rows without a test: {missing:?}");
}
