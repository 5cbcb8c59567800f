//! The `EVENTS` ring: what the programs tell.

use std::{
    os::fd::{AsRawFd, RawFd},
    path::Path,
};

use aya::maps::{Map, MapData, MapError, RingBuf};
use dataplane_ebpf::abi::Event;

use super::error::Error;

/// Readable (`AsyncFd`) when there is something in the ring.
pub struct Events(RingBuf<MapData>);

impl Events {
    pub(super) fn open(pin: &Path) -> Result<Self, Error> {
        let open = || RingBuf::try_from(Map::from_map_data(MapData::from_pin(pin)?)?);
        open().map(Self).map_err(|error: MapError| Error::Load { message: format!("ring EVENTS: {error}") })
    }

    /// The next event, if there is one now.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let item = self.0.next()?;
            if item.len() >= size_of::<Event>() {
                // SAFETY: long enough, and any bit pattern is an Event (integers only); the ring
                // aligns records to 8, read_unaligned does not even ask for that.
                return Some(unsafe { std::ptr::read_unaligned(item.as_ptr().cast()) });
            }
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
