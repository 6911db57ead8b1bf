//! Computes a pod's status from what is known about its containers.
//!
//! Sources: Kubernetes documentation "Pod Lifecycle" (phases, conditions) and the API documentation of PodStatus; reasons and
//! messages are those that `kubectl` users know.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::lifecycle::{Outcome, Role};

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terminated {
    /// Exit code, 128 plus the signal's number when a signal ended it.
    pub exit_code: i32,
    /// `Completed`, `Error`, `StartError`, `OOMKilled`, …
    pub reason: String,
    /// Termination message.
    pub message: Option<String>,
    /// When it started; absent if it never did.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Id without the runtime's prefix.
    pub container_id: Option<String>,
}

/// The state of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not running and to be started.
    Waiting {
        /// `ContainerCreating`, `PodInitializing`, `CrashLoopBackOff`, `ErrImageNeverPull`, …
        reason: String,
        /// Details.
        message: Option<String>,
    },
    /// Running.
    Running {
        /// Since when.
        since: Timestamp,
    },
    /// Ended, and not (yet) to be started again.
    Terminated(Terminated),
}

/// One container as seen by the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerView {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// The image as the pod names it.
    pub image: String,
    /// The image that it really runs; empty before it is known.
    pub image_id: String,
    /// Id of the current or last run, without the runtime's prefix.
    pub container_id: Option<String>,
    /// Where it is.
    pub state: State,
    /// How the run before ended.
    pub last: Option<Terminated>,
    /// How often it has been started again.
    pub restart_count: i32,
    /// Running, and its startup probe has succeeded.
    pub started: bool,
    /// Running, started, and its readiness probe agrees.
    pub ready: bool,
}

/// One pod as seen by the agent.
#[derive(Clone, Debug)]
pub struct PodView<'a> {
    /// The pod's object.
    pub pod: &'a Pod,
    /// Init containers first, in the order of the spec.
    pub containers: Vec<ContainerView>,
    /// Addresses of the sandbox; empty before it exists.
    pub ips: Vec<IpAddr>,
    /// The node's address.
    pub host_ip: IpAddr,
    /// When the agent first saw the pod.
    pub start_time: Timestamp,
    /// Whether the sandbox and its network exist.
    pub sandbox_ready: bool,
    /// Whether a regular container has ever been started.
    pub initialized: bool,
    /// Set when the pod is over.
    pub outcome: Option<Outcome>,
    /// Why the agent itself ended the pod, as reason and message.
    pub failure: Option<(String, String)>,
}

/// Reason of a pod that the node has thrown out.
pub const EVICTED: &str = "Evicted";

/// Prefix of container ids in statuses: the name of the runtime.
const ID_SCHEME: &str = "crun://";

