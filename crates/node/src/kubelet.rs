//! The agent of one node: registers it, keeps its lease, and gives each pod bound to it a worker.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use portolan_linux::{Netlink, RouteTarget};
use portolan_observe::Observer;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{EventType, KubeApi, NodeApi};
use crate::config::{Error, NodeConfig};
use crate::runtime::{Runtime, cgroup_parent, cleanup_node, overlay_works_in};
use crate::sandbox::AddressPool;
use crate::worker::{self, PodHandle, PodShared};

/// How often the node's lease is renewed, and after how long it counts as lost (the kubelet's defaults).
const LEASE_PERIOD: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
/// How often the node's status is written although nothing changed.
const STATUS_PERIOD: Duration = Duration::from_secs(300);
const LEASE_NAMESPACE: &str = "kube-node-lease";

/// What the parts of one agent share.
pub(crate) struct NodeContext {
    pub config: NodeConfig,
    pub api: Arc<dyn NodeApi>,
    pub runtime: Runtime,
    pub netlink: Netlink,
    /// `{run_dir}/node/{name}`.
    pub node_dir: PathBuf,
    /// `{state_dir}/node/{name}`.
    pub state_dir: PathBuf,
    /// Whether root file systems are overlays; else they are copies.
    pub overlay: bool,
    /// Whether cgroups can hold containers to their limits.
    pub limits_available: bool,
    pub cgroup_parent: String,
    pub gateway: IpAddr,
    /// The node's address, if its network namespace has it.
    pub own_address: Option<IpAddr>,
    pub cpus: u64,
    pub memory_bytes: u64,
    addresses: Mutex<AddressPool>,
}

impl NodeContext {
    pub(crate) fn take_address(&self) -> Option<IpAddr> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
    }

    pub(crate) fn release_address(&self, ip: IpAddr) {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).release(ip, Instant::now());
    }

    /// A short path for the socket that a terminal is received by: socket paths hold 107 bytes.
    pub(crate) fn socket_path(&self, id: &str) -> PathBuf {
        self.node_dir.join("s").join(&id[..id.len().min(16)])
    }

    /// Whether the kernel has killed a process of this container for want of memory.
    pub(crate) fn was_out_of_memory(&self, id: &str) -> bool {
        let below = format!("{}/{id}", self.cgroup_parent.trim_start_matches('/'));
        let files = [
            Path::new("/sys/fs/cgroup/memory").join(&below).join("memory.oom_control"),
            Path::new("/sys/fs/cgroup").join(&below).join("memory.events"),
        ];
        files.iter().filter_map(|file| fs::read_to_string(file).ok()).any(|text| {
            let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
            count.is_some_and(|n| n.trim() != "0")
        })
    }
}

/// The agent of one node. Clones share it.
#[derive(Clone)]
pub struct Kubelet {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) context: Arc<NodeContext>,
    pods: Mutex<HashMap<String, KnownPod>>,
    workers: TaskTracker,
}

struct KnownPod {
    namespace: String,
    name: String,
    handle: PodHandle,
}

impl Kubelet {
    /// Starts the agent and returns when the Node object says Ready. Pods are looked for from then on.
    ///
    /// What an earlier agent of this node left running is removed first, because nobody could tell its exit codes. The agent
    /// ends with `shutdown`: it stops its containers (two seconds of grace) and leaves their pods in the API as they are; wait
    /// for [`Kubelet::stopped`]. The readiness gate is named `kubelet/{name}`.
    ///
    /// # Errors
    /// Fails when the runtime program does not run, a directory cannot be made, or the API server refuses the Node.
    pub async fn start(
        config: NodeConfig,
        client: kube::Client,
        observer: Observer,
        shutdown: CancellationToken,
    ) -> Result<Kubelet, Error> {
        let gate = observer.gate(&format!("kubelet/{}", config.name));
        gate.not_ready("registering the node");
        let api: Arc<dyn NodeApi> = Arc::new(KubeApi::new(client.clone(), &config.name));
        let kubelet = Kubelet::prepare(config, api).await?;
        kubelet.register(&client).await?;
        kubelet.tell_conditions();
        gate.ready();
        tokio::spawn(kubelet.clone().heartbeat(client.clone(), shutdown.clone()));
        tokio::spawn(kubelet.clone().watch(client, shutdown));
        Ok(kubelet)
    }

