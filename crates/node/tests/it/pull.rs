//! Images from a registry: what is fetched, when, with which login, and what a pod shows when it cannot be.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{PodStatus, Secret};
use portolan_node::image::Reference;
use portolan_testkit::registry::{
    Access, DOCKER_MANIFEST, INDEX, Registry, architecture, gzip, shell_config, shell_layer, tar,
};
use serde_json::{Value, json};

use crate::cluster::Node;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// Puts an image that says `text`, in three layers of which the last one wins, and gives its manifest's digest.
fn put(registry: &Registry, repository: &str, tag: Option<&str>, text: &str) -> String {
    let layers = [
        shell_layer(),
        tar(&[("text", b"hidden".to_vec()), ("other", b"kept".to_vec())]),
        tar(&[("text", text.as_bytes().to_vec())]),
    ];
    let config = shell_config(&layers, "read a < /text; read b < /other; echo $a $b");
    let sent = [(GZIP, gzip(&layers[0])), (ZSTD, zstd(&layers[1])), (PLAIN, layers[2].clone())];
    let manifest = registry.put_image(repository, tag, &config, &sent);
    manifest["digest"].as_str().unwrap().to_string()
}

fn pod(image: &str, extra: Value) -> Value {
    let mut container = json!({"name": "main", "image": image});
    for (key, value) in extra.as_object().unwrap() {
        container[key] = value.clone();
    }
    json!({"restartPolicy": "Never", "containers": [container]})
}

async fn logs(node: &Node, pod: &str) -> String {
    let (code, body) = node.kubelet_get(&format!("/containerLogs/shop/{pod}/main")).await;
    assert_eq!(code, 200, "{body}");
    body
}

fn waiting(status: &PodStatus) -> (String, String) {
    let state = status.container_statuses.as_ref().unwrap()[0].state.clone().unwrap_or_default();
    let waiting = state.waiting.unwrap_or_default();
    (waiting.reason.unwrap_or_default(), waiting.message.unwrap_or_default())
}

async fn waits(node: &Node, pod: &str, reason: &str) -> String {
    waiting(&node.api.status(pod, reason, |s| waiting(s).0 == reason).await).1
}

