//! Steps of StatefulSets as tables.

use super::*;
use serde_json::Value;

fn set(spec: Value) -> StatefulSet {
    let mut whole = json!({
        "replicas": 3, "serviceName": "dbsvc", "selector": {"matchLabels": {"app": "db"}},
        "template": {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [{"name": "c", "image": "x:2"}]}}
    });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(
        json!({"metadata": {"name": "db", "namespace": "ns", "uid": "s", "generation": 1}, "spec": whole}),
    )
    .unwrap()
}

fn revision(name: &str, set: &StatefulSet) -> Revision {
    let mut template = set.spec.as_ref().unwrap().template.clone();
    if name == "old" {
        template.spec.as_mut().unwrap().containers[0].image = Some("x:1".into());
    }
    Revision { name: name.into(), template }
}

/// A pod: ordinal, revision, and one of `ready`, `unready`, `failed`, `leaving`.
fn pod(set: &StatefulSet, n: i32, rev: &str, state: &str) -> Arc<Pod> {
    let mut pod = make_pod(set, n, &revision(rev, set));
    let (phase, ready) = match state {
        "ready" | "leaving" => ("Running", "True"),
        "failed" => ("Failed", "False"),
        _ => ("Running", "False"),
    };
    pod.status =
        serde_json::from_value(json!({"phase": phase, "conditions": [{"type": "Ready", "status": ready}]})).unwrap();
    if state == "leaving" {
        pod.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
    }
    Arc::new(pod)
}

fn acts(set: &StatefulSet, pods: &[(i32, &str, &str)]) -> Vec<String> {
    let pods: Vec<_> = pods.iter().map(|(n, rev, state)| pod(set, *n, rev, state)).collect();
    let plan = plan(set, &pods, &revision("old", set), &revision("new", set), 0, Timestamp::UNIX_EPOCH);
    plan.acts
        .iter()
        .map(|act| match act {
            Act::Create(pod) => {
                format!("create {} {}", pod.metadata.name.as_deref().unwrap(), revision_of(pod).unwrap())
            }
            Act::Delete(pod, why) => format!("delete {} {why:?}", pod.metadata.name.as_deref().unwrap()),
            Act::Relabel(pod) => format!("relabel {}", pod.metadata.name.as_deref().unwrap()),
        })
        .collect()
}

#[test]
fn in_order() {
    let set = set(json!({}));
    for (name, pods, expected) in [
        ("first_pod_alone", vec![], vec!["create db-0 new"]),
        ("waits_for_readiness", vec![(0, "new", "unready")], vec![]),
        ("next_when_ready", vec![(0, "new", "ready")], vec!["create db-1 new"]),
        ("waits_for_a_leaving_pod", vec![(0, "new", "leaving")], vec![]),
        ("failed_pod_is_made_again", vec![(0, "new", "failed")], vec!["delete db-0 Ended"]),
        ("gap_is_filled_first", vec![(1, "new", "ready"), (2, "new", "ready")], vec!["create db-0 new"]),
        (
            "scale_down_from_the_top",
            vec![
                (0, "new", "ready"),
                (1, "new", "ready"),
                (2, "new", "ready"),
                (3, "new", "ready"),
                (4, "new", "unready"),
            ],
            vec!["delete db-4 Excess"],
        ),
        (
            "scale_down_waits_for_the_one_leaving",
            vec![
                (0, "new", "ready"),
                (1, "new", "ready"),
                (2, "new", "ready"),
                (3, "new", "ready"),
                (4, "new", "leaving"),
            ],
            vec![],
        ),
        (
            "update_from_the_top",
            vec![(0, "old", "ready"), (1, "old", "ready"), (2, "old", "ready")],
            vec!["delete db-2 Outdated"],
        ),
        ("update_waits", vec![(0, "old", "ready"), (1, "old", "ready"), (2, "new", "unready")], vec![]),
        (
            "update_goes_on",
            vec![(0, "old", "ready"), (1, "old", "ready"), (2, "new", "ready")],
            vec!["delete db-1 Outdated"],
        ),
        ("done", vec![(0, "new", "ready"), (1, "new", "ready"), (2, "new", "ready")], vec![]),
    ] {
        assert_eq!(acts(&set, &pods), expected, "{name}");
    }
}

#[test]
fn parallel() {
    let set = set(json!({"podManagementPolicy": "Parallel"}));
    assert_eq!(acts(&set, &[]), ["create db-0 new", "create db-1 new", "create db-2 new"]);
    let five =
        [(0, "new", "ready"), (1, "new", "ready"), (2, "new", "ready"), (3, "new", "ready"), (4, "new", "ready")];
    assert_eq!(acts(&set, &five), ["delete db-4 Excess", "delete db-3 Excess"]);
    let old = [(0, "old", "ready"), (1, "old", "ready"), (2, "old", "ready")];
    assert_eq!(acts(&set, &old), ["delete db-2 Outdated"], "updates are one at a time also then");
}

