//! The proxy over time: restarts, interference, change under load, size.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use portolan_dataplane::applier::{self, Mailbox};
use portolan_dataplane::{Change, ServiceProxy, layout, monitor};
use portolan_nft::{Executor, NetlinkExecutor, Op, Transaction};
use portolan_plan::world::IpFamily;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::lab::{self, Lab};
use crate::probe::{self, Seen};

fn service(name: &str, ip: &str, spec: Value) -> Change {
    let mut object = json!({
        "metadata": {"namespace": "t", "name": name},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
    });
    for (key, value) in spec.as_object().unwrap() {
        object["spec"][key] = value.clone();
    }
    Change::service(&serde_json::from_value(object).unwrap())
}

fn slice(service: &str, addresses: &[String]) -> Change {
    let endpoints: Vec<Value> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
    let object = json!({
        "metadata": {"namespace": "t", "name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
    });
    Change::slice(&serde_json::from_value(object).unwrap())
}

fn addresses(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| lab::address(n).unwrap().to_string()).collect()
}

fn proxy_of(lab: &Lab, changes: &[Change]) -> ServiceProxy {
    let mut proxy = ServiceProxy::new(&lab.spaces["n1"], lab::node_view("n1")).unwrap();
    proxy.change(crate::case::service_range());
    for change in changes {
        proxy.change(change.clone());
    }
    let report = proxy.sync();
    assert!(report.is_ok(), "{report:?}");
    proxy
}