    /// Makes an agent that nobody drives yet: for [`Kubelet::start`], and for tests, which hand it pods by
    /// [`Kubelet::apply`].
    #[doc(hidden)]
    pub async fn prepare(config: NodeConfig, api: Arc<dyn NodeApi>) -> Result<Kubelet, Error> {
        let gateway = AddressPool::gateway(config.pod_cidr).ok_or(Error::PodCidr(config.pod_cidr))?;
        let node_dir = config.run_dir.join("node").join(&config.name);
        let state_dir = config.state_dir.join("node").join(&config.name);
        cleanup_node(&node_dir).map_err(|source| Error::Leftovers { path: node_dir.clone(), source })?;
        portolan_linux::unmount_all_under(&state_dir)
            .map_err(|source| Error::Leftovers { path: state_dir.clone(), source })?;
        for dir in [node_dir.join("pods"), node_dir.join("s"), state_dir.join("pods")] {
            fs::create_dir_all(&dir).map_err(|source| Error::File { action: "create", path: dir.clone(), source })?;
        }
        let runtime = Runtime::new(&config.runtime, node_dir.join("crun")).await?;
        let netlink = Netlink::open(&config.netns).map_err(|e| Error::File {
            action: "open netlink in",
            path: config.netns.path().into(),
            source: std::io::Error::other(e),
        })?;
        // Addresses of pods that are gone answer at once instead of timing out.
        if let Err(error) = netlink.set_route(config.pod_cidr.trunc(), RouteTarget::Unreachable).await {
            tracing::warn!(node = %config.name, %error, "cannot set the route for addresses without a pod");
        }
        let overlay = overlay_works_in(&state_dir);
        if !overlay {
            tracing::warn!(dir = %state_dir.display(), "overlayfs does not work here, images are copied for each container");
        }
        let cgroup_parent = cgroup_parent(&node_dir);
        let node_ip = config.node_ip;
        let has_address = config.netns.run(move || std::net::UdpSocket::bind((node_ip, 0)).is_ok()).unwrap_or(false);
        let context = NodeContext {
            addresses: Mutex::new(AddressPool::new(config.pod_cidr)),
            limits_available: limits_available(&cgroup_parent),
            cgroup_parent,
            overlay,
            runtime,
            netlink,
            gateway,
            own_address: has_address.then_some(node_ip),
            node_dir,
            state_dir,
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            memory_bytes: memory_bytes(),
            api,
            config,
        };
        let about = node_reference(&context.config.name);
        context.api.event(&about, EventType::Normal, "Starting", "Starting kubelet.".to_string());
        if !context.limits_available {
            let text = "cgroups for cpu and memory cannot be made on this machine: resource limits of containers have no effect";
            context.api.event(&about, EventType::Warning, "FailedNodeAllocatableEnforcement", text.to_string());
        }
        Ok(Kubelet {
            inner: Arc::new(Inner { context: Arc::new(context), pods: Mutex::default(), workers: TaskTracker::new() }),
        })
    }

    /// Waits until every pod's worker has ended, after shutdown.
    pub async fn stopped(&self) {
        self.inner.workers.close();
        self.inner.workers.wait().await;
    }

    /// Serves the kubelet's HTTP API on one connection: logs, exec, attach and port-forward of this node's pods.
    ///
    /// Whoever can reach it may do everything: the caller authorises.
    pub async fn serve_connection(&self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        crate::server::serve(self.clone(), io).await;
    }

