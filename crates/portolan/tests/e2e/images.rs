//! Images that come from a registry, and go again.

use portolan_testkit::registry::{Access, Registry, gzip, shell_config, shell_layer, tar};
use portolan_testkit::{Cluster, eventually};

use crate::{BINARY, LIMIT};

/// Puts an image that says its text and then waits for input.
fn put(registry: &Registry, tag: &str) {
    let layers = [shell_layer(), tar(&[("text", format!("this is {tag}").into_bytes())])];
    let config = shell_config(&layers, "read text < /text; echo $text; read line");
    let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
    registry.put_image("team/app", Some(tag), &config, &[(kind, gzip(&layers[0])), (kind, gzip(&layers[1]))]);
}

fn pod(image: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: web}}
spec:
  terminationGracePeriodSeconds: 1
  imagePullSecrets: [{{name: login}}]
  containers: [{{name: main, image: "{image}", stdin: true}}]
"#
    )
}

#[test]
fn a_private_registry_s_image_runs_is_replaced_and_removed() {
    let registry = Registry::start();
    registry.admit(Access::TokenFor("robot".into(), "s3cret".into()));
    put(&registry, "1");
    put(&registry, "2");
    let (one, two) = (registry.image("team/app:1"), registry.image("team/app:2"));
    let mut cluster = Cluster::new(BINARY, "pull");
    cluster.start(&["--nodes=1", "--allow-pull"]).ok();

    cluster.apply(&pod(&one)).ok();
    eventually("the pull is refused", LIMIT, || cluster.kubectl("get pod web --no-headers").has("ImagePullBackOff"));
    let told = cluster.kubectl("describe pod web").ok();
    for text in [
        "Unable to retrieve some image pull secrets (login); attempting to pull the image may not succeed.",
        &format!("Failed to pull image \"{one}\": failed to pull and unpack image \"{one}\""),
        "pull access denied",
        "Error: ErrImagePull",
        &format!("Back-off pulling image \"{one}\""),
        "Error: ImagePullBackOff",
    ] {
        assert!(told.contains(text), "{text:?} is missing in\n{told}");
    }
    let host = registry.host();
    cluster
        .kubectl(&format!(
            "create secret docker-registry login --docker-server={host} --docker-username=robot --docker-password=s3cret"
        ))
        .ok();
    cluster.kubectl("wait --for=condition=Ready pod/web --timeout=60s").ok();
    eventually("it speaks", LIMIT, || cluster.kubectl("logs web").has("this is 1"));
    let told = cluster.kubectl("describe pod web").ok();
    assert!(told.contains(&format!("Successfully pulled image \"{one}\" in ")), "{told}");
    assert!(told.contains("including waiting). Image size: "), "{told}");

    cluster.kubectl(&format!("set image pod/web main={two}")).ok();
    eventually("the other image speaks", LIMIT, || cluster.kubectl("logs web").has("this is 2"));
    let told = cluster.kubectl("describe pod web").ok();
    assert!(told.contains("Container main definition changed, will be restarted"), "{told}");

    let image = |words: &[&str]| {
        let named = [&words[..1], &["--name", &cluster.name], &words[1..]].concat();
        portolan_testkit::run(std::process::Command::new(BINARY).arg("image").args(named))
    };
    let listed = image(&["list"]).ok();
    assert!(listed.contains(&one) && listed.contains(&two), "{listed}");
    let refused = image(&["remove", &two]);
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains(&format!("image {two} is used by container main of pod default/web")), "{refused}");
    assert_eq!(image(&["remove", &one]).ok(), format!("removed {one}\n"));
    cluster.kubectl("delete pod web").ok();
    assert_eq!(image(&["remove", "--unused"]).ok(), format!("removed {two}\n"));
    let listed = image(&["list"]).ok();
    assert!(!listed.contains(&host) && listed.contains("portolan.dev/echo"), "{listed}");
    let refused = image(&["remove", &two]);
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.stderr.contains(&format!("there is no image {two} in the store")), "{refused}");
}

#[test]
fn without_leave_to_pull_the_import_command_is_named() {
    let registry = Registry::start();
    put(&registry, "1");
    let image = registry.image("team/app:1");
    let mut cluster = Cluster::new(BINARY, "nopull");
    cluster.start(&["--nodes=1"]).ok();
    cluster.apply(&pod(&image)).ok();
    eventually("the pod waits", LIMIT, || cluster.kubectl("get pod web --no-headers").has("ErrImageNeverPull"));
    let told = cluster.kubectl("describe pod web").ok();
    assert!(told.contains("portolan image import FILE") && told.contains("--allow-pull"), "{told}");
    assert!(registry.requests().is_empty(), "nothing is asked for: {:?}", registry.requests());
}
