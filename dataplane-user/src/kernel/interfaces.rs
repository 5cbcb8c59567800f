//! Puts the tc programs on the interfaces of a pod, and takes them off again.
//!
//! tcx links are pinned as `tc-<cookie>-<ifindex>-<in|out>`. Where the kernel has none, filters hang
//! on clsact; `tcf-<cookie>-<ifindex>` is the program pinned as a record of that, and
//! `tcq-<cookie>-<ifindex>` a record that the qdisc is ours too. A pod of the mesh has `sk-<cookie>-0`
//! besides: the link of what decides on connections into it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::{AsFd, AsRawFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use dataplane_ebpf::abi::{ListenerKey, POD_HOST, POD_MESH};

use super::{
    Tcx,
    error::Error,
    links::{self, Attached},
    listeners,
    load::Programs,
    maps::Maps,
    netns::{self, Direction, Interface},
    snapshot,
    sys::{self, Attach},
};
use crate::registry::change::{Enrollment, Netns};

/// A pod that is attached to.
#[derive(Debug)]
pub struct Attachment {
    pub cookie: u64,
    pub interfaces: Vec<String>,
    /// Those where something was newly attached.
    pub repaired: Vec<String>,
    pub tcx: bool,
    pub listeners: usize,
}

/// What attaches; used by one worker thread.
pub struct Interfaces {
    tcx: bool,
    links: PathBuf,
    programs: Programs,
    maps: Arc<Maps>,
}

/// For each direction: the program, its pin's suffix, its tcx attach type. The node's own interfaces have
/// programs of their own, because packets of pods pass there too.
const fn programs_on(host: bool) -> [(Direction, &'static str, &'static str, Attach); 2] {
    let [ingress, egress] = if host {
        ["hitless_tc_node_ingress", "hitless_tc_node_egress"]
    } else {
        ["hitless_tc_ingress", "hitless_tc_egress"]
    };
    [(Direction::Ingress, ingress, "in", Attach::TcxIngress), (Direction::Egress, egress, "out", Attach::TcxEgress)]
}

/// Decides which socket takes a connection into a pod.
const INBOUND: &str = "hitless_inbound";

/// Every program that goes on interfaces or into namespaces.
pub fn program_names() -> impl Iterator<Item = &'static str> {
    [false, true].into_iter().flat_map(programs_on).map(|(_, name, _, _)| name).chain([INBOUND])
}

impl Interfaces {
    pub fn new(tcx: Tcx, links: PathBuf, programs: Programs, maps: Arc<Maps>) -> Self {
        let tcx = tcx == Tcx::Auto && tcx_supported(&programs);
        Self { tcx, links, programs, maps }
    }

    pub fn attach(&self, enrollment: &Enrollment) -> Result<Attachment, Error> {
        let pod = &enrollment.name;
        match &enrollment.netns {
            Netns::Host => self.attach_here(enrollment),
            Netns::Path(path) => netns::within(path, || Ok(self.attach_here(enrollment)))
                .map_err(|source| Error::Netns { pod: pod.clone(), path: path.clone(), source })?,
        }
    }

