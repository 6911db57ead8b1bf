//! Decisions about Jobs as tables.

use super::*;
use serde_json::Value;

fn job(spec: Value, status: Value) -> Job {
    let mut whole = json!({"template": {"metadata": {"labels": {"job-name": "j"}}, "spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}},
        "parallelism": 1, "completions": 1, "backoffLimit": 6});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    if whole["completions"].is_null() {
        whole.as_object_mut().unwrap().remove("completions");
    }
    serde_json::from_value(
        json!({"metadata": {"name": "j", "namespace": "ns", "uid": "j"}, "spec": whole, "status": status}),
    )
    .unwrap()
}

/// A pod with phase and completion index, that ended (if it has) at this second.
fn pod(name: &str, phase: &str, index: Option<i32>, ended: i64, exit: i32) -> Arc<Pod> {
    let at = Timestamp::from_second(ended).unwrap();
    let state = matches!(phase, "Succeeded" | "Failed")
        .then(|| json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": exit, "finishedAt": at}}}]));
    let annotations = index.map(|i| json!({INDEX: i.to_string()}));
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "ns", "uid": name, "finalizers": [TRACKING], "annotations": annotations},
            "status": {"phase": phase, "containerStatuses": state}
        }))
        .unwrap(),
    )
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

/// Runs decisions to their end as the shell does, without making pods; answers the conditions `Type:Reason` and the last plan.
fn settle(job: &Job, pods: &[Arc<Pod>], now: i64) -> (Vec<String>, Plan) {
    let mut job = job.clone();
    let mut pods = pods.to_vec();
    for _ in 0..5 {
        let plan = plan(&job, &pods, at(now));
        if job.status.as_ref() == Some(&plan.status) {
            let conditions = plan.status.conditions.iter().flatten();
            let told = conditions.map(|c| format!("{}:{}", c.type_, c.reason.clone().unwrap_or_default())).collect();
            return (told, plan);
        }
        for pod in &plan.untrack {
            let at = pods.iter().position(|p| Arc::ptr_eq(p, pod)).unwrap();
            Arc::make_mut(&mut pods[at]).metadata.finalizers = None;
        }
        // A pod that is deleted before it has a node is gone as soon as it is counted.
        for pod in &plan.delete {
            let at = pods.iter().position(|p| p.metadata.uid == pod.metadata.uid).unwrap();
            Arc::make_mut(&mut pods[at]).metadata.deletion_timestamp = Some(Time(self::at(now)));
        }
        pods.retain(|p| p.metadata.deletion_timestamp.is_none() || is_tracked(p));
        job.status = Some(plan.status);
    }
    panic!("the job does not come to rest: {:?}", job.status);
}

