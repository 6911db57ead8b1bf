//! What a provider of load balancers does, and how it fails.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Service};
use portolan_plan::announce::{AllocationError, Ignored, NodeTarget, SliceTargets};

/// What the traffic of a Service may go to.
#[derive(Clone, Copy, Debug)]
pub struct TargetSet<'a> {
    /// Nodes that are not excluded from load balancers.
    pub nodes: &'a [NodeTarget],
    /// The Service's EndpointSlices.
    pub slices: &'a [&'a SliceTargets],
}

/// Why a load balancer is not as the Service asks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProviderError {
    /// No address; another Service's release or an edit may help.
    #[error(transparent)]
    Address(#[from] AllocationError),
    /// The kernel refused an address of a load balancer.
    #[error("cannot hold address: {0}")]
    Netlink(#[from] portolan_linux::NetlinkError),
    /// The kernel refused the rules.
    #[error("cannot apply rules: {0}")]
    Rules(#[from] portolan_nft::Error),
    /// The namespace cannot be used.
    #[error("cannot use the network namespace: {0}")]
    Io(#[from] std::io::Error),
}

/// Makes load balancers. Calls come one at a time.
#[async_trait]
pub trait Provider: Send + Sync {
    /// As in messages and configuration.
    fn name(&self) -> &'static str;

    /// Annotations that have no effect here. Pure.
    fn ignored(&self, service: &Service) -> Vec<Ignored>;

    /// Takes over a load balancer that an earlier process made, before anything is changed.
    fn adopt(&mut self, service: &Service, targets: TargetSet<'_>);

    /// Makes or changes a load balancer; returns the entries of its status. Doing it again changes nothing.
    async fn ensure(
        &mut self,
        service: &Service,
        targets: TargetSet<'_>,
    ) -> Result<Vec<LoadBalancerIngress>, ProviderError>;

    /// Changes the targets of a load balancer that exists; nothing happens if it does not.
    async fn update(&mut self, service: &Service, targets: TargetSet<'_>) -> Result<(), ProviderError>;

    /// Removes what there is of a load balancer; tells whether there was any.
    async fn ensure_deleted(&mut self, service: &Service) -> Result<bool, ProviderError>;

    /// Whether the Service has a load balancer, as far as known.
    fn exists(&self, service: &Service) -> bool;
}
