//! The canary's two network namespaces and the veth between them.
//!
//! Everything here runs in the canary's own, single-threaded process: what it makes vanishes with it.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
};

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags},
        link::{InfoData, InfoVeth},
    },
};

use super::world;

const CLIENT_LINK: &str = "canary-c";
const SERVER_LINK: &str = "canary-s";
/// Locally administered addresses: neighbours are entered, not asked for.
const CLIENT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
const SERVER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 2];
/// Nobody's: a packet to it is dropped by whoever receives it, without a word.
const NOBODY_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 3];

/// Both namespaces; the process is in the client's unless it is [`Network::in_server`].
#[derive(Debug)]
pub struct Network {
    client: File,
    pub server: File,
    /// Why there is no IPv6.
    pub no_ipv6: Option<String>,
}

impl Network {
    pub fn make() -> io::Result<Self> {
        let server = namespace()?;
        let client = namespace()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(link(&server)).map_err(|error| context("making the link", &error))?;
        let mut network = Self { client, server, no_ipv6: None };
        let addresses = |v6: bool| move |address: &&IpAddr| address.is_ipv6() == v6;
        for v6 in [false, true] {
            let client: Vec<_> = world::CLIENT.iter().filter(addresses(v6)).copied().collect();
            let server: Vec<_> = world::SERVER.iter().filter(addresses(v6)).copied().collect();
            let silent: Vec<_> = world::SILENT.iter().filter(addresses(v6)).copied().collect();
            let made = if v6 { enable_ipv6() } else { Ok(()) };
            let made = made.and_then(|()| {
                let server_side =
                    Side { link: SERVER_LINK, own: &server, peers: &client, mac: CLIENT_MAC, silent: &[] };
                network.in_server(|| runtime.block_on(server_side.configure()))?;
                let client_side =
                    Side { link: CLIENT_LINK, own: &client, peers: &server, mac: SERVER_MAC, silent: &silent };
                runtime.block_on(client_side.configure())
            });
            match made {
                Err(error) if v6 => network.no_ipv6 = Some(error.to_string()),
                made => made?,
            }
        }
        Ok(network)
    }

    /// Runs `f` in the server's namespace: sockets belong to the namespace they were made in.
    pub fn in_server<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        setns(self.server.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let result = f();
        setns(self.client.as_fd(), CloneFlags::CLONE_NEWNET)?;
        result
    }
}

/// A new network namespace, which the process is in from now on.
fn namespace() -> io::Result<File> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    File::open("/proc/thread-self/ns/net")
}

/// In the client's namespace: the veth, its other end in the server's.
async fn link(server: &File) -> Result<(), rtnetlink::Error> {
    let handle = connection()?;
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(SERVER_LINK)
        .address(SERVER_MAC.to_vec())
        .setns_by_fd(server.as_raw_fd())
        .build();
    let veth = LinkMessageBuilder::<LinkVeth>::new(CLIENT_LINK, SERVER_LINK)
        .address(CLIENT_MAC.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    handle.link().add(veth).execute().await
}

/// A netlink connection to the namespace that the process is in.
fn connection() -> Result<Handle, rtnetlink::Error> {
    let (connection, handle, _) = rtnetlink::new_connection()
        .map_err(|error| rtnetlink::Error::NamespaceError(format!("opening a netlink socket: {error}")))?;
    tokio::spawn(connection);
    Ok(handle)
}

/// What one end of the veth needs.
struct Side<'a> {
    link: &'static str,
    own: &'a [IpAddr],
    /// Neighbours behind `mac`.
    peers: &'a [IpAddr],
    mac: [u8; 6],
    /// Neighbours who never answer.
    silent: &'a [IpAddr],
}

impl Side<'_> {
    async fn configure(&self) -> io::Result<()> {
        self.try_configure().await.map_err(|error| context(&format!("configuring {}", self.link), &error))
    }

    async fn try_configure(&self) -> Result<(), rtnetlink::Error> {
        let handle = connection()?;
        let index = nix::net::if_::if_nametoindex(self.link)
            .map_err(|error| rtnetlink::Error::NamespaceError(format!("no interface: {error}")))?;
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
        for address in self.own {
            let mut request = handle.address().add(index, *address, prefix(address));
            let message = request.message_mut();
            // The address is of use at once: nobody else is on this link.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            request.execute().await?;
        }
        let neighbours = self.peers.iter().map(|peer| (peer, self.mac));
        for (address, mac) in neighbours.chain(self.silent.iter().map(|address| (address, NOBODY_MAC))) {
            handle.neighbours().add(index, *address).link_layer_address(&mac).execute().await?;
        }
        Ok(())
    }
}

fn prefix(address: &IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

/// Hosts may have switched IPv6 off for interfaces to come; the namespaces are the canary's own.
fn enable_ipv6() -> io::Result<()> {
    std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    for interfaces in ["all", "default"] {
        // A read-only /proc/sys: then adding the address tells.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6"), "0");
    }
    Ok(())
}

fn context(doing: &str, error: &dyn std::error::Error) -> io::Error {
    io::Error::other(format!("{doing}: {error}"))
}
