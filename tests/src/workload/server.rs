//! A small HTTP/1.1 server that answers with its name, and at SIGTERM closes its listener at once.

use std::{convert::Infallible, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::{Request, Response, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

use super::echo;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What it answers with
    #[arg(long)]
    pub name: String,
    /// HTTP: address and port to listen on; may be repeated
    #[arg(long)]
    pub listen: Vec<SocketAddr>,
    /// Lines over TCP, each answered with the name and the line
    #[arg(long)]
    pub echo_tcp: Vec<SocketAddr>,
    /// Datagrams over UDP, each answered with the name and the datagram
    #[arg(long)]
    pub echo_udp: Vec<SocketAddr>,
    /// Listeners per TCP address (SO_REUSEPORT)
    #[arg(long, default_value_t = 1)]
    pub listeners: usize,
    /// Milliseconds that each answer takes
    #[arg(long, default_value_t = 0)]
    pub delay: u64,
    /// Milliseconds from SIGTERM until the listeners close
    #[arg(long, default_value_t = 0)]
    pub linger: u64,
    /// Milliseconds that open requests and connections may still take after that
    #[arg(long, default_value_t = 1000)]
    pub drain: u64,
    #[arg(long, hide = true)]
    pub ready_file: Option<PathBuf>,
}

pub fn main(options: Options) -> Result<()> {
    super::run(serve(options))
}

async fn serve(options: Options) -> Result<()> {
    let mut sigterm = signal(SignalKind::terminate())?;
    let options = Arc::new(options);
    let (stop, stopping) = watch::channel(false);
    let mut listeners = JoinSet::new();
    for (kind, addresses) in [(Kind::Http, &options.listen), (Kind::Lines, &options.echo_tcp)] {
        for &address in addresses {
            for _ in 0..options.listeners {
                let listener = listen(address, options.listeners > 1)?;
                listeners.spawn(accept(kind, listener, options.clone(), stopping.clone()));
            }
        }
    }
    for &address in &options.echo_udp {
        listeners.spawn(echo::udp(address, options.name.clone(), stopping.clone()));
    }
    super::say_ready(options.ready_file.as_deref())?;

    sigterm.recv().await;
    tokio::time::sleep(Duration::from_millis(options.linger)).await;
    stop.send_replace(true);
    let drained = async { while listeners.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_millis(options.drain), drained).await;
    Ok(())
}

#[derive(Clone, Copy)]
enum Kind {
    Http,
    Lines,
}

fn listen(address: SocketAddr, reuse_port: bool) -> Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(reuse_port)?;
    socket.bind(address).with_context(|| format!("bind {address}"))?;
    socket.listen(4096).with_context(|| format!("listen on {address}"))
}

async fn accept(kind: Kind, listener: TcpListener, options: Arc<Options>, mut stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = echo::stopped(&mut stopping) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => { connections.spawn(converse(kind, stream, options.clone(), stopping.clone())); }
                Err(error) => eprintln!("accept: {error}"),
            },
        }
    }
    // Who is already in the queue is served; a server that forgets them resets their connections.
    while let Some(Ok((stream, _))) = futures_util::FutureExt::now_or_never(listener.accept()) {
        connections.spawn(converse(kind, stream, options.clone(), stopping.clone()));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn converse(kind: Kind, stream: TcpStream, options: Arc<Options>, stopping: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    match kind {
        Kind::Http => http(stream, options, stopping).await,
        Kind::Lines => echo::lines(stream, &options.name, stopping).await,
    }
}

async fn http(stream: TcpStream, options: Arc<Options>, mut stopping: watch::Receiver<bool>) {
    let service = service_fn(|_: Request<hyper::body::Incoming>| {
        let options = options.clone();
        async move {
            if options.delay > 0 {
                tokio::time::sleep(Duration::from_millis(options.delay)).await;
            }
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("{}\n", options.name)))))
        }
    });
    let mut connection =
        std::pin::pin!(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        _ = connection.as_mut() => {}
        () = echo::stopped(&mut stopping) => {
            // hyper would close a connection on which no request has come yet; its client has
            // every right to an answer to what it is just sending.
            let patience = tokio::time::sleep(Duration::from_millis(50));
            tokio::select! {
                _ = connection.as_mut() => return,
                () = patience => {}
            }
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}
