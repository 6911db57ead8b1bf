//! Writes the OCI runtime configuration of a container (`config.json`).
//!
//! Source: OCI runtime specification 1.0.2; the default capabilities, masked and read-only paths are those that container
//! runtimes give to Kubernetes pods. Input is what the pod worker has already resolved; nothing is looked up here.

use std::path::PathBuf;

use k8s_openapi::api::core::v1::{PodSecurityContext, SecurityContext};
use serde_json::{Value, json};

/// A bind mount into a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// The file or directory outside.
    pub source: PathBuf,
    /// Where it appears inside; absolute.
    pub destination: PathBuf,
    /// Whether the container may write to it.
    pub writable: bool,
    /// Whether mounts made later outside show inside (`HostToContainer`) or also the other way (`Bidirectional`).
    pub propagation: Propagation,
}

/// `mountPropagation` of a volume mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    /// Later mounts are not seen on the other side.
    #[default]
    None,
    /// Later mounts outside are seen inside.
    HostToContainer,
    /// Later mounts are seen on both sides.
    Bidirectional,
}

/// Who a process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

/// A process of a container: its main one, or one that is executed in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSpec {
    /// Program and arguments.
    pub args: Vec<String>,
    /// Environment in order.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Who it runs as.
    pub user: User,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// Capabilities, with the prefix `CAP_`, sorted.
    pub capabilities: Vec<String>,
    /// Whether it may gain privileges by running a set-user-id program.
    pub no_new_privileges: bool,
    /// `oom_score_adj` (proc(5)).
    pub oom_score_adj: i32,
}

/// Everything that decides a container's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerSpec {
    /// The main process.
    pub process: ProcessSpec,
    /// Whether the root file system cannot be written.
    pub read_only_root: bool,
    /// Whether the container may do as the host's root does.
    pub privileged: bool,
    /// The pod's network namespace.
    pub network: PathBuf,
    /// The pod's IPC namespace; `None` shares the host's.
    pub ipc: Option<PathBuf>,
    /// The pod's UTS namespace (host name); `None` shares the host's.
    pub uts: Option<PathBuf>,
    /// Whether to share the host's process ids.
    pub host_pid: bool,
    /// Bind mounts, in the order they are made.
    pub binds: Vec<Bind>,
    /// Limits, where the machine can enforce them.
    pub limits: Option<Limits>,
    /// The pod's directory for `/dev/shm`, shared by its containers.
    pub shm: Option<PathBuf>,
    /// Kernel parameters of the pod's namespaces are set with the sandbox, so none are here; this is the path in each cgroup
    /// hierarchy, given with `limits`.
    pub cgroup_path: Option<String>,
}

/// Resource limits of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory_bytes: Option<i64>,
    /// CPU time per 100 ms, in microseconds.
    pub cpu_quota_us: Option<i64>,
    /// Relative CPU weight (1024 is one CPU requested).
    pub cpu_shares: Option<u64>,
}

/// The capabilities of a container that asks for nothing: what Docker and containerd grant.
const DEFAULT_CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// All capabilities of capabilities(7), in the order of their bits.
const ALL_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The capabilities that this process can hand on. Where it runs confined itself these are not all, and containers that are
/// granted all get what there is.
pub fn held() -> Vec<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    in_mask(bounding.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(u64::MAX))
}

fn in_mask(mask: u64) -> Vec<&'static str> {
    ALL_CAPABILITIES.iter().enumerate().filter(|(bit, _)| mask & (1 << bit) != 0).map(|(_, name)| *name).collect()
}

/// The capabilities that a security context grants. Names may come with or without `CAP_`, `ALL` means all that are `held`;
/// drops are applied before adds (Kubernetes API, Capabilities).
pub fn capabilities(context: Option<&SecurityContext>, held: &[&str]) -> Result<Vec<String>, String> {
    let all = || held.iter().map(|c| c.to_string());
    if context.is_some_and(|c| c.privileged == Some(true)) {
        return Ok(all().collect());
    }
    let mut granted: std::collections::BTreeSet<String> = DEFAULT_CAPABILITIES.iter().map(|c| c.to_string()).collect();
    let wanted = context.and_then(|c| c.capabilities.as_ref());
    let full = |name: &String| {
        let upper = name.to_ascii_uppercase();
        if upper == "ALL" || upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") }
    };
    for name in wanted.and_then(|w| w.drop.as_ref()).into_iter().flatten().map(full) {
        if name == "ALL" {
            granted.clear();
        } else {
            granted.remove(&name);
        }
    }
    for name in wanted.and_then(|w| w.add.as_ref()).into_iter().flatten().map(full) {
        if name == "ALL" {
            granted.extend(all());
        } else if ALL_CAPABILITIES.contains(&name.as_str()) {
            granted.insert(name);
        } else {
            return Err(format!("unknown capability {name:?} to add"));
        }
    }
    Ok(granted.into_iter().collect())
}

