//! The other doors: unix sockets, and SOCKS.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;

use murmesh::model::{InstanceState, Target};
use murmesh::proxy::{EntryError, EntryOptions, LocalInstance};
use murmesh::telemetry::Door;
use murmesh::tls::testing::mesh_of;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};

use super::nodes::{Node, echo_server, exchange, pair};
use crate::support::beside_others;

#[tokio::test(flavor = "multi_thread")]
async fn unix_sockets_serve_on_both_sides() {
    let _turn = beside_others();
    let directory = tempfile::tempdir().unwrap();
    let (app, entry) = (directory.path().join("app"), directory.path().join("entry"));
    let listener = UnixListener::bind(&app).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
    });
    let (a, b, _) = pair(echo_server().await).await;
    b.proxy.set_local(vec![LocalInstance {
        id: "web".parse().unwrap(),
        service: "web".parse().unwrap(),
        target: Target::Unix(app),
        state: InstanceState::Ready,
        hard_limit: None,
        proxy_protocol: None,
    }]);
    let listen = Target::Unix(entry.clone());
    let open =
        || a.proxy.open_upstream("web".parse().unwrap(), listen.clone(), EntryOptions::default());
    drop(std::os::unix::net::UnixListener::bind(&entry).unwrap());
    assert!(entry.exists(), "left by an agent that was killed");
    open().await.unwrap();
    assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    let client = UnixStream::connect(&entry).await.unwrap();
    assert_eq!(exchange(client, b"hello").await.unwrap(), b"hello");
    assert!(matches!(open().await, Err(EntryError::Bind { .. })), "somebody answers there");
    assert!(entry.exists(), "and is left alone");
    a.proxy.close_entry(listen.clone()).await.unwrap();
    assert!(matches!(a.proxy.close_entry(listen).await, Err(EntryError::Unknown(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_never_replaces_a_file_that_is_no_socket() {
    let _turn = beside_others();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("precious");
    std::fs::write(&file, "data").unwrap();
    let a = Node::start(mesh_of(&["a"]).unwrap().remove(0)).await;
    let opened = a.proxy.open_socks(Target::Unix(file.clone())).await;
    let Err(EntryError::Bind { error, .. }) = opened else { panic!("{opened:?}") };
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(file).unwrap(), b"data");
}

#[tokio::test(flavor = "multi_thread")]
async fn socks_leads_to_services_by_name_and_nowhere_else() {
    let _turn = beside_others();
    let (a, _b, _) = pair(echo_server().await).await;
    let socks = a.proxy.open_socks("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let Target::Tcp(socks) = socks else { panic!("{socks}") };

    let name = |name: &str| [&[3, name.len() as u8][..], name.as_bytes(), &[0, 80]].concat();
    let (mut client, code) = connect(socks, 1, &name("web.mesh")).await;
    assert_eq!(code, 0);
    client.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    client.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello");

    let refusals: [(u8, Vec<u8>, u8, &str); 6] = [
        (1, name("nobody.mesh.internal"), 4, "unknown_service"),
        (1, name("example.com"), 2, "foreign_name"),
        (1, vec![1, 127, 0, 0, 1, 0, 80], 2, "address"),
        (1, [&[4][..], &[0; 18]].concat(), 2, "address"),
        (2, name("web.mesh"), 7, "command"),
        (1, vec![9], 8, "address_type"),
    ];
    for (command, address, expected, reason) in refusals {
        let before = a.metrics.refused(Door::socks, reason);
        let (mut client, code) = connect(socks, command, &address).await;
        assert_eq!(code, expected, "{reason}");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "closed, not reset: {reason}");
        assert_eq!(a.metrics.refused(Door::socks, reason), before + 1, "{reason}");
    }
    let mut picky = TcpStream::connect(socks).await.unwrap();
    picky.write_all(&[5, 1, 2]).await.unwrap(); // a password, or nothing
    let mut answer = [0; 2];
    picky.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, [5, 0xff]);
}

/// Asks for `address`; the connection and the code of the reply.
async fn connect(socks: std::net::SocketAddr, command: u8, address: &[u8]) -> (TcpStream, u8) {
    let mut client = TcpStream::connect(socks).await.unwrap();
    client.write_all(&[5, 1, 0]).await.unwrap();
    client.read_exact(&mut [0; 2]).await.unwrap();
    client.write_all(&[&[5, command, 0], address].concat()).await.unwrap();
    let mut reply = [0; 10];
    client.read_exact(&mut reply).await.unwrap();
    (client, reply[1])
}
