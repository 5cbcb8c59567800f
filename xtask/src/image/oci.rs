//! An OCI image layout in a tar: the same bytes for the same input, whoever packs it and when.
//!
//! What the layout is: OCI image specification 1.1, image-layout.md, manifest.md, config.md.

use std::{collections::BTreeMap, io::Write as _};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A file of the image. Its directories are made, all owned by root.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// From the image's root, without a leading slash.
    pub path: &'a str,
    pub mode: u32,
    pub content: &'a [u8],
}

/// What one processor architecture gets.
#[derive(Debug)]
pub struct Platform<'a> {
    /// As Go names it: `amd64`, `arm64`.
    pub architecture: &'a str,
    pub files: Vec<File<'a>>,
}

/// What all of them share.
#[derive(Debug)]
pub struct Image<'a> {
    /// The full name, `registry/repository:tag`.
    pub name: &'a str,
    /// Of every file, in seconds since 1970.
    pub mtime: u64,
    /// When it says it was made, if it does.
    pub created: Option<String>,
    pub entrypoint: &'a [&'a str],
    pub command: &'a [&'a str],
    pub labels: BTreeMap<&'static str, String>,
}

/// A packed image.
#[derive(Debug)]
pub struct Archive {
    /// Of what the name means: a manifest, or an index of several.
    pub digest: String,
    pub bytes: Vec<u8>,
}

/// Packs the image, one manifest per platform.
pub fn archive(image: &Image<'_>, platforms: &[Platform<'_>]) -> Result<Archive> {
    let mut blobs = Blobs::default();
    let mut packed = Vec::new();
    for platform in platforms {
        packed.push(manifest(image, platform, &mut blobs)?);
    }
    let mut named = match packed.as_slice() {
        [(only, _)] => only.clone(),
        _ => {
            let manifests: Vec<_> = packed.iter().map(|(descriptor, _)| descriptor).collect();
            blobs.json(INDEX, &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}))
        }
    };
    let digest = named["digest"].as_str().context("a descriptor has a digest")?.to_owned();
    // Each importer has a name of its own for the name: containerd looks for its own first.
    named["annotations"] =
        json!({"org.opencontainers.image.ref.name": image.name, "io.containerd.image.name": image.name});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]});

    let mut tar = Tar::new(image.mtime);
    tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar.file("index.json", 0o644, index.to_string().as_bytes())?;
    if let [(_, docker)] = packed.as_slice() {
        // The same blobs as `docker load` wants to be told of them; it knows one platform only.
        tar.file("manifest.json", 0o644, json!([docker]).to_string().as_bytes())?;
    }
    for (digest, content) in &blobs.0 {
        tar.file(&format!("blobs/sha256/{digest}"), 0o644, content)?;
    }
    Ok(Archive { digest, bytes: tar.finish()? })
}

/// The descriptor of a platform's manifest, and its entry in Docker's list.
fn manifest(image: &Image<'_>, platform: &Platform<'_>, blobs: &mut Blobs) -> Result<(Value, Value)> {
    let mut layer = Tar::new(image.mtime);
    for file in &platform.files {
        layer.file(file.path, file.mode, file.content)?;
    }
    let layer = layer.finish()?;
    let diff_id = sha256(&layer);
    let layer = blobs.add(LAYER, gzip(&layer)?);
    let mut config = json!({
        "architecture": platform.architecture,
        "os": "linux",
        "config": {
            "Entrypoint": image.entrypoint,
            "Cmd": image.command,
            "Env": ["PATH=/bin"],
            "WorkingDir": "/",
            "Labels": image.labels,
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    });
    if let Some(created) = &image.created {
        config["created"] = json!(created);
    }
    let config = blobs.json(CONFIG, &config);
    let docker = json!({"Config": blob(&config)?, "RepoTags": [image.name], "Layers": [blob(&layer)?]});
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
    let mut descriptor = blobs.json(MANIFEST, &manifest);
    descriptor["platform"] = json!({"architecture": platform.architecture, "os": "linux"});
    Ok((descriptor, docker))
}

/// Where a descriptor's content is in the archive.
fn blob(descriptor: &Value) -> Result<String> {
    let digest = descriptor["digest"].as_str().context("a descriptor has a digest")?;
    Ok(format!("blobs/{}", digest.replace(':', "/")))
}

/// Content by its digest, in the digests' order.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Returns the descriptor.
    fn add(&mut self, media_type: &str, content: Vec<u8>) -> Value {
        let digest = sha256(&content);
        let descriptor = json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len()});
        self.0.insert(digest, content);
        descriptor
    }

    fn json(&mut self, media_type: &str, value: &Value) -> Value {
        self.add(media_type, value.to_string().into_bytes())
    }
}

pub fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    // No name, no time, and a fixed "unknown" for the operating system.
    let mut encoder = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::best());
    encoder.write_all(content)?;
    Ok(encoder.finish()?)
}

/// A tar whose entries say nothing of the machine it is written on.
struct Tar {
    builder: tar::Builder<Vec<u8>>,
    mtime: u64,
    directories: Vec<String>,
}

