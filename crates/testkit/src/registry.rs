//! An image registry on 127.0.0.1 for tests, and the images to put there.
//!
//! Speaks the part of the OCI distribution specification that a client needs to pull: `/v2/`, manifests by tag and digest,
//! blobs, and the token dance of a registry that wants to know who asks. It can be told to be wrong.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Media type of a manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of a list of manifests for several platforms.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of Docker's own manifests.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Whom a registry lets in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    #[default]
    Open,
    /// Whoever has a token, which everybody gets who asks for one.
    Token,
    /// Whoever has a token, which only this user gets.
    TokenFor(String, String),
    /// This user, with every request (HTTP Basic).
    Basic(String, String),
}

#[derive(Debug, Default)]
struct State {
    access: Access,
    /// Path to content type and content.
    files: BTreeMap<String, (String, Vec<u8>)>,
    requests: Vec<String>,
}

/// A running registry. It stops with the process; a test's registry is small.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

impl Registry {
    /// Starts one on a free port of 127.0.0.1.
    pub fn start() -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port of 127.0.0.1 is free");
        let address = listener.local_addr().expect("it is bound");
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // A client that goes away is its own affair.
                std::thread::spawn(move || answer(stream, address, &state));
            }
        });
        Registry { address, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of an image here, as in a pod.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Says who may pull from now on.
    pub fn admit(&self, access: Access) {
        self.state().access = access;
    }

    /// The requests so far, as `METHOD PATH`.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    /// Stores a blob and describes it.
    pub fn put_blob(&self, repository: &str, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        let path = format!("/v2/{repository}/blobs/{digest}");
        self.state().files.insert(path, ("application/octet-stream".to_string(), bytes));
        descriptor
    }

    /// Stores a manifest or index under its digest and, if given, a tag, and describes it.
    pub fn put_manifest(&self, repository: &str, tag: Option<&str>, media_type: &str, manifest: &Value) -> Value {
        let bytes = manifest.to_string().into_bytes();
        let digest = digest(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        let mut state = self.state();
        for name in [Some(digest.as_str()), tag].into_iter().flatten() {
            let path = format!("/v2/{repository}/manifests/{name}");
            state.files.insert(path, (media_type.to_string(), bytes.clone()));
        }
        descriptor
    }

    /// Stores a whole image of one platform and describes its manifest. Layers are tar archives and what is sent of them.
    pub fn put_image(&self, repository: &str, tag: Option<&str>, config: &Value, layers: &[(&str, Vec<u8>)]) -> Value {
        let config_type = "application/vnd.oci.image.config.v1+json";
        let config = self.put_blob(repository, config_type, config.to_string().into_bytes());
        let layers: Vec<Value> =
            layers.iter().map(|(kind, bytes)| self.put_blob(repository, kind, bytes.clone())).collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.put_manifest(repository, tag, MANIFEST, &manifest)
    }

    /// Makes the registry send something else than it should under a path that ends with `suffix`.
    pub fn spoil(&self, suffix: &str) {
        let mut state = self.state();
        let found = state.files.iter_mut().find(|(path, _)| path.ends_with(suffix));
        let (_, (_, bytes)) = found.unwrap_or_else(|| panic!("nothing ends with {suffix}"));
        bytes.push(b' ');
    }
}

fn answer(mut stream: TcpStream, address: SocketAddr, state: &Mutex<State>) -> Option<()> {
    let mut head = Vec::new();
    let mut byte = [0u8; 1];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 64 * 1024 || stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.lines().next()?.split(' ');
    let (method, target) = (words.next()?.to_string(), words.next()?.to_string());
    let path = target.split('?').next()?.to_string();
    let authorization = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("authorization").then(|| value.trim().to_string())
    });
    let authorization = authorization.unwrap_or_default();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.requests.push(format!("{method} {path}"));
    let basic = |user: &str, password: &str| {
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
    };
    let (in_hand, challenge) = match &state.access {
        Access::Open => (true, String::new()),
        Access::Token | Access::TokenFor(..) => (
            authorization == "Bearer let-me-in",
            format!("Bearer realm=\"http://{address}/token\",service=\"registry of a test\",scope=\"pull\""),
        ),
        Access::Basic(user, password) => (authorization == basic(user, password), "Basic realm=\"test\"".to_string()),
    };
    let error =
        |code: &str| json!({"errors": [{"code": code, "message": code.to_lowercase()}]}).to_string().into_bytes();
    let (status, kind, body) = if path == "/token" {
        let known = match &state.access {
            Access::TokenFor(user, password) => authorization == basic(user, password),
            _ => true,
        };
        let asks = target.contains("scope=repository%3A") && target.contains("service=registry");
        match known && asks {
            true => ("200 OK", "application/json".to_string(), b"{\"token\":\"let-me-in\"}".to_vec()),
            false => ("401 Unauthorized", "application/json".to_string(), error("UNAUTHORIZED")),
        }
    } else if !in_hand {
        ("401 Unauthorized", "application/json".to_string(), error("UNAUTHORIZED"))
    } else if path == "/v2/" {
        ("200 OK", "application/json".to_string(), b"{}".to_vec())
    } else if let Some((kind, bytes)) = state.files.get(&path) {
        ("200 OK", kind.clone(), bytes.clone())
    } else {
        let code = if path.contains("/manifests/") { "MANIFEST_UNKNOWN" } else { "BLOB_UNKNOWN" };
        ("404 Not Found", "application/json".to_string(), error(code))
    };
    drop(state);
    let mut response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Distribution-Api-Version: registry/2.0\r\nConnection: close\r\n",
        body.len()
    );
    if status.starts_with("401") {
        response.push_str(&format!("WWW-Authenticate: {challenge}\r\n"));
    }
    response.push_str("\r\n");
    stream.write_all(response.as_bytes()).ok()?;
    if method != "HEAD" {
        stream.write_all(&body).ok()?;
    }
    Some(())
}

/// A tar archive of files that everybody may read and run.
pub fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, path, &content[..]).expect("memory takes it");
    }
    builder.into_inner().expect("memory takes it")
}

/// Some bytes, compressed as layers usually are.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory takes it");
    encoder.finish().expect("memory takes it")
}

/// A layer with the machine's shell and all that it needs to run.
pub fn shell_layer() -> Vec<u8> {
    let loader = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    let loader = loader.into_iter().find(|path| std::path::Path::new(path).exists()).expect("a loader is installed");
    let list = std::process::Command::new(loader).args(["--list", "/bin/sh"]).output().expect("the loader runs");
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    let mut names: Vec<&str> = text.split_whitespace().filter(|word| word.starts_with('/')).collect();
    names.push("/bin/sh");
    let read = |path: &str| std::fs::read(path).unwrap_or_else(|e| panic!("cannot read {path}: {e}"));
    let files: Vec<(&str, Vec<u8>)> = names.iter().map(|path| (path.trim_start_matches('/'), read(path))).collect();
    tar(&files)
}

/// The name of this machine's processor in images.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The configuration of an image that runs a script with the shell of its layers (tar archives, lowest first).
pub fn shell_config(layers: &[Vec<u8>], script: &str) -> Value {
    let ids: Vec<String> = layers.iter().map(|l| digest(l)).collect();
    json!({"architecture": architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids},
           "config": {"Entrypoint": ["/bin/sh", "-c"], "Cmd": [script]}})
}
