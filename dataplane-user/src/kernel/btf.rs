//! Where the running kernel keeps the members that the programs read, from its BTF.

use std::io;

use btf_rs::{Backend, Btf, Struct, Type};
use dataplane_ebpf::offsets::{Global, OFFSETS, Wanted};

use super::error::Error;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// The value of every global of the object that is an offset, by name.
pub fn globals() -> Result<Vec<(&'static str, u32)>, Error> {
    let btf = open()?;
    OFFSETS.iter().map(|global| Ok((global.name, resolve(&btf, global)?))).collect()
}

pub fn open() -> Result<Btf, Error> {
    Btf::from_file_with_backend(VMLINUX, Backend::Mmap).map_err(|error| Error::NoBtf {
        source: match error {
            btf_rs::Error::IO(source) => source,
            error => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
        },
    })
}

/// One global's value in this kernel.
pub fn resolve(btf: &Btf, global: &Global) -> Result<u32, Error> {
    let missing = || Error::BtfMember {
        what: if global.path.is_empty() {
            global.of.to_owned()
        } else {
            format!("{}.{}", global.of, global.path.join("."))
        },
        global: global.name,
    };
    // A name may also be a function's or a typedef's, and a struct may have been split in two by
    // differing definitions: the first that has the members is it.
    let types = btf.resolve_types_by_name(global.of).map_err(|_| missing())?;
    types
        .into_iter()
        .filter_map(|found| match found {
            Type::Struct(found) => Some(found),
            _ => None,
        })
        .find_map(|found| value(btf, &found, global))
        .ok_or_else(missing)
}

fn value(btf: &Btf, found: &Struct, global: &Global) -> Option<u32> {
    if global.wanted == Wanted::Size {
        return u32::try_from(found.size()).ok();
    }
    let mut bits = 0;
    let mut width = None;
    let mut at = found.clone();
    for (depth, name) in global.path.iter().enumerate() {
        let (offset, bitfield, inner) = member(btf, &at, name)?;
        bits += offset;
        width = bitfield;
        if depth + 1 < global.path.len() {
            at = inner?;
        }
    }
    match (global.wanted, width) {
        (Wanted::Offset, None) => Some(bits / 8),
        (Wanted::BitfieldByte, Some(_)) => Some(bits / 8),
        // Bitfields fill from the least significant bit on the little-endian targets of hitless.
        (Wanted::BitfieldMask, Some(width)) if bits % 8 + width <= 8 => Some(((1 << width) - 1) << (bits % 8)),
        _ => None,
    }
}

/// A member's offset in bits, its width if it is a bitfield, and its type if that is a struct or
/// union; anonymous structs and unions are searched as the C language does.
fn member(btf: &Btf, within: &Struct, name: &str) -> Option<(u32, Option<u32>, Option<Struct>)> {
    for member in &within.members {
        let called = btf.resolve_name(member).unwrap_or_default();
        if called == name {
            let width = member.bitfield_size().filter(|width| *width > 0);
            return Some((member.bit_offset(), width, aggregate(btf, member)));
        }
        if called.is_empty()
            && let Some(inner) = aggregate(btf, member)
            && let Some((offset, width, found)) = self::member(btf, &inner, name)
        {
            return Some((member.bit_offset() + offset, width, found));
        }
    }
    None
}

/// The struct or union a member is, through typedefs and qualifiers.
fn aggregate(btf: &Btf, member: &btf_rs::Member) -> Option<Struct> {
    btf.chained_type_iter(member)
        .find_map(|found| match found {
            Type::Struct(found) | Type::Union(found) => Some(Some(found)),
            Type::Typedef(_) | Type::Const(_) | Type::Volatile(_) | Type::TypeTag(_) => None,
            // A pointer or an array leads elsewhere.
            _ => Some(None),
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs no privileges, only a kernel with BTF: the floor of this project.
    #[test]
    fn every_offset_is_found_in_the_running_kernel() {
        let values = globals().expect("this kernel has BTF with every member");
        let of = |name| values.iter().find(|(known, _)| *known == name).expect("listed").1;
        // sock_common is what sock starts with; skc_family follows two 4-byte unions and ports.
        assert_eq!(of("OFF_SK_FAMILY"), 16);
        assert_eq!(of("OFF_SK_NUM"), 14);
        assert_eq!(of("OFF_SK_RCV_SADDR"), 4);
        assert_eq!(of("SIZE_UPID"), 16);
        assert!(of("OFF_SK_V6ONLY_MASK").is_power_of_two());
    }
}
