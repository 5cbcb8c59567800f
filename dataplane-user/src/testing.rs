//! What unit tests of several modules need.

use std::{
    io,
    sync::{Arc, Mutex},
};

/// What `work` logs, from debug on: one JSON object per line.
pub fn logged(work: impl FnOnce()) -> Vec<serde_json::Value> {
    let written = Written::default();
    let to = written.clone();
    let subscriber = tracing_subscriber::fmt().json().with_max_level(tracing::Level::DEBUG);
    tracing::subscriber::with_default(subscriber.with_writer(move || to.clone()).finish(), work);
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
