//! An L7 reverse proxy that picks pod addresses from its own list of endpoints, as a mesh's gateway does.
//!
//! The list is whatever the control socket was last told, however late. A failed connect is a 503
//! to the client; nothing is ever tried twice.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    convert::Infallible,
    fs::File,
    io::{BufWriter, Write},
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1::SendRequest,
    header::{self, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    task::LocalSet,
};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where clients connect
    #[arg(long)]
    pub listen: SocketAddr,
    /// Unix socket that takes the list of endpoints: {"endpoints":["10.0.0.1:80"]}, answered by a line
    #[arg(long)]
    pub control: PathBuf,
    /// File for one JSON line per upstream connect
    #[arg(long)]
    pub records: Option<PathBuf>,
    /// Keep upstream connections and use them again
    #[arg(long)]
    pub keep_alive: bool,
    /// Milliseconds after which a connect is given up
    #[arg(long, default_value_t = 10_000)]
    pub connect_timeout: u64,
    #[arg(long, hide = true)]
    pub ready_file: Option<PathBuf>,
}

/// What the control plane says.
#[derive(Debug, Serialize, Deserialize)]
pub struct Endpoints {
    pub endpoints: Vec<SocketAddr>,
}

/// One upstream connect, as the gateway saw it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// `CLOCK_MONOTONIC`
    pub at_us: u64,
    pub connect_us: u64,
    pub to: SocketAddr,
    /// "ok" or why not
    pub outcome: String,
}

type Sender = SendRequest<Full<Bytes>>;

struct Gateway {
    options: Options,
    endpoints: RefCell<Vec<SocketAddr>>,
    next: Cell<usize>,
    idle: RefCell<HashMap<SocketAddr, Vec<Sender>>>,
    records: RefCell<Option<BufWriter<File>>>,
}

pub fn main(options: Options) -> Result<()> {
    super::run(LocalSet::new().run_until(serve(options)))
}

async fn serve(options: Options) -> Result<()> {
    let mut sigterm = signal(SignalKind::terminate())?;
    let records = match &options.records {
        Some(path) => Some(BufWriter::new(File::create(path).with_context(|| format!("create {}", path.display()))?)),
        None => None,
    };
    let listener = TcpListener::bind(options.listen).await.with_context(|| format!("bind {}", options.listen))?;
    let control =
        UnixListener::bind(&options.control).with_context(|| format!("bind {}", options.control.display()))?;
    super::say_ready(options.ready_file.as_deref())?;
    let gateway = Rc::new(Gateway {
        options,
        endpoints: RefCell::default(),
        next: Cell::new(0),
        idle: RefCell::default(),
        records: RefCell::new(records),
    });
    loop {
        tokio::select! {
            _ = sigterm.recv() => break,
            accepted = control.accept() => {
                let (stream, _) = accepted?;
                tokio::task::spawn_local(gateway.clone().follow(stream));
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => { tokio::task::spawn_local(gateway.clone().converse(stream)); }
                Err(error) => eprintln!("accept: {error}"),
            },
        }
    }
    if let Some(mut records) = gateway.records.borrow_mut().take() {
        records.flush()?;
    }
    Ok(())
}

impl Gateway {
    /// Do what the control plane says, line by line.
    async fn follow(self: Rc<Self>, stream: UnixStream) {
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let answer = match serde_json::from_str::<Endpoints>(&line) {
                Ok(told) => {
                    self.idle.borrow_mut().retain(|endpoint, _| told.endpoints.contains(endpoint));
                    *self.endpoints.borrow_mut() = told.endpoints;
                    "ok\n".to_owned()
                }
                Err(error) => format!("error: {error}\n"),
            };
            if writer.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    async fn converse(self: Rc<Self>, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let service = service_fn(|request| {
            let gateway = self.clone();
            async move { Ok::<_, Infallible>(gateway.forward(request).await) }
        });
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }

    async fn forward(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let Some(endpoint) = self.pick() else {
            return unavailable("no endpoint");
        };
        match self.exchange(endpoint, request).await {
            Ok(response) => response,
            Err(why) => unavailable(&format!("upstream {endpoint}: {why}")),
        }
    }

    /// Round robin.
    fn pick(&self) -> Option<SocketAddr> {
        let endpoints = self.endpoints.borrow();
        let next = self.next.replace(self.next.get().wrapping_add(1));
        endpoints.get(next.checked_rem(endpoints.len())?).copied()
    }

    async fn exchange(
        &self,
        endpoint: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, String> {
        let mut upstream = match self.pooled(endpoint) {
            Some(upstream) => upstream,
            None => self.connect(endpoint).await?,
        };
        let (mut head, body) = request.into_parts();
        // Hop by hop (RFC 9110 section 7.6.1): what the client wants of its connection is not said upstream.
        let connection = if self.options.keep_alive { "keep-alive" } else { "close" };
        head.headers.insert(header::CONNECTION, HeaderValue::from_static(connection));
        let body = body.collect().await.map_err(|error| format!("request: {error}"))?.to_bytes();
        let request = Request::from_parts(head, Full::new(body));
        let response = upstream.send_request(request).await.map_err(|error| format!("request: {}", root(&error)))?;
        let (mut head, body) = response.into_parts();
        head.headers.remove(header::CONNECTION);
        let body = body.collect().await.map_err(|error| format!("response: {}", root(&error)))?.to_bytes();
        if self.options.keep_alive && upstream.ready().await.is_ok() {
            self.idle.borrow_mut().entry(endpoint).or_default().push(upstream);
        }
        Ok(Response::from_parts(head, Full::new(body)))
    }

    fn pooled(&self, endpoint: SocketAddr) -> Option<Sender> {
        let mut idle = self.idle.borrow_mut();
        let senders = idle.get_mut(&endpoint)?;
        while let Some(sender) = senders.pop() {
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    async fn connect(&self, endpoint: SocketAddr) -> Result<Sender, String> {
        let start = super::now_us();
        let timeout = Duration::from_millis(self.options.connect_timeout);
        let stream = match tokio::time::timeout(timeout, TcpStream::connect(endpoint)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(super::reason(&error)),
            Err(_) => Err("timed out".to_owned()),
        };
        let outcome = stream.as_ref().err().map_or("ok", String::as_str);
        self.record(&Record {
            at_us: start,
            connect_us: super::now_us() - start,
            to: endpoint,
            outcome: outcome.to_owned(),
        });
        let stream = stream.map_err(|why| format!("connect: {why}"))?;
        let _ = stream.set_nodelay(true);
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("handshake: {error}"))?;
        tokio::task::spawn_local(connection);
        Ok(sender)
    }

    fn record(&self, record: &Record) {
        if let Some(file) = self.records.borrow_mut().as_mut() {
            let line = serde_json::to_string(record).expect("a record is plain data");
            if let Err(error) = writeln!(file, "{line}") {
                eprintln!("write a record: {error}");
            }
        }
    }
}

fn unavailable(why: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{why}\n"))));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response
}

/// hyper's own message says only that something failed; the cause is behind it.
pub(super) fn root(error: &hyper::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    match cause.downcast_ref::<std::io::Error>() {
        Some(io) => super::reason(io),
        None => cause.to_string(),
    }
}