    /// The pod's streams, by name; the newest of that name.
    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Option<Arc<PodShared>> {
        let pods = self.pods();
        let found = pods.values().filter(|p| p.namespace == namespace && p.name == name);
        found.max_by_key(|p| creation(&p.handle.updates.borrow().pod)).map(|p| p.handle.shared.clone())
    }

    /// The pods of this node as a `v1` PodList, as last heard from the API server.
    pub(crate) fn pod_list(&self) -> Value {
        let items: Vec<Pod> = self.pods().values().map(|p| (*p.handle.updates.borrow().pod).clone()).collect();
        json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
    }

    /// The settings in force, in the words of `KubeletConfiguration`.
    pub(crate) fn configuration(&self) -> Value {
        let config = &self.inner.context.config;
        json!({"kubeletconfig": {
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "clusterDNS": config.cluster_dns,
            "clusterDomain": config.cluster_domain,
            "maxPods": config.max_pods,
            "podCIDR": config.pod_cidr,
            "resolvConf": config.host_resolv_conf,
            "nodeLeaseDurationSeconds": LEASE_SECONDS,
        }})
    }

    /// Where the logs of each pod are, by `{namespace}_{name}_{uid}`, as kubelets name it.
    pub(crate) fn log_folders(&self) -> BTreeMap<String, PathBuf> {
        let base = self.inner.context.state_dir.join("pods");
        let pods = self.pods();
        pods.iter()
            .map(|(uid, pod)| {
                let name = crate::names::pod_dir_name(&pod.namespace, &pod.name, uid);
                let logs = base.join(&name).join("logs");
                (name, logs)
            })
            .collect()
    }