#[test]
fn partition_and_ondelete() {
    let old = [(0, "old", "ready"), (1, "old", "ready"), (2, "old", "ready")];
    let two = set(json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}}));
    assert_eq!(acts(&two, &old), ["delete db-2 Outdated"]);
    assert_eq!(acts(&two, &[(0, "old", "ready"), (1, "old", "ready"), (2, "new", "ready")]), Vec::<String>::new());
    assert_eq!(
        acts(&two, &[(0, "old", "ready"), (2, "new", "ready")]),
        ["create db-1 old"],
        "below the partition as it was"
    );
    let manual = set(json!({"updateStrategy": {"type": "OnDelete"}}));
    assert_eq!(acts(&manual, &old), Vec::<String>::new());
    assert_eq!(acts(&manual, &old[..2]), ["create db-2 new"]);
}

#[test]
fn ordinals_start_where_asked_and_foreign_names_do_not_count() {
    let set = set(json!({"replicas": 1, "ordinals": {"start": 5}}));
    assert_eq!(acts(&set, &[]), ["create db-5 new"]);
    for (name, expected) in [("db-0", Some(0)), ("db-00", None), ("db-x", None), ("other-1", None), ("db--1", None)] {
        let pod = Pod { metadata: ObjectMeta { name: Some(name.into()), ..Default::default() }, ..Default::default() };
        assert_eq!(ordinal(&set, &pod), expected, "{name}");
    }
}

#[test]
fn the_pod_of_an_ordinal() {
    let claims =
        json!([{"metadata": {"name": "data", "labels": {"v": "1"}}, "spec": {"accessModes": ["ReadWriteOnce"]}}]);
    let set = set(json!({"volumeClaimTemplates": claims}));
    let pod = make_pod(&set, 1, &revision("new", &set));
    let spec = pod.spec.as_ref().unwrap();
    assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("db-1"), Some("dbsvc")));
    assert_eq!(spec.volumes.as_ref().unwrap()[0].persistent_volume_claim.as_ref().unwrap().claim_name, "data-db-1");
    let labels = pod.metadata.labels.as_ref().unwrap();
    assert_eq!((labels[POD_NAME_LABEL].as_str(), labels[POD_INDEX_LABEL].as_str()), ("db-1", "1"));
    let claim = &make_claims(&set, &pod)[0];
    assert_eq!(claim.metadata.name.as_deref(), Some("data-db-1"));
    assert_eq!(claim.metadata.labels.as_ref().unwrap()["app"], "db");
}

#[test]
fn status_moves_to_the_new_revision_when_all_have_it() {
    let set = set(json!({"replicas": 2}));
    let status = |pods: &[(i32, &str, &str)]| {
        let pods: Vec<_> = pods.iter().map(|(n, rev, state)| pod(&set, *n, rev, state)).collect();
        plan(&set, &pods, &revision("old", &set), &revision("new", &set), 0, Timestamp::UNIX_EPOCH).status
    };
    let half = status(&[(0, "old", "ready"), (1, "new", "unready")]);
    assert_eq!((half.current_replicas, half.updated_replicas, half.ready_replicas), (Some(1), Some(1), Some(1)));
    assert_eq!(half.current_revision.as_deref(), Some("old"));
    let done = status(&[(0, "new", "ready"), (1, "new", "ready")]);
    assert_eq!((done.current_revision.as_deref(), done.current_replicas), (Some("new"), Some(2)));
}

#[test]
fn revisions_are_kept_reused_and_cut() {
    let set = set(json!({"revisionHistoryLimit": 1}));
    let fresh = revisions(&set, &[], &[], 0);
    let made = fresh.create.unwrap();
    assert_eq!((made.revision, made.metadata.name.as_deref()), (1, Some(fresh.update.name.as_str())));
    assert_eq!(made.data.as_ref().unwrap().0.pointer("/spec/template/$patch"), Some(&json!("replace")));
    let mut stored = Vec::new();
    for (number, image) in [(1, "x:2"), (2, "x:3"), (3, "x:4"), (4, "x:5")] {
        let mut revision = made.clone();
        revision.revision = number;
        revision.metadata.name = Some(format!("db-{number}"));
        let mut template = set.spec.as_ref().unwrap().template.clone();
        template.spec.as_mut().unwrap().containers[0].image = Some(image.into());
        revision.data = Some(RawExtension(revision_data(&template)));
        stored.push(Arc::new(revision));
    }
    let again = revisions(&set, &stored, &[], 0);
    assert!(again.create.is_none());
    assert_eq!(
        again.renumber.as_ref().map(|(r, n)| (r.revision, *n)),
        Some((1, 5)),
        "an earlier template is wanted again"
    );
    assert_eq!(again.delete.iter().map(|r| r.revision).collect::<Vec<_>>(), [2, 3], "one of the unused ones is kept");
}
