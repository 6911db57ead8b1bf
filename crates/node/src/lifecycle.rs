//! Decides what a pod's containers need next: which to start, when, and when the pod is over.
//!
//! Sources: Kubernetes documentation "Pod Lifecycle" and KEP-753 (sidecar containers). Nothing here acts or reads a clock.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// The first wait of a crash loop.
const FIRST_BACKOFF: Duration = Duration::from_secs(10);
/// The longest wait of a crash loop.
pub const MAX_BACKOFF: Duration = Duration::from_secs(300);

/// What a container is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs to completion before the next one.
    Init,
    /// An init container with restartPolicy Always: runs beside the regular ones.
    Sidecar,
    /// An ordinary container.
    Regular,
}

/// When an exited container is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Whatever the exit code.
    Always,
    /// When the exit code is not zero.
    OnFailure,
    /// Not at all.
    Never,
}

impl RestartPolicy {
    /// From the pod's or the container's field; the default is Always.
    pub fn parse(text: Option<&str>) -> RestartPolicy {
        match text {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        }
    }

    /// Whether a container that ended with `code` runs again.
    pub fn restarts(self, code: i32) -> bool {
        match self {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => code != 0,
            RestartPolicy::Never => false,
        }
    }
}

/// The state of a container as far as these decisions go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Not started yet.
    New,
    /// Something else is under way for it (image pull, a failed start that waits for its time); it is not ours to start.
    Busy,
    /// Runs; `started` once its startup probe has succeeded.
    Running {
        /// Whether dependants may start.
        started: bool,
    },
    /// Ended.
    Exited {
        /// Exit code.
        code: i32,
        /// When it may be started again, if it is to be.
        again_at: Timestamp,
    },
}

/// A container in these decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// What it is for.
    pub role: Role,
    /// Its own restart policy, resolved with the pod's.
    pub policy: RestartPolicy,
    /// Where it is.
    pub progress: Progress,
}

/// What to do now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Containers to start, by index, in order.
    pub start: Vec<usize>,
    /// Containers that wait for their restart time, by index.
    pub backing_off: Vec<usize>,
    /// The earliest of these times.
    pub wake_at: Option<Timestamp>,
    /// The pod is over.
    pub outcome: Option<Outcome>,
}

/// How a pod ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All containers ended with code 0 and none is restarted.
    Succeeded,
    /// One ended otherwise and is not restarted.
    Failed,
}

/// Decides about `members`, in the order of the pod's spec, init containers first. `initialized` says whether a regular
/// container has been started before: ordinary init containers are not run again then.
pub fn plan(members: &[Member], initialized: bool, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let restart = |index: usize, again_at: Timestamp, plan: &mut Plan| {
        if again_at <= now {
            plan.start.push(index);
        } else {
            plan.backing_off.push(index);
            plan.wake_at = Some(plan.wake_at.map_or(again_at, |at| at.min(again_at)));
        }
    };
    for (index, member) in members.iter().enumerate() {
        match (member.role, member.progress) {
            (Role::Regular, _) => {}
            (Role::Init, _) if initialized => {}
            (Role::Init, Progress::Exited { code: 0, .. }) => {}
            (Role::Init, Progress::Exited { code, again_at }) => {
                if member.policy.restarts(code) {
                    restart(index, again_at, &mut plan);
                } else {
                    plan.outcome = Some(Outcome::Failed);
                }
                return plan;
            }
            (Role::Init | Role::Sidecar, Progress::New) => {
                plan.start.push(index);
                if !initialized {
                    return plan;
                }
            }
            (Role::Init, Progress::Busy | Progress::Running { .. }) => return plan,
            (Role::Sidecar, Progress::Running { started: true }) => {}
            (Role::Sidecar, Progress::Busy | Progress::Running { started: false }) => {
                if !initialized {
                    return plan;
                }
            }
            (Role::Sidecar, Progress::Exited { again_at, .. }) => {
                restart(index, again_at, &mut plan);
                if !initialized {
                    return plan;
                }
            }
        }
    }
    let mut all_over = true;
    let mut failed = false;
    for (index, member) in members.iter().enumerate().filter(|(_, m)| m.role == Role::Regular) {
        match member.progress {
            Progress::New => {
                plan.start.push(index);
                all_over = false;
            }
            Progress::Busy | Progress::Running { .. } => all_over = false,
            Progress::Exited { code, again_at } => {
                if member.policy.restarts(code) {
                    restart(index, again_at, &mut plan);
                    all_over = false;
                } else {
                    failed |= code != 0;
                }
            }
        }
    }
    if all_over {
        // Sidecars do not keep a pod alive, and are not started for one that is over.
        plan = Plan { outcome: Some(if failed { Outcome::Failed } else { Outcome::Succeeded }), ..Plan::default() };
    }
    plan
}

