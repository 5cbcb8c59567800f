//! Where maps and links are pinned, and which of them belong to this agent's layout.
//!
//! ```text
//! <bpffs>/<name>/            locked (flock) by the agent that runs
//!   links/                   one pin per attached program
//!   <state hash>/            desired state and what the kernel learned of it
//!   flows-<flow hash>/       sockets and moved flows
//!   new-*                    being filled by an agent that has not activated it
//!   old-*                    replaced, links may not have moved yet
//! ```
//!
//! A directory gets its final name by one rename once it is complete, and the one it replaces is
//! renamed out of the way first: whatever bears a final name may be adopted, at whatever step the
//! agent before was killed.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use dataplane_ebpf::abi;

use super::{Config, error::Error, object::OBJECT};

/// Maps whose content outlives a change of the state layout.
pub const FLOW_MAPS: &[&str] = &["SOCKETS", "UDP_SOCKETS", "REBINDS", "REBOUND", "TUNNELLED", "DELIVERIES"];

const NEW: &str = "new-";
const OLD: &str = "old-";
const FLOWS: &str = "flows-";
const LINKS: &str = "links";

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// A map as the object defines it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapDefinition {
    pub name: String,
    kind: u32,
    key_size: u32,
    value_size: u32,
    pub max_entries: u32,
    flags: u32,
}

/// The object's maps (without its globals), with the configured sizes, by name.
pub fn definitions(config: &Config) -> Result<Vec<MapDefinition>, Error> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| Error::Load { message: error.to_string() })?;
    let mut definitions: Vec<_> = object
        .maps
        .iter()
        .filter(|(name, _)| !name.starts_with('.') && !name.starts_with("AYA_LOG"))
        .map(|(name, map)| MapDefinition {
            name: name.clone(),
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: config.sizes.of(name).unwrap_or_else(|| map.max_entries()),
            flags: map.map_flags(),
        })
        .collect();
    definitions.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(definitions)
}

/// The layout's names: (state directory, flow directory).
pub fn layout(config: &Config, definitions: &[MapDefinition]) -> (String, String) {
    let (mut state, mut flows) = (format!("{};{}", abi::LAYOUT, config.layout_salt), String::new());
    for map in definitions {
        let text = if FLOW_MAPS.contains(&map.name.as_str()) { &mut flows } else { &mut state };
        let _ = write!(text, "{map:?};");
    }
    (format!("{:016x}", fnv1a(state.as_bytes())), format!("{FLOWS}{:016x}", fnv1a(flows.as_bytes())))
}

/// FNV-1a, 64 bit: names directories, defends nothing.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// A directory of pins, under its final name or being filled.
#[derive(Clone, Debug)]
struct Directory {
    name: String,
    adopted: bool,
}

impl Directory {
    fn now(&self) -> String {
        if self.adopted { self.name.clone() } else { format!("{NEW}{}", self.name) }
    }
}

/// The pin directory of a running agent, locked.
#[derive(Debug)]
pub struct Pins {
    root: PathBuf,
    _lock: OwnedFd,
    state: Directory,
    flows: Directory,
}

impl Pins {
    /// Locks the directory, clears what a killed agent left half-done, and says which maps are there.
    pub fn open(config: &Config, definitions: &[MapDefinition]) -> Result<Self, Error> {
        let root = config.root();
        check_bpffs(&config.bpffs)?;
        let lock = lock(&root)?;
        make_dir(&root.join(LINKS))?;
        super::links::finish(&root.join(LINKS))?;
        for name in directories(&root)? {
            if name.starts_with(NEW) {
                remove_dir(&root.join(name))?;
            }
        }
        let (state, flows) = layout(config, definitions);
        let directory = |name: String| {
            let adopted = root.join(&name).is_dir();
            Directory { name, adopted }
        };
        let pins = Self { state: directory(state), flows: directory(flows), root: root.clone(), _lock: lock };
        make_dir(&pins.root.join(pins.state.now()))?;
        make_dir(&pins.root.join(pins.flows.now()))?;
        Ok(pins)
    }

