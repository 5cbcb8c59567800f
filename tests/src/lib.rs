//! The lab: nodes and pods as network namespaces, the real processes that run in them, the demo; and a real Kubernetes.

pub mod bench;
pub mod cluster;
pub mod demo;
pub mod lab;
pub mod observe;
pub mod spire;
pub mod workload;
