//! Memory of a large cluster's names. Run alone, because it looks at the whole process:
//! `cargo test -p portolan-dns --test it memory -- --ignored --nocapture`.

use std::time::Instant;

use portolan_plan::zone::{Options, ZoneBuilder};
use serde_json::json;

fn resident_mib() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: f64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096.0 / 1024.0 / 1024.0
}

#[test]
#[ignore = "measures the whole process, so it must run alone"]
fn ten_thousand_services_of_ten_endpoints_fit_in_25_mib() {
    let before = resident_mib();
    let mut builder = ZoneBuilder::new(Options::default());
    builder.set_namespace(&serde_json::from_value(json!({"metadata": {"name": "shop"}})).unwrap());
    let mut slowest = 0;
    for i in 0..10_000u32 {
        let [_, _, a, b] = i.to_be_bytes();
        let ip = format!("10.96.{a}.{b}");
        let name = format!("service-{i}");
        let service = json!({"metadata": {"namespace": "shop", "name": name},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "http", "port": 80}]}});
        let endpoints: Vec<_> = (0..10)
            .map(|e| {
                json!({"addresses": [format!("10.{}.{a}.{b}", 100 + e)],
            "targetRef": {"kind": "Pod", "name": format!("{name}-{e}")}})
            })
            .collect();
        let slice = json!({"metadata": {"namespace": "shop", "name": format!("{name}-abcde"),
            "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints});
        let (service, slice) = (serde_json::from_value(service).unwrap(), serde_json::from_value(slice).unwrap());
        let started = Instant::now();
        builder.set_service(&service);
        builder.set_slice(&slice);
        let published = builder.set().clone();
        slowest = slowest.max(started.elapsed().as_micros());
        drop(published);
    }
    let used = resident_mib() - before;
    println!("{used:.1} MiB, slowest change {slowest} us");
    assert!(used < 25.0, "{used:.1} MiB");
}
