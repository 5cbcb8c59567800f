//! The kept corpora of `fuzz/`, fed to the fuzz targets: what was found once stays fixed.

use std::{collections::BTreeSet, fs, path::PathBuf};

use dataplane_user::fuzz::{TARGETS, identities};

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

/// Damaged at random from the corpora, the same way in every run; `HITLESS_FUZZ_ROUNDS` asks for more of it. For where no
/// fuzzer can be built: it sees no coverage, but it is there at once.
#[test]
fn random_damage_breaks_no_promise() {
    let rounds: u32 = std::env::var("HITLESS_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3_000);
    for (name, target) in TARGETS {
        let files = fs::read_dir(corpora().join(name)).unwrap().map(|entry| entry.unwrap().path());
        let kept: Vec<_> = files.collect::<BTreeSet<_>>().into_iter().map(|path| fs::read(path).unwrap()).collect();
        let words: Vec<&[u8]> = kept.iter().flat_map(|text| text.split(|byte| b" {}[]:,\"".contains(byte))).collect();
        // Marsaglia's xorshift64.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below.max(1) as u64) as usize
        };
        for round in 0..rounds {
            let mut bytes = kept[random(kept.len())].clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                match random(5) {
                    0 => bytes[at..].iter_mut().take(1).for_each(|byte| *byte ^= 1 << (round % 8)),
                    1 => drop(bytes.drain(at..(at + 1 + random(16)).min(bytes.len()))),
                    2 => drop(bytes.splice(at..at, words[random(words.len())].iter().copied())),
                    3 => {
                        // A word in place of another.
                        let end = (at + 1 + random(12)).min(bytes.len());
                        drop(bytes.splice(at.min(end)..end, words[random(words.len())].iter().copied()));
                    }
                    _ => {
                        let other = &kept[random(kept.len())];
                        bytes.truncate(at);
                        bytes.extend_from_slice(&other[random(other.len())..]);
                    }
                }
            }
            std::panic::catch_unwind(|| target(&bytes))
                .unwrap_or_else(|_| panic!("{name}, round {round}: {:?}", String::from_utf8_lossy(&bytes)));
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

/// Otherwise its promises would be promises about nothing.
#[test]
fn of_the_kept_certificates_the_good_ones_are_taken() {
    let mut taken = Vec::new();
    for entry in fs::read_dir(corpora().join("certificates")).unwrap() {
        let path = entry.unwrap().path();
        if !identities(&fs::read(&path).unwrap()).is_empty() {
            taken.push(path.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    taken.sort();
    let good = [
        "files-direct.pem",
        "files-rsa.pem",
        "files-sec1-key.pem",
        "files.pem",
        "workload-api-two.bin",
        "workload-api.bin",
    ];
    assert_eq!(taken, good);
}
