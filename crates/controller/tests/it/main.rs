//! The controllers against the embedded API server, in one process and without nodes: the test plays the kubelet.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use portolan_apiserver::{Server, ServerConfig, User};
use portolan_client::leader::Election;
use portolan_controller::Config;
use portolan_controller::clock::Clock;
use portolan_observe::Observer;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// How long anything may take before a test gives up.
const DEADLINE: Duration = Duration::from_secs(20);

struct Cluster {
    client: Client,
    clock: Clock,
    observer: Observer,
    shutdown: CancellationToken,
    server: Arc<Server>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
        // A test that has failed tells what there was: the next time may be long in coming.
        if std::thread::panicking() {
            let snapshot = self.server.store().snapshot();
            for (resource, _) in snapshot.sizes().filter(|(resource, _)| TOLD.contains(&&***resource)) {
                for object in snapshot.list(resource, Some("default")) {
                    eprintln!("{resource} {}", String::from_utf8_lossy(&object.body));
                }
            }
            let queues = self.observer.encode();
            queues
                .lines()
                .filter(|l| l.starts_with("workqueue_") && !l.contains("bucket"))
                .for_each(|l| eprintln!("{l}"));
        }
    }
}

/// What a failed test prints.
const TOLD: [&str; 9] = [
    "pods",
    "events",
    "services",
    "endpoints",
    "endpointslices.discovery.k8s.io",
    "replicasets.apps",
    "deployments.apps",
    "jobs.batch",
    "cronjobs.batch",
];

impl Cluster {
    async fn start() -> Cluster {
        Cluster::prepared(async |_| {}).await
    }

    /// With what `prepare` makes. The controllers know that, and the two nodes, before they begin to work: watches of different
    /// kinds are not in step, so what is made later may be seen after a pod that was made after it.
    async fn prepared(prepare: impl AsyncFnOnce(Client)) -> Cluster {
        portolan_observe::init_tracing("warn");
        let server = Arc::new(Server::start(ServerConfig::new("203.0.113.10:6443".parse().unwrap())).await.unwrap());
        let client = |user: &str| Client::new(server.local_service(User::new(user, &["system:masters"])), "default");
        for name in ["node-1", "node-2"] {
            let zone = if name == "node-1" { "zone-a" } else { "zone-b" };
            let node: Node = from(json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
            Api::all(client("test")).create(&PostParams::default(), &node).await.unwrap();
        }
        prepare(client("test")).await;
        let shutdown = CancellationToken::new();
        let observer = Observer::new();
        let gate = observer.gate("test");
        let clock = Clock::default();
        let config = Config { cluster_ca: Some(server.ca_pem()), clock: clock.clone(), ..Default::default() };
        let run = portolan_controller::run(
            config,
            client("system:kube-controller-manager"),
            observer.clone(),
            shutdown.clone(),
        );
        tokio::spawn(async move {
            gate.ready();
            run.await.expect("the controllers run until they are stopped");
        });
        observer.wait_ready().await;
        let cluster = Cluster { client: client("test"), clock, observer, shutdown, server };
        eventually("the default service account", async || {
            cluster.api::<ServiceAccount>().get_opt("default").await.unwrap()
        })
        .await;
        cluster
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn create<K>(&self, object: Value) -> K
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        self.api::<K>().create(&PostParams::default(), &from(object)).await.unwrap()
    }

    async fn events(&self, reason: &str) -> Vec<Event> {
        let of_reason = ListParams::default().fields(&format!("reason={reason}"));
        self.api::<Event>().list(&of_reason).await.unwrap().items
    }

    /// Why a pod has no node, if the scheduler has said so.
    async fn unscheduled(&self, pod: &str) -> Option<String> {
        let conditions = self.api::<Pod>().get(pod).await.unwrap().status?.conditions?;
        conditions.into_iter().find(|c| c.type_ == "PodScheduled" && c.status == "False")?.message
    }

    async fn pods(&self, labels: &str) -> Vec<Pod> {
        self.api::<Pod>().list(&ListParams::default().labels(labels)).await.unwrap().items
    }

    /// What a kubelet does when the containers are up.
    async fn make_ready(&self, pod: &Pod, ip: &str) {
        let conditions = ["Initialized", "Ready", "ContainersReady", "PodScheduled"]
            .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}));
        let status =
            json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}});
        let name = pod.metadata.name.as_deref().unwrap();
        self.api::<Pod>().patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }

    /// What a kubelet does when the containers have ended.
    async fn finish_deletion(&self, name: &str) {
        let params = DeleteParams { grace_period_seconds: Some(0), ..Default::default() };
        match self.api::<Pod>().delete(name, &params).await {
            Ok(_) => {}
            // Gone since the pods were listed.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => panic!("cannot finish the deletion of {name}: {error}"),
        }
    }
}

