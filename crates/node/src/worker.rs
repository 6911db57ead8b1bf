//! Runs one pod: a task that owns the pod's sandbox and containers from its first sight to its removal.
//!
//! The task alone changes the pod's state. Whatever takes long (pulls, probes, hooks, stopping) runs beside it and reports back
//! as a [`Note`]. After each note or update it asks [`lifecycle::plan`] what to do, does it, and writes the status.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::{EventType, LookupError, pod_reference};
use crate::container::{self, Running, StartError, StartRequest};
use crate::image::{Image, ImageError, Keyring, Pulled, Reference};
use crate::kubelet::NodeContext;
use crate::lifecycle::{self, Backoff, Member, Outcome, Progress, PullBackoff, RestartPolicy, Role};
use crate::names::pod_dir_name;
use crate::probe::{self, ProbeKind};
use crate::resolv::pod_resolv_conf;
use crate::runtime::{Exit, remove_dir};
use crate::sandbox::{Sandbox, SandboxRequest};
use crate::status::{self, ContainerView, PodView, State, Terminated};
use crate::volume::{self, VolumeContext, Volumes};
use crate::{hosts, resolv, storage};

/// A killed container gets at least this long between the polite signal and the other (the kubelet's minimum).
const MIN_GRACE: Duration = Duration::from_secs(2);
/// How often a pod with limits on its local storage is measured, and how long an evicted one may take to end (the kubelet's).
const STORAGE_PERIOD: SignedDuration = SignedDuration::from_secs(10);
const EVICTION_GRACE: Duration = Duration::from_secs(1);
/// Default of terminationGracePeriodSeconds.
const DEFAULT_GRACE: i64 = 30;
/// First and longest wait before a failed step (volumes, image, configuration) is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// A missing image is looked for again this often, so that an import is noticed.
const IMAGE_RETRY: Duration = Duration::from_secs(3);
/// A failed pull is shown as such for this long before the wait for the next one is.
const PULL_ERROR_SHOWN: Duration = Duration::from_secs(1);

/// What the kubelet last heard about a pod.
#[derive(Clone, Debug)]
pub(crate) struct PodUpdate {
    pub pod: Arc<Pod>,
    /// The object is gone from the API: stop everything, write nothing.
    pub removed: bool,
}

/// What a pod's streams (logs, exec, port-forward) need, shared with the HTTP API.
#[derive(Debug, Default)]
pub(crate) struct PodShared {
    inner: Mutex<SharedState>,
}

#[derive(Debug, Default)]
struct SharedState {
    containers: BTreeMap<String, ContainerAccess>,
    sandbox: Option<Sandbox>,
}

/// What is known of a container for its streams.
#[derive(Clone, Debug, Default)]
pub(crate) struct ContainerAccess {
    /// The current or last run.
    pub running: Option<Arc<Running>>,
    /// Whether it still runs.
    pub alive: bool,
    /// Log file of that run.
    pub log: Option<PathBuf>,
    /// Log file of the run before.
    pub previous_log: Option<PathBuf>,
    /// Why it waits, when it has not run yet.
    pub waiting: Option<String>,
    /// The pod's container definition.
    pub stdin_once: bool,
}

impl PodShared {
    fn lock(&self) -> std::sync::MutexGuard<'_, SharedState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container by name.
    pub(crate) fn container(&self, name: &str) -> Option<ContainerAccess> {
        self.lock().containers.get(name).cloned()
    }

    /// Names of all containers.
    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().containers.keys().cloned().collect()
    }

    /// The sandbox, once it exists.
    pub(crate) fn sandbox(&self) -> Option<Sandbox> {
        self.lock().sandbox.clone()
    }
}

/// The kubelet's end of a worker.
#[derive(Debug)]
pub(crate) struct PodHandle {
    pub updates: watch::Sender<PodUpdate>,
    pub shared: Arc<PodShared>,
}

/// Something that happened beside the worker.
enum Note {
    Exited { index: usize, id: String, exit: Exit },
    Probe { index: usize, id: String, kind: ProbeKind, success: bool },
    Image { index: usize, name: String, begun: Instant, result: Box<Result<Pulled, ImageError>> },
    PostStart { index: usize, id: String, result: Result<(), String> },
}

enum Phase {
    New,
    Pulling,
    Blocked { reason: &'static str, message: String, retry_at: Timestamp },
    Running(Box<Active>),
    Exited(Terminated),
}

/// A run in progress.
struct Active {
    run: Arc<Running>,
    started: bool,
    ready: bool,
    hook_pending: bool,
    stopping: bool,
    /// Startup has succeeded; lets the other probes begin.
    startup: watch::Sender<bool>,
    probes: CancellationToken,
    /// Stops only startup and liveness probes, for a pod that is being deleted.
    kill_probes: CancellationToken,
}

struct Slot {
    spec: Container,
    role: Role,
    policy: RestartPolicy,
    phase: Phase,
    /// How the run before the current one ended.
    last: Option<Terminated>,
    restarts: i32,
    /// Number of the next run; log files are named by it.
    attempt: u32,
    backoff: Backoff,
    backoff_told: bool,
    image: Option<Image>,
    pull_backoff: PullBackoff,
    /// Why the last pull failed.
    pull_error: String,
    /// The definition has changed under a run: the next one starts whatever the restart policy says.
    redefined: bool,
    /// What the current or last run is made from, for the status.
    image_id: String,
    container_id: Option<String>,
    previous_log: Option<PathBuf>,
    retries: u32,
}

impl Slot {
    fn field(&self) -> &'static str {
        if self.role == Role::Regular { "containers" } else { "initContainers" }
    }

    fn progress(&self, now: Timestamp) -> Progress {
        match &self.phase {
            Phase::New => Progress::New,
            Phase::Pulling => Progress::Busy,
            Phase::Blocked { retry_at, .. } if *retry_at <= now => Progress::New,
            Phase::Blocked { .. } => Progress::Busy,
            Phase::Running(active) => Progress::Running { started: active.started },
            Phase::Exited(_) if self.redefined => Progress::New,
            Phase::Exited(end) => {
                Progress::Exited { code: end.exit_code, again_at: self.backoff.again_at(end.finished_at) }
            }
        }
    }

    fn active(&mut self, id: &str) -> Option<&mut Active> {
        match &mut self.phase {
            Phase::Running(active) if active.run.id == id => Some(active),
            _ => None,
        }
    }
}

pub(crate) struct PodWorker {
    context: Arc<NodeContext>,
    pod: Arc<Pod>,
    updates: watch::Receiver<PodUpdate>,
    notes: (mpsc::UnboundedSender<Note>, mpsc::UnboundedReceiver<Note>),
    shared: Arc<PodShared>,
    status: watch::Sender<(u64, PodStatus)>,
    written: watch::Receiver<u64>,
    slots: Vec<Slot>,
    sandbox: Option<Sandbox>,
    address: Option<IpAddr>,
    /// Kept for the status after the sandbox is gone.
    shown_ip: Option<IpAddr>,
    volumes: Option<Volumes>,
    run_dir: PathBuf,
    state_dir: PathBuf,
    start_time: Timestamp,
    initialized: bool,
    outcome: Option<Outcome>,
    failure: Option<(String, String)>,
    blocked_until: Option<Timestamp>,
    /// When to measure the pod's files.
    storage_due: Option<Timestamp>,
    setup_retries: u32,
    termination: Option<watch::Sender<Instant>>,
    removed: bool,
    /// No more updates will come.
    abandoned: bool,
    told_unsupported: Vec<String>,
}

