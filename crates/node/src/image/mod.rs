//! The local image store: what containers may be made from.
//!
//! Images come from archives ([`ImageStore::import`]), from a registry when the operator allows it, and three are built in and
//! made of the running program and the host's own files. Layers are unpacked once and shared; whiteouts are kept in the form
//! overlayfs reads. Several processes may use one store: changes to the index are made under a file lock and by rename.

mod archive;
mod builtin;
mod layer;
mod pull;
mod reference;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::oci::Bind;
pub use reference::Reference;

/// Why an image could not be stored or found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file of the store or the archive cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The archive or registry gave something that is not an image.
    #[error("{source_name} is not a usable image: {reason}")]
    Malformed {
        /// The archive's path or the image's reference.
        source_name: String,
        /// What is wrong.
        reason: String,
    },
    /// The registry did not give the image.
    #[error("failed to pull image {reference}: {reason}")]
    Pull {
        /// The image.
        reference: String,
        /// The registry's or the network's answer.
        reason: String,
    },
    /// A built-in image cannot be made on this host.
    #[error("built-in image {name} is not available: {reason}")]
    Builtin {
        /// The image.
        name: &'static str,
        /// What is missing.
        reason: String,
    },
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_path_buf();
    move |source| ImageError::File { action, path, source }
}

/// The part of an image's configuration that decides how a container starts (OCI image specification, config).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// Program and leading arguments.
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// Default arguments.
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// Environment as `NAME=value`.
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty is root.
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    /// Working directory; empty is `/`.
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
    /// Signal that asks it to stop, by name or number.
    #[serde(deserialize_with = "null_is_default")]
    pub stop_signal: String,
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// An image that is ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// `sha256:` and the digest of its configuration; built-in images have a digest of their description.
    pub id: String,
    /// The reference in normal form that it was found by.
    pub reference: String,
    /// Unpacked layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// How it starts.
    pub config: ImageConfig,
    /// Host files that are part of it (built-in images only).
    pub binds: Vec<Bind>,
    /// Whether it answers as `portolan.dev/echo` and is told who it is.
    pub wants_identity: bool,
    /// Whether it came from a registry, so that pull policy Always asks there again.
    pub from_registry: bool,
    /// Bytes of its unpacked layers.
    pub size_bytes: u64,
}