fn from<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// Asks until there is an answer; a deadline failure says what was waited for.
async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn deployment(name: &str, replicas: i32, image: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": image}]}}}
    })
}

fn name(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap()
}

fn node(pod: &Pod) -> Option<String> {
    pod.spec.as_ref()?.node_name.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_becomes_endpoints() {
    let cluster = Cluster::start().await;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}});
    cluster.create::<Service>(service).await;
    let applied = Instant::now();
    cluster.create::<Deployment>(deployment("web", 3, "x:1")).await;
    let pods = eventually("three bound pods", async || {
        let pods = cluster.pods("app=web").await;
        (pods.len() == 3 && pods.iter().all(|p| node(p).is_some())).then_some(pods)
    })
    .await;
    eprintln!("deployment created to three pods bound: {:?}", applied.elapsed());
    let nodes: BTreeSet<_> = pods.iter().filter_map(node).collect();
    assert_eq!(nodes.len(), 2, "pods of one owner spread over the nodes");
    for (n, pod) in pods.iter().enumerate() {
        cluster.make_ready(pod, &format!("10.244.1.{}", n + 10)).await;
    }
    let readied = Instant::now();
    let ready_endpoints = async || {
        let of_web = ListParams::default().labels("kubernetes.io/service-name=web");
        let slices = cluster.api::<EndpointSlice>().list(&of_web).await.unwrap().items;
        assert!(slices.len() <= 1, "one slice is enough");
        let endpoints = slices.into_iter().flat_map(|s| s.endpoints.unwrap_or_default());
        endpoints.filter(|e| e.conditions.as_ref().unwrap().ready == Some(true)).count()
    };
    eventually("three ready endpoints", async || (ready_endpoints().await == 3).then_some(())).await;
    eprintln!("last pod ready to endpoint slice: {:?}", readied.elapsed());
    let endpoints = eventually("three addresses in Endpoints", async || {
        let endpoints = cluster.api::<Endpoints>().get_opt("web").await.unwrap()?;
        let subsets = endpoints.subsets.unwrap_or_default();
        (subsets.iter().flat_map(|s| s.addresses.iter().flatten()).count() == 3).then_some(subsets)
    })
    .await;
    assert_eq!(endpoints[0].ports.as_ref().unwrap()[0].port, 8080);
    eventually("the Deployment to be available", async || {
        let status = cluster.api::<Deployment>().get("web").await.unwrap().status?;
        let progressing = status.conditions?.into_iter().find(|c| c.type_ == "Progressing")?;
        (status.available_replicas == Some(3) && progressing.reason.as_deref() == Some("NewReplicaSetAvailable"))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_keeps_pods_available_and_ends_with_new_ones() {
    let cluster = Cluster::start().await;
    cluster.create::<Deployment>(deployment("web", 4, "x:1")).await;
    let mut serial = 0;
    // Plays the kubelet until the wanted image runs everywhere, checking the bounds (25 percent of 4 is 1 either way). Each list
    // is the truth of one moment.
    let mut roll = async |image: &str, least: usize| {
        eventually("the rollout to end", async || {
            let pods = cluster.pods("app=web").await;
            let (leaving, staying): (Vec<_>, Vec<_>) =
                pods.into_iter().partition(|p| p.metadata.deletion_timestamp.is_some());
            for pod in &leaving {
                cluster.finish_deletion(&name(pod)).await;
            }
            assert!(
                staying.len() <= 5,
                "more pods than maxSurge allows: {:?}",
                staying.iter().map(name).collect::<Vec<_>>()
            );
            let ready = staying.iter().filter(|p| p.status.as_ref().unwrap().pod_ip.is_some()).count();
            assert!(ready >= least, "only {ready} pods are available");
            for pod in staying.iter().filter(|p| node(p).is_some() && p.status.as_ref().unwrap().pod_ip.is_none()) {
                serial += 1;
                cluster.make_ready(pod, &format!("10.244.1.{}", serial + 1)).await;
            }
            let of = |p: &Pod| p.spec.as_ref().unwrap().containers[0].image.clone();
            let status = cluster.api::<Deployment>().get("web").await.unwrap().status?;
            let done = staying.len() == 4 && staying.iter().all(|p| of(p).as_deref() == Some(image));
            (done && leaving.is_empty() && status.available_replicas == Some(4) && status.updated_replicas == Some(4))
                .then_some(())
        })
        .await;
    };
    roll("x:1", 0).await;
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "x:2"}]}}}});
    cluster.api::<Deployment>().patch("web", &PatchParams::default(), &Patch::Strategic(image)).await.unwrap();
    roll("x:2", 3).await;
    let sets = cluster.api::<ReplicaSet>().list(&ListParams::default()).await.unwrap().items;
    let mut revisions: Vec<(String, i32)> = sets
        .iter()
        .map(|s| {
            let revision = s.metadata.annotations.as_ref().unwrap()["deployment.kubernetes.io/revision"].clone();
            (revision, s.spec.as_ref().unwrap().replicas.unwrap())
        })
        .collect();
    revisions.sort();
    assert_eq!(revisions, [("1".to_string(), 0), ("2".to_string(), 4)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_set_goes_in_order() {
    let cluster = Cluster::start().await;
    let set = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"},
        "spec": {"replicas": 2, "serviceName": "dbsvc", "selector": {"matchLabels": {"app": "db"}},
            "template": {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [{"name": "c", "image": "x:1"}]}}}});
    cluster.create::<StatefulSet>(set).await;
    let first = eventually("db-0 on a node", async || {
        cluster.api::<Pod>().get_opt("db-0").await.unwrap().filter(|p| node(p).is_some())
    })
    .await;
    assert!(cluster.api::<Pod>().get_opt("db-1").await.unwrap().is_none(), "db-1 waits for db-0");
    cluster.make_ready(&first, "10.244.1.2").await;
    let second = eventually("db-1 on a node", async || {
        cluster.api::<Pod>().get_opt("db-1").await.unwrap().filter(|p| node(p).is_some())
    })
    .await;
    cluster.make_ready(&second, "10.244.2.2").await;
    eventually("status", async || {
        let status = cluster.api::<StatefulSet>().get("db").await.unwrap().status?;
        (status.ready_replicas == Some(2) && status.current_replicas == Some(2)).then_some(())
    })
    .await;
    assert_eq!(cluster.api::<ControllerRevision>().list(&ListParams::default()).await.unwrap().items.len(), 1);
    // Deleting the set takes everything along.
    cluster.api::<StatefulSet>().delete("db", &DeleteParams::background()).await.unwrap();
    eventually("all to be collected", async || {
        for pod in cluster.pods("app=db").await {
            if pod.metadata.deletion_timestamp.is_some() {
                cluster.finish_deletion(&name(&pod)).await;
            }
        }
        let revisions = cluster.api::<ControllerRevision>().list(&ListParams::default()).await.unwrap().items;
        (cluster.pods("app=db").await.is_empty() && revisions.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_without_a_fitting_node_says_why_and_is_scheduled_when_one_fits() {
    let cluster = Cluster::start().await;
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"nodeSelector": {"disk": "ssd"}, "containers": [{"name": "c", "image": "x"}]}});
    cluster.create::<Pod>(pod).await;
    let told = eventually("the PodScheduled condition", async || {
        let conditions = cluster.api::<Pod>().get("p").await.unwrap().status?.conditions?;
        conditions.into_iter().find(|c| c.type_ == "PodScheduled" && c.status == "False")
    })
    .await;
    assert_eq!(told.reason.as_deref(), Some("Unschedulable"));
    let text = told.message.unwrap();
    assert!(
        text.starts_with("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."),
        "{text}"
    );
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let label = json!({"metadata": {"labels": {"disk": "ssd"}}});
    nodes.patch("node-2", &PatchParams::default(), &Patch::Merge(label)).await.unwrap();
    let bound = eventually("the pod on a node", async || node(&cluster.api::<Pod>().get("p").await.unwrap())).await;
    assert_eq!(bound, "node-2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_empties_and_goes() {
    let cluster = Cluster::start().await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    namespaces.create(&PostParams::default(), &from(json!({"metadata": {"name": "team"}}))).await.unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "team");
    eventually("the root certificate", async || maps.get_opt("kube-root-ca.crt").await.unwrap()).await;
    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}});
    maps.create(&PostParams::default(), &from(held)).await.unwrap();
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), "team");
    deployments.create(&PostParams::default(), &from(deployment("web", 0, "x"))).await.unwrap();
    namespaces.delete("team", &DeleteParams::default()).await.unwrap();
    let remaining = eventually("the conditions", async || {
        let conditions = namespaces.get("team").await.unwrap().status?.conditions?;
        conditions.into_iter().find(|c| c.type_ == "NamespaceFinalizersRemaining" && c.status == "True")
    })
    .await;
    assert!(remaining.message.unwrap().contains("example.com/hold in 1 resource instances"));
    maps.patch("held", &PatchParams::default(), &Patch::Merge(json!({"metadata": {"finalizers": null}})))
        .await
        .unwrap();
    let released = Instant::now();
    eventually("the namespace to go", async || namespaces.get_opt("team").await.unwrap().is_none().then_some(())).await;
    eprintln!("last object released to namespace gone: {:?}", released.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_waits_for_its_claim_and_for_company() {
    let cluster = Cluster::start().await;
    let waits_for = async |pod: &str, text: &str| {
        eventually(text, async || cluster.unscheduled(pod).await.filter(|told| told.contains(text))).await
    };
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {
        "containers": [{"name": "c", "image": "x"}], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}});
    cluster.create::<Pod>(pod).await;
    let told = waits_for("p", "persistentvolumeclaim \"data\" not found").await;
    assert!(
        told.ends_with("preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."),
        "{told}"
    );
    eventually("the event", async || {
        cluster.events("FailedScheduling").await.into_iter().find(|e| e.message.as_ref() == Some(&told))
    })
    .await;
    let claim = json!({"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": "disk",
        "resources": {"requests": {"storage": "1Gi"}}}});
    cluster.create::<PersistentVolumeClaim>(claim).await;
    waits_for("p", "pod has unbound immediate PersistentVolumeClaims").await;
    let volume = json!({"metadata": {"name": "disk"}, "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/tmp"}}});
    Api::<PersistentVolume>::all(cluster.client.clone()).create(&PostParams::default(), &from(volume)).await.unwrap();
    let bound = json!({"status": {"phase": "Bound"}});
    let claims = cluster.api::<PersistentVolumeClaim>();
    claims.patch_status("data", &PatchParams::default(), &Patch::Merge(bound)).await.unwrap();
    eventually("the pod on a node", async || node(&cluster.api::<Pod>().get("p").await.unwrap())).await;

    let pod = json!({"metadata": {"name": "web"}, "spec": {"containers": [{"name": "c", "image": "x"}],
        "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": {"app": "db"}}}]}}}});
    cluster.create::<Pod>(pod).await;
    waits_for("web", "0/2 nodes are available: 2 node(s) didn't match pod affinity rules.").await;
    let db = json!({"metadata": {"name": "db", "labels": {"app": "db"}},
        "spec": {"nodeName": "node-2", "containers": [{"name": "c", "image": "x"}]}});
    cluster.create::<Pod>(db).await;
    let chosen = eventually("web on a node", async || node(&cluster.api::<Pod>().get("web").await.unwrap())).await;
    assert_eq!(chosen, "node-2", "beside the database");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cron_job_runs_on_time_and_its_job_completes() {
    let cluster = Cluster::start().await;
    let template = json!({"metadata": {"labels": {"app": "tick"}},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}});
    let cron = json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "tick"},
        "spec": {"schedule": "@every 1h", "jobTemplate": {"spec": {"template": template, "ttlSecondsAfterFinished": 600}}}});
    cluster.create::<CronJob>(cron).await;
    assert!(cluster.api::<Job>().list(&ListParams::default()).await.unwrap().items.is_empty(), "it is not time yet");
    cluster.clock.advance(Duration::from_secs(3_601));
    let pod = eventually("the pod of the Job", async || cluster.pods("app=tick").await.pop()).await;
    let active = eventually("the active Job", async || {
        cluster.api::<CronJob>().get("tick").await.unwrap().status?.active?.pop()?.name
    })
    .await;
    let done = json!({"status": {"phase": "Succeeded"}});
    cluster.api::<Pod>().patch_status(&name(&pod), &PatchParams::default(), &Patch::Merge(done)).await.unwrap();
    let status = eventually("the Job to be complete", async || {
        let status = cluster.api::<Job>().get(&active).await.unwrap().status?;
        status.conditions.as_ref()?.iter().any(|c| c.type_ == "Complete").then_some(status)
    })
    .await;
    assert_eq!((status.succeeded, status.active), (Some(1), None));
    assert!(cluster.api::<Pod>().get(&name(&pod)).await.unwrap().metadata.finalizers.is_none(), "the pod is counted");
    eventually("the success in the status", async || {
        let status = cluster.api::<CronJob>().get("tick").await.unwrap().status?;
        (status.active.is_none() && status.last_schedule_time.is_some()).then_some(status.last_successful_time?)
    })
    .await;
    // Its time to live passes, long before the next time of the schedule.
    cluster.clock.advance(Duration::from_secs(601));
    eventually("the Job and its pod to go", async || {
        let jobs = cluster.api::<Job>().list(&ListParams::default()).await.unwrap().items;
        for pod in cluster.pods("app=tick").await.iter().filter(|p| p.metadata.deletion_timestamp.is_some()) {
            cluster.finish_deletion(&name(pod)).await;
        }
        (jobs.is_empty() && cluster.pods("app=tick").await.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_a_silent_node_stop_serving_and_are_evicted_then_collected() {
    // The last heartbeat of the node is before the clock is put forward.
    let cluster = Cluster::prepared(async |client| {
        let silent =
            json!({"metadata": {"name": "silent"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        Api::<Node>::all(client.clone()).create(&PostParams::default(), &from(silent)).await.unwrap();
        let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
        leases.create(&PostParams::default(), &from(json!({"metadata": {"name": "silent"}}))).await.unwrap();
    })
    .await;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    cluster.create::<Service>(service).await;
    let on_silent = |name: &str| {
        json!({"metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"nodeName": "silent", "containers": [{"name": "c", "image": "x"}], "tolerations": [
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]}})
    };
    let pod = cluster.create::<Pod>(on_silent("web")).await;
    cluster.make_ready(&pod, "10.244.9.2").await;
    let ready = async || {
        let of_web = ListParams::default().labels("kubernetes.io/service-name=web");
        let slices = cluster.api::<EndpointSlice>().list(&of_web).await.unwrap().items;
        slices.into_iter().flat_map(|s| s.endpoints.unwrap_or_default()).next()?.conditions?.ready
    };
    eventually("a ready endpoint", async || ready().await.filter(|r| *r)).await;

    cluster.clock.advance(Duration::from_secs(41));
    let taints = eventually("the taints", async || {
        let node = nodes.get("silent").await.unwrap();
        let condition = node.status?.conditions?.into_iter().find(|c| c.type_ == "Ready")?;
        let taints = node.spec?.taints?;
        (condition.status == "Unknown" && condition.reason.as_deref() == Some("NodeStatusUnknown")).then_some(taints)
    })
    .await;
    let told: Vec<_> = taints.iter().map(|t| (t.key.as_str(), t.effect.as_str())).collect();
    const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
    assert_eq!(told, [(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]);
    eventually("an endpoint that is not ready", async || ready().await.filter(|r| !*r)).await;
    let deleting = async || {
        cluster.api::<Pod>().get_opt("web").await.unwrap().is_none_or(|p| p.metadata.deletion_timestamp.is_some())
    };
    assert!(!deleting().await, "tolerated for five minutes");
    cluster.clock.advance(Duration::from_secs(301));
    eventually("the eviction", async || deleting().await.then_some(())).await;

    // The kubelet never answers; the pod goes when its node has been gone for 40 s.
    nodes.delete("silent", &DeleteParams::default()).await.unwrap();
    assert!(cluster.api::<Pod>().get_opt("web").await.unwrap().is_some());
    eventually("the pod to be collected", async || {
        // The quarantine begins when the controller has seen the node go.
        cluster.clock.advance(Duration::from_secs(41));
        cluster.api::<Pod>().get_opt("web").await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_leads_at_a_time_and_another_takes_over() {
    let server = Arc::new(Server::start(ServerConfig::new("203.0.113.10:6443".parse().unwrap())).await.unwrap());
    let client = || Client::new(server.local_service(User::new("controllers", &["system:masters"])), "default");
    let candidate = |name: &str| {
        let mut election = Election::new("kube-system", "controllers", name);
        // Nobody loses the lease because the machine is busy: it is given back.
        election.lease_duration = Duration::from_secs(300);
        election.retry_period = Duration::from_millis(100);
        let (observer, shutdown) = (Observer::new(), CancellationToken::new());
        let config = Config { leader_election: Some(election), ..Default::default() };
        let run = portolan_controller::run(config, client(), observer.clone(), shutdown.clone());
        (tokio::spawn(run), observer, shutdown)
    };
    let (first, first_observer, stop_first) = candidate("first");
    eventually("the first to lead", async || {
        let closed = first_observer.not_ready();
        (closed.is_empty() && first_observer.encode().contains("workqueue_adds_total")).then_some(())
    })
    .await;
    let (second, second_observer, stop_second) = candidate("second");
    let waiting = [("controllers".to_string(), "waiting for leadership".to_string())];
    eventually("the second to wait", async || (second_observer.not_ready() == waiting).then_some(())).await;
    let deployments: Api<Deployment> = Api::default_namespaced(client());
    let sets: Api<ReplicaSet> = Api::default_namespaced(client());
    let make = async |name: &str| {
        deployments.create(&PostParams::default(), &from(deployment(name, 0, "x"))).await.unwrap();
        eventually("a ReplicaSet", async || {
            let of_name = ListParams::default().labels(&format!("app={name}"));
            sets.list(&of_name).await.unwrap().items.pop()
        })
        .await
    };
    make("one").await;
    assert!(!second_observer.is_ready(), "only one works");
    stop_first.cancel();
    first.await.unwrap().unwrap();
    eventually("the second to lead", async || second_observer.is_ready().then_some(())).await;
    make("two").await;
    stop_second.cancel();
    second.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_measured_has_upstream_names() {
    let cluster = Cluster::start().await;
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    cluster.create::<Service>(service).await;
    let pod = json!({"metadata": {"name": "web", "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    let pod = cluster.create::<Pod>(pod).await;
    eventually("the pod on a node", async || node(&cluster.api::<Pod>().get("web").await.unwrap())).await;
    cluster.make_ready(&pod, "10.244.1.2").await;
    for line in [
        "endpoint_slice_controller_endpoints_desired 1",
        "endpoint_slice_controller_num_endpoint_slices 1",
        "endpoint_slice_controller_desired_endpoint_slices 1",
        "endpoint_slice_controller_endpoints_added_per_sync_sum 1.0",
        "endpoint_slice_controller_changes{operation=\"create\"} 1",
        "scheduler_schedule_attempts_total{result=\"scheduled\"} 1",
        "workqueue_depth{name=\"endpoint_slice\"} 0",
    ] {
        eventually(line, async || cluster.observer.encode().lines().any(|l| l == line).then_some(())).await;
    }
}
