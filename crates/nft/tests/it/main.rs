//! The executors against a real kernel, each test in a network namespace of its own that ends with its thread.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use portolan_nft::*;

/// Runs a test on a thread in a fresh network namespace.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn sets() -> Vec<Arc<Set>> {
    use FieldType::{Addr, Index, Mark, Port, Proto};
    let set = |name: &str, key: Vec<FieldType>, data, interval, dynamic| {
        Arc::new(Set { name: name.into(), key, data, interval, dynamic })
    };
    vec![
        set("frontends", vec![Addr, Proto, Port], Some(DataType::Verdict), false, None),
        set("slots", vec![Addr, Proto, Port, Index], Some(DataType::Values(vec![Addr, Port])), false, None),
        set("addresses", vec![Addr], None, false, None),
        set("ranges", vec![Addr, Proto, Port, Addr], None, true, None),
        set("numbers", vec![Proto, Port], Some(DataType::Values(vec![Mark])), false, None),
        set("live", vec![Proto, Mark], Some(DataType::Values(vec![Addr, Port])), false, None),
        set("memory", vec![Addr, Mark], Some(DataType::Values(vec![Mark])), false, Some(4096)),
    ]
}

fn elements(family: Family) -> Vec<Vec<Element>> {
    let a = |n: u8| -> Value {
        match family {
            Family::Ip => Value::V4([10, 0, 0, n].into()),
            Family::Ip6 => Value::V6([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n)].into()),
        }
    };
    let net = |text4: &str, text6: &str| Value::Net(if family == Family::Ip { text4 } else { text6 }.parse().unwrap());
    let tcp = Value::Proto(6);
    let key = |n: u8| vec![a(n), tcp, Value::Port(80)];
    let with = |n: u8, last: Value| key(n).into_iter().chain([last]).collect::<Vec<_>>();
    let endpoint = |n: u8| Data::Values(vec![a(n), Value::Port(8080)]);
    vec![
        vec![
            Element {
                comment: Some("shop/cart:http/TCP".into()),
                ..Element::new(key(1), Data::Verdict(Verdict::Goto("pick".into())))
            },
            Element::new(key(2), Data::Verdict(Verdict::Drop)),
        ],
        (0..700u32).map(|i| Element::new(with((i % 250) as u8, Value::Index(i)), endpoint(9))).collect(),
        vec![Element::key(vec![a(1)]), Element::key(vec![a(2)])],
        vec![
            Element::key(with(1, net("10.1.0.0/16", "fd00:1::/32"))),
            Element::key(with(1, net("10.2.3.4/32", "fd00:2::1/128"))),
        ],
        vec![Element::new(vec![tcp, Value::Port(30080)], Data::Values(vec![Value::Mark(0x8100)]))],
        vec![Element::new(vec![tcp, Value::Mark(0x8101)], endpoint(3))],
        vec![],
    ]
}

