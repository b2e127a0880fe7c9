//! Connections that go on as something else.

use super::{PythonServer, Stage, run_python, stage};
use crate::support::{SOON, beside_others, check, eventually, python, sized};

const SCRIPT: &str = include_str!("websocket.py");

#[test]
fn websocket_carries_many_and_large_messages_both_ways() {
    let _turn = beside_others();
    let Some(python) = python(&["websockets==15.0.1"]) else { return };
    let home = tempfile::tempdir().unwrap();
    let server = PythonServer::start(&python, home.path(), SCRIPT, &["serve"]);
    let stage = Stage::of("http", &[server.address]);
    let (count, large) = (sized(1_000, 10_000).to_string(), 16 * 1024 * 1024);
    let arguments = ["call", &stage.entry.to_string(), &count, &large.to_string()];
    assert_eq!(run_python(&python, SCRIPT, &arguments), "last\nclosed 1000\n");
    eventually("the exchange has ended well", SOON, || {
        let outcomes = (stage.exchanges("success"), stage.exchanges("failure"));
        check(outcomes == (1.0, 0.0), outcomes)
    });
}

#[test]
fn any_protocol_that_both_sides_agree_on_is_carried_from_its_first_byte_to_both_ends() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    // What follows the request is said before the instance has agreed.
    client
        .say("GET /shout HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: shout/1\r\n\r\nfirst\n")
        .unwrap();
    let agreed = client.hear(true).unwrap();
    assert_eq!((agreed.status, agreed.header("upgrade")), (101, Some("shout/1")));
    assert_eq!(client.line().unwrap(), "HELLO");
    assert_eq!(client.line().unwrap(), "FIRST");
    client.say("second\n").unwrap();
    assert_eq!(client.line().unwrap(), "SECOND");
    client.say("last\n").unwrap();
    client.end().unwrap();
    assert_eq!(client.rest().unwrap(), b"LAST\n", "and then its end");
}

#[test]
fn upgrade_that_the_instance_does_not_want_is_an_ordinary_answer() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    client
        .say("GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: shout/1\r\n\r\n")
        .unwrap();
    assert_eq!(client.hear(true).unwrap().text(), "web");
    assert_eq!(client.get("/").unwrap().text(), "web", "and requests follow");
    let asks = "GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: shout/1\r\n\r\n";
    client.say(format!("{asks}GET / HTTP/1.1\r\nhost: web\r\n\r\n")).unwrap();
    for which in ["the first", "the one that was said before the first was answered"] {
        assert_eq!(client.hear(true).unwrap().text(), "web", "{which}");
    }
}

#[test]
fn switched_connection_that_the_instance_cuts_is_a_cut_at_the_client() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let mut client = stage.client();
    client
        .say("GET /shout HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: shout/1\r\n\r\n")
        .unwrap();
    assert_eq!(client.hear(true).unwrap().status, 101);
    assert_eq!(client.line().unwrap(), "HELLO");
    client.say("cut\n").unwrap();
    let error = client.rest().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    drop(instance);
}
