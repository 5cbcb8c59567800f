//! The maps as the agent holds them: descriptors of the hash maps, the mmapable arrays in memory.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::Pod;
use dataplane_ebpf::abi;
use serde::{Deserialize, Serialize};

use super::{error::Error, mapped::MappedArray, sys};

/// Most entries per map. A change makes a new layout: the agent fills new maps and moves over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Sizes {
    pub frontends: u32,
    pub services: u32,
    pub slots: u32,
    pub backends: u32,
    pub pods: u32,
    pub listeners: u32,
    pub affinity: u32,
    pub suspects: u32,
    pub rebinds: u32,
    /// Addresses of the mesh's workloads and of this node.
    pub mesh: u32,
    /// Bytes of the event ring, a power of two of at least one page.
    pub events_bytes: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            frontends: abi::MAX_FRONTENDS,
            services: abi::MAX_SERVICES,
            slots: abi::MAX_SLOTS,
            backends: abi::MAX_BACKENDS,
            pods: abi::MAX_PODS,
            listeners: abi::MAX_LISTENERS,
            affinity: abi::MAX_AFFINITY,
            suspects: abi::MAX_SUSPECTS,
            rebinds: abi::MAX_REBINDS,
            mesh: abi::MAX_MESH,
            events_bytes: abi::EVENTS_BYTES,
        }
    }
}

/// A sized map: its name, and the key below `sizes` that raises it.
pub const SIZED: &[(&str, &str)] = &[
    ("FRONTENDS", "frontends"),
    ("SERVICES", "services"),
    ("SLOTS", "slots"),
    ("BACKENDS", "backends"),
    ("HEALTH", "backends"),
    ("BACKEND_INDEX", "backends"),
    ("PODS", "pods"),
    ("LISTENERS", "listeners"),
    ("AFFINITY", "affinity"),
    ("SUSPECTS", "suspects"),
    ("REBINDS", "rebinds"),
    ("MESH", "mesh"),
    ("INBOUND", "pods"),
    ("EVENTS", "eventsBytes"),
];

impl Sizes {
    /// What the kernel would refuse with no more than "invalid argument".
    pub fn check(&self) -> Result<(), Error> {
        for (map, key) in SIZED {
            let size = self.of(map).unwrap_or(0);
            let wanted = match *map {
                "EVENTS" if !size.is_power_of_two() || size < 4096 => "a power of two, at least 4096",
                // Number 0 names nothing.
                "SERVICES" | "BACKENDS" if size < 2 => "at least 2",
                _ if size == 0 => "at least 1",
                _ => continue,
            };
            return Err(Error::Size { key, size, wanted });
        }
        Ok(())
    }

    /// The configured size of a map; `None`: it has but one.
    pub fn of(&self, map: &str) -> Option<u32> {
        Some(match map {
            "FRONTENDS" => self.frontends,
            "SERVICES" => self.services,
            "SLOTS" => self.slots,
            "BACKENDS" | "HEALTH" | "BACKEND_INDEX" => self.backends,
            "PODS" => self.pods,
            "LISTENERS" => self.listeners,
            "AFFINITY" => self.affinity,
            "SUSPECTS" => self.suspects,
            "REBINDS" => self.rebinds,
            "MESH" => self.mesh,
            "INBOUND" => self.pods.saturating_mul(abi::MAX_INBOUND / abi::MAX_PODS),
            "EVENTS" => self.events_bytes,
            _ => return None,
        })
    }
}

pub fn size_key(map: &str) -> &'static str {
    SIZED.iter().find(|(name, _)| *name == map).map_or("", |(_, key)| key)
}

/// A hash map by descriptor; clones share it.
#[derive(Clone, Debug)]
pub struct HashMap {
    pub name: &'static str,
    pub size: u32,
    fd: Arc<OwnedFd>,
}

impl HashMap {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn get<K: Pod, V: Pod + Default>(&self, key: &K) -> Result<Option<V>, Error> {
        sys::map_lookup(self.fd(), key).map_err(|source| self.failed("a lookup", source))
    }

    pub fn put<K: Pod, V: Pod>(&self, key: &K, value: &V) -> Result<(), Error> {
        sys::map_update(self.fd(), key, value).map_err(|source| self.failed("an update", source))
    }

    pub fn delete<K: Pod>(&self, key: &K) -> Result<bool, Error> {
        sys::map_delete(self.fd(), key).map_err(|source| self.failed("a deletion", source))
    }

    pub fn take<K: Pod, V: Pod + Default>(&self, key: &K) -> Result<Option<V>, Error> {
        sys::map_take(self.fd(), key).map_err(|source| self.failed("a lookup with deletion", source))
    }

    pub fn entries<K: Pod + Default, V: Pod + Default>(&self) -> Result<Vec<(K, V)>, Error> {
        sys::map_entries(self.fd()).map_err(|source| self.failed("reading it", source))
    }

    pub fn failed(&self, doing: &'static str, source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::E2BIG) => Error::MapFull { map: self.name, size: self.size, key: size_key(self.name) },
            _ => Error::Map { map: self.name, doing, source },
        }
    }
}