    /// In the thread's network namespace.
    fn attach_here(&self, enrollment: &Enrollment) -> Result<Attachment, Error> {
        let pod = &enrollment.name;
        let failed = |doing| move |source| Error::Pod { pod: pod.clone(), doing, source };
        let host = enrollment.flags & POD_HOST != 0;
        let cookie = netns::cookie().map_err(failed("reading the network namespace's cookie (Linux 5.14)"))?;
        let mut interfaces = netns::interfaces().map_err(failed("listing its interfaces"))?;
        interfaces.retain(|interface| !interface.loopback && (!host || (interface.up && !interface.enslaved)));
        self.forget_vanished(cookie, &interfaces).map_err(failed("unpinning links of interfaces that are gone"))?;
        let mut repaired = Vec::new();
        self.guard(cookie, enrollment.flags & POD_MESH != 0)
            .map_err(failed("attaching what decides on connections into it (sk_lookup)"))?;
        for interface in &interfaces {
            let attached = if self.tcx {
                self.attach_tcx(cookie, host, interface)
            } else {
                self.attach_clsact(cookie, host, interface)
            };
            match attached {
                Ok(Attached::New) => repaired.push(interface.name.clone()),
                Ok(Attached::Updated) => {}
                // It left between the listing and now.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(source) => {
                    let interface = interface.name.clone();
                    return Err(Error::Interface {
                        pod: pod.clone(),
                        interface,
                        doing: "attaching the tc programs",
                        source,
                    });
                }
            }
        }
        let listeners = listeners::recount(&self.maps, cookie).map_err(failed("counting its listeners (sock_diag)"))?;
        let interfaces = interfaces.into_iter().map(|interface| interface.name).collect();
        Ok(Attachment { cookie, interfaces, repaired, tcx: self.tcx, listeners })
    }

    /// In the namespace: attaches the program that decides on connections into it, or lets it go.
    fn guard(&self, cookie: u64, wanted: bool) -> io::Result<()> {
        let pin = self.links.join(format!("sk-{cookie:x}-0"));
        if !wanted {
            return links::unpin(&pin);
        }
        let program = self.programs.get(INBOUND).ok_or(io::ErrorKind::NotFound)?;
        let netns = fs::File::open("/proc/thread-self/ns/net")?;
        let create = || sys::link_create(program, netns.as_raw_fd() as u32, Attach::SkLookup);
        // Inode numbers of namespaces have 32 bits.
        links::update_or(&pin, program, netns.metadata()?.ino(), create).map(drop)
    }

    fn attach_tcx(&self, cookie: u64, host: bool, interface: &Interface) -> io::Result<Attached> {
        // A filter of an agent that ran with --tcx off (or on an older kernel) would act twice.
        self.detach_clsact(cookie, interface.index)?;
        let mut attached = Attached::Updated;
        for (_, name, suffix, attach) in programs_on(host) {
            let program = self.programs.get(name).ok_or(io::ErrorKind::NotFound)?;
            let pin = self.links.join(format!("tc-{cookie:x}-{}-{suffix}", interface.index));
            let create = || sys::link_create(program, interface.index, attach);
            if links::update_or(&pin, program, u64::from(interface.index), create)? == Attached::New {
                attached = Attached::New;
            }
        }
        Ok(attached)
    }

    fn attach_clsact(&self, cookie: u64, host: bool, interface: &Interface) -> io::Result<Attached> {
        let index = interface.index;
        let mut attached = Attached::Updated;
        let ours = self.marker("tcq", cookie, index);
        if !ours.exists() {
            // Recorded before it is done: an agent killed in between leaves a record too many, which
            // does no harm while others use the qdisc, and not a qdisc too many.
            let program = self.programs.get(programs_on(host)[0].1).ok_or(io::ErrorKind::NotFound)?;
            links::pin_over(program, &ours)?;
            if !netns::add_clsact(index)? {
                links::unpin(&ours)?;
            }
        } else {
            netns::add_clsact(index)?;
        }
        for (direction, name, suffix, _) in programs_on(host) {
            let program = self.programs.get(name).ok_or(io::ErrorKind::NotFound)?;
            if !netns::has_filter(index, direction)? {
                attached = Attached::New;
                links::pin_over(program, &self.marker("tcf", cookie, index))?;
            }
            netns::put_filter(index, direction, name, program)?;
            links::unpin(&self.links.join(format!("tc-{cookie:x}-{index}-{suffix}")))?;
        }
        Ok(attached)
    }

    fn marker(&self, kind: &str, cookie: u64, index: u32) -> PathBuf {
        self.links.join(format!("{kind}-{cookie:x}-{index}"))
    }

    /// In the namespace: takes our filter off, and the qdisc if it is ours and nobody else uses it.
    fn detach_clsact(&self, cookie: u64, index: u32) -> io::Result<()> {
        let (filter, qdisc) = (self.marker("tcf", cookie, index), self.marker("tcq", cookie, index));
        detach_clsact(&filter, &qdisc, index)
    }

    /// Pins of interfaces that the namespace no longer has.
    fn forget_vanished(&self, cookie: u64, interfaces: &[Interface]) -> io::Result<()> {
        for pin in snapshot::pinned(&self.links).map_err(io::Error::other)? {
            let Some((_, owner, index)) = parse(&pin) else { continue };
            if owner == cookie && index != 0 && interfaces.iter().all(|interface| interface.index != index) {
                links::unpin(&pin)?;
            }
        }
        Ok(())
    }

    /// Lets go of a namespace: pins, and filters where `path` or another way leads into it.
    pub fn detach(&self, cookie: u64, path: Option<&Path>) -> Result<(), Error> {
        let ours = |pin: &PathBuf| cookie_of(pin) == Some(cookie);
        let pins: Vec<_> = snapshot::pinned(&self.links)?.into_iter().filter(ours).collect();
        remove(&pins, path)?;
        for (key, _) in self.maps.listeners.entries::<ListenerKey, i32>()? {
            if key.netns_cookie == cookie {
                self.maps.listeners.delete(&key)?;
            }
        }
        Ok(())
    }

    /// Counts the listeners of a pod again, and only that.
    pub fn recount_again(&self, enrollment: &Enrollment, cookie: u64) {
        let recount = || {
            // The path may lead elsewhere by now; then the next check enrolls anew.
            if netns::cookie()? == cookie {
                listeners::recount(&self.maps, cookie)?;
                listeners::revive(&self.maps, cookie, enrollment.first_backend)?;
            }
            Ok(())
        };
        let recounted = match &enrollment.netns {
            Netns::Host => recount(),
            Netns::Path(path) => netns::within(path, recount),
        };
        if let Err(error) = recounted {
            // The pod is going, most likely; if not, the next check tells.
            tracing::debug!(pod = %enrollment.name, %error, "listeners not counted again");
        }
    }
}

