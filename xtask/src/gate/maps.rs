//! Which maps Linux 5.15 creates, with which flags, for which programs.

use super::object::Map;

/// `include/uapi/linux/bpf.h`: enum bpf_map_type and the flags of `BPF_MAP_CREATE`.
const NO_PREALLOC: u32 = 1 << 0;
const NO_COMMON_LRU: u32 = 1 << 1;
const NUMA_NODE: u32 = 1 << 2;
/// `BPF_F_RDONLY`, `WRONLY`, `RDONLY_PROG`, `WRONLY_PROG`.
const ACCESS: u32 = 1 << 3 | 1 << 4 | 1 << 7 | 1 << 8;
const ZERO_SEED: u32 = 1 << 6;
const CLONE: u32 = 1 << 9;
const MMAPABLE: u32 = 1 << 10;

struct Kind {
    id: u32,
    name: &'static str,
    allowed: u32,
    required: u32,
}

const HASH_FLAGS: u32 = NO_PREALLOC | NO_COMMON_LRU | NUMA_NODE | ACCESS | ZERO_SEED;

/// The types the object may use. Another one: read its `map_alloc_check` in 5.15 and add it.
const KINDS: [Kind; 9] = [
    // kernel/bpf/hashtab.c: htab_map_alloc_check.
    Kind { id: 1, name: "HASH", allowed: HASH_FLAGS & !NO_COMMON_LRU, required: 0 },
    // kernel/bpf/arraymap.c: array_map_alloc_check.
    Kind { id: 2, name: "ARRAY", allowed: NUMA_NODE | ACCESS | MMAPABLE, required: 0 },
    Kind { id: 5, name: "PERCPU_HASH", allowed: HASH_FLAGS & !NO_COMMON_LRU & !NUMA_NODE, required: 0 },
    Kind { id: 6, name: "PERCPU_ARRAY", allowed: ACCESS, required: 0 },
    // An LRU is always preallocated.
    Kind { id: 9, name: "LRU_HASH", allowed: HASH_FLAGS & !NO_PREALLOC, required: 0 },
    // kernel/bpf/lpm_trie.c: trie_alloc.
    Kind { id: 11, name: "LPM_TRIE", allowed: NO_PREALLOC | NUMA_NODE | ACCESS, required: NO_PREALLOC },
    // net/core/sock_map.c: sock_hash_alloc.
    Kind { id: 18, name: "SOCKHASH", allowed: NUMA_NODE | ACCESS, required: 0 },
    // kernel/bpf/bpf_local_storage.c: bpf_local_storage_map_alloc_check.
    Kind { id: 24, name: "SK_STORAGE", allowed: NO_PREALLOC | CLONE, required: NO_PREALLOC },
    // kernel/bpf/ringbuf.c: ringbuf_map_alloc.
    Kind { id: 27, name: "RINGBUF", allowed: NUMA_NODE, required: 0 },
];

/// Checks a map by itself.
pub fn check(map: &Map) -> Result<(), String> {
    let Some(kind) = KINDS.iter().find(|kind| kind.id == map.kind) else {
        return Err(format!(
            "map type {} is not in the table of 5.15's types (xtask/src/gate/maps.rs); 5.15 ends with 29",
            map.kind
        ));
    };
    let unknown = map.flags & !kind.allowed;
    if unknown != 0 {
        return Err(format!("5.15 refuses flags {unknown:#x} for {}", kind.name));
    }
    if map.flags & kind.required != kind.required {
        return Err(format!("5.15 wants flags {:#x} for {}", kind.required, kind.name));
    }
    if map.extra != 0 {
        return Err("map_extra came with Linux 5.16".into());
    }
    Ok(())
}

/// Checks a map in a program of type `program`.
pub fn check_use(map: &Map, program: &str) -> Result<(), String> {
    // kernel/bpf/verifier.c: check_map_prog_compatibility. An error on PREEMPT_RT, elsewhere a WARN in the kernel log.
    if program == "raw_tracepoint" && map.kind == 1 && map.flags & NO_PREALLOC != 0 {
        return Err(
            "5.15 calls a hash without preallocation unsafe in a tracing program, warns with a stack trace, and \
                    refuses it on PREEMPT_RT; instead: preallocate it (drop BPF_F_NO_PREALLOC)"
                .into(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(kind: u32, flags: u32) -> Map {
        Map { name: "M".into(), kind, flags, extra: 0 }
    }

    #[test]
    fn types_and_flags_of_515_pass() {
        for (kind, flags) in [(1, NO_PREALLOC), (2, MMAPABLE), (6, 0), (9, 0), (24, NO_PREALLOC), (27, 0)] {
            assert_eq!(check(&map(kind, flags)), Ok(()), "type {kind}");
        }
    }

    #[test]
    fn later_types_and_wrong_flags_are_refused() {
        // User ring buffer 6.1, cgroup storage 6.2, arena 6.9.
        for kind in [31, 32, 33] {
            assert!(check(&map(kind, 0)).unwrap_err().contains("map type"));
        }
        assert!(check(&map(6, MMAPABLE)).unwrap_err().contains("refuses"));
        assert!(check(&map(24, 0)).unwrap_err().contains("wants"));
        assert!(check(&Map { extra: 1, ..map(1, 0) }).unwrap_err().contains("map_extra"));
    }

    #[test]
    fn a_tracing_program_with_a_hash_that_allocates_is_refused() {
        assert!(check_use(&map(1, NO_PREALLOC), "raw_tracepoint").is_err());
        assert_eq!(check_use(&map(1, 0), "raw_tracepoint"), Ok(()));
        assert_eq!(check_use(&map(1, NO_PREALLOC), "sock_addr"), Ok(()));
    }
}