    /// Whether the state maps are those of an agent before.
    pub fn adopted(&self) -> bool {
        self.state.adopted
    }

    pub fn layout(&self) -> &str {
        &self.state.name
    }

    pub fn map(&self, name: &str) -> PathBuf {
        let directory = if FLOW_MAPS.contains(&name) { &self.flows } else { &self.state };
        self.root.join(directory.now()).join(name)
    }

    pub fn links(&self) -> PathBuf {
        self.root.join(LINKS)
    }

    /// Another layout's state maps, which programs may be serving from.
    pub fn other_state(&self) -> Result<Option<PathBuf>, Error> {
        let other = |name: &String| {
            name != LINKS
                && *name != self.state.name
                && ![NEW, OLD, FLOWS].iter().any(|prefix| name.starts_with(prefix))
        };
        Ok(directories(&self.root)?.into_iter().find(other).map(|name| self.root.join(name)))
    }

    /// Gives the filled directories their final names. Links of the agent before still serve from
    /// the maps they know.
    pub fn publish(&mut self) -> Result<(), Error> {
        let keep = [self.state.name.clone(), self.flows.name.clone()];
        for name in directories(&self.root)? {
            if name != LINKS && !name.starts_with(NEW) && !name.starts_with(OLD) && !keep.contains(&name) {
                let aside = self.root.join(format!("{OLD}{name}"));
                remove_dir(&aside)?;
                rename(&self.root.join(&name), &aside)?;
            }
        }
        for directory in [&mut self.flows, &mut self.state] {
            if !directory.adopted {
                rename(&self.root.join(directory.now()), &self.root.join(&directory.name))?;
                directory.adopted = true;
            }
        }
        Ok(())
    }

    /// After the links moved: what they moved from.
    pub fn drop_old(&self) -> Result<(), Error> {
        for name in directories(&self.root)? {
            if name.starts_with(OLD) {
                remove_dir(&self.root.join(name))?;
            }
        }
        Ok(())
    }
}

/// The pins as they are, for a look from outside. `None`: nothing is there.
pub fn look(config: &Config) -> Result<Option<Vec<String>>, Error> {
    check_bpffs(&config.bpffs)?;
    let root = config.root();
    if root.is_dir() { directories(&root).map(Some) } else { Ok(None) }
}

/// Removes the whole directory; the links' pins must have been dealt with.
pub fn remove(config: &Config) -> Result<(), Error> {
    let root = config.root();
    for name in directories(&root)? {
        remove_dir(&root.join(name))?;
    }
    fs::remove_dir(&root).map_err(|source| Error::Pin { path: root, doing: "removing the directory", source })
}

fn check_bpffs(path: &Path) -> Result<(), Error> {
    match file_system(path) {
        Ok(BPF_FS_MAGIC) => Ok(()),
        _ => Err(Error::NoBpffs { path: path.to_owned() }),
    }
}

pub fn check_cgroup2(path: &Path) -> Result<(), Error> {
    match file_system(path) {
        Ok(CGROUP2_SUPER_MAGIC) => Ok(()),
        Ok(_) => Err(Error::NotCgroup2 { path: path.to_owned() }),
        Err(source) => Err(Error::Cgroup { path: path.to_owned(), source }),
    }
}

fn file_system(path: &Path) -> io::Result<i64> {
    let stat = nix::sys::statfs::statfs(path)?;
    #[allow(clippy::unnecessary_cast, reason = "f_type's width differs between architectures")]
    Ok(stat.filesystem_type().0 as i64)
}

/// The root of the cgroup2 hierarchy: hybrid hosts have it elsewhere than /sys/fs/cgroup.
pub fn cgroup2_root() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    find_cgroup2(&mounts).ok_or(Error::NoCgroup2)
}

/// proc_pid_mountinfo(5): id parent dev root mount-point options … - type source options.
fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    let mut found = None;
    for line in mountinfo.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        if kind.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let mut fields = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
        let point = PathBuf::from(point.replace("\\040", " "));
        if root == "/" {
            return Some(point);
        }
        found = found.or(Some(point));
    }
    found
}

