//! The canary against the running kernel, in a cgroup and a BPF file system of the test's own. Needs root.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    thread::sleep,
    time::Duration,
};

use dataplane_ebpf::abi::{LAYER_CHOOSE, LAYER_KNOW, LAYER_REBIND};
use dataplane_user::kernel::{
    Config, Kernel, Opened, Tcx,
    canary::{Canary, Error, Outcome, Report, Step},
    cgroup2_root, default_settings,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Two agents' tracepoints at a time are one too many for a machine that tests something else too.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The kernel lets go of a link some milliseconds after its last name.
const SETTLED: Duration = Duration::from_millis(300);

/// An agent's kernel side, on a cgroup and pins of its own; everything is removed when it is dropped.
struct Lab {
    bpffs: tempfile::TempDir,
    cgroup: PathBuf,
    config: Config,
    _turn: std::sync::MutexGuard<'static, ()>,
}

impl Lab {
    fn new(name: &str) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let bpffs = tempfile::tempdir().expect("a directory");
        mount(Some("bpf"), bpffs.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("mounting a BPF file system needs root");
        let root = cgroup2_root().expect("cgroup2 is mounted");
        let cgroup = root.join(format!("hl-canary-{name}-{}", std::process::id()));
        fs::create_dir(&cgroup).expect("a cgroup needs root");
        let config = Config { cgroup: Some(cgroup.clone()), bpffs: bpffs.path().to_owned(), ..Config::default() };
        Self { bpffs, cgroup, config, _turn: turn }
    }

    fn open(&self) -> Opened {
        let mut opened = Kernel::open(self.config.clone()).expect("the programs load");
        opened.kernel.activate().expect("the programs attach");
        opened
    }

    fn canaries(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.cgroup).expect("readable").flatten().map(|entry| entry.path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for cgroup in self.canaries() {
            let _ = fs::remove_dir(cgroup);
        }
        let _ = fs::remove_dir(&self.cgroup);
        let _ = umount2(self.bpffs.path(), MntFlags::MNT_DETACH);
    }
}

fn start(kernel: &Kernel) -> Canary {
    Canary::start(kernel, Path::new(env!("CARGO_BIN_EXE_hitless"))).expect("it starts")
}

/// What an agent's loop does, until the canary is done or `until` is.
fn drive(
    opened: &mut Opened,
    canary: &mut Canary,
    mut until: impl FnMut(&Kernel) -> bool,
) -> Option<Result<Report, Error>> {
    loop {
        while let Ok(outcome) = opened.outcomes.try_recv() {
            for notice in opened.kernel.complete(outcome) {
                println!("{notice:?}");
            }
        }
        match canary.poll() {
            Some(Step::With(work)) => work(&mut opened.kernel),
            Some(Step::Done(result)) => return Some(result),
            None => sleep(Duration::from_micros(200)),
        }
        if until(&opened.kernel) {
            return None;
        }
    }
}

fn run(opened: &mut Opened) -> Result<Report, Error> {
    let mut canary = start(&opened.kernel);
    drive(opened, &mut canary, |_| false).expect("it ends")
}

fn failed(result: Result<Report, Error>) -> Vec<&'static str> {
    match result {
        Err(Error::NotProved(report)) => {
            println!("{report:#?}");
            let failed = report.hooks.iter().filter(|proof| proof.outcome == Outcome::Failed);
            failed.map(|proof| proof.hook).collect()
        }
        other => panic!("a hook is missing, and yet: {other:?}"),
    }
}

fn occupied(kernel: &Kernel) -> Vec<(&'static str, u32)> {
    let desired = ["FRONTENDS", "SERVICES", "SLOTS", "BACKENDS", "BACKEND_INDEX", "PODS"];
    let occupancy = kernel.occupancy().expect("readable");
    occupancy.iter().filter(|map| desired.contains(&map.map) && map.used > 0).map(|map| (map.map, map.used)).collect()
}

