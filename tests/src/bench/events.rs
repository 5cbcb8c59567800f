//! From an event on the agent's stream to the changed map.

use std::{sync::atomic::Ordering, time::Duration};

use anyhow::Result;
use dataplane_ebpf::health::{Health, State};
use dataplane_user::model::Object;

use super::{
    Plan,
    feed::{self, line},
    figure::{Figure, Goal},
    rig::{CONNECT_PORT, Rig, live},
    sample::quantile,
    worker::now_ns,
};

const CHANGED: u16 = 40;
const BACKENDS: u32 = 10;

pub fn measure(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let addresses: Vec<_> = (0..BACKENDS).map(|n| (live(22_000 + n), CONNECT_PORT)).collect();
    let words = rig.service(CHANGED, &addresses)?;
    let name = format!("bench/{CHANGED}");
    let backend = feed::backend(&name, addresses[0].0, addresses[0].1);
    let (gone, back) = (line(&feed::delete(&backend))?, line(&feed::upsert(Object::Backend(backend.clone())))?);
    let health = rig.pins.health()?;
    let mut id = words[0].0;
    let [mut lag, mut round_trip, mut to_map] = [const { Vec::new() }; 3];
    for _ in 0..plan.events {
        // Not one behind the other: this is the time of one event.
        std::thread::sleep(Duration::from_micros(300));
        let word = health.word(id);
        let start = rig.feed.write(&gone)?;
        let mut changed = 0;
        while changed == 0 && now_ns() - start < 1_000_000_000 {
            if Health(word.load(Ordering::SeqCst)).state() == State::Gone {
                changed = now_ns();
            }
            std::hint::spin_loop();
        }
        let ack = rig.feed.ack(start)?;
        lag.push(ack.lag_ns);
        round_trip.push(ack.round_trip_ns);
        to_map.push(changed.saturating_sub(start));
        std::thread::sleep(Duration::from_micros(300));
        lag.push(rig.feed.send_line(&back)?.lag_ns);
        id = rig.backend(addresses[0].0, addresses[0].1)?;
    }
    let us = |samples: &[u64], q| quantile(samples, q) / 1000.0;
    Ok(vec![
        Figure::new("event_to_map_p50", us(&lag, 0.5), "us")
            .goal(Goal::ValueAtMost(20.0))
            .note("agent has read the event to all maps changed, as the agent times it; deletions and additions"),
        Figure::new("event_to_map_p99", us(&lag, 0.99), "us").goal(Goal::ValueAtMost(100.0)).note("the same, p99"),
        Figure::new("write_to_map_p50", us(&to_map, 0.5), "us")
            .against(us(&lag, 0.5))
            .note("deletion written to the socket to the health word changed, seen from outside: with the agent's wake-up; baseline: event_to_map_p50"),
        Figure::new("write_to_map_p99", us(&to_map, 0.99), "us").against(us(&lag, 0.99)).note("the same, p99"),
        Figure::new("write_to_ack_p50", us(&round_trip, 0.5), "us").against(us(&to_map, 0.5)).note("deletion written to acknowledgement read; baseline: to the word changed"),
    ])
}
