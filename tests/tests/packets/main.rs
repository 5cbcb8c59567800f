//! L3 by itself, packet by packet: what refuses, what does not, and that a moved flow is a flow like
//! any other. Real sockets, real programs, real interfaces.

mod bench;
mod cost;
mod forged;
mod moved;
mod refused;
