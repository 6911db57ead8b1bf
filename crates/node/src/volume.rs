//! Makes the volumes of a pod: directories that containers get as bind mounts.
//!
//! ConfigMap, Secret, downward API and projected volumes are written the way the kubelet does it: files in a directory of
//! their own, reached through the link `..data` that is replaced in one step, so a reader sees old or new but never a mixture.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, HostPathVolumeSource, KeyToPath, ObjectFieldSelector, Pod, Secret, Volume,
    VolumeProjection,
};
use nix::mount::{MsFlags, mount};

use crate::api::{LookupError, NodeApi};
use crate::runtime::{remove_dir, unmount};

/// How often content that may change is read again (the kubelet's sync period is about a minute).
const REFRESH: Duration = Duration::from_secs(60);
/// Default lifetime of a projected token, in seconds (Kubernetes API, ServiceAccountTokenProjection).
const TOKEN_SECONDS: i64 = 3600;

/// A file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileContent {
    data: Vec<u8>,
    mode: u32,
}

type Files = BTreeMap<PathBuf, FileContent>;

/// What a pod's volumes need besides the pod.
pub(crate) struct VolumeContext<'a> {
    pub api: &'a dyn NodeApi,
    pub pod: &'a Pod,
    /// The directory that volumes are made in.
    pub dir: &'a Path,
    pub host_ip: String,
    pub pod_ip: Option<String>,
    /// For `limits.cpu` and the like where a container sets none.
    pub node_cpus: u64,
    pub node_memory: u64,
}

/// Volumes that are ready.
#[derive(Clone, Debug, Default)]
pub(crate) struct Volumes {
    /// Directory or file by volume name.
    pub paths: BTreeMap<String, PathBuf>,
    /// When content should be read again.
    pub refresh_at: Option<Timestamp>,
}

/// Makes or refreshes all volumes of a pod.
///
/// # Errors
/// Gives the texts of the events `FailedMount`, one for each volume that cannot be had.
pub(crate) async fn prepare(context: &VolumeContext<'_>, now: Timestamp) -> Result<Volumes, Vec<String>> {
    let mut volumes = Volumes::default();
    let mut failures = Vec::new();
    for volume in context.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        match prepare_one(context, volume, now).await {
            Ok((path, refresh_at)) => {
                volumes.paths.insert(volume.name.clone(), path);
                if let Some(at) = refresh_at {
                    volumes.refresh_at = Some(volumes.refresh_at.map_or(at, |old| old.min(at)));
                }
            }
            Err(reason) => failures.push(format!("MountVolume.SetUp failed for volume \"{}\" : {reason}", volume.name)),
        }
    }
    if failures.is_empty() { Ok(volumes) } else { Err(failures) }
}

