//! `portolan plan`: the kernel rules that the service proxy of a node would apply, as nft text.
//!
//! Objects come from manifests or from a cluster; the compiler and the layout are those of the agent, so what is printed is what it
//! would send.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{Api, ListParams};
use portolan_dataplane::render::{Existing, Renderer};
use portolan_plan::world::{IpFamily, LocalDetection, NodeView, World, parse_net};
use serde_json::Value;

use crate::args;

/// Runs the command.
pub async fn run(args: args::Plan) -> Result<()> {
    let mut view = NodeView {
        name: args.node_name,
        local_detection: LocalDetection::InterfacePrefix("vp".into()),
        ..Default::default()
    };
    let mut world = World::default();
    match &args.filename {
        Some(path) => {
            for object in read(path)? {
                put(&mut world, &mut view, object)?;
            }
        }
        None => {
            let client = portolan_client::connect(args.connection.kubeconfig.as_deref()).await?;
            let all = ListParams::default();
            for service in Api::<Service>::all(client.clone()).list(&all).await.context("cannot list Services")?.items {
                world.put_service(&service);
            }
            let slices = Api::<EndpointSlice>::all(client.clone()).list(&all).await;
            for slice in slices.context("cannot list EndpointSlices")?.items {
                world.put_slice(&slice);
            }
            let own = ListParams::default().fields(&format!("spec.nodeName={}", view.name));
            for pod in Api::<Pod>::all(client.clone()).list(&own).await.context("cannot list Pods")?.items {
                world.put_pod(&pod);
            }
            for cidr in
                Api::<ServiceCIDR>::all(client.clone()).list(&all).await.context("cannot list ServiceCIDRs")?.items
            {
                see_range(&mut world, cidr);
            }
            if let Some(node) = Api::<Node>::all(client).get_opt(&view.name).await.context("cannot read the Node")? {
                see_node(&mut view, &node);
            }
        }
    }
    let (map, findings) = portolan_plan::service::compile(&world, &view);
    for family in [IpFamily::V4, IpFamily::V6] {
        Renderer::new(family).full(&map, &view, Existing::default(), &mut |transaction| -> Result<()> {
            print!("{}", portolan_nft::text::script(&transaction));
            Ok(())
        })?;
    }
    for finding in findings.iter().chain(world.strays()) {
        eprintln!("{}: {} ({})", finding.origin, finding.message, finding.reason);
    }
    Ok(())
}

fn put(world: &mut World, view: &mut NodeView, object: Value) -> Result<()> {
    let kind = object["kind"].as_str().unwrap_or_default().to_string();
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_string();
    let wrong = || format!("cannot read {kind} {name}");
    match kind.as_str() {
        "Service" => {
            let mut service: Service = serde_json::from_value(object).with_context(wrong)?;
            service.metadata.namespace.get_or_insert_with(|| "default".into());
            world.put_service(&service);
        }
        "EndpointSlice" => {
            let mut slice: EndpointSlice = serde_json::from_value(object).with_context(wrong)?;
            slice.metadata.namespace.get_or_insert_with(|| "default".into());
            world.put_slice(&slice);
        }
        "Pod" => {
            let mut pod: Pod = serde_json::from_value(object).with_context(wrong)?;
            pod.metadata.namespace.get_or_insert_with(|| "default".into());
            // A pod of another node is that node's business; a manifest that was never scheduled is shown as if it ran here.
            if pod.spec.as_ref().and_then(|s| s.node_name.as_ref()).is_none_or(|n| *n == view.name) {
                world.put_pod(&pod);
            }
        }
        "ServiceCIDR" => {
            let cidr: ServiceCIDR = serde_json::from_value(object).with_context(wrong)?;
            see_range(world, cidr);
        }
        "Node" if name == view.name => see_node(view, &serde_json::from_value(object).with_context(wrong)?),
        // Other kinds do not concern the proxy.
        _ => {}
    }
    Ok(())
}

fn see_range(world: &mut World, cidr: ServiceCIDR) {
    let texts = cidr.spec.and_then(|s| s.cidrs).unwrap_or_default();
    let name = cidr.metadata.name.unwrap_or_default();
    world.put_service_cidr(&name, texts.iter().filter_map(|t| parse_net(t)).collect());
}

fn see_node(view: &mut NodeView, node: &Node) {
    view.zone = node.metadata.labels.as_ref().and_then(|l| l.get("topology.kubernetes.io/zone")).cloned();
    let addresses = node.status.as_ref().and_then(|s| s.addresses.as_ref());
    view.node_port_addresses = addresses
        .into_iter()
        .flatten()
        .filter(|a| a.type_ == "InternalIP")
        .filter_map(|a| a.address.parse().ok())
        .collect();
}

/// The objects of a file, or of all YAML and JSON files of a folder, in the order of their names.
fn read(path: &Path) -> Result<Vec<Value>> {
    let mut files: Vec<PathBuf> = Vec::new();
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
            let file = entry?.path();
            if file.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
                files.push(file);
            }
        }
        files.sort();
    } else {
        files.push(path.to_path_buf());
    }
    let mut objects = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let parsed: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        for object in parsed {
            match object {
                Value::Null => {}
                Value::Object(mut list) if list.get("items").is_some_and(Value::is_array) => {
                    if let Some(Value::Array(items)) = list.remove("items") {
                        objects.extend(items);
                    }
                }
                Value::Object(_) => objects.push(object),
                other => bail!("{}: expected objects, found {other}", file.display()),
            }
        }
    }
    Ok(objects)
}
