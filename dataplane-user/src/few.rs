//! A list that nearly always has one item, which then needs no allocation: a hundred thousand of them are megabytes.

use std::ops::{Deref, DerefMut};

#[derive(Clone, Debug, Default)]
pub enum Few<T> {
    #[default]
    None,
    One(T),
    Many(Vec<T>),
}

impl<T> Few<T> {
    pub fn push(&mut self, item: T) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(item),
            Self::One(first) => Self::Many(vec![first, item]),
            Self::Many(mut all) => {
                all.push(item);
                Self::Many(all)
            }
        };
    }

    pub fn retain(&mut self, stays: impl Fn(&T) -> bool) {
        *self = match std::mem::take(self) {
            Self::One(item) if stays(&item) => Self::One(item),
            Self::None | Self::One(_) => Self::None,
            Self::Many(mut all) => {
                all.retain(stays);
                match all.len() {
                    0 => Self::None,
                    1 => all.pop().map_or(Self::None, Self::One),
                    _ => Self::Many(all),
                }
            }
        };
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::None => &[],
            Self::One(item) => std::slice::from_ref(item),
            Self::Many(all) => all,
        }
    }
}

impl<T> DerefMut for Few<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::None => &mut [],
            Self::One(item) => std::slice::from_mut(item),
            Self::Many(all) => all,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_what_a_vector_would(steps in prop::collection::vec((any::<bool>(), 0_u8..4), 0..24)) {
            let (mut few, mut vector) = (Few::default(), Vec::new());
            for (push, item) in steps {
                if push {
                    few.push(item);
                    vector.push(item);
                } else {
                    few.retain(|other| *other != item);
                    vector.retain(|other| *other != item);
                }
                prop_assert_eq!(&*few, vector.as_slice());
            }
        }
    }

    #[test]
    fn one_takes_the_room_of_an_empty_vector() {
        assert_eq!(size_of::<Few<Arc<str>>>(), size_of::<Vec<Arc<str>>>());
        assert_eq!(size_of::<Few<u32>>(), size_of::<Vec<u32>>());
    }
}