/// Starts the task of a pod.
pub(crate) fn spawn(context: Arc<NodeContext>, pod: Arc<Pod>, done: impl FnOnce() + Send + 'static) -> PodHandle {
    let (updates, receiver) = watch::channel(PodUpdate { pod: pod.clone(), removed: false });
    let shared = Arc::new(PodShared::default());
    let worker = PodWorker::new(context, pod, receiver, shared.clone());
    tokio::spawn(async move {
        worker.run().await;
        done();
    });
    PodHandle { updates, shared }
}

fn spec_of(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&EMPTY)
}

/// A pod that is over and not to be started again.
fn is_over(pod: &Pod) -> Option<Outcome> {
    match pod.status.as_ref().and_then(|s| s.phase.as_deref()) {
        Some("Succeeded") => Some(Outcome::Succeeded),
        Some("Failed") => Some(Outcome::Failed),
        _ => None,
    }
}

impl PodWorker {
    fn new(
        context: Arc<NodeContext>,
        pod: Arc<Pod>,
        updates: watch::Receiver<PodUpdate>,
        shared: Arc<PodShared>,
    ) -> PodWorker {
        let meta = &pod.metadata;
        let name = pod_dir_name(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
            meta.uid.as_deref().unwrap_or_default(),
        );
        let (status, written) = spawn_status_writer(context.clone(), pod.clone());
        let now = Timestamp::now();
        let old = pod.status.as_ref();
        let mut worker = PodWorker {
            run_dir: context.node_dir.join("pods").join(&name),
            state_dir: context.state_dir.join("pods").join(&name),
            start_time: old.and_then(|s| s.start_time.as_ref()).map_or(now, |t| t.0),
            outcome: is_over(&pod),
            failure: old.and_then(|s| Some((s.reason.clone()?, s.message.clone().unwrap_or_default()))),
            slots: slots(&pod),
            initialized: false,
            context,
            pod,
            updates,
            notes: mpsc::unbounded_channel(),
            shared,
            status,
            written,
            sandbox: None,
            address: None,
            shown_ip: None,
            volumes: None,
            storage_due: None,
            blocked_until: None,
            setup_retries: 0,
            termination: None,
            removed: false,
            abandoned: false,
            told_unsupported: Vec::new(),
        };
        worker.recall(now);
        worker
    }

    /// Takes over what an earlier agent reported: its containers are gone with it, so each that ran counts as ended.
    fn recall(&mut self, now: Timestamp) {
        let Some(old) = self.pod.status.clone() else { return };
        self.shown_ip = old.pod_ip.as_deref().and_then(|ip| ip.parse().ok()).filter(|_| self.outcome.is_some());
        let statuses = old.init_container_statuses.iter().flatten().chain(old.container_statuses.iter().flatten());
        for status in statuses {
            let Some(slot) = self.slots.iter_mut().find(|s| s.spec.name == status.name) else { continue };
            let id = status.container_id.as_deref().and_then(|id| id.split("://").nth(1)).map(str::to_string);
            let state = status.state.clone().unwrap_or_default();
            let restore = |end: &k8s_openapi::api::core::v1::ContainerStateTerminated| Terminated {
                exit_code: end.exit_code,
                reason: end.reason.clone().unwrap_or_default(),
                message: end.message.clone(),
                started_at: end.started_at.as_ref().map(|t| t.0),
                finished_at: end.finished_at.as_ref().map_or(now, |t| t.0),
                container_id: end.container_id.as_deref().and_then(|id| id.split("://").nth(1)).map(str::to_string),
            };
            slot.last = status.last_state.as_ref().and_then(|s| s.terminated.as_ref()).map(restore);
            slot.restarts = status.restart_count;
            slot.attempt = u32::try_from(status.restart_count).unwrap_or(0) + u32::from(id.is_some());
            slot.container_id = id.clone();
            slot.image_id = status.image_id.clone();
            if slot.role == Role::Regular && (id.is_some() || slot.last.is_some()) {
                self.initialized = true;
            }
            if let Some(end) = &state.terminated {
                slot.phase = Phase::Exited(restore(end));
            } else if let Some(running) = &state.running {
                slot.phase = Phase::Exited(Terminated {
                    exit_code: 137,
                    reason: "ContainerStatusUnknown".to_string(),
                    message: Some("The node agent was restarted and stopped the container".to_string()),
                    started_at: running.started_at.as_ref().map(|t| t.0),
                    finished_at: now,
                    container_id: id,
                });
            }
        }
        // Init containers prepared a sandbox that is gone: they run again for the new one.
        if self.outcome.is_none() {
            self.initialized = false;
            for slot in self.slots.iter_mut().filter(|s| s.role == Role::Init) {
                slot.phase = Phase::New;
            }
        }
    }

