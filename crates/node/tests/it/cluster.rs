//! One node in a namespace of its own, with everything below a temporary directory; removed on drop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use portolan_linux::{Netlink, Netns, set_sysctl};
use portolan_node::{ImageStore, Kubelet, NodeConfig, RuntimeConfig};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::api::FakeApi;

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Node {
    pub dir: PathBuf,
    pub netns: Netns,
    pub api: Arc<FakeApi>,
    pub kubelet: Kubelet,
    pub config: NodeConfig,
}

/// The built example program that stands in for the `portolan` binary.
pub fn program() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.parent().unwrap().parent().unwrap().join("examples/agent");
    assert!(path.exists(), "{} is built by cargo test", path.display());
    path
}

impl Node {
    pub async fn start(name: &str) -> Node {
        Node::start_with(name, |_| {}).await
    }

    /// A node whose images come from registries when they are missing.
    pub async fn pulling(name: &str) -> Node {
        Node::start_with(name, |config| config.allow_pull = true).await
    }

    async fn start_with(name: &str, change: impl FnOnce(&mut NodeConfig)) -> Node {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ptln-{name}-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let netns = Netns::create(dir.join("netns/node")).expect("tests of the node agent need root");
        let netlink = Netlink::open(&netns).unwrap();
        netlink.set_up("lo").await.unwrap();
        netlink.add_address("lo", "192.168.50.11/32".parse().unwrap()).await.unwrap();
        set_sysctl(&netns, "net/ipv4/ip_forward", "1").unwrap();
        let resolv = dir.join("resolv.conf");
        std::fs::write(&resolv, "nameserver 192.0.2.53\nsearch host.example\n").unwrap();
        let mut config = NodeConfig {
            name: "node-1".into(),
            zone: "zone-a".into(),
            netns: netns.clone(),
            pod_cidr: "10.244.1.0/24".parse().unwrap(),
            node_ip: "192.168.50.11".parse().unwrap(),
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
            images: ImageStore::open_with_program(dir.join("images"), program()).unwrap(),
            allow_pull: false,
            runtime: RuntimeConfig::default(),
            host_resolv_conf: Some(resolv),
            max_pods: 110,
        };
        change(&mut config);
        let api = Arc::new(FakeApi::default());
        let kubelet = Kubelet::prepare(config.clone(), api.clone()).await.unwrap();
        Node { dir, netns, api, kubelet, config }
    }

    /// Gives the agent a pod with this spec.
    pub fn run(&self, name: &str, spec: Value) -> Pod {
        let pod = pod(name, spec);
        self.kubelet.apply(pod.clone());
        pod
    }

    /// Deletes a pod as the API server does: the object stays, with a deletion time.
    pub fn delete(&self, pod: &Pod, grace: i64) {
        let mut pod = pod.clone();
        pod.metadata.deletion_timestamp = Some(Time(Timestamp::now() + jiff::SignedDuration::from_secs(grace)));
        pod.metadata.deletion_grace_period_seconds = Some(grace);
        self.kubelet.apply(pod);
    }

    pub async fn deleted(&self, name: &str) {
        self.api.wait(&format!("deletion of {name}"), 20, |s| s.deleted.iter().any(|d| d == name).then_some(())).await;
    }

    /// An HTTP request from the node to a pod; the body of the answer.
    pub async fn get(&self, address: SocketAddr, path: &str) -> std::io::Result<String> {
        let mut stream = self.connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    pub async fn connect(&self, address: SocketAddr) -> std::io::Result<tokio::net::TcpStream> {
        let socket = self.netns.run(tokio::net::TcpSocket::new_v4)??;
        tokio::time::timeout(Duration::from_secs(20), socket.connect(address)).await?
    }

    /// A request to the kubelet's API without upgrade: status and body.
    pub async fn kubelet_get(&self, path: &str) -> (u16, String) {
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let kubelet = self.kubelet.clone();
        tokio::spawn(async move { kubelet.serve_connection(server).await });
        let request = format!("GET {path} HTTP/1.0\r\nHost: kubelet\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(Duration::from_secs(20), client.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, body.to_string())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kubelet.abandon();
        let _ = portolan_node::cleanup(&self.config.run_dir, &self.config.state_dir);
        let _ = Netns::delete(self.netns.path());
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub fn pod(name: &str, spec: Value) -> Pod {
    static UID: AtomicU32 = AtomicU32::new(0);
    let uid =
        format!("00000000-0000-0000-{:04x}-{:012x}", std::process::id() & 0xffff, UID.fetch_add(1, Ordering::Relaxed));
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "shop", "uid": uid, "labels": {"app": name},
                     "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": spec,
    }))
    .unwrap()
}

/// A pod of one shell container.
pub fn shell(script: &str) -> Value {
    json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 5,
           "containers": [{"name": "main", "image": "portolan.dev/toolbox", "command": ["/bin/sh", "-c", script]}]})
}

/// Like [`shell`], ready once the script has made the file `/tmp/up`: its traps are set then.
pub fn shell_with_trap(script: &str) -> Value {
    let mut spec = shell(script);
    spec["containers"][0]["readinessProbe"] =
        json!({"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1});
    spec
}

/// Processes that see anything of `dir` in their mounts, and mounts of this process below it.
pub fn traces(dir: &Path) -> Vec<String> {
    let needle = dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid.bytes().all(|b| b.is_ascii_digit()) {
            let mounts = std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
            for line in mounts.lines().filter(|l| l.contains(&needle)) {
                // The node's own namespace is the test's.
                if !line.contains("/netns/node ") {
                    let command = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
                    found.push(format!("{pid} {}: {line}", command.replace('\0', " ")));
                }
            }
        }
    }
    found
}
