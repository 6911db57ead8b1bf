//! What every component needs to be a Kubernetes client: configuration, an event recorder, leader election.
//!
//! Everything works against any API server, the embedded one included. Caches are kube-runtime's watchers and reflectors.

pub mod events;
pub mod leader;

use std::path::{Path, PathBuf};

pub use events::{EventRecorder, EventType};

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be read or used.
    #[error("cannot use kubeconfig {path}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// Neither a kubeconfig nor a pod's service account is there.
    #[error("found no kubeconfig (KUBECONFIG, ~/.kube/config) and no service account of a pod; pass --kubeconfig")]
    Infer(#[source] kube::config::InferConfigError),
    /// The configuration was read but no client could be built from it.
    #[error("cannot build a Kubernetes client")]
    Client(#[source] kube::Error),
}

/// Connects with the given kubeconfig, else with the environment's (KUBECONFIG, the home directory, a pod's service account).
pub async fn connect(kubeconfig: Option<&Path>) -> Result<kube::Client, ConnectError> {
    let config = match kubeconfig {
        Some(path) => {
            let unusable = |source| ConnectError::Kubeconfig { path: path.to_path_buf(), source };
            let file = kube::config::Kubeconfig::read_from(path).map_err(unusable)?;
            kube::Config::from_custom_kubeconfig(file, &Default::default()).await.map_err(unusable)?
        }
        None => kube::Config::infer().await.map_err(ConnectError::Infer)?,
    };
    kube::Client::try_from(config).map_err(ConnectError::Client)
}
