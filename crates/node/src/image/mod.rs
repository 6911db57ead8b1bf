//! The local image store: what containers may be made from.
//!
//! Images come from archives ([`ImageStore::import`]), from a registry when the operator allows it, and three are built in and
//! made of the running program and the host's own files. Layers are unpacked once and shared; whiteouts are kept in the form
//! overlayfs reads. Several processes may use one store: changes to the index are made under a file lock and by rename.

mod archive;
mod builtin;
mod credentials;
mod layer;
mod pull;
mod reference;
mod zstd;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::oci::Bind;
pub use credentials::{Keyring, Login};
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
    /// The registry did not give the image. The text is a container runtime's, which is what events show.
    #[error("{}failed to pull and unpack image \"{reference}\": {reason}", status_prefix(*code))]
    Pull {
        /// The gRPC status code that a container runtime answers with, unless it has no better one than Unknown.
        code: Option<&'static str>,
        /// The image.
        reference: String,
        /// The registry's or the network's answer.
        reason: String,
    },
    /// There is no image of that name to remove.
    #[error("there is no image {0} in the store")]
    Unknown(String),
    /// A built-in image is part of the program.
    #[error("{0} is built in and cannot be removed")]
    Permanent(String),
    /// Containers run from an image that is to be removed.
    #[error("image {name} is used by {}; delete what runs it first", users.join(", "))]
    Used {
        /// The image, as it was named.
        name: String,
        /// The containers, as `container NAME of pod NAMESPACE/NAME`.
        users: Vec<String>,
    },
    /// Layers are being added, which must not be taken for layers that nobody needs.
    #[error("an image is being added to the store at this moment; try again when that is done")]
    Busy,
    /// A built-in image cannot be made on this host.
    #[error("built-in image {name} is not available: {reason}")]
    Builtin {
        /// The image.
        name: &'static str,
        /// What is missing.
        reason: String,
    },
}

fn status_prefix(code: Option<&str>) -> String {
    code.map_or_else(String::new, |code| format!("rpc error: code = {code} desc = "))
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
    /// What the registry calls it, `sha256:…` of its index or manifest, if it came from one or its archive says so.
    pub digest: Option<String>,
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
    /// Digests of the indexes and manifests that it was named by, the outermost of the last one first.
    #[serde(default)]
    digests: Vec<String>,
    #[serde(default)]
    from_registry: bool,
}

impl Index {
    /// Adds an image, or new names for one that is there.
    fn put(&mut self, image: NewImage) {
        for reference in &image.references {
            self.references.insert(reference.clone(), image.id.clone());
        }
        let mut stored = image.stored;
        if let Some(old) = self.images.remove(&image.id) {
            let kept = old.digests.into_iter().filter(|digest| !stored.digests.contains(digest));
            let kept: Vec<String> = kept.collect();
            stored.digests.extend(kept);
            stored.from_registry |= old.from_registry;
        }
        self.images.insert(image.id, stored);
    }

    /// Removes a name, and the image with its last one. Returns the names that are gone.
    fn take(&mut self, named: &Named) -> Vec<String> {
        let gone: Vec<String> = match named {
            Named::Reference { reference, .. } => vec![reference.clone()],
            Named::Image(id) => {
                let own = self.references.iter().filter(|(_, to)| *to == id);
                own.map(|(reference, _)| reference.clone()).collect()
            }
        };
        self.references.retain(|reference, _| !gone.contains(reference));
        if !self.references.values().any(|id| id == named.id()) {
            self.images.remove(named.id());
        }
        if gone.is_empty() { vec![named.id().to_string()] } else { gone }
    }
}

/// An image to remove.
enum Named {
    /// By one of its references.
    Reference { reference: String, id: String },
    /// By its id, with all references that it has.
    Image(String),
}

impl Named {
    fn id(&self) -> &str {
        match self {
            Named::Reference { id, .. } | Named::Image(id) => id,
        }
    }
}

/// What [`ImageStore::pull`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The image, ready to run.
    pub image: Image,
    /// How long it took, without waiting for others that pulled the same image.
    pub took: Duration,
    /// Bytes of its blobs as the registry holds them, whether they were fetched or here already.
    pub size_bytes: u64,
}

