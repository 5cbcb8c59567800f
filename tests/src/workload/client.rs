//! A constant-rate load generator that counts its own failures.
//!
//! Open loop: request n is due at start + n/rate whatever became of the others, and its latency is
//! counted from when it was due (no coordinated omission).

use std::{
    cell::RefCell,
    fs::File,
    io::{BufWriter, Write},
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1::SendRequest, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    task::LocalSet,
    time::Instant,
};

use super::{gateway::root, now_us, reason};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Whom to ask
    #[arg(long)]
    pub target: SocketAddr,
    /// Requests per second
    #[arg(long, default_value_t = 50.0)]
    pub rate: f64,
    /// Seconds; without it, until SIGTERM
    #[arg(long)]
    pub duration: Option<f64>,
    /// Use connections again instead of a new one per request
    #[arg(long)]
    pub keep_alive: bool,
    /// Milliseconds that a request may take, connect included
    #[arg(long, default_value_t = 15_000)]
    pub timeout: u64,
    /// File for one JSON line per request and the summary as the last line
    #[arg(long)]
    pub records: PathBuf,
    #[arg(long, hide = true)]
    pub ready_file: Option<PathBuf>,
}

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// When it was due, `CLOCK_MONOTONIC`.
    pub due_us: u64,
    /// From then to the end of the answer or the failure.
    pub latency_us: u64,
    /// Of a new connection; 0 when an old one was used.
    pub connect_us: u64,
    /// "ok" or why not.
    pub outcome: String,
    /// Who answered.
    pub server: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub requests: u64,
    pub failed: u64,
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Line {
    Request(Record),
    Summary(Summary),
}

impl Record {
    pub fn failed(&self) -> bool {
        self.outcome != "ok"
    }
}

type Sender = SendRequest<Empty<Bytes>>;

struct Client {
    options: Options,
    idle: RefCell<Vec<Sender>>,
    records: RefCell<Vec<Record>>,
}

pub fn main(options: Options) -> Result<()> {
    super::run(LocalSet::new().run_until(load(options)))
}

async fn load(options: Options) -> Result<()> {
    let mut sigterm = signal(SignalKind::terminate())?;
    let file = File::create(&options.records).with_context(|| format!("create {}", options.records.display()))?;
    super::say_ready(options.ready_file.as_deref())?;
    let client = Rc::new(Client { options, idle: RefCell::default(), records: RefCell::default() });
    let pace = client.clone().pace();
    tokio::select! {
        () = pace => {}
        _ = sigterm.recv() => {}
    }
    // Every request that was due gets its answer, or its timeout.
    while Rc::strong_count(&client) > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    write(file, &client.records.borrow())
}

fn write(file: File, records: &[Record]) -> Result<()> {
    let mut file = BufWriter::new(file);
    let failed = records.iter().filter(|record| record.failed()).count() as u64;
    let summary = Summary { requests: records.len() as u64, failed };
    for line in records.iter().cloned().map(Line::Request).chain([Line::Summary(summary)]) {
        serde_json::to_writer(&mut file, &line)?;
        file.write_all(b"\n")?;
    }
    file.flush()?;
    Ok(())
}

impl Client {
    async fn pace(self: Rc<Self>) {
        let (start, start_us) = (Instant::now(), now_us());
        let end = self.options.duration.map_or(f64::INFINITY, |duration| duration * self.options.rate);
        for n in 0u64.. {
            if n as f64 >= end {
                return;
            }
            let due = Duration::from_secs_f64(n as f64 / self.options.rate);
            tokio::time::sleep_until(start + due).await;
            tokio::task::spawn_local(self.clone().request(start_us + due.as_micros() as u64));
        }
    }

    async fn request(self: Rc<Self>, due_us: u64) {
        let mut record = Record { due_us, latency_us: 0, connect_us: 0, outcome: String::new(), server: String::new() };
        let timeout = Duration::from_millis(self.options.timeout);
        record.outcome = match tokio::time::timeout(timeout, self.exchange(&mut record)).await {
            Ok(Ok(())) => "ok".into(),
            Ok(Err(why)) => why,
            Err(_) => "timed out".into(),
        };
        record.latency_us = now_us().saturating_sub(due_us);
        self.records.borrow_mut().push(record);
    }

    async fn exchange(&self, record: &mut Record) -> Result<(), String> {
        let pooled = if self.options.keep_alive { self.pooled() } else { None };
        let mut sender = match pooled {
            Some(sender) => sender,
            None => self.connect(record).await?,
        };
        let connection = if self.options.keep_alive { "keep-alive" } else { "close" };
        let request = Request::get("/")
            .header(header::HOST, self.options.target.to_string())
            .header(header::CONNECTION, connection)
            .body(Empty::new())
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| format!("request: {}", root(&error)))?;
        let status = response.status();
        let body =
            response.into_body().collect().await.map_err(|error| format!("answer: {}", root(&error)))?.to_bytes();
        let text = String::from_utf8_lossy(&body).trim().to_owned();
        if self.options.keep_alive && sender.ready().await.is_ok() {
            self.idle.borrow_mut().push(sender);
        }
        if status != StatusCode::OK {
            return Err(format!("{}: {text}", status.as_u16()));
        }
        record.server = text;
        Ok(())
    }

    fn pooled(&self) -> Option<Sender> {
        let mut idle = self.idle.borrow_mut();
        while let Some(sender) = idle.pop() {
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    async fn connect(&self, record: &mut Record) -> Result<Sender, String> {
        let start = now_us();
        let connected = TcpStream::connect(self.options.target).await;
        record.connect_us = now_us() - start;
        let stream = connected.map_err(|error| format!("connect: {}", reason(&error)))?;
        let _ = stream.set_nodelay(true);
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("handshake: {error}"))?;
        tokio::task::spawn_local(connection);
        Ok(sender)
    }
}

/// Read what a client has written.
pub fn read(path: &std::path::Path) -> Result<(Vec<Record>, Summary)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let mut records = Vec::new();
    for line in text.lines() {
        match serde_json::from_str(line).with_context(|| format!("a line of {}", path.display()))? {
            Line::Request(record) => records.push(record),
            Line::Summary(summary) => return Ok((records, summary)),
        }
    }
    anyhow::bail!("{} has no summary: the client was cut short", path.display())
}
