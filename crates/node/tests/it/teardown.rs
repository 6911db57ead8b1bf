//! Nothing stays behind: not after deletion, not after the agent, not after its sudden death.

use std::time::Duration;

use portolan_linux::Netlink;
use serde_json::json;

use crate::cluster::{Node, program, shell, traces};

async fn links(node: &Node) -> Vec<String> {
    let links = Netlink::open(&node.netns).unwrap().links().await.unwrap();
    links.into_iter().map(|l| l.name).filter(|name| name != "lo").collect()
}

/// Dead children that nobody has waited for. Other tests of this process start and end commands all the time, so only those
/// that stay count.
fn zombies() -> Vec<String> {
    let own = format!("PPid:\t{}\n", std::process::id());
    let statuses = std::fs::read_dir("/proc").unwrap().flatten();
    let statuses = statuses.filter_map(|e| std::fs::read_to_string(e.path().join("status")).ok());
    let dead = statuses.filter(|s| s.contains(&own) && s.contains("State:\tZ"));
    dead.filter_map(|s| s.lines().find(|l| l.starts_with("Pid:")).map(str::to_string)).collect()
}

async fn gone(node: &Node) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let mut dead = zombies();
    loop {
        let (traces, links) = (traces(&node.dir), links(node).await);
        let now = zombies();
        dead.retain(|pid| now.contains(pid));
        if traces.is_empty() && links.is_empty() && dead.is_empty() {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "left behind: {traces:#?} {links:?} {dead:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn pods_of_all_sorts(node: &Node) -> Vec<k8s_openapi::api::core::v1::Pod> {
    let mut memory = shell("trap 'exit 0' TERM; while :; do sleep 0.1; done");
    memory["volumes"] = json!([{"name": "m", "emptyDir": {"medium": "Memory"}}]);
    memory["containers"][0]["volumeMounts"] = json!([{"name": "m", "mountPath": "/m"}]);
    memory["containers"][0]["resources"] = json!({"limits": {"memory": "64Mi"}});
    vec![
        node.run("web", json!({"containers": [{"name": "web", "image": "portolan.dev/echo"}]})),
        node.run("memory", memory),
        node.run("family", shell("sleep 600 & sleep 600 & trap 'exit 0' TERM; while :; do sleep 0.1; done")),
        node.run("deaf", shell("trap '' TERM; while :; do sleep 0.1; done")),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_pods_leave_no_process_mount_or_link() {
    let node = Node::start("leak").await;
    let pods = pods_of_all_sorts(&node);
    for pod in &pods {
        node.api.ready(pod.metadata.name.as_deref().unwrap()).await;
    }
    assert_eq!(links(&node).await.len(), 4);
    for pod in &pods {
        node.delete(pod, 1);
    }
    for pod in &pods {
        node.deleted(pod.metadata.name.as_deref().unwrap()).await;
    }
    gone(&node).await;
    for dir in [node.config.run_dir.join("node/node-1/pods"), node.config.state_dir.join("node/node-1/pods")] {
        let left: Vec<_> = std::fs::read_dir(&dir).unwrap().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty() || dir.starts_with(&node.config.state_dir), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_stops_takes_its_containers_with_it() {
    let node = Node::start("stop").await;
    let pods = pods_of_all_sorts(&node);
    for pod in &pods {
        node.api.ready(pod.metadata.name.as_deref().unwrap()).await;
    }
    node.kubelet.abandon();
    tokio::time::timeout(Duration::from_secs(10), node.kubelet.stopped()).await.unwrap();
    gone(&node).await;
    assert!(node.api.store().deleted.is_empty(), "their objects are not the agent's to delete");
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_removes_what_a_killed_agent_left() {
    use std::io::BufRead;
    let node = Node::start("dead").await;
    let mut agent = std::process::Command::new(program())
        .args(["hold".as_ref(), node.dir.as_os_str()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "running\n");
    assert!(traces(&node.dir).iter().any(|t| t.contains("sleep")), "{:#?}", traces(&node.dir));
    agent.kill().unwrap();
    agent.wait().unwrap();
    let mut bystander = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    assert!(!traces(&node.dir).is_empty(), "containers outlive their agent");

    portolan_node::cleanup(&node.dir.join("held/run"), &node.dir.join("held/state")).unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !traces(&node.dir).is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "left behind: {:#?}", traces(&node.dir));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!node.dir.join("held/run/node").exists() && !node.dir.join("held/state/node").exists());
    assert!(bystander.try_wait().unwrap().is_none(), "what is not ours lives");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    portolan_node::cleanup(&node.dir.join("held/run"), &node.dir.join("held/state")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_agent_begins_anew_and_says_so() {
    let node = Node::start("again").await;
    let mut spec = shell("trap 'exit 0' TERM; while :; do sleep 0.1; done");
    spec["restartPolicy"] = json!("Always");
    let mut pod = node.run("web", spec);
    let status = node.api.ready("web").await;
    node.kubelet.abandon();
    node.kubelet.stopped().await;

    let kubelet = portolan_node::Kubelet::prepare(node.config.clone(), node.api.clone()).await.unwrap();
    pod.status = Some(status);
    kubelet.apply(pod);
    let status = node
        .api
        .status("web", "restarted", |s| {
            s.container_statuses.as_ref().is_some_and(|c| c[0].restart_count == 1 && c[0].ready)
        })
        .await;
    let last = status.container_statuses.unwrap()[0].last_state.clone().unwrap().terminated.unwrap();
    assert_eq!((last.exit_code, last.reason.as_deref()), (137, Some("ContainerStatusUnknown")));
    kubelet.abandon();
    kubelet.stopped().await;
    gone(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_force_deleted_pod_is_still_stopped() {
    let node = Node::start("force").await;
    let pod = node.run("deaf", shell("trap '' TERM; while :; do sleep 0.1; done"));
    node.api.ready("deaf").await;
    node.kubelet.remove(pod.metadata.uid.as_deref().unwrap());
    gone(&node).await;
}
