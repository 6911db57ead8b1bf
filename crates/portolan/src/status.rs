//! `portolan status`: what runs, where, and whether it is ready.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use serde::Serialize;

use crate::args;
use crate::state::{Paths, State};

#[derive(Debug, Serialize)]
struct Report {
    name: String,
    running: bool,
    ready: bool,
    #[serde(flatten)]
    state: Option<State>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_ready: Vec<String>,
}

/// Runs the command; the result is the exit code.
pub async fn run(args: &args::Status) -> Result<u8> {
    let paths = Paths::new(&args.named.name);
    let running = paths.holder()?.is_some();
    let state = paths.read_state()?.filter(|_| running);
    let mut report = Report { name: paths.name.to_string(), running, ready: false, state, not_ready: Vec::new() };
    if let Some(state) = &report.state {
        report.not_ready = match not_ready(state).await {
            Ok(names) => names,
            Err(error) => vec![format!("API server: {error:#}")],
        };
        report.ready = state.ready && report.not_ready.is_empty();
    }
    match args.output {
        args::Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        args::Output::Text => print(&report, &paths)?,
    }
    Ok(if report.ready { 0 } else { 1 })
}

fn print(report: &Report, paths: &Paths) -> Result<()> {
    let Some(state) = &report.state else {
        if report.running {
            println!("cluster {} is starting", report.name);
        } else if paths.run.exists() {
            println!(
                "cluster {} is not running but left something behind; clean up with: portolan down --name {0}",
                report.name
            );
        } else {
            println!("cluster {} is not running; start it with: portolan up --name {0} --detach", report.name);
        }
        let others: Vec<String> = Paths::all().iter().filter(|n| **n != paths.name).map(ToString::to_string).collect();
        if !others.is_empty() {
            println!("other clusters: {}", others.join(", "));
        }
        return Ok(());
    };
    println!(
        "cluster     {} ({}, process {})",
        report.name,
        if report.ready { "ready" } else { "not ready" },
        state.pid
    );
    println!("API server  https://{}", state.api);
    println!("kubeconfig  {}", state.kubeconfig.display());
    println!("Ingress     http://{}  https://{}", state.http, state.https);
    for node in &state.nodes {
        println!("node        {} {} {}", node.name, node.address, node.zone);
    }
    for name in &report.not_ready {
        println!("not ready   {name}");
    }
    Ok(())
}

/// Nodes and system pods that are not ready.
async fn not_ready(state: &State) -> Result<Vec<String>> {
    let client = portolan_client::connect(Some(&state.kubeconfig)).await?;
    let mut names = Vec::new();
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await.context("cannot list nodes")?;
    for wanted in &state.nodes {
        let node = nodes.items.iter().find(|n| n.metadata.name.as_ref() == Some(&wanted.name));
        if !node.is_some_and(node_ready) {
            names.push(format!("node {}", wanted.name));
        }
    }
    for namespace in crate::up::SYSTEM_NAMESPACES {
        let pods = Api::<Pod>::namespaced(client.clone(), namespace).list(&ListParams::default()).await?;
        for pod in pods.items.iter().filter(|p| !pod_ready(p)) {
            names.push(format!("pod {namespace}/{}", pod.metadata.name.as_deref().unwrap_or_default()));
        }
    }
    Ok(names)
}

/// Whether a node's Ready condition is true.
pub fn node_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Whether a pod's Ready condition is true.
pub fn pod_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}
