//! The BPF object as the kernel will get it: programs with the functions they call linked in, and maps.

use std::collections::HashSet;

use anyhow::{Context as _, Result, ensure};
use aya_obj::{EbpfSectionKind, Object as Parsed, ProgramSection};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::instructions::{Instruction, LD_IMM64, PSEUDO_MAP};

/// What the gate looks at.
#[derive(Debug)]
pub struct Object {
    pub programs: Vec<Program>,
    pub maps: Vec<Map>,
}

/// One program. Instruction numbers are those of the verifier's log.
#[derive(Debug)]
pub struct Program {
    pub name: String,
    /// The section's word for the program type, as in `linux-5.15.toml`.
    pub kind: String,
    /// `connect4` and the like; empty where the program type says all.
    pub attach: String,
    pub instructions: Vec<Instruction>,
    /// Instruction number and place in `Object::maps`.
    pub uses: Vec<(usize, usize)>,
}

/// One map; numbers as in `include/uapi/linux/bpf.h`.
#[derive(Debug)]
pub struct Map {
    pub name: String,
    pub kind: u32,
    pub flags: u32,
    pub extra: u64,
}

impl Object {
    pub fn parse(data: &[u8]) -> Result<Self> {
        refuse_externals(data)?;
        let mut parsed = Parsed::parse(data).context("not a BPF object that aya can load")?;
        // What aya does before loading, with a map's place in the list for its file descriptor.
        let maps: Vec<_> = parsed.maps.iter().map(|(name, map)| (name.clone(), map.clone())).collect();
        let text: HashSet<usize> = parsed.functions.keys().map(|(section, _)| *section).collect();
        let numbered = maps.iter().zip(0..).map(|((name, map), fd)| (name.as_str(), fd, map));
        parsed.relocate_maps(numbered, &text).context("cannot resolve the maps")?;
        parsed.relocate_calls(&text).context("cannot link the functions")?;

        let mut programs = Vec::new();
        for (name, program) in &parsed.programs {
            let function = parsed.functions.get(&program.function_key()).context("a program is a function")?;
            let (kind, attach) = section(&program.section);
            let instructions: Vec<_> = function.instructions.iter().map(decode).collect();
            programs.push(Program { name: name.clone(), kind, attach, uses: uses(&instructions), instructions });
        }
        programs.sort_by(|a, b| a.name.cmp(&b.name));
        let maps = maps
            .into_iter()
            // Globals are arrays that the loader makes: flags of its own choosing by the features it finds.
            .map(|(name, map)| match map.section_kind() {
                EbpfSectionKind::Bss | EbpfSectionKind::Data | EbpfSectionKind::Rodata => {
                    Map { name, kind: 2, flags: 0, extra: 0 }
                }
                _ => Map { name, kind: map.map_type(), flags: map.map_flags(), extra: map.map_extra() },
            })
            .collect();
        Ok(Self { programs, maps })
    }
}

/// Symbols the loader would have to find in the running kernel.
fn refuse_externals(data: &[u8]) -> Result<()> {
    let file = object::File::parse(data).context("not an ELF file")?;
    for section in file.sections() {
        let name = section.name().unwrap_or_default();
        ensure!(
            ![".ksyms", ".kconfig"].contains(&name),
            "section {name}: kernel symbols and options are not resolved on 5.15 by aya"
        );
    }
    for symbol in file.symbols().filter(|symbol| symbol.is_undefined()) {
        let name = symbol.name().unwrap_or_default();
        ensure!(name.is_empty(), "undefined symbol {name}: a kfunc (none on 5.15) or a function that was not linked");
    }
    Ok(())
}

fn section(section: &ProgramSection) -> (String, String) {
    let (kind, attach) = match section {
        ProgramSection::CgroupSockAddr { attach_type } => ("sock_addr", format!("{attach_type:?}").to_lowercase()),
        ProgramSection::SockOps => ("sock_ops", String::new()),
        ProgramSection::SkLookup => ("sk_lookup", String::new()),
        ProgramSection::SchedClassifier => ("sched_cls", String::new()),
        ProgramSection::RawTracePoint => ("raw_tracepoint", String::new()),
        other => return (format!("{other:?}").to_lowercase(), String::new()),
    };
    (kind.to_owned(), attach)
}

fn decode(raw: &aya_obj::generated::bpf_insn) -> Instruction {
    Instruction { code: raw.code, src: raw.src_reg(), off: raw.off, imm: raw.imm }
}

/// Where an instruction loads a map's address.
fn uses(instructions: &[Instruction]) -> Vec<(usize, usize)> {
    let maps = |(at, instruction): (usize, &Instruction)| {
        (instruction.code == LD_IMM64 && PSEUDO_MAP.contains(&instruction.src))
            .then(|| Some((at, usize::try_from(instruction.imm).ok()?)))
            .flatten()
    };
    instructions.iter().enumerate().filter_map(maps).collect()
}
