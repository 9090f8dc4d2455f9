//! Builds container images without a container engine.
//!
//! An image contains one static binary and no base image. Its archive is an OCI image layout (OCI image-spec 1.1)
//! and a docker archive at the same time, so `ctr images import`, `docker load` and `skopeo` all accept it. The
//! build is reproducible: the archive contains no times, no user names and no varying order, so the same binary
//! gives the same bytes.

use std::{fs, io::Write as _};

use anyhow::{Context as _, Result, bail};
use flate2::{Compression, write::GzEncoder};
use oci_spec::image::{
    ANNOTATION_LICENSES, ANNOTATION_REF_NAME, ANNOTATION_TITLE, ANNOTATION_VERSION, Arch, ConfigBuilder, Descriptor,
    ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, RootFsBuilder,
    SCHEMA_VERSION, Sha256Digest,
};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::build;

/// An image to build.
struct Image {
    /// Name of the repository and of the archive.
    name: &'static str,
    /// Name of the binary in target/release.
    binary: &'static str,
    /// The image's title label.
    title: &'static str,
    /// User and group ids of the process. The agent loads BPF programs and runs as root. The dummy service runs
    /// unprivileged; it can listen on port 80 only where `net.ipv4.ip_unprivileged_port_start` allows it (k8s/lab
    /// sets that), because the default capabilities of a container do not reach other users than root.
    user: &'static str,
    /// Default arguments.
    cmd: &'static [&'static str],
}

const IMAGES: &[Image] = &[
    Image {
        name: "breaker",
        binary: "breaker",
        title: "breaker: circuit breaking for Kubernetes Services in the kernel",
        user: "0:0",
        cmd: &["--help"],
    },
    Image {
        name: "dummyservice",
        binary: "dummy-service",
        title: "breaker's lab: a dummy service that fails on demand, and clients for it",
        user: "65532:65532",
        cmd: &[],
    },
];

/// Maximum compressed size of an image's layer in bytes, which every node has to download.
const MAX_LAYER_BYTES: usize = 15_000_000;
/// Registry in the images' names if `--push` does not name one.
const DEFAULT_REGISTRY: &str = "localhost:5000";

/// A content-addressed part of an image.
struct Blob {
    /// SHA-256 digest in hexadecimal.
    digest: String,
    bytes: Vec<u8>,
    media_type: MediaType,
}

impl Blob {
    fn new(bytes: Vec<u8>, media_type: MediaType) -> Self {
        Self { digest: digest(&bytes), bytes, media_type }
    }

    fn descriptor(&self) -> Result<Descriptor> {
        let digest: Sha256Digest = self.digest.parse()?;
        Ok(Descriptor::new(self.media_type.clone(), self.bytes.len() as u64, digest))
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }
}

/// The SHA-256 of `bytes` in hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A document as JSON. `oci_spec` has labels and annotations in hash maps, whose order changes from run to run; a
/// [`serde_json::Value`] sorts them.
fn json_bytes(document: impl Serialize) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&serde_json::to_value(document)?)?)
}

/// Builds the binaries and their images into `dist/`, and pushes the images if `push` names a registry.
///
/// # Errors
/// `tag` is invalid, a build fails, `dist/` cannot be written, an image is too large, or the registry rejects an
/// image.
pub fn image(tag: &str, push: Option<&str>) -> Result<()> {
    if tag.is_empty() || tag.len() > 128 || !tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        bail!("--tag: {tag:?} is not allowed; allowed: letters, digits, '.', '_' and '-'");
    }
    build::binaries()?;
    let dist = ebpf_builder::workspace().join("dist");
    fs::create_dir_all(&dist).with_context(|| format!("make {}", dist.display()))?;
    for image in IMAGES {
        let registry = push.unwrap_or(DEFAULT_REGISTRY);
        let reference = format!("{registry}/{}:{tag}", image.name);
        let binary = build::release_binaries()?.join(image.binary);
        let bytes = fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
        let parts = Parts::new(image, &bytes)?;
        if parts.layer.bytes.len() > MAX_LAYER_BYTES {
            bail!(
                "the compressed layer of {reference} has {} bytes; allowed: {MAX_LAYER_BYTES}",
                parts.layer.bytes.len()
            );
        }
        let file = dist.join(format!("{}.tar", image.name));
        fs::write(&file, parts.archive(&reference)?).with_context(|| format!("write {}", file.display()))?;
        let megabytes = |bytes: usize| f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) / 1024.0;
        println!(
            "dist/{}.tar  {reference}  sha256:{}  {:.1} MiB ({:.1} MiB unpacked)",
            image.name,
            &parts.manifest.digest[..12],
            megabytes(parts.layer.bytes.len()),
            megabytes(bytes.len())
        );
        if let Some(registry) = push {
            parts.push(registry, image.name, tag).with_context(|| format!("push {reference}"))?;
            println!("pushed {reference}");
        }
    }
    Ok(())
}

/// The parts of an image.
struct Parts {
    layer: Blob,
    config: Blob,
    manifest: Blob,
}

