//! Reads image archives: OCI layout (OCI image specification, image-layout) and what `docker save` writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;

use super::layer::{self, Hashing};
use super::zstd;
use super::{ImageConfig, ImageError, NewImage, Reference, StoredImage, file_error, unnamed_file};

/// Manifests and configurations are small; a larger one is not what it claims to be.
pub(super) const MAX_JSON_BYTES: u64 = 8 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    /// Bytes.
    #[serde(default)]
    pub(super) size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

impl Descriptor {
    /// Whether an entry of an index is an image that this machine can run. Attestations ride along as manifests for the
    /// platform unknown/unknown.
    pub(super) fn is_for_this_machine(&self) -> bool {
        self.platform.as_ref().is_none_or(|p| p.os == "linux" && p.architecture == architecture())
    }
}

#[derive(Deserialize)]
pub(super) struct OciIndex {
    pub(super) manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
pub(super) struct OciManifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
pub(super) struct OciConfig {
    #[serde(default)]
    pub(super) config: Option<ImageConfig>,
    pub(super) rootfs: RootFs,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Deserialize)]
pub(super) struct RootFs {
    pub(super) diff_ids: Vec<String>,
}

impl OciConfig {
    /// Refuses an image for another processor or system: its programs would fail with an obscure error.
    pub(super) fn check_platform(&self) -> Result<(), String> {
        let wrong = |value: &str, wanted: &str| !value.is_empty() && value != wanted;
        if wrong(&self.os, "linux") || wrong(&self.architecture, architecture()) {
            return Err(format!(
                "it is for {}/{}, this machine is linux/{}",
                self.os,
                self.architecture,
                architecture()
            ));
        }
        Ok(())
    }
}

/// This machine's processor in the names of images.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Where an entry's bytes are in the archive.
#[derive(Clone, Copy)]
struct Extent {
    offset: u64,
    size: u64,
}

enum Entry {
    File(Extent),
    Link(String),
}

struct Archive {
    file: File,
    entries: BTreeMap<String, Entry>,
}

/// Unpacks the layers of all images in `path` into `store` and describes the images.
pub(super) fn read(path: &Path, store: &Path) -> Result<Vec<NewImage>, ImageError> {
    let malformed = |reason: String| ImageError::Malformed { source_name: path.display().to_string(), reason };
    let file = plain(path, store)?;
    let archive = Archive::index(file).map_err(|e| malformed(format!("it is not a tar archive ({e})")))?;
    let images = if archive.entries.contains_key("index.json") && archive.entries.contains_key("oci-layout") {
        oci(&archive, path, store)
    } else if archive.entries.contains_key("manifest.json") {
        docker(&archive, path, store)
    } else {
        Err("it has neither index.json (OCI layout) nor manifest.json (docker save)".to_string())
    };
    let images = images.map_err(malformed)?;
    if images.is_empty() {
        return Err(malformed("it holds no image".to_string()));
    }
    Ok(images)
}

/// The archive as a file that can be read at any place: itself, or its decompressed copy, which is deleted at once and lives
/// as long as it is open.
fn plain(path: &Path, store: &Path) -> Result<File, ImageError> {
    let mut file = File::open(path).map_err(file_error("open", path))?;
    let mut magic = [0u8; 2];
    let n = file.read(&mut magic).map_err(file_error("read", path))?;
    file.seek(SeekFrom::Start(0)).map_err(file_error("read", path))?;
    if n < 2 || magic != [0x1f, 0x8b] {
        return Ok(file);
    }
    let mut copy = unnamed_file(store)?;
    io::copy(&mut flate2::read::MultiGzDecoder::new(BufReader::new(file)), &mut copy)
        .map_err(file_error("decompress", path))?;
    copy.seek(SeekFrom::Start(0)).map_err(file_error("read", path))?;
    Ok(copy)
}