fn events(node: &Node, pod: &str) -> Vec<(String, String)> {
    let store = node.api.store();
    store
        .events
        .iter()
        .filter(|(name, ..)| name == pod)
        .map(|(_, reason, text)| (reason.clone(), text.clone()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_from_a_registry_s_image() {
    let registry = Registry::start();
    registry.admit(Access::Token);
    let node = Node::pulling("pull").await;
    let digest = put(&registry, "team/app", Some("1"), "plain");
    let image = registry.image("team/app:1");
    node.run("plain", pod(&image, json!({})));
    let status = node.api.phase("plain", "Succeeded").await;
    assert_eq!(logs(&node, "plain").await, "plain kept\n", "layers lie in their order");
    let id = &status.container_statuses.unwrap()[0].image_id;
    assert_eq!(*id, format!("{}@{digest}", registry.image("team/app")));
    let told = events(&node, "plain");
    assert_eq!(told[0], ("Pulling".into(), format!("Pulling image \"{image}\"")));
    let (reason, text) = &told[1];
    let rest =
        text.strip_prefix(&format!("Successfully pulled image \"{image}\" in ")).unwrap_or_else(|| panic!("{text}"));
    assert!(
        reason == "Pulled" && rest.contains("s including waiting). Image size: ") && rest.ends_with(" bytes."),
        "{text}"
    );
    assert_eq!((told[2].0.as_str(), told[3].0.as_str()), ("Created", "Started"));

    // By digest, without another question: it is here.
    let asked = registry.requests().len();
    node.run("digest", pod(&format!("{}@{digest}", registry.image("team/app")), json!({})));
    node.api.phase("digest", "Succeeded").await;
    assert_eq!(registry.requests().len(), asked);

    // The machine's own platform among others; what is not an image rides along.
    let own = put(&registry, "team/multi", None, "mine");
    let entry = |digest: &str, os: &str, architecture: &str| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1,
               "platform": {"os": os, "architecture": architecture}})
    };
    let other = format!("sha256:{}", "5".repeat(64));
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
        entry(&other, "windows", architecture()), entry(&other, "linux", "s390x"), entry(&other, "unknown", "unknown"),
        entry(&own, "linux", architecture())]});
    let index = registry.put_manifest("team/multi", Some("1"), INDEX, &index);
    let index = index["digest"].as_str().unwrap();
    node.run("multi", pod(&registry.image("team/multi:1"), json!({})));
    let status = node.api.phase("multi", "Succeeded").await;
    assert_eq!(logs(&node, "multi").await, "mine kept\n");
    let id = &status.container_statuses.unwrap()[0].image_id;
    assert_eq!(*id, format!("{}@{index}", registry.image("team/multi")), "the index is what was asked for");
    let images = &node.config.images;
    for digest in [index, own.as_str()] {
        let reference = Reference::parse(&format!("{}@{digest}", registry.image("team/multi"))).unwrap();
        assert!(images.find(&reference).unwrap().is_some(), "{digest}");
    }
    let blobs = registry.requests().iter().filter(|r| r.contains("/blobs/")).count();
    assert_eq!(blobs, 6, "two configurations, three layers and one more: the others were there");

    // Docker's own media types.
    let layers = [shell_layer()];
    let config = shell_config(&layers, "echo docker");
    let config =
        registry.put_blob("old", "application/vnd.docker.container.image.v1+json", config.to_string().into_bytes());
    let layer = registry.put_blob("old", "application/vnd.docker.image.rootfs.diff.tar.gzip", gzip(&layers[0]));
    let manifest = json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config, "layers": [layer]});
    registry.put_manifest("old", Some("latest"), DOCKER_MANIFEST, &manifest);
    node.run("docker", pod(&registry.image("old"), json!({})));
    node.api.phase("docker", "Succeeded").await;
    assert_eq!(logs(&node, "docker").await, "docker\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_policies_decide_whether_the_registry_is_asked() {
    let registry = Registry::start();
    let node = Node::pulling("policy").await;
    put(&registry, "app", Some("1"), "first");
    let image = registry.image("app:1");
    node.run("never", pod(&image, json!({"imagePullPolicy": "Never"})));
    let text = waits(&node, "never", "ErrImageNeverPull").await;
    assert!(text.contains(&format!("Container image \"{image}\" is not present with pull policy of Never")), "{text}");
    assert!(registry.requests().is_empty());

    node.run("first", pod(&image, json!({"imagePullPolicy": "IfNotPresent"})));
    node.api.phase("first", "Succeeded").await;
    // What Never waited for is here now.
    node.api.phase("never", "Succeeded").await;

    put(&registry, "app", Some("1"), "second");
    node.run("same", pod(&image, json!({"imagePullPolicy": "IfNotPresent"})));
    node.api.phase("same", "Succeeded").await;
    assert_eq!(logs(&node, "same").await, "first kept\n");
    let present = format!("Container image \"{image}\" already present on machine and can be accessed by the pod");
    assert_eq!(events(&node, "same")[0], ("Pulled".into(), present));

    node.run("fresh", pod(&image, json!({"imagePullPolicy": "Always"})));
    node.api.phase("fresh", "Succeeded").await;
    assert_eq!(logs(&node, "fresh").await, "second kept\n");
    assert_eq!(events(&node, "fresh")[0].0, "Pulling");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_does_not_give_is_told_as_usual() {
    let registry = Registry::start();
    let node = Node::pulling("refuse").await;
    let image = registry.image("app:1");
    node.run("later", pod(&image, json!({})));
    let missing = format!(
        "rpc error: code = NotFound desc = failed to pull and unpack image \"{image}\": failed to resolve reference \"{image}\": {image}: not found"
    );
    assert_eq!(waits(&node, "later", "ErrImagePull").await, missing);
    let text = waits(&node, "later", "ImagePullBackOff").await;
    assert_eq!(text, format!("Back-off pulling image \"{image}\": ErrImagePull: {missing}"));
    let told = events(&node, "later");
    let expected = [
        ("Pulling", format!("Pulling image \"{image}\"")),
        ("Failed", format!("Failed to pull image \"{image}\": {missing}")),
        ("Failed", "Error: ErrImagePull".to_string()),
        ("BackOff", format!("Back-off pulling image \"{image}\"")),
        ("Failed", "Error: ImagePullBackOff".to_string()),
    ];
    let expected: Vec<(String, String)> = expected.into_iter().map(|(r, t)| (r.to_string(), t)).collect();
    assert_eq!(told[..5], expected[..]);

    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let blob_of = |repository: &str, change: &dyn Fn(&str)| {
        put(&registry, repository, Some("1"), repository);
        change(repository);
    };
    blob_of("spoilt", &|_| {
        let layer = portolan_testkit::registry::digest(&tar(&[("text", b"spoilt".to_vec())]));
        registry.spoil(&format!("/v2/spoilt/blobs/{layer}"));
    });
    let foreign = json!({"architecture": "s390x", "os": "linux", "rootfs": {"diff_ids": []}});
    registry.put_image("foreign", Some("1"), &foreign, &[]);
    let nowhere = json!({"schemaVersion": 2, "manifests": [
        {"digest": format!("sha256:{}", "5".repeat(64)), "platform": {"os": "linux", "architecture": "s390x"}}]});
    registry.put_manifest("nowhere", Some("1"), INDEX, &nowhere);
    let broken = shell_config(&[b"no tar".to_vec()], "true");
    registry.put_image("broken", Some("1"), &broken, &[(PLAIN, b"other bytes".to_vec())]);
    registry.put_manifest("nonsense", Some("1"), INDEX, &json!({"schemaVersion": 2, "x": 1}));
    for (name, image, expected) in [
        (
            "down",
            format!("{closed}/app:1"),
            format!(
                "failed to do request: Get \"http://{closed}/v2/app/manifests/1\": dial tcp {closed}: connect: connection refused"
            ),
        ),
        ("spoilt", registry.image("spoilt:1"), "unexpected commit digest sha256:".to_string()),
        ("foreign", registry.image("foreign:1"), "it is for linux/s390x".to_string()),
        (
            "nowhere",
            registry.image("nowhere:1"),
            format!("no match for platform linux/{} in manifest: not found", architecture()),
        ),
        ("broken", registry.image("broken:1"), "failed to extract layer".to_string()),
        ("nonsense", registry.image("nonsense:1"), "its manifest cannot be read".to_string()),
    ] {
        node.run(name, pod(&image, json!({})));
        let text = node.api.event("Failed", &format!("Failed to pull image \"{image}\": ")).await;
        assert!(text.contains(&expected), "{name}: {text}");
        assert!(node.config.images.find(&Reference::parse(&image).unwrap()).unwrap().is_none(), "{name} is not stored");
    }

    // A registry that gets what it lacked is noticed when the wait is over.
    put(&registry, "app", Some("1"), "late");
    let done =
        |s: &crate::api::Store| s.statuses.get("later").and_then(|s| s.phase.clone()).filter(|p| p == "Succeeded");
    node.api.wait("the pod that waited", 60, done).await;
    assert_eq!(logs(&node, "later").await, "late kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_secrets_open_private_registries() {
    let registry = Registry::start();
    registry.admit(Access::TokenFor("robot".into(), "s3cret".into()));
    let node = Node::pulling("secrets").await;
    put(&registry, "private/app", Some("1"), "private");
    let image = registry.image("private/app:1");
    let secret = |entries: Value| Secret {
        type_: Some("kubernetes.io/dockerconfigjson".into()),
        data: Some(
            [(".dockerconfigjson".to_string(), ByteString(json!({ "auths": entries }).to_string().into_bytes()))]
                .into(),
        ),
        ..Secret::default()
    };
    {
        let mut store = node.api.store();
        let (host, wrong) = (registry.host(), json!({"username": "robot", "password": "wrong"}));
        store.secrets.insert("wrong".into(), secret(json!({ host.clone(): wrong.clone() })));
        store.secrets.insert(
            "elsewhere".into(),
            secret(json!({"registry.example": {"username": "robot", "password": "s3cret"}})),
        );
        // The nearer name is tried first; the other one opens.
        let right = json!({"username": "robot", "password": "s3cret"});
        store.secrets.insert("right".into(), secret(json!({ host.clone(): right, format!("{host}/private"): wrong })));
    }
    let with = |secrets: &[&str]| {
        let mut spec = pod(&image, json!({}));
        spec["imagePullSecrets"] = secrets.iter().map(|name| json!({ "name": name })).collect();
        spec
    };
    let denied = format!(
        "failed to pull and unpack image \"{image}\": failed to resolve reference \"{image}\": pull access denied, repository does not exist or may require authorization: authorization failed"
    );
    for (name, secrets) in [("without", &[] as &[&str]), ("wrong", &["wrong"]), ("elsewhere", &["elsewhere"])] {
        node.run(name, with(secrets));
        assert_eq!(waits(&node, name, "ErrImagePull").await, denied, "{name}");
    }
    node.run("right", with(&["missing", "right"]));
    node.api.phase("right", "Succeeded").await;
    node.api
        .event(
            "FailedToRetrieveImagePullSecret",
            "Unable to retrieve some image pull secrets (missing); attempting to pull the image may not succeed.",
        )
        .await;

    registry.admit(Access::Basic("robot".into(), "s3cret".into()));
    put(&registry, "basic/app", Some("1"), "basic");
    let mut spec = pod(&registry.image("basic/app:1"), json!({}));
    spec["imagePullSecrets"] = json!([{"name": "right"}]);
    node.run("basic", spec);
    node.api.phase("basic", "Succeeded").await;
    assert_eq!(logs(&node, "basic").await, "basic kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_follows_its_pod_s_image() {
    let registry = Registry::start();
    let node = Node::pulling("follow").await;
    for tag in ["1", "2"] {
        let layers = [shell_layer(), tar(&[("version", tag.as_bytes().to_vec())])];
        let config = shell_config(&layers, "read v < /version; echo version $v; read line");
        registry.put_image("app", Some(tag), &config, &[(GZIP, gzip(&layers[0])), (GZIP, gzip(&layers[1]))]);
    }
    let spec = |tag: &str| {
        json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [
            {"name": "main", "image": registry.image(&format!("app:{tag}")), "stdin": true}]})
    };
    let mut object = node.run("web", spec("nope"));
    waits(&node, "web", "ImagePullBackOff").await;
    let change = |object: &mut k8s_openapi::api::core::v1::Pod, tag: &str| {
        object.spec = serde_json::from_value(spec(tag)).unwrap();
        node.kubelet.apply(object.clone());
    };
    // A wait belongs to the image that is waited for.
    change(&mut object, "1");
    node.api.ready("web").await;
    change(&mut object, "2");
    let status = node
        .api
        .status("web", "runs the second image", |s| {
            let status = &s.container_statuses.as_ref().unwrap()[0];
            status.restart_count == 1 && status.ready && status.image.ends_with("app:2")
        })
        .await;
    node.api.event("Killing", "Container main definition changed, will be restarted").await;
    let before = status.container_statuses.unwrap()[0].last_state.clone().unwrap().terminated.unwrap();
    assert_eq!(before.exit_code, 137);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while logs(&node, "web").await != "version 2\n" {
        assert!(tokio::time::Instant::now() < deadline, "the second image says nothing");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(status.phase.as_deref(), Some("Running"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashing_container_backs_off_although_its_image_is_pulled_each_time() {
    let registry = Registry::start();
    let node = Node::pulling("crash-pull").await;
    let layers = [shell_layer()];
    registry.put_image("app", Some("latest"), &shell_config(&layers, "exit 3"), &[(GZIP, gzip(&layers[0]))]);
    let mut spec = pod(&registry.image("app"), json!({}));
    spec["restartPolicy"] = json!("Always");
    node.run("loop", spec);
    waits(&node, "loop", "CrashLoopBackOff").await;
    let pulls = events(&node, "loop").iter().filter(|(reason, _)| reason == "Pulling").count();
    assert_eq!(pulls, 2, "latest is asked for at each start");
    let status = node.api.store().statuses["loop"].clone();
    let container = &status.container_statuses.unwrap()[0];
    assert_eq!(container.restart_count, 1);
    assert_eq!(container.last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 3);
}