/// The waits of a crash loop: the first restart is immediate, then 10 s doubling to five minutes, counted from the exit. A
/// container that ran on for twice the maximum after the last step starts over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    delay: Duration,
    stepped_at: Option<Timestamp>,
}

impl Backoff {
    /// When a container that finished at `finished` may be started again.
    pub fn again_at(&self, finished: Timestamp) -> Timestamp {
        finished.saturating_add(as_signed(self.effective(finished))).unwrap_or(Timestamp::MAX)
    }

    /// The wait that applies to a container that finished at `finished`.
    pub fn effective(&self, finished: Timestamp) -> Duration {
        let rested = self.stepped_at.is_some_and(|at| finished.duration_since(at) > as_signed(2 * MAX_BACKOFF));
        if rested { Duration::ZERO } else { self.delay }
    }

    /// Notes a restart at `now` of a container that finished at `finished`.
    pub fn step(&mut self, finished: Timestamp, now: Timestamp) {
        let delay = self.effective(finished);
        self.delay = if delay.is_zero() { FIRST_BACKOFF } else { (delay * 2).min(MAX_BACKOFF) };
        self.stepped_at = Some(now);
    }
}

fn as_signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// A duration as Go prints it, for whole seconds: `40s`, `1m20s`, `5m0s`.
pub fn go_seconds(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

/// A duration as Go prints it, cut to milliseconds: `313ms`, `1.594s`, `1m0.5s`.
pub fn go_millis(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis == 0 {
        return "0s".to_string();
    }
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (hours, minutes) = (millis / 3_600_000, millis / 60_000 % 60);
    let seconds = format!("{}.{:03}", millis / 1000 % 60, millis % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, m) => format!("{m}m{seconds}s"),
        (h, m) => format!("{h}h{m}m{seconds}s"),
    }
}

/// The waits between attempts to pull one image for one pod: 10 s doubling to five minutes, over when a pull succeeds or the
/// last failure is twice the maximum ago (the kubelet's image back-off).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullBackoff {
    delay: Duration,
    failed_at: Option<Timestamp>,
}

impl PullBackoff {
    /// Notes a failure at `now`.
    pub fn failed(&mut self, now: Timestamp) {
        let rested = self.failed_at.is_none_or(|at| now.duration_since(at) > as_signed(2 * MAX_BACKOFF));
        self.delay = if rested { FIRST_BACKOFF } else { (self.delay * 2).min(MAX_BACKOFF) };
        self.failed_at = Some(now);
    }

