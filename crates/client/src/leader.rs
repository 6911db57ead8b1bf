//! Leader election through a `coordination.k8s.io/v1` Lease, with client-go's rules.
//!
//! A candidate takes the Lease when nobody holds it or when its holder has not renewed it for the lease duration, as seen by the
//! candidate's own clock. Updates carry the resourceVersion that was read, so of two candidates one loses with a conflict.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Which Lease, and for whom.
#[derive(Clone, Debug)]
pub struct Election {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// This candidate, unique among all of them (as in a pod's name).
    pub identity: String,
    /// How long a silent leader is still believed; 15 s in Kubernetes.
    pub lease_duration: Duration,
    /// How often the leader renews and the others look; 2 s in Kubernetes.
    pub retry_period: Duration,
}

impl Election {
    /// An election with Kubernetes' usual times.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, identity: impl Into<String>) -> Election {
        Election {
            namespace: namespace.into(),
            name: name.into(),
            identity: identity.into(),
            lease_duration: Duration::from_secs(15),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// Takes part in the election until `shutdown`; the receiver says whether this candidate leads. Leadership is given up at
/// shutdown so that another takes over at once, and lost when it could not be renewed for two thirds of the lease duration.
pub fn campaign(client: kube::Client, election: Election, shutdown: CancellationToken) -> watch::Receiver<bool> {
    let (leads, receiver) = watch::channel(false);
    tokio::spawn(async move {
        let api: Api<Lease> = Api::namespaced(client, &election.namespace);
        let mut seen = Observed::default();
        let mut renewed = Instant::now();
        loop {
            let holds = *leads.borrow();
            match attempt(&api, &election, &mut seen).await {
                Ok(true) => {
                    renewed = Instant::now();
                    set(&leads, true, &election);
                }
                Ok(false) => set(&leads, false, &election),
                Err(error) => {
                    tracing::debug!(%error, lease = election.name, "cannot reach the lease");
                    if holds && renewed.elapsed() > election.lease_duration * 2 / 3 {
                        set(&leads, false, &election);
                    }
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep(election.retry_period) => {}
            }
        }
        if *leads.borrow() {
            release(&api, &election).await;
            set(&leads, false, &election);
        }
    });
    receiver
}

fn set(leads: &watch::Sender<bool>, value: bool, election: &Election) {
    if leads.send_if_modified(|now| std::mem::replace(now, value) != value) {
        let (lease, identity) = (&election.name, &election.identity);
        if value {
            tracing::info!(lease, identity, "became leader");
        } else {
            tracing::info!(lease, identity, "no longer leader");
        }
    }
}

/// The record last seen and when it last changed, by this process's clock.
#[derive(Debug, Default)]
struct Observed {
    record: Option<LeaseSpec>,
    changed: Option<Instant>,
}

/// What a candidate does about the Lease it has just read.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Wait,
    Renew,
    Take,
}

fn decide(spec: &LeaseSpec, identity: &str, silent_for: Duration, lease_duration: Duration) -> Decision {
    match spec.holder_identity.as_deref() {
        Some(holder) if holder == identity => Decision::Renew,
        None | Some("") => Decision::Take,
        // The duration of the holder counts, not ours (client-go).
        Some(_) => {
            let duration = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).map(Duration::from_secs);
            if silent_for >= duration.unwrap_or(lease_duration) { Decision::Take } else { Decision::Wait }
        }
    }
}

async fn attempt(api: &Api<Lease>, election: &Election, seen: &mut Observed) -> Result<bool, kube::Error> {
    let now = MicroTime(Timestamp::now());
    let fresh = |transitions: i32, acquired: MicroTime| LeaseSpec {
        holder_identity: Some(election.identity.clone()),
        lease_duration_seconds: Some(i32::try_from(election.lease_duration.as_secs()).unwrap_or(i32::MAX).max(1)),
        acquire_time: Some(acquired),
        renew_time: Some(now.clone()),
        lease_transitions: Some(transitions),
        ..Default::default()
    };
    let Some(mut lease) = api.get_opt(&election.name).await? else {
        let lease = Lease {
            metadata: ObjectMeta { name: Some(election.name.clone()), ..Default::default() },
            spec: Some(fresh(0, now.clone())),
        };
        return lost_race_is_no_error(api.create(&PostParams::default(), &lease).await);
    };
    let spec = lease.spec.clone().unwrap_or_default();
    if seen.record.as_ref() != Some(&spec) || seen.changed.is_none() {
        *seen = Observed { record: Some(spec.clone()), changed: Some(Instant::now()) };
    }
    let silent_for = seen.changed.map(|at| at.elapsed()).unwrap_or_default();
    let transitions = spec.lease_transitions.unwrap_or(0);
    lease.spec = Some(match decide(&spec, &election.identity, silent_for, election.lease_duration) {
        Decision::Wait => return Ok(false),
        Decision::Renew => fresh(transitions, spec.acquire_time.clone().unwrap_or_else(|| now.clone())),
        Decision::Take => fresh(transitions + 1, now.clone()),
    });
    lost_race_is_no_error(api.replace(&election.name, &PostParams::default(), &lease).await)
}

async fn release(api: &Api<Lease>, election: &Election) {
    let released = async {
        let mut lease = api.get(&election.name).await?;
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(&election.identity) {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
            api.replace(&election.name, &PostParams::default(), &lease).await?;
        }
        Ok::<_, kube::Error>(())
    };
    if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(2), released).await {
        tracing::debug!(%error, lease = election.name, "cannot release the lease");
    }
}

fn lost_race_is_no_error(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_candidate_decides_by_holder_and_silence() {
        let spec = |holder: Option<&str>, seconds: Option<i32>| LeaseSpec {
            holder_identity: holder.map(Into::into),
            lease_duration_seconds: seconds,
            ..Default::default()
        };
        let own = Duration::from_secs(15);
        let table = [
            ("nobody holds it", spec(None, Some(15)), 0, Decision::Take),
            ("released", spec(Some(""), Some(1)), 0, Decision::Take),
            ("we hold it", spec(Some("me"), Some(15)), 100, Decision::Renew),
            ("another holds it and renews", spec(Some("you"), Some(15)), 14, Decision::Wait),
            ("another went silent", spec(Some("you"), Some(15)), 15, Decision::Take),
            ("the holder's own duration counts", spec(Some("you"), Some(60)), 30, Decision::Wait),
            ("no duration: ours", spec(Some("you"), None), 20, Decision::Take),
        ];
        for (name, spec, silent, expected) in table {
            assert_eq!(decide(&spec, "me", Duration::from_secs(silent), own), expected, "{name}");
        }
    }
}