/// The status to write; `previous` gives the times of conditions that have not changed.
pub fn pod_status(view: &PodView<'_>, previous: Option<&PodStatus>, now: Timestamp) -> PodStatus {
    let (init, regular): (Vec<_>, Vec<_>) = view.containers.iter().partition(|c| c.role != Role::Regular);
    let phase = phase(view);
    let mut conditions = conditions(view, phase);
    if let Some((_, message)) = view.failure.as_ref().filter(|(reason, _)| reason == EVICTED) {
        conditions.push(PodCondition {
            type_: "DisruptionTarget".to_string(),
            status: "True".to_string(),
            reason: Some("TerminationByKubelet".to_string()),
            message: Some(message.clone()),
            ..PodCondition::default()
        });
    }
    let generation = view.pod.metadata.generation;
    for condition in &mut conditions {
        let old = previous
            .and_then(|p| p.conditions.as_ref())
            .and_then(|list| list.iter().find(|c| c.type_ == condition.type_ && c.status == condition.status));
        condition.last_transition_time =
            Some(old.and_then(|c| c.last_transition_time.clone()).unwrap_or(Time(whole_second(now))));
        condition.observed_generation = generation;
    }
    let statuses =
        |list: &[&ContainerView]| (!list.is_empty()).then(|| list.iter().map(|c| container_status(c)).collect());
    PodStatus {
        phase: Some(phase.to_string()),
        reason: view.failure.as_ref().map(|(reason, _)| reason.clone()),
        message: view.failure.as_ref().map(|(_, message)| message.clone()),
        conditions: Some(conditions),
        host_ip: Some(view.host_ip.to_string()),
        host_ips: Some(vec![HostIP { ip: view.host_ip.to_string() }]),
        pod_ip: view.ips.first().map(IpAddr::to_string),
        pod_ips: (!view.ips.is_empty()).then(|| view.ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
        start_time: Some(Time(whole_second(view.start_time))),
        init_container_statuses: statuses(&init),
        container_statuses: statuses(&regular),
        qos_class: view.pod.spec.as_ref().map(|spec| qos_class(spec).to_string()),
        observed_generation: generation,
        ..PodStatus::default()
    }
}

/// API times have whole seconds.
fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

fn phase(view: &PodView<'_>) -> &'static str {
    match view.outcome {
        Some(Outcome::Succeeded) => return "Succeeded",
        Some(Outcome::Failed) => return "Failed",
        None => {}
    }
    let never_ran = |c: &ContainerView| matches!(c.state, State::Waiting { .. }) && c.last.is_none();
    let regular: Vec<_> = view.containers.iter().filter(|c| c.role == Role::Regular).collect();
    if !view.initialized || regular.iter().any(|c| never_ran(c)) { "Pending" } else { "Running" }
}

fn conditions(view: &PodView<'_>, phase: &str) -> Vec<PodCondition> {
    let condition = |kind: &str, status: bool, reason: Option<&str>, message: Option<String>| PodCondition {
        type_: kind.to_string(),
        status: if status { "True" } else { "False" }.to_string(),
        reason: reason.map(str::to_string),
        message,
        ..PodCondition::default()
    };
    let over = match phase {
        "Succeeded" => Some("PodCompleted"),
        "Failed" => Some("PodFailed"),
        _ => None,
    };

    let mut list = vec![condition("PodReadyToStartContainers", view.sandbox_ready, None, None)];
    let incomplete: Vec<&str> = view
        .containers
        .iter()
        .filter(|c| match c.role {
            Role::Init => !matches!(&c.state, State::Terminated(t) if t.exit_code == 0),
            Role::Sidecar => !c.started,
            Role::Regular => false,
        })
        .map(|c| c.name.as_str())
        .collect();
    list.push(if view.initialized || incomplete.is_empty() {
        condition("Initialized", true, (phase == "Succeeded").then_some("PodCompleted"), None)
    } else {
        let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
        condition("Initialized", false, Some("ContainersNotInitialized"), Some(message))
    });

    let unready: Vec<&str> =
        view.containers.iter().filter(|c| c.role != Role::Init && !c.ready).map(|c| c.name.as_str()).collect();
    let containers_ready = if let Some(reason) = over {
        condition("ContainersReady", false, Some(reason), None)
    } else if unready.is_empty() {
        condition("ContainersReady", true, None, None)
    } else {
        let message = format!("containers with unready status: [{}]", unready.join(" "));
        condition("ContainersReady", false, Some("ContainersNotReady"), Some(message))
    };
    let ready = if containers_ready.status != "True" {
        PodCondition { type_: "Ready".to_string(), ..containers_ready.clone() }
    } else {
        let missing = gates_not_ready(view.pod);
        if missing.is_empty() {
            condition("Ready", true, None, None)
        } else {
            condition("Ready", false, Some("ReadinessGatesNotReady"), Some(missing.join(", ")))
        }
    };
    list.push(ready);
    list.push(containers_ready);
    list.push(condition("PodScheduled", true, None, None));
    list
}

/// What keeps readiness gates from being met; conditions are read from the pod's stored status, where controllers write them.
fn gates_not_ready(pod: &Pod) -> Vec<String> {
    let gates = pod.spec.as_ref().and_then(|s| s.readiness_gates.as_ref());
    let stored = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    gates
        .into_iter()
        .flatten()
        .filter_map(|gate| {
            let kind = &gate.condition_type;
            match stored.into_iter().flatten().find(|c| &c.type_ == kind) {
                None => Some(format!("corresponding condition of pod readiness gate \"{kind}\" does not exist.")),
                Some(c) if c.status != "True" => {
                    Some(format!("the status of pod readiness gate \"{kind}\" is not \"True\", but {}", c.status))
                }
                Some(_) => None,
            }
        })
        .collect()
}

fn container_status(view: &ContainerView) -> ContainerStatus {
    let running = matches!(view.state, State::Running { .. });
    let done = matches!(&view.state, State::Terminated(t) if t.exit_code == 0);
    ContainerStatus {
        name: view.name.clone(),
        image: view.image.clone(),
        image_id: view.image_id.clone(),
        container_id: view.container_id.as_ref().map(|id| format!("{ID_SCHEME}{id}")),
        state: Some(match &view.state {
            State::Waiting { reason, message } => ContainerState {
                waiting: Some(ContainerStateWaiting { reason: Some(reason.clone()), message: message.clone() }),
                ..ContainerState::default()
            },
            State::Running { since } => ContainerState {
                running: Some(ContainerStateRunning { started_at: Some(Time(whole_second(*since))) }),
                ..ContainerState::default()
            },
            State::Terminated(end) => terminated(end),
        }),
        last_state: Some(view.last.as_ref().map(terminated).unwrap_or_default()),
        ready: if view.role == Role::Init { done } else { view.ready },
        started: Some(running && view.started),
        restart_count: view.restart_count,
        ..ContainerStatus::default()
    }
}

fn terminated(end: &Terminated) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: end.exit_code,
            reason: Some(end.reason.clone()),
            message: end.message.clone(),
            started_at: end.started_at.map(|at| Time(whole_second(at))),
            finished_at: Some(Time(whole_second(end.finished_at))),
            container_id: end.container_id.as_ref().map(|id| format!("{ID_SCHEME}{id}")),
            signal: None,
        }),
        ..ContainerState::default()
    }
}

