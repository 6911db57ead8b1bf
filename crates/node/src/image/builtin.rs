//! The images that need no registry: they are made of the running program and of the host's own files.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::{Image, ImageConfig, ImageError, ImageSummary, Reference, file_error};
use crate::names::hex;
use crate::oci::{Bind, Propagation};

const ECHO: &str = "portolan.dev/echo";
const PORTOLAN: &str = "portolan.dev/portolan";
const TOOLBOX: &str = "portolan.dev/toolbox";
const NAMES: [&str; 3] = [ECHO, PORTOLAN, TOOLBOX];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Host files that the toolbox's programs look for, besides /usr.
const TOOLBOX_FILES: &[&str] = &[
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/terminfo",
];

/// Makes the built-in images when they are first asked for.
#[derive(Debug)]
pub(super) struct Builtin {
    dir: PathBuf,
    program: PathBuf,
    made: Mutex<Vec<Image>>,
}

impl Builtin {
    pub(super) fn new(dir: PathBuf, program: PathBuf) -> Builtin {
        Builtin { dir, program, made: Mutex::default() }
    }

    /// The name of a built-in image, if `reference` is one: without a tag, with `latest` or with this program's version.
    fn name(reference: &Reference) -> Option<&'static str> {
        let name = NAMES.into_iter().find(|name| *name == reference.name())?;
        let tags = ["latest", env!("CARGO_PKG_VERSION")].map(|tag| format!("{name}:{tag}"));
        tags.contains(&reference.to_string()).then_some(name)
    }

    /// Whether `reference` names a built-in image.
    pub(super) fn is(&self, reference: &Reference) -> bool {
        Builtin::name(reference).is_some()
    }

    /// The image, if `reference` names a built-in one.
    pub(super) fn find(&self, reference: &Reference) -> Result<Option<Image>, ImageError> {
        let Some(name) = Builtin::name(reference) else { return Ok(None) };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let normal = format!("{name}:latest");
        if let Some(image) = made.iter().find(|image| image.reference == normal) {
            return Ok(Some(image.clone()));
        }
        let image = self.make(name, normal)?;
        made.push(image.clone());
        Ok(Some(image))
    }

    pub(super) fn list(&self) -> Vec<ImageSummary> {
        NAMES
            .into_iter()
            .map(|name| {
                let references = vec![format!("{name}:latest")];
                let found = Reference::parse(name).ok().and_then(|r| self.find(&r).ok().flatten());
                let (id, size_bytes) = found.map_or((String::new(), 0), |image| (image.id, image.size_bytes));
                ImageSummary { references, id, size_bytes, built_in: true }
            })
            .collect()
    }

    fn make(&self, name: &'static str, reference: String) -> Result<Image, ImageError> {
        let unavailable = |reason: String| ImageError::Builtin { name, reason };
        let strings = |list: &[&str]| list.iter().map(|s| s.to_string()).collect();
        let (root, config) = if name == TOOLBOX {
            let config = ImageConfig {
                cmd: strings(&["/bin/sh"]),
                env: strings(&[PATH, "LANG=C.UTF-8", "HOME=/root"]),
                ..ImageConfig::default()
            };
            (toolbox_root().map_err(|e| unavailable(e.to_string()))?, config)
        } else {
            let entrypoint =
                if name == ECHO { strings(&["/bin/portolan", "echo"]) } else { strings(&["/bin/portolan"]) };
            let config = ImageConfig { entrypoint, env: strings(&[PATH, "HOME=/"]), ..ImageConfig::default() };
            (program_root(&self.program).map_err(|e| unavailable(e.to_string()))?, config)
        };
        let digest = hex(&Sha256::digest(format!("{name}\n{root:?}\n{config:?}")));
        let layer = self.dir.join(&digest[..24]);
        if !layer.exists() {
            let staging = self.dir.join(format!("{}.{}", &digest[..24], uuid::Uuid::new_v4().simple()));
            root.write(&staging).map_err(file_error("make", &staging))?;
            match fs::rename(&staging, &layer) {
                Err(_) if layer.exists() => fs::remove_dir_all(&staging).map_err(file_error("remove", &staging))?,
                other => other.map_err(file_error("make", &layer))?,
            }
        }
        let size_bytes = root
            .binds
            .iter()
            .filter_map(|b| fs::metadata(&b.source).ok())
            .filter(|m| m.is_file())
            .map(|m| m.len())
            .sum();
        Ok(Image {
            id: format!("sha256:{digest}"),
            reference,
            layers: vec![layer],
            config,
            binds: root.binds,
            wants_identity: name == ECHO,
            from_registry: false,
            digest: None,
            size_bytes,
        })
    }
}

/// A minimal root file system: directories, links, small files and places for host files to be mounted on.
#[derive(Debug, Default)]
struct Root {
    dirs: Vec<(PathBuf, u32)>,
    links: Vec<(PathBuf, PathBuf)>,
    files: Vec<(PathBuf, String)>,
    binds: Vec<Bind>,
}

impl Root {
    fn minimal() -> Root {
        let mut root = Root::default();
        for dir in ["proc", "sys", "dev", "etc", "run", "var", "home"] {
            root.dirs.push((dir.into(), 0o755));
        }
        root.dirs.push(("root".into(), 0o700));
        for dir in ["tmp", "var/tmp"] {
            root.dirs.push((dir.into(), 0o1777));
        }
        root.files.push((
            "etc/passwd".into(),
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n".into(),
        ));
        root.files.push(("etc/group".into(), "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n".into()));
        root.files.push(("etc/nsswitch.conf".into(), "passwd: files\ngroup: files\nhosts: files dns\n".into()));
        root
    }

