//! The lab: nodes and pods as network namespaces, the real processes that run in them, and the demo.

pub mod bench;
pub mod demo;
pub mod lab;
pub mod workload;
