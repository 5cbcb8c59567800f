//! Where the pods of this node are: a process of each, by the cgroups that the kubelet makes.
//!
//! The container runtime's own state is the kernel's: whatever runs in a pod has the pod's uid in its cgroup path,
//! with either cgroup driver, in v1 and v2. No runtime is asked, and pods older than the agent are found alike.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
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
}

/// The oldest process of each pod that is asked for: where the runtime has a sandbox, that is the one that lives
/// as long as the pod. Processes in the agent's own network are none of a pod's.
pub fn processes(uids: &HashSet<String>) -> io::Result<HashMap<String, Process>> {
    let own = fs::metadata("/proc/self/ns/net")?.ino();
    scan(Path::new("/proc"), uids, |pid| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|netns| netns.ino() != own)
    })
}

fn scan(proc: &Path, uids: &HashSet<String>, counts: impl Fn(i32) -> bool) -> io::Result<HashMap<String, Process>> {
    let mut found: HashMap<String, Process> = HashMap::new();
    for entry in fs::read_dir(proc)?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // Processes end while they are looked at.
        let Ok(text) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
        let Some(uid) = text.lines().find_map(pod_uid).filter(|uid| uids.contains(uid)) else { continue };
        let Some(started) = started(proc, pid) else { continue };
        let older = found.get(&uid).is_none_or(|known| (started, pid) < (known.started, known.pid));
        if older && counts(pid) {
            found.insert(uid, Process { pid, started });
        }
    }
    Ok(found)
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
        let found = scan(proc.path(), &uids, |pid| pid != 14).unwrap();
        assert_eq!(found, HashMap::from([(UID.to_owned(), Process { pid: 11, started: 300 })]));
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_its_number() {
        let pid = std::process::id().cast_signed();
        let started = started(Path::new("/proc"), pid).unwrap();
        assert!(Process { pid, started }.lives());
        assert!(!Process { pid, started: started + 1 }.lives());
    }
}