/// A line of [`ImageStore::list`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// References in normal form, sorted.
    pub references: Vec<String>,
    /// As in [`Image::id`].
    pub id: String,
    /// Bytes of its unpacked layers.
    pub size_bytes: u64,
    /// Whether it is built in.
    pub built_in: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Index {
    /// Reference in normal form to image id.
    references: BTreeMap<String, String>,
    images: BTreeMap<String, StoredImage>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredImage {
    config: ImageConfig,
    /// Names of layer directories, lowest first.
    layers: Vec<String>,
    size_bytes: u64,
    #[serde(default)]
    manifest_digest: Option<String>,
    #[serde(default)]
    from_registry: bool,
}

/// An image as read from an archive or a registry, with its layers unpacked.
struct NewImage {
    id: String,
    stored: StoredImage,
    references: Vec<String>,
}

/// A directory of images. Clones share it.
#[derive(Clone, Debug)]
pub struct ImageStore {
    dir: PathBuf,
    builtin: Arc<builtin::Builtin>,
}

impl ImageStore {
    /// Opens or makes a store. The built-in images run the program that calls this.
    ///
    /// # Errors
    /// Fails when the directory cannot be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<ImageStore, ImageError> {
        let program = Path::new("/proc/self/exe");
        let program = fs::read_link(program).map_err(file_error("find the program at", program))?;
        ImageStore::open_with_program(dir, program)
    }

    /// Like [`ImageStore::open`]; the images `portolan.dev/echo` and `portolan.dev/portolan` run `program`.
    pub fn open_with_program(dir: impl Into<PathBuf>, program: impl Into<PathBuf>) -> Result<ImageStore, ImageError> {
        let dir = dir.into();
        for part in ["layers", "tmp", "builtin"] {
            let path = dir.join(part);
            fs::create_dir_all(&path).map_err(file_error("create", &path))?;
        }
        let builtin = builtin::Builtin::new(dir.join("builtin"), program.into());
        Ok(ImageStore { dir, builtin: Arc::new(builtin) })
    }

    /// Finds an image by any form of its reference. `Ok(None)` means that it is not here.
    ///
    /// # Errors
    /// Fails when the store is damaged, or a built-in image cannot be made on this host.
    pub fn find(&self, reference: &Reference) -> Result<Option<Image>, ImageError> {
        if let Some(image) = self.builtin.find(reference)? {
            return Ok(Some(image));
        }
        let index = self.read_index()?;
        let id = match reference.digest() {
            Some(digest) => index
                .images
                .iter()
                .find(|(id, image)| id.as_str() == digest || image.manifest_digest.as_deref() == Some(digest))
                .map(|(id, _)| id.clone()),
            None => index.references.get(&reference.to_string()).cloned(),
        };
        let Some(id) = id else { return Ok(None) };
        let Some(stored) = index.images.get(&id) else { return Ok(None) };
        Ok(Some(Image {
            id,
            reference: reference.to_string(),
            layers: stored.layers.iter().map(|name| self.dir.join("layers").join(name)).collect(),
            config: stored.config.clone(),
            binds: Vec::new(),
            wants_identity: false,
            from_registry: stored.from_registry,
            size_bytes: stored.size_bytes,
        }))
    }

    /// Stores the images of an archive made by `docker save` or in OCI layout (tar, gzip or plain), and returns their
    /// references in normal form.
    ///
    /// An archive that names no image is stored under `localhost/` and its file name. Blocks on disk and processor.
    ///
    /// # Errors
    /// Fails on an archive that is damaged, holds no Linux image for this processor, or tries to write outside itself;
    /// nothing is stored then.
    pub fn import(&self, archive: &Path) -> Result<Vec<String>, ImageError> {
        let images = archive::read(archive, &self.dir)?;
        let mut references = Vec::new();
        self.change_index(|index| {
            for image in images {
                for reference in &image.references {
                    index.references.insert(reference.clone(), image.id.clone());
                }
                references.extend(image.references);
                index.images.insert(image.id, image.stored);
            }
        })?;
        Ok(references)
    }

    /// Fetches an image from its registry into the store.
    pub async fn pull(&self, reference: &Reference) -> Result<Image, ImageError> {
        let image = pull::pull(reference, &self.dir).await?;
        self.change_index(|index| {
            for reference in &image.references {
                index.references.insert(reference.clone(), image.id.clone());
            }
            index.images.insert(image.id, image.stored);
        })?;
        self.find(reference)?.ok_or_else(|| ImageError::Pull {
            reference: reference.to_string(),
            reason: "the image was removed while it was stored".to_string(),
        })
    }

    /// Everything in the store, built-in images first, then by reference.
    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let index = self.read_index()?;
        let mut list = self.builtin.list();
        let mut stored: Vec<ImageSummary> = index
            .images
            .iter()
            .map(|(id, image)| ImageSummary {
                references: index.references.iter().filter(|(_, i)| *i == id).map(|(r, _)| r.clone()).collect(),
                id: id.clone(),
                size_bytes: image.size_bytes,
                built_in: false,
            })
            .collect();
        stored.sort_by(|a, b| a.references.cmp(&b.references).then_with(|| a.id.cmp(&b.id)));
        list.extend(stored);
        Ok(list)
    }

    fn read_index(&self) -> Result<Index, ImageError> {
        let path = self.dir.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| file_error("read", &path)(e.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Index::default()),
            Err(e) => Err(file_error("read", &path)(e)),
        }
    }

    fn change_index(&self, change: impl FnOnce(&mut Index)) -> Result<(), ImageError> {
        let lock_path = self.dir.join("lock");
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(file_error("open", &lock_path))?;
        let _guard = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive)
            .map_err(|(_, e)| file_error("lock", &lock_path)(e.into()))?;
        let mut index = self.read_index()?;
        change(&mut index);
        let next = self.dir.join("index.json.next");
        let bytes = serde_json::to_vec_pretty(&index).map_err(|e| file_error("write", &next)(e.into()))?;
        fs::write(&next, bytes).map_err(file_error("write", &next))?;
        fs::rename(&next, self.dir.join("index.json")).map_err(file_error("replace", &next))
    }
}
