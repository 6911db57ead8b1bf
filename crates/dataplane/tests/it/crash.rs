//! `kill -9` of a real agent process at random moments, while endpoints change and clients connect.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use portolan_apiserver::{Server, ServerConfig, User};
use portolan_dataplane::layout::{self, SetId};
use portolan_dataplane::{AgentConfig, run};
use portolan_linux::Netns;
use portolan_nft::{Data, Element, Executor, NetlinkExecutor, Value};
use portolan_observe::Observer;
use portolan_plan::world::IpFamily;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::lab;
use crate::life::{lab_with_echo, runtime, under_load};

const KUBECONFIG: &str = "PORTOLAN_TEST_KUBECONFIG";
const NETNS: &str = "PORTOLAN_TEST_NETNS";
const DEADLINE: Duration = Duration::from_secs(60);
const KILLS: u32 = 12;
/// Services beside the one that is watched, so that a first sync takes several commits.
const OTHERS: usize = 150;

/// The agent process of the test below; by itself it does nothing.
#[test]
#[ignore = "started by the test of kills"]
fn agent_process() {
    let (Some(kubeconfig), Some(netns)) = (std::env::var_os(KUBECONFIG), std::env::var_os(NETNS)) else { return };
    runtime().block_on(async {
        let client = portolan_client::connect(Some(&PathBuf::from(kubeconfig))).await.unwrap();
        let mut config = AgentConfig::new("n1", Netns::open(PathBuf::from(netns)).unwrap(), "vp");
        config.healthz_address = None;
        config.metrics_address = None;
        run(config, client, Observer::new(), CancellationToken::new()).await.unwrap();
    });
}

/// Kills the agent when dropped, and removes the kubeconfig.
struct Agent {
    child: Child,
}

