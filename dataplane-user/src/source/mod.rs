//! Where desired state comes from.

pub mod file;
pub mod parse;
pub mod stream;
