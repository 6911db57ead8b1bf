//! Named network namespaces.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, held open by a descriptor.
///
/// Cloning is cheap. Dropping the last clone closes the descriptor; a namespace made by [`Netns::create`] lives on
/// through its bind mount until [`Netns::delete`].
#[derive(Clone, Debug)]
pub struct Netns {
    path: PathBuf,
    fd: Arc<OwnedFd>,
}

impl Netns {
    /// Makes a new namespace and names it by a bind mount at `path`; the loopback link is down.
    ///
    /// # Errors
    /// Fails without CAP_SYS_ADMIN, or when `path` cannot be created or is a namespace already.
    pub fn create(path: impl Into<PathBuf>) -> io::Result<Netns> {
        let path = path.into();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        if is_mount_point(&path)? {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} is mounted already", path.display())));
        }
        fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
        let target = path.clone();
        // A thread of its own: unshare changes the calling thread only, and the thread ends with the namespace named.
        on_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        })?;
        Netns::open(path)
    }

    /// Opens the namespace named by `path` (a bind mount, or a file like `/proc/PID/ns/net`).
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Netns> {
        let path = path.into();
        let fd = File::open(&path)
            .map_err(|e| io::Error::new(e.kind(), format!("cannot open network namespace {}: {e}", path.display())))?;
        Ok(Netns { path, fd: Arc::new(fd.into()) })
    }

    /// The namespace that this process runs in.
    pub fn current() -> io::Result<Netns> {
        Netns::open("/proc/self/ns/net")
    }

    /// Opens `path`, or makes it when there is no such namespace.
    pub fn open_or_create(path: impl Into<PathBuf>) -> io::Result<Netns> {
        let path = path.into();
        if is_mount_point(&path)? { Netns::open(path) } else { Netns::create(path) }
    }

    /// Removes the name; the namespace goes when its last process and descriptor are gone. Not being there is no error.
    pub fn delete(path: impl AsRef<Path>) -> io::Result<()> {
        let path = path.as_ref();
        while is_mount_point(path)? {
            umount2(path, MntFlags::MNT_DETACH)?;
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The path that this namespace was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a short-lived thread inside the namespace and returns its result.
    ///
    /// Meant for making sockets and reading or writing `/proc/sys/net`; must not block for long, because the caller waits.
    ///
    /// # Errors
    /// Fails when the thread cannot be made or the namespace cannot be entered; a panic in `work` is passed on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let fd = self.fd.as_fd();
        std::thread::scope(|scope| {
            let handle = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, move || {
                setns(fd, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            match handle.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Moves the calling thread into the namespace for good. For a child process before `exec`, or a thread that ends there.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// Whether something is mounted exactly at `path`; a missing path is not a mount point.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(mount_points()?.iter().any(|m| m == path))
}

/// Unmounts everything mounted at or below `dir`, deepest first. Lazily, so that a busy mount does not stay in the tree.
pub fn unmount_all_under(dir: &Path) -> io::Result<()> {
    let mut points: Vec<PathBuf> = mount_points()?.into_iter().filter(|m| m.starts_with(dir)).collect();
    points.sort();
    for point in points.into_iter().rev() {
        umount2(&point, MntFlags::MNT_DETACH)
            .map_err(|e| io::Error::other(format!("cannot unmount {}: {e}", point.display())))?;
    }
    Ok(())
}

fn mount_points() -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).collect())
}

/// Decodes the octal escapes of mountinfo (space, tab, newline, backslash; proc(5)).
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'\\'
            && let Some(code) = field.get(i + 1..i + 4).and_then(|o| u8::from_str_radix(o, 8).ok())
        {
            out.push(code);
            i += 4;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(out))
}

fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        match std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_made_entered_and_removed() {
        let dir = std::env::temp_dir().join(format!("portolan-netns-{}", std::process::id()));
        let path = dir.join("a b");
        let ns = Netns::create(&path).expect("needs root");
        assert!(is_mount_point(&path).unwrap());
        assert!(Netns::create(&path).is_err(), "a name is used once");
        let links = ns.run(|| fs::read_to_string("/proc/thread-self/net/dev")).unwrap().unwrap();
        assert_eq!(links.lines().count(), 3, "two header lines and lo: {links}");
        Netns::delete(&path).unwrap();
        Netns::delete(&path).unwrap();
        assert!(!path.exists());
        fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn mount_paths_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
    }
}