#[test]
fn a_connect_goes_through_every_hook_and_nothing_is_left() {
    let lab = Lab::new("all");
    let mut opened = lab.open();
    let report = run(&mut opened).unwrap_or_else(|error| panic!("{error}"));
    println!("{report:#?}");
    let skipped: Vec<_> = report.hooks.iter().filter(|proof| proof.outcome != Outcome::Proved).collect();
    assert!(skipped.is_empty(), "{skipped:#?}");
    for program in ["connect", "sendmsg", "recvmsg", "getpeername"] {
        for family in ["4", "6"] {
            let hook = format!("hitless_{program}{family}");
            assert!(report.hooks.iter().any(|proof| proof.hook == hook), "{hook} is not proved");
        }
    }
    for hook in ["hitless_sockops", "hitless_signal", "hitless_sock_state", "hitless_tc_egress"] {
        assert!(report.hooks.iter().any(|proof| proof.hook == hook), "{hook} is not proved");
    }
    assert_eq!(lab.canaries(), Vec::<PathBuf>::new());
    assert_eq!(occupied(&opened.kernel), []);
    let again = run(&mut opened).unwrap_or_else(|error| panic!("a second time: {error}"));
    assert_eq!(again.hooks.len(), report.hooks.len());
}

#[test]
fn a_hook_that_is_detached_is_named() {
    let lab = Lab::new("detached");
    let mut opened = lab.open();
    for (hook, named) in [
        ("hitless_recvmsg4", vec!["hitless_recvmsg4"]),
        ("hitless_sendmsg6", vec!["hitless_sendmsg6"]),
        ("hitless_getpeername6", vec!["hitless_getpeername6"]),
        ("hitless_sockops", vec!["hitless_sockops"]),
        ("hitless_signal", vec!["hitless_signal"]),
        ("hitless_sock_state", vec!["hitless_sock_state"]),
    ] {
        fs::remove_file(lab.config.root().join("links").join(hook)).expect("the link is pinned");
        sleep(SETTLED);
        let failed = failed(run(&mut opened));
        assert_eq!(failed, named, "{hook} is detached");
        // `check` attaches it again.
        opened.kernel.check().expect("the programs attach");
    }
    // Everything that connects over IPv4 needs it: it is named first, what depends on it is not blamed.
    fs::remove_file(lab.config.root().join("links/hitless_connect4")).expect("the link is pinned");
    sleep(SETTLED);
    assert_eq!(failed(run(&mut opened)), ["hitless_connect4"]);
    assert_eq!(occupied(&opened.kernel), []);
}

/// Has the canary run with the tc links of one direction gone: what it blames.
fn without_links(name: &str, direction: &str) -> Vec<&'static str> {
    let lab = Lab::new(name);
    let mut opened = lab.open();
    let mut canary = start(&opened.kernel);
    // As soon as the pods are enrolled, before a connect is tried: the canary waits for its steps.
    let enrolled = |kernel: &Kernel| kernel.enrolled().len() == 2;
    assert!(drive(&mut opened, &mut canary, enrolled).is_none(), "it ended before its pods were enrolled");
    let pins = fs::read_dir(lab.config.root().join("links")).expect("readable").flatten().map(|entry| entry.path());
    let pins: Vec<_> = pins.filter(|pin| pin.to_string_lossy().ends_with(direction)).collect();
    assert_eq!(pins.len(), 2, "one for each of the canary's interfaces (tcx: Linux 6.6)");
    for pin in pins {
        fs::remove_file(pin).expect("it is there");
    }
    sleep(SETTLED);
    failed(drive(&mut opened, &mut canary, |_| false).expect("it ends"))
}

#[test]
fn an_interface_that_lost_a_program_is_named() {
    assert_eq!(without_links("egress", "-out"), ["hitless_tc_egress"]);
    assert_eq!(
        without_links("ingress", "-in"),
        ["hitless_tc_ingress (silence)", "hitless_tc_ingress (IPv4)", "hitless_tc_ingress (IPv6)"]
    );
}

