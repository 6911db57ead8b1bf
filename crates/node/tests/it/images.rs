//! Images from archives: both formats, shared layers, whiteouts, and a pod that runs from one.

use std::path::{Path, PathBuf};

use portolan_node::ImageStore;
use portolan_node::image::{ImageError, Reference};
use portolan_testkit::registry::{digest, gzip, shell_layer, tar};
use serde_json::{Value, json};

use crate::cluster::{Node, program};

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| name.to_string()).collect()
}

/// A layer with a shell and all that it needs, and one that adds to it and takes something away.
fn layers() -> [Vec<u8>; 3] {
    let passwd = b"root:x:0:0::/:/bin/sh\napp:x:77:78::/:/bin/sh\n".to_vec();
    let data = [("etc/passwd", passwd), ("data/old", b"old".to_vec()), ("data/kept", b"kept".to_vec())];
    let upper = [("data/.wh.old", Vec::new()), ("data/new", b"new".to_vec())];
    [shell_layer(), tar(&data), tar(&upper)]
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|l| digest(l)).collect();
    let script = "for f in /data/*; do read x < $f; echo $f=$x; done; echo user=$USERNAME";
    json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids},
           "config": {"Entrypoint": ["/bin/sh", "-c"], "Cmd": [script], "Env": ["USERNAME=app"], "User": "app", "Volumes": null}})
    .to_string()
    .into_bytes()
}

fn docker_archive(dir: &Path) -> PathBuf {
    let layers = layers();
    let config = config(&layers);
    let manifest = json!([{"Config": "config.json", "RepoTags": ["shop/app:1"], "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"]}]);
    let path = dir.join("docker.tar");
    let [shell, lower, upper] = layers;
    let files = [
        ("config.json", config),
        ("a/layer.tar", shell),
        ("b/layer.tar", lower),
        ("c/layer.tar", upper),
        ("manifest.json", manifest.to_string().into_bytes()),
    ];
    std::fs::write(&path, tar(&files)).unwrap();
    path
}

fn oci_archive(dir: &Path, spoil: bool) -> PathBuf {
    let layers = layers();
    let config = config(&layers);
    let mut blobs: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |kind: &str, bytes: Vec<u8>| -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({"mediaType": kind, "digest": digest, "size": bytes.len()});
        blobs.push((format!("blobs/{}", digest.replace(':', "/")), bytes));
        descriptor
    };
    let config = add("application/vnd.oci.image.config.v1+json", config);
    let packed: Vec<Value> =
        layers.iter().map(|l| add("application/vnd.oci.image.layer.v1.tar+gzip", gzip(l))).collect();
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": packed}).to_string().into_bytes();
    let mut entry = add("application/vnd.oci.image.manifest.v1+json", manifest);
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "registry.example/app:2"});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string().into_bytes();
    if spoil {
        blobs[0].1.push(b' ');
    }
    let mut files = vec![("oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}".to_vec()), ("index.json", index)];
    files.extend(blobs.iter().map(|(path, bytes)| (path.as_str(), bytes.clone())));
    let path = dir.join("oci.tar.gz");
    std::fs::write(&path, gzip(&tar(&files))).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_image_runs_with_its_layers_user_and_defaults() {
    let node = Node::start("image").await;
    let images = &node.config.images;
    assert_eq!(images.import(&docker_archive(&node.dir)).unwrap(), ["docker.io/shop/app:1"]);
    assert_eq!(images.import(&oci_archive(&node.dir, false)).unwrap(), ["registry.example/app:2"]);
    for (name, image) in [("docker", "shop/app:1"), ("oci", "registry.example/app:2")] {
        node.run(name, json!({"restartPolicy": "Never", "containers": [{"name": "main", "image": image}]}));
        node.api.phase(name, "Succeeded").await;
        let (_, text) = node.kubelet_get(&format!("/containerLogs/shop/{name}/main")).await;
        assert_eq!(text, "/data/kept=kept\n/data/new=new\nuser=app\n", "{name}");
    }
    let stored = std::fs::read_dir(node.dir.join("images/layers")).unwrap().flatten();
    let count = stored.filter(|e| e.path().is_dir()).count();
    assert_eq!(count, 3, "both images share their layers");
    let list = images.list().unwrap();
    assert_eq!(list.iter().filter(|i| i.built_in).count(), 3);
    // The same configuration is the same image under two names.
    let own: Vec<_> = list.iter().filter(|i| !i.built_in).flat_map(|i| i.references.clone()).collect();
    assert_eq!(own, ["docker.io/shop/app:1", "registry.example/app:2"]);
}

