//! Starting, stopping, crashing.

use std::process::Command;
use std::time::Duration;

use portolan_testkit::{Cluster, eventually, run};

use crate::{BINARY, LIMIT, up};

#[test]
fn a_cluster_starts_says_so_and_leaves_nothing_behind() {
    let mut cluster = Cluster::new(BINARY, "life");
    let told = cluster.portolan("status", &[]);
    assert_eq!(told.code, Some(1));
    assert!(told.stdout.contains("is not running; start it with"), "{told}");
    let rules_before = run(Command::new("nft").args(["list", "ruleset"])).stdout;
    let links_before = run(Command::new("ip").args(["-br", "link"])).stdout;

    let started = cluster.start(&["--nodes=3", "--zones=2"]).ok();
    assert!(started.contains("API server"), "{started}");
    let status = cluster.portolan("status", &["-o", "json"]).ok();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["ready"], true, "{status}");
    assert_eq!(status["nodes"].as_array().unwrap().len(), 3);
    let nodes = cluster.kubectl("get nodes -L topology.kubernetes.io/zone --no-headers").ok();
    assert_eq!(nodes.lines().filter(|l| l.contains(" Ready ")).count(), 3, "{nodes}");
    assert_eq!(nodes.lines().filter(|l| l.contains("zone-a")).count(), 2, "{nodes}");

    let mut again = Cluster::new(BINARY, "unused");
    again.name = cluster.name.clone();
    let refused = again.start(&[]);
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains("runs already"), "{refused}");
    std::mem::forget(again);

    assert_eq!(run(Command::new("nft").args(["list", "ruleset"])).stdout, rules_before, "the machine's own rules");
    assert_eq!(run(Command::new("ip").args(["-br", "link"])).stdout, links_before, "the machine's own links");

    cluster.portolan("down", &[]).ok();
    eventually("everything is gone", Duration::from_secs(5), || {
        let left = cluster.leftovers();
        if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
    });
    cluster.portolan("down", &["--purge"]).ok();
    assert!(!std::path::Path::new(&format!("/var/lib/portolan/{}", cluster.name)).exists());
}

#[test]
fn a_killed_cluster_is_cleaned_up_and_keeps_its_objects() {
    let mut cluster = up("crash");
    cluster.kubectl("create configmap kept --from-literal=a=b").ok();
    cluster.kubectl("create deployment web --image=portolan.dev/echo --replicas=2").ok();
    cluster.kubectl("set resources deployment/web --limits=memory=64Mi,cpu=500m").ok();
    cluster.kubectl("rollout status deployment/web --timeout=60s").ok();
    let limited = cluster.kubectl("get events --field-selector reason=FailedNodeAllocatableEnforcement -o name").ok();
    assert!(limited.is_empty() != cluster.cgroups().is_empty(), "limited pods have cgroups, or the node says why not");
    let pid = nix::unistd::Pid::from_raw(cluster.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    cluster.portolan("down", &[]).ok();
    eventually("everything is gone", Duration::from_secs(5), || {
        let left = cluster.leftovers();
        if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
    });

    cluster.start(&[]).ok();
    assert_eq!(cluster.kubectl("get configmap kept -o jsonpath={.data.a}").ok(), "b");
    cluster.kubectl("rollout status deployment/web --timeout=60s").ok();
    let pod = cluster.kubectl("get pods -l app=web -o jsonpath={.items[0].status.podIP}").ok();
    eventually("a pod answers", LIMIT, || {
        cluster.exec("node/node-1", &["curl", "-sS", "--max-time", "2", &format!("http://{pod}:8080/")]).has("\"pod\"")
    });
}

#[test]
fn two_clusters_run_side_by_side() {
    let a = up("side-a");
    let b = up("side-b");
    a.kubectl("create namespace only-in-a").ok();
    assert!(b.kubectl("get namespace only-in-a").failed().contains("NotFound"));
    for cluster in [&a, &b] {
        cluster.kubectl("get nodes").has("Ready").unwrap();
    }
}

#[test]
fn what_cannot_run_says_why_with_exit_code_2() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let cluster = Cluster::new(BINARY, "refused");
    let refused = cluster.portolan("up", &["--detach", &format!("--api-port={port}")]);
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains(&format!("127.0.0.1:{port}")), "{refused}");
    assert!(refused.stderr.contains("--api-port"), "{refused}");
    assert_eq!(cluster.leftovers(), Vec::<String>::new());

    let refused = cluster.portolan("up", &["--detach", "--runtime=/does/not/exist"]);
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains("crun"), "{refused}");
    let refused = cluster.portolan("exec", &["--", "true"]);
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains("is not running"), "{refused}");
    let refused = cluster.portolan("up", &["--nodes=0"]);
    assert_eq!(refused.code, Some(64), "{refused}");
}