/// The user that a container's process runs as.
///
/// `image_user` is the image's `User` (`name`, `uid`, `name:group`, `uid:gid`), `passwd` and `group` the text of the image's
/// `/etc/passwd` and `/etc/group`. A numeric id need not be listed.
///
/// # Errors
/// The messages are those of container status reason `CreateContainerConfigError`.
pub fn user(
    container: Option<&SecurityContext>,
    pod: Option<&PodSecurityContext>,
    image_user: &str,
    passwd: &str,
    group: &str,
) -> Result<User, String> {
    let (user_part, group_part) = match image_user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (image_user, None),
    };
    let run_as_user = container.and_then(|c| c.run_as_user).or_else(|| pod.and_then(|p| p.run_as_user));
    let run_as_group = container.and_then(|c| c.run_as_group).or_else(|| pod.and_then(|p| p.run_as_group));
    let non_root =
        container.and_then(|c| c.run_as_non_root).or_else(|| pod.and_then(|p| p.run_as_non_root)).unwrap_or(false);
    let id = |id: i64| u32::try_from(id).map_err(|_| format!("user or group id {id} is out of range"));

    let (uid, mut gid, name) = match run_as_user {
        Some(uid) => {
            let uid = id(uid)?;
            let entry = passwd_by_uid(passwd, uid);
            (uid, entry.as_ref().map_or(0, |e| e.gid), entry.map(|e| e.name))
        }
        None if user_part.is_empty() => (0, 0, Some("root".to_string())),
        None => match user_part.parse::<u32>() {
            Ok(uid) => {
                let entry = passwd_by_uid(passwd, uid);
                (uid, entry.as_ref().map_or(0, |e| e.gid), entry.map(|e| e.name))
            }
            Err(_) => {
                if non_root {
                    return Err(format!(
                        "container has runAsNonRoot and image has non-numeric user ({user_part}), cannot verify user is non-root"
                    ));
                }
                let entry = passwd_entries(passwd)
                    .find(|entry| entry.name == user_part)
                    .ok_or_else(|| format!("unable to find user {user_part}: no matching entries in passwd file"))?;
                (entry.uid, entry.gid, Some(entry.name))
            }
        },
    };
    if non_root && uid == 0 {
        return Err(match run_as_user {
            Some(_) => "container's runAsUser breaks non-root policy".to_string(),
            None => "container has runAsNonRoot and image will run as root".to_string(),
        });
    }
    if run_as_user.is_none()
        && let Some(group_part) = group_part.filter(|g| !g.is_empty())
    {
        gid = match group_part.parse() {
            Ok(gid) => gid,
            Err(_) => group_entries(group)
                .find(|(name, ..)| *name == group_part)
                .map(|(_, gid, _)| gid)
                .ok_or_else(|| format!("unable to find group {group_part}: no matching entries in group file"))?,
        };
    }
    if let Some(wanted) = run_as_group {
        gid = id(wanted)?;
    }
    let mut groups: std::collections::BTreeSet<u32> = std::collections::BTreeSet::new();
    let strict = pod.and_then(|p| p.supplemental_groups_policy.as_deref()) == Some("Strict");
    if let Some(name) = name.filter(|_| !strict) {
        groups.extend(
            group_entries(group).filter(|(_, _, members)| members.split(',').any(|m| m == name)).map(|(_, gid, _)| gid),
        );
    }
    for extra in pod.and_then(|p| p.supplemental_groups.as_ref()).into_iter().flatten() {
        groups.insert(id(*extra)?);
    }
    if let Some(fs_group) = pod.and_then(|p| p.fs_group) {
        groups.insert(id(fs_group)?);
    }
    groups.insert(gid);
    Ok(User { uid, gid, groups: groups.into_iter().collect() })
}

struct Passwd {
    name: String,
    uid: u32,
    gid: u32,
}

fn passwd_entries(text: &str) -> impl Iterator<Item = Passwd> + '_ {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_string();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Passwd { name, uid, gid })
    })
}

