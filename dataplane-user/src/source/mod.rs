//! Where desired state comes from.

pub mod file;
pub mod kube;
pub mod parse;
pub mod stream;
