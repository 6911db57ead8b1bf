//! Random histories of objects: what the incremental renderer leaves in a table equals what a fresh one makes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use portolan_dataplane::layout::{self, SetId};
use portolan_dataplane::{Change, ServiceProxy};
use portolan_nft::{Data, Element, Error, Executor, Fake, Op, Set, Table, Transaction, Value};
use portolan_plan::world::{IpFamily, ObjectKey};
use serde_json::{Value as Json, json};

use crate::lab;

/// A fake that the test can look into while a proxy uses it.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Fake>>);

impl Executor for Shared {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        self.0.lock().unwrap().commit(transaction)
    }
    fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error> {
        self.0.lock().unwrap().elements(table, set)
    }
    fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error> {
        self.0.lock().unwrap().chains(table)
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

fn change(random: &mut Random) -> Change {
    let n = random.below(5);
    let name = format!("s{n}");
    let key = ObjectKey::new("t", name.clone());
    match random.below(10) {
        0 => Change::service_gone(key),
        1 => Change::slice_gone(key),
        2..=4 => {
            let object = json!({
                "metadata": {"namespace": "t", "name": name},
                "spec": {
                    "type": random.pick(&["ClusterIP", "NodePort", "LoadBalancer"]),
                    "clusterIP": format!("10.96.0.{n}"), "clusterIPs": [format!("10.96.0.{n}"), format!("fd00:10:96::{n}")],
                    "ports": [{"port": 80, "nodePort": 30000 + n, "protocol": random.pick(&["TCP", "UDP"])}],
                    "externalTrafficPolicy": random.pick(&["Cluster", "Local"]),
                    "internalTrafficPolicy": random.pick(&["Cluster", "Local"]),
                    "sessionAffinity": random.pick(&["None", "ClientIP"]),
                    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": random.pick(&[60, 600])}},
                    "loadBalancerSourceRanges": random.pick(&[json!([]), json!(["192.168.50.0/24", "10.1.2.3/32"])]),
                    "externalIPs": random.pick(&[json!([]), json!(["198.51.100.1"])]),
                },
                "status": {"loadBalancer": {"ingress": [{"ip": format!("203.0.113.{n}")}]}},
            });
            Change::service(&serde_json::from_value(object).unwrap())
        }
        _ => {
            let endpoints: Vec<Json> = (0..random.below(7))
                .map(|_| {
                    json!({
                        "addresses": [format!("10.244.{}.{}", random.below(3), random.below(9) + 1)],
                        "nodeName": random.pick(&["n1", "n2"]),
                        "conditions": {"ready": random.below(10) > 1, "serving": true, "terminating": random.below(10) == 0},
                    })
                })
                .collect();
            let object = json!({
                "metadata": {"namespace": "t", "name": name, "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "ports": [{"name": "", "port": 8080, "protocol": "TCP"}, {"name": "", "port": 8081, "protocol": "UDP"}],
                "endpoints": endpoints,
            });
            Change::slice(&serde_json::from_value(object).unwrap())
        }
    }
}

type Content = BTreeMap<SetId, BTreeMap<Vec<Value>, Vec<Option<Data>>>>;

/// The elements with what may differ removed: slot order, and which numbers affinity uses.
fn content(fake: &mut Shared, family: IpFamily) -> (Content, BTreeSet<String>) {
    let table = layout::table(family);
    let sets = layout::Sets::default();
    let numbers: BTreeMap<Value, Data> = fake
        .elements(&table, sets.get(SetId::AffinityLive))
        .unwrap()
        .into_iter()
        .chain(fake.elements(&table, sets.get(SetId::AffinityLiveLocal)).unwrap())
        .flatten()
        .map(|e| (e.key[1], e.data.unwrap()))
        .collect();
    let mut all = Content::new();
    for id in SetId::ALL {
        for element in fake.elements(&table, sets.get(id)).unwrap().unwrap() {
            let mut key = element.key;
            let mut data = element.data;
            if let Some(Data::Values(values)) = &data
                && let [mark @ Value::Mark(_)] = values[..]
            {
                data = numbers.get(&mark).cloned();
            }
            match key.last() {
                Some(Value::Index(_)) => {
                    key.pop();
                }
                Some(Value::Mark(_)) => {
                    key.pop();
                }
                _ => {}
            }
            all.entry(id).or_default().entry(key).or_default().push(data);
        }
    }
    for set in all.values_mut() {
        for data in set.values_mut() {
            data.sort();
        }
    }
    let chains = fake.chains(&table).unwrap().into_iter().collect();
    (all, chains)
}

/// What was used lately is kept for a second, which need not pass here.
fn sweep(proxy: &mut ServiceProxy) {
    while proxy.sweep_due().is_some() {
        assert!(proxy.sweep().is_empty());
    }
}

#[test]
fn incremental_rendering_equals_rendering_from_scratch() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut fake = Shared::default();
        let mut proxy = ServiceProxy::with_executor(Box::new(fake.clone()), None, lab::node_view("n1"));
        let mut history = Vec::new();
        for step in 0..50 {
            for _ in 0..=random.below(2) {
                let change = change(&mut random);
                history.push(change.clone());
                proxy.change(change);
            }
            let report = proxy.sync();
            assert!(report.is_ok(), "seed {seed} step {step}: {report:?}");
        }
        sweep(&mut proxy);
        let mut fresh_fake = Shared::default();
        let mut fresh = ServiceProxy::with_executor(Box::new(fresh_fake.clone()), None, lab::node_view("n1"));
        for change in history {
            fresh.change(change);
        }
        assert!(fresh.sync().is_ok());
        for family in IpFamily::ALL {
            let (grown, chains) = content(&mut fake, family);
            let (made, fresh_chains) = content(&mut fresh_fake, family);
            assert_eq!(grown, made, "seed {seed} {family:?}");
            assert!(fresh_chains.is_subset(&chains), "seed {seed}: spare chains may stay, used ones must be there");
        }
        // A second look at a table that is as it should be changes no element and drops the spare chains.
        let before = content(&mut fake, IpFamily::V4);
        proxy.distrust_kernel();
        assert!(proxy.sync().is_ok());
        sweep(&mut proxy);
        let after = content(&mut fake, IpFamily::V4);
        assert_eq!(before.0, after.0, "seed {seed}");
        assert_eq!(after.1, content(&mut fresh_fake, IpFamily::V4).1, "seed {seed}");
    }
}

