//! `cargo xtask gate`: nothing in the BPF object that Linux 5.15 lacks, read off the object itself.
//!
//! It stands in for a 5.15 kernel: helpers per program type, instructions, map types and flags. What only a verifier
//! can say (bounds, complexity) it cannot; kernels around 5.15 say that.

mod helpers;
mod instructions;
mod maps;
mod object;

use std::{fmt, fs, path::Path};

use anyhow::{Context as _, Result, bail};

use helpers::Table;
use instructions::{Call, LD_IMM64};
use object::{Object, Program};

/// Something 5.15 would refuse.
#[derive(Debug)]
struct Finding {
    /// Program or map.
    place: String,
    /// Number of the instruction in the program as loaded (the verifier's log counts the same way).
    at: Option<usize>,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some(at) => write!(f, "{}: instruction {at}: {}", self.place, self.what),
            None => write!(f, "{}: {}", self.place, self.what),
        }
    }
}

/// Checks the object at `path` and reports; fails if there is anything to report.
pub fn run(path: &Path) -> Result<()> {
    let data = fs::read(path)
        .with_context(|| format!("cannot read {}: run `cargo xtask build-ebpf` first", path.display()))?;
    let object = Object::parse(&data).with_context(|| path.display().to_string())?;
    let findings = findings(&object, &Table::committed()?);
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("Linux 5.15 would not take this object: {} findings above", findings.len());
    }
    println!(
        "{} programs ({} instructions) and {} maps hold nothing that Linux 5.15 lacks",
        object.programs.len(),
        object.programs.iter().map(|program| program.instructions.len()).sum::<usize>(),
        object.maps.len()
    );
    Ok(())
}

fn findings(object: &Object, table: &Table) -> Vec<Finding> {
    let mut findings = Vec::new();
    for map in &object.maps {
        if let Err(what) = maps::check(map) {
            findings.push(Finding { place: format!("map {}", map.name), at: None, what });
        }
    }
    for program in &object.programs {
        check_program(program, table, &mut findings);
        let mut seen = Vec::new();
        for &(at, index) in &program.uses {
            let Some(map) = object.maps.get(index) else { continue };
            if seen.contains(&index) {
                continue;
            }
            seen.push(index);
            if let Err(what) = maps::check_use(map, &program.kind) {
                let place = format!("program {}", program.name);
                findings.push(Finding { place, at: Some(at), what: format!("map {}: {what}", map.name) });
            }
        }
    }
    findings
}

fn check_program(program: &Program, table: &Table, findings: &mut Vec<Finding>) {
    let place = format!("program {}", program.name);
    if !table.knows(&program.kind) {
        let what = format!(
            "program type {} is not in xtask/src/gate/linux-5.15.toml: add what 5.15 lets it call, with the source",
            program.kind
        );
        findings.push(Finding { place, at: None, what });
        return;
    }
    let mut at = 0;
    while let Some(&instruction) = program.instructions.get(at) {
        let what = match instructions::check(instruction) {
            Ok(Some(Call::Helper(id))) => table
                .check(&program.kind, &program.attach, id)
                .err()
                .map(|refusal| format!("call of {}: {}", refusal.helper, refusal.why)),
            Ok(_) => None,
            Err(why) => Some(why.to_owned()),
        };
        findings.extend(what.map(|what| Finding { place: place.clone(), at: Some(at), what }));
        // The second half of a 64-bit load is no instruction.
        at += if instruction.code == LD_IMM64 { 2 } else { 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::{instructions::Instruction, object::Map, *};

    fn object(kind: &str, instructions: Vec<Instruction>) -> Object {
        let program =
            Program { name: "p".into(), kind: kind.into(), attach: String::new(), instructions, uses: Vec::new() };
        Object { programs: vec![program], maps: Vec::new() }
    }

    fn check(object: &Object) -> Vec<String> {
        findings(object, &Table::committed().unwrap()).iter().map(ToString::to_string).collect()
    }

    const EXIT: Instruction = Instruction { code: 0x95, src: 0, off: 0, imm: 0 };
    const CALL_LOOP: Instruction = Instruction { code: 0x85, src: 0, off: 0, imm: 181 };

    #[test]
    fn a_program_of_515_passes() {
        let lookup = Instruction { imm: 1, ..CALL_LOOP };
        assert_eq!(check(&object("sched_cls", vec![lookup, EXIT])), Vec::<String>::new());
    }

    #[test]
    fn a_finding_names_program_instruction_helper_and_remedy() {
        let found = check(&object("sched_cls", vec![EXIT, CALL_LOOP, EXIT]));
        assert_eq!(found.len(), 1);
        for part in ["program p", "instruction 1", "bpf_loop", "instead"] {
            assert!(found[0].contains(part), "{part}: {}", found[0]);
        }
    }

    #[test]
    fn the_second_half_of_a_wide_load_is_not_read_as_an_instruction() {
        let load = Instruction { code: LD_IMM64, ..EXIT };
        let half = Instruction { code: 0, src: 0, off: 0, imm: 7 };
        assert_eq!(check(&object("sched_cls", vec![load, half, EXIT])), Vec::<String>::new());
    }

    #[test]
    fn an_unknown_program_type_is_refused() {
        assert!(check(&object("netfilter", vec![EXIT]))[0].contains("linux-5.15.toml"));
    }

    #[test]
    fn maps_are_checked_alone_and_where_they_are_used() {
        let mut object = object("raw_tracepoint", vec![EXIT]);
        object.maps = vec![
            Map { name: "ARENA".into(), kind: 33, flags: 0, extra: 0 },
            Map { name: "PODS".into(), kind: 1, flags: 1, extra: 0 },
        ];
        object.programs[0].uses = vec![(4, 1), (9, 1)];
        let found = check(&object);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("map ARENA"));
        assert!(found[1].contains("instruction 4: map PODS"));
    }
}
