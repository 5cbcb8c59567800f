//! Checks that try: BTF offsets, maps, programs, helpers, tracepoints, namespaces, pins.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use dataplane_ebpf::offsets::OFFSETS;

use super::Check;
use crate::kernel::{Config, Tcx, btf, probe};

/// Every kind of map in the object.
const MAPS: &[(MapType, &str)] = &[
    (MapType::Hash, "hash"),
    (MapType::Array, "array"),
    (MapType::PerCpuArray, "per-CPU array"),
    (MapType::LruHash, "LRU hash"),
    (MapType::SkStorage, "socket storage"),
    (MapType::RingBuf, "ring buffer"),
];

/// Every kind of program in the object.
const PROGRAMS: &[(ProgramType, &str)] = &[
    (ProgramType::CgroupSockAddr, "cgroup socket address"),
    (ProgramType::SockOps, "sockops"),
    (ProgramType::RawTracePoint, "raw tracepoint"),
    (ProgramType::SchedClassifier, "tc classifier"),
];

/// The helpers that decide: the youngest ones, and those that configurations or lockdown take away.
const HELPERS: &[(ProgramType, BpfHelper, &str)] = &[
    (ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_get_netns_cookie, "get_netns_cookie (connect)"),
    (ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_sk_storage_get, "sk_storage_get (connect)"),
    (ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_ringbuf_reserve, "ringbuf_reserve (connect)"),
    (ProgramType::SockOps, BpfHelper::BPF_FUNC_skc_to_tcp_sock, "skc_to_tcp_sock (sockops)"),
    (ProgramType::SockOps, BpfHelper::BPF_FUNC_probe_read_kernel, "probe_read_kernel (sockops)"),
    (ProgramType::SockOps, BpfHelper::BPF_FUNC_sk_storage_get, "sk_storage_get (sockops)"),
    (ProgramType::RawTracePoint, BpfHelper::BPF_FUNC_probe_read_kernel, "probe_read_kernel (tracepoints)"),
    (ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_skb_change_tail, "skb_change_tail (tc)"),
    (ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_redirect_neigh, "redirect_neigh (tc)"),
    (ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_fib_lookup, "fib_lookup (tc)"),
    (ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "ktime_get_coarse_ns (tc)"),
    (ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_skc_lookup_tcp, "skc_lookup_tcp (tc)"),
    (ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_sk_storage_get, "sk_storage_get (tc)"),
];

pub fn offsets() -> Check {
    const NAME: &str = "BTF";
    let btf = match btf::open() {
        Ok(btf) => btf,
        Err(error) => {
            let remedy = "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, and mount /sys";
            return Check::fail(NAME, error.to_string(), remedy);
        }
    };
    let missing: Vec<_> =
        OFFSETS.iter().filter_map(|global| btf::resolve(&btf, global).err()).map(|error| error.to_string()).collect();
    if missing.is_empty() {
        return Check::ok(NAME, format!("/sys/kernel/btf/vmlinux, all {} offsets found", OFFSETS.len()));
    }
    Check::fail(NAME, missing.join("; "), "this kernel is laid out in a way hitless does not know: please report it")
}

