//! Images from archives: both formats, shared layers, whiteouts, and a pod that runs from one.

use std::io::Write;
use std::path::{Path, PathBuf};

use portolan_node::ImageStore;
use portolan_node::image::Reference;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cluster::{Node, program};

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, path, &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer with a shell and all that it needs, and one that changes it.
fn layers() -> [Vec<u8>; 2] {
    let mut files = Vec::new();
    let list = std::process::Command::new("/lib64/ld-linux-x86-64.so.2").args(["--list", "/bin/sh"]).output().unwrap();
    for word in String::from_utf8_lossy(&list.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
        files.push((word.trim_start_matches('/').to_string(), std::fs::read(word).unwrap()));
    }
    files.push(("bin/sh".into(), std::fs::read("/bin/sh").unwrap()));
    files.push(("etc/passwd".into(), b"root:x:0:0::/:/bin/sh\napp:x:77:78::/:/bin/sh\n".to_vec()));
    files.push(("data/old".into(), b"old".to_vec()));
    files.push(("data/kept".into(), b"kept".to_vec()));
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(p, c)| (p.as_str(), c.clone())).collect();
    let upper = [("data/.wh.old", Vec::new()), ("data/new", b"new".to_vec())];
    [tar(&files), tar(&upper)]
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
    let manifest =
        json!([{"Config": "config.json", "RepoTags": ["shop/app:1"], "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let path = dir.join("docker.tar");
    let [lower, upper] = layers;
    let files = [
        ("config.json", config),
        ("a/layer.tar", lower),
        ("b/layer.tar", upper),
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
    assert_eq!(count, 2, "both images share their layers");
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
