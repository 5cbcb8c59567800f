//! Which instructions Linux 5.15's verifier knows: the v3 set with the atomics of 5.12.

/// One 8-byte instruction, decoded no further than needed here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Instruction {
    pub code: u8,
    pub src: u8,
    pub off: i16,
    pub imm: i32,
}

// include/uapi/linux/bpf.h and bpf_common.h.
const CLASS: u8 = 0x07;
const LD: u8 = 0x00;
const LDX: u8 = 0x01;
const ST: u8 = 0x02;
const STX: u8 = 0x03;
const ALU: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
const OP: u8 = 0xf0;
const MODE: u8 = 0xe0;
const MODE_IMM: u8 = 0x00;
const MODE_ABS: u8 = 0x20;
const MODE_IND: u8 = 0x40;
const MODE_MEM: u8 = 0x60;
const MODE_ATOMIC: u8 = 0xc0;
const SIZE: u8 = 0x18;
const SIZE_W: u8 = 0x00;
const SIZE_DW: u8 = 0x18;
const OP_MOV: u8 = 0xb0;
const OP_END: u8 = 0xd0;
const OP_JA: u8 = 0x00;
const OP_CALL: u8 = 0x80;
const OP_EXIT: u8 = 0x90;
/// JLT, JLE, JSLT, JSLE are the last conditions of 5.15; 0xe0 is may_goto (6.9).
const OP_JSLE: u8 = 0xd0;
pub const LD_IMM64: u8 = LD | SIZE_DW | MODE_IMM;
/// `BPF_PSEUDO_MAP_FD` and `BPF_PSEUDO_MAP_VALUE`: the immediate names a map.
pub const PSEUDO_MAP: [u8; 2] = [1, 2];
/// `BPF_PSEUDO_MAP_IDX_VALUE` (5.14) is the last meaning of a source register in a 64-bit load.
const LAST_PSEUDO_LOAD: u8 = 6;
/// add, or, and, xor, each with and without fetch; xchg, cmpxchg (5.12).
const ATOMICS: [i32; 10] = [0x00, 0x40, 0x50, 0xa0, 0x01, 0x41, 0x51, 0xa1, 0xe1, 0xf1];

/// What an instruction calls, if it is a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    Helper(i32),
    Function,
}

/// Checks one instruction; a call's target is left to the caller.
pub fn check(instruction: Instruction) -> Result<Option<Call>, &'static str> {
    let Instruction { code, src, off, imm } = instruction;
    let op = code & OP;
    match code & CLASS {
        class @ (ALU | ALU64) => match op {
            OP_END if class == ALU64 => Err("bswap (Linux 6.6): use a swap to big or little endian"),
            OP_MOV if off == 8 || off == 16 || off == 32 => Err("movsx (Linux 6.6): shift left, then arithmetic right"),
            OP_MOV if off != 0 => Err("address space or per-CPU mov (Linux 6.9)"),
            // Division and modulo: the offset says signed.
            _ if off != 0 => Err("sdiv or smod (Linux 6.6): divide unsigned and set the sign"),
            0x00..=OP_END => Ok(None),
            _ => Err("unknown arithmetic operation"),
        },
        JMP => match op {
            OP_CALL => match src {
                0 => Ok(Some(Call::Helper(imm))),
                1 => Ok(Some(Call::Function)),
                2 => Err("call of a kernel function (kfunc): 5.15 allows none outside struct_ops"),
                _ => Err("call with an unknown source register"),
            },
            op if op <= OP_JSLE => Ok(None),
            _ => Err("may_goto (Linux 6.9): use a loop with a constant bound"),
        },
        JMP32 => match op {
            OP_JA => Err("gotol, the 32-bit jump (Linux 6.6): compile for v3"),
            OP_CALL | OP_EXIT => Err("32-bit call or exit"),
            op if op <= OP_JSLE => Ok(None),
            _ => Err("unknown 32-bit jump"),
        },
        LD => match code & MODE {
            _ if code == LD_IMM64 && src <= LAST_PSEUDO_LOAD => Ok(None),
            MODE_ABS | MODE_IND if code & SIZE != SIZE_DW => Ok(None),
            _ => Err("unknown load of an immediate"),
        },
        LDX => match code & MODE {
            MODE_MEM => Ok(None),
            0x80 => Err("ldsx, the sign-extending load (Linux 6.6): load, then shift left and arithmetic right"),
            _ => Err("unknown load"),
        },
        ST if code & MODE == MODE_MEM => Ok(None),
        STX => match code & MODE {
            MODE_MEM => Ok(None),
            MODE_ATOMIC if !matches!(code & SIZE, SIZE_W | SIZE_DW) => Err("atomic of 1 or 2 bytes: use 4 or 8"),
            MODE_ATOMIC if ATOMICS.contains(&imm) => Ok(None),
            MODE_ATOMIC => Err("atomic load-acquire or store-release (Linux 6.15): use a volatile access"),
            _ => Err("unknown store"),
        },
        _ => Err("unknown store of an immediate"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u8) -> Instruction {
        Instruction { code, ..Instruction::default() }
    }

    #[test]
    fn instructions_of_v3_pass() {
        for code in [0xb7, 0xbf, 0x0f, 0xdc, 0x05, 0x15, 0xd6, 0x95, 0x18, 0x61, 0x7b, 0x62] {
            assert_eq!(check(instruction(code)), Ok(None), "{code:#x}");
        }
        for imm in ATOMICS {
            assert_eq!(check(Instruction { imm, ..instruction(0xdb) }), Ok(None), "atomic {imm:#x}");
        }
        assert_eq!(check(Instruction { imm: 5, ..instruction(0x85) }), Ok(Some(Call::Helper(5))));
        assert_eq!(check(Instruction { src: 1, ..instruction(0x85) }), Ok(Some(Call::Function)));
    }

    #[test]
    fn what_came_after_515_is_refused() {
        for (what, bad) in [
            ("movsx", Instruction { off: 8, ..instruction(0xbf) }),
            ("address space", Instruction { off: 1, ..instruction(0xbf) }),
            ("sdiv", Instruction { off: 1, ..instruction(0x3f) }),
            ("bswap", instruction(0xd7)),
            ("gotol", instruction(0x06)),
            ("may_goto", instruction(0xe5)),
            ("ldsx", instruction(0x81)),
            ("kfunc", Instruction { src: 2, ..instruction(0x85) }),
            ("load-acquire", Instruction { imm: 0x100, ..instruction(0xdb) }),
            ("1 or 2 bytes", instruction(0xcb)),
        ] {
            let why = check(bad).unwrap_err();
            assert!(why.contains(what), "{what}: {why}");
        }
    }
}
