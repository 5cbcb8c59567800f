//! Why an object of the desired state is not in force.

use std::{fmt, net::IpAddr, sync::Arc};

use nix::sys::signal::Signal;
use serde::Serialize;

use crate::model::{Backend, Pod, Service};

/// One object was skipped; everything else goes on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Problem {
    /// Such as `service shop/web`.
    pub object: String,
    pub reason: String,
}

impl Problem {
    pub fn new(object: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self { object: object.to_string(), reason: reason.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

/// How an object is named in messages.
pub fn service_name(name: &str) -> String {
    format!("service {name}")
}

pub fn backend_name(service: &str, port: &str, address: IpAddr, target_port: u16) -> String {
    let colon = if port.is_empty() { "" } else { ":" };
    format!("backend {} of {service}{colon}{port}", std::net::SocketAddr::new(address, target_port))
}

pub fn pod_name(name: &str) -> String {
    format!("pod {name}")
}

pub fn check_service(service: &Service) -> Result<(), String> {
    if service.name.is_empty() {
        return Err("name is empty".into());
    }
    if service.ports.is_empty() {
        return Err("ports is empty: give it at least one".into());
    }
    for (i, port) in service.ports.iter().enumerate() {
        if port.port == 0 {
            return Err(format!("port {:?} has number 0; ports are 1..=65535", port.name));
        }
        if port.node_port == Some(0) {
            return Err(format!("port {:?} has nodePort 0; ports are 1..=65535, and no nodePort is none", port.name));
        }
        for other in &service.ports[..i] {
            if other.name == port.name {
                return Err(format!("two ports are named {:?}", port.name));
            }
            if (other.port, other.protocol) == (port.port, port.protocol) {
                return Err(format!("ports {:?} and {:?} have the same number {}", other.name, port.name, port.port));
            }
        }
    }
    for address in &service.node_addresses {
        check_address(*address)?;
    }
    for (i, address) in service.addresses.iter().enumerate() {
        check_address(*address)?;
        if service.addresses[..i].iter().any(|other| other.to_canonical() == address.to_canonical()) {
            return Err(format!("address {address} is given twice"));
        }
    }
    Ok(())
}

pub fn check_backend(backend: &Backend) -> Result<(), String> {
    if backend.service.is_empty() {
        return Err("service is empty".into());
    }
    if backend.target_port == 0 {
        return Err("targetPort is 0; ports are 1..=65535".into());
    }
    if backend.weight == 0 {
        return Err("weight is 0; weights are 1..=65535 (leave the backend out to give it no connections)".into());
    }
    check_address(backend.address)
}

pub fn check_pod(pod: &Pod) -> Result<(), String> {
    if pod.name.is_empty() {
        return Err("name is empty".into());
    }
    if pod.netns.is_some() && pod.pid.is_some() {
        return Err("netns and pid are both given: give one".into());
    }
    if let Some(pid) = pod.pid
        && pid <= 0
    {
        return Err(format!("pid {pid} is no process"));
    }
    for address in &pod.addresses {
        check_address(*address)?;
    }
    stop_signals(&pod.stop_signals).map(drop)
}

fn check_address(address: IpAddr) -> Result<(), String> {
    let address = address.to_canonical();
    let kind = if address.is_unspecified() {
        "unspecified"
    } else if address.is_multicast() {
        "a multicast address"
    } else if address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
        "the broadcast address"
    } else {
        return Ok(());
    };
    Err(format!("address {address} is {kind}: nobody can connect to it"))
}

/// The set of signals as bits; SIGTERM when none is given.
pub fn stop_signals(names: &[String]) -> Result<u64, String> {
    if names.is_empty() {
        return Ok(1 << Signal::SIGTERM as u64);
    }
    names.iter().try_fold(0, |mask, name| Ok(mask | 1 << signal(name)?))
}

fn signal(name: &str) -> Result<u32, String> {
    /// The first and last real-time signal of the kernel's numbering (glibc keeps the first two).
    const REAL_TIME: std::ops::RangeInclusive<u32> = 32..=63;
    let known = || format!("stop signal {name:?} is unknown: give a name such as TERM or a number 1..=63");
    if let Ok(number) = name.parse::<u32>() {
        return if (1..=*REAL_TIME.end()).contains(&number) { Ok(number) } else { Err(known()) };
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    // Container images say RTMIN+3 (systemd's halt), which is 34 + 3 by glibc's count.
    if let Some(offset) = short.strip_prefix("RTMIN+").and_then(|offset| offset.parse::<u32>().ok()) {
        return if offset <= 29 { Ok(34 + offset) } else { Err(known()) };
    }
    format!("SIG{short}").parse::<Signal>().map(|signal| signal as u32).map_err(|_| known())
}

/// A name that many objects share.
pub type Name = Arc<str>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_signals_go_by_name_or_number() {
        let mask = |names: &[&str]| stop_signals(&names.iter().map(|name| name.to_string()).collect::<Vec<_>>());
        assert_eq!(mask(&[]), Ok(1 << 15));
        assert_eq!(mask(&["TERM", "SIGQUIT", "2"]), Ok(1 << 15 | 1 << 3 | 1 << 2));
        assert_eq!(mask(&["SIGRTMIN+3"]), Ok(1 << 37));
        for bad in ["SIGSTOPPED", "0", "64", ""] {
            assert!(mask(&[bad]).unwrap_err().contains("unknown"), "{bad}");
        }
    }
}
