//! Fetches images from registries (only when the operator allows it).

use std::path::Path;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;

use super::archive::{OciConfig, architecture, decompress};
use super::{ImageError, NewImage, Reference, StoredImage, layer};

const LAYER_TYPES: &[&str] = &[
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
];

pub(super) async fn pull(reference: &Reference, store: &Path) -> Result<NewImage, ImageError> {
    let failed = |reason: String| ImageError::Pull { reference: reference.to_string(), reason };
    let target: oci_client::Reference =
        reference.to_string().parse().map_err(|e: oci_client::ParseError| failed(e.to_string()))?;
    let host = reference.registry();
    // A registry on this machine speaks plain HTTP, as Docker assumes too.
    let local = host == "localhost" || host.starts_with("localhost:") || host.starts_with("127.");
    let client = oci_client::Client::new(ClientConfig {
        protocol: if local { ClientProtocol::Http } else { ClientProtocol::Https },
        platform_resolver: Some(Box::new(|manifests| {
            manifests
                .iter()
                .find(|m| {
                    m.platform
                        .as_ref()
                        .is_some_and(|p| p.os.to_string() == "linux" && p.architecture.to_string() == architecture())
                })
                .map(|m| m.digest.clone())
        })),
        ..ClientConfig::default()
    });
    let data = client
        .pull(&target, &RegistryAuth::Anonymous, LAYER_TYPES.to_vec())
        .await
        .map_err(|e| failed(e.to_string()))?;
    let id = super::layer::Hashing::new(&data.config.data[..]).finish().map_err(|e| failed(e.to_string()))?;
    let config: OciConfig = serde_json::from_slice(&data.config.data).map_err(|e| failed(e.to_string()))?;
    config.check_platform().map_err(failed)?;
    if config.rootfs.diff_ids.len() != data.layers.len() {
        return Err(failed("its manifest and its configuration disagree about layers".to_string()));
    }
    let store_dir = store.to_path_buf();
    let diff_ids = config.rootfs.diff_ids.clone();
    let unpacked = tokio::task::spawn_blocking(move || {
        let mut layers = Vec::new();
        let mut size = 0;
        for (diff_id, blob) in diff_ids.iter().zip(data.layers) {
            let (name, bytes) =
                layer::unpack(&store_dir, diff_id, move || decompress(std::io::Cursor::new(blob.data)))?;
            layers.push(name);
            size += bytes;
        }
        Ok::<_, std::io::Error>((layers, size))
    });
    let (layers, size_bytes) = unpacked.await.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
    Ok(NewImage {
        id,
        references: vec![reference.to_string()],
        stored: StoredImage {
            config: config.config.unwrap_or_default(),
            layers,
            size_bytes,
            manifest_digest: data.digest,
            from_registry: true,
        },
    })
}
