//! The agent's stream, as fast as it takes: events out, acknowledgements in, each with its times.

use std::{
    io::{BufRead, BufReader, Write},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use dataplane_user::model::{Backend, Event, Key, Object, Service, ServicePort};
use serde_json::Value;

use super::worker::now_ns;

pub struct Feed(BufReader<UnixStream>);

/// When an event was in force.
#[derive(Clone, Copy, Debug)]
pub struct Ack {
    /// From the agent's read of the event to the map's change, as the agent timed it.
    pub lag_ns: u64,
    /// From the write of the event to the acknowledgement, as this process timed it.
    pub round_trip_ns: u64,
}

impl Feed {
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub fn send(&mut self, event: &Event) -> Result<Ack> {
        self.send_line(&line(event)?)
    }

    /// An event that [`line`] has made.
    pub fn send_line(&mut self, line: &[u8]) -> Result<Ack> {
        let start = self.write(line)?;
        self.ack(start)
    }

    /// Returns the time before the write.
    pub fn write(&mut self, line: &[u8]) -> Result<u64> {
        let start = now_ns();
        self.0.get_mut().write_all(line).context("write an event to the agent")?;
        Ok(start)
    }

    pub fn ack(&mut self, start: u64) -> Result<Ack> {
        let mut answer = String::new();
        self.0.read_line(&mut answer).context("read the agent's acknowledgement")?;
        let round_trip_ns = now_ns() - start;
        let answer: Value = serde_json::from_str(&answer).with_context(|| format!("acknowledgement {answer:?}"))?;
        if let Some(error) = answer.get("error").filter(|error| !error.is_null()) {
            bail!("the agent refused an event: {error}");
        }
        let lag_ns = answer.get("lag_ns").and_then(Value::as_u64);
        Ok(Ack { lag_ns: lag_ns.with_context(|| format!("no lag_ns in {answer}"))?, round_trip_ns })
    }
}

pub fn line(event: &Event) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    Ok(line)
}

pub fn upsert(object: Object) -> Event {
    Event::Upsert { object }
}

pub fn delete(backend: &Backend) -> Event {
    Event::Delete {
        object: Key::Backend {
            service: backend.service.clone(),
            port: backend.port.clone(),
            address: backend.address,
            target_port: backend.target_port,
        },
    }
}

/// A service of one TCP port.
pub fn service(name: &str, address: IpAddr, port: u16) -> Service {
    let ports = vec![ServicePort { name: "".into(), port, protocol: Default::default(), node_port: None }];
    Service { name: name.into(), addresses: vec![address], ports, ..Service::default() }
}

pub fn backend(service: &str, address: IpAddr, target_port: u16) -> Backend {
    Backend {
        service: service.into(),
        port: "".into(),
        address,
        target_port,
        pod: None,
        ready: true,
        serving: true,
        terminating: false,
        weight: 1,
    }
}