async fn prepare_one(
    context: &VolumeContext<'_>,
    volume: &Volume,
    now: Timestamp,
) -> Result<(PathBuf, Option<Timestamp>), String> {
    let dir = context.dir.join(&volume.name);
    if let Some(source) = &volume.host_path {
        return host_path(source).map(|path| (path, None));
    }
    if let Some(source) = &volume.empty_dir {
        let memory = match source.medium.as_deref() {
            None | Some("") => false,
            Some("Memory") => true,
            Some(other) => return Err(format!("unknown storage medium {other:?}")),
        };
        let limit = source.size_limit.as_ref().map(|q| q.0.as_str());
        empty_dir(&dir, memory, limit).map_err(|e| e.to_string())?;
        own_by_group(context.pod, &dir)?;
        return Ok((dir, None));
    }
    let mut files = Files::new();
    let mut refresh = Some(now.saturating_add(signed(REFRESH)).unwrap_or(now));
    if let Some(source) = &volume.config_map {
        let mode = mode(source.default_mode)?;
        config_map_files(context, &source.name, source.optional, source.items.as_deref(), mode, &mut files).await?;
    } else if let Some(source) = &volume.secret {
        let mode = mode(source.default_mode)?;
        let name = source.secret_name.clone().unwrap_or_default();
        secret_files(context, &name, source.optional, source.items.as_deref(), mode, &mut files).await?;
    } else if let Some(source) = &volume.downward_api {
        let mode = mode(source.default_mode)?;
        downward_files(context, source.items.as_deref().unwrap_or_default(), mode, &mut files)?;
    } else if let Some(source) = &volume.projected {
        let default = mode(source.default_mode)?;
        let mut token_ends = None;
        for projection in source.sources.iter().flatten() {
            projected(context, projection, default, now, &mut files, &mut token_ends).await?;
        }
        // The volume that is added to every pod holds nothing that changes but its token.
        if let Some(at) = token_ends
            && (volume.name.starts_with("kube-api-access-") || refresh.is_none_or(|r| at < r))
        {
            refresh = Some(at);
        }
    } else {
        return Err(format!("volume type {} is not supported by this node", volume_type(volume)));
    }
    write_files(&dir, &files).map_err(|e| e.to_string())?;
    own_by_group(context.pod, &dir)?;
    Ok((dir, refresh))
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// The field of the API that says which kind of volume it is.
fn volume_type(volume: &Volume) -> String {
    let value = serde_json::to_value(volume).unwrap_or_default();
    let mut fields = value.as_object().into_iter().flat_map(|fields| fields.keys());
    fields.find(|name| *name != "name").cloned().unwrap_or_else(|| "(none)".to_string())
}

fn mode(mode: Option<i32>) -> Result<u32, String> {
    u32::try_from(mode.unwrap_or(0o644))
        .ok()
        .filter(|m| *m <= 0o777)
        .ok_or_else(|| "mode must be between 0 and 0777".to_string())
}

fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, String> {
    use std::os::unix::fs::FileTypeExt;
    let path = PathBuf::from(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let meta = fs::metadata(&path);
    match kind {
        "DirectoryOrCreate" if meta.is_err() => fs::create_dir_all(&path).map_err(|e| e.to_string())?,
        "FileOrCreate" if meta.is_err() => fs::write(&path, "").map_err(|e| e.to_string())?,
        // A runtime makes a missing path a directory when no type is asked for.
        "" if meta.is_err() => fs::create_dir_all(&path).map_err(|e| e.to_string())?,
        _ => {}
    }
    let found = fs::metadata(&path).map(|m| m.file_type());
    let fits = match (kind, &found) {
        (_, Err(_)) => false,
        ("", Ok(_)) => true,
        ("Directory" | "DirectoryOrCreate", Ok(t)) => t.is_dir(),
        ("File" | "FileOrCreate", Ok(t)) => t.is_file(),
        ("Socket", Ok(t)) => t.is_socket(),
        ("CharDevice", Ok(t)) => t.is_char_device(),
        ("BlockDevice", Ok(t)) => t.is_block_device(),
        (other, Ok(_)) => return Err(format!("hostPath type {other:?} is unknown")),
    };
    let what = match kind {
        "Directory" | "DirectoryOrCreate" => "a directory",
        "File" | "FileOrCreate" => "a file",
        "Socket" => "a socket file",
        "CharDevice" => "a character device",
        "BlockDevice" => "a block device",
        _ => "there",
    };
    if fits { Ok(path) } else { Err(format!("hostPath type check failed: {} is not {what}", source.path)) }
}

fn empty_dir(dir: &Path, memory: bool, limit: Option<&str>) -> io::Result<()> {
    if dir.exists() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    if memory {
        let bytes = limit.and_then(quantity_bytes);
        let options = bytes.map_or("mode=1777".to_string(), |b| format!("mode=1777,size={b}"));
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))?;
    }
    fs::set_permissions(dir, PermissionsExt::from_mode(0o777))
}

/// Bytes of a memory quantity such as `64Mi` or `1G`.
pub(crate) fn quantity_bytes(text: &str) -> Option<u64> {
    quantity(text).map(|value| value.ceil() as u64)
}

/// Thousandths of a quantity such as `500m` or `2`, for CPUs.
pub(crate) fn quantity_milli(text: &str) -> Option<u64> {
    quantity(text).map(|value| (value * 1000.0).ceil() as u64)
}