    async fn run(mut self) {
        self.publish_access();
        loop {
            let wake_at = self.sync().await;
            self.publish();
            if self.is_finished() {
                break;
            }
            let now = Timestamp::now();
            let sleep = wake_at.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO));
            tokio::select! {
                changed = self.updates.changed(), if !self.abandoned => {
                    if changed.is_err() {
                        // The kubelet is stopping: leave nothing running.
                        self.abandoned = true;
                        self.removed = true;
                    }
                    let update = self.updates.borrow_and_update().clone();
                    self.removed |= update.removed;
                    self.pod = update.pod;
                    if !self.deleting() && self.outcome.is_none() {
                        self.adopt_images();
                    }
                }
                Some(note) = self.notes.1.recv() => self.take(note).await,
                () = sleep_or_forever(sleep) => {}
            }
            while let Ok(note) = self.notes.1.try_recv() {
                self.take(note).await;
            }
        }
        self.finish().await;
    }

    fn deleting(&self) -> bool {
        self.removed || self.pod.metadata.deletion_timestamp.is_some()
    }

    fn is_finished(&self) -> bool {
        self.deleting() && !self.any_running()
    }

    fn any_running(&self) -> bool {
        self.slots.iter().any(|s| matches!(s.phase, Phase::Running(_)))
    }

    fn event(&self, kind: EventType, reason: &str, message: impl Into<String>) {
        if !self.removed {
            self.context.api.event(&pod_reference(&self.pod, None), kind, reason, message.into());
        }
    }

    fn container_event(&self, index: usize, kind: EventType, reason: &str, message: impl Into<String>) {
        let slot = &self.slots[index];
        let reference = pod_reference(&self.pod, Some((slot.field(), &slot.spec.name)));
        if !self.removed {
            self.context.api.event(&reference, kind, reason, message.into());
        }
    }

    /// Takes over what may change in a pod's containers: their images. A container that runs is stopped and started again
    /// from the new one, whatever its restart policy (Kubernetes API, Container.image is mutable); one that waits for an image
    /// looks for the new one.
    fn adopt_images(&mut self) {
        let pod = self.pod.clone();
        let spec = spec_of(&pod);
        for index in 0..self.slots.len() {
            let name = &self.slots[index].spec.name;
            let list = match self.slots[index].role {
                Role::Regular => spec.containers.as_slice(),
                Role::Init | Role::Sidecar => spec.init_containers.as_deref().unwrap_or_default(),
            };
            let Some(new) = list.iter().find(|c| c.name == *name) else { continue };
            let slot = &mut self.slots[index];
            if slot.spec.image == new.image {
                continue;
            }
            slot.spec.image = new.image.clone();
            slot.spec.image_pull_policy = new.image_pull_policy.clone();
            // Waits belong to the image that was waited for.
            slot.pull_backoff = PullBackoff::default();
            slot.backoff = Backoff::default();
            slot.retries = 0;
            match &slot.phase {
                // An init container that has begun prepares the pod once; its new image is for the next time.
                Phase::Running(_) if slot.role == Role::Init => {}
                Phase::Running(_) => {
                    slot.redefined = true;
                    let text = format!("Container {} definition changed, will be restarted", slot.spec.name);
                    self.kill(index, self.pod_grace(), text);
                }
                // The answer of a pull under way is for the old image.
                Phase::New | Phase::Pulling | Phase::Blocked { .. } => {
                    slot.image = None;
                    slot.phase = Phase::New;
                }
                Phase::Exited(_) => slot.image = None,
            }
        }
    }

    /// Brings the pod forward as far as is possible now. Returns when to look again.
    async fn sync(&mut self) -> Option<Timestamp> {
        if self.deleting() {
            self.terminate(self.grace());
            return None;
        }
        if self.outcome.is_some() {
            self.end().await;
            return None;
        }
        let now = Timestamp::now();
        let deadline = spec_of(&self.pod)
            .active_deadline_seconds
            .and_then(|seconds| self.start_time.saturating_add(SignedDuration::from_secs(seconds)).ok());
        if deadline.is_some_and(|at| at <= now) {
            let text = "Pod was active on the node longer than the specified deadline";
            self.event(EventType::Normal, "DeadlineExceeded", text);
            self.failure = Some(("DeadlineExceeded".to_string(), text.to_string()));
            self.outcome = Some(Outcome::Failed);
            self.end().await;
            return None;
        }
        let look = self.watch_storage(now).await;
        if self.outcome.is_some() {
            self.end().await;
            return None;
        }
        let wake = match self.set_up(now).await {
            Ok(()) => self.advance(now).await,
            Err(retry_at) => Some(retry_at),
        };
        if self.outcome.is_some() {
            self.end().await;
        }
        let refresh = self.volumes.as_ref().and_then(|v| v.refresh_at);
        [wake, deadline, refresh, look].into_iter().flatten().min()
    }

    /// Evicts the pod if it uses more of the disk than it may. Returns when to look again.
    async fn watch_storage(&mut self, now: Timestamp) -> Option<Timestamp> {
        let spec = spec_of(&self.pod);
        let limits = storage::limits(spec);
        if limits.is_empty() {
            return None;
        }
        if let Some(at) = self.storage_due.filter(|at| *at > now) {
            return Some(at);
        }
        let first = self.storage_due.is_none();
        self.storage_due = now.checked_add(STORAGE_PERIOD).ok();
        if first {
            return self.storage_due;
        }
        let logs = self.state_dir.join("logs");
        let containers = self.slots.iter().map(|slot| {
            let layer = slot.container_id.as_ref().map(|id| self.state_dir.join("c").join(id).join("upper"));
            (slot.spec.name.clone(), layer.into_iter().chain([logs.join(&slot.spec.name)]).collect())
        });
        let volumes = storage::disk_volumes(spec)
            .map(|(name, _)| (name.to_string(), vec![self.state_dir.join("volumes").join(name)]));
        let places = storage::Places { containers: containers.collect(), volumes: volumes.collect() };
        let usage = tokio::task::spawn_blocking(move || storage::measure(&places)).await.unwrap_or_default();
        if let Some(text) = storage::excess(&limits, &usage) {
            self.event(EventType::Warning, status::EVICTED, text.clone());
            self.failure = Some((status::EVICTED.to_string(), text));
            self.outcome = Some(Outcome::Failed);
        }
        self.storage_due
    }

    /// Makes the pod's directories, volumes and sandbox, and keeps volumes fresh.
    async fn set_up(&mut self, now: Timestamp) -> Result<(), Timestamp> {
        if let Some(at) = self.blocked_until.filter(|at| *at > now) {
            return Err(at);
        }
        self.tell_unsupported();
        let made = self.try_set_up(now).await;
        match made {
            Ok(()) => {
                self.blocked_until = None;
                self.setup_retries = 0;
                Ok(())
            }
            Err(()) => {
                let wait = retry_wait(self.setup_retries);
                self.setup_retries += 1;
                let at = now.saturating_add(wait).unwrap_or(now);
                self.blocked_until = Some(at);
                Err(at)
            }
        }
    }

    async fn try_set_up(&mut self, now: Timestamp) -> Result<(), ()> {
        let spec = spec_of(&self.pod).clone();
        let fresh = self.volumes.as_ref().is_some_and(|v| v.refresh_at.is_none_or(|at| at > now));
        if !fresh {
            for dir in [&self.run_dir, &self.state_dir] {
                if let Err(e) = fs::create_dir_all(dir) {
                    self.event(EventType::Warning, "FailedSync", format!("cannot create {}: {e}", dir.display()));
                    return Err(());
                }
            }
            let context = VolumeContext {
                api: self.context.api.as_ref(),
                pod: &self.pod,
                dir: &self.state_dir.join("volumes"),
                host_ip: self.context.config.node_ip.to_string(),
                pod_ip: self.shown_ip.map(|ip| ip.to_string()),
                node_cpus: self.context.cpus,
                node_memory: self.context.memory_bytes,
            };
            match (volume::prepare(&context, now).await, &mut self.volumes) {
                (Ok(volumes), _) => self.volumes = Some(volumes),
                // What a running pod has stays; it is tried again with the next refresh.
                (Err(failures), Some(old)) => {
                    old.refresh_at = now.saturating_add(RETRY.1).ok();
                    for failure in failures {
                        self.event(EventType::Warning, "FailedMount", failure);
                    }
                }
                (Err(failures), None) => {
                    for failure in failures {
                        self.event(EventType::Warning, "FailedMount", failure);
                    }
                    return Err(());
                }
            }
        }
        if self.sandbox.is_none() {
            self.make_sandbox(&spec).await?;
        }
        Ok(())
    }

    async fn make_sandbox(&mut self, spec: &PodSpec) -> Result<(), ()> {
        let meta = &self.pod.metadata;
        let name = meta.name.as_deref().unwrap_or_default();
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let config = &self.context.config;
        let host_network = spec.host_network == Some(true);
        let ip = if host_network {
            config.node_ip
        } else {
            let taken = self.address.or_else(|| self.context.take_address());
            match taken {
                Some(ip) => {
                    self.address = Some(ip);
                    ip
                }
                None => {
                    let text =
                        format!("failed to assign an IP address to the pod: no free address in {}", config.pod_cidr);
                    self.event(EventType::Warning, "FailedCreatePodSandBox", text);
                    return Err(());
                }
            }
        };
        let hostname = if host_network { config.name.clone() } else { hosts::hostname(spec, name) };
        let qualified = hosts::qualified(spec, &hostname, namespace, &config.cluster_domain);
        let shown_name = match (&qualified, spec.set_hostname_as_fqdn) {
            (Some(full), Some(true)) if !host_network => full.clone(),
            _ => hostname.clone(),
        };
        let host_conf =
            config.host_resolv_conf.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let (resolv, warnings) = pod_resolv_conf(
            spec,
            namespace,
            &resolv::ResolvConf::parse(&host_conf),
            &config.cluster_dns,
            &config.cluster_domain,
        );
        for warning in warnings {
            self.event(EventType::Warning, warning.reason, warning.message);
        }
        let hosts = if host_network {
            fs::read_to_string("/etc/hosts").unwrap_or_else(|_| "127.0.0.1\tlocalhost\n".to_string())
                + &hosts::aliases(spec)
        } else {
            hosts::hosts_file(spec, ip, &hostname, qualified.as_deref())
        };
        let files = [("resolv.conf", resolv.render()), ("hosts", hosts), ("hostname", format!("{hostname}\n"))];
        for (file, content) in files {
            if let Err(e) = fs::write(self.run_dir.join(file), content) {
                self.event(EventType::Warning, "FailedCreatePodSandBox", format!("cannot write {file}: {e}"));
                return Err(());
            }
        }
        let request = SandboxRequest {
            dir: &self.run_dir,
            uid: meta.uid.as_deref().unwrap_or_default(),
            spec,
            hostname: &shown_name,
            ip,
            gateway: self.context.gateway,
            node_ip: self.context.own_address,
        };
        match Sandbox::create(request, &config.netns, &self.context.netlink).await {
            Ok(sandbox) => {
                self.shown_ip = Some(sandbox.ip);
                self.shared.lock().sandbox = Some(sandbox.clone());
                self.sandbox = Some(sandbox);
                Ok(())
            }
            Err(e) => {
                self.event(EventType::Warning, "FailedCreatePodSandBox", format!("Failed to create pod sandbox: {e}"));
                Err(())
            }
        }
    }

    /// Warns once about each field that this node does not act on; ephemeral containers may come later.
    fn tell_unsupported(&mut self) {
        let mut fields = unsupported(spec_of(&self.pod));
        fields.retain(|field| !self.told_unsupported.contains(field));
        if !fields.is_empty() {
            self.told_unsupported.extend(fields.iter().cloned());
            let text = format!("this node ignores: {}", fields.join(", "));
            self.event(EventType::Warning, "UnsupportedFields", text);
        }
    }

    /// Starts what should run. Returns when to look again.
    async fn advance(&mut self, now: Timestamp) -> Option<Timestamp> {
        loop {
            let members = self.members(now);
            let plan = lifecycle::plan(&members, self.initialized, now);
            if let Some(outcome) = plan.outcome {
                self.outcome = Some(outcome);
                return None;
            }
            for &index in &plan.backing_off {
                self.tell_backoff(index);
            }
            let mut started_any = false;
            for &index in &plan.start {
                started_any |= self.start(index, now).await;
            }
            if started_any {
                // The pod may have been deleted or its containers may have ended meanwhile: look at the updates first.
                if self.updates.has_changed().unwrap_or(true) {
                    return Some(now);
                }
                continue;
            }
            let retries = self.slots.iter().filter_map(|slot| match &slot.phase {
                Phase::Blocked { retry_at, .. } => Some(*retry_at),
                _ => None,
            });
            return retries.chain(plan.wake_at).min();
        }
    }

    fn members(&self, now: Timestamp) -> Vec<Member> {
        self.slots.iter().map(|s| Member { role: s.role, policy: s.policy, progress: s.progress(now) }).collect()
    }

    fn tell_backoff(&mut self, index: usize) {
        if std::mem::replace(&mut self.slots[index].backoff_told, true) {
            return;
        }
        let text =
            format!("Back-off restarting failed container {} in pod {}", self.slots[index].spec.name, self.full_name());
        self.container_event(index, EventType::Warning, "BackOff", text);
    }

    fn full_name(&self) -> String {
        let meta = &self.pod.metadata;
        format!(
            "{}_{}({})",
            meta.name.as_deref().unwrap_or_default(),
            meta.namespace.as_deref().unwrap_or_default(),
            meta.uid.as_deref().unwrap_or_default()
        )
    }

    /// Starts one container, or notes why it cannot be. Returns whether something changed that others may depend on.
    async fn start(&mut self, index: usize, now: Timestamp) -> bool {
        let slot = &mut self.slots[index];
        if let Phase::Exited(end) = &slot.phase {
            // Whatever keeps the next run from starting: the last one is history, and its back-off has been used.
            slot.backoff.step(end.finished_at, now);
            slot.last = Some(end.clone());
            slot.phase = Phase::New;
        }
        let image = match self.slots[index].image.clone() {
            Some(image) => image,
            None => match self.find_image(index, now) {
                Some(image) => image,
                None => return false,
            },
        };
        let (Some(sandbox), Some(volumes)) = (&self.sandbox, &self.volumes) else { return false };
        let slot = &self.slots[index];
        let request = StartRequest {
            context: &self.context,
            pod: &self.pod,
            container: &slot.spec,
            image: &image,
            sandbox,
            volumes: &volumes.paths,
            run_dir: &self.run_dir,
            state_dir: &self.state_dir,
            attempt: slot.attempt,
        };
        let result = container::start(&request).await;
        let slot = &mut self.slots[index];
        if matches!(result, Err(StartError::ImageGone)) {
            // Removed from the store since it was found: it is looked for again.
            slot.image = None;
            slot.phase = Phase::New;
            return true;
        }
        if let Err(StartError::Config(reason) | StartError::Create(reason)) = &result {
            let config = matches!(result, Err(StartError::Config(_)));
            let label = if config { "CreateContainerConfigError" } else { "CreateContainerError" };
            let retry_at = now.saturating_add(retry_wait(slot.retries)).unwrap_or(now);
            slot.retries += 1;
            slot.image = Some(image);
            slot.phase = Phase::Blocked { reason: label, message: reason.clone(), retry_at };
            let text = format!("Error: {reason}");
            self.container_event(index, EventType::Warning, "Failed", text);
            return false;
        }
        // From here on this is a run of its own, started or not.
        slot.retries = 0;
        slot.redefined = false;
        slot.backoff_told = false;
        let log = container::log_path(&self.state_dir, &slot.spec.name, slot.attempt);
        slot.previous_log =
            slot.attempt.checked_sub(1).map(|n| container::log_path(&self.state_dir, &slot.spec.name, n));
        slot.phase = Phase::New;
        if slot.attempt > 0 {
            slot.restarts += 1;
            drop_old_logs(&log, slot.attempt);
        }
        slot.attempt += 1;
        // A later run looks the image up again, because an import may have replaced it.
        slot.image = None;
        slot.image_id = format!("{}@{}", image_name(&image.reference), image.digest.as_deref().unwrap_or(&image.id));
        match result {
            Ok(run) => {
                let run = Arc::new(run);
                slot.container_id = Some(run.id.clone());
                self.watch_run(index, run, image);
                self.container_event(index, EventType::Normal, "Created", "Container created");
                self.container_event(index, EventType::Normal, "Started", "Container started");
            }
            Err(StartError::Start(reason)) => {
                slot.image = Some(image);
                let message = format!("failed to start container: {reason}");
                slot.phase = Phase::Exited(Terminated {
                    exit_code: 128,
                    reason: "StartError".to_string(),
                    message: Some(message.clone()),
                    started_at: None,
                    finished_at: Timestamp::now(),
                    container_id: None,
                });
                self.container_event(index, EventType::Warning, "Failed", format!("Error: {message}"));
            }
            Err(StartError::Config(_) | StartError::Create(_) | StartError::ImageGone) => {
                unreachable!("handled above")
            }
        }
        if self.slots[index].role == Role::Regular {
            self.initialized = true;
        }
        self.publish_access();
        true
    }

    fn watch_run(&mut self, index: usize, run: Arc<Running>, image: Image) {
        let notes = self.notes.0.clone();
        let waiting = run.clone();
        tokio::spawn(async move {
            let exit = waiting.process.wait().await;
            waiting.gone.cancel();
            let _ = notes.send(Note::Exited { index, id: waiting.id.clone(), exit });
        });
        let slot = &mut self.slots[index];
        let (startup, _) = watch::channel(slot.spec.startup_probe.is_none());
        let hook = slot.spec.lifecycle.as_ref().and_then(|l| l.post_start.clone());
        let active = Active {
            started: slot.spec.startup_probe.is_none() && hook.is_none(),
            ready: slot.spec.readiness_probe.is_none(),
            hook_pending: hook.is_some(),
            stopping: false,
            startup,
            probes: CancellationToken::new(),
            kill_probes: CancellationToken::new(),
            run: run.clone(),
        };
        slot.image = Some(image);
        if let Some(hook) = hook {
            let (context, pod, notes) = (self.context.clone(), self.pod.clone(), self.notes.0.clone());
            let (spec, address) = (slot.spec.clone(), self.probe_address());
            let run = run.clone();
            tokio::spawn(async move {
                let result = probe::run_hook(&context, &pod, &spec, &run, address, &hook, Duration::MAX).await;
                let _ = notes.send(Note::PostStart { index, id: run.id.clone(), result });
            });
        }
        self.slots[index].phase = Phase::Running(Box::new(active));
        self.start_probes(index);
    }

    fn probe_address(&self) -> IpAddr {
        self.sandbox.as_ref().map_or(self.context.config.node_ip, |s| s.ip)
    }

    fn start_probes(&self, index: usize) {
        let slot = &self.slots[index];
        let Phase::Running(active) = &slot.phase else { return };
        let kinds = [
            (ProbeKind::Startup, slot.spec.startup_probe.as_ref()),
            (ProbeKind::Liveness, slot.spec.liveness_probe.as_ref()),
            (ProbeKind::Readiness, slot.spec.readiness_probe.as_ref()),
        ];
        for (kind, probe) in kinds {
            let Some(probe) = probe else { continue };
            let stop = match kind {
                ProbeKind::Readiness => active.probes.clone(),
                ProbeKind::Startup | ProbeKind::Liveness => active.kill_probes.clone(),
            };
            let notes = self.notes.0.clone();
            let id = active.run.id.clone();
            let task = probe::ProbeTask {
                context: self.context.clone(),
                pod: self.pod.clone(),
                field: slot.field(),
                container: slot.spec.clone(),
                run: active.run.clone(),
                address: self.probe_address(),
                kind,
                probe: probe.clone(),
                startup: active.startup.subscribe(),
            };
            let gone = active.run.gone.clone();
            tokio::spawn(async move {
                let report = |success| {
                    let _ = notes.send(Note::Probe { index, id: id.clone(), kind, success });
                };
                tokio::select! {
                    () = task.run(report) => {}
                    () = stop.cancelled() => {}
                    () = gone.cancelled() => {}
                }
            });
        }
    }

    /// The image of a container if it can be had at once; otherwise begins a pull or notes what is missing.
    fn find_image(&mut self, index: usize, now: Timestamp) -> Option<Image> {
        let name = self.slots[index].spec.image.clone().unwrap_or_default();
        let block = |worker: &mut PodWorker, reason: &'static str, message: String, wait: Duration| {
            let again = matches!(&worker.slots[index].phase, Phase::Blocked { reason: old, .. } if *old == reason);
            let retry_at = now.saturating_add(wait).unwrap_or(now);
            worker.slots[index].phase = Phase::Blocked { reason, message, retry_at };
            !again
        };
        let reference = match Reference::parse(&name) {
            Ok(reference) => reference,
            Err(reason) => {
                let text = format!("Failed to apply default image tag \"{name}\": {reason}");
                if block(self, "InvalidImageName", text.clone(), RETRY.1) {
                    self.container_event(index, EventType::Warning, "InspectFailed", text);
                    self.container_event(index, EventType::Warning, "Failed", "Error: InvalidImageName");
                }
                return None;
            }
        };
        let found = match self.context.config.images.find(&reference) {
            Ok(found) => found,
            Err(e) => {
                let text = format!("Failed to inspect image \"{name}\": {}", chain(&e));
                if block(self, "ImageInspectError", text.clone(), RETRY.1) {
                    self.container_event(index, EventType::Warning, "InspectFailed", text);
                    self.container_event(index, EventType::Warning, "Failed", "Error: ImageInspectError");
                }
                return None;
            }
        };
        let policy = self.slots[index].spec.image_pull_policy.clone();
        let policy = policy.as_deref().unwrap_or_else(|| reference.default_pull_policy()).to_string();
        let ask_registry = self.context.config.allow_pull
            && match (policy.as_str(), &found) {
                ("Never", _) => false,
                // Imported and built-in images have no registry to ask.
                ("Always", Some(image)) => image.from_registry,
                (_, Some(_)) => false,
                (_, None) => true,
            };
        if ask_registry {
            let Some(until) = self.slots[index].pull_backoff.until(now) else {
                self.pull(index, reference, &name);
                return None;
            };
            // Looked at again before the time is up, because an import may bring the image meanwhile.
            let wait = Duration::try_from(until.duration_since(now)).unwrap_or_default().min(IMAGE_RETRY);
            let text = format!("Back-off pulling image \"{name}\"");
            let message = format!("{text}: ErrImagePull: {}", self.slots[index].pull_error);
            if block(self, "ImagePullBackOff", message, wait) {
                self.container_event(index, EventType::Normal, "BackOff", text);
                self.container_event(index, EventType::Warning, "Failed", "Error: ImagePullBackOff");
            }
            return None;
        }
        match found {
            Some(image) => {
                self.container_event(
                    index,
                    EventType::Normal,
                    "Pulled",
                    format!("Container image \"{name}\" already present on machine and can be accessed by the pod"),
                );
                Some(image)
            }
            None => {
                let text = if policy == "Never" {
                    format!(
                        "Container image \"{name}\" is not present with pull policy of Never; import it with \"portolan image import FILE\""
                    )
                } else {
                    format!(
                        "Container image \"{name}\" is not present and this cluster does not pull images; import it with \"portolan image import FILE\", or start the cluster with --allow-pull"
                    )
                };
                if block(self, "ErrImageNeverPull", text.clone(), IMAGE_RETRY) {
                    self.container_event(index, EventType::Warning, "ErrImageNeverPull", text);
                    self.container_event(index, EventType::Warning, "Failed", "Error: ErrImageNeverPull");
                }
                None
            }
        }
    }

    fn pull(&mut self, index: usize, reference: Reference, name: &str) {
        self.slots[index].phase = Phase::Pulling;
        self.container_event(index, EventType::Normal, "Pulling", format!("Pulling image \"{name}\""));
        let (context, pod, notes) = (self.context.clone(), self.pod.clone(), self.notes.0.clone());
        let name = name.to_string();
        tokio::spawn(async move {
            let begun = Instant::now();
            let result = match keyring(&context, &pod).await {
                Ok(keyring) => context.config.images.pull(&reference, &keyring.logins(&reference)).await,
                Err(reason) => Err(ImageError::Pull { code: None, reference: reference.to_string(), reason }),
            };
            let _ = notes.send(Note::Image { index, name, begun, result: Box::new(result) });
        });
    }

    async fn take(&mut self, note: Note) {
        match note {
            Note::Exited { index, id, exit } => self.exited(index, &id, exit).await,
            Note::Probe { index, id, kind, success } => self.probed(index, &id, kind, success),
            Note::Image { index, name, begun, result } => self.pulled(index, &name, begun, *result),
            Note::PostStart { index, id, result } => {
                let Some(active) = self.slots[index].active(&id) else { return };
                active.hook_pending = false;
                match result {
                    Ok(()) => active.started = *active.startup.borrow(),
                    Err(_) => {
                        self.container_event(index, EventType::Warning, "FailedPostStartHook", "PostStartHook failed");
                        let text = "FailedPostStartHook".to_string();
                        self.kill(index, self.pod_grace(), text);
                    }
                }
            }
        }
    }

    fn pulled(&mut self, index: usize, name: &str, begun: Instant, result: Result<Pulled, ImageError>) {
        let slot = &mut self.slots[index];
        if !matches!(slot.phase, Phase::Pulling) || slot.spec.image.as_deref() != Some(name) {
            return;
        }
        let now = Timestamp::now();
        match result {
            Ok(pulled) => {
                let text = format!(
                    "Successfully pulled image \"{name}\" in {} ({} including waiting). Image size: {} bytes.",
                    lifecycle::go_millis(pulled.took),
                    lifecycle::go_millis(begun.elapsed()),
                    pulled.size_bytes
                );
                slot.image = Some(pulled.image);
                slot.phase = Phase::New;
                slot.retries = 0;
                slot.pull_backoff = PullBackoff::default();
                self.container_event(index, EventType::Normal, "Pulled", text);
            }
            Err(e) => {
                let message = chain(&e);
                slot.pull_backoff.failed(now);
                slot.pull_error = message.clone();
                let text = format!("Failed to pull image \"{name}\": {message}");
                let retry_at = now.saturating_add(PULL_ERROR_SHOWN).unwrap_or(now);
                slot.phase = Phase::Blocked { reason: "ErrImagePull", message, retry_at };
                self.container_event(index, EventType::Warning, "Failed", text);
                self.container_event(index, EventType::Warning, "Failed", "Error: ErrImagePull");
            }
        }
    }

    async fn exited(&mut self, index: usize, id: &str, exit: Exit) {
        let slot = &mut self.slots[index];
        let Some(active) = slot.active(id) else { return };
        active.probes.cancel();
        active.kill_probes.cancel();
        let run = active.run.clone();
        // Its last words may still be on the way from the pipe to the file.
        let mut progress = run.sink.progress();
        let _ = tokio::time::timeout(Duration::from_millis(200), progress.wait_for(|p| p.closed)).await;
        let oom = self.context.was_out_of_memory(&run.id);
        let reason = match exit.code {
            0 => "Completed",
            _ if oom => "OOMKilled",
            _ => "Error",
        };
        let slot = &mut self.slots[index];
        slot.phase = Phase::Exited(Terminated {
            exit_code: exit.code,
            reason: reason.to_string(),
            message: container::termination_message(&slot.spec, &run, exit.code),
            started_at: Some(run.started_at),
            finished_at: exit.at,
            container_id: Some(run.id.clone()),
        });
        slot.image = None;
        container::remove(&self.context, &run).await;
        self.publish_access();
    }

    fn probed(&mut self, index: usize, id: &str, kind: ProbeKind, success: bool) {
        let grace = self.pod_grace();
        let slot = &mut self.slots[index];
        let (policy, role) = (slot.policy, slot.role);
        let name = slot.spec.name.clone();
        let own_grace = |probe: Option<&k8s_openapi::api::core::v1::Probe>| {
            probe
                .and_then(|p| p.termination_grace_period_seconds)
                .and_then(|s| u64::try_from(s).ok())
                .map(Duration::from_secs)
        };
        let grace = match kind {
            ProbeKind::Startup => own_grace(slot.spec.startup_probe.as_ref()).unwrap_or(grace),
            ProbeKind::Liveness | ProbeKind::Readiness => own_grace(slot.spec.liveness_probe.as_ref()).unwrap_or(grace),
        };
        let Some(active) = slot.active(id) else { return };
        match (kind, success) {
            (ProbeKind::Readiness, ready) => active.ready = ready,
            (ProbeKind::Startup, true) => {
                active.started = !active.hook_pending;
                let _ = active.startup.send(true);
            }
            (ProbeKind::Liveness, true) => {}
            (ProbeKind::Startup | ProbeKind::Liveness, false) => {
                let what = if kind == ProbeKind::Startup { "startup" } else { "liveness" };
                let again = if policy == RestartPolicy::Never { "" } else { ", will be restarted" };
                let prefix = if role == Role::Regular { "Container" } else { "Init container" };
                self.kill(index, grace, format!("{prefix} {name} failed {what} probe{again}"));
            }
        }
    }

    /// Stops one container whose pod goes on.
    fn kill(&mut self, index: usize, grace: Duration, text: String) {
        let slot = &mut self.slots[index];
        let spec = slot.spec.clone();
        let image_signal = slot.image.as_ref().map(|i| i.config.stop_signal.clone()).unwrap_or_default();
        let Phase::Running(active) = &mut slot.phase else { return };
        if std::mem::replace(&mut active.stopping, true) {
            return;
        }
        let run = active.run.clone();
        self.container_event(index, EventType::Normal, "Killing", text);
        let (context, pod, address) = (self.context.clone(), self.pod.clone(), self.probe_address());
        let (_, deadline) = watch::channel(Instant::now() + grace);
        tokio::spawn(async move { stop(&context, &pod, &spec, &image_signal, &run, address, deadline).await });
    }

    fn pod_grace(&self) -> Duration {
        let seconds = spec_of(&self.pod).termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }

    fn grace(&self) -> Duration {
        if self.removed {
            return MIN_GRACE;
        }
        match self.pod.metadata.deletion_grace_period_seconds {
            Some(seconds) => Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
            None => self.pod_grace(),
        }
    }

    /// Begins to stop all containers, or shortens the time that they have.
    fn terminate(&mut self, grace: Duration) {
        let end = Instant::now() + grace;
        if let Some(deadline) = &self.termination {
            deadline.send_if_modified(|old| {
                let shorter = end < *old;
                if shorter {
                    *old = end;
                }
                shorter
            });
            return;
        }
        let (sender, deadline) = watch::channel(end);
        self.termination = Some(sender);
        let mut regular = Vec::new();
        let mut sidecars = Vec::new();
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let image_signal = slot.image.as_ref().map(|i| i.config.stop_signal.clone()).unwrap_or_default();
            let (spec, role) = (slot.spec.clone(), slot.role);
            let Phase::Running(active) = &mut slot.phase else { continue };
            active.kill_probes.cancel();
            active.stopping = true;
            let job = (spec, image_signal, active.run.clone());
            match role {
                Role::Sidecar => sidecars.push(job),
                Role::Init | Role::Regular => regular.push(job),
            }
            let name = self.slots[index].spec.name.clone();
            self.container_event(index, EventType::Normal, "Killing", format!("Stopping container {name}"));
        }
        let (context, pod, address) = (self.context.clone(), self.pod.clone(), self.probe_address());
        tokio::spawn(async move {
            let stops = regular
                .iter()
                .map(|(spec, signal, run)| stop(&context, &pod, spec, signal, run, address, deadline.clone()));
            futures::future::join_all(stops).await;
            for (spec, signal, run) in sidecars.iter().rev() {
                stop(&context, &pod, spec, signal, run, address, deadline.clone()).await;
            }
        });
    }

    /// Ends a pod that is over but not deleted: whatever still runs is stopped, then the sandbox goes. Logs and status stay.
    async fn end(&mut self) {
        if self.any_running() {
            let evicted = self.failure.as_ref().is_some_and(|(reason, _)| reason == status::EVICTED);
            self.terminate(if evicted { EVICTION_GRACE.min(self.pod_grace()) } else { self.pod_grace() });
            return;
        }
        self.tear_down().await;
    }

    async fn tear_down(&mut self) {
        if let Some(sandbox) = self.sandbox.take() {
            self.shared.lock().sandbox = None;
            if let Err(error) = sandbox.remove(&self.context.netlink).await {
                self.event(EventType::Warning, "FailedKillPod", format!("error killing pod: {error}"));
                tracing::warn!(pod = %self.full_name(), %error, "cannot remove a sandbox");
            }
        }
        if let Some(ip) = self.address.take() {
            self.context.release_address(ip);
        }
        for result in [volume::remove_all(&self.state_dir.join("volumes")), remove_dir(&self.run_dir)] {
            if let Err(error) = result {
                tracing::warn!(pod = %self.full_name(), %error, "cannot remove a pod's files");
            }
        }
    }

    /// The last steps of a pod that is being deleted: final status, nothing left on the node, then the object goes.
    async fn finish(mut self) {
        if self.outcome.is_none() {
            let failed = self
                .slots
                .iter()
                .any(|s| s.role == Role::Regular && matches!(&s.phase, Phase::Exited(end) if end.exit_code != 0));
            self.outcome = Some(if failed { Outcome::Failed } else { Outcome::Succeeded });
        }
        let version = self.publish();
        self.tear_down().await;
        if !self.removed {
            let mut written = self.written.clone();
            // A server that is away must not keep the node's resources; the deletion below is tried until it answers.
            let _ = tokio::time::timeout(Duration::from_secs(5), written.wait_for(|w| *w >= version)).await;
            let mut wait = Duration::from_millis(100);
            loop {
                match self.context.api.delete_pod(&self.pod).await {
                    Ok(()) => break,
                    Err(error) => {
                        tracing::debug!(pod = %self.full_name(), %error, "cannot delete the pod's object yet")
                    }
                }
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    changed = self.updates.changed() => {
                        if changed.is_err() || self.updates.borrow_and_update().removed {
                            break;
                        }
                    }
                }
                wait = (wait * 2).min(Duration::from_secs(5));
            }
        }
        if let Err(error) = remove_dir(&self.state_dir) {
            tracing::warn!(pod = %self.full_name(), %error, "cannot remove a pod's state");
        }
    }

    /// Hands the current status to the writer if it differs from the last. Returns the version that holds it.
    fn publish(&mut self) -> u64 {
        let now = Timestamp::now();
        let view = self.view(now);
        let previous = self.status.borrow().clone();
        let stored = self.pod.status.as_ref();
        let old = if previous.0 == 0 { stored } else { Some(&previous.1) };
        let next = status::pod_status(&view, old, now);
        if previous.0 > 0 && previous.1 == next {
            return previous.0;
        }
        let version = previous.0 + 1;
        if !self.removed {
            let _ = self.status.send((version, next));
        }
        self.publish_access();
        version
    }

    fn view(&self, now: Timestamp) -> PodView<'_> {
        let plan = lifecycle::plan(&self.members(now), self.initialized, now);
        let over = self.outcome.is_some() || self.deleting();
        let containers = self
            .slots
            .iter()
            .enumerate()
            .map(|(index, slot)| {
                let backing_off = !over && plan.backing_off.contains(&index);
                self.container_view(slot, backing_off)
            })
            .collect();
        PodView {
            pod: &self.pod,
            containers,
            ips: self.shown_ip.into_iter().collect(),
            host_ip: self.context.config.node_ip,
            start_time: self.start_time,
            sandbox_ready: self.sandbox.is_some(),
            initialized: self.initialized,
            outcome: self.outcome.filter(|_| !self.any_running()),
            failure: self.failure.clone(),
        }
    }

    fn container_view(&self, slot: &Slot, backing_off: bool) -> ContainerView {
        let not_yet = || {
            let init = slot.role == Role::Regular && self.slots.iter().any(|s| s.role != Role::Regular);
            let reason = if init && !self.initialized { "PodInitializing" } else { "ContainerCreating" };
            State::Waiting { reason: reason.to_string(), message: None }
        };
        let mut last = slot.last.clone();
        let state = match &slot.phase {
            Phase::New | Phase::Pulling => not_yet(),
            Phase::Blocked { reason, message, .. } => {
                State::Waiting { reason: reason.to_string(), message: Some(message.clone()) }
            }
            Phase::Running(active) => State::Running { since: active.run.started_at },
            Phase::Exited(end) if backing_off => {
                last = Some(end.clone());
                let wait = lifecycle::go_seconds(slot.backoff.effective(end.finished_at));
                State::Waiting {
                    reason: "CrashLoopBackOff".to_string(),
                    message: Some(format!(
                        "back-off {wait} restarting failed container={} pod={}",
                        slot.spec.name,
                        self.full_name()
                    )),
                }
            }
            Phase::Exited(end) => State::Terminated(end.clone()),
        };
        let (started, ready) = match &slot.phase {
            Phase::Running(active) => {
                let started = active.started && !active.hook_pending;
                (started, started && active.ready)
            }
            _ => (false, false),
        };
        ContainerView {
            name: slot.spec.name.clone(),
            role: slot.role,
            image: slot.spec.image.clone().unwrap_or_default(),
            image_id: slot.image_id.clone(),
            container_id: slot.container_id.clone(),
            state,
            last,
            restart_count: slot.restarts,
            started,
            ready,
        }
    }

    /// Tells the HTTP API what there is.
    fn publish_access(&self) {
        let mut shared = self.shared.lock();
        for slot in &self.slots {
            let access = shared.containers.entry(slot.spec.name.clone()).or_default();
            access.stdin_once = slot.spec.stdin_once == Some(true);
            access.previous_log = slot.previous_log.clone();
            access.log = slot.attempt.checked_sub(1).map(|n| container::log_path(&self.state_dir, &slot.spec.name, n));
            match &slot.phase {
                Phase::Running(active) => {
                    access.running = Some(active.run.clone());
                    access.alive = true;
                    access.waiting = None;
                }
                Phase::Exited(_) => access.alive = false,
                Phase::Blocked { reason, .. } => {
                    access.alive = false;
                    access.waiting = Some(reason.to_string());
                }
                Phase::New | Phase::Pulling => {
                    access.alive = false;
                    let init = slot.role == Role::Regular && self.slots.iter().any(|s| s.role != Role::Regular);
                    access.waiting = Some(if init { "PodInitializing" } else { "ContainerCreating" }.to_string());
                }
            }
        }
    }
}

