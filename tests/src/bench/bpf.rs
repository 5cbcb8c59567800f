//! A look from outside at an agent's programs and maps: run times, health words, a socket's choice.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use anyhow::{Context, Result, bail};
use dataplane_ebpf::abi::{self, Stat};

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const OBJ_GET: libc::c_int = 7;
const PROG_GET_NEXT_ID: libc::c_int = 11;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is a #[repr(C)] prefix of `union bpf_attr`, its size is passed, and the
    // pointers in it are to buffers that the callers below keep alive and large enough.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: bpf() has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn open_pin(path: &Path) -> Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    Ok(owned(bpf(OBJ_GET, &mut attributes).with_context(|| format!("open the pin {}", path.display()))?))
}

fn info<T: Copy>(fd: BorrowedFd<'_>, mut info: T) -> io::Result<T> {
    #[repr(C)]
    struct Attributes {
        fd: u32,
        len: u32,
        info: u64,
    }
    let len = size_of::<T>() as u32;
    let mut attributes = Attributes { fd: fd.as_raw_fd() as u32, len, info: std::ptr::from_mut(&mut info) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// `struct bpf_link_info` as far as it is needed.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _rest: [u32; 13],
}

/// `struct bpf_prog_info` up to the run counters.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgramInfo {
    _kind: u32,
    _id: u32,
    _tag: [u8; 8],
    _code: [u64; 4],
    _uid: u32,
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
    _middle: [u64; 14],
    run_time_ns: u64,
    run_count: u64,
}

const _: () = assert!(std::mem::offset_of!(ProgramInfo, name) == 64);
const _: () = assert!(std::mem::offset_of!(ProgramInfo, run_time_ns) == 192);

/// An agent's pins: `<bpffs>/<name>`.
#[derive(Clone, Debug)]
pub struct Pins(PathBuf);

impl Pins {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The state maps and the flow maps are in directories of their own, named by their layout; those
    /// of a layout that is not in force have a prefix.
    fn map(&self, name: &str) -> Result<OwnedFd> {
        let dirs = std::fs::read_dir(&self.0).with_context(|| format!("list {}", self.0.display()))?;
        let in_force = |dir: &Path| {
            !["new-", "old-"]
                .iter()
                .any(|prefix| dir.file_name().is_some_and(|name| name.as_bytes().starts_with(prefix.as_bytes())))
        };
        let pin = dirs
            .flatten()
            .map(|dir| dir.path())
            .filter(|dir| in_force(dir))
            .map(|dir| dir.join(name))
            .find(|path| path.exists());
        open_pin(&pin.with_context(|| format!("no map {name} is pinned below {}", self.0.display()))?)
    }

    /// A program by its pinned link.
    pub fn linked(&self, name: &'static str) -> Result<Program> {
        let link = open_pin(&self.0.join("links").join(name))?;
        let id = info(link.as_fd(), LinkInfo::default()).with_context(|| format!("info of link {name}"))?.program;
        Ok(Program { name, fd: program_by_id(id).with_context(|| format!("open program {name}"))? })
    }

    /// A program that is attached per pod, by name and by the health map it uses: other agents of the
    /// machine have programs of the same name.
    pub fn using_our_maps(&self, name: &'static str) -> Result<Program> {
        #[repr(C)]
        struct Next {
            start: u32,
            next: u32,
            flags: u32,
        }
        // The kernel keeps 15 bytes of a name.
        let short = &name.as_bytes()[..name.len().min(15)];
        let map = info(self.map("SETTINGS")?.as_fd(), [0u32; 2])?[1];
        let mut next = Next { start: 0, next: 0, flags: 0 };
        while bpf(PROG_GET_NEXT_ID, &mut next).is_ok() {
            next.start = next.next;
            let Ok(fd) = program_by_id(next.next) else { continue };
            let mut maps = [0u32; 64];
            let asked = ProgramInfo { map_count: 64, map_ids: maps.as_mut_ptr() as u64, ..Default::default() };
            let found = info(fd.as_fd(), asked)?;
            if found.name.starts_with(short) && maps.contains(&map) {
                return Ok(Program { name, fd });
            }
        }
        bail!("no program {name} uses the maps below {}: is the pod enrolled?", self.0.display())
    }

    pub fn health(&self) -> Result<Words> {
        Words::map(self.map("HEALTH")?, abi::MAX_BACKENDS as usize)
    }

    pub fn settings(&self) -> Result<Words> {
        Words::map(self.map("SETTINGS")?, size_of::<abi::Settings>() / 8)
    }