/// Makes callers that pull the same image wait for each other.
#[derive(Debug, Default)]
struct Turns(Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn turn(&self, reference: &Reference) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        let key = reference.to_string();
        if let Some(turn) = turns.get(&key).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        turns.insert(key, Arc::downgrade(&turn));
        turn
    }
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
    pulls: Arc<Turns>,
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
        Ok(ImageStore { dir, builtin: Arc::new(builtin), pulls: Arc::default() })
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
                .find(|(id, image)| id.as_str() == digest || image.digests.iter().any(|d| d == digest))
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
            digest: reference.digest().map(str::to_string).or_else(|| stored.digests.first().cloned()),
            size_bytes: stored.size_bytes,
        }))
    }

    /// Whether an image that was found is still there.
    pub fn holds(&self, image: &Image) -> Result<bool, ImageError> {
        let built_in = Reference::parse(&image.reference).is_ok_and(|reference| self.builtin.is(&reference));
        Ok(built_in || self.read_index()?.images.contains_key(&image.id))
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
        let _adding = self.lock_layers(FlockArg::LockShared)?;
        let images = archive::read(archive, &self.dir)?;
        let references = images.iter().flat_map(|image| image.references.clone()).collect();
        self.change_index(|index| images.into_iter().for_each(|image| index.put(image)))?;
        Ok(references)
    }

    /// Fetches an image from its registry into the store, with the first of `logins` that the registry accepts, or without
    /// one if there are none. Layers that are there are not fetched again. Several callers that want the same image wait for
    /// each other.
    ///
    /// # Errors
    /// [`ImageError::Pull`] with the reason of the last attempt; nothing is stored then.
    pub async fn pull(&self, reference: &Reference, logins: &[Login]) -> Result<Pulled, ImageError> {
        let turn = self.pulls.turn(reference);
        let _mine = turn.lock().await;
        let begin = Instant::now();
        let store = self.clone();
        let adding = tokio::task::spawn_blocking(move || store.lock_layers(FlockArg::LockShared));
        let _adding = adding.await.map_err(|e| file_error("lock", &self.dir)(io::Error::other(e)))??;
        let pull::Fetched { image, size_bytes } = pull::pull(reference, logins, &self.dir).await?;
        self.change_index(|index| index.put(image))?;
        let image = self.find(reference)?.ok_or_else(|| ImageError::Unknown(reference.to_string()))?;
        Ok(Pulled { image, took: begin.elapsed(), size_bytes })
    }

    /// Removes images by reference (in any form) or by id, with the layers that no other image needs. An image with several
    /// references loses those that are named, and goes with the last. Either all named are removed or none.
    ///
    /// `users` says which containers run, by image id; it is asked twice, because one may start meanwhile.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::Permanent`], [`ImageError::Used`], [`ImageError::Busy`]; the store is as before.
    pub fn remove(
        &self,
        names: &[String],
        users: impl Fn() -> io::Result<BTreeMap<String, Vec<String>>>,
    ) -> Result<Vec<String>, ImageError> {
        let _alone = self.lock_layers(FlockArg::LockExclusiveNonblock)?;
        let index = self.read_index()?;
        let mut wanted = Vec::new();
        for name in names {
            wanted.push((name, self.named(&index, name)?));
        }
        self.take_out(index, &wanted, users)
    }

    /// Removes every image that no container runs from, except the built-in ones. Returns what was removed.
    pub fn remove_unused(
        &self,
        users: impl Fn() -> io::Result<BTreeMap<String, Vec<String>>>,
    ) -> Result<Vec<String>, ImageError> {
        let _alone = self.lock_layers(FlockArg::LockExclusiveNonblock)?;
        let used = users().map_err(file_error("look for users of", &self.dir))?;
        let index = self.read_index()?;
        let names: Vec<String> = index.images.keys().filter(|id| !used.contains_key(*id)).cloned().collect();
        let wanted: Vec<(&String, Named)> = names.iter().map(|id| (id, Named::Image(id.clone()))).collect();
        self.take_out(index, &wanted, users)
    }

    /// What a name on the command line means.
    fn named(&self, index: &Index, name: &str) -> Result<Named, ImageError> {
        let unknown = || ImageError::Unknown(name.to_string());
        if name.starts_with("sha256:") {
            let id = index.images.keys().find(|id| *id == name).ok_or_else(|| {
                match self.builtin.list().iter().any(|own| own.id == name) {
                    true => ImageError::Permanent(name.to_string()),
                    false => unknown(),
                }
            })?;
            return Ok(Named::Image(id.clone()));
        }
        let reference = Reference::parse(name).map_err(|_| unknown())?;
        if self.builtin.is(&reference) {
            return Err(ImageError::Permanent(name.to_string()));
        }
        let key = reference.to_string();
        let id = index.references.get(&key).ok_or_else(unknown)?;
        Ok(Named::Reference { reference: key, id: id.clone() })
    }

    fn take_out(
        &self,
        mut index: Index,
        wanted: &[(&String, Named)],
        users: impl Fn() -> io::Result<BTreeMap<String, Vec<String>>>,
    ) -> Result<Vec<String>, ImageError> {
        let unused = || -> Result<(), ImageError> {
            let used = users().map_err(file_error("look for users of", &self.dir))?;
            let found = wanted.iter().find_map(|(name, named)| Some((name, used.get(named.id())?)));
            match found {
                Some((name, users)) => Err(ImageError::Used { name: name.to_string(), users: users.clone() }),
                None => Ok(()),
            }
        };
        unused()?;
        let before = index.clone();
        let mut removed = Vec::new();
        for (_, named) in wanted {
            removed.extend(index.take(named));
        }
        let after = index.clone();
        // The other writers hold the lock on layers, so nothing is lost by writing the whole index.
        self.change_index(|index| *index = after)?;
        // A container that began meanwhile has left its mark before it looked the image up again.
        if let Err(error) = unused() {
            self.change_index(|index| *index = before)?;
            return Err(error);
        }
        let needed: BTreeSet<&String> = index.images.values().flat_map(|image| &image.layers).collect();
        let gone: BTreeSet<&String> = before.images.values().flat_map(|image| &image.layers).collect();
        for layer in gone.difference(&needed) {
            layer::remove(&self.dir, layer)
                .map_err(file_error("remove layer", &self.dir.join("layers").join(layer)))?;
        }
        Ok(removed)
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

    /// Whoever adds layers holds this shared, whoever removes some holds it alone.
    fn lock_layers(&self, kind: FlockArg) -> Result<Flock<fs::File>, ImageError> {
        lock(&self.dir.join("layers.lock"), kind)
    }

    fn change_index(&self, change: impl FnOnce(&mut Index)) -> Result<(), ImageError> {
        let _guard = lock(&self.dir.join("lock"), FlockArg::LockExclusive)?;
        let mut index = self.read_index()?;
        change(&mut index);
        let next = self.dir.join("index.json.next");
        let bytes = serde_json::to_vec_pretty(&index).map_err(|e| file_error("write", &next)(e.into()))?;
        fs::write(&next, bytes).map_err(file_error("write", &next))?;
        fs::rename(&next, self.dir.join("index.json")).map_err(file_error("replace", &next))
    }
}

fn lock(path: &Path, kind: FlockArg) -> Result<Flock<fs::File>, ImageError> {
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(file_error("open", path))?;
    Flock::lock(file, kind).map_err(|(_, e)| match e {
        nix::errno::Errno::EWOULDBLOCK => ImageError::Busy,
        e => file_error("lock", path)(e.into()),
    })
}

/// A file of the store without a name, which lives as long as it is open.
fn unnamed_file(store: &Path) -> Result<fs::File, ImageError> {
    let path = store.join("tmp").join(uuid::Uuid::new_v4().simple().to_string());
    let file = fs::File::options().create_new(true).read(true).write(true).open(&path);
    let file = file.map_err(file_error("create", &path))?;
    fs::remove_file(&path).map_err(file_error("remove", &path))?;
    Ok(file)
}
