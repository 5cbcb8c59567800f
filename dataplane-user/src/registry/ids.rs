//! Numbers that are given out, taken back, and reused as late as possible.

use std::{
    collections::{HashSet, VecDeque},
    ops::{Index, IndexMut},
};

/// Numbers from 1. A number that came back rests behind [`Ids::REST`] others while fresh ones
/// last: whoever still holds it in the kernel (a socket's storage, an affinity) finds nothing.
#[derive(Debug)]
pub struct Ids {
    next: u32,
    max: u32,
    free: VecDeque<u32>,
}

impl Ids {
    const REST: usize = 1024;

    /// Numbers below `max`, as the maps' sizes allow, without those already `used`.
    pub fn new(max: u32, used: &HashSet<u32>) -> Self {
        let next = used.iter().max().map_or(1, |&top| top + 1);
        let free = (1..next).filter(|id| !used.contains(id)).collect();
        Self { next, max, free }
    }

    /// None: all are in use.
    pub fn take(&mut self) -> Option<u32> {
        if self.next < self.max && self.free.len() < Self::REST {
            self.next += 1;
            return Some(self.next - 1);
        }
        self.free.pop_front()
    }

    pub fn give_back(&mut self, id: u32) {
        debug_assert!(id != 0 && id < self.next);
        self.free.push_back(id);
    }
}

/// A vector with holes: records that refer to each other by index.
#[derive(Debug)]
pub struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub fn insert(&mut self, item: T) -> u32 {
        if let Some(index) = self.free.pop() {
            self.items[index as usize] = Some(item);
            return index;
        }
        self.items.push(Some(item));
        self.items.len() as u32 - 1
    }

    pub fn get(&self, index: u32) -> Option<&T> {
        self.items.get(index as usize)?.as_ref()
    }

    pub fn remove(&mut self, index: u32) -> Option<T> {
        let item = self.items.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(item)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(i, item)| Some((i as u32, item.as_ref()?)))
    }

    pub fn indexes(&self) -> Vec<u32> {
        self.iter().map(|(i, _)| i).collect()
    }
}

impl<T> Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, index: u32) -> &T {
        self.items[index as usize].as_ref().expect("an index of this slab refers to a living record")
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        self.items[index as usize].as_mut().expect("an index of this slab refers to a living record")
    }
}