    /// The number of rebound flows, which spares packets the lookup while it is 0.
    pub fn rebound(&self) -> Result<Words> {
        Words::map(self.map("REBOUND")?, 1)
    }

    pub fn sockets(&self) -> Result<Sockets> {
        Ok(Sockets(self.map("SOCKETS")?))
    }

    /// A backend's number.
    pub fn backend(&self, at: &abi::Endpoint) -> Result<u32> {
        let mut id = 0u32;
        lookup(self.map("BACKEND_INDEX")?.as_fd(), at, &mut id)
            .with_context(|| format!("{at:?} is not in BACKEND_INDEX"))?;
        Ok(id)
    }

    /// A counter, over all CPUs.
    pub fn stat(&self, stat: Stat) -> Result<u64> {
        let mut values = vec![0u64; aya::util::nr_cpus().map_err(|(_, error)| error)?];
        lookup(self.map("STATS")?.as_fd(), &(stat as u32), values.as_mut_slice())
            .with_context(|| format!("read counter {}", stat.name()))?;
        Ok(values.iter().sum())
    }
}

fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attributes = [id, 0, 0];
    bpf(PROG_GET_FD_BY_ID, &mut attributes).map(owned)
}

fn lookup<K, V: ?Sized>(map: BorrowedFd<'_>, key: &K, value: &mut V) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        _pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let value = std::ptr::from_mut(value).cast::<u8>() as u64;
    let key = std::ptr::from_ref(key) as u64;
    let mut attributes = Attributes { map: map.as_raw_fd() as u32, _pad: 0, key, value, flags: 0 };
    bpf(MAP_LOOKUP_ELEM, &mut attributes).map(drop)
}

/// A loaded program, for its run counters.
pub struct Program {
    pub name: &'static str,
    fd: OwnedFd,
}

/// Runs of a program and the time they took, since it was loaded; counted while [`count_runs`]
/// is in force.
#[derive(Clone, Copy, Debug, Default)]
pub struct Runs {
    pub count: u64,
    pub ns: u64,
}

impl Runs {
    pub fn since(self, before: Self) -> Self {
        Self { count: self.count - before.count, ns: self.ns - before.ns }
    }

    pub fn mean_ns(self) -> f64 {
        self.ns as f64 / self.count as f64
    }
}

impl Program {
    pub fn runs(&self) -> Result<Runs> {
        let info = info(self.fd.as_fd(), ProgramInfo::default()).with_context(|| format!("info of {}", self.name))?;
        Ok(Runs { count: info.run_count, ns: info.run_time_ns })
    }

    /// What ran during `f`.
    pub fn during<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<(Runs, T)> {
        let before = self.runs()?;
        let result = f()?;
        Ok((self.runs()?.since(before), result))
    }
}

/// Have the kernel time every program run until the guard is dropped (`BPF_ENABLE_STATS`).
pub fn count_runs() -> Result<OwnedFd> {
    aya::sys::enable_stats(aya::sys::Stats::RunTime).context("BPF_ENABLE_STATS")
}

/// `SOCKETS`: what the hooks remember of a socket.
pub struct Sockets(OwnedFd);

impl Sockets {
    pub fn of(&self, socket: BorrowedFd<'_>) -> Option<abi::Socket> {
        // SAFETY: all-zero is a valid Socket: integers and arrays of them.
        let mut value: abi::Socket = unsafe { std::mem::zeroed() };
        lookup(self.0.as_fd(), &socket.as_raw_fd(), &mut value).ok()?;
        Some(value)
    }
}

/// An mmapable array of 64-bit words, shared with the programs.
pub struct Words {
    base: *const AtomicU64,
    len: usize,
    bytes: usize,
}

// SAFETY: the mapping lives as long as `self`, and is only reached as atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn map(fd: OwnedFd, len: usize) -> Result<Self> {
        let bytes = (len * 8).next_multiple_of(4096);
        // SAFETY: a fresh shared mapping of a map's values; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mmap a map");
        }
        Ok(Self { base: base.cast(), len, bytes })
    }

    pub fn word(&self, index: u32) -> &AtomicU64 {
        assert!((index as usize) < self.len, "word {index} of {}", self.len);
        // SAFETY: in bounds of the mapping, aligned to 8, and shared memory is only used atomically.
        unsafe { &*self.base.add(index as usize) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`.
        unsafe { libc::munmap(self.base.cast_mut().cast(), self.bytes) };
    }
}