/// The logins of a pod's imagePullSecrets. Those that are missing are told; a registry may do without.
async fn keyring(context: &NodeContext, pod: &Pod) -> Result<Keyring, String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut keyring = Keyring::default();
    let mut missing = Vec::new();
    for reference in spec_of(pod).image_pull_secrets.iter().flatten() {
        match context.api.secret(namespace, &reference.name).await {
            Ok(secret) => keyring.add(&secret)?,
            Err(error) => {
                tracing::debug!(pod = pod.metadata.name, secret = reference.name, %error, "cannot read a pull secret");
                missing.push(reference.name.as_str());
            }
        }
    }
    if !missing.is_empty() {
        let text = format!(
            "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
            missing.join(", ")
        );
        context.api.event(&pod_reference(pod, None), EventType::Warning, "FailedToRetrieveImagePullSecret", text);
    }
    Ok(keyring)
}

/// The name of an image without its tag, for `imageID`.
fn image_name(reference: &str) -> String {
    Reference::parse(reference).map_or_else(|_| reference.to_string(), |r| r.name())
}

fn slots(pod: &Pod) -> Vec<Slot> {
    let spec = spec_of(pod);
    let policy = RestartPolicy::parse(spec.restart_policy.as_deref());
    let init = spec.init_containers.iter().flatten().map(|c| {
        if c.restart_policy.as_deref() == Some("Always") {
            (c, Role::Sidecar, RestartPolicy::Always)
        } else {
            // An init container that has succeeded is not repeated, so Always means OnFailure for it.
            let own = c.restart_policy.as_deref().map_or(policy, |p| RestartPolicy::parse(Some(p)));
            (c, Role::Init, if own == RestartPolicy::Never { own } else { RestartPolicy::OnFailure })
        }
    });
    let regular = spec.containers.iter().map(|c| {
        let own = c.restart_policy.as_deref().map_or(policy, |p| RestartPolicy::parse(Some(p)));
        (c, Role::Regular, own)
    });
    init.chain(regular)
        .map(|(container, role, policy)| Slot {
            spec: container.clone(),
            role,
            policy,
            phase: Phase::New,
            last: None,
            restarts: 0,
            attempt: 0,
            backoff: Backoff::default(),
            backoff_told: false,
            image: None,
            pull_backoff: PullBackoff::default(),
            pull_error: String::new(),
            redefined: false,
            image_id: String::new(),
            container_id: None,
            previous_log: None,
            retries: 0,
        })
        .collect()
}