fn quantity(text: &str) -> Option<f64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '-' && c != '+').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let number: f64 = number.parse().ok().filter(|n: &f64| *n >= 0.0)?;
    let factor = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        "Ei" => 1024f64.powi(6),
        exponent => 10f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    Some(number * factor)
}

fn add(files: &mut Files, path: &str, data: Vec<u8>, mode: u32) -> Result<(), String> {
    let path = relative(path)?;
    files.insert(path, FileContent { data, mode });
    Ok(())
}

/// A path inside a volume; it may have directories but must stay inside and must not begin with `..`.
fn relative(path: &str) -> Result<PathBuf, String> {
    let candidate = Path::new(path);
    let ok = !path.is_empty()
        && candidate.components().all(|c| matches!(c, Component::Normal(_)))
        && !path.starts_with("..");
    if ok {
        Ok(candidate.to_path_buf())
    } else {
        Err(format!("invalid path: {path:?} must be relative and stay inside the volume"))
    }
}

async fn config_map_files(
    context: &VolumeContext<'_>,
    name: &str,
    optional: Option<bool>,
    items: Option<&[KeyToPath]>,
    mode: u32,
    files: &mut Files,
) -> Result<(), String> {
    let namespace = context.pod.metadata.namespace.as_deref().unwrap_or_default();
    let optional = optional == Some(true);
    let map = match context.api.config_map(namespace, name).await {
        Ok(map) => map,
        Err(LookupError::NotFound(_)) if optional => ConfigMap::default(),
        Err(LookupError::NotFound(_)) => return Err(format!("configmap \"{name}\" not found")),
        Err(LookupError::Failed(reason)) => return Err(reason),
    };
    let mut data: BTreeMap<String, Vec<u8>> =
        map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes())).collect();
    data.extend(map.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)));
    pick(data, items, mode, optional, "configmap references non-existent config key", files)
}

async fn secret_files(
    context: &VolumeContext<'_>,
    name: &str,
    optional: Option<bool>,
    items: Option<&[KeyToPath]>,
    mode: u32,
    files: &mut Files,
) -> Result<(), String> {
    let namespace = context.pod.metadata.namespace.as_deref().unwrap_or_default();
    let optional = optional == Some(true);
    let secret = match context.api.secret(namespace, name).await {
        Ok(secret) => secret,
        Err(LookupError::NotFound(_)) if optional => Secret::default(),
        Err(LookupError::NotFound(_)) => return Err(format!("secret \"{name}\" not found")),
        Err(LookupError::Failed(reason)) => return Err(reason),
    };
    let data = secret.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect();
    pick(data, items, mode, optional, "references non-existent secret key", files)
}

fn pick(
    data: BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    default: u32,
    optional: bool,
    missing: &str,
    files: &mut Files,
) -> Result<(), String> {
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        for (key, value) in data {
            add(files, &key, value, default)?;
        }
        return Ok(());
    };
    for item in items {
        match data.get(&item.key) {
            Some(value) => {
                let mode = match item.mode {
                    Some(_) => mode(item.mode)?,
                    None => default,
                };
                add(files, &item.path, value.clone(), mode)?;
            }
            None if optional => {}
            None => return Err(format!("{missing}: {}", item.key)),
        }
    }
    Ok(())
}

fn downward_files(
    context: &VolumeContext<'_>,
    items: &[DownwardAPIVolumeFile],
    default: u32,
    files: &mut Files,
) -> Result<(), String> {
    for item in items {
        let value = if let Some(field) = &item.field_ref {
            field_value(context.pod, field, &context.host_ip, context.pod_ip.as_deref())?
        } else if let Some(resource) = &item.resource_field_ref {
            let container = resource.container_name.as_deref().unwrap_or_default();
            let divisor = resource.divisor.as_ref().map(|q| q.0.as_str());
            resource_value(context.pod, container, &resource.resource, divisor, context.node_cpus, context.node_memory)?
        } else {
            return Err(format!("item {:?} has neither fieldRef nor resourceFieldRef", item.path));
        };
        let mode = match item.mode {
            Some(_) => mode(item.mode)?,
            None => default,
        };
        add(files, &item.path, value.into_bytes(), mode)?;
    }
    Ok(())
}