    fn bind(&mut self, source: PathBuf, destination: &Path) {
        self.binds.push(Bind {
            source,
            destination: destination.to_path_buf(),
            writable: false,
            propagation: Propagation::None,
        });
    }

    fn write(&self, target: &Path) -> io::Result<()> {
        fs::create_dir_all(target)?;
        fs::set_permissions(target, PermissionsExt::from_mode(0o755))?;
        let inside = |path: &Path| target.join(path.strip_prefix("/").unwrap_or(path));
        for (dir, mode) in &self.dirs {
            let dir = inside(dir);
            fs::create_dir_all(&dir)?;
            fs::set_permissions(&dir, PermissionsExt::from_mode(*mode))?;
        }
        for (link, to) in &self.links {
            symlink(to, inside(link))?;
        }
        for (file, content) in &self.files {
            fs::write(inside(file), content)?;
        }
        for bind in &self.binds {
            let place = inside(&bind.destination);
            if fs::metadata(&bind.source)?.is_dir() {
                fs::create_dir_all(place)?;
            } else {
                if let Some(parent) = place.parent() {
                    fs::create_dir_all(parent)?;
                }
                fs::write(place, "")?;
            }
        }
        Ok(())
    }
}

/// The program with the libraries that its loader finds for it.
fn program_root(program: &Path) -> io::Result<Root> {
    let mut root = Root::minimal();
    let found = fs::canonicalize(program)
        .map_err(|e| io::Error::new(e.kind(), format!("program {} cannot be read ({e})", program.display())))?;
    root.bind(found, Path::new("/bin/portolan"));
    if let Some(loader) = interpreter(program)? {
        root.bind(fs::canonicalize(&loader)?, &loader);
        for library in libraries(&loader, program)? {
            root.bind(fs::canonicalize(&library)?, &library);
        }
    }
    // Roots of trust, for pods that speak TLS to the outside.
    for file in ["/etc/ssl/certs/ca-certificates.crt"] {
        if let Ok(source) = fs::canonicalize(file) {
            root.bind(source, Path::new(file));
        }
    }
    Ok(root)
}

/// The loader that an ELF program asks for (PT_INTERP; elf(5)); `None` for a static program.
fn interpreter(program: &Path) -> io::Result<Option<PathBuf>> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::FileExt;
    let bad = || io::Error::other(format!("{} is not a 64-bit little-endian ELF program", program.display()));
    let file = fs::File::open(program)?;
    let mut head = [0u8; 64];
    file.read_exact_at(&mut head, 0)?;
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return Err(bad());
    }
    let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let long = |bytes: &[u8], at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).map_err(|_| bad());
    let table = long(&head, 32)?;
    let (size, count) = (usize::from(word(&head, 54)), u64::from(word(&head, 56)));
    if size < 56 {
        return Err(bad());
    }
    for i in 0..count {
        let mut entry = vec![0u8; size];
        file.read_exact_at(&mut entry, table + i * size as u64)?;
        const PT_INTERP: u8 = 3;
        if entry[0] == PT_INTERP && entry[1..4] == [0, 0, 0] {
            let length = long(&entry, 32)?;
            let mut path = vec![0u8; usize::try_from(length.min(4096)).map_err(|_| bad())?];
            file.read_exact_at(&mut path, long(&entry, 8)?)?;
            while path.last() == Some(&0) {
                path.pop();
            }
            return Ok(Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path))));
        }
    }
    Ok(None)
}

/// What the loader would map for the program, as its `--list` prints: `libm.so.6 => /lib/…/libm.so.6 (0x…)`.
fn libraries(loader: &Path, program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new(loader).arg("--list").arg(program).output()?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(io::Error::other(format!("cannot list the libraries of {}: {reason}", program.display())));
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(listed_libraries(&text).into_iter().filter(|path| path != loader).collect())
}

fn listed_libraries(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split_once("=>").map(|(_, found)| found.trim()))
        .filter_map(|found| found.split(" (").next())
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

/// The host's programs, read-only, with as little of its /etc as they need.
fn toolbox_root() -> io::Result<Root> {
    let mut root = Root::minimal();
    root.bind("/usr".into(), Path::new("/usr"));
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let host = Path::new("/").join(name);
        match fs::symlink_metadata(&host) {
            Ok(meta) if meta.is_symlink() => root.links.push((name.into(), fs::read_link(&host)?)),
            Ok(_) => root.bind(host.clone(), &host),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    for file in TOOLBOX_FILES {
        if let Ok(source) = fs::canonicalize(file) {
            root.bind(source, Path::new(file));
        }
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_s_list_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007fff)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(listed_libraries(text), [PathBuf::from("/lib/x86_64-linux-gnu/libm.so.6")]);
    }

    #[test]
    fn a_dynamic_program_names_its_loader_and_a_script_is_refused() {
        let exe = std::env::current_exe().unwrap();
        if let Some(loader) = interpreter(&exe).unwrap() {
            assert!(loader.exists());
            assert!(!libraries(&loader, &exe).unwrap().is_empty());
        }
        assert!(interpreter(Path::new("/etc/passwd")).is_err());
    }
}
