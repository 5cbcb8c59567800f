//! The kernel side of the agent: maps written, adopted and moved from, whatever it was killed at.
//!
//! Each test has a BPF file system and a cgroup of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::Ipv4Addr,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use dataplane_ebpf::{
    abi::{self, Addr, Backend, Endpoint, Frontend, PROTO_TCP, Service, Slot, SlotKey},
    health::{Input, State},
};
use dataplane_user::{
    kernel::{self, Config, Error, Kernel, Opened},
    registry::{Seed, change::Change},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A BPF file system and a cgroup that go with the test.
struct Scratch {
    bpffs: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let bpffs = tempfile::Builder::new().prefix("hitless-test-bpf").tempdir().expect("a directory");
        mount(Some("bpf"), bpffs.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("mounting bpffs needs root");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = kernel::cgroup2_root().expect("a cgroup2 hierarchy");
        let cgroup = root.join(format!("hitless-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&cgroup).expect("a cgroup");
        Self { bpffs, cgroup }
    }

    fn config(&self) -> Config {
        Config { cgroup: Some(self.cgroup.clone()), bpffs: self.bpffs.path().to_owned(), ..Config::default() }
    }

    fn open(&self) -> Opened {
        Kernel::open(self.config()).expect("opens")
    }

    /// The names of the directories of pins.
    fn directories(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.config().root())
            .expect("installed")
            .map(|entry| entry.expect("listed").file_name().into_string().expect("ASCII"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = umount2(self.bpffs.path(), MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

fn at(address: u32, port: u16) -> Endpoint {
    Endpoint::new(Addr::v4(u32::from(Ipv4Addr::from(0x0a00_0000 + address)).to_be()), port.to_be(), PROTO_TCP)
}

fn add_backend(id: u32, generation: u32) -> Change {
    let backend = Backend { at: at(id, 8080), generation, ..Backend::default() };
    Change::AddBackend { id, backend, state: State::Ready }
}

/// A service of `backends` backends, as the registry would have it written.
fn service(id: u32, backends: std::ops::Range<u32>) -> Vec<Change> {
    let ready = backends.len() as u32;
    let mut changes: Vec<_> = backends.clone().map(|backend| add_backend(backend, 1)).collect();
    changes.extend(backends.enumerate().map(|(index, backend)| {
        let key = SlotKey { service: id, index: index as u32 };
        Change::PutSlot(key, Slot { backend, generation: 1, service: id, weight: 1 })
    }));
    changes.push(Change::PutService(Service { id, ready, max_weight: 1, ..Service::default() }));
    let frontend = at(0x10_0000 + id, 80);
    changes.push(Change::PutFrontend(frontend, Frontend { service: id, check: frontend.check() }));
    changes
}

fn write_all(kernel: &mut Kernel, changes: &[Change]) {
    let rejected = kernel.write(changes);
    assert!(rejected.is_empty(), "{rejected:?}");
}

fn sorted(mut seed: Seed) -> Seed {
    seed.frontends.sort_by_key(|(at, _)| *at);
    seed.slots.sort_by_key(|(key, _)| *key);
    seed
}

#[test]
fn what_is_written_is_what_a_restarted_agent_finds() {
    let scratch = Scratch::new();
    let mut first = scratch.open();
    assert!(!first.adopted && first.seed.is_empty());
    write_all(&mut first.kernel, &service(7, 1..101));
    first.kernel.activate().expect("attaches");
    write_all(&mut first.kernel, &service(8, 200..203));
    write_all(
        &mut first.kernel,
        &[
            Change::Health { id: 5, generation: 1, input: Input::StopSignal },
            Change::Health { id: 6, generation: 9, input: Input::StopSignal },
            Change::Health { id: 201, generation: 1, input: Input::Removed },
            Change::DeleteSlot(SlotKey { service: 8, index: 2 }),
            Change::RemoveBackend { id: 201, at: at(201, 8080) },
        ],
    );
    // As good as a kill -9: nothing is done on the way out.
    drop(first);
    let second = scratch.open();
    assert!(second.adopted);
    let seed = sorted(second.seed);
    assert_eq!(seed.services.iter().map(|s| (s.id, s.ready)).collect::<Vec<_>>(), [(7, 100), (8, 3)]);
    assert_eq!(seed.slots.len(), 102);
    assert_eq!(seed.frontends.len(), 2);
    assert_eq!(seed.backends.len(), 102);
    assert_eq!(seed.retired, [(201, 1)], "its generation must not come again");
    let state = |id| second.kernel.health(id).state();
    assert_eq!((state(4), state(5), state(6)), (State::Ready, State::Draining, State::Ready));
    let indexed = second.kernel.occupancy().expect("read");
    assert!(indexed.iter().any(|map| map.map == "BACKEND_INDEX" && map.used == 102), "{indexed:?}");
}

#[test]
fn a_second_agent_is_told_who_holds_the_pins() {
    let scratch = Scratch::new();
    let _first = scratch.open();
    match Kernel::open(scratch.config()).err() {
        Some(Error::Locked { holder, .. }) => assert_eq!(holder, format!("process {}", std::process::id())),
        other => panic!("{other:?}"),
    }
    assert!(matches!(kernel::uninstall(&scratch.config()), Err(Error::Locked { .. })));
}

#[test]
fn a_full_map_is_named_with_its_size_and_key_and_the_rest_is_written() {
    let scratch = Scratch::new();
    let mut config = scratch.config();
    config.sizes.slots = 64;
    config.sizes.backends = 128;
    let mut opened = Kernel::open(config).expect("opens");
    let changes = service(1, 1..101);
    let rejected = opened.kernel.write(&changes);
    assert!(!rejected.is_empty() && rejected.len() <= 36, "{}", rejected.len());
    let text = rejected[0].error.to_string();
    assert!(text.contains("SLOTS") && text.contains("64") && text.contains("--sizes slots="), "{text}");
    assert!(matches!(changes[rejected[0].index], Change::PutSlot(..)));
    let rejected = opened.kernel.write(&[add_backend(128, 1), add_backend(120, 1)]);
    assert_eq!(rejected.len(), 1);
    assert!(rejected[0].error.to_string().contains("--sizes backends="), "{}", rejected[0].error);
    assert_eq!(opened.kernel.health(120).state(), State::Ready);
}

#[test]
fn another_layout_is_filled_before_anything_moves_and_the_old_pins_go_after() {
    let scratch = Scratch::new();
    let mut first = scratch.open();
    write_all(&mut first.kernel, &service(1, 1..4));
    first.kernel.activate().expect("attaches");
    let learned = |id, input| Change::Health { id, generation: 1, input };
    write_all(&mut first.kernel, &[learned(2, Input::StopSignal), learned(3, Input::ListenerClosed)]);
    let before = scratch.directories();
    drop(first);
    let salted = Config { layout_salt: "next".into(), ..scratch.config() };
    let mut second = Kernel::open(salted.clone()).expect("opens");
    assert!(!second.adopted, "another layout's maps are not adopted");
    write_all(&mut second.kernel, &service(1, 1..4));
    for name in &before {
        assert!(scratch.directories().contains(name), "{name} went before the links moved");
    }
    let attached = second.kernel.activate().expect("moves the links");
    assert!(attached.iter().any(|(name, how)| *name == "hitless_connect4" && *how == kernel::Attached::Updated));
    let states: Vec<_> = (1..4).map(|id| second.kernel.health(id).state()).collect();
    assert_eq!(states, [State::Ready, State::Draining, State::Refusing], "what only the node knew is kept");
    let after = scratch.directories();
    assert_eq!(after.len(), before.len(), "{after:?}");
    let flows = |names: &[String]| names.iter().find(|name| name.starts_with("flows-")).cloned();
    assert_eq!(flows(&before), flows(&after), "moved flows are kept");
    assert!(after.contains(&second.kernel.layout().to_owned()));
    drop(second);
    assert!(Kernel::open(salted).expect("opens").adopted);
}

#[test]
fn uninstall_leaves_nothing() {
    let scratch = Scratch::new();
    let mut opened = scratch.open();
    write_all(&mut opened.kernel, &service(1, 1..4));
    opened.kernel.activate().expect("attaches");
    let seen = kernel::snapshot(&scratch.config()).expect("readable beside the agent").expect("installed");
    assert!(seen.links.iter().all(|link| link.attached) && !seen.links.is_empty(), "{:?}", seen.links);
    assert_eq!(attached_to(&scratch.cgroup).len(), CGROUP_HOOKS.len());
    drop(opened);
    let removed = kernel::uninstall(&scratch.config()).expect("removes");
    assert_eq!(removed.links, seen.links.len());
    // A fresh mount is not empty: newer kernels put maps.debug and progs.debug there.
    assert!(!scratch.config().root().exists());
    assert!(kernel::snapshot(&scratch.config()).expect("readable").is_none());
    assert_eq!(kernel::uninstall(&scratch.config()).expect("nothing to do"), kernel::Removed::default());
    assert_eq!(attached_to(&scratch.cgroup), BTreeSet::new(), "still attached to the cgroup");
}

#[test]
fn a_cgroup_that_was_made_anew_is_attached_to_again() {
    let scratch = Scratch::new();
    let mut opened = scratch.open();
    opened.kernel.activate().expect("attaches");
    assert!(opened.kernel.check().expect("nothing to do").is_empty());
    std::fs::remove_dir(&scratch.cgroup).expect("removed");
    assert!(opened.kernel.check().is_err(), "says that the cgroup is gone");
    std::fs::create_dir(&scratch.cgroup).expect("made");
    let attached = opened.kernel.check().expect("attaches");
    assert!(attached.iter().any(|(name, how)| *name == "hitless_connect4" && *how == kernel::Attached::New));
    assert!(connects(&attached_to(&scratch.cgroup)));
}

#[test]
fn what_is_missing_is_named_with_its_remedy() {
    let scratch = Scratch::new();
    let refused = |config: Config| Kernel::open(config).err().expect("cannot open").to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let text = refused(Config { bpffs: directory.path().to_owned(), ..scratch.config() });
    assert!(text.contains("mount -t bpf bpf") && text.contains("--bpffs"), "{text}");
    let text = refused(Config { cgroup: Some(directory.path().to_owned()), ..scratch.config() });
    assert!(text.contains("cgroup2") && text.contains("--cgroup"), "{text}");
    let mut odd = scratch.config();
    odd.sizes.events_bytes = 5000;
    let text = refused(odd);
    assert!(text.contains("eventsBytes=5000") && text.contains("power of two"), "{text}");
    let text = refused(Config { cgroup: Some("/nowhere".into()), ..scratch.config() });
    assert!(text.contains("/nowhere"), "{text}");
}

#[test]
fn who_may_not_use_bpf_is_told_so() {
    use std::os::unix::process::CommandExt;
    let scratch = Scratch::new();
    let argument = format!("{}|{}|", scratch.bpffs.path().display(), scratch.cgroup.display());
    // Where nobody may enter: the directory of the test is root's.
    std::fs::set_permissions(scratch.bpffs.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("ours");
    let copy = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(copy.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("ours");
    let program = copy.path().join("test");
    std::fs::copy(env::current_exe().expect("this test"), &program).expect("copied");
    let output = Command::new(program)
        .args(["--exact", "child_that_is_killed", "--nocapture"])
        .env(CHILD, argument)
        .uid(65_534)
        .current_dir("/")
        .output()
        .expect("starts");
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("NotPermitted"), "{said}");
}

#[test]
fn ended_flows_are_swept_and_the_count_of_moved_flows_is_corrected() {
    use abi::{FlowKey, REBIND_RST, Rebind};
    use aya::maps::{Array, HashMap, Map, MapData};
    let scratch = Scratch::new();
    let mut opened = scratch.open();
    opened.kernel.activate().expect("attaches");
    let flows = scratch.directories().into_iter().find(|name| name.starts_with("flows-")).expect("pinned");
    let pin = |name: &str| MapData::from_pin(scratch.config().root().join(&flows).join(name)).expect("pinned");
    let mut rebinds: HashMap<_, FlowKey, Rebind> =
        HashMap::try_from(Map::LruHashMap(pin("REBINDS"))).expect("a hash map");
    let mut rebound: Array<_, u64> = Array::try_from(Map::Array(pin("REBOUND"))).expect("an array");
    let now = kernel::monotonic_ns() + 100_000_000_000;
    for port in 0..5000_u16 {
        let key = FlowKey { client_port_be: port, ..FlowKey::default() };
        let ended = port % 5 == 0;
        let quiet = if ended { 20_000_000_000 } else { 5_000_000_000 };
        let rebind = Rebind { last_seen_ns: now - quiet, closing: REBIND_RST, ..Rebind::default() };
        rebinds.insert(key, rebind, 0).expect("room");
    }
    // As if 70 had been evicted, which nobody counts.
    rebound.set(0, 5070, 0).expect("set");
    let mut calls = 0;
    let (mut removed, mut corrected) = (0, None);
    while corrected.is_none() {
        let swept = opened.kernel.sweep(now).expect("walks");
        assert!(swept.seen <= 5000);
        removed += swept.removed;
        corrected = swept.corrected;
        calls += 1;
        assert!(calls < 10, "never at its end");
    }
    assert!(calls > 1, "bounded work per call");
    assert_eq!((removed, corrected), (1000, Some(4000)));
    assert_eq!(rebound.get(&0, 0).expect("read"), 4000);
    assert_eq!(rebinds.keys().count(), 4000);
    opened.kernel.sweep(now + 3_600_000_000_000).expect("walks");
    opened.kernel.sweep(now + 3_600_000_000_000).expect("walks");
    assert_eq!(rebound.get(&0, 0).expect("read"), 0, "then no packet pays a lookup");
}

/// `enum bpf_attach_type` of the hooks that a cgroup may have of hitless.
const CGROUP_HOOKS: [(&str, u32); 9] = [
    ("sockops", 3),
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

/// The kernel's word on what is attached to a cgroup, by hook and program.
fn attached_to(cgroup: &Path) -> BTreeSet<(&'static str, String)> {
    let names: BTreeMap<u32, String> = aya::programs::loaded_programs()
        .flatten()
        .map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned()))
        .collect();
    let cgroup = std::fs::File::open(cgroup).expect("a cgroup");
    let programs = CGROUP_HOOKS.into_iter().flat_map(|(hook, kind)| {
        let ids = programs_at(&cgroup, kind);
        ids.into_iter().map(move |id| (hook, id))
    });
    programs.map(|(hook, id)| (hook, names.get(&id).cloned().unwrap_or_default())).collect()
}

/// `BPF_PROG_QUERY`: the identifiers of the programs that are attached to the cgroup itself. The struct is whole:
/// some kernels write its last member, however short it is.
fn programs_at(cgroup: &std::fs::File, kind: u32) -> Vec<u32> {
    #[repr(C)]
    struct Query {
        target_fd: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        program_ids: u64,
        program_count: u32,
        _pad: u32,
        _later: [u64; 4],
    }
    const PROG_QUERY: libc::c_int = 16;
    // The most that one cgroup takes (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0_u32; 64];
    let mut query = Query {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: kind,
        query_flags: 0,
        attach_flags: 0,
        program_ids: ids.as_mut_ptr() as u64,
        program_count: ids.len() as u32,
        _pad: 0,
        _later: [0; 4],
    };
    // SAFETY: the beginning of `union bpf_attr` and its length; the buffer outlives the call and is as long as said.
    let done = unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, &raw mut query, size_of::<Query>()) };
    assert_eq!(done, 0, "hook {kind}: {}", std::io::Error::last_os_error());
    ids[..query.program_count as usize].to_vec()
}

/// Names of programs end after 15 characters.
fn connects(attached: &BTreeSet<(&'static str, String)>) -> bool {
    attached.contains(&("connect4", "hitless_connect".to_owned()))
}

const CHILD: &str = "HITLESS_TEST_CHILD";

/// Not a test of its own: what [`a_kill_at_any_moment_is_recovered_from`] starts and kills.
#[test]
fn child_that_is_killed() {
    let Ok(argument) = env::var(CHILD) else { return };
    let mut argument = argument.split('|');
    let mut next = || argument.next().expect("bpffs|cgroup|salt").to_owned();
    let (bpffs, cgroup, layout_salt) = (next(), next(), next());
    let config = Config { bpffs: bpffs.into(), cgroup: Some(cgroup.into()), layout_salt, ..Config::default() };
    let mut opened = Kernel::open(config).expect("opens");
    write_all(&mut opened.kernel, &service(1, 1..50));
    opened.kernel.activate().expect("activates");
    println!("activated");
    std::thread::sleep(Duration::from_secs(60));
}

fn child(scratch: &Scratch, salt: &str) -> Child {
    let argument = format!("{}|{}|{salt}", scratch.bpffs.path().display(), scratch.cgroup.display());
    Command::new(env::current_exe().expect("this test"))
        .args(["--exact", "child_that_is_killed", "--nocapture"])
        .env(CHILD, argument)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("starts")
}

#[test]
fn a_kill_at_any_moment_is_recovered_from() {
    use std::io::{BufRead, BufReader};
    let scratch = Scratch::new();
    // How long a whole start takes here.
    let started = Instant::now();
    let mut whole = child(&scratch, "0");
    let lines = BufReader::new(whole.stdout.take().expect("piped")).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("activated")), "the child never activated");
    let takes = started.elapsed();
    whole.kill().expect("alive");
    whole.wait().expect("ended");
    for step in 1..=16 {
        // Every other start brings another layout, so half of the kills hit a move to new maps.
        let salt = (step / 2 % 2).to_string();
        let mut killed = child(&scratch, &salt);
        std::thread::sleep(takes * step / 15);
        killed.kill().expect("alive");
        killed.wait().expect("ended");
        // The programs of some agent that was complete once serve all along.
        assert!(connects(&attached_to(&scratch.cgroup)), "step {step}: detached");
        let config = Config { layout_salt: salt, ..scratch.config() };
        let mut opened = Kernel::open(config).unwrap_or_else(|error| panic!("step {step}: {error}"));
        if opened.adopted {
            assert_eq!(opened.seed.slots.len(), 49, "step {step}: adopted half-filled maps");
        }
        if step % 3 == 0 {
            write_all(&mut opened.kernel, &service(1, 1..50));
            opened.kernel.activate().unwrap_or_else(|error| panic!("step {step}: {error}"));
            assert!(scratch.directories().iter().all(|name| !name.starts_with("new-") && !name.starts_with("old-")));
        }
    }
}

#[test]
fn a_hundred_thousand_backends_are_filled_in_well_under_half_a_second() {
    let scratch = Scratch::new();
    let mut opened = scratch.open();
    let mut changes = Vec::new();
    for id in 1..=10_000 {
        changes.extend(service(id, id * 10..id * 10 + 10));
    }
    let started = Instant::now();
    write_all(&mut opened.kernel, &changes);
    let filled = started.elapsed();
    opened.kernel.activate().expect("attaches");
    let key = SlotKey { service: 77, index: 9 };
    let started = Instant::now();
    for _ in 0..1000 {
        let slot = Slot { backend: 779, generation: 1, service: 77, weight: 1 };
        write_all(&mut opened.kernel, &[Change::PutSlot(key, slot), Change::DeleteSlot(key)]);
    }
    let pair = started.elapsed() / 1000;
    println!("100,000 backends with slots: {filled:?}; one slot put and deleted: {pair:?}");
    // Far above what it takes, for slow machines: what is asserted is that it is not one by one.
    assert!(filled < Duration::from_secs(3), "{filled:?}");
    let started = Instant::now();
    drop(opened);
    let again = scratch.open();
    println!("adopted in {:?}", started.elapsed());
    assert_eq!(again.seed.backends.len(), 100_000);
    assert_eq!(again.seed.slots.len(), 99_999, "but the one deleted");
    assert_eq!(abi::Stat::ALL.len(), again.kernel.stats().len());
}
