//! The tunnel's protocol end to end over loopback: both sides of it here, with certificates made for the test.

mod conformance;
mod hostile;
mod speed;
mod streams;
mod support;
mod wire;