impl Parts {
    fn new(image: &Image, binary: &[u8]) -> Result<Self> {
        let layer = layer(image, binary)?;
        let diff_id = digest(&layer);
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&layer)?;
        let layer = Blob::new(packed.finish()?, MediaType::ImageLayerGzip);
        let labels = [
            (ANNOTATION_TITLE, image.title),
            (ANNOTATION_VERSION, env!("CARGO_PKG_VERSION")),
            (ANNOTATION_LICENSES, "(MIT OR Apache-2.0) AND GPL-2.0-only"),
        ];
        let process = ConfigBuilder::default()
            .user(image.user)
            .entrypoint([format!("/{}", image.binary)])
            .cmd(image.cmd.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
            .env(["PATH=/".to_owned()])
            .labels(labels.map(|(name, value)| (name.to_owned(), value.to_owned())))
            .build()?;
        let rootfs = RootFsBuilder::default().typ("layers").diff_ids([format!("sha256:{diff_id}")]).build()?;
        let config = ImageConfigurationBuilder::default()
            .architecture(Arch::default())
            .os(Os::Linux)
            .config(process)
            .rootfs(rootfs)
            .build()?;
        let config = Blob::new(json_bytes(config)?, MediaType::ImageConfig);
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config.descriptor()?)
            .layers([layer.descriptor()?])
            .build()?;
        let manifest = Blob::new(json_bytes(manifest)?, MediaType::ImageManifest);
        Ok(Self { layer, config, manifest })
    }

    /// Writes both layouts into one tar archive: `index.json` is the entry point for OCI readers, `manifest.json`
    /// for docker.
    fn archive(&self, reference: &str) -> Result<Vec<u8>> {
        let mut entry = self.manifest.descriptor()?;
        let tag = reference.rsplit(':').next().unwrap_or_default();
        let names = [("io.containerd.image.name", reference), (ANNOTATION_REF_NAME, tag)];
        entry.set_annotations(Some(names.map(|(name, value)| (name.to_owned(), value.to_owned())).into()));
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests([entry])
            .build()?;
        let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
        // docker's own format: https://github.com/moby/docker-image-spec, "Combined Image JSON + Filesystem Changeset".
        let docker = json!([{ "Config": self.config.path(), "RepoTags": [reference], "Layers": [self.layer.path()] }]);
        let mut archive = tar::Builder::new(Vec::new());
        for blob in [&self.layer, &self.config, &self.manifest] {
            add(&mut archive, &blob.path(), &blob.bytes, 0o644)?;
        }
        add(&mut archive, "oci-layout", &json_bytes(layout)?, 0o644)?;
        add(&mut archive, "index.json", &json_bytes(index)?, 0o644)?;
        add(&mut archive, "manifest.json", &json_bytes(docker)?, 0o644)?;
        Ok(archive.into_inner()?)
    }

    /// Pushes the image to a registry over plain HTTP (OCI distribution-spec 1.1): first the blobs, then the
    /// manifest.
    fn push(&self, registry: &str, name: &str, tag: &str) -> Result<()> {
        let base = format!("http://{registry}");
        let agent = ureq::Agent::new_with_defaults();
        for blob in [&self.layer, &self.config] {
            let existing = agent.head(format!("{base}/v2/{name}/blobs/sha256:{}", blob.digest)).call();
            if existing.is_ok() {
                continue;
            }
            let started =
                agent.post(format!("{base}/v2/{name}/blobs/uploads/")).send_empty().context("start an upload")?;
            let location = started
                .headers()
                .get("location")
                .and_then(|l| l.to_str().ok())
                .context("the registry's answer has no Location header for the upload")?;
            let upload = if location.starts_with('/') { format!("{base}{location}") } else { location.to_owned() };
            let separator = if upload.contains('?') { '&' } else { '?' };
            agent
                .put(format!("{upload}{separator}digest=sha256:{}", blob.digest))
                .header("content-type", "application/octet-stream")
                .send(&blob.bytes[..])
                .context("upload a blob")?;
        }
        agent
            .put(format!("{base}/v2/{name}/manifests/{tag}"))
            .header("content-type", self.manifest.media_type.to_string())
            .send(&self.manifest.bytes[..])
            .context("upload the manifest")?;
        Ok(())
    }
}

/// The image's only layer as a tar archive: the binary, and directories for mounts.
fn layer(image: &Image, binary: &[u8]) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for dir in ["etc/", "proc/", "run/", "sys/", "tmp/"] {
        let mut header = header(0, 0o755);
        header.set_entry_type(tar::EntryType::Directory);
        layer.append_data(&mut header, dir, std::io::empty())?;
    }
    add(&mut layer, image.binary, binary, 0o755)?;
    Ok(layer.into_inner()?)
}

fn add(archive: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
    archive.append_data(&mut header(bytes.len() as u64, mode), path, bytes)?;
    Ok(())
}

fn header(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn two_builds_have_one_digest_and_the_archive_names_its_blobs() {
        let make = || Parts::new(&IMAGES[0], b"a binary").unwrap();
        let (a, b) = (make(), make());
        assert_eq!(a.manifest.digest, b.manifest.digest);
        assert_eq!(a.archive("localhost:5000/breaker:1").unwrap(), b.archive("localhost:5000/breaker:1").unwrap());
        let other = Parts::new(&IMAGES[0], b"another").unwrap();
        assert_ne!(a.manifest.digest, other.manifest.digest);
        let bytes = a.archive("localhost:5000/breaker:1").unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            if let Some(name) = path.strip_prefix("blobs/sha256/") {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                assert_eq!(digest(&bytes), name);
            }
        }
    }
}