impl Tar {
    fn new(mtime: u64) -> Self {
        Self { builder: tar::Builder::new(Vec::new()), mtime, directories: Vec::new() }
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        for (end, _) in path.match_indices('/') {
            let directory = path[..=end].to_owned();
            if !self.directories.contains(&directory) {
                self.entry(&directory, EntryType::Directory, 0o755, &[])?;
                self.directories.push(directory);
            }
        }
        self.entry(path, EntryType::Regular, mode, content)
    }

    fn entry(&mut self, path: &str, kind: EntryType, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(self.mtime);
        header.set_size(content.len() as u64);
        self.builder.append_data(&mut header, path, content).with_context(|| format!("cannot pack {path}"))
    }

    fn finish(self) -> Result<Vec<u8>> {
        Ok(self.builder.into_inner()?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn image() -> Image<'static> {
        Image {
            name: "registry.example:5000/hitless:1",
            mtime: 1_700_000_000,
            created: None,
            entrypoint: &["/bin/hitless"],
            command: &["run"],
            labels: BTreeMap::from([("org.opencontainers.image.title", "hitless".to_owned())]),
        }
    }

    fn platform(architecture: &'static str) -> Platform<'static> {
        let files = vec![
            File { path: "bin/hitless", mode: 0o755, content: b"a program" },
            File { path: "licenses/hitless/LICENSE", mode: 0o644, content: b"a licence" },
        ];
        Platform { architecture, files }
    }

    fn unpack(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(tar).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            assert!(files.insert(path.clone(), content).is_none(), "{path} is there twice");
        }
        files
    }

    /// The content that a descriptor means, which must be as it says.
    fn follow<'a>(files: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value) -> &'a [u8] {
        let content = &files[&blob(descriptor).unwrap()];
        assert_eq!(descriptor["digest"], format!("sha256:{}", sha256(content)));
        assert_eq!(descriptor["size"], content.len());
        content
    }

    fn parse(content: &[u8]) -> Value {
        serde_json::from_slice(content).unwrap()
    }

    #[test]
    fn every_digest_and_size_is_true_down_to_the_layer() {
        let archive = archive(&image(), &[platform("arm64")]).unwrap();
        let files = unpack(&archive.bytes);
        assert_eq!(parse(&files["oci-layout"])["imageLayoutVersion"], "1.0.0");
        let index = parse(&files["index.json"]);
        let named = &index["manifests"][0];
        assert_eq!(named["digest"], archive.digest);
        assert_eq!(named["platform"], json!({"architecture": "arm64", "os": "linux"}));
        assert_eq!(named["annotations"]["org.opencontainers.image.ref.name"], "registry.example:5000/hitless:1");
        let manifest = parse(follow(&files, named));
        let config = parse(follow(&files, &manifest["config"]));
        assert_eq!((&config["architecture"], &config["os"]), (&json!("arm64"), &json!("linux")));
        assert_eq!(config["config"]["Labels"]["org.opencontainers.image.title"], "hitless");
        let mut layer = Vec::new();
        flate2::read::GzDecoder::new(follow(&files, &manifest["layers"][0])).read_to_end(&mut layer).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([format!("sha256:{}", sha256(&layer))]));
        let docker = &parse(&files["manifest.json"])[0];
        assert_eq!(docker["RepoTags"], json!(["registry.example:5000/hitless:1"]));
        assert_eq!(files[docker["Config"].as_str().unwrap()], follow(&files, &manifest["config"]));
        assert_eq!(docker["Layers"], json!([blob(&manifest["layers"][0]).unwrap()]));
        assert_eq!(files.keys().filter(|path| path.starts_with("blobs/sha256/") && path.len() > 13).count(), 3);
    }

    #[test]
    fn a_layer_is_root_s_at_the_given_time_with_its_directories() {
        let mut layer = Tar::new(1_700_000_000);
        for file in platform("amd64").files {
            layer.file(file.path, file.mode, file.content).unwrap();
        }
        let layer = layer.finish().unwrap();
        let mut found = Vec::new();
        for entry in tar::Archive::new(&layer[..]).entries().unwrap() {
            let header = entry.unwrap().header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), 1_700_000_000);
            found.push((header.path().unwrap().to_string_lossy().into_owned(), header.mode().unwrap()));
        }
        let found: Vec<_> = found.iter().map(|(path, mode)| (path.as_str(), *mode)).collect();
        assert_eq!(
            found,
            [
                ("bin/", 0o755),
                ("bin/hitless", 0o755),
                ("licenses/", 0o755),
                ("licenses/hitless/", 0o755),
                ("licenses/hitless/LICENSE", 0o644),
            ]
        );
    }

    #[test]
    fn several_platforms_are_one_name() {
        let archive = archive(&image(), &[platform("amd64"), platform("arm64")]).unwrap();
        let files = unpack(&archive.bytes);
        let named = &parse(&files["index.json"])["manifests"][0];
        assert_eq!((&named["mediaType"], &named["digest"]), (&json!(INDEX), &json!(archive.digest)));
        let index = parse(follow(&files, named));
        let architectures: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|manifest| {
                let config = parse(follow(&files, &parse(follow(&files, manifest))["config"]));
                assert_eq!(manifest["platform"]["architecture"], config["architecture"]);
                config["architecture"].as_str().unwrap().to_owned()
            })
            .collect();
        assert_eq!(architectures, ["amd64", "arm64"]);
        assert!(!files.contains_key("manifest.json"), "Docker's list knows no platforms");
    }
}
