//! `/metrics`, `/healthz` and `/readyz`, over HTTP.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{Facts, expose};
use crate::{admin::Query, kernel::Reader};

/// Clients at a time; one more waits for its turn.
const CLIENTS: usize = 32;
/// How long a client may take to ask, and the agent's thread to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one connection is served at most.
const SESSION: Duration = Duration::from_secs(300);

/// Binds; on a node without IPv6 `[::]` is every IPv4 address.
pub fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let listener = match TcpListener::bind(at) {
        Err(error) if at.is_ipv6() && at.ip().is_unspecified() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, at.port()))?
        }
        bound => bound?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves for as long as the agent runs.
pub async fn serve(listener: TcpListener, queries: mpsc::Sender<Query>, reader: Reader) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "metrics are not served"),
    };
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (queries, reader) = (queries.clone(), reader.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let (queries, reader) = (queries.clone(), reader.clone());
                async move { Ok::<_, Infallible>(answer(&request, &queries, reader).await) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
            // Clients come and go as they like.
            let _ = tokio::time::timeout(SESSION, http.serve_connection(TokioIo::new(stream), service)).await;
            drop(place);
        });
    }
}

async fn answer(request: &Request<Incoming>, queries: &mpsc::Sender<Query>, reader: Reader) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
    }
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz" | "/readyz") {
        return text(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".into());
    }
    let Some(facts) = ask(queries).await else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "the agent's event loop does not answer\n".into());
    };
    match path {
        "/healthz" => text(StatusCode::OK, "ok\n".into()),
        "/readyz" if facts.ready => text(StatusCode::OK, "ready\n".into()),
        "/readyz" => {
            let what = facts.waiting_for.unwrap_or_default();
            text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: waiting for {what}\n"))
        }
        // Full maps take a while to count.
        _ => match tokio::task::spawn_blocking(move || expose(&facts, &reader)).await {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the maps could not be read: look at the log\n".into()),
        },
    }
}

async fn ask(queries: &mpsc::Sender<Query>) -> Option<Box<Facts>> {
    let (to, facts) = oneshot::channel();
    let asked = async {
        queries.send(Query::Facts(to)).await.ok()?;
        facts.await.ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.ok()?
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