/// Whether keys and values are as long as this agent takes them to be.
pub fn checked<K, V>(map: &'static str, fd: &OwnedFd) -> Result<sys::MapInfo, Error> {
    let info =
        sys::map_info(fd.as_fd()).map_err(|source| Error::Map { map, doing: "asking for its layout", source })?;
    let (found, expected) = ((info.key_size, info.value_size), (size_of::<K>() as u32, size_of::<V>() as u32));
    if found == expected { Ok(info) } else { Err(Error::Layout { map, found, expected }) }
}

/// Where maps are opened from.
struct Pins<'a, F> {
    pin: F,
    sizes: &'a Sizes,
    writable: bool,
}

impl<F: Fn(&str) -> PathBuf> Pins<'_, F> {
    fn open<K, V>(&self, name: &'static str) -> Result<(OwnedFd, sys::MapInfo), Error> {
        let path = (self.pin)(name);
        // Not read-only even for a look: the kernel maps arrays only for descriptors that may write.
        let map = sys::open_pin(&path).map_err(|source| pin_error(&path, source))?;
        let info = checked::<K, V>(name, &map)?;
        Ok((map, info))
    }

    fn hash<K, V>(&self, name: &'static str) -> Result<HashMap, Error> {
        let (map, _) = self.open::<K, V>(name)?;
        Ok(HashMap { name, size: self.sizes.of(name).unwrap_or(0), fd: Arc::new(map) })
    }

    fn array<T: Pod>(&self, name: &'static str, size: u32) -> Result<MappedArray<T>, Error> {
        let (map, _) = self.open::<u32, T>(name)?;
        MappedArray::new(map, size, self.writable).map_err(|source| Error::Map { map: name, doing: "mmap", source })
    }
}

/// All maps of the object that the agent reads or writes.
#[derive(Debug)]
pub struct Maps {
    pub frontends: HashMap,
    pub slots: HashMap,
    pub backend_index: HashMap,
    pub pods: HashMap,
    pub listeners: HashMap,
    pub affinity: HashMap,
    pub suspects: HashMap,
    pub rebinds: HashMap,
    pub mesh: HashMap,
    pub tunnelled: HashMap,
    pub inbound: HashMap,
    /// By descriptor of the socket.
    pub sockets: HashMap,
    pub services: MappedArray<abi::Service>,
    pub backends: MappedArray<abi::Backend>,
    pub health: MappedArray<u64>,
    pub settings: MappedArray<abi::Settings>,
    pub rebound: MappedArray<u64>,
    pub stats: OwnedFd,
    /// [`abi::Settings::maps`].
    pub number: u32,
}

impl Maps {
    /// Opens the pins. `writable` false: for a look from outside.
    pub fn open(pin: impl Fn(&str) -> PathBuf, sizes: &Sizes, writable: bool) -> Result<Self, Error> {
        let pins = Pins { pin, sizes, writable };
        Ok(Self {
            number: pins.open::<u32, abi::Settings>("SETTINGS")?.1.id,
            frontends: pins.hash::<abi::Endpoint, abi::Frontend>("FRONTENDS")?,
            slots: pins.hash::<abi::SlotKey, abi::Slot>("SLOTS")?,
            backend_index: pins.hash::<abi::Endpoint, u32>("BACKEND_INDEX")?,
            pods: pins.hash::<u64, abi::Pod>("PODS")?,
            listeners: pins.hash::<abi::ListenerKey, i32>("LISTENERS")?,
            affinity: pins.hash::<abi::AffinityKey, abi::Affinity>("AFFINITY")?,
            suspects: pins.hash::<abi::SuspectKey, abi::Suspects>("SUSPECTS")?,
            rebinds: pins.hash::<abi::FlowKey, abi::Rebind>("REBINDS")?,
            mesh: pins.hash::<abi::Addr, abi::MeshAddress>("MESH")?,
            tunnelled: pins.hash::<abi::LocalConnection, abi::Tunnelled>("TUNNELLED")?,
            inbound: pins.hash::<abi::Addr, u32>("INBOUND")?,
            sockets: pins.hash::<i32, abi::Socket>("SOCKETS")?,
            services: pins.array("SERVICES", sizes.services)?,
            backends: pins.array("BACKENDS", sizes.backends)?,
            health: pins.array("HEALTH", sizes.backends)?,
            settings: pins.array("SETTINGS", 1)?,
            rebound: pins.array("REBOUND", 1)?,
            stats: pins.open::<u32, u64>("STATS")?.0,
        })
    }

    /// The counters, summed over the CPUs.
    pub fn stats(&self) -> Vec<(abi::Stat, u64)> {
        let mut values = vec![0; aya::util::nr_cpus().unwrap_or(1024)];
        abi::Stat::ALL
            .iter()
            .map(|stat| {
                let read = sys::map_lookup_per_cpu(self.stats.as_fd(), *stat as u32, &mut values);
                (*stat, if read.is_ok() { values.iter().sum() } else { 0 })
            })
            .collect()
    }
}

fn pin_error(path: &Path, source: io::Error) -> Error {
    Error::Pin { path: path.to_owned(), doing: "opening", source }
}