fn rules(family: Family) -> Vec<(&'static str, Vec<Statement>)> {
    let key = || vec![Field::DestinationAddr, Field::Proto, Field::DestinationPort];
    let with = |field| key().into_iter().chain([field]).collect::<Vec<_>>();
    let net = |text4: &str, text6: &str| if family == Family::Ip { text4 } else { text6 }.parse().unwrap();
    let all = Field::Mark { mask: u32::MAX };
    let client = || vec![Field::SourceAddr, Field::Mark { mask: 0xffff_bf00 }];
    vec![
        (
            "pick",
            vec![
                Statement::InputInterface { prefix: "vp".into(), negated: true },
                Statement::ChangeMark { keep: u32::MAX, set: 0x4000 },
            ],
        ),
        (
            "pick",
            vec![Statement::TranslateDestination { key: with(Field::Random { modulus: 3 }), map: "slots".into() }],
        ),
        (
            "pick",
            vec![Statement::SetMarkFromMap { key: vec![Field::Proto, Field::DestinationPort], map: "numbers".into() }],
        ),
        (
            "pick",
            vec![
                Statement::SetMarkFromMap { key: client(), map: "memory".into() },
                Statement::Update { map: "memory".into(), key: client(), data: all, timeout: Duration::from_secs(600) },
            ],
        ),
        (
            "pick",
            vec![Statement::TranslateDestination {
                key: vec![Field::Proto, Field::Mark { mask: !0x4000 }],
                map: "live".into(),
            }],
        ),
        ("pick", vec![Statement::Forget { map: "memory".into(), key: client(), data: all }]),
        ("pick", vec![Statement::Verdict(Verdict::Drop)]),
        ("refuse", vec![Statement::Reject(Rejection::TcpReset)]),
        ("refuse", vec![Statement::Reject(Rejection::PortUnreachable)]),
        ("pre", vec![Statement::VerdictMap { key: key(), map: "frontends".into() }]),
        (
            "pre",
            vec![
                Statement::InSet { key: vec![Field::DestinationAddr], set: "addresses".into(), negated: false },
                Statement::Verdict(Verdict::Goto("refuse".into())),
            ],
        ),
        (
            "pre",
            vec![
                Statement::InNetwork {
                    field: Field::DestinationAddr,
                    net: net("10.96.0.0/12", "fd00::/20"),
                    negated: false,
                },
                Statement::Verdict(Verdict::Drop),
            ],
        ),
        (
            "pre",
            vec![
                Statement::InNetwork {
                    field: Field::SourceAddr,
                    net: net("10.244.0.0/16", "fd00::/48"),
                    negated: true,
                },
                Statement::Verdict(Verdict::Accept),
            ],
        ),
        ("pre", vec![Statement::SourceIsLocal, Statement::Verdict(Verdict::Return)]),
        (
            "post",
            vec![
                Statement::MarkHas { mask: 0x4000 },
                Statement::ChangeMark { keep: !0x4000, set: 0 },
                Statement::Masquerade,
            ],
        ),
        ("post", vec![Statement::IsDestinationTranslated, Statement::Masquerade]),
    ]
}

fn everything(table: &Table) -> Transaction {
    let mut tx = Transaction::new(table.clone());
    tx.ops.push(Op::AddTable);
    let sets = sets();
    tx.ops.extend(sets.iter().cloned().map(Op::AddSet));
    let nat = |hook, priority| Some(Base { chain_type: ChainType::Nat, hook, priority });
    for (name, base) in
        [("pick", None), ("refuse", None), ("pre", nat(Hook::Prerouting, -100)), ("post", nat(Hook::Postrouting, 100))]
    {
        tx.ops.push(Op::AddChain { name: name.into(), base });
    }
    tx.ops.extend(
        rules(table.family).into_iter().map(|(chain, statements)| Op::AddRule { chain: chain.into(), statements }),
    );
    for (set, elements) in sets.iter().zip(elements(table.family)) {
        if !elements.is_empty() {
            tx.ops.push(Op::AddElements { set: set.clone(), elements });
        }
    }
    tx
}

type State = (Vec<(String, Vec<Vec<u8>>)>, Vec<Vec<Element>>);

fn state(table: &Table) -> State {
    let mut kernel = NetlinkExecutor::new().unwrap();
    let mut chains = kernel.chains(table).unwrap();
    chains.sort();
    let rules = chains
        .into_iter()
        .map(|chain| {
            let rules = kernel.raw_rules(table, &chain).unwrap();
            (chain, rules)
        })
        .collect();
    let elements = sets()
        .iter()
        .map(|set| {
            let mut elements = kernel.elements(table, set).unwrap().unwrap();
            elements.sort();
            elements
        })
        .collect();
    (rules, elements)
}

