//! Which resources the API server has, for controllers that treat all kinds alike.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::Client;
use kube::core::ApiResource;
use kube::discovery::{ApiCapabilities, Discovery, Scope, verbs};
use tokio::sync::Mutex;

/// A kind of objects that can be listed and deleted.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    pub resource: ApiResource,
    pub namespaced: bool,
    pub watchable: bool,
    /// Whether the whole collection can be deleted with one request.
    pub delete_collection: bool,
}

impl Kind {
    fn of(resource: ApiResource, capabilities: &ApiCapabilities) -> Option<Kind> {
        let can = |verb| capabilities.supports_operation(verb);
        (can(verbs::LIST) && can(verbs::DELETE)).then(|| Kind {
            namespaced: capabilities.scope == Scope::Namespaced,
            watchable: can(verbs::WATCH),
            delete_collection: can(verbs::DELETE_COLLECTION),
            resource,
        })
    }

    /// The group and kind, by which owner references find it.
    pub fn is(&self, api_version: &str, kind: &str) -> bool {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        self.resource.group == group && self.resource.kind == kind
    }
}

/// Kinds and when they were read.
type Answer = (Instant, Arc<Vec<Kind>>);

/// Asks the API server for its kinds, at most once per [`FRESH`].
#[derive(Clone)]
pub(crate) struct Kinds {
    client: Client,
    cached: Arc<Mutex<Option<Answer>>>,
}

/// How long an answer is reused; many namespaces may be deleted at once.
const FRESH: Duration = Duration::from_secs(1);

impl Kinds {
    pub fn new(client: Client) -> Kinds {
        Kinds { client, cached: Arc::default() }
    }

    /// All kinds that can be listed and deleted, each in its preferred version. Events are among them.
    pub async fn get(&self) -> Result<Arc<Vec<Kind>>, kube::Error> {
        let mut cached = self.cached.lock().await;
        if let Some((at, kinds)) = &*cached
            && at.elapsed() < FRESH
        {
            return Ok(kinds.clone());
        }
        let discovery = match Discovery::new(self.client.clone()).run_aggregated().await {
            Ok(discovery) => discovery,
            Err(_) => Discovery::new(self.client.clone()).run().await?,
        };
        let mut kinds: Vec<Kind> = discovery
            .groups()
            .flat_map(|group| group.recommended_resources())
            .filter_map(|(resource, capabilities)| Kind::of(resource, &capabilities))
            .collect();
        kinds.sort_by(|a, b| (&a.resource.group, &a.resource.plural).cmp(&(&b.resource.group, &b.resource.plural)));
        let kinds = Arc::new(kinds);
        *cached = Some((Instant::now(), kinds.clone()));
        Ok(kinds)
    }
}
