//! The kept corpora of `fuzz/`, fed to the fuzz targets: what was found once stays fixed.

use std::{collections::BTreeSet, fs, path::PathBuf};

use dataplane_user::fuzz::TARGETS;

fn corpora() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

#[test]
fn every_kept_input_keeps_every_promise() {
    for (name, target) in TARGETS {
        let directory = corpora().join(name);
        let files: Vec<_> = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}: each target keeps a corpus", directory.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(!files.is_empty(), "{} is empty", directory.display());
        for file in files {
            let bytes = fs::read(&file).unwrap();
            // Its panic is shown before this one, which says what caused it.
            std::panic::catch_unwind(|| target(&bytes)).unwrap_or_else(|_| panic!("by {}", file.display()));
            // Cut off and damaged inputs are half of what is met outside.
            for n in 1..16 {
                target(&bytes[..bytes.len() * n / 16]);
                let mut damaged = bytes.clone();
                let at = bytes.len() * n / 16;
                if let Some(byte) = damaged.get_mut(at) {
                    *byte = byte.wrapping_add(n as u8);
                    target(&damaged);
                }
            }
        }
    }
}

#[test]
fn targets_entry_points_and_corpora_have_the_same_names() {
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let listed = |directory: PathBuf| -> BTreeSet<String> {
        let stem = |entry: fs::DirEntry| entry.path().file_stem().unwrap().to_string_lossy().into_owned();
        fs::read_dir(directory).unwrap().map(|entry| stem(entry.unwrap())).collect()
    };
    assert_eq!(listed(corpora().join("../fuzz_targets")), names);
    assert_eq!(listed(corpora()), names);
    let manifest = fs::read_to_string(corpora().join("../Cargo.toml")).unwrap();
    for name in &names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is no [[bin]] of fuzz/Cargo.toml");
    }
}
