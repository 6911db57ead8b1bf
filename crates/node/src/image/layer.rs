//! Unpacks one layer of an image into the form overlayfs reads.
//!
//! Source: OCI image specification, layer. A whiteout `.wh.NAME` becomes a character device 0/0, an opaque marker becomes the
//! attribute `trusted.overlay.opaque` (kernel Documentation/filesystems/overlayfs.rst).

use std::ffi::CString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::names::hex;

/// Reads through and hashes.
pub(super) struct Hashing<R> {
    inner: R,
    hash: Sha256,
    pub(super) bytes: u64,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Hashing { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// Reads the rest and gives the digest as `sha256:…`.
    pub(super) fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(format!("sha256:{}", hex(&self.hash.finalize())))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

/// Name of a layer's directory: the first 24 digits of its digest. 96 bits do not collide by accident, and the mount options
/// of an image with many layers must fit a page.
pub(super) fn dir_name(diff_id: &str) -> Option<String> {
    let hex = diff_id.strip_prefix("sha256:")?;
    (hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit())).then(|| hex[..24].to_ascii_lowercase())
}

/// A layer that is there: its directory's name and the bytes that it holds.
pub(super) fn present(store: &Path, diff_id: &str) -> Option<(String, u64)> {
    let name = dir_name(diff_id)?;
    if !store.join("layers").join(&name).exists() {
        return None;
    }
    let size_file = store.join("layers").join(format!("{name}.size"));
    let size = fs::read_to_string(size_file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Some((name, size))
}

/// Removes a layer. Its content goes to the side first, so that what remains under its name is always whole.
pub(super) fn remove(store: &Path, name: &str) -> io::Result<()> {
    let aside = store.join("tmp").join(uuid::Uuid::new_v4().simple().to_string());
    match fs::rename(store.join("layers").join(name), &aside) {
        Ok(()) => fs::remove_dir_all(&aside)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    match fs::remove_file(store.join("layers").join(format!("{name}.size"))) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Unpacks the layer with this digest of its uncompressed bytes into `{store}/layers`, unless it is there.
/// Returns its directory's name and the bytes that it holds.
pub(super) fn unpack(
    store: &Path,
    diff_id: &str,
    open: impl FnOnce() -> io::Result<Box<dyn Read>>,
) -> io::Result<(String, u64)> {
    let name = dir_name(diff_id).ok_or_else(|| io::Error::other(format!("layer digest {diff_id:?} is not sha256")))?;
    let target = store.join("layers").join(&name);
    let size_file = store.join("layers").join(format!("{name}.size"));
    if let Some(present) = present(store, diff_id) {
        return Ok(present);
    }
    let staging = store.join("tmp").join(uuid::Uuid::new_v4().simple().to_string());
    fs::create_dir_all(&staging)?;
    let unpacked = open().and_then(|reader| {
        let mut hashing = Hashing::new(reader);
        unpack_tar(&mut hashing, &staging)?;
        let bytes = hashing.bytes;
        let digest = hashing.finish()?;
        if digest != diff_id {
            return Err(io::Error::other(format!("layer has digest {digest}, its image says {diff_id}")));
        }
        Ok(bytes)
    });
    let bytes = match unpacked {
        Ok(bytes) => bytes,
        Err(e) => {
            let _ = fs::remove_dir_all(&staging);
            return Err(e);
        }
    };
    fs::write(&size_file, bytes.to_string())?;
    match fs::rename(&staging, &target) {
        // Another import of the same layer was faster.
        Err(_) if target.exists() => fs::remove_dir_all(&staging)?,
        other => other?,
    }
    Ok((name, bytes))
}

fn unpack_tar(reader: &mut impl Read, target: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    let mut dirs = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let Some(relative) = safe(&path)? else { continue };
        let name = relative.file_name().map(|n| n.as_bytes().to_vec()).unwrap_or_default();
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            whiteout(target, &relative, hidden)?;
            continue;
        }
        match entry.header().entry_type() {
            // A directory's mode may forbid writing into it, and its time changes with its content: set both at the end.
            tar::EntryType::Directory => {
                make_dirs(target, &relative)?;
                dirs.push((relative, entry.header().clone()));
            }
            tar::EntryType::XGlobalHeader => {}
            tar::EntryType::Char | tar::EntryType::Block | tar::EntryType::Fifo => {
                special(target, &relative, entry.header())?;
            }
            _ => {
                if let Some(parent) = relative.parent() {
                    make_dirs(target, parent)?;
                }
                remove_existing(&target.join(&relative))?;
                if !entry.unpack_in(target)? {
                    return Err(io::Error::other(format!("entry {} leads out of the layer", path.display())));
                }
            }
        }
    }
    for (relative, header) in dirs.into_iter().rev() {
        let path = target.join(&relative);
        nix::unistd::fchownat(
            nix::fcntl::AT_FDCWD,
            &path,
            Some((header.uid()? as u32).into()),
            Some((header.gid()? as u32).into()),
            nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(header.mode()? & 0o7777))?;
    }
    Ok(())
}

/// The entry's path below the layer; `None` for the layer itself.
///
/// # Errors
/// A path that climbs out of the layer is refused rather than cut.
fn safe(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::other(format!("entry {} leads out of the layer", path.display())));
            }
        }
    }
    Ok((!out.as_os_str().is_empty()).then_some(out))
}

