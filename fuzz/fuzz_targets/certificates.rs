#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dataplane_user::fuzz::certificates(bytes));