async fn projected(
    context: &VolumeContext<'_>,
    projection: &VolumeProjection,
    default: u32,
    now: Timestamp,
    files: &mut Files,
    token_ends: &mut Option<Timestamp>,
) -> Result<(), String> {
    if let Some(source) = &projection.config_map {
        config_map_files(context, &source.name, source.optional, source.items.as_deref(), default, files).await
    } else if let Some(source) = &projection.secret {
        secret_files(context, &source.name, source.optional, source.items.as_deref(), default, files).await
    } else if let Some(source) = &projection.downward_api {
        downward_files(context, source.items.as_deref().unwrap_or_default(), default, files)
    } else if let Some(source) = &projection.service_account_token {
        let seconds = source.expiration_seconds.unwrap_or(TOKEN_SECONDS);
        let audience = source.audience.as_deref().unwrap_or_default();
        let token = context
            .api
            .token(context.pod, audience, seconds)
            .await
            .map_err(|e| format!("failed to fetch token: {e}"))?;
        // Renewed when four fifths of its life are over, as the kubelet does.
        let life = token.expires.duration_since(now);
        let renew = now.saturating_add(life * 4 / 5).unwrap_or(token.expires);
        *token_ends = Some(token_ends.map_or(renew, |at| at.min(renew)));
        add(files, &source.path, token.token.into_bytes(), default)
    } else {
        Err("projected volume source is not supported by this node (clusterTrustBundle or podCertificate)".to_string())
    }
}

/// The value of a downward API field (Kubernetes API, ObjectFieldSelector).
pub(crate) fn field_value(
    pod: &Pod,
    field: &ObjectFieldSelector,
    host_ip: &str,
    pod_ip: Option<&str>,
) -> Result<String, String> {
    let path = field.field_path.as_str();
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((map, key)) = path.strip_suffix(']').and_then(|p| p.split_once('[')) {
        let key = key.trim_matches('\'').trim_matches('"');
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return Err(format!("unsupported fieldPath: {path}")),
        };
        return Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    let list = |map: Option<&BTreeMap<String, String>>| {
        let lines: Vec<String> = map.into_iter().flatten().map(|(k, v)| format!("{k}={}", go_quote(v))).collect();
        lines.join("\n")
    };
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => list(meta.labels.as_ref()),
        "metadata.annotations" => list(meta.annotations.as_ref()),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" | "status.hostIPs" => host_ip.to_string(),
        "status.podIP" | "status.podIPs" => pod_ip.unwrap_or_default().to_string(),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// A string in Go's quoted form, as label and annotation values appear in downward API files.
fn go_quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value of a container's resource for the downward API, rounded up to the divisor.
pub(crate) fn resource_value(
    pod: &Pod,
    container: &str,
    resource: &str,
    divisor: Option<&str>,
    node_cpus: u64,
    node_memory: u64,
) -> Result<String, String> {
    let spec = pod.spec.as_ref();
    let all = spec.into_iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers));
    let found =
        all.into_iter().find(|c| c.name == container).ok_or_else(|| format!("container {container} not found"))?;
    let (kind, name) = resource.split_once('.').ok_or_else(|| format!("unsupported container resource: {resource}"))?;
    let resources = found.resources.as_ref();
    let get = |kind: &str| {
        let map = match kind {
            "limits" => resources.and_then(|r| r.limits.as_ref()),
            _ => resources.and_then(|r| r.requests.as_ref()),
        };
        map.and_then(|m| m.get(name)).and_then(|q| quantity(&q.0))
    };
    let value = match kind {
        // Without a limit the node's capacity bounds the container.
        "limits" => get("limits").or(match name {
            "cpu" => Some(node_cpus as f64),
            "memory" => Some(node_memory as f64),
            _ => None,
        }),
        "requests" => get("requests").or_else(|| get("limits")),
        _ => return Err(format!("unsupported container resource: {resource}")),
    };
    let divisor = match divisor {
        None | Some("" | "0") => 1.0,
        Some(text) => quantity(text).filter(|d| *d > 0.0).ok_or_else(|| format!("invalid divisor {text:?}"))?,
    };
    Ok(format!("{:.0}", (value.unwrap_or(0.0) / divisor).ceil()))
}