#[test]
fn ends() {
    let policy = |action: &str| json!({"podFailurePolicy": {"rules": [{"action": action, "onExitCodes": {"operator": "In", "values": [3]}}]}});
    let ok = |n: i64| pod(&format!("ok{n}"), "Succeeded", None, n, 0);
    let bad = |n: i64| pod(&format!("bad{n}"), "Failed", None, n, 3);
    let indexed = |extra: Value| {
        let mut spec = json!({"completionMode": "Indexed", "completions": 3, "parallelism": 3});
        spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec
    };
    let at_index = |phase: &str, index: i32| pod(&format!("{phase}{index}"), phase, Some(index), 1, 3);
    const COMPLETE: &[&str] = &["SuccessCriteriaMet:CompletionsReached", "Complete:CompletionsReached"];
    for (name, spec, pods, expected, succeeded, failed) in [
        ("done", json!({}), vec![ok(1)], COMPLETE, 1, 0),
        ("not_yet", json!({"completions": 2}), vec![ok(1)], &[], 1, 0),
        (
            "queue_ends_with_its_last_worker",
            json!({"completions": null, "parallelism": 2}),
            vec![ok(1), bad(2)],
            COMPLETE,
            1,
            1,
        ),
        (
            "queue_waits_for_workers",
            json!({"completions": null, "parallelism": 2}),
            vec![ok(1), pod("run", "Running", None, 0, 0)],
            &[],
            1,
            0,
        ),
        (
            "too_many_failures",
            json!({"backoffLimit": 1}),
            vec![bad(1), bad(2)],
            &["FailureTarget:BackoffLimitExceeded", "Failed:BackoffLimitExceeded"],
            0,
            2,
        ),
        ("few_failures", json!({"backoffLimit": 2}), vec![bad(1), bad(2)], &[], 0, 2),
        (
            "deadline",
            json!({"activeDeadlineSeconds": 50}),
            vec![pod("run", "Running", None, 0, 0)],
            &["FailureTarget:DeadlineExceeded", "Failed:DeadlineExceeded"],
            0,
            1,
        ),
        (
            "policy_fails_the_job",
            policy("FailJob"),
            vec![bad(1)],
            &["FailureTarget:PodFailurePolicy", "Failed:PodFailurePolicy"],
            0,
            1,
        ),
        ("policy_ignores", policy("Ignore"), vec![bad(1)], &[], 0, 0),
        (
            "all_indexes",
            indexed(json!({})),
            vec![at_index("Succeeded", 0), at_index("Succeeded", 1), at_index("Succeeded", 2)],
            COMPLETE,
            3,
            0,
        ),
        (
            "an_index_counts_once",
            indexed(json!({})),
            vec![at_index("Succeeded", 0), pod("again", "Succeeded", Some(0), 1, 0)],
            &[],
            1,
            0,
        ),
        (
            "success_policy",
            indexed(json!({"successPolicy": {"rules": [{"succeededIndexes": "1-2", "succeededCount": 1}]}})),
            vec![at_index("Succeeded", 2), at_index("Running", 0)],
            &["SuccessCriteriaMet:SuccessPolicy", "Complete:SuccessPolicy"],
            1,
            1,
        ),
        (
            "failed_indexes",
            indexed(json!({"backoffLimitPerIndex": 0, "backoffLimit": 99})),
            vec![at_index("Succeeded", 0), at_index("Succeeded", 1), at_index("Failed", 2)],
            &["FailureTarget:FailedIndexes", "Failed:FailedIndexes"],
            2,
            1,
        ),
        (
            "too_many_failed_indexes",
            indexed(json!({"backoffLimitPerIndex": 0, "maxFailedIndexes": 0, "backoffLimit": 99})),
            vec![at_index("Failed", 2)],
            &["FailureTarget:MaxFailedIndexesExceeded", "Failed:MaxFailedIndexesExceeded"],
            0,
            1,
        ),
        ("suspended", json!({"suspend": true}), vec![], &["Suspended:JobSuspended"], 0, 0),
    ] {
        let started = if spec["suspend"].is_null() { json!({"startTime": at(0)}) } else { json!({}) };
        let (told, plan) = settle(&job(spec, started), &pods, 100);
        assert_eq!(told, expected, "{name}");
        let counts = (plan.status.succeeded.unwrap_or(0), plan.status.failed.unwrap_or(0));
        assert_eq!(counts, (succeeded, failed), "{name}");
        assert!(plan.untrack.is_empty(), "{name}: all counted");
    }
}

#[test]
fn an_end_is_noted_before_it_is_counted() {
    let pods = [pod("ok", "Succeeded", None, 1, 0)];
    let first = plan(&job(json!({}), json!({})), &pods, at(10));
    let noted = first.status.uncounted_terminated_pods.clone().unwrap();
    assert_eq!((noted.succeeded, first.status.succeeded), (Some(vec!["ok".to_string()]), None));
    assert_eq!(first.untrack.len(), 1);
    // The finalizer could not be taken: nothing is counted, nor noted twice.
    let job = job(json!({}), json!(first.status));
    let again = plan(&job, &pods, at(10));
    assert_eq!(again.status, first.status);
    // The pod has gone meanwhile: it still counts.
    assert_eq!(plan(&job, &[], at(10)).status.succeeded, Some(1));
}

#[test]
fn pods_to_make() {
    let running = |n: i32| pod(&format!("r{n}"), "Running", None, 0, 0);
    let made = |spec: Value, pods: &[Arc<Pod>], now: i64| {
        let plan = plan(&job(spec, json!({"startTime": at(0)})), pods, at(now));
        (plan.create.len(), plan.delete.len(), plan.recheck.map(|r| r.as_secs()))
    };
    let wide = json!({"parallelism": 3, "completions": 5});
    assert_eq!(made(wide.clone(), &[], 1), (3, 0, None));
    assert_eq!(made(wide.clone(), &[running(1)], 1), (2, 0, None));
    let narrowed = json!({"parallelism": 1, "completions": 5});
    assert_eq!(made(narrowed, &[running(1), running(2)], 1), (0, 1, None));
    let last = json!({"parallelism": 3, "completions": 2});
    assert_eq!(made(last, &[pod("ok", "Succeeded", None, 1, 0)], 1), (1, 0, None), "no more than are needed");
    let failures = [pod("a", "Failed", None, 100, 1), pod("b", "Failed", None, 110, 1)];
    assert_eq!(made(json!({}), &failures, 115), (0, 0, Some(15)), "20 s after the second failure");
    assert_eq!(made(json!({}), &failures, 130), (1, 0, None));
    assert_eq!(made(json!({"suspend": true}), &[running(1)], 1), (0, 1, None));
    let indexed = json!({"completionMode": "Indexed", "parallelism": 2, "completions": 3});
    let pods = [
        pod("zero", "Succeeded", Some(0), 1, 0),
        pod("one", "Running", Some(1), 0, 0),
        pod("twin", "Running", Some(1), 0, 0),
    ];
    let step = plan(&job(indexed, json!({"startTime": at(0)})), &pods, at(5));
    assert_eq!(step.create, [Some((2, 0))]);
    assert_eq!(step.delete.iter().filter_map(|p| p.metadata.name.as_deref()).collect::<Vec<_>>(), ["twin"]);
}

