//! Where desired state comes from.

pub mod file;
pub mod kube;
pub mod parse;
pub mod policies;
pub mod stream;
