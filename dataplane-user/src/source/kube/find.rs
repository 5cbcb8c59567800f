//! Where the pods of this node are: a process of each, by the cgroups that the kubelet makes.
//!
//! The container runtime's own state is the kernel's: whatever runs in a pod has the pod's uid in its cgroup path,
//! with either cgroup driver, in v1 and v2. No runtime is asked, and pods older than the agent are found alike.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt,
    path::Path,
};

/// A process, told from a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    /// In clock ticks since boot.
    pub started: u64,
}

impl Process {
    pub fn lives(&self) -> bool {
        started(Path::new("/proc"), self.pid) == Some(self.started)
    }

    /// The addresses of its network, but those that are of use in it alone. The API server is told of them only after
    /// the containers have started.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/net/{file}", self.pid)).unwrap_or_default();
        let mut addresses = v4_addresses(&read("fib_trie"));
        addresses.extend(v6_addresses(&read("if_inet6")));
        // It may have ended in between, and its number be another's.
        if self.lives() { addresses } else { Vec::new() }
    }
}

/// The oldest process of each pod that is asked for: where the runtime has a sandbox, that is the one that lives
/// as long as the pod. Processes in the agent's own network are none of a pod's.
///
/// One look after another passes over processes that are no pod's of those: while a pod is about to start, looks are
/// many and new processes few.
#[derive(Debug, Default)]
pub struct Search {
    /// Were looked at when they were old enough to be where they belong: a runtime moves a container's first process
    /// into its cgroup when it has just been made.
    strangers: HashSet<i32>,
}

/// In clock ticks, of which Linux tells a hundred per second.
const SETTLED: u64 = 100;

impl Search {
    pub fn look(&mut self, uids: &HashSet<String>) -> io::Result<HashMap<String, Process>> {
        let own = fs::metadata("/proc/self/ns/net")?.ino();
        let uptime = fs::read_to_string("/proc/uptime")?;
        let seconds: f64 = uptime.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0);
        let counts =
            |pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|netns: fs::Metadata| netns.ino() != own);
        self.scan(Path::new("/proc"), uids, (seconds * 100.0) as u64, counts)
    }

    fn scan(
        &mut self,
        proc: &Path,
        uids: &HashSet<String>,
        now: u64,
        counts: impl Fn(i32) -> bool,
    ) -> io::Result<HashMap<String, Process>> {
        let mut found: HashMap<String, Process> = HashMap::new();
        let mut strangers = HashSet::with_capacity(self.strangers.len());
        for entry in fs::read_dir(proc)?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            if self.strangers.contains(&pid) {
                strangers.insert(pid);
                continue;
            }
            // Processes end while they are looked at.
            let Ok(text) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
            let Some(started) = started(proc, pid) else { continue };
            let Some(uid) = text.lines().find_map(pod_uid).filter(|uid| uids.contains(uid)) else {
                if started + SETTLED < now {
                    strangers.insert(pid);
                }
                continue;
            };
            let older = found.get(&uid).is_none_or(|known| (started, pid) < (known.started, known.pid));
            if older && counts(pid) {
                found.insert(uid, Process { pid, started });
            }
        }
        self.strangers = strangers;
        Ok(found)
    }
}

/// `/proc/PID/net/fib_trie`: an address, and in the next line that it is the host's own.
fn v4_addresses(fib_trie: &str) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    let mut last = None;
    for line in fib_trie.lines() {
        if let Some(address) = line.trim_start().strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line.trim_start() == "/32 host LOCAL"
            && let Some(address) = last.take().filter(|address| !address.is_loopback() && !address.is_link_local())
            // The same again for the table of its own and the main one.
            && !addresses.contains(&IpAddr::V4(address))
        {
            addresses.push(address.into());
        }
    }
    addresses
}

/// `/proc/PID/net/if_inet6`: address, interface, prefix, scope (0: global), flags, name.
fn v6_addresses(if_inet6: &str) -> Vec<IpAddr> {
    let global = |line: &str| {
        let mut words = line.split_whitespace();
        let address = u128::from_str_radix(words.next()?, 16).ok()?;
        (words.nth(2)? == "00").then(|| Ipv6Addr::from_bits(address).into())
    };
    if_inet6.lines().filter_map(global).collect()
}

/// The pod's uid in a line of `/proc/PID/cgroup`: `…/pod<uid>/<container>` of the cgroupfs driver,
/// `…/kubepods-burstable-pod<uid with underscores>.slice/…` of systemd's.
fn pod_uid(line: &str) -> Option<String> {
    let path = line.splitn(3, ':').nth(2)?;
    path.split('/').find_map(|part| {
        let uid = match part.strip_suffix(".slice") {
            Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid.replace('_', "-"))?,
            None => part.strip_prefix("pod")?.to_owned(),
        };
        (uid.len() >= 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')).then_some(uid)
    })
}

