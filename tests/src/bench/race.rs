//! Flip against connect: one thread changes a health word, another connects without pause, and
//! afterwards the two logs are laid side by side.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dataplane_ebpf::health::{Health, Input};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::socket::SockaddrStorage,
    unistd::Pid,
};

use super::{
    wire::Race,
    worker::{Kernel, now_ns, tcp_socket},
};

/// How long the word stays flipped, and about how long it stays as it was.
const HOLD: Duration = Duration::from_micros(150);

/// One connect: when the hook was entered, which backend it chose, when `connect()` returned.
struct Connect {
    entered_ns: u64,
    returned_ns: u64,
    backend: u32,
}

struct Flip {
    before_ns: u64,
    after_ns: u64,
    /// When the word was about to be set back.
    end_ns: u64,
}

/// The service at `to` has backends that there is no route to: the hook chooses, `connect()` fails at
/// once, and nothing else takes time.
pub fn run(kernel: &Kernel, to: SocketAddr, backend: u32, flips: u32) -> Result<Race> {
    let [cpu_flip, cpu_connect] = two_cpus()?;
    let done = AtomicBool::new(false);
    let (flips, connects) = std::thread::scope(|scope| {
        let connects = scope.spawn(|| {
            pin(cpu_connect)?;
            connect_until(kernel, to, &done)
        });
        let flips = pin(cpu_flip).map(|()| flip(kernel, backend, flips));
        done.store(true, Ordering::Relaxed);
        let connects = connects.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, anyhow::Error>((flips?, connects?))
    })?;
    Ok(compare(&flips, &connects, backend))
}

fn flip(kernel: &Kernel, backend: u32, flips: u32) -> Vec<Flip> {
    let word = kernel.health.word(backend);
    let ready = word.load(Ordering::SeqCst);
    let draining = Health(ready).after(Input::StopSignal).0;
    let mut done = Vec::with_capacity(flips as usize);
    for number in 0..flips {
        // Not in step with the connects.
        spin(HOLD + Duration::from_nanos(u64::from(number % 97) * 31));
        let before_ns = now_ns();
        word.store(draining, Ordering::SeqCst);
        let after_ns = now_ns();
        spin(HOLD);
        done.push(Flip { before_ns, after_ns, end_ns: now_ns() });
        word.store(ready, Ordering::SeqCst);
    }
    done
}

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn connect_until(kernel: &Kernel, to: SocketAddr, done: &AtomicBool) -> Result<Vec<Connect>> {
    let address = SockaddrStorage::from(to);
    let socket = tcp_socket(to)?;
    let mut connects = Vec::with_capacity(2_000_000);
    while !done.load(Ordering::Relaxed) && connects.len() < connects.capacity() {
        if nix::sys::socket::connect(socket.as_raw_fd(), &address).is_ok() {
            bail!("a connect to {to} succeeded: its backends were to have no route");
        }
        let returned_ns = now_ns();
        let state = kernel.sockets.of(socket.as_fd()).with_context(|| format!("the hook left nothing of {to}"))?;
        connects.push(Connect { entered_ns: state.connect_ns, returned_ns, backend: state.backend });
    }
    Ok(connects)
}

/// Both logs are in order of time.
fn compare(flips: &[Flip], connects: &[Connect], backend: u32) -> Race {
    let mut race = Race { connects: connects.len() as u64, ..Race::default() };
    for flip in flips {
        let first = connects.partition_point(|connect| connect.entered_ns <= flip.before_ns);
        let during: Vec<_> = connects[first..].iter().take_while(|connect| connect.returned_ns < flip.end_ns).collect();
        let stale = during.iter().rfind(|connect| connect.backend == backend);
        let Some(avoided) = during.iter().find(|c| c.entered_ns > flip.after_ns && c.backend != backend) else {
            // The connecting thread did not run meanwhile.
            continue;
        };
        race.stale_ns.push(stale.map_or(0, |connect| connect.entered_ns - flip.before_ns));
        race.avoided_ns.push(avoided.returned_ns - flip.after_ns);
    }
    race
}

/// Two CPUs to race on, of those that this process may use.
pub fn two_cpus() -> Result<[usize; 2]> {
    let allowed = ALLOWED.get_or_init(|| sched_getaffinity(Pid::from_raw(0)).unwrap_or_default());
    let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    match (cpus.next(), cpus.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        _ => bail!("this figure needs two CPUs"),
    }
}

/// As the process was started: threads that [`pin`]ned themselves are asked no more.
static ALLOWED: OnceLock<CpuSet> = OnceLock::new();

/// Keep this thread on one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("stay on CPU {cpu}"))
}

/// Do something on one CPU; processes and threads that are started by it stay there.
pub fn on<T>(cpu: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = sched_getaffinity(Pid::from_raw(0))?;
    pin(cpu)?;
    let result = work();
    sched_setaffinity(Pid::from_raw(0), &before).context("leave a CPU")?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stale_window_ends_with_the_last_connect_that_chose_the_flipped_backend() {
        let connect = |entered_ns, backend| Connect { entered_ns, returned_ns: entered_ns + 5, backend };
        let flips = [Flip { before_ns: 100, after_ns: 102, end_ns: 200 }];
        let log = [connect(90, 1), connect(101, 1), connect(110, 1), connect(120, 2), connect(199, 1)];
        let race = compare(&flips, &log, 1);
        assert_eq!((race.stale_ns, race.avoided_ns), (vec![10], vec![23]));
        let race = compare(&flips, &[connect(90, 1), connect(103, 2)], 1);
        assert_eq!((race.stale_ns, race.avoided_ns), (vec![0], vec![6]));
    }
}
