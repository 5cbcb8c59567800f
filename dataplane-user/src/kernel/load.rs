//! Loads the object: maps made or adopted at their pins, globals from BTF, every program verified.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};

use super::{
    error::Error,
    object::OBJECT,
    pins::{MapDefinition, Pins},
};

/// The verified programs by name; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Programs(HashMap<String, Arc<OwnedFd>>);

impl Programs {
    pub fn get(&self, name: &str) -> Option<BorrowedFd<'_>> {
        self.0.get(name).map(|fd| fd.as_fd())
    }
}

/// Returns aya's handle too: its log map, when the object has one, lives there.
pub fn load(pins: &Pins, definitions: &[MapDefinition]) -> Result<(Ebpf, Programs), Error> {
    let globals = super::btf::globals()?;
    let mut loader = EbpfLoader::new();
    for map in definitions {
        loader.map_max_entries(&map.name, map.max_entries).map_pin_path(&map.name, pins.map(&map.name));
    }
    for (name, value) in &globals {
        // One that no program reads was optimised away.
        loader.override_global(name, value, false);
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| {
        if not_permitted(&error) { Error::NotPermitted } else { Error::Load { message: chain(&error) } }
    })?;
    let programs = verify_all(&mut ebpf)?;
    Ok((ebpf, Programs(programs)))
}

/// Has the kernel verify every program. It does so on the caller's CPU: several callers, several CPUs.
fn verify_all(ebpf: &mut Ebpf) -> Result<HashMap<String, Arc<OwnedFd>>, Error> {
    let waiting: Mutex<Vec<_>> = Mutex::new(ebpf.programs_mut().collect());
    let verified = Mutex::new(HashMap::new());
    let verify_some = || -> Result<(), Error> {
        loop {
            let Some((name, program)) = lock(&waiting).pop() else { return Ok(()) };
            let loaded = verify(program).and_then(|()| Ok(program.fd()?.as_fd().try_clone_to_owned()?));
            let fd = loaded.map_err(|error| Error::Program { program: name.to_owned(), message: chain(&error) })?;
            lock(&verified).insert(name.to_owned(), Arc::new(fd));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(verify_some)).collect();
        let mut result = verify_some();
        for other in others {
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(other);
        }
        result
    })?;
    Ok(verified.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn verify(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::RawTracePoint(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

fn not_permitted(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.raw_os_error() == Some(libc::EPERM)) {
            return true;
        }
        next = error.source();
    }
    false
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}
