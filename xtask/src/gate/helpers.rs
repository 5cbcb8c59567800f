//! Which helper a program type may call on Linux 5.15: the committed table, `linux-5.15.toml`.

use std::collections::HashMap;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

/// The parsed table.
#[derive(Debug, Deserialize)]
pub struct Table {
    names: Vec<String>,
    last: i32,
    instead: HashMap<String, String>,
    #[serde(flatten)]
    programs: HashMap<String, Program>,
}

#[derive(Debug, Deserialize)]
struct Program {
    source: String,
    inherits: Option<String>,
    #[serde(default)]
    except: Vec<String>,
    helpers: Vec<String>,
}

/// Why a helper may not be called.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub helper: String,
    pub why: String,
}

impl Table {
    /// Reads the committed table and checks that it only speaks of helpers that exist.
    pub fn committed() -> Result<Self> {
        let table: Self = toml::from_str(include_str!("linux-5.15.toml")).context("linux-5.15.toml does not parse")?;
        for (kind, program) in &table.programs {
            for helper in program.helpers.iter().chain(&program.except) {
                let id = table.names.iter().position(|name| name == helper);
                ensure!(
                    id.is_some_and(|id| i32::try_from(id).is_ok_and(|id| id <= table.last)),
                    "linux-5.15.toml: [{kind}] lists {helper}, which is no helper of 5.15"
                );
            }
            if let Some(parent) = &program.inherits {
                ensure!(table.programs.contains_key(parent), "linux-5.15.toml: [{kind}] inherits [{parent}]: no such");
            }
        }
        Ok(table)
    }

    /// Is there a section for this program type?
    pub fn knows(&self, kind: &str) -> bool {
        self.programs.contains_key(kind)
    }

    /// Checks one call by a program of type `kind` attached as `attach`.
    pub fn check(&self, kind: &str, attach: &str, id: i32) -> Result<(), Refusal> {
        let name = usize::try_from(id).ok().and_then(|id| self.names.get(id));
        let helper = name.map_or_else(|| format!("helper {id}"), |name| format!("bpf_{name} (helper {id})"));
        let refuse = |why: String| {
            let instead = name.and_then(|name| self.instead.get(name));
            let why = instead.map_or_else(|| why.clone(), |instead| format!("{why}; instead: {instead}"));
            Err(Refusal { helper: helper.clone(), why })
        };
        let Some(name) = name.filter(|_| id > 0) else {
            return refuse("no kernel has it, or an external symbol was left unresolved".into());
        };
        if id > self.last {
            return refuse(format!("newer than Linux 5.15, whose last helper is {}", self.last));
        }
        if !self.allowed(kind, name) {
            let source = &self.programs[kind].source;
            return refuse(format!("5.15 does not allow it in {kind} programs ({source})"));
        }
        // sock_addr_func_proto: the source port can only be chosen while connecting.
        if kind == "sock_addr" && name == "bind" && !attach.starts_with("connect") {
            return refuse(format!("5.15 allows it in connect4 and connect6 only, not in {attach}"));
        }
        Ok(())
    }

    fn allowed(&self, kind: &str, helper: &str) -> bool {
        let Some(program) = self.programs.get(kind) else { return false };
        let listed = |list: &[String]| list.iter().any(|name| name == helper);
        !listed(&program.except)
            && (listed(&program.helpers)
                || program.inherits.as_ref().is_some_and(|parent| self.allowed(parent, helper)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(kind: &str, attach: &str, id: i32) -> String {
        Table::committed().unwrap().check(kind, attach, id).unwrap_err().why
    }

    #[test]
    fn helpers_of_515_pass_where_515_allows_them() {
        let table = Table::committed().unwrap();
        // (program type, attach type, helper): one that only this table has, and one each from what it inherits.
        for (kind, attach, id) in [
            ("sock_addr", "connect4", 64),
            ("sock_addr", "sendmsg4", 122),
            ("sock_addr", "connect6", 137),
            ("sock_ops", "", 122),
            ("sched_cls", "", 152),
            ("sched_cls", "", 8),
            ("raw_tracepoint", "", 14),
            ("raw_tracepoint", "", 113),
        ] {
            assert_eq!(table.check(kind, attach, id), Ok(()), "{kind} {attach} {id}");
        }
    }

    #[test]
    fn a_helper_newer_than_515_is_refused_with_a_way_out() {
        let refusal = Table::committed().unwrap().check("sched_cls", "", 181).unwrap_err();
        assert_eq!(refusal.helper, "bpf_loop (helper 181)");
        assert!(refusal.why.contains("newer than Linux 5.15") && refusal.why.contains("constant bound"), "{refusal:?}");
    }

    #[test]
    fn a_helper_of_another_program_type_is_refused() {
        // bpf_get_netns_cookie came to tc in 6.13, bpf_get_current_pid_tgid to sockops in 6.10.
        assert!(why("sched_cls", "", 122).contains("tc_cls_act_func_proto"));
        assert!(why("sock_ops", "", 14).contains("sock_ops_func_proto"));
        // A timer in a tracing program is refused by a rule of the verifier, not by a table of helpers.
        assert!(why("raw_tracepoint", "", 171).contains("raw_tracepoint"));
        assert!(why("sock_addr", "sendmsg4", 64).contains("connect4"));
    }

    #[test]
    fn an_unresolved_call_is_refused() {
        assert!(why("sock_ops", "", -1).contains("unresolved"));
    }
}
