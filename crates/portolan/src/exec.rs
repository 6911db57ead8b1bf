//! `portolan exec`: runs a command of the host in a network namespace of a cluster.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use portolan_linux::Netns;

use crate::state::Paths;

/// Where to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The host that is not part of the cluster.
    Outside,
    /// The LAN's router, which also is the load balancer.
    Router,
    /// A node.
    Node(String),
    /// A pod's network.
    Pod {
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        name: String,
    },
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split('/').collect::<Vec<_>>()[..] {
            ["outside"] => Ok(Place::Outside),
            ["router"] => Ok(Place::Router),
            ["node", name] if is_name(name) => Ok(Place::Node(name.into())),
            ["pod", namespace, name] if is_name(namespace) && is_name(name) => {
                Ok(Place::Pod { namespace: namespace.into(), name: name.into() })
            }
            _ => Err("expected outside, router, node/NAME or pod/NAMESPACE/NAME".into()),
        }
    }
}

/// Whether a text can name an object, and so be a part of a path: not empty, no `.` or `..`.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Replaces this process by `command` in the given place; returns only on failure.
pub fn run(paths: &Paths, place: &Place, command: &[OsString]) -> Result<std::convert::Infallible> {
    paths.running()?;
    let (netns, resolv_conf) = find(paths, place)?;
    let netns = Netns::open(netns)?;
    netns.enter().context("cannot enter the network namespace (are you root?)")?;
    if let Some(file) = resolv_conf {
        // A mount namespace of its own, so that only this command sees the cluster's resolver.
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        let target = std::fs::canonicalize("/etc/resolv.conf").context("cannot find /etc/resolv.conf")?;
        mount(Some(&file), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("cannot mount {} at {}", file.display(), target.display()))?;
    }
    let Some((program, arguments)) = command.split_first() else { bail!("no command given") };
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", Path::new(program).display()))
}

fn find(paths: &Paths, place: &Place) -> Result<(PathBuf, Option<PathBuf>)> {
    let named = |name: &str| -> Result<PathBuf> {
        let path = paths.netns().join(name);
        if !path.exists() {
            bail!("cluster {} has no {name}", paths.name);
        }
        Ok(path)
    };
    Ok(match place {
        Place::Outside => (named("outside")?, Some(paths.outside_resolv_conf())),
        Place::Router => (named("fabric")?, Some(paths.outside_resolv_conf())),
        Place::Node(name) => {
            let nodes = paths.read_state()?.map(|state| state.nodes).unwrap_or_default();
            if !nodes.iter().any(|node| node.name == *name) {
                let names: Vec<String> = nodes.into_iter().map(|node| node.name).collect();
                bail!("cluster {} has no node {name}; its nodes are {}", paths.name, names.join(", "));
            }
            // A node is a host on the LAN and resolves as those do; the machine's own name server is not reachable from it.
            (named(name)?, Some(paths.outside_resolv_conf()))
        }
        Place::Pod { namespace, name } => {
            let netns = match portolan_node::pod_netns(&paths.run, namespace, name) {
                Some(netns) => netns,
                None => return find(paths, &Place::Node(host_network_node(paths, namespace, name)?)),
            };
            let resolv_conf = netns.with_file_name("resolv.conf");
            (netns, resolv_conf.exists().then_some(resolv_conf))
        }
    })
}

/// The node of a pod that uses its node's network.
fn host_network_node(paths: &Paths, namespace: &str, name: &str) -> Result<String> {
    let prefix = format!("{namespace}_{name}_");
    let nodes = std::fs::read_dir(paths.run.join("node")).into_iter().flatten().flatten();
    for node in nodes {
        let mut pods = std::fs::read_dir(node.path().join("pods")).into_iter().flatten().flatten();
        if pods.any(|pod| pod.file_name().to_string_lossy().starts_with(&prefix)) {
            return Ok(node.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("pod {namespace}/{name} does not run in cluster {}", paths.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_parsed() {
        assert_eq!("outside".parse(), Ok(Place::Outside));
        assert_eq!("node/node-1".parse(), Ok(Place::Node("node-1".into())));
        assert_eq!("pod/a/b".parse(), Ok(Place::Pod { namespace: "a".into(), name: "b".into() }));
        for bad in ["", "node", "node/", "pod/a", "pod/a/b/c", "x", "node/..", "pod/../a"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }
}