/// Fields of a pod that this node does not act on, by path.
fn unsupported(spec: &PodSpec) -> Vec<String> {
    let mut fields = Vec::new();
    let mut note = |present: bool, path: String| {
        if present {
            fields.push(path);
        }
    };
    let containers = spec.init_containers.iter().flatten().map(|c| ("initContainers", c));
    for (kind, container) in containers.chain(spec.containers.iter().map(|c| ("containers", c))) {
        let path = |field: &str| format!("spec.{kind}{{{}}}.{field}", container.name);
        note(container.restart_policy_rules.is_some(), path("restartPolicyRules"));
        let security = container.security_context.as_ref();
        let seccomp = security.and_then(|s| s.seccomp_profile.as_ref()).is_some_and(|p| p.type_ == "Localhost");
        note(seccomp, path("securityContext.seccompProfile"));
        note(security.is_some_and(|s| s.se_linux_options.is_some()), path("securityContext.seLinuxOptions"));
        let apparmor = security.and_then(|s| s.app_armor_profile.as_ref()).is_some_and(|p| p.type_ == "Localhost");
        note(apparmor, path("securityContext.appArmorProfile"));
    }
    note(spec.share_process_namespace == Some(true), "spec.shareProcessNamespace".to_string());
    note(spec.host_users == Some(false), "spec.hostUsers".to_string());
    note(spec.ephemeral_containers.as_ref().is_some_and(|e| !e.is_empty()), "spec.ephemeralContainers".to_string());
    note(spec.runtime_class_name.is_some(), "spec.runtimeClassName".to_string());
    note(spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()), "spec.resourceClaims".to_string());
    fields
}