impl Agent {
    fn start(kubeconfig: &Path, space: &Netns) -> Agent {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["crash::agent_process", "--exact", "--ignored"])
            .env(KUBECONFIG, kubeconfig)
            .env(NETNS, format!("/proc/{}/fd/{}", std::process::id(), space.as_raw_fd()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Agent { child }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill(); // SIGKILL
        let _ = self.child.wait();
    }
}

struct File(PathBuf);

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The endpoints that the kernel has for a cluster IP and for a node port; none unless the node port has an address.
fn endpoints(kernel: &mut NetlinkExecutor, ip: &str, node_port: u16) -> [BTreeSet<String>; 2] {
    let sets = layout::Sets::default();
    let mut all = |id: SetId| kernel.elements(&layout::table(IpFamily::V4), sets.get(id)).unwrap().unwrap_or_default();
    let addressed = !all(SetId::NodePortAddresses).is_empty();
    let ip = Value::V4(ip.parse().unwrap());
    let of = |elements: Vec<Element>, wanted: &dyn Fn(&Element) -> bool| {
        elements
            .into_iter()
            .filter(wanted)
            .filter_map(|e| match e.data {
                Some(Data::Values(values)) => match values[..] {
                    [Value::V4(addr), _] => Some(addr.to_string()),
                    _ => None,
                },
                _ => None,
            })
            .collect()
    };
    [
        of(all(SetId::Slots), &|e| e.key[0] == ip),
        of(all(SetId::NodePortSlots), &|e| addressed && e.key[1] == Value::Port(node_port)),
    ]
}

fn from<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn slice(name: &str, addresses: &[String]) -> EndpointSlice {
    from(json!({
        "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": addresses.iter().map(|a| json!({"addresses": [a]})).collect::<Vec<_>>(),
    }))
}

#[test]
fn a_killed_agent_leaves_no_gap() {
    runtime().block_on(async {
        let (lab, _servers) = lab_with_echo();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let mut config = ServerConfig::new("203.0.113.10:6443".parse().unwrap());
        config.listeners = vec![listener];
        let server = Server::start(config).await.unwrap();
        let file = File(std::env::temp_dir().join(format!("portolan-crash-{}.yaml", std::process::id())));
        std::fs::write(&file.0, server.kubeconfig(&url).unwrap()).unwrap();
        let admin = Client::new(server.local_service(User::new("test", &["system:masters"])), "default");

        let create = PostParams::default();
        let nodes: Api<Node> = Api::all(admin.clone());
        let address = lab::address("n1").unwrap().to_string();
        let status = json!({"addresses": [{"type": "InternalIP", "address": address}]});
        nodes.create(&create, &from(json!({"metadata": {"name": "n1"}}))).await.unwrap();
        nodes.patch_status("n1", &PatchParams::default(), &Patch::Merge(json!({"status": status}))).await.unwrap();
        let services: Api<Service> = Api::namespaced(admin.clone(), "default");
        let slices: Api<EndpointSlice> = Api::namespaced(admin.clone(), "default");
        let web = json!({"metadata": {"name": "web"}, "spec": {"type": "NodePort", "clusterIP": "10.96.10.1", "ports": [{"port": 80, "nodePort": 30080}]}});
        services.create(&create, &from(web)).await.unwrap();
        let pods: Vec<String> = lab::PODS.iter().map(|p| lab::address(p).unwrap().to_string()).collect();
        slices.create(&create, &slice("web", &pods[..1])).await.unwrap();
        for i in 0..OTHERS {
            let object = json!({"metadata": {"name": format!("other-{i}")}, "spec": {"ports": [{"port": 80}]}});
            services.create(&create, &from(object)).await.unwrap();
            let many: Vec<String> = (1..=40).map(|k| format!("10.200.{i}.{k}")).collect();
            slices.create(&create, &slice(&format!("other-{i}"), &many)).await.unwrap();
        }

        let space = &lab.spaces["n1"];
        let mut kernel = space.run(NetlinkExecutor::new).unwrap().unwrap();
        let mut reach = |wanted: &[String], what: &str| {
            let wanted: BTreeSet<String> = wanted.iter().cloned().collect();
            let wanted = [wanted.clone(), wanted];
            let start = Instant::now();
            loop {
                let seen = endpoints(&mut kernel, "10.96.10.1", 30080);
                if seen == wanted {
                    return;
                }
                assert!(start.elapsed() < DEADLINE, "{what}: wanted {wanted:?}, saw {seen:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        let first = Agent::start(&file.0, space);
        reach(&pods[..1], "the first agent programs");

        // Endpoints come and go all the time but for the first, which always works.
        let stop = Arc::new(AtomicBool::new(false));
        let changes = tokio::spawn({
            let (stop, slices, pods) = (stop.clone(), slices.clone(), pods.clone());
            async move {
                let mut last = Vec::new();
                let mut i = 0usize;
                while !stop.load(Ordering::Relaxed) {
                    let keep = |k: &usize| *k == 0 || (i >> (k - 1)) & 1 == 1;
                    last = (0..pods.len()).filter(keep).map(|k| pods[k].clone()).collect();
                    let endpoints: Vec<_> = last.iter().map(|a| json!({"addresses": [a]})).collect();
                    let patch = Patch::Merge(json!({"endpoints": endpoints}));
                    slices.patch("web-1", &PatchParams::default(), &patch).await.unwrap();
                    i += 1;
                }
                (i, last)
            }
        });
        let mut agent = Some(first);
        let kill = || {
            let mut random = 0x2545_f491_4f6c_dd1du64;
            for _ in 0..KILLS {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // A random moment is the point: while starting, while reading back, amid changes.
                std::thread::sleep(Duration::from_millis(random % 700));
                drop(agent.take());
                agent = Some(Agent::start(&file.0, space));
            }
        };
        let to: SocketAddr = "10.96.10.1:80".parse().unwrap();
        let node_port = SocketAddr::new(lab::address("n1").unwrap(), 30080);
        let handle = tokio::runtime::Handle::current();
        let mut outside = Default::default();
        let inside = under_load(&lab, "p1b", to, || {
            outside = handle.block_on(under_load(&lab, "x1", node_port, kill));
        })
        .await;
        stop.store(true, Ordering::Relaxed);
        let (written, last) = changes.await.unwrap();
        let results = [inside, outside];
        for (tries, failures) in &results {
            assert!(failures.is_empty(), "{} of {tries} failed: {failures:?}", failures.len());
            assert!(*tries > 50, "a client was busy: {tries}");
        }
        assert!(written > 50, "endpoints changed: {written}");
        tokio::task::block_in_place(|| reach(&last, "the last agent catches up"));
        println!("{KILLS} kills, {written} changes, {} and {} connections", results[0].0, results[1].0);
        drop(agent);
        server.shutdown().await;
    });
}
