use super::*;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use std::collections::BTreeMap;

fn scratch(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("portolan-store-{name}-{}", uuid::Uuid::new_v4()))
}

/// Removes its directory also when a test fails.
struct Scratch(std::path::PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Model = BTreeMap<(String, String, String), i64>;

fn contents(store: &Store, resources: &[&str]) -> Model {
    let snapshot = store.snapshot();
    let mut found = Model::new();
    for resource in resources {
        for object in snapshot.list(resource, None) {
            let namespace = portolan_api::meta::namespace(&object.value).to_owned();
            let name = portolan_api::meta::name(&object.value).to_owned();
            assert_eq!(object.value["metadata"]["resourceVersion"], object.revision.to_string());
            found.insert(((*resource).to_owned(), namespace, name), object.value["n"].as_i64().expect("a number"));
        }
    }
    found
}

fn object(namespace: &str, name: &str, n: i64) -> Value {
    json!({"apiVersion": "v1", "kind": "Thing", "metadata": {"namespace": namespace, "name": name}, "n": n})
}

/// Random transactions, some refused, against a plain map; the store is reopened now and then.
async fn model_run(seed: u64, durability: Durability) {
    const RESOURCES: &[&str] = &["pods", "services"];
    let directory = Scratch(scratch("model"));
    std::fs::create_dir_all(&directory.0).expect("directory");
    let path = directory.0.join("store.redb");
    let mut random = StdRng::seed_from_u64(seed);
    let mut model = Model::new();
    let mut store = Store::open(&path, durability).expect("new store");
    let mut revision = 0;
    for step in 0..300 {
        let resource = RESOURCES[random.random_range(0..RESOURCES.len())];
        let namespace = ["a", "ab", "b"][random.random_range(0..3)];
        let name = format!("o{}", random.random_range(0..8));
        let (key, place) = (Key::new(namespace, &name), (resource.to_owned(), namespace.to_owned(), name.clone()));
        match random.random_range(0..10) {
            0..=5 => {
                store
                    .transact(|txn| {
                        txn.put(resource, &key, object(namespace, &name, step));
                        Ok(())
                    })
                    .await
                    .expect("put");
                model.insert(place, step);
            }
            6 | 7 => {
                let gone = store.transact(|txn| Ok(txn.delete(resource, &key).is_some())).await.expect("delete");
                assert_eq!(gone, model.remove(&place).is_some(), "seed {seed} step {step}");
            }
            8 => {
                let refused: Result<(), Status> = store
                    .transact(|txn| {
                        txn.put(resource, &key, object(namespace, &name, -1));
                        Err(Status::bad_request("no"))
                    })
                    .await;
                assert!(refused.is_err());
            }
            _ => {
                store.close().await;
                drop(store);
                store = Store::open(&path, durability).expect("reopened");
            }
        }
        assert!(store.snapshot().revision >= revision, "seed {seed} step {step}: the revision went back");
        revision = store.snapshot().revision;
        assert_eq!(contents(&store, RESOURCES), model, "seed {seed} step {step}");
    }
}

#[tokio::test]
async fn the_store_agrees_with_a_map_across_restarts() {
    for seed in 0..3 {
        model_run(seed, Durability::Synced).await;
        model_run(seed, Durability::Relaxed).await;
    }
}

#[tokio::test]
async fn one_namespace_is_listed_without_its_neighbours() {
    let store = Store::in_memory();
    store
        .transact(|txn| {
            for (namespace, name) in [("a", "x"), ("ab", "y"), ("b", "z"), ("a", "w")] {
                txn.put("pods", &Key::new(namespace, name), object(namespace, name, 0));
            }
            Ok(())
        })
        .await
        .expect("stored");
    let snapshot = store.snapshot();
    let names: Vec<&str> = snapshot.list("pods", Some("a")).map(|o| portolan_api::meta::name(&o.value)).collect();
    assert_eq!(names, ["w", "x"]);
    assert_eq!(snapshot.list("pods", None).count(), 4);
}

#[tokio::test]
async fn watchers_see_every_event_once_and_in_order_also_after_a_restart() {
    let directory = Scratch(scratch("watch"));
    std::fs::create_dir_all(&directory.0).expect("directory");
    let path = directory.0.join("store.redb");
    let store = Store::open(&path, Durability::Synced).expect("new store");
    let mut watcher = store.watch("pods", 0).expect("watch");
    let writer = store.clone();
    let write = async move {
        let mut written: Vec<u64> = Vec::new();
        for n in 0..50_i64 {
            let name = format!("o{}", n % 7);
            let revision = writer
                .transact(|txn| {
                    let key = Key::new("a", &name);
                    let pod = if n % 5 == 4 {
                        txn.delete("pods", &key).map(|gone| gone.revision)
                    } else {
                        Some(txn.put("pods", &key, object("a", &name, n)).revision)
                    };
                    txn.put("services", &Key::new("a", "s"), object("a", "s", n));
                    Ok(pod)
                })
                .await
                .expect("written");
            written.extend(revision);
        }
        // The last one tells the reader to stop.
        let end = writer.transact(|txn| Ok(txn.put("pods", &Key::new("a", "end"), object("a", "end", 0)).revision));
        written.push(end.await.expect("written"));
        written
    };
    let read = async {
        let mut seen: Vec<u64> = Vec::new();
        let mut ended = false;
        while !ended {
            watcher.changed().await;
            for event in watcher.read().expect("kept") {
                seen.push(event.object.revision);
                ended |= &*event.key.name == "end";
            }
        }
        seen
    };
    let limit = std::time::Duration::from_secs(20);
    let (written, seen) = tokio::time::timeout(limit, async { tokio::join!(write, read) }).await.expect("in time");
    assert_eq!(seen, written);
    let middle = seen[20];
    store.close().await;
    drop((store, watcher));
    let store = Store::open(&path, Durability::Synced).expect("reopened");
    let mut resumed = store.watch("pods", middle).expect("the history is kept");
    let after: Vec<u64> = resumed.read().expect("kept").iter().map(|event| event.object.revision).collect();
    assert_eq!(after, seen[21..]);
}

#[tokio::test]
async fn an_earlier_state_can_be_listed_while_its_events_are_kept() {
    let store = Store::in_memory();
    let mut states = Vec::new();
    for n in 0..20_i64 {
        let name = format!("o{}", n % 3);
        store
            .transact(|txn| {
                if n % 4 == 3 {
                    txn.delete("pods", &Key::new("a", &name));
                } else {
                    txn.put("pods", &Key::new("a", &name), object("a", &name, n));
                }
                Ok(())
            })
            .await
            .expect("written");
        let snapshot = store.snapshot();
        states.push((snapshot.revision, snapshot.collection("pods")));
    }
    for (revision, then) in states {
        let now = store.collection_at("pods", revision).expect("kept");
        let numbers = |collection: &Collection| -> Vec<(Key, i64)> {
            collection.iter().map(|(k, o)| (k.clone(), o.value["n"].as_i64().unwrap_or(-1))).collect()
        };
        assert_eq!(numbers(&now), numbers(&then), "at {revision}");
    }
}

/// Values by key.
type Values = BTreeMap<Key, i64>;

fn values(collection: &Collection) -> Values {
    collection.iter().map(|(key, object)| (key.clone(), object.value["n"].as_i64().unwrap_or(-1))).collect()
}

/// Clients that list and then watch from the list's revision, at any moment of a stream of writes: each ends with what is
/// there, has seen each change once and in order, and gets the list of an earlier revision as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_lists_and_then_watches_misses_nothing_among_concurrent_writers() {
    const WRITES: i64 = 1_500;
    let directory = Scratch(scratch("race"));
    std::fs::create_dir_all(&directory.0).expect("directory");
    let journalled =
        |durability| Store::open(&directory.0.join(format!("{durability:?}")), durability).expect("new store");
    for store in [Store::in_memory(), journalled(Durability::Relaxed), journalled(Durability::Synced)] {
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let store = store.clone();
                tokio::spawn(async move {
                    for n in 0..WRITES / if store.journal.is_some() { 10 } else { 1 } {
                        let written = store.transact(move |txn| {
                            let name = format!("o{}", (n * 7 + writer) % 11);
                            let key = Key::new("a", &name);
                            if n % 3 == 2 {
                                txn.delete("pods", &key);
                            } else {
                                txn.put("pods", &key, object("a", &name, n * 2 + writer));
                            }
                            if n % 5 == 0 {
                                txn.put("services", &Key::new("a", "s"), object("a", "s", n));
                            }
                            Ok(())
                        });
                        written.await.expect("written");
                    }
                })
            })
            .collect();
        let (stop, stopped) = tokio::sync::watch::channel(0_u64);
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let (store, mut stopped) = (store.clone(), stopped.clone());
                tokio::spawn(async move {
                    let mut lists = 0;
                    while lists == 0 || *stopped.borrow() == 0 {
                        lists += 1;
                        let snapshot = store.snapshot();
                        let mut known = values(&snapshot.collection("pods"));
                        let mut watcher = store.watch("pods", snapshot.revision).expect("kept");
                        let mut last = snapshot.revision;
                        // A few reads, or, in the end, until all has been seen.
                        let mut reads = 0;
                        loop {
                            for event in watcher.read().expect("kept") {
                                assert!(event.object.revision > last, "out of order");
                                last = event.object.revision;
                                let before = known.get(&event.key).copied();
                                let told = event.previous.as_ref().map(|o| o.value["n"].as_i64().unwrap_or(-1));
                                assert_eq!(before, told, "a change before this one has been missed");
                                match event.change {
                                    Change::Deleted => known.remove(&event.key),
                                    _ => {
                                        known.insert(event.key.clone(), event.object.value["n"].as_i64().unwrap_or(-1))
                                    }
                                };
                            }
                            reads += 1;
                            let end = *stopped.borrow();
                            if end == 0 && reads < 5 {
                                tokio::select! {
                                    () = watcher.changed() => {}
                                    _ = stopped.changed() => {}
                                }
                            } else if end > 0 && watcher.revision() < end {
                                // All is published by now.
                                continue;
                            } else {
                                break;
                            }
                        }
                        if *stopped.borrow() > 0 {
                            assert_eq!(known, values(&store.snapshot().collection("pods")));
                        }
                        let then = store.collection_at("pods", snapshot.revision).expect("kept");
                        assert_eq!(values(&then), values(&snapshot.collection("pods")), "at {}", snapshot.revision);
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.expect("a writer");
        }
        stop.send_replace(store.snapshot().revision);
        let all = futures::future::join_all(readers);
        for reader in tokio::time::timeout(std::time::Duration::from_secs(60), all).await.expect("in time") {
            reader.expect("a reader");
        }
        store.close().await;
    }
}