fn retry_wait(retries: u32) -> Duration {
    (RETRY.0 * 2u32.saturating_pow(retries.min(8))).min(RETRY.1)
}

/// An error with all its sources.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    text
}

/// Only the last run's log and that of the run before it are kept.
fn drop_old_logs(current: &Path, attempt: u32) {
    let Some(old) = attempt.checked_sub(2) else { return };
    for suffix in ["log", "log.1"] {
        let _ = fs::remove_file(current.with_file_name(format!("{old}.{suffix}")));
    }
}

async fn sleep_or_forever(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// Stops a container: preStop hook, polite signal, and the other when the time is up. Returns when it has ended.
async fn stop(
    context: &NodeContext,
    pod: &Pod,
    spec: &Container,
    image_signal: &str,
    run: &Running,
    address: IpAddr,
    mut deadline: watch::Receiver<Instant>,
) {
    if run.process.ended().is_some() {
        return;
    }
    if let Some(hook) = spec.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()) {
        let hook = async { probe::run_hook(context, pod, spec, run, address, hook, Duration::MAX).await };
        tokio::select! {
            result = hook => {
                if result.is_err() {
                    let field = if is_init(pod, &spec.name) { "initContainers" } else { "containers" };
                    let reference = pod_reference(pod, Some((field, &spec.name)));
                    context.api.event(&reference, EventType::Warning, "FailedPreStopHook", "PreStopHook failed".to_string());
                }
            }
            () = time_is_up(&mut deadline) => {}
            _ = run.process.wait() => return,
        }
    }
    let wanted = spec.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()).filter(|s| !s.is_empty());
    let signal = signal_number(wanted.unwrap_or(image_signal)).unwrap_or(libc::SIGTERM);
    if let Err(error) = run.process.signal(signal) {
        tracing::warn!(container = %run.id, %error, "cannot signal a container");
    }
    let least = Instant::now() + MIN_GRACE;
    tokio::select! {
        _ = run.process.wait_swept() => return,
        () = async {
            time_is_up(&mut deadline).await;
            tokio::time::sleep_until(least).await;
        } => {}
    }
    if let Err(error) = run.process.signal(libc::SIGKILL) {
        tracing::warn!(container = %run.id, %error, "cannot kill a container");
    }
    run.process.wait_swept().await;
}

