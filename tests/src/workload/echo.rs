//! Lines over TCP and datagrams over UDP, answered with the server's name before what was said. Who asks `peer` is told
//! whom the server sees.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpStream, UdpSocket},
    sync::watch,
};

pub(super) async fn lines(stream: TcpStream, name: &str, mut stopping: watch::Receiver<bool>) {
    let peer = stream.peer_addr().map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()));
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    loop {
        line.clear();
        // A conversation is never cut by a stop: it ends when the client ends it (or the drain time does).
        match reader.read_line(&mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let stop = if *stopping.borrow_and_update() { " stopping" } else { "" };
        if let ("peer\n", Ok(peer)) = (line.as_str(), &peer) {
            line = format!("{peer}\n");
        }
        if writer.write_all(format!("{name}{stop} {line}").as_bytes()).await.is_err() {
            return;
        }
        // The server closes first: what lingers afterwards (TIME_WAIT) is on its side.
        if line.starts_with("bye") {
            return;
        }
    }
}

pub(super) async fn udp(address: SocketAddr, name: String, mut stopping: watch::Receiver<bool>) {
    let serve = async {
        let socket = UdpSocket::bind(address).await?;
        let mut buffer = vec![0; 65_536];
        loop {
            let (len, peer) = socket.recv_from(&mut buffer).await?;
            let mut answer = format!("{name} ").into_bytes();
            answer.extend_from_slice(&buffer[..len]);
            socket.send_to(&answer, peer).await?;
        }
    };
    let result: io::Result<()> = tokio::select! {
        result = serve => result,
        () = stopped(&mut stopping) => Ok(()),
    };
    if let Err(error) = result {
        eprintln!("udp echo on {address}: {error}");
    }
}

/// Resolves when the server is to stop.
pub(super) async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that whoever would say so is gone, which says it too.
    drop(stopping.wait_for(|stop| *stop).await);
}