#[test]
fn bad_archives_store_nothing_and_say_why() {
    let dir = std::env::temp_dir().join(format!("ptln-bad-{}", std::process::id()));
    let store = ImageStore::open_with_program(dir.join("images"), program()).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let missing_layer = json!([{"Config": "c", "RepoTags": ["a:1"], "Layers": ["nope"]}]).to_string().into_bytes();
    let foreign = json!({"architecture": "riscv", "os": "linux", "rootfs": {"diff_ids": []}}).to_string().into_bytes();
    let foreign_manifest = json!([{"Config": "c", "RepoTags": ["a:1"], "Layers": []}]).to_string().into_bytes();
    let rows = [
        (write("text", b"hello"), "tar archive"),
        (write("empty.tar", &tar(&[])), "neither index.json"),
        (write("missing.tar", &tar(&[("manifest.json", missing_layer), ("c", config(&layers()))])), "layers"),
        (write("foreign.tar", &tar(&[("manifest.json", foreign_manifest), ("c", foreign)])), "riscv"),
        (oci_archive(&dir, true), "digest"),
    ];
    for (path, expected) in &rows {
        let error = store.import(path).unwrap_err().to_string();
        assert!(error.contains(expected), "{}: {error}", path.display());
    }
    assert!(store.find(&Reference::parse("a:1").unwrap()).unwrap().is_none());
    assert_eq!(store.list().unwrap().len(), 3, "only the built-in images");
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_nobody_uses_can_be_removed() {
    let node = Node::start("remove").await;
    let images = &node.config.images;
    let run_dir = node.config.run_dir.clone();
    let users = || portolan_node::image_users(&run_dir);
    let layer_count = || {
        let stored = std::fs::read_dir(node.dir.join("images/layers")).unwrap().flatten();
        stored.filter(|e| e.path().is_dir()).count()
    };
    images.import(&docker_archive(&node.dir)).unwrap();
    let other = {
        let layers = [shell_layer()];
        let config = portolan_testkit::registry::shell_config(&layers, "echo other").to_string().into_bytes();
        let manifest = json!([{"Config": "c", "RepoTags": ["other:1", "other:2"], "Layers": ["l"]}]).to_string();
        let path = node.dir.join("other.tar");
        let [layer] = layers;
        std::fs::write(&path, tar(&[("c", config), ("l", layer), ("manifest.json", manifest.into_bytes())])).unwrap();
        path
    };
    images.import(&other).unwrap();
    assert_eq!(layer_count(), 3, "the shell is in both");

    let sleeper = json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "main", "image": "shop/app:1",
        "stdin": true, "args": ["read line"]}]});
    let pod = node.run("user", sleeper);
    node.api.ready("user").await;
    let refused = images.remove(&names(&["other:1", "shop/app:1"]), users).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("shop/app:1 is used by container main of pod shop/user"), "{text}");
    for (name, expected) in [
        ("nope:1", "there is no image nope:1"),
        ("NOT A NAME", "there is no image NOT A NAME"),
        ("portolan.dev/echo", "portolan.dev/echo is built in"),
        ("sha256:12", "there is no image sha256:12"),
    ] {
        let text = images.remove(&names(&[name]), users).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    assert_eq!(images.list().unwrap().iter().filter(|i| !i.built_in).count(), 2, "refused means untouched");

    assert_eq!(images.remove(&names(&["other:1"]), users).unwrap(), ["docker.io/library/other:1"]);
    assert!(images.find(&Reference::parse("other:2").unwrap()).unwrap().is_some(), "the other name keeps it");
    assert_eq!(images.remove(&names(&["docker.io/library/other:2"]), users).unwrap(), ["docker.io/library/other:2"]);
    assert_eq!(layer_count(), 3, "what runs keeps the layer that both had");
    assert_eq!(images.remove_unused(users).unwrap(), names(&[]), "nothing is unused");

    node.delete(&pod, 1);
    node.deleted("user").await;
    // One that starts between the two looks keeps its image.
    let id = images.find(&Reference::parse("shop/app:1").unwrap()).unwrap().unwrap().id;
    let asked = std::cell::Cell::new(0);
    let late = || {
        asked.set(asked.get() + 1);
        let users = (asked.get() == 2).then(|| (id.clone(), names(&["it"])));
        Ok(users.into_iter().collect())
    };
    assert!(matches!(images.remove(&names(&["shop/app:1"]), late), Err(ImageError::Used { .. })));
    assert!(images.find(&Reference::parse("shop/app:1").unwrap()).unwrap().is_some(), "put back");
    assert_eq!(images.remove_unused(users).unwrap(), ["docker.io/shop/app:1"]);
    assert_eq!(layer_count(), 0);
    assert!(std::fs::read_dir(node.dir.join("images/tmp")).unwrap().next().is_none(), "nothing is left aside");
    images.import(&other).unwrap();
    node.run("again", json!({"restartPolicy": "Never", "containers": [{"name": "main", "image": "other:2"}]}));
    node.api.phase("again", "Succeeded").await;
}
