//! What the agent and the canary say to each other: one JSON object per line, answer upon request.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Request {
    /// Move into the cgroup, make both network namespaces and the link between them. → [`Reply::Ready`]
    Prepare { cgroup: PathBuf },
    /// Listen (TCP) there, in the server's namespace. → [`Reply::Done`]
    Listen { at: SocketAddr },
    /// Close that listener. → [`Reply::Done`]
    Close { at: SocketAddr },
    /// Echo datagrams there, in the server's namespace. → [`Reply::Done`]
    Echo { at: SocketAddr },
    /// Connect from the client's namespace, and exchange a byte each way. → [`Reply::Connected`]
    Connect { to: SocketAddr, within_ms: u64 },
    /// Send a datagram from the client's namespace, and take the answer. → [`Reply::Answered`]
    Datagram { to: SocketAddr, connected: bool, within_ms: u64 },
    /// Send SIGTERM to the init of a new pid namespace that lives in the server's network
    /// namespace. → [`Reply::Done`]
    Stop,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Reply {
    /// Ways into the two namespaces; why there is no IPv6, if there is none.
    Ready {
        client: PathBuf,
        server: PathBuf,
        no_ipv6: Option<String>,
    },
    Done,
    /// What getpeername() says, and at which address the connection was accepted.
    Connected {
        peer: SocketAddr,
        accepted_at: SocketAddr,
        took_ms: u64,
    },
    /// Where the answer came from as the client saw it, and which server socket answered.
    Answered {
        from: SocketAddr,
        answered_at: SocketAddr,
    },
    /// It did not work: what was seen.
    Failed {
        seen: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let request = Request::Connect { to: "[::ffff:198.51.100.1]:1".parse().expect("valid"), within_ms: 5 };
        let line = serde_json::to_string(&request).expect("serializable");
        assert_eq!(line, r#"{"do":"connect","to":"[::ffff:198.51.100.1]:1","withinMs":5}"#);
        assert_eq!(serde_json::from_str::<Request>(&line).expect("parses"), request);
        let reply: Reply = serde_json::from_str(r#"{"is":"failed","seen":"x"}"#).expect("parses");
        assert_eq!(reply, Reply::Failed { seen: "x".into() });
    }
}
