//! Raw `bpf()` calls that aya does not offer: link create and update, pins, batches, object info.
//!
//! Each is one function with the attribute struct as `include/uapi/linux/bpf.h` lays it out; the
//! kernel takes a shorter struct than its own as one that is zero from there on.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya::Pod;

const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const MAP_LOOKUP_AND_DELETE_ELEM: i32 = 21;
const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const OBJ_GET: i32 = 7;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;
const RAW_TRACEPOINT_OPEN: i32 = 17;
const MAP_LOOKUP_BATCH: i32 = 24;
const MAP_UPDATE_BATCH: i32 = 26;
const LINK_CREATE: i32 = 28;
const LINK_UPDATE: i32 = 29;
const LINK_DETACH: i32 = 34;

/// `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Attach {
    CgroupSockOps = 3,
    CgroupInet4Connect = 10,
    CgroupInet6Connect = 11,
    CgroupUdp4Sendmsg = 14,
    CgroupUdp6Sendmsg = 15,
    CgroupUdp4Recvmsg = 19,
    CgroupUdp6Recvmsg = 20,
    CgroupInet4Getpeername = 29,
    CgroupInet6Getpeername = 30,
    /// Of a network namespace.
    SkLookup = 36,
    TcxIngress = 46,
    TcxEgress = 47,
}

fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is a #[repr(C)] struct that lives across the call, its size is passed, and
    // the pointers in it point to buffers that the callers below keep alive and large enough.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: `fd` was just returned by a bpf() command that makes a descriptor; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Element {
    fn new<K>(map: BorrowedFd<'_>, key: &K, value: u64) -> Self {
        Self { map_fd: map.as_raw_fd() as u32, _pad: 0, key: std::ptr::from_ref(key) as u64, value, flags: 0 }
    }
}

pub fn map_lookup<K: Pod, V: Pod + Default>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    read_element(MAP_LOOKUP_ELEM, map, key)
}

/// Looks it up and deletes it, in one call (Linux 5.14, commit 3e87f192b405).
pub fn map_take<K: Pod, V: Pod + Default>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    read_element(MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

fn read_element<K: Pod, V: Pod + Default>(command: i32, map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attributes = Element::new(map, key, std::ptr::from_mut(&mut value) as u64);
    match bpf(command, &mut attributes) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A per-CPU element: one value per possible CPU, each padded to 8 bytes.
pub fn map_lookup_per_cpu(map: BorrowedFd<'_>, key: u32, values: &mut [u64]) -> io::Result<()> {
    let mut attributes = Element::new(map, &key, values.as_mut_ptr() as u64);
    bpf(MAP_LOOKUP_ELEM, &mut attributes).map(drop)
}

pub fn map_update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attributes = Element::new(map, key, std::ptr::from_ref(value) as u64);
    bpf(MAP_UPDATE_ELEM, &mut attributes).map(drop)
}

/// Whether there was such an element.
pub fn map_delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    match bpf(MAP_DELETE_ELEM, &mut Element::new(map, key, 0)) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Updates `keys[i]` to `values[i]`, in order. On an error, how many were done before it.
pub fn map_update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    assert_eq!(keys.len(), values.len(), "one value per key");
    let mut attributes = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    match bpf(MAP_UPDATE_BATCH, &mut attributes) {
        Ok(_) => Ok(()),
        Err(error) => {
            // The kernel writes the count back whenever it got as far as the elements; it fails
            // before that only on attributes that it does not know.
            let done = if error.raw_os_error() == Some(libc::EINVAL) { 0 } else { attributes.count as usize };
            Err((done.min(keys.len()), error))
        }
    }
}

/// Where a walk over a hash map stands: opaque, the kernel's bucket number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor(Option<u32>);

impl Cursor {
    pub const fn is_start(&self) -> bool {
        self.0.is_none()
    }
}

/// The next elements of a hash map; at most `room` of them. The cursor is back at the start when
/// the walk is over.
pub fn map_lookup_batch<K: Pod + Default, V: Pod + Default>(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    room: usize,
) -> io::Result<Vec<(K, V)>> {
    let mut room = room.max(1);
    loop {
        let mut keys = vec![K::default(); room];
        let mut values = vec![V::default(); room];
        let mut next = 0_u32;
        let mut attributes = Batch {
            in_batch: cursor.0.as_ref().map_or(0, |at| std::ptr::from_ref(at) as u64),
            out_batch: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        match bpf(MAP_LOOKUP_BATCH, &mut attributes) {
            Ok(_) => *cursor = Cursor(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => *cursor = Cursor(None),
            // One bucket holds more than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        }
        let count = (attributes.count as usize).min(room);
        return Ok(keys.into_iter().zip(values).take(count).collect());
    }
}

/// Every element of a hash map.
pub fn map_entries<K: Pod + Default, V: Pod + Default>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut cursor = Cursor::default();
    let mut all = Vec::new();
    loop {
        all.extend(map_lookup_batch(map, &mut cursor, 4096)?);
        if cursor.is_start() {
            return Ok(all);
        }
    }
}

#[repr(C)]
struct ObjectAttributes {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes =
        ObjectAttributes { pathname: path.as_ptr() as u64, bpf_fd: fd.as_raw_fd() as u32, file_flags: 0 };
    bpf(OBJ_PIN, &mut attributes).map(drop)
}

/// Opens a pin.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = ObjectAttributes { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    bpf(OBJ_GET, &mut attributes).map(owned)
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// tcx: relative_fd (none) and expected_revision (any).
    extra: [u64; 2],
}

/// `target` is the descriptor of a cgroup or network namespace or, for tcx, an interface index.
pub fn link_create(program: BorrowedFd<'_>, target: u32, attach: Attach) -> io::Result<OwnedFd> {
    let mut attributes =
        LinkCreate { prog_fd: program.as_raw_fd() as u32, target, attach_type: attach as u32, flags: 0, extra: [0; 2] };
    bpf(LINK_CREATE, &mut attributes).map(owned)
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Puts another program behind a link, atomically.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdate {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(LINK_UPDATE, &mut attributes).map(drop)
}

#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// Takes the program off at once (5.9), whoever holds the link still. Not of raw tracepoints.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut LinkDetach { link_fd: link.as_raw_fd() as u32 }).map(drop)
}

#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    _pad: u32,
}