    fn pods(&self) -> std::sync::MutexGuard<'_, HashMap<String, KnownPod>> {
        self.inner.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new or changed pod.
    #[doc(hidden)]
    pub fn apply(&self, pod: Pod) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        let pod = Arc::new(pod);
        let mut pods = self.pods();
        if let Some(known) = pods.get(&uid) {
            known.handle.updates.send_modify(|update| update.pod = pod);
            return;
        }
        let token = self.inner.workers.token();
        let (inner, key) = (Arc::downgrade(&self.inner), uid.clone());
        let handle = worker::spawn(self.inner.context.clone(), pod.clone(), move || {
            if let Some(inner) = inner.upgrade() {
                inner.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            }
            drop(token);
        });
        pods.insert(
            uid,
            KnownPod {
                namespace: pod.metadata.namespace.clone().unwrap_or_default(),
                name: pod.metadata.name.clone().unwrap_or_default(),
                handle,
            },
        );
    }

    /// Takes the news that a pod's object is gone.
    #[doc(hidden)]
    pub fn remove(&self, uid: &str) {
        if let Some(known) = self.pods().get(uid) {
            known.handle.updates.send_modify(|update| update.removed = true);
        }
    }

    /// Lets go of all pods: their workers stop their containers and end.
    #[doc(hidden)]
    pub fn abandon(&self) {
        self.pods().clear();
    }

    async fn watch(self, client: kube::Client, shutdown: CancellationToken) {
        let api: Api<Pod> = Api::all(client);
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.inner.context.config.name));
        let stream = watcher(api, config).default_backoff();
        tokio::pin!(stream);
        let mut listed: HashSet<String> = HashSet::new();
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                () = shutdown.cancelled() => break,
            };
            match event {
                Some(Ok(watcher::Event::Apply(pod))) => self.apply(pod),
                Some(Ok(watcher::Event::Delete(pod))) => {
                    if let Some(uid) = &pod.metadata.uid {
                        self.remove(uid);
                    }
                }
                Some(Ok(watcher::Event::Init)) => listed.clear(),
                Some(Ok(watcher::Event::InitApply(pod))) => {
                    listed.extend(pod.metadata.uid.clone());
                    self.apply(pod);
                }
                Some(Ok(watcher::Event::InitDone)) => {
                    let gone: Vec<String> = self.pods().keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                    for uid in gone {
                        self.remove(&uid);
                    }
                    self.drop_old_state(&listed);
                }
                Some(Err(error)) => {
                    tracing::debug!(node = %self.inner.context.config.name, %error, "pod watch interrupted")
                }
                None => break,
            }
        }
        self.abandon();
    }

    /// Removes logs and volumes of pods that went away while no agent ran.
    fn drop_old_state(&self, listed: &HashSet<String>) {
        for dir in crate::runtime::entries(&self.inner.context.state_dir.join("pods")).unwrap_or_default() {
            let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let uid = name.rsplit('_').next().unwrap_or_default();
            if !listed.contains(uid)
                && !self.pods().contains_key(uid)
                && let Err(error) = crate::runtime::remove_dir(&dir)
            {
                tracing::warn!(dir = %dir.display(), %error, "cannot remove the state of a pod that is gone");
            }
        }
    }

    async fn register(&self, client: &kube::Client) -> Result<(), Error> {
        let context = &self.inner.context;
        let name = context.config.name.clone();
        let api: Api<Node> = Api::all(client.clone());
        let node = node_object(&context.config);
        let failed = |source| Error::Register { node: name.clone(), source: Box::new(source) };
        match api.create(&PostParams::default(), &node).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {
                // Known from before: labels and range must be ours again, everything that others added stays.
                let patch = json!({"metadata": {"labels": node.metadata.labels}, "spec": node.spec});
                api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        let status = node_status(context, Timestamp::now());
        api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await.map_err(failed)?;
        Ok(())
    }

    /// The events of a node whose conditions have just become what they stay.
    fn tell_conditions(&self) {
        let context = &self.inner.context;
        let name = &context.config.name;
        for reason in ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID", "NodeReady"] {
            let text = format!("Node {name} status is now: {reason}");
            context.api.event(&node_reference(name), EventType::Normal, reason, text);
        }
    }

    async fn heartbeat(self, client: kube::Client, shutdown: CancellationToken) {
        let context = &self.inner.context;
        let nodes: Api<Node> = Api::all(client.clone());
        let leases: Api<Lease> = Api::namespaced(client, LEASE_NAMESPACE);
        let name = &context.config.name;
        let mut ticks = tokio::time::interval(LEASE_PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut status_written = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
            if let Err(error) = renew(&leases, &nodes, name).await {
                tracing::debug!(node = %name, %error, "cannot renew the node's lease");
            }
            if status_written.elapsed() >= STATUS_PERIOD {
                let status = node_status(context, Timestamp::now());
                match nodes.patch_status(name, &PatchParams::default(), &Patch::Strategic(status)).await {
                    Ok(_) => status_written = Instant::now(),
                    Err(error) => tracing::debug!(node = %name, %error, "cannot write the node's status"),
                }
            }
        }
    }
}

fn creation(pod: &Pod) -> Option<Timestamp> {
    pod.metadata.creation_timestamp.as_ref().map(|t| t.0)
}

async fn renew(leases: &Api<Lease>, nodes: &Api<Node>, name: &str) -> Result<(), kube::Error> {
    let spec = LeaseSpec {
        holder_identity: Some(name.to_string()),
        lease_duration_seconds: Some(LEASE_SECONDS),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    };
    match leases.patch(name, &PatchParams::default(), &Patch::Merge(json!({ "spec": spec }))).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let owner = nodes.get(name).await?.metadata.uid.map(|uid| OwnerReference {
                api_version: "v1".to_string(),
                kind: "Node".to_string(),
                name: name.to_string(),
                uid,
                ..OwnerReference::default()
            });
            let metadata = ObjectMeta {
                name: Some(name.to_string()),
                namespace: Some(LEASE_NAMESPACE.to_string()),
                owner_references: owner.map(|o| vec![o]),
                ..ObjectMeta::default()
            };
            leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await?;
            Ok(())
        }
        other => other.map(|_| ()),
    }
}