#[tokio::test]
async fn a_watcher_that_is_too_slow_is_told() {
    let store = Store::in_memory();
    let mut watcher = store.watch("pods", 0).expect("watch");
    for n in 0..5000_i64 {
        store
            .transact(|txn| {
                txn.put("pods", &Key::new("a", "o"), object("a", "o", n));
                Ok(())
            })
            .await
            .expect("written");
    }
    assert!(watcher.read().is_err());
    assert!(store.watch("pods", 1).is_err());
    assert!(store.watch("pods", 4900).is_ok());
}

#[tokio::test]
async fn a_refusal_and_a_simulation_leave_no_trace() {
    let store = Store::in_memory();
    let acted = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = acted.clone();
    store
        .simulate(move |txn| {
            txn.put("pods", &Key::new("a", "o"), object("a", "o", 1));
            txn.after_commit(move || flag.store(true, std::sync::atomic::Ordering::SeqCst));
            Ok(())
        })
        .expect("simulated");
    assert_eq!(store.snapshot().revision, 0);
    assert!(!acted.load(std::sync::atomic::Ordering::SeqCst));
}

#[test]
fn a_store_in_use_is_refused() {
    let directory = Scratch(scratch("lock"));
    std::fs::create_dir_all(&directory.0).expect("directory");
    let path = directory.0.join("store.redb");
    let _store = Store::open(&path, Durability::Synced).expect("new store");
    assert!(matches!(Store::open(&path, Durability::Synced), Err(Error::InUse(_))));
}
