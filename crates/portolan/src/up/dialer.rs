//! How the API server reaches kubelets and pods of a standalone cluster.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::RwLock;

use futures::future::BoxFuture;
use portolan_apiserver::{BoxedIo, ClusterDialer};
use portolan_linux::Netns;
use portolan_node::Kubelet;

/// Bytes in flight between the API server and a kubelet of the same process.
const PIPE: usize = 64 * 1024;

/// Kubelets of this process by node name, and the namespace from which pods are reached.
pub struct Dialer {
    router: Netns,
    kubelets: RwLock<BTreeMap<String, Kubelet>>,
}

impl Dialer {
    pub fn new(router: Netns) -> Dialer {
        Dialer { router, kubelets: RwLock::default() }
    }

    pub fn add(&self, node: String, kubelet: Kubelet) {
        self.kubelets.write().unwrap_or_else(|p| p.into_inner()).insert(node, kubelet);
    }
}

impl ClusterDialer for Dialer {
    fn kubelet(&self, node: &str) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let kubelet = self.kubelets.read().unwrap_or_else(|p| p.into_inner()).get(node).cloned();
        let node = node.to_string();
        Box::pin(async move {
            let Some(kubelet) = kubelet else {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("no kubelet of node {node} runs here")));
            };
            let (near, far) = tokio::io::duplex(PIPE);
            tokio::spawn(async move { kubelet.serve_connection(far).await });
            Ok(Box::new(near) as BoxedIo)
        })
    }

    fn tcp(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let router = self.router.clone();
        Box::pin(async move { Ok(Box::new(crate::publish::dial(&router, address).await?) as BoxedIo) })
    }
}