fn passwd_by_uid(text: &str, uid: u32) -> Option<Passwd> {
    passwd_entries(text).find(|entry| entry.uid == uid)
}

fn group_entries(text: &str) -> impl Iterator<Item = (&str, u32, &str)> + '_ {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

/// The `process` object, also used for commands that are executed in a running container.
pub fn process(spec: &ProcessSpec) -> Value {
    let env: Vec<String> = spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let caps = &spec.capabilities;
    // A process that is not root keeps capabilities only through its bounding set and what its program file grants.
    let effective: &[String] = if spec.user.uid == 0 { caps } else { &[] };
    json!({
        "terminal": spec.terminal,
        "user": {"uid": spec.user.uid, "gid": spec.user.gid, "additionalGids": spec.user.groups},
        "args": spec.args,
        "env": env,
        "cwd": spec.cwd,
        "capabilities": {"bounding": caps, "effective": effective, "permitted": effective, "inheritable": [], "ambient": []},
        "noNewPrivileges": spec.no_new_privileges,
        "oomScoreAdj": spec.oom_score_adj,
    })
}

/// The whole `config.json`; the root file system is the directory `rootfs` of the bundle.
pub fn config(spec: &ContainerSpec) -> Value {
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "network", "path": spec.network})];
    for (kind, path) in [("ipc", &spec.ipc), ("uts", &spec.uts)] {
        if let Some(path) = path {
            namespaces.push(json!({"type": kind, "path": path}));
        }
    }
    if !spec.host_pid {
        namespaces.push(json!({"type": "pid"}));
    }
    let sys_options =
        if spec.privileged { vec!["nosuid", "noexec", "nodev"] } else { vec!["nosuid", "noexec", "nodev", "ro"] };
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": sys_options}),
    ];
    mounts.push(match &spec.shm {
        Some(dir) => json!({"destination": "/dev/shm", "type": "bind", "source": dir, "options": ["bind", "rw", "nosuid", "noexec", "nodev"]}),
        None => json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
    });
    mounts.extend(spec.binds.iter().map(bind));
    let mut linux = json!({ "namespaces": namespaces });
    if !spec.privileged {
        linux["maskedPaths"] = json!([
            "/proc/asound",
            "/proc/acpi",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/timer_list",
            "/proc/timer_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/sys/firmware",
            "/sys/devices/virtual/powercap"
        ]);
        linux["readonlyPaths"] = json!(["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]);
    }
    if spec.binds.iter().any(|b| b.propagation == Propagation::Bidirectional) {
        linux["rootfsPropagation"] = json!("shared");
    } else if spec.binds.iter().any(|b| b.propagation == Propagation::HostToContainer) {
        linux["rootfsPropagation"] = json!("rslave");
    }
    if let (Some(limits), Some(path)) = (spec.limits, &spec.cgroup_path) {
        linux["cgroupsPath"] = json!(path);
        linux["resources"] = resources(limits);
    }
    json!({
        "ociVersion": "1.0.2",
        "process": process(&spec.process),
        "root": {"path": "rootfs", "readonly": spec.read_only_root},
        "mounts": mounts,
        "linux": linux,
    })
}

fn resources(limits: Limits) -> Value {
    let mut resources = json!({"devices": [{"allow": true, "access": "rwm"}]});
    if let Some(bytes) = limits.memory_bytes {
        resources["memory"] = json!({ "limit": bytes });
    }
    let mut cpu = serde_json::Map::new();
    if let Some(shares) = limits.cpu_shares {
        cpu.insert("shares".into(), json!(shares));
    }
    if let Some(quota) = limits.cpu_quota_us {
        cpu.insert("quota".into(), json!(quota));
        cpu.insert("period".into(), json!(100_000));
    }
    if !cpu.is_empty() {
        resources["cpu"] = Value::Object(cpu);
    }
    resources
}

fn bind(bind: &Bind) -> Value {
    let mut options = vec!["rbind", if bind.writable { "rw" } else { "ro" }];
    options.push(match bind.propagation {
        Propagation::None => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    });
    json!({"destination": bind.destination, "type": "bind", "source": bind.source, "options": options})
}

/// The program and arguments of a container: `command` replaces the image's entry point and its default arguments, `args`
/// replaces only the arguments (Kubernetes API, Container.command and .args).
pub fn command_line(
    command: Option<&[String]>,
    args: Option<&[String]>,
    entrypoint: &[String],
    image_args: &[String],
) -> Option<Vec<String>> {
    let command = command.filter(|c| !c.is_empty());
    let args = args.filter(|a| !a.is_empty());
    let line: Vec<String> = match (command, args) {
        (Some(command), args) => command.iter().chain(args.into_iter().flatten()).cloned().collect(),
        (None, Some(args)) => entrypoint.iter().chain(args).cloned().collect(),
        (None, None) => entrypoint.iter().chain(image_args).cloned().collect(),
    };
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Capabilities;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn command_and_args_replace_the_image_s() {
        let entry = strings(&["/ep"]);
        let cmd = strings(&["a"]);
        type Row<'a> = (&'a str, Option<&'a [&'a str]>, Option<&'a [&'a str]>, &'a [&'a str]);
        let rows: &[Row<'_>] = &[
            ("neither given", None, None, &["/ep", "a"]),
            ("command drops the image's arguments", Some(&["x"]), None, &["x"]),
            ("args keep the entry point", None, Some(&["b"]), &["/ep", "b"]),
            ("both", Some(&["x"]), Some(&["b"]), &["x", "b"]),
            ("an empty command is as none", Some(&[]), Some(&["b"]), &["/ep", "b"]),
        ];
        for (name, command, args, expected) in rows {
            let got = command_line(command.map(strings).as_deref(), args.map(strings).as_deref(), &entry, &cmd);
            assert_eq!(got.unwrap(), strings(expected), "{name}");
        }
        assert_eq!(command_line(None, None, &[], &[]), None);
    }

    #[test]
    fn drops_come_before_adds() {
        let context = |add: &[&str], drop: &[&str]| SecurityContext {
            capabilities: Some(Capabilities { add: Some(strings(add)), drop: Some(strings(drop)) }),
            ..Default::default()
        };
        assert_eq!(
            capabilities(Some(&context(&["NET_ADMIN"], &["ALL"])), ALL_CAPABILITIES).unwrap(),
            ["CAP_NET_ADMIN"]
        );
        assert_eq!(capabilities(None, ALL_CAPABILITIES).unwrap().len(), 14);
        assert!(
            !capabilities(Some(&context(&[], &["net_raw"])), ALL_CAPABILITIES)
                .unwrap()
                .contains(&"CAP_NET_RAW".to_string())
        );
        assert!(capabilities(Some(&context(&["FLY"], &[])), ALL_CAPABILITIES).is_err());
        let privileged = SecurityContext { privileged: Some(true), ..Default::default() };
        let held = in_mask(!(1 << 24));
        assert_eq!(held.len(), ALL_CAPABILITIES.len() - 1);
        for all in [privileged, context(&["ALL"], &[])] {
            let granted = capabilities(Some(&all), &held).unwrap();
            assert_eq!(granted.len(), held.len());
            assert!(!granted.contains(&"CAP_SYS_RESOURCE".to_string()));
        }
    }

    #[test]
    fn users_come_from_contexts_then_the_image() {
        let passwd = "root:x:0:0:root:/:/bin/sh\nweb:x:33:34::/:/bin/false\n";
        let group = "root:x:0:\nweb:x:34:\nlog:x:40:web,other\n";
        let none = None;
        let get = |c: Option<SecurityContext>, p: Option<PodSecurityContext>, image: &str| {
            user(c.as_ref(), p.as_ref(), image, passwd, group)
        };
        assert_eq!(get(none.clone(), None, "").unwrap(), User { uid: 0, gid: 0, groups: vec![0] });
        assert_eq!(get(none.clone(), None, "web").unwrap(), User { uid: 33, gid: 34, groups: vec![34, 40] });
        assert_eq!(get(none.clone(), None, "33:log").unwrap(), User { uid: 33, gid: 40, groups: vec![40] });
        assert!(get(none.clone(), None, "nobody").unwrap_err().contains("no matching entries"));
        let as_user = SecurityContext { run_as_user: Some(1000), run_as_group: Some(3000), ..Default::default() };
        let pod = PodSecurityContext { fs_group: Some(2000), run_as_user: Some(7), ..Default::default() };
        assert_eq!(
            get(Some(as_user), Some(pod), "web").unwrap(),
            User { uid: 1000, gid: 3000, groups: vec![2000, 3000] }
        );
        let non_root = SecurityContext { run_as_non_root: Some(true), ..Default::default() };
        assert_eq!(
            get(Some(non_root.clone()), None, "").unwrap_err(),
            "container has runAsNonRoot and image will run as root"
        );
        assert!(get(Some(non_root), None, "web").unwrap_err().contains("non-numeric user (web)"));
    }
}