pub fn raw_tracepoint_open(program: BorrowedFd<'_>, tracepoint: &str) -> io::Result<OwnedFd> {
    let name = CString::new(tracepoint)?;
    let mut attributes = RawTracepointOpen { name: name.as_ptr() as u64, prog_fd: program.as_raw_fd() as u32, _pad: 0 };
    bpf(RAW_TRACEPOINT_OPEN, &mut attributes).map(owned)
}

/// `enum bpf_prog_type`, as far as programs are loaded for a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ProgramKind {
    SchedClassifier = 3,
    RawTracepoint = 17,
}

#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// A program that does nothing: `r0 = -1` (tc: the next program decides), `exit`.
pub fn load_nothing(kind: ProgramKind) -> io::Result<OwnedFd> {
    let instructions = [0xffff_ffff_0000_00b7_u64, 0x0000_0000_0000_0095];
    let mut attributes = ProgramLoad {
        kind: kind as u32,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    bpf(PROG_LOAD, &mut attributes).map(owned)
}

/// To its end: kernels from 6.17 on write `revision`, however short a struct they were passed (commit 120933984460;
/// mended by 21c4b99b27f3 in 7.2).
#[repr(C)]
struct ProgramQuery {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    _pad: u32,
    _later: [u64; 3],
    _revision: u64,
}

const _: () = assert!(size_of::<ProgramQuery>() == 64);

/// The identifiers of the programs that run at a cgroup's hook, those of its ancestors included.
pub fn cgroup_programs(cgroup: BorrowedFd<'_>, attach: Attach) -> io::Result<Vec<u32>> {
    /// `BPF_F_QUERY_EFFECTIVE`.
    const EFFECTIVE: u32 = 1;
    // 64 per cgroup is the kernel's limit (BPF_CGROUP_MAX_PROGS); a few levels of them fit.
    let mut ids = vec![0_u32; 512];
    let mut attributes = ProgramQuery {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: attach as u32,
        query_flags: EFFECTIVE,
        attach_flags: 0,
        program_ids: ids.as_mut_ptr() as u64,
        program_count: ids.len() as u32,
        _pad: 0,
        _later: [0; 3],
        _revision: 0,
    };
    bpf(PROG_QUERY, &mut attributes)?;
    ids.truncate(attributes.program_count as usize);
    Ok(ids)
}

#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The start of `struct bpf_link_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    pub kind: u32,
    pub id: u32,
    pub program_id: u32,
    _pad: u32,
    /// cgroup: its id (0: the cgroup is gone); tcx and network namespace: in the low half the interface's index or the
    /// namespace's inode number (0: it is gone).
    target: u64,
    attach_type: u32,
    _reserved: [u32; 7],
}

/// `enum bpf_link_type`.
pub const LINK_RAW_TRACEPOINT: u32 = 1;
pub const LINK_CGROUP: u32 = 3;
pub const LINK_NETNS: u32 = 4;
pub const LINK_TCX: u32 = 11;

impl LinkInfo {
    /// What the link hangs on: cgroup id, interface index, inode of a network namespace; 0 when that is gone.
    pub const fn target(&self) -> u64 {
        match self.kind {
            LINK_TCX | LINK_NETNS => self.target & 0xffff_ffff,
            LINK_CGROUP => self.target,
            _ => 0,
        }
    }
}

pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attributes = GetInfo {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// The start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let mut attributes = GetInfo {
        bpf_fd: map.as_raw_fd() as u32,
        info_len: size_of::<MapInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// Has the allocator keep up to 16 MiB of freed memory instead of unmapping it: buffers of 64 KiB come and go with every few
/// packets of the tunnel. glibc's default is 128 KiB, with which a quarter of a bulk receiver's time goes into page
/// faults. Call once, before the tunnel's threads start.
pub fn keep_heap() {
    #[cfg(target_env = "gnu")]
    {
        const KEPT: libc::c_int = 16 << 20;
        // Larger than any buffer there, 1 MiB frames of other proxies included.
        const MAPPED: libc::c_int = 4 << 20;
        for (parameter, bytes) in [(libc::M_TRIM_THRESHOLD, KEPT), (libc::M_MMAP_THRESHOLD, MAPPED)] {
            // SAFETY: it sets a parameter of the allocator, under the allocator's own lock.
            unsafe { libc::mallopt(parameter, bytes) };
        }
    }
}

/// Gives memory that the allocator keeps for later back to the system.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that could be wrong; glibc locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}
