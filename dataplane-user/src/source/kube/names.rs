//! The names of a list: a hash of each, because a hundred thousand names that are dropped after the list would leave as
//! many holes in the heap, between those that stay.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
};

/// Two names of one hash would keep an object that is gone until the next list: once in 10^14 lists of a large cluster. The
/// hash is keyed, so nobody can choose names for it.
#[derive(Debug, Default)]
pub struct Names {
    hashes: HashSet<u64>,
    hasher: RandomState,
}

impl Names {
    pub fn insert(&mut self, name: &str) {
        self.hashes.insert(self.hasher.hash_one(name));
    }

    pub fn contains(&self, name: &str) -> bool {
        self.hashes.contains(&self.hasher.hash_one(name))
    }

    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }
}

impl<T: AsRef<str>> FromIterator<T> for Names {
    fn from_iter<I: IntoIterator<Item = T>>(names: I) -> Self {
        let mut all = Self::default();
        names.into_iter().for_each(|name| all.insert(name.as_ref()));
        all
    }
}