/// Writes the files behind `..data`. Nothing is touched when the content is what is there.
fn write_files(dir: &Path, files: &Files) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, PermissionsExt::from_mode(0o755))?;
    let data = dir.join("..data");
    let old = fs::read_link(&data).ok().map(|name| dir.join(name));
    if let Some(old) = &old
        && same(old, files)
    {
        return Ok(());
    }
    let name = format!("..{}.{}", Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S"), uuid::Uuid::new_v4().simple());
    let fresh = dir.join(&name);
    fs::create_dir(&fresh)?;
    fs::set_permissions(&fresh, PermissionsExt::from_mode(0o755))?;
    for (path, content) in files {
        let path = fresh.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &content.data)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(content.mode))?;
    }
    let next = dir.join("..data_tmp");
    let _ = fs::remove_file(&next);
    symlink(&name, &next)?;
    fs::rename(&next, &data)?;
    // The visible names point through ..data, so they change only when a top-level name comes or goes.
    let wanted: std::collections::BTreeSet<&std::ffi::OsStr> =
        files.keys().filter_map(|path| path.components().next()).map(|c| c.as_os_str()).collect();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if !name.to_string_lossy().starts_with("..") && !wanted.contains(name.as_os_str()) {
            fs::remove_file(dir.join(name))?;
        }
    }
    for name in wanted {
        match symlink(Path::new("..data").join(name), dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    if let Some(old) = old {
        remove_dir(&old)?;
    }
    Ok(())
}

fn same(dir: &Path, files: &Files) -> bool {
    fn count(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| if e.path().is_dir() { count(&e.path()) } else { 1 }).sum()
    }
    count(dir) == files.len()
        && files.iter().all(|(path, content)| fs::read(dir.join(path)).is_ok_and(|d| d == content.data))
}

/// Gives a volume to the pod's `fsGroup`.
fn own_by_group(pod: &Pod, dir: &Path) -> Result<(), String> {
    let group = pod.spec.as_ref().and_then(|s| s.security_context.as_ref()).and_then(|c| c.fs_group);
    let Some(group) = group else { return Ok(()) };
    let group = u32::try_from(group).map_err(|_| format!("fsGroup {group} is out of range"))?;
    fn walk(path: &Path, group: u32) -> io::Result<()> {
        let meta = fs::symlink_metadata(path)?;
        std::os::unix::fs::lchown(path, None, Some(group))?;
        if meta.is_symlink() {
            return Ok(());
        }
        let mode = meta.permissions().mode() & 0o7777;
        let user = mode & 0o700;
        let extra = if meta.is_dir() { (user >> 3) | 0o2010 } else { (user >> 3) & 0o060 };
        fs::set_permissions(path, PermissionsExt::from_mode(mode | extra))?;
        if meta.is_dir() {
            for entry in fs::read_dir(path)? {
                walk(&entry?.path(), group)?;
            }
        }
        Ok(())
    }
    walk(dir, group).map_err(|e| e.to_string())
}

/// Where a volume mount leads: the volume, or a path below it that exists or is made and does not lead out of the volume.
pub(crate) fn sub_path(volume: &Path, sub: &str) -> Result<PathBuf, String> {
    let wanted = Path::new(sub);
    if !wanted.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(format!("subPath {sub:?} must be relative and stay inside the volume"));
    }
    let full = volume.join(wanted);
    if fs::symlink_metadata(&full).is_err() {
        // Made one by one below what is resolved, so that a link in the volume cannot lead the creation elsewhere.
        let mut path = fs::canonicalize(volume).map_err(|e| e.to_string())?;
        for component in wanted.components() {
            path.push(component);
            if fs::symlink_metadata(&path).is_err() {
                fs::create_dir(&path).map_err(|e| e.to_string())?;
            }
            path = fs::canonicalize(&path).map_err(|e| e.to_string())?;
            within(volume, &path, sub)?;
        }
    }
    let resolved = fs::canonicalize(&full).map_err(|e| format!("subPath {sub:?}: {e}"))?;
    within(volume, &resolved, sub)?;
    Ok(resolved)
}