/// Which of `wanted` are not there, or could not be tried.
fn lacking<T: Copy>(wanted: &[(T, &'static str)], try_it: impl Fn(T) -> Result<bool, String>) -> Vec<String> {
    wanted
        .iter()
        .filter_map(|(what, name)| match try_it(*what) {
            Ok(true) => None,
            Ok(false) => Some((*name).to_owned()),
            Err(error) => Some(format!("{name} ({error})")),
        })
        .collect()
}

fn judge(name: &'static str, all: usize, lacking: &[String], remedy: &str) -> Check {
    if lacking.is_empty() {
        return Check::ok(name, format!("all {all} that are used"));
    }
    Check::fail(name, format!("missing: {}", lacking.join(", ")), remedy)
}

pub fn maps() -> Check {
    let lacking = lacking(MAPS, |kind| is_map_supported(kind).map_err(|error| causes(&error)));
    judge("map types", MAPS.len(), &lacking, "use a kernel of version 5.15 or newer with CONFIG_BPF_SYSCALL=y, as root")
}

pub fn programs() -> Check {
    let lacking = lacking(PROGRAMS, |kind| is_program_supported(kind).map_err(|error| causes(&error)));
    let remedy =
        "use a kernel of version 5.15 or newer with CONFIG_CGROUP_BPF, CONFIG_BPF_EVENTS and CONFIG_NET_CLS_BPF";
    judge("program types", PROGRAMS.len(), &lacking, remedy)
}

pub fn helpers() -> Check {
    let wanted: Vec<_> = HELPERS.iter().map(|(kind, helper, name)| ((*kind, *helper), *name)).collect();
    let lacking = lacking(&wanted, |(kind, helper)| is_helper_supported(kind, helper).map_err(|error| causes(&error)));
    let remedy =
        "use a kernel of version 5.15 or newer; probe_read_kernel is also taken away by lockdown=confidentiality";
    judge("helpers", HELPERS.len(), &lacking, remedy)
}

pub fn tracepoints() -> Check {
    const NAME: &str = "raw tracepoints";
    match probe::missing_tracepoints() {
        Ok(missing) if missing.is_empty() => Check::ok(NAME, "signal_generate, inet_sock_set_state"),
        Ok(missing) => {
            let missing: Vec<_> = missing.iter().map(|(name, error)| format!("{name}: {error}")).collect();
            Check::fail(NAME, missing.join("; "), "use a kernel with CONFIG_TRACEPOINTS and CONFIG_BPF_EVENTS, as root")
        }
        Err(error) => Check::fail(NAME, error.to_string(), "run as root: a program could not be loaded"),
    }
}

pub fn network_namespaces(tcx: Tcx) -> [Check; 2] {
    let found = probe::namespaces();
    let entering = match &found.entered {
        Ok(()) => Check::ok("network namespaces", "made, left and entered"),
        Err(error) => Check::fail(
            "network namespaces",
            error.to_string(),
            "run with CAP_SYS_ADMIN in the host's user namespace, and with hostPID in a container",
        ),
    };
    let tcx = match (&found.tcx, tcx) {
        (Ok(()), Tcx::Auto) => Check::ok("tcx", "links are used"),
        (Ok(()), Tcx::Off) => Check::ok("tcx", "there, but switched off: clsact is used"),
        (Err(_), _) if found.entered.is_err() => Check::warn("tcx", "not tried", "enter network namespaces first"),
        (Err(error), _) => Check::warn(
            "tcx",
            format!("not there ({error}): clsact is used"),
            "nothing to do; from Linux 6.6 on nobody can flush the filters by accident",
        ),
    };
    [entering, tcx]
}

pub fn pins(config: &Config) -> Check {
    const NAME: &str = "installation";
    let root = config.root();
    let root = root.display();
    let (found, detached) = match probe::pinned(config) {
        Ok(probe::Pinned::Nothing) => return Check::ok(NAME, format!("nothing at {root} yet")),
        Ok(probe::Pinned::Held { by, layout, links, detached }) => {
            (format!("{root}, layout {layout}, {links} links, held by {by}"), detached)
        }
        Ok(probe::Pinned::Orphaned { layout, links, detached, known }) => {
            let theirs = if known { "" } else { " (of another version or other sizes)" };
            let found = format!("{root}, layout {layout}{theirs}, {links} links serve without an agent");
            let remedy = "start the agent: it adopts them; or remove them with `hitless uninstall`";
            return Check::warn(NAME, with_detached(found, &detached), remedy);
        }
        Err(error) => return Check::warn(NAME, error.to_string(), "see the check it names"),
    };
    if detached.is_empty() {
        return Check::ok(NAME, found);
    }
    let remedy = "the agent attaches again within seconds; if not, see `hitless status`";
    Check::warn(NAME, with_detached(found, &detached), remedy)
}

fn with_detached(found: String, detached: &[String]) -> String {
    if detached.is_empty() { found } else { format!("{found}; detached: {}", detached.join(", ")) }
}

pub fn neighbours(config: &Config) -> Check {
    const NAME: &str = "other programs";
    match probe::neighbours(config) {
        Ok(found) if found.is_empty() => Check::ok(NAME, "none at hitless's cgroup hooks"),
        Ok(found) => {
            let hooks: Vec<_> = found
                .iter()
                .map(|(hook, programs)| format!("{} ({})", hook.trim_start_matches("hitless_"), programs.join(", ")))
                .collect();
            Check::warn(
                NAME,
                format!("at {}", hooks.join("; ")),
                "they run beside hitless; another load balancer at connect (such as Cilium's socket LB) must leave \
                 hitless's services alone, or whichever runs first decides",
            )
        }
        Err(error) => Check::warn(NAME, error.to_string(), "see the check of cgroup2; querying needs CAP_NET_ADMIN"),
    }
}

/// An error with its causes.
fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn what_is_lacking_is_named_and_what_could_not_be_tried_says_why() {
        let wanted = [(1, "one"), (2, "two"), (3, "three")];
        let lacking = lacking(&wanted, |n| match n {
            1 => Ok(true),
            2 => Ok(false),
            _ => Err("EPERM".to_owned()),
        });
        assert_eq!(lacking, ["two", "three (EPERM)"]);
        let check = judge("things", 3, &lacking, "mend it");
        assert_eq!((check.status, check.found.as_str()), (Status::Fail, "missing: two, three (EPERM)"));
        assert_eq!(check.remedy.as_deref(), Some("mend it"));
        assert_eq!(judge("things", 3, &[], "mend it").status, Status::Ok);
    }
}