/// Makes the directories of `relative` below `target` without following a symbolic link that the layer put there.
fn make_dirs(target: &Path, relative: &Path) -> io::Result<()> {
    let mut path = target.to_path_buf();
    for component in relative.components() {
        path.push(component);
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => {}
            Ok(meta) if meta.is_symlink() => {
                return Err(io::Error::other(format!("entry {} passes through a symbolic link", relative.display())));
            }
            Ok(_) => {
                fs::remove_file(&path)?;
                fs::create_dir(&path)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => fs::create_dir(&path)?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn remove_existing(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn whiteout(target: &Path, relative: &Path, hidden: &[u8]) -> io::Result<()> {
    let parent = relative.parent().unwrap_or(Path::new(""));
    make_dirs(target, parent)?;
    if hidden == b".wh..opq" {
        return set_attribute(&target.join(parent), c"trusted.overlay.opaque", b"y");
    }
    if hidden.is_empty() || hidden == b"." || hidden == b".." || hidden.starts_with(b".wh.") {
        return Ok(());
    }
    let path = target.join(parent).join(std::ffi::OsStr::from_bytes(hidden));
    remove_existing(&path)?;
    mknod(&path, libc::S_IFCHR, 0)
}

fn special(target: &Path, relative: &Path, header: &tar::Header) -> io::Result<()> {
    if let Some(parent) = relative.parent() {
        make_dirs(target, parent)?;
    }
    let path = target.join(relative);
    remove_existing(&path)?;
    let kind = match header.entry_type() {
        tar::EntryType::Char => libc::S_IFCHR,
        tar::EntryType::Block => libc::S_IFBLK,
        _ => libc::S_IFIFO,
    };
    let device = libc::makedev(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
    mknod(&path, kind | (header.mode()? & 0o7777), device)?;
    nix::unistd::fchownat(
        nix::fcntl::AT_FDCWD,
        &path,
        Some((header.uid()? as u32).into()),
        Some((header.gid()? as u32).into()),
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    Ok(())
}

fn mknod(path: &Path, mode: libc::mode_t, device: libc::dev_t) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a valid NUL-terminated path.
    match unsafe { libc::mknod(path.as_ptr(), mode, device) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_attribute(path: &Path, name: &std::ffi::CStr, value: &[u8]) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: valid NUL-terminated strings and a buffer of the given length.
    match unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    fn tar_of(build: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        build(&mut builder);
        builder.into_inner().unwrap()
    }

    fn file(builder: &mut tar::Builder<Vec<u8>>, path: &str, content: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        // Written past the builder's own checks, as a hostile archive would.
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }

    fn link(builder: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, path: &str, to: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        builder.append_link(&mut header, path, to).unwrap();
    }

    fn unpacked(bytes: &[u8]) -> (tempfile_dir::Dir, io::Result<()>) {
        let dir = tempfile_dir::Dir::new("layer");
        let result = unpack_tar(&mut &bytes[..], &dir.0.join("layer-root").tap_create());
        (dir, result)
    }

    /// A directory that is removed on drop.
    mod tempfile_dir {
        use std::path::PathBuf;
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        pub struct Dir(pub PathBuf);
        impl Dir {
            pub fn new(name: &str) -> Dir {
                let n = NEXT.fetch_add(1, Ordering::Relaxed);
                let path = std::env::temp_dir().join(format!("portolan-{name}-{}-{n}", std::process::id()));
                std::fs::create_dir_all(&path).unwrap();
                Dir(path)
            }
        }
        impl Drop for Dir {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }

    trait TapCreate {
        fn tap_create(self) -> Self;
    }
    impl TapCreate for PathBuf {
        fn tap_create(self) -> PathBuf {
            fs::create_dir_all(&self).unwrap();
            self
        }
    }

    #[test]
    fn whiteouts_become_what_overlayfs_reads() {
        let bytes = tar_of(|b| {
            file(b, "etc/.wh.passwd", "");
            file(b, "var/.wh..wh..opq", "");
            file(b, "etc/hosts", "x");
        });
        let (dir, result) = unpacked(&bytes);
        result.unwrap();
        let root = dir.0.join("layer-root");
        let gone = fs::symlink_metadata(root.join("etc/passwd")).unwrap();
        assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
        let hosts = fs::metadata(root.join("etc/hosts")).unwrap();
        assert_eq!((hosts.uid(), hosts.gid(), hosts.mode() & 0o777), (7, 8, 0o640));
        let mut value = [0u8; 4];
        let path = CString::new(root.join("var").as_os_str().as_bytes()).unwrap();
        // SAFETY: valid strings and a buffer of the given length.
        let n =
            unsafe { libc::lgetxattr(path.as_ptr(), c"trusted.overlay.opaque".as_ptr(), value.as_mut_ptr().cast(), 4) };
        assert_eq!(&value[..n as usize], b"y");
    }

    #[test]
    fn nothing_is_written_outside_the_layer() {
        let hostile: &[(&str, Vec<u8>)] = &[
            ("parent", tar_of(|b| file(b, "../evil", "x"))),
            ("inner parent", tar_of(|b| file(b, "a/../../evil", "x"))),
            (
                "through a link",
                tar_of(|b| {
                    link(b, tar::EntryType::Symlink, "out", "..");
                    file(b, "out/evil", "x");
                }),
            ),
            (
                "whiteout through a link",
                tar_of(|b| {
                    link(b, tar::EntryType::Symlink, "out", "..");
                    file(b, "out/.wh.evil", "");
                }),
            ),
            ("hard link out", tar_of(|b| link(b, tar::EntryType::Link, "evil", "../../../../../../etc/passwd"))),
        ];
        for (name, bytes) in hostile {
            let (dir, result) = unpacked(bytes);
            assert!(result.is_err(), "{name} was accepted");
            assert!(!dir.0.join("evil").exists(), "{name} wrote outside");
        }
        let (dir, result) = unpacked(&tar_of(|b| file(b, "/abs", "x")));
        result.unwrap();
        assert!(dir.0.join("layer-root/abs").exists(), "an absolute path is taken below the root");
    }

    #[test]
    fn a_layer_with_the_wrong_digest_is_not_stored() {
        let dir = tempfile_dir::Dir::new("digest");
        fs::create_dir_all(dir.0.join("layers")).unwrap();
        let bytes = tar_of(|b| file(b, "a", "x"));
        let wrong = format!("sha256:{}", "0".repeat(64));
        let content = bytes.clone();
        assert!(unpack(&dir.0, &wrong, move || Ok(Box::new(io::Cursor::new(content)))).is_err());
        assert_eq!(fs::read_dir(dir.0.join("layers")).unwrap().count(), 0);
        let right = Hashing::new(&bytes[..]).finish().unwrap();
        let (name, _) = unpack(&dir.0, &right, move || Ok(Box::new(io::Cursor::new(bytes)))).unwrap();
        assert!(dir.0.join("layers").join(name).join("a").exists());
        assert_eq!(fs::read_dir(dir.0.join("tmp")).unwrap().count(), 0, "staging is empty");
    }
}