#[test]
fn replacement_may_wait_for_the_end() {
    let mut leaving = Pod::clone(&pod("leaving", "Running", None, 0, 0));
    leaving.metadata.deletion_timestamp = Some(Time(at(100)));
    let pods = [Arc::new(leaving)];
    let step = |policy: &str| plan(&job(json!({"podReplacementPolicy": policy}), json!({})), &pods, at(200));
    let eager = step("TerminatingOrFailed");
    assert_eq!((eager.create.len(), eager.untrack.len(), eager.status.terminating), (1, 1, Some(1)));
    let patient = step("Failed");
    assert_eq!((patient.create.len(), patient.untrack.len(), patient.status.terminating), (0, 0, Some(1)));
}

#[test]
fn a_resumed_job_starts_anew() {
    let status = json!({"conditions": [{"type": "Suspended", "status": "True", "reason": "JobSuspended"}]});
    let step = plan(&job(json!({"suspend": false}), status), &[], at(7));
    let condition = &step.status.conditions.unwrap()[0];
    assert_eq!((condition.status.as_str(), condition.reason.as_deref()), ("False", Some("JobResumed")));
    assert_eq!(step.status.start_time, Some(Time(at(7))));
    assert_eq!(step.create.len(), 1);
}

#[test]
fn a_finished_job_lives_as_long_as_it_says() {
    let status = json!({"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": at(100)}]});
    let job = job(json!({"ttlSecondsAfterFinished": 60}), status);
    let early = plan(&job, &[], at(110));
    assert!(!early.expired && early.recheck.is_some_and(|r| r.as_secs() == 50));
    assert!(plan(&job, &[], at(160)).expired);
}

#[test]
fn an_indexed_pod_knows_its_index() {
    let pod = make_pod(&job(json!({"completionMode": "Indexed", "backoffLimitPerIndex": 1}), json!({})), Some((4, 2)));
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("j-4-"));
    assert_eq!(index_of(&pod), Some(4));
    assert_eq!(failures_of(&pod), 2);
    let spec = pod.spec.unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("j-4"));
    assert_eq!(spec.containers[0].env.as_ref().unwrap()[0].name, "JOB_COMPLETION_INDEX");
}

#[test]
fn indexes_as_text() {
    for (text, expected) in [("", ""), ("0", "0"), ("1,2", "1,2"), ("0-2,4,6-7", "0-2,4,6,7"), ("3-99", "3-9")] {
        assert_eq!(Indexes::parse(text, 10).format(), expected, "{text}");
    }
}

/// The clock is put forward at any moment of a sync: either the Job is deleted, or it is looked at again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_to_live_that_ends_during_a_sync_is_not_forgotten() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    let deletions = Arc::new(AtomicUsize::new(0));
    let count = deletions.clone();
    let server = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let deleted = request.method() == http::Method::DELETE;
        count.fetch_add(usize::from(deleted), Ordering::Relaxed);
        async move {
            let answer = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
            Ok::<_, kube::Error>(http::Response::new(kube::client::Body::from(answer.to_string().into_bytes())))
        }
    });
    let client = kube::Client::new(server, "default");
    for round in 0..1_000 {
        let clock = crate::clock::Clock::default();
        let context = Context {
            client: client.clone(),
            caches: crate::cache::Caches::default(),
            shutdown: tokio_util::sync::CancellationToken::new(),
            clock: clock.clone(),
            metrics: crate::metrics::Metrics::default(),
        };
        let ended = json!([{"type": "Complete", "status": "True", "lastTransitionTime": clock.now()}]);
        context.caches.jobs.wrote(job(json!({"ttlSecondsAfterFinished": 600}), json!({"conditions": ended})));
        let events = context.recorder("test");
        let started = Arc::new(std::sync::Barrier::new(2));
        let forward = std::thread::spawn({
            let started = started.clone();
            move || {
                started.wait();
                for _ in 0..round * 10 {
                    std::hint::spin_loop();
                }
                clock.advance(Duration::from_secs(601));
            }
        });
        let before = deletions.load(Ordering::Relaxed);
        started.wait();
        let next = sync(context, events, Key::new("ns", "j")).await.unwrap();
        forward.join().unwrap();
        let deleted = deletions.load(Ordering::Relaxed) > before;
        assert!(deleted || matches!(next, Next::After(_)), "round {round}: {next:?}");
    }
}
