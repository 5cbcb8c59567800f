//! A fast hash for keys that the operator's own control plane chooses: addresses, numbers, names.
//!
//! A relist of 100,000 backends is a million look-ups; the standard library's hash, which withstands
//! keys chosen by an attacker, was half of its time.

use std::hash::{BuildHasher as _, BuildHasherDefault, Hash, Hasher};

pub(super) type HashMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<Multiply>>;

/// Numbers of records that hold their own keys: a fifth of a map's size, for a hundred thousand of them.
pub(super) type Numbers = hashbrown::HashTable<u32>;

/// The hash of a key in [`Numbers`].
pub(super) fn hash_of<K: Hash + ?Sized>(key: &K) -> u64 {
    BuildHasherDefault::<Multiply>::default().hash_one(key)
}

/// Multiply and rotate, a word at a time (as rustc's own tables do).
#[derive(Default)]
pub struct Multiply(u64);

impl Multiply {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for Multiply {
    fn write(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            self.add(u64::from_le_bytes(word.try_into().expect("chunks of eight")));
        }
        let mut last = [0; 8];
        let rest = words.remainder();
        last[..rest.len()].copy_from_slice(rest);
        self.add(u64::from_le_bytes(last) ^ ((rest.len() as u64) << 56));
    }

    fn write_u8(&mut self, value: u8) {
        self.add(value.into());
    }

    fn write_u16(&mut self, value: u16) {
        self.add(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.add(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.add(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.add(value as u64);
    }

    fn finish(&self) -> u64 {
        // The tables take the high bits for one thing and the low ones for another: spread both.
        let folded = self.0 ^ (self.0 >> 32);
        folded.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}