/// proc_pid_stat(5), field 22.
fn started(proc: &Path, pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
    // After the name, which may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f6a4a3c-7e0d-4c55-9d8e-3f0d2b3c4d5e";

    #[test]
    fn a_pods_uid_is_read_whoever_made_its_cgroup() {
        let underscored = UID.replace('-', "_");
        for path in [
            format!("0::/kubepods/besteffort/pod{UID}/8a1b"),
            format!("0::/kubepods/pod{UID}/8a1b"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscored}.slice/cri-containerd-8a1b.scope"
            ),
            format!("0::/../../kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{underscored}.slice/x"),
            format!("4:memory:/kubepods/burstable/pod{UID}/8a1b"),
        ] {
            assert_eq!(pod_uid(&path).as_deref(), Some(UID), "{path}");
        }
        let hash = "c1a2b3c4d5e6f708192a3b4c5d6e7f80";
        assert_eq!(pod_uid(&format!("0::/kubepods/pod{hash}/1")).as_deref(), Some(hash), "a static pod");
        for path in ["0::/system.slice/podman.service", "0::/", "0::/user.slice/pods/podx", "broken"] {
            assert_eq!(pod_uid(path), None, "{path}");
        }
    }

    #[test]
    fn the_oldest_process_of_a_pod_is_taken() {
        let proc = tempfile::tempdir().unwrap();
        let process = |pid: i32, uid: &str, started: u64| {
            let dir = proc.path().join(pid.to_string());
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("cgroup"), format!("0::/kubepods/pod{uid}/x\n")).unwrap();
            let zeros = "0 ".repeat(18);
            fs::write(dir.join("stat"), format!("{pid} (a) b) S {zeros}{started} 0 0\n")).unwrap();
        };
        process(10, UID, 900);
        process(11, UID, 300);
        process(12, UID, 400);
        process(13, &UID.replace('0', "1"), 1);
        process(14, UID, 2);
        let uids = HashSet::from([UID.to_owned()]);
        let mut search = Search::default();
        let found = search.scan(proc.path(), &uids, 500, |pid| pid != 14).unwrap();
        assert_eq!(found, HashMap::from([(UID.to_owned(), Process { pid: 11, started: 300 })]));
        assert_eq!(search.strangers, HashSet::from([13]));
        // The younger stranger is moved into a pod's cgroup, the older one is not looked at again.
        for (pid, started) in [(15, 450), (13, 1)] {
            let _ = fs::remove_dir_all(proc.path().join(pid.to_string()));
            process(pid, "none", started);
        }
        search.scan(proc.path(), &uids, 500, |pid| pid < 14).unwrap();
        assert_eq!(search.strangers, HashSet::from([13]));
        for pid in [11, 12, 10, 15] {
            fs::remove_dir_all(proc.path().join(pid.to_string())).unwrap();
        }
        process(15, UID, 450);
        let found = search.scan(proc.path(), &uids, 501, |pid| pid != 14).unwrap();
        assert_eq!(found, HashMap::from([(UID.to_owned(), Process { pid: 15, started: 450 })]));
    }

    #[test]
    fn a_networks_own_addresses_are_read() {
        let fib_trie = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.244.1.0/24 2 0 2
        |-- 10.244.1.0
           /24 link UNICAST
        |-- 10.244.1.10
           /32 host LOCAL
        |-- 10.244.1.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.1
              /32 host LOCAL
Local:
        |-- 10.244.1.10
           /32 host LOCAL
        |-- 169.254.1.1
           /32 host LOCAL
";
        assert_eq!(v4_addresses(fib_trie), ["10.244.1.10".parse::<IpAddr>().unwrap()]);
        let if_inet6 = "\
00000000000000000000000000000001 01 80 10 80       lo
fe800000000000004c5d5efffe000001 02 40 20 80     eth0
fd00024400010000000000000000000a 02 40 00 80     eth0
";
        assert_eq!(v6_addresses(if_inet6), ["fd00:244:1::a".parse::<IpAddr>().unwrap()]);
        assert!(v4_addresses("").is_empty() && v6_addresses("nonsense\n").is_empty());
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_its_number() {
        let pid = std::process::id().cast_signed();
        let started = started(Path::new("/proc"), pid).unwrap();
        assert!(Process { pid, started }.lives());
        assert!(!Process { pid, started: started + 1 }.lives());
    }
}
