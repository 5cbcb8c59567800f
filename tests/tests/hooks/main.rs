//! The hooks themselves, in a scratch cgroup and network namespace: what connect(), sendmsg(), signals and
//! listeners do to sockets and health words.

mod choice;
mod node;
mod outcome;
mod translate;