impl Archive {
    fn index(file: File) -> io::Result<Archive> {
        let mut entries = BTreeMap::new();
        let mut tar = tar::Archive::new(&file);
        for entry in tar.entries_with_seek()? {
            let entry = entry?;
            let name = clean(&entry.path()?.to_string_lossy());
            match entry.header().entry_type() {
                tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                    entries.insert(name, Entry::File(Extent { offset: entry.raw_file_position(), size: entry.size() }));
                }
                tar::EntryType::Symlink | tar::EntryType::Link => {
                    let Some(to) = entry.link_name()? else { continue };
                    let to = to.to_string_lossy();
                    let to = if entry.header().entry_type() == tar::EntryType::Link {
                        clean(&to)
                    } else {
                        let parent = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                        clean(&format!("{parent}/{to}"))
                    };
                    entries.insert(name, Entry::Link(to));
                }
                _ => {}
            }
        }
        Ok(Archive { file, entries })
    }

    fn extent(&self, name: &str) -> Result<Extent, String> {
        let mut name = clean(name);
        // Links point to other entries; more than a few in a row is a loop.
        for _ in 0..8 {
            match self.entries.get(&name) {
                Some(Entry::File(extent)) => return Ok(*extent),
                Some(Entry::Link(to)) => name = to.clone(),
                None => return Err(format!("entry {name} is missing")),
            }
        }
        Err(format!("entry {name} is a link to itself"))
    }

    fn reader(&self, extent: Extent) -> io::Result<io::Take<BufReader<FileAt>>> {
        let at = FileAt { file: self.file.try_clone()?, offset: extent.offset };
        Ok(BufReader::with_capacity(64 * 1024, at).take(extent.size))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<(T, Vec<u8>), String> {
        let extent = self.extent(name)?;
        if extent.size > MAX_JSON_BYTES {
            return Err(format!("entry {name} has {} bytes, which is no manifest", extent.size));
        }
        let mut bytes = Vec::new();
        self.reader(extent).and_then(|mut r| r.read_to_end(&mut bytes)).map_err(|e| format!("entry {name}: {e}"))?;
        let value = serde_json::from_slice(&bytes).map_err(|e| format!("entry {name}: {e}"))?;
        Ok((value, bytes))
    }

    /// A JSON blob of an OCI layout, checked against its digest.
    fn blob<T: serde::de::DeserializeOwned>(&self, digest: &str) -> Result<T, String> {
        let (value, bytes) = self.json(&blob_path(digest)?)?;
        check_digest(digest, &bytes)?;
        Ok(value)
    }
}

/// Reads from its own place of a file that others read too.
struct FileAt {
    file: File,
    offset: u64,
}

impl Read for FileAt {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = std::os::unix::fs::FileExt::read_at(&self.file, buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// A path without `.`, empty and `..` components, as archive members are named.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn blob_path(digest: &str) -> Result<String, String> {
    match digest.split_once(':') {
        Some(("sha256", hex)) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Ok(format!("blobs/sha256/{hex}"))
        }
        _ => Err(format!("digest {digest:?} is not sha256")),
    }
}

pub(super) fn check_digest(digest: &str, bytes: &[u8]) -> Result<(), String> {
    let found = Hashing::new(bytes).finish().map_err(|e| e.to_string())?;
    if found == digest { Ok(()) } else { Err(format!("content has digest {found} but should have {digest}")) }
}

/// Decompresses a layer by what its first bytes say, because media types in archives are not reliable.
pub(super) fn decompress(mut reader: impl Read + 'static) -> io::Result<Box<dyn Read>> {
    let mut magic = [0u8; 4];
    let mut n = 0;
    while n < 4 {
        match reader.read(&mut magic[n..])? {
            0 => break,
            more => n += more,
        }
    }
    let whole = io::Cursor::new(magic[..n].to_vec()).chain(reader);
    if magic.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(whole))))
    } else if zstd::begins(magic) {
        Ok(Box::new(zstd::Decoder::new(BufReader::new(whole))))
    } else {
        Ok(Box::new(whole))
    }
}

fn unpack_layers(
    store: &Path,
    config: &OciConfig,
    layers: &[String],
    open: impl Fn(&str) -> Result<Box<dyn Read>, String>,
) -> Result<(Vec<String>, u64), String> {
    config.check_platform()?;
    if config.rootfs.diff_ids.len() != layers.len() {
        return Err(format!("it lists {} layers but its configuration {}", layers.len(), config.rootfs.diff_ids.len()));
    }
    let mut names = Vec::new();
    let mut size = 0;
    for (diff_id, layer) in config.rootfs.diff_ids.iter().zip(layers) {
        let (name, bytes) = layer::unpack(store, diff_id, || open(layer).map_err(io::Error::other))
            .map_err(|e| format!("layer {layer}: {}", crate::worker::chain(&e)))?;
        names.push(name);
        size += bytes;
    }
    Ok((names, size))
}