/// Counts what is asked of the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    transactions: usize,
    messages: usize,
    elements: usize,
    /// Times that something was read back.
    reads: usize,
}

#[derive(Clone, Default)]
struct Counting(Arc<Mutex<(Fake, Count)>>);

impl Executor for Counting {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        let mut held = self.0.lock().unwrap();
        held.1.transactions += 1;
        held.1.messages += portolan_nft::netlink::messages(transaction);
        held.1.elements += transaction
            .ops
            .iter()
            .map(|op| match op {
                Op::AddElements { elements, .. } | Op::DeleteElements { elements, .. } => elements.len(),
                _ => 0,
            })
            .sum::<usize>();
        held.0.commit(transaction)
    }
    fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error> {
        let mut held = self.0.lock().unwrap();
        held.1.reads += 1;
        held.0.elements(table, set)
    }
    fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error> {
        let mut held = self.0.lock().unwrap();
        held.1.reads += 1;
        held.0.chains(table)
    }
}

/// What the same changes of one Service cost in clusters of two sizes, and of that Service in two sizes.
#[test]
fn the_work_for_a_change_follows_the_size_of_its_service() {
    let slice = |service: &str, n: usize| {
        let endpoints: Vec<Json> =
            (0..n).map(|i| json!({"addresses": [format!("10.244.9.{}", i + 1)], "nodeName": "n1"})).collect();
        let object = json!({
            "metadata": {"namespace": "t", "name": service, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        });
        Change::slice(&serde_json::from_value(object).unwrap())
    };
    let service = |n: usize, affinity: &str| {
        let object = json!({
            "metadata": {"namespace": "t", "name": format!("s{n}")},
            "spec": {
                "type": "LoadBalancer", "clusterIP": format!("10.96.{}.{}", n / 250, n % 250 + 1), "externalTrafficPolicy": "Local",
                "ports": [{"port": 80, "nodePort": 30000 + n}], "sessionAffinity": affinity, "healthCheckNodePort": 20000 + n,
            },
            "status": {"loadBalancer": {"ingress": [{"ip": format!("203.0.{}.{}", n / 250, n % 250 + 1)}]}},
        });
        Change::service(&serde_json::from_value(object).unwrap())
    };
    let costs = |services: usize, endpoints: usize| {
        let kernel = Counting::default();
        let mut proxy = ServiceProxy::with_executor(Box::new(kernel.clone()), None, lab::node_view("n1"));
        for n in 0..services {
            proxy.change(service(n, if n % 2 == 0 { "None" } else { "ClientIP" }));
            // One after another: the Service in question is of its own size, all others are alike.
            proxy.change(slice(&format!("s{n}"), if n == 7 { endpoints } else { 5 }));
        }
        assert!(proxy.sync().is_ok());
        let changes = [
            slice("s7", endpoints + 1),
            slice("s7", endpoints),
            service(7, "None"),
            service(7, "ClientIP"),
            slice("s7", 0),
            Change::service_gone(ObjectKey::new("t", "s7")),
            service(7, "ClientIP"),
            slice("s7", endpoints),
            Change::slice_gone(ObjectKey::new("t", "s7")),
        ];
        changes
            .into_iter()
            .map(|change| {
                let (count, work) = (kernel.0.lock().unwrap().1, proxy.work());
                proxy.change(change);
                assert!(proxy.sync().is_ok());
                let (count_now, work_now) = (kernel.0.lock().unwrap().1, proxy.work());
                assert_eq!(count_now.reads, count.reads, "nothing is read back on the way");
                [
                    count_now.transactions - count.transactions,
                    count_now.messages - count.messages,
                    count_now.elements - count.elements,
                    (work_now.objects - work.objects) as usize,
                    (work_now.endpoints - work.endpoints) as usize,
                ]
            })
            .collect::<Vec<_>>()
    };
    let (small, large) = (costs(10, 20), costs(300, 20));
    assert_eq!(small, large, "transactions, messages, elements, objects and endpoints looked at");
    for (step, [transactions, messages, _, objects, endpoints]) in small.iter().enumerate() {
        assert!(*transactions <= 4 && *objects == 1 && *endpoints <= 21, "step {step}: {small:?}");
        assert!(*messages <= 100, "step {step}: {small:?}");
    }
    // One endpoint more or less does not follow the size of the Service in elements.
    let (few, many) = (costs(10, 20), costs(10, 200));
    for step in [0, 1] {
        assert_eq!(few[step][2], many[step][2], "elements of step {step}");
        assert!(few[step][2] <= 24, "elements of step {step}: {few:?}");
    }
}

#[test]
fn one_more_endpoint_costs_a_few_elements() {
    let slice = |n: usize, service: &str| {
        let endpoints: Vec<Json> = (0..n).map(|i| json!({"addresses": [format!("10.244.9.{}", i + 1)]})).collect();
        let object = json!({
            "metadata": {"namespace": "t", "name": service, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
        });
        Change::slice(&serde_json::from_value(object).unwrap())
    };
    let fake = Shared::default();
    let mut proxy = ServiceProxy::with_executor(Box::new(fake.clone()), None, lab::node_view("n1"));
    for n in 0..50 {
        let object = json!({
            "metadata": {"namespace": "t", "name": format!("s{n}")},
            "spec": {"clusterIP": format!("10.96.0.{n}"), "ports": [{"port": 80}]},
        });
        proxy.change(Change::service(&serde_json::from_value(object).unwrap()));
        proxy.change(slice(20, &format!("s{n}")));
    }
    assert!(proxy.sync().is_ok());
    for n in [21, 20, 19, 20] {
        let before = fake.0.lock().unwrap().changes;
        proxy.change(slice(n, "s7"));
        assert!(proxy.sync().is_ok());
        let cost = fake.0.lock().unwrap().changes - before;
        // A slot, the frontend's verdict (out and in again), the address for hairpin, and at first a pick chain's four rules.
        assert!(cost <= 4 + 4, "{n} endpoints cost {cost} changes");
    }
}