/// Takes the lock on the directory itself: it needs no file elsewhere and goes with its holder.
pub fn lock(root: &Path) -> Result<OwnedFd, Error> {
    loop {
        make_dir(root)?;
        let failed = |doing| move |source| Error::Pin { path: root.to_owned(), doing, source };
        let directory = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(root)
            .map_err(failed("opening"))?;
        // SAFETY: flock on a descriptor that is ours.
        if unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let source = io::Error::last_os_error();
            if source.kind() != io::ErrorKind::WouldBlock {
                return Err(Error::Pin { path: root.to_owned(), doing: "locking", source });
            }
            let inode = directory.metadata().map_or(0, |metadata| metadata.ino());
            return Err(Error::Locked { path: root.to_owned(), holder: lock_holder(inode) });
        }
        // Between open and lock `hitless uninstall` may have removed it: then lock the next one.
        let ours = directory.metadata().map(|metadata| metadata.ino()).map_err(failed("reading"))?;
        if fs::metadata(root).is_ok_and(|metadata| metadata.ino() == ours) {
            return Ok(directory.into());
        }
    }
}

/// Who holds the lock on a pin directory, if anybody in this pid namespace does. Takes no lock itself.
pub fn holder(root: &Path) -> Option<String> {
    lock_owner(fs::metadata(root).ok()?.ino()).map(|pid| format!("process {pid}"))
}

fn lock_holder(inode: u64) -> String {
    lock_owner(inode)
        .map_or_else(|| "its process is in another pid namespace".to_owned(), |pid| format!("process {pid}"))
}

/// proc_locks(5): `1: FLOCK  ADVISORY  WRITE 123 00:2a:4711 0 EOF`.
fn lock_owner(inode: u64) -> Option<i32> {
    let suffix = format!(":{inode}");
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    locks
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|fields| fields.get(1) == Some(&"FLOCK") && fields.get(5).is_some_and(|id| id.ends_with(&suffix)))
        .and_then(|fields| fields[4].parse::<i32>().ok())
        .filter(|pid| *pid > 0)
}

fn make_dir(path: &Path) -> Result<(), Error> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            if source.kind() == io::ErrorKind::PermissionDenied {
                return Err(Error::NotPermitted);
            }
            Err(Error::Pin { path: path.to_owned(), doing: "making the directory", source })
        }
        _ => Ok(()),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(|source| Error::Pin { path: from.to_owned(), doing: "renaming", source })
}

/// The names of the directories in `root`.
fn directories(root: &Path) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Pin { path: root.to_owned(), doing: "reading", source };
    let mut names = Vec::new();
    for entry in fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.path().is_dir() {
            names.extend(entry.file_name().into_string().map_err(|name: OsString| {
                failed(io::Error::new(io::ErrorKind::InvalidData, format!("{} is not hitless's", name.display())))
            }));
        }
    }
    names.sort();
    Ok(names)
}

/// A directory of pins with all that is in it; fine when it is not there.
fn remove_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::Pin { path: path.to_owned(), doing: "removing", source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_root_is_found_on_hybrid_hosts_too() {
        let hybrid = "30 20 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 20 0:26 /kubepods /mnt/part rw - cgroup2 cgroup2 rw\n\
                      32 20 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_cgroup2("30 20 0:25 / / rw - ext4 /dev/vda rw\n"), None);
    }

    #[test]
    fn another_size_or_salt_is_another_layout_and_flows_outlive_it() {
        let config = Config::default();
        let definitions = definitions(&config).expect("the embedded object parses");
        let salted = Config { layout_salt: "x".into(), ..Config::default() };
        let (state, flows) = layout(&config, &definitions);
        let (state_salted, flows_salted) = layout(&salted, &definitions);
        assert_ne!(state, state_salted);
        assert_eq!(flows, flows_salted);
        let mut larger = Config::default();
        larger.sizes.slots *= 2;
        assert_ne!(state, layout(&larger, &super::definitions(&larger).expect("parses")).0);
    }
}
