//! The connections that are carried now, for whoever asks: each worker has a table of its own, without a lock, and answers
//! by itself. A connection costs an entry while it lives.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use super::access::Access;
use crate::hbone::relay::Counts as Bytes;

/// Rows that one worker tells at most, oldest first: an answer must not take the agent's memory.
pub const MOST: usize = 10_000;

/// A connection as it is now.
#[derive(Clone, Debug)]
pub struct Carried {
    pub access: Access,
    pub age: Duration,
    /// Bytes that the pod here sent and received.
    pub sent: u64,
    pub received: u64,
}

/// Who talks to whom, and what went through.
type Entry = (Rc<Access>, Rc<Bytes>);

/// One worker's.
#[derive(Debug, Default)]
pub struct Table {
    next: Cell<u64>,
    /// By number, and so by age.
    open: RefCell<BTreeMap<u64, Entry>>,
}

/// A connection's entry, until it is dropped.
#[derive(Debug)]
pub struct Place {
    table: Rc<Table>,
    number: u64,
}

impl Table {
    pub fn enter(self: &Rc<Self>, access: &Rc<Access>, bytes: &Rc<Bytes>) -> Place {
        let number = self.next.get();
        self.next.set(number + 1);
        self.open.borrow_mut().insert(number, (access.clone(), bytes.clone()));
        Place { table: self.clone(), number }
    }

    /// The oldest ones.
    pub fn rows(&self) -> Vec<Carried> {
        let open = self.open.borrow();
        let row = |(access, bytes): &Entry| Carried {
            access: Access::clone(access),
            age: access.began.elapsed(),
            sent: bytes.sent.get(),
            received: bytes.received.get(),
        };
        open.values().take(MOST).map(row).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.open.borrow_mut().remove(&self.number);
    }
}