fn is_init(pod: &Pod, container: &str) -> bool {
    spec_of(pod).init_containers.iter().flatten().any(|c| c.name == container)
}

async fn time_is_up(deadline: &mut watch::Receiver<Instant>) {
    let mut live = true;
    loop {
        let at = *deadline.borrow_and_update();
        tokio::select! {
            () = tokio::time::sleep_until(at) => return,
            changed = deadline.changed(), if live => live = changed.is_ok(),
        }
    }
}

/// The number of a signal named as in images and stopSignal: `SIGQUIT`, `QUIT`, `3`, `SIGRTMIN+3`.
fn signal_number(name: &str) -> Option<i32> {
    let name = name.trim();
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let short = name.strip_prefix("SIG").unwrap_or(name);
    if let Some(offset) = short.strip_prefix("RTMIN") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse::<i32>().ok()? };
        return Some(libc::SIGRTMIN() + offset).filter(|n| *n <= 64);
    }
    format!("SIG{short}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32)
}

/// Starts the task that writes a pod's statuses to the API, only the latest when it is slow.
fn spawn_status_writer(
    context: Arc<NodeContext>,
    pod: Arc<Pod>,
) -> (watch::Sender<(u64, PodStatus)>, watch::Receiver<u64>) {
    let (sender, mut receiver) = watch::channel((0u64, PodStatus::default()));
    let (done, written) = watch::channel(0u64);
    tokio::spawn(async move {
        while receiver.changed().await.is_ok() {
            let mut wait = Duration::from_millis(100);
            loop {
                let (version, status) = receiver.borrow_and_update().clone();
                match context.api.write_status(&pod, status).await {
                    // A pod that is gone needs no status.
                    Ok(()) | Err(LookupError::NotFound(_)) => {
                        let _ = done.send(version);
                        break;
                    }
                    Err(error) => {
                        tracing::debug!(pod = pod.metadata.name, %error, "cannot write a pod's status yet");
                        tokio::select! {
                            () = tokio::time::sleep(wait) => {}
                            changed = receiver.changed() => if changed.is_err() { return },
                        }
                        wait = (wait * 2).min(Duration::from_secs(5));
                    }
                }
            }
        }
    });
    (sender, written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_named_in_many_ways() {
        for (name, number) in
            [("SIGTERM", Some(15)), ("QUIT", Some(3)), ("9", Some(9)), ("", None), ("SIGNOPE", None), ("0", None)]
        {
            assert_eq!(signal_number(name), number, "{name}");
        }
        assert_eq!(signal_number("SIGRTMIN+3"), Some(libc::SIGRTMIN() + 3));
    }

    #[test]
    fn fields_that_nothing_acts_on_are_named() {
        let spec: PodSpec = serde_json::from_value(serde_json::json!({
            "shareProcessNamespace": true,
            "containers": [{"name": "web", "resources": {"limits": {"memory": "1Gi"}}}]}))
        .unwrap();
        assert_eq!(unsupported(&spec), ["spec.shareProcessNamespace"]);
        assert!(unsupported(&PodSpec::default()).is_empty());
    }

    #[test]
    fn retries_slow_down() {
        assert_eq!(retry_wait(0), Duration::from_millis(500));
        assert_eq!(retry_wait(20), Duration::from_secs(10));
    }
}