/// The quality-of-service class (Kubernetes documentation, "Pod Quality of Service Classes").
pub fn qos_class(spec: &PodSpec) -> &'static str {
    let containers: Vec<&Container> = spec.init_containers.iter().flatten().chain(&spec.containers).collect();
    let get = |map: Option<&BTreeMap<String, Quantity>>, name: &str| map.and_then(|m| m.get(name)).map(|q| q.0.clone());
    let mut any = false;
    let mut guaranteed = true;
    for container in containers {
        let resources = container.resources.as_ref();
        for name in ["cpu", "memory"] {
            let limit = get(resources.and_then(|r| r.limits.as_ref()), name);
            let request = get(resources.and_then(|r| r.requests.as_ref()), name).or_else(|| limit.clone());
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{PodReadinessGate, ResourceRequirements};

    fn container(name: &str, role: Role, state: State, ready: bool) -> ContainerView {
        ContainerView {
            name: name.into(),
            role,
            image: "i".into(),
            image_id: String::new(),
            container_id: None,
            started: matches!(state, State::Running { .. }),
            state,
            last: None,
            restart_count: 0,
            ready,
        }
    }

    fn running() -> State {
        State::Running { since: Timestamp::UNIX_EPOCH }
    }

    fn waiting() -> State {
        State::Waiting { reason: "ContainerCreating".into(), message: None }
    }

    fn ended(code: i32) -> Terminated {
        Terminated {
            exit_code: code,
            reason: "x".into(),
            message: None,
            started_at: None,
            finished_at: Timestamp::UNIX_EPOCH,
            container_id: None,
        }
    }

    fn status(pod: &Pod, containers: Vec<ContainerView>, initialized: bool, outcome: Option<Outcome>) -> PodStatus {
        let view = PodView {
            pod,
            containers,
            ips: vec!["10.244.1.5".parse().unwrap()],
            host_ip: "192.168.50.11".parse().unwrap(),
            start_time: Timestamp::UNIX_EPOCH,
            sandbox_ready: true,
            initialized,
            outcome,
            failure: None,
        };
        pod_status(&view, None, Timestamp::UNIX_EPOCH)
    }

    fn shown(status: &PodStatus) -> String {
        let conditions: Vec<String> = status
            .conditions
            .iter()
            .flatten()
            .filter(|c| ["Initialized", "Ready", "ContainersReady"].contains(&c.type_.as_str()))
            .map(|c| {
                let reason = c.reason.as_deref().map(|r| format!("({r})")).unwrap_or_default();
                format!("{}={}{reason}", c.type_, c.status)
            })
            .collect();
        format!("{} {}", status.phase.as_deref().unwrap(), conditions.join(" "))
    }

    #[test]
    fn phases_and_conditions_follow_the_containers() {
        let pod = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
        let regular = |state, ready| container("web", Role::Regular, state, ready);
        let crashed = ContainerView { last: Some(ended(1)), ..regular(waiting(), false) };
        let rows = [
            (
                "creating",
                vec![regular(waiting(), false)],
                false,
                None,
                "Pending Initialized=True Ready=False(ContainersNotReady) ContainersReady=False(ContainersNotReady)",
            ),
            (
                "running and ready",
                vec![regular(running(), true)],
                true,
                None,
                "Running Initialized=True Ready=True ContainersReady=True",
            ),
            (
                "running, not ready",
                vec![regular(running(), false)],
                true,
                None,
                "Running Initialized=True Ready=False(ContainersNotReady) ContainersReady=False(ContainersNotReady)",
            ),
            (
                "in a crash loop it is still Running",
                vec![crashed],
                true,
                None,
                "Running Initialized=True Ready=False(ContainersNotReady) ContainersReady=False(ContainersNotReady)",
            ),
            (
                "init container runs",
                vec![container("init", Role::Init, running(), false), regular(waiting(), false)],
                false,
                None,
                "Pending Initialized=False(ContainersNotInitialized) Ready=False(ContainersNotReady) ContainersReady=False(ContainersNotReady)",
            ),
            (
                "sidecars count for readiness",
                vec![container("side", Role::Sidecar, running(), false), regular(running(), true)],
                true,
                None,
                "Running Initialized=True Ready=False(ContainersNotReady) ContainersReady=False(ContainersNotReady)",
            ),
            (
                "done",
                vec![regular(State::Terminated(ended(0)), false)],
                true,
                Some(Outcome::Succeeded),
                "Succeeded Initialized=True(PodCompleted) Ready=False(PodCompleted) ContainersReady=False(PodCompleted)",
            ),
            (
                "failed",
                vec![regular(State::Terminated(ended(2)), false)],
                true,
                Some(Outcome::Failed),
                "Failed Initialized=True Ready=False(PodFailed) ContainersReady=False(PodFailed)",
            ),
        ];
        for (name, containers, initialized, outcome, expected) in rows {
            assert_eq!(shown(&status(&pod, containers, initialized, outcome)), expected, "{name}");
        }
    }

    #[test]
    fn gates_hold_ready_but_not_containers_ready() {
        let gate = |kind: &str| PodReadinessGate { condition_type: kind.into() };
        let mut pod = Pod {
            spec: Some(PodSpec { readiness_gates: Some(vec![gate("a/x"), gate("b/y")]), ..PodSpec::default() }),
            ..Pod::default()
        };
        pod.status = Some(PodStatus {
            conditions: Some(vec![PodCondition { type_: "b/y".into(), status: "False".into(), ..Default::default() }]),
            ..PodStatus::default()
        });
        let status = status(&pod, vec![container("web", Role::Regular, running(), true)], true, None);
        let ready = status.conditions.iter().flatten().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!(ready.reason.as_deref(), Some("ReadinessGatesNotReady"));
        assert_eq!(
            ready.message.as_deref().unwrap(),
            "corresponding condition of pod readiness gate \"a/x\" does not exist., the status of pod readiness gate \"b/y\" is not \"True\", but False"
        );
        let containers_ready = status.conditions.iter().flatten().find(|c| c.type_ == "ContainersReady").unwrap();
        assert_eq!(containers_ready.status, "True");
    }

    #[test]
    fn condition_times_move_only_with_the_status() {
        let pod = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
        let first = status(&pod, vec![container("web", Role::Regular, running(), false)], true, None);
        let view = PodView {
            pod: &pod,
            containers: vec![container("web", Role::Regular, running(), true)],
            ips: vec![],
            host_ip: "192.168.50.11".parse().unwrap(),
            start_time: Timestamp::UNIX_EPOCH,
            sandbox_ready: true,
            initialized: true,
            outcome: None,
            failure: None,
        };
        let later = pod_status(&view, Some(&first), Timestamp::from_second(60).unwrap());
        let time = |kind: &str| {
            let list = later.conditions.as_ref().unwrap();
            list.iter().find(|c| c.type_ == kind).unwrap().last_transition_time.as_ref().unwrap().0.as_second()
        };
        assert_eq!((time("Ready"), time("Initialized")), (60, 0));
    }

    #[test]
    fn service_classes() {
        let with = |requests: &[(&str, &str)], limits: &[(&str, &str)]| {
            let map = |list: &[(&str, &str)]| {
                Some(list.iter().map(|(k, v)| (k.to_string(), Quantity(v.to_string()))).collect::<BTreeMap<_, _>>())
            };
            let resources = ResourceRequirements { requests: map(requests), limits: map(limits), ..Default::default() };
            PodSpec {
                containers: vec![Container { resources: Some(resources), ..Default::default() }],
                ..Default::default()
            }
        };
        for (requests, limits, expected) in [
            (&[][..], &[][..], "BestEffort"),
            (&[("cpu", "1")], &[], "Burstable"),
            (&[], &[("cpu", "1"), ("memory", "1Gi")], "Guaranteed"),
            (&[("cpu", "500m")], &[("cpu", "1"), ("memory", "1Gi")], "Burstable"),
        ] {
            assert_eq!(qos_class(&with(requests, limits)), expected);
        }
    }
}