/// `(kind, cookie, interface)` of a pin of this module.
fn parse(pin: &Path) -> Option<(&str, u64, u32)> {
    let mut parts = pin.file_name()?.to_str()?.split('-');
    let kind = parts.next().filter(|kind| matches!(*kind, "tc" | "tcf" | "tcq" | "sk"))?;
    Some((kind, u64::from_str_radix(parts.next()?, 16).ok()?, parts.next()?.parse().ok()?))
}

/// The network namespace that a pin belongs to, if it is of this module.
pub fn cookie_of(pin: &Path) -> Option<u64> {
    parse(pin).map(|(_, cookie, _)| cookie)
}

fn detach_clsact(filter: &Path, qdisc: &Path, index: u32) -> io::Result<()> {
    if filter.exists() {
        for direction in Direction::BOTH {
            match netns::remove_filter(index, direction) {
                Err(error) if error.raw_os_error() != Some(libc::ENODEV) => return Err(error),
                _ => {}
            }
        }
        links::unpin(filter)?;
    }
    if qdisc.exists() {
        if netns::clsact_unused(index).unwrap_or(false) {
            netns::remove_clsact(index)?;
        }
        links::unpin(qdisc)?;
    }
    Ok(())
}

/// Removes pins of this module and the filters that they record. `path` leads to their namespace.
fn remove(pins: &[PathBuf], path: Option<&Path>) -> Result<(), Error> {
    let mut filters: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    for pin in pins {
        match parse(pin) {
            Some(("tc" | "sk", ..)) => {
                links::unpin(pin).map_err(|source| Error::Pin { path: pin.clone(), doing: "unpinning", source })?;
            }
            Some((_, cookie, index)) => drop(filters.entry(cookie).or_default().insert(index)),
            None => {}
        }
    }
    if filters.is_empty() {
        return Ok(());
    }
    let Some(directory) = pins[0].parent() else { return Ok(()) };
    for (cookie, path) in find(&filters.keys().copied().collect(), path) {
        let indices = &filters[&cookie];
        netns::within(&path, || {
            for index in indices {
                let marker = |kind: &str| directory.join(format!("{kind}-{cookie:x}-{index}"));
                detach_clsact(&marker("tcf"), &marker("tcq"), *index)?;
            }
            Ok(())
        })
        .map_err(|source| Error::Pod {
            pod: path.display().to_string().into(),
            doing: "removing tc filters",
            source,
        })?;
    }
    // Namespaces that are gone took their filters with them.
    for pin in pins {
        links::unpin(pin).map_err(|source| Error::Pin { path: pin.clone(), doing: "unpinning", source })?;
    }
    Ok(())
}

/// For `hitless uninstall`: removes every filter and tcx link; how many there were.
pub fn remove_all(links: &Path) -> Result<usize, Error> {
    let mut pins = snapshot::pinned(links)?;
    pins.retain(|pin| parse(pin).is_some());
    remove(&pins, None)?;
    Ok(pins.len())
}

/// A way into each of these network namespaces, as far as there is one: the hint, a name below
/// /run/netns, or any process.
fn find(cookies: &BTreeSet<u64>, hint: Option<&Path>) -> BTreeMap<u64, PathBuf> {
    let named = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = processes
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().bytes().all(|b| b.is_ascii_digit())))
        .map(|path| path.join("ns/net"));
    let own = PathBuf::from("/proc/self/ns/net");
    let mut seen = BTreeSet::new();
    let mut found = BTreeMap::new();
    for path in hint.map(Path::to_owned).into_iter().chain([own]).chain(named).chain(processes) {
        if found.len() == cookies.len() {
            break;
        }
        let Ok(inode) = fs::metadata(&path).map(|metadata| metadata.ino()) else { continue };
        if !seen.insert(inode) {
            continue;
        }
        if let Ok(cookie) = netns::within(&path, netns::cookie)
            && cookies.contains(&cookie)
        {
            found.insert(cookie, path);
        }
    }
    found
}

/// Whether the kernel has tcx links (6.6): probed on the loopback interface of a namespace made for it.
fn tcx_supported(programs: &Programs) -> bool {
    let Some(program) = programs.get(programs_on(false)[0].1) else { return false };
    std::thread::scope(|scope| {
        let probe = scope.spawn(move || -> io::Result<()> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
            let link = sys::link_create(program, 1, Attach::TcxIngress)?;
            sys::link_info(link.as_fd()).map(drop)
        });
        probe.join().is_ok_and(|probed| probed.is_ok())
    })
}