fn normal(references: impl IntoIterator<Item = String>, path: &Path) -> Result<Vec<String>, String> {
    let mut normal = Vec::new();
    for reference in references {
        normal.push(Reference::parse(&reference)?.to_string());
    }
    if normal.is_empty() {
        let stem = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        let stem = stem.split('.').next().unwrap_or_default().to_string();
        normal.push(Reference::parse(&format!("localhost/{stem}"))?.to_string());
    }
    Ok(normal)
}

fn docker(archive: &Archive, path: &Path, store: &Path) -> Result<Vec<NewImage>, String> {
    let (manifests, _): (Vec<DockerManifest>, _) = archive.json("manifest.json")?;
    let mut images = Vec::new();
    for manifest in manifests {
        let (config, bytes): (OciConfig, _) = archive.json(&manifest.config)?;
        let id = Hashing::new(&bytes[..]).finish().map_err(|e| e.to_string())?;
        let (layers, size_bytes) = unpack_layers(store, &config, &manifest.layers, |name| {
            let reader = archive.reader(archive.extent(name)?).map_err(|e| e.to_string())?;
            decompress(reader).map_err(|e| e.to_string())
        })?;
        images.push(NewImage {
            id,
            references: normal(manifest.repo_tags.unwrap_or_default(), path)?,
            stored: StoredImage {
                config: config.config.unwrap_or_default(),
                layers,
                size_bytes,
                digests: Vec::new(),
                from_registry: false,
            },
        });
    }
    Ok(images)
}

fn oci(archive: &Archive, path: &Path, store: &Path) -> Result<Vec<NewImage>, String> {
    let (index, _): (OciIndex, _) = archive.json("index.json")?;
    let mut images = Vec::new();
    for descriptor in index.manifests {
        let reference = ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
            .iter()
            .find_map(|key| descriptor.annotations.get(*key))
            .cloned()
            // A bare tag names no image (the OCI layout allows it); the file's name must do then.
            .filter(|name| name.contains(['/', ':']));
        let digest = descriptor.digest.clone();
        let Some(manifest_descriptor) = choose(archive, descriptor, 0)? else {
            return Err(format!("{digest} has no manifest for linux/{}", architecture()));
        };
        let manifest: OciManifest = archive.blob(&manifest_descriptor.digest)?;
        let config: OciConfig = archive.blob(&manifest.config.digest)?;
        let names: Vec<String> = manifest.layers.iter().map(|l| l.digest.clone()).collect();
        let (layers, size_bytes) = unpack_layers(store, &config, &names, |digest| {
            let reader = archive.reader(archive.extent(&blob_path(digest)?)?).map_err(|e| e.to_string())?;
            decompress(reader).map_err(|e| e.to_string())
        })?;
        images.push(NewImage {
            id: manifest.config.digest,
            references: normal(reference, path)?,
            stored: StoredImage {
                config: config.config.unwrap_or_default(),
                layers,
                size_bytes,
                digests: vec![digest],
                from_registry: false,
            },
        });
    }
    Ok(images)
}

/// Follows indexes down to the manifest for this machine.
fn choose(archive: &Archive, descriptor: Descriptor, depth: usize) -> Result<Option<Descriptor>, String> {
    if !descriptor.media_type.ends_with("image.index.v1+json")
        && !descriptor.media_type.ends_with("manifest.list.v2+json")
    {
        return Ok(Some(descriptor));
    }
    if depth > 4 {
        return Err("its indexes are nested too deeply".to_string());
    }
    let index: OciIndex = archive.blob(&descriptor.digest)?;
    for child in index.manifests {
        let present = blob_path(&child.digest).is_ok_and(|path| archive.extent(&path).is_ok());
        if child.is_for_this_machine() && present {
            return choose(archive, child, depth + 1);
        }
    }
    Ok(None)
}