/// Each rule as a list of its expressions.
fn expressions(rules: Vec<Vec<u8>>) -> Vec<Vec<Vec<u8>>> {
    rules
        .into_iter()
        .map(|rule| {
            let mut rest = &rule[..];
            let mut expressions = Vec::new();
            while rest.len() >= 4 {
                let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
                expressions.push(rest[..len].to_vec());
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
            expressions
        })
        .collect()
}

#[test]
fn text_and_netlink_make_the_same_kernel_state() {
    in_namespace(|| {
        for family in [Family::Ip, Family::Ip6] {
            let table = Table { family, name: "both".into() };
            let mut states = Vec::new();
            let executors: [Box<dyn Executor>; 2] = [Box::new(TextExecutor), Box::new(NetlinkExecutor::new().unwrap())];
            for mut executor in executors {
                let mut tx = everything(&table);
                if family == Family::Ip6 {
                    // nft 1.0.6 aborts on a rule that adds to a map whose key is larger than 16 bytes.
                    let dynamic = |s: &Statement| matches!(s, Statement::Update { .. } | Statement::Forget { .. });
                    tx.ops.retain(|op| !matches!(op, Op::AddRule { statements, .. } if statements.iter().any(dynamic)));
                }
                executor.commit(&tx).unwrap();
                states.push(state(&table));
                executor.commit(&Transaction { table: table.clone(), ops: vec![Op::DeleteTable] }).unwrap();
            }
            let (text_rules, text_elements) = states.remove(0);
            let (netlink_rules, netlink_elements) = states.remove(0);
            assert_eq!(text_elements, netlink_elements);
            for ((chain, text), (_, netlink)) in text_rules.into_iter().zip(netlink_rules) {
                let (text, netlink) = (expressions(text), expressions(netlink));
                assert_eq!(text.len(), netlink.len(), "{chain}");
                for (i, (a, b)) in text.iter().zip(&netlink).enumerate() {
                    for (x, y) in a.iter().zip(b) {
                        assert_eq!(
                            String::from_utf8_lossy(x),
                            String::from_utf8_lossy(y),
                            "{family:?} {chain} rule {i}"
                        );
                        assert_eq!(x, y, "{family:?} {chain} rule {i}");
                    }
                    assert_eq!(a.len(), b.len(), "{family:?} {chain} rule {i}");
                }
            }
        }
    });
}

#[test]
fn what_is_written_is_read_back() {
    in_namespace(|| {
        for family in [Family::Ip, Family::Ip6] {
            let table = Table { family, name: "back".into() };
            let mut kernel = NetlinkExecutor::new().unwrap();
            assert_eq!(kernel.elements(&table, &sets()[0]).unwrap(), None, "no table yet");
            assert!(kernel.chains(&table).unwrap().is_empty());
            kernel.commit(&everything(&table)).unwrap();
            for (set, mut expected) in sets().iter().zip(elements(family)) {
                let mut read = kernel.elements(&table, set).unwrap().unwrap();
                read.sort();
                expected.sort();
                assert_eq!(read, expected, "{}", set.name);
            }
        }
    });
}

#[test]
fn nft_lists_what_is_written() {
    in_namespace(|| {
        for family in [Family::Ip, Family::Ip6] {
            let table = Table { family, name: "listed".into() };
            NetlinkExecutor::new().unwrap().commit(&everything(&table)).unwrap();
            let listed = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
            let text = String::from_utf8_lossy(&listed.stdout);
            assert!(listed.status.success(), "{family:?}: {}", String::from_utf8_lossy(&listed.stderr));
            for set in sets() {
                assert!(text.contains(&format!(" {} {{", set.name)), "{family:?} {}: {text}", set.name);
            }
        }
    });
}

#[test]
fn a_refused_transaction_leaves_nothing_and_says_which_step() {
    in_namespace(|| {
        let table = Table { family: Family::Ip, name: "atomic".into() };
        let mut kernel = NetlinkExecutor::new().unwrap();
        kernel.commit(&everything(&table)).unwrap();
        let sets = sets();
        let before = state(&table);
        let new = Element::key(vec![Value::V4([10, 9, 9, 9].into())]);
        let missing = Element::key(vec![Value::V4([10, 8, 8, 8].into())]);
        let error = kernel
            .commit(&Transaction {
                table: table.clone(),
                ops: vec![
                    Op::AddElements { set: sets[2].clone(), elements: vec![new] },
                    Op::DeleteElements { set: sets[2].clone(), elements: vec![missing] },
                ],
            })
            .unwrap_err();
        assert!(error.is_not_found(), "{error:?}");
        assert!(error.to_string().contains("10.8.8.8"), "{error}");
        assert_eq!(state(&table), before);
        // The socket is usable after a refusal.
        kernel.commit(&Transaction { table, ops: vec![Op::FlushSet { set: sets[2].clone() }] }).unwrap();
    });
}

#[test]
fn the_fake_refuses_what_the_kernel_refuses() {
    in_namespace(|| {
        let table = Table { family: Family::Ip, name: "judge".into() };
        let sets = sets();
        let element = |n: u8, verdict| {
            Element::new(
                vec![Value::V4([10, 0, 0, n].into()), Value::Proto(6), Value::Port(80)],
                Data::Verdict(verdict),
            )
        };
        let add = |e: Element| Op::AddElements { set: sets[0].clone(), elements: vec![e] };
        let rows: Vec<(&str, Vec<Op>)> = vec![
            ("add_existing_alike", vec![add(element(2, Verdict::Drop))]),
            ("add_existing_other_data", vec![add(element(2, Verdict::Accept))]),
            (
                "replace_in_one_go",
                vec![
                    Op::DeleteElements { set: sets[0].clone(), elements: vec![element(2, Verdict::Drop)] },
                    add(element(2, Verdict::Accept)),
                ],
            ),
            (
                "delete_missing",
                vec![Op::DeleteElements { set: sets[0].clone(), elements: vec![element(77, Verdict::Drop)] }],
            ),
            ("goto_missing_chain", vec![add(element(78, Verdict::Goto("nowhere".into())))]),
            (
                "delete_used_chain",
                vec![Op::FlushChain { name: "pick".into() }, Op::DeleteChain { name: "pick".into() }],
            ),
            ("delete_missing_chain", vec![Op::DeleteChain { name: "nowhere".into() }]),
            (
                "rule_in_missing_chain",
                vec![Op::AddRule { chain: "nowhere".into(), statements: vec![Statement::Verdict(Verdict::Drop)] }],
            ),
            (
                "lookup_in_missing_set",
                vec![Op::AddRule {
                    chain: "pick".into(),
                    statements: vec![Statement::VerdictMap { key: vec![Field::Proto], map: "nowhere".into() }],
                }],
            ),
            ("chain_again", vec![Op::AddChain { name: "pick".into(), base: None }]),
            (
                "new_chain_and_element",
                vec![Op::AddChain { name: "x".into(), base: None }, add(element(79, Verdict::Goto("x".into())))],
            ),
            (
                "unreference_and_delete_chain",
                vec![
                    Op::DeleteElements { set: sets[0].clone(), elements: vec![element(1, Verdict::Drop)] },
                    Op::FlushChain { name: "pick".into() },
                    Op::DeleteChain { name: "pick".into() },
                ],
            ),
        ];
        for (name, ops) in rows {
            let mut kernel = NetlinkExecutor::new().unwrap();
            let mut fake = Fake::default();
            kernel.commit(&everything(&table)).unwrap();
            fake.commit(&everything(&table)).unwrap();
            let tx = Transaction { table: table.clone(), ops };
            let (real, faked) = (kernel.commit(&tx), fake.commit(&tx));
            assert_eq!(real.is_ok(), faked.is_ok(), "{name}: kernel {real:?}, fake {faked:?}");
            kernel.commit(&Transaction { table: table.clone(), ops: vec![Op::DeleteTable] }).unwrap();
        }
    });
}