fn within(volume: &Path, path: &Path, sub: &str) -> Result<(), String> {
    let volume = fs::canonicalize(volume).map_err(|e| e.to_string())?;
    if path.starts_with(&volume) { Ok(()) } else { Err(format!("subPath {sub:?} leads out of the volume")) }
}

/// Unmounts and removes all volumes of a pod. hostPath volumes are elsewhere and stay.
pub(crate) fn remove_all(dir: &Path) -> io::Result<()> {
    for volume in crate::runtime::entries(dir)? {
        unmount(&volume)?;
    }
    remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("portolan-volume-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn files(list: &[(&str, &str)]) -> Files {
        list.iter().map(|(p, d)| (PathBuf::from(p), FileContent { data: d.as_bytes().to_vec(), mode: 0o640 })).collect()
    }

    #[test]
    fn an_update_replaces_all_files_in_one_step() {
        let dir = dir("atomic");
        write_files(&dir, &files(&[("a", "1"), ("sub/b", "2"), ("gone", "x")])).unwrap();
        let first = fs::read_link(dir.join("..data")).unwrap();
        assert_eq!(fs::read_to_string(dir.join("sub/b")).unwrap(), "2");
        assert_eq!(fs::metadata(dir.join("a")).unwrap().permissions().mode() & 0o777, 0o640);
        write_files(&dir, &files(&[("a", "1"), ("sub/b", "2"), ("gone", "x")])).unwrap();
        assert_eq!(fs::read_link(dir.join("..data")).unwrap(), first, "the same content changes nothing");
        write_files(&dir, &files(&[("a", "3"), ("c", "4")])).unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert!(!dir.join("gone").exists() && !dir.join("sub").exists() && !dir.join(first).exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn sub_paths_stay_inside() {
        let dir = dir("sub");
        let volume = dir.join("v");
        fs::create_dir_all(&volume).unwrap();
        symlink("..", volume.join("up")).unwrap();
        assert!(sub_path(&volume, "a/b").unwrap().ends_with("v/a/b"));
        for bad in ["../x", "/etc", "up", "up/x"] {
            assert!(sub_path(&volume, bad).is_err(), "{bad}");
        }
        assert!(!dir.join("x").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn file_paths_stay_inside() {
        for bad in ["", "../a", "a/../b", "/a", "..a"] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
        assert!(relative("a/b.txt").is_ok());
    }

    #[test]
    fn quantities_and_resources() {
        assert_eq!(quantity_bytes("64Mi"), Some(64 << 20));
        assert_eq!(quantity_bytes("1e3"), Some(1000));
        assert_eq!(quantity_milli("1500m"), Some(1500));
        assert_eq!(quantity_milli("x"), None);
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {"containers": [
            {"name": "web", "resources": {"limits": {"memory": "64Mi"}, "requests": {"cpu": "250m"}}}]}}))
        .unwrap();
        let get = |resource: &str, divisor| resource_value(&pod, "web", resource, divisor, 4, 1 << 30).unwrap();
        assert_eq!(get("limits.memory", Some("1Mi")), "64");
        assert_eq!(get("requests.memory", None), (64u64 << 20).to_string());
        assert_eq!(get("requests.cpu", None), "1", "rounded up");
        assert_eq!(get("requests.cpu", Some("1m")), "250");
        assert_eq!(get("limits.cpu", None), "4", "the node's capacity");
    }

    #[test]
    fn fields_of_the_pod() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"a": "1", "b": "x\"y"}},
            "spec": {"nodeName": "node-1", "containers": []}}))
        .unwrap();
        let get = |path: &str| {
            let field = ObjectFieldSelector { field_path: path.into(), api_version: None };
            field_value(&pod, &field, "h", Some("i"))
        };
        assert_eq!(get("metadata.labels['a']").unwrap(), "1");
        assert_eq!(get("metadata.labels").unwrap(), "a=\"1\"\nb=\"x\\\"y\"");
        assert_eq!(get("status.podIP").unwrap(), "i");
        assert_eq!(get("spec.nodeName").unwrap(), "node-1");
        assert!(get("spec.x").is_err());
    }
}
