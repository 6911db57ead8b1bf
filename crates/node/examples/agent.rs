//! A stand-in for the `portolan` binary in this crate's tests.
//!
//! `agent echo [--port N]... [--tcp-port N]... [--udp-port N]...` is what the built-in images run. `agent hold DIR` runs two pods
//! on a node in the namespace `DIR/netns/node`, prints `running` and waits to be killed.

use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference, Pod, PodStatus, Secret, Service};
use portolan_node::echo::{EchoConfig, Identity};
use portolan_node::{BoundToken, EventType, ImageStore, Kubelet, LookupError, NodeApi, NodeConfig, RuntimeConfig};
use serde_json::json;
use tokio::sync::mpsc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match args.split_first() {
        Some((command, flags)) if command == "echo" => Ok(runtime.block_on(portolan_node::echo::run(echo(flags)?))?),
        Some((command, [dir])) if command == "hold" => runtime.block_on(hold(Path::new(dir))),
        _ => Err("usage: agent echo FLAGS | agent hold DIR".into()),
    }
}

fn echo(flags: &[String]) -> Result<EchoConfig, Box<dyn std::error::Error>> {
    let mut config = EchoConfig { http_ports: Vec::new(), identity: Identity::from_env(), ..EchoConfig::default() };
    for pair in flags.chunks(2) {
        let [flag, value] = pair else { return Err(format!("{} needs a value", pair[0]).into()) };
        let port = value.parse()?;
        match flag.as_str() {
            "--port" => config.http_ports.push(port),
            "--tcp-port" => config.tcp_ports.push(port),
            "--udp-port" => config.udp_ports.push(port),
            _ => return Err(format!("unknown flag {flag}").into()),
        }
    }
    if config.http_ports.is_empty() {
        config.http_ports.push(8080);
    }
    Ok(config)
}

async fn hold(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (ready, mut readied) = mpsc::unbounded_channel();
    let config = NodeConfig {
        name: "node-9".into(),
        zone: String::new(),
        netns: portolan_linux::Netns::open(dir.join("netns/node"))?,
        pod_cidr: "10.244.9.0/24".parse()?,
        node_ip: "192.168.50.19".parse()?,
        cluster_dns: Vec::new(),
        cluster_domain: "cluster.local".into(),
        state_dir: dir.join("held/state"),
        run_dir: dir.join("held/run"),
        images: ImageStore::open(dir.join("images"))?,
        allow_pull: false,
        runtime: RuntimeConfig::default(),
        host_resolv_conf: None,
        max_pods: 10,
    };
    let kubelet = Kubelet::prepare(config, Arc::new(NoServer { ready })).await?;
    for (name, script) in [("one", "sleep 600 & exec sleep 600"), ("two", "trap '' TERM; while :; do sleep 1; done")] {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "held", "uid": format!("held-{name}-{}", std::process::id())},
            "spec": {"volumes": [{"name": "m", "emptyDir": {"medium": "Memory"}}],
                     "containers": [{"name": "main", "image": "portolan.dev/toolbox", "command": ["/bin/sh", "-c", script],
                                     "resources": {"limits": {"memory": "64Mi"}},
                                     "volumeMounts": [{"name": "m", "mountPath": "/m"}]}]}}))?;
        kubelet.apply(pod);
    }
    let mut names = std::collections::BTreeSet::new();
    while names.len() < 2 {
        names.extend(readied.recv().await);
    }
    println!("running");
    std::future::pending().await
}

/// An API server that knows nothing and is told when a pod runs.
struct NoServer {
    ready: mpsc::UnboundedSender<String>,
}

fn nothing<T: Send + 'static>() -> BoxFuture<'static, Result<T, LookupError>> {
    Box::pin(async { Err(LookupError::NotFound("not found".into())) })
}

impl NodeApi for NoServer {
    fn event(&self, _: &ObjectReference, _: EventType, reason: &str, message: String) {
        eprintln!("{reason}: {message}");
    }
    fn config_map(&self, _: &str, _: &str) -> BoxFuture<'static, Result<ConfigMap, LookupError>> {
        nothing()
    }
    fn secret(&self, _: &str, _: &str) -> BoxFuture<'static, Result<Secret, LookupError>> {
        nothing()
    }
    fn service(&self, _: &str, _: &str) -> BoxFuture<'static, Result<Service, LookupError>> {
        nothing()
    }
    fn services(&self, _: &str) -> BoxFuture<'static, Result<Vec<Service>, LookupError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
    fn token(&self, _: &Pod, _: &str, _: i64) -> BoxFuture<'static, Result<BoundToken, LookupError>> {
        nothing()
    }
    fn write_status(&self, pod: &Pod, status: PodStatus) -> BoxFuture<'static, Result<(), LookupError>> {
        if status.phase.as_deref() == Some("Running") {
            let _ = self.ready.send(pod.metadata.name.clone().unwrap_or_default());
        }
        Box::pin(async { Ok(()) })
    }
    fn delete_pod(&self, _: &Pod) -> BoxFuture<'static, Result<(), LookupError>> {
        Box::pin(async { Ok(()) })
    }
}