/// A reference to the node for its events. Kubelets give the name as the uid, and clients look for it.
fn node_reference(name: &str) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".to_string()),
        name: Some(name.to_string()),
        uid: Some(name.to_string()),
        ..ObjectReference::default()
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn node_object(config: &NodeConfig) -> Node {
    let mut labels = BTreeMap::new();
    for (name, value) in [
        ("kubernetes.io/hostname", config.name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ] {
        labels.insert(name.to_string(), value.to_string());
    }
    if !config.zone.is_empty() {
        labels.insert("topology.kubernetes.io/zone".to_string(), config.zone.clone());
    }
    Node {
        metadata: ObjectMeta { name: Some(config.name.clone()), labels: Some(labels), ..ObjectMeta::default() },
        spec: Some(k8s_openapi::api::core::v1::NodeSpec {
            pod_cidr: Some(cidr(config.pod_cidr)),
            pod_cidrs: Some(vec![cidr(config.pod_cidr)]),
            ..Default::default()
        }),
        status: None,
    }
}

fn cidr(range: IpNet) -> String {
    range.trunc().to_string()
}

/// The status of a healthy node as a patch. The agent lives and dies with the node it describes, so it only ever says Ready;
/// silence is judged by others through the lease.
fn node_status(context: &NodeContext, now: Timestamp) -> Value {
    let heartbeat = Timestamp::from_second(now.as_second()).unwrap_or(now).to_string();
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({"type": kind, "status": status, "reason": reason, "message": message,
               "lastHeartbeatTime": heartbeat, "lastTransitionTime": heartbeat})
    };
    let memory = format!("{}Ki", context.memory_bytes / 1024);
    let resources = json!({
        "cpu": context.cpus.to_string(),
        "memory": memory,
        "pods": context.config.max_pods.to_string(),
        "ephemeral-storage": format!("{}Ki", disk_bytes(&context.state_dir) / 1024),
    });
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_string();
    let id = |file: &str| fs::read_to_string(file).unwrap_or_default().trim().to_string();
    json!({"status": {
        "addresses": [
            {"type": "InternalIP", "address": context.config.node_ip.to_string()},
            {"type": "Hostname", "address": context.config.name},
        ],
        "capacity": resources,
        "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        "nodeInfo": {
            "machineID": id("/etc/machine-id"),
            "systemUUID": id("/etc/machine-id"),
            "bootID": id("/proc/sys/kernel/random/boot_id"),
            "kernelVersion": kernel,
            "osImage": os_image(),
            "containerRuntimeVersion": "crun://portolan",
            "kubeletVersion": concat!("v1.36.0+portolan-", env!("CARGO_PKG_VERSION")),
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": architecture(),
        },
    }})
}

fn os_image() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches('"').to_string()
}

fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|t| t.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn disk_bytes(dir: &Path) -> u64 {
    nix::sys::statvfs::statvfs(dir).map_or(0, |s| s.blocks() * s.fragment_size())
}

/// Whether this process may make cgroups that limit memory and CPU.
fn limits_available(parent: &str) -> bool {
    let name = parent.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let holds = |dir: PathBuf, files: &[&str]| {
        let made = fs::create_dir(&dir).is_ok() || dir.is_dir();
        // The kernel fills the directory of a cgroup with the files of what can be limited there.
        let filled = || made && files.iter().all(|file| dir.join(file).exists());
        let mut works = filled();
        if !works
            && made
            && let Some(above) = dir.parent()
        {
            let _ = fs::write(above.join("cgroup.subtree_control"), "+cpu +memory");
            works = filled();
        }
        let _ = fs::remove_dir(&dir);
        works
    };
    if root.join("cgroup.controllers").exists() {
        return holds(root.join(name), &["memory.max", "cpu.max"]);
    }
    holds(root.join("memory").join(name), &["memory.limit_in_bytes"])
        && holds(root.join("cpu").join(name), &["cpu.cfs_quota_us"])
}