fn lab_with_echo() -> (Lab, JoinSet<()>) {
    let lab = Lab::build();
    let mut servers = JoinSet::new();
    for pod in lab::PODS {
        crate::echo::start(&mut servers, &lab.spaces[pod], pod, &[lab::address(pod).unwrap()], &[8080]);
    }
    (lab, servers)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A client that connects all the time while `work` runs on another thread; answers tries and failures.
async fn under_load(lab: &Lab, from: &str, to: SocketAddr, work: impl FnOnce() + Send) -> (usize, Vec<Seen>) {
    let done = AtomicBool::new(false);
    let tries = AtomicUsize::new(0);
    let client = async {
        let mut failures = Vec::new();
        while !done.load(Ordering::Relaxed) {
            match probe::once(&lab.spaces[from], "tcp", to, None, Duration::from_secs(5)).await {
                Seen::Reply { .. } => {}
                other => failures.push(other),
            }
            tries.fetch_add(1, Ordering::Relaxed);
        }
        failures
    };
    // The client runs on a thread of its own, because the work blocks this one.
    let failures = std::thread::scope(|scope| {
        let handle = tokio::runtime::Handle::current();
        let client = scope.spawn(move || handle.block_on(client));
        tokio::task::block_in_place(work);
        done.store(true, Ordering::Relaxed);
        client.join().unwrap()
    });
    (tries.load(Ordering::Relaxed), failures)
}

#[test]
fn a_restart_and_changes_under_load_lose_no_connection() {
    runtime().block_on(async {
        let (lab, _servers) = lab_with_echo();
        let objects = vec![
            service("web", "10.96.10.1", json!({})),
            slice("web", &addresses(&["p1a", "p2a", "p3a"])),
            service("sticky", "10.96.10.2", json!({"sessionAffinity": "ClientIP"})),
            slice("sticky", &addresses(&["p1a", "p1b", "p2a", "p2b", "p3a", "p3b"])),
        ];
        let mut proxy = proxy_of(&lab, &objects);
        let to: SocketAddr = "10.96.10.1:80".parse().unwrap();
        let sticky: SocketAddr = "10.96.10.2:80".parse().unwrap();
        let Seen::Reply { name: bound, .. } =
            probe::once(&lab.spaces["p1b"], "tcp", sticky, None, Duration::from_secs(5)).await
        else {
            panic!("no answer")
        };

        let (tries, failures) = under_load(&lab, "p1b", to, || {
            let all = ["p1a", "p1b", "p2a", "p2b", "p3a", "p3b"];
            for i in 0..300 {
                // The endpoint in common is never away; everything else comes and goes.
                let set: Vec<&str> = all
                    .iter()
                    .enumerate()
                    .filter(|(k, _)| *k == 0 || (i >> (k - 1)) & 1 == 1)
                    .map(|(_, n)| *n)
                    .collect();
                proxy.change(slice("web", &addresses(&set)));
                assert!(proxy.sync().is_ok());
                if i % 20 == 0 {
                    drop(std::mem::replace(&mut proxy, proxy_of(&lab, &objects)));
                }
            }
        })
        .await;
        assert!(failures.is_empty(), "{} of {tries} failed: {failures:?}", failures.len());
        assert!(tries > 20, "the client was busy: {tries}");
        for _ in 0..10 {
            let seen = probe::once(&lab.spaces["p1b"], "tcp", sticky, None, Duration::from_secs(5)).await;
            assert!(
                matches!(&seen, Seen::Reply { name, .. } if *name == bound),
                "bound to {bound} before the restarts, now {seen:?}"
            );
        }
    });
}

#[test]
fn a_table_of_another_layout_is_replaced_without_a_gap() {
    runtime().block_on(async {
        let (lab, _servers) = lab_with_echo();
        let objects = [service("web", "10.96.10.1", json!({})), slice("web", &addresses(&["p1a", "p2a"]))];
        drop(proxy_of(&lab, &objects));
        // Without the marker the table looks like another version's.
        let mut kernel = lab.spaces["n1"].run(NetlinkExecutor::new).unwrap().unwrap();
        for family in IpFamily::ALL {
            let ops = vec![Op::DeleteChain { name: layout::MARKER.into() }];
            kernel.commit(&Transaction { table: layout::table(family), ops }).unwrap();
        }
        let (tries, failures) = under_load(&lab, "p1b", "10.96.10.1:80".parse().unwrap(), || {
            std::mem::drop(proxy_of(&lab, &objects));
        })
        .await;
        assert!(failures.is_empty(), "{} of {tries} failed: {failures:?}", failures.len());
        let chains = kernel.chains(&layout::table(IpFamily::V4)).unwrap();
        assert!(chains.iter().any(|c| c == layout::MARKER), "{chains:?}");
    });
}

#[test]
fn interference_is_put_right_within_a_second() {
    let space = lab::unnamed_namespace();
    let mailbox = Mailbox::default();
    let mut proxy = ServiceProxy::new(&space, lab::node_view("n1")).unwrap();
    proxy.change(service("web", "10.96.10.1", json!({})));
    proxy.change(slice("web", &["10.244.1.1".to_owned()]));
    let own = proxy.port_id();
    let healed = Arc::new(AtomicUsize::new(0));
    let applier = {
        let (mailbox, healed) = (mailbox.clone(), healed.clone());
        std::thread::spawn(move || {
            applier::run(proxy, &mailbox, |applied| {
                assert!(applied.report.is_ok(), "{:?}", applied.report);
                healed.fetch_add(usize::from(applied.healed), Ordering::Relaxed);
            });
        })
    };
    let monitor = monitor::watch(&space, own, mailbox.clone()).unwrap();
    mailbox.services_listed();
    mailbox.node_listed();
    mailbox.pods_listed();
    let table = layout::table(IpFamily::V4);
    let mut other = space.run(NetlinkExecutor::new).unwrap().unwrap();
    assert!(other.chains(&table).unwrap().is_empty(), "nothing is programmed before both lists are there");
    mailbox.slices_listed();

    let sets = layout::Sets::default();
    let frontends = sets.get(layout::SetId::Frontends).clone();
    let whole = |other: &mut NetlinkExecutor| {
        let elements = other.elements(&table, &frontends).unwrap().map_or(0, |e| e.len());
        let chains = other.chains(&table).unwrap();
        let rules: usize = chains.iter().map(|c| other.raw_rules(&table, c).unwrap().len()).sum();
        (elements, chains.len(), rules)
    };
    let eventually = |other: &mut NetlinkExecutor, wanted: Option<(usize, usize, usize)>, limit: Duration| {
        let start = Instant::now();
        loop {
            let seen = whole(other);
            if wanted.map_or(seen.0 == 1, |w| w == seen) {
                return seen;
            }
            assert!(start.elapsed() < limit, "wanted {wanted:?}, saw {seen:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    // The first sync ends with the chain of the service ranges and, without ranges, changes nothing that is counted here.
    let good = eventually(&mut other, None, Duration::from_secs(10));
    assert_eq!(healed.load(Ordering::Relaxed), 0, "our own changes are no interference");
    let services = "services";
    for ops in [
        vec![Op::DeleteTable],
        vec![Op::FlushChain { name: services.into() }],
        vec![Op::FlushSet { set: frontends.clone() }],
    ] {
        other.commit(&Transaction { table: table.clone(), ops: ops.clone() }).unwrap();
        // A second is the promise; a busy machine gets some more.
        eventually(&mut other, Some(good), Duration::from_secs(3));
    }
    // The applier counts after the kernel has committed.
    let deadline = Instant::now() + Duration::from_secs(3);
    while healed.load(Ordering::Relaxed) < 3 {
        assert!(Instant::now() < deadline, "healed {} times", healed.load(Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(monitor);
    mailbox.close();
    applier.join().unwrap();
    assert_eq!(whole(&mut other), good, "the rules stay after the end");
}

/// `SCALE` sets the number of Services.
#[test]
fn one_endpoint_change_takes_milliseconds() {
    let services: u32 = std::env::var("SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1000);
    let space = lab::unnamed_namespace();
    let mut proxy = ServiceProxy::new(&space, lab::node_view("n1")).unwrap();
    proxy.change(crate::case::service_range());
    let endpoints = |i: u32, first: u32| -> Vec<String> {
        (0..10)
            .map(|k| std::net::Ipv4Addr::from(0x0a80_0000 + i * 16 + if k == 0 { first } else { k }).to_string())
            .collect()
    };
    for i in 0..services {
        let ip = std::net::Ipv4Addr::from(0x0a60_0100 + i).to_string();
        proxy.change(service(&format!("s{i}"), &ip, json!({})));
        proxy.change(slice(&format!("s{i}"), &endpoints(i, 0)));
    }
    let start = Instant::now();
    assert!(proxy.sync().is_ok());
    let first = start.elapsed();
    let mut times: Vec<Duration> = (0..100u32)
        .map(|i| {
            let target = i * 7 % services;
            let change = slice(&format!("s{target}"), &endpoints(target, 11 + i % 2));
            let start = Instant::now();
            proxy.change(change);
            assert!(proxy.sync().is_ok());
            start.elapsed()
        })
        .collect();
    times.sort();
    println!(
        "{services} services x 10: first sync {first:?}, endpoint swap p50 {:?} p99 {:?} max {:?}",
        times[49], times[98], times[99]
    );
    // 20 ms is what a change may cost; the median, because other tests share the machine.
    assert!(times[49] < Duration::from_millis(20), "{:?}", times[49]);
}