#[test]
fn the_programs_are_proved_on_clsact_too() {
    let mut lab = Lab::new("clsact");
    lab.config.tcx = Tcx::Off;
    let mut opened = lab.open();
    let report = run(&mut opened).unwrap_or_else(|error| panic!("{error}"));
    assert!(report.hooks.iter().all(|proof| proof.outcome == Outcome::Proved), "{report:#?}");
}

#[test]
fn a_canary_that_dies_is_an_error_and_leaves_nothing() {
    let lab = Lab::new("killed");
    let mut opened = lab.open();
    let mut canary = start(&opened.kernel);
    assert!(drive(&mut opened, &mut canary, |kernel| kernel.enrolled().len() == 2).is_none());
    let procs = lab.canaries()[0].join("cgroup.procs");
    let pid: i32 = fs::read_to_string(procs).expect("readable").trim().parse().expect("one process");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
    let result = drive(&mut opened, &mut canary, |_| false).expect("it ends");
    assert!(matches!(result, Err(Error::Process { .. })), "{result:?}");
    assert_eq!(lab.canaries(), Vec::<PathBuf>::new());
    assert_eq!(occupied(&opened.kernel), []);
}

#[test]
fn layers_that_are_off_are_skipped_with_the_reason() {
    let mut lab = Lab::new("layers");
    lab.config.settings = default_settings();
    lab.config.settings.layers &= !(LAYER_REBIND | LAYER_KNOW | LAYER_CHOOSE);
    let mut opened = lab.open();
    let report = run(&mut opened).unwrap_or_else(|error| panic!("{error}"));
    let skipped = report.hooks.iter().filter(|proof| proof.outcome == Outcome::Skipped);
    let skipped: Vec<_> = skipped.map(|proof| (proof.hook, proof.seen.as_str())).collect();
    assert_eq!(
        skipped,
        [
            ("hitless_sock_state", "layer l1 is off"),
            ("hitless_signal", "layer l1 is off"),
            ("hitless_tc_egress", "layer l3 is off"),
            ("hitless_tc_ingress (IPv4)", "layer l3 is off"),
            ("hitless_tc_ingress (IPv6)", "layer l3 is off"),
        ]
    );
}

#[test]
fn a_canary_cut_short_leaves_nothing_to_the_next_agent() {
    let lab = Lab::new("cut");
    let mut opened = lab.open();
    // The agent stops in the midst of it …
    let mut canary = start(&opened.kernel);
    let ended = drive(&mut opened, &mut canary, |kernel| kernel.enrolled().len() == 2);
    assert!(ended.is_none(), "it ended before its pods were enrolled");
    canary.abandon(&mut opened.kernel);
    assert_eq!(lab.canaries(), Vec::<PathBuf>::new());
    // … or is killed: nobody removes anything.
    let mut canary = start(&opened.kernel);
    let ended = drive(&mut opened, &mut canary, |kernel| !kernel.enrolled().is_empty());
    assert!(ended.is_none(), "it ended before its pods were enrolled");
    drop(canary);
    drop(opened);
    let mut opened = Kernel::open(lab.config.clone()).expect("adopts");
    assert!(opened.adopted);
    let seed = &opened.seed;
    assert!(seed.frontends.is_empty() && seed.services.is_empty() && seed.slots.is_empty(), "{seed:?}");
    assert!(seed.backends.is_empty() && seed.retired.is_empty() && seed.last_pod == 0, "{seed:?}");
    assert!(!occupied(&opened.kernel).is_empty(), "the killed one left something");
    opened.kernel.activate().expect("the programs attach");
    run(&mut opened).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(lab.canaries(), Vec::<PathBuf>::new());
    assert_eq!(occupied(&opened.kernel), []);
}