    /// When the next attempt may be made; `None` if at once.
    pub fn until(&self, now: Timestamp) -> Option<Timestamp> {
        let until = self.failed_at?.saturating_add(as_signed(self.delay)).unwrap_or(Timestamp::MAX);
        (until > now).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Progress::*;
    use RestartPolicy::*;
    use Role::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn member(role: Role, policy: RestartPolicy, progress: Progress) -> Member {
        Member { role, policy, progress }
    }

    const RUNS: Progress = Running { started: true };

    fn exited(code: i32, again: i64) -> Progress {
        Exited { code, again_at: at(again) }
    }

    #[test]
    fn containers_start_in_the_order_of_the_rules() {
        let now = at(100);
        let start = |list: &[usize]| Plan { start: list.to_vec(), ..Plan::default() };
        let rows: Vec<(&str, Vec<Member>, bool, Plan)> = vec![
            (
                "regular ones start together",
                vec![member(Regular, Always, New), member(Regular, Always, New)],
                false,
                start(&[0, 1]),
            ),
            (
                "an init container goes first",
                vec![member(Init, Always, New), member(Regular, Always, New)],
                false,
                start(&[0]),
            ),
            (
                "a running init container holds the rest",
                vec![member(Init, Always, RUNS), member(Regular, Always, New)],
                false,
                start(&[]),
            ),
            (
                "one that is done lets them go",
                vec![member(Init, Always, exited(0, 0)), member(Regular, Always, New)],
                false,
                start(&[1]),
            ),
            (
                "a failed one is tried again",
                vec![member(Init, Always, exited(1, 0)), member(Regular, Always, New)],
                false,
                start(&[0]),
            ),
            (
                "with Never it fails the pod",
                vec![member(Init, Never, exited(1, 0)), member(Regular, Never, New)],
                false,
                Plan { outcome: Some(Outcome::Failed), ..Plan::default() },
            ),
            (
                "a sidecar that has not started holds the rest",
                vec![member(Sidecar, Always, Running { started: false }), member(Regular, Always, New)],
                false,
                start(&[]),
            ),
            (
                "one that has lets them go",
                vec![member(Sidecar, Always, RUNS), member(Regular, Always, New)],
                false,
                start(&[1]),
            ),
            (
                "a sidecar is restarted after init",
                vec![member(Sidecar, Always, exited(0, 0)), member(Regular, Always, RUNS)],
                true,
                start(&[0]),
            ),
            (
                "init is not repeated when a regular one restarts",
                vec![member(Init, Always, New), member(Regular, Always, exited(1, 0))],
                true,
                start(&[1]),
            ),
            (
                "a restart waits for its time",
                vec![member(Regular, Always, exited(1, 130)), member(Regular, Always, exited(1, 120))],
                true,
                Plan { backing_off: vec![0, 1], wake_at: Some(at(120)), ..Plan::default() },
            ),
            (
                "success under OnFailure is the end",
                vec![member(Sidecar, Always, RUNS), member(Regular, OnFailure, exited(0, 0))],
                true,
                Plan { outcome: Some(Outcome::Succeeded), ..Plan::default() },
            ),
            (
                "any failure under Never fails the pod once all have ended",
                vec![member(Regular, Never, exited(0, 0)), member(Regular, Never, exited(3, 0))],
                true,
                Plan { outcome: Some(Outcome::Failed), ..Plan::default() },
            ),
            ("not before", vec![member(Regular, Never, exited(3, 0)), member(Regular, Never, RUNS)], true, start(&[])),
            ("a pull under way is left alone", vec![member(Regular, Always, Busy)], false, start(&[])),
        ];
        for (name, members, initialized, expected) in rows {
            assert_eq!(plan(&members, initialized, now), expected, "{name}");
        }
    }

    #[test]
    fn a_container_that_crashes_every_second_starts_at_the_documented_times() {
        let mut backoff = Backoff::default();
        let mut starts = vec![0];
        for _ in 0..7 {
            let finished = at(*starts.last().unwrap());
            let again = backoff.again_at(finished);
            backoff.step(finished, again);
            starts.push(again.as_second());
        }
        assert_eq!(starts, [0, 0, 10, 30, 70, 150, 310, 610]);
    }

    #[test]
    fn a_long_run_resets_the_waits() {
        let mut backoff = Backoff::default();
        for i in 0..6 {
            backoff.step(at(i), at(i));
        }
        assert_eq!(backoff.effective(at(600)), MAX_BACKOFF);
        assert_eq!(backoff.effective(at(606)), Duration::ZERO);
    }

    #[test]
    fn durations_print_as_in_go() {
        for (seconds, text) in [(10, "10s"), (40, "40s"), (80, "1m20s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(go_seconds(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn short_durations_print_as_in_go() {
        for (millis, text) in [
            (0, "0s"),
            (313, "313ms"),
            (1000, "1s"),
            (1594, "1.594s"),
            (60_500, "1m0.5s"),
            (120_000, "2m0s"),
            (3_600_001, "1h0m0.001s"),
        ] {
            assert_eq!(go_millis(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn pulls_wait_longer_after_each_failure() {
        let mut backoff = PullBackoff::default();
        assert_eq!(backoff.until(at(0)), None);
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..7 {
            backoff.failed(at(now));
            let until = backoff.until(at(now)).unwrap().as_second();
            waits.push(until - now);
            now = until;
            assert_eq!(backoff.until(at(now)), None);
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300]);
        backoff.failed(at(now + 601));
        assert_eq!(backoff.until(at(now + 601)), Some(at(now + 611)), "a long rest starts over");
    }
}
