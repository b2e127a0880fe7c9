//! Request smuggling and its kin, over raw sockets, against real agents and an application behind
//! another agent that writes down every byte.
//!
//! A message in which two readers can see different things is refused, and nothing behind it on its
//! connection counts. What does reach the application is read by two readers that disagree wherever
//! they can ([`reading`]): they must see the same requests, and none that was hidden in another one.

mod frames;
mod reading;
mod recorder;
mod table;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::support::{TestMesh, beside_others};
use frames::Outcome;
use reading::{Message, carelessly, strictly};
use recorder::Recorder;
use table::{Attack, Expected, attacks, frame_attacks};

/// A hang is a failure with a name.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many messages may be mended instead of refused.
const LENIENT_MAX: usize = 2;
/// What belongs to a client's connection, or what only agents say.
const NEVER_FORWARDED: [&str; 6] = [
    "http2-settings",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "transfer_encoding",
    "content_length",
];

/// An application behind one agent, and the entry to it at another one.
struct Stage {
    mesh: TestMesh,
    recorder: Recorder,
    entry: SocketAddr,
}

impl Stage {
    fn new() -> Self {
        let mesh = TestMesh::of(&["caller", "server"]);
        let recorder = Recorder::start();
        let to = recorder.address.to_string();
        mesh.agent("server").run(&["expose", "web", &to, "--protocol", "http"]).ok();
        let caller = mesh.agent("caller");
        let entry = caller.upstream("web");
        caller.wait_endpoints("web", 1);
        Self { mesh, recorder, entry }
    }

    /// An honest client gets the answer to its own request.
    #[track_caller]
    fn serves_the_honest(&self, index: usize, name: &str) {
        let target = format!("/honest/{index:03}");
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: web.mesh\r\nConnection: close\r\n\r\n");
        let answers = talk(self.entry, request.as_bytes(), name);
        assert_eq!(answers, [(200, format!("GET {target}"))], "after {name}");
    }

    /// What the application got, by target, once both agents have ended. Both readers agree on it.
    fn received(self) -> BTreeMap<String, Message> {
        for agent in &self.mesh.agents {
            agent.stop();
        }
        let mut received = BTreeMap::new();
        for bytes in self.recorder.recorded() {
            let messages = strictly(&bytes).unwrap();
            let seen = carelessly(&bytes);
            let whole = |messages: &[Message]| -> Vec<_> {
                messages.iter().filter(|message| message.is_whole).map(outline).collect()
            };
            assert_eq!(whole(&messages), whole(&seen), "{}", bytes.escape_ascii());
            for message in messages {
                let earlier = received.insert(message.target.clone(), message);
                assert_eq!(earlier, None, "delivered twice");
            }
        }
        received
    }
}

fn outline(message: &Message) -> (String, String, Vec<u8>) {
    (message.method.clone(), message.target.clone(), message.body.clone())
}

#[test]
fn no_application_sees_a_request_that_was_hidden_in_another_one() {
    let _turn = beside_others();
    let stage = Stage::new();
    let attacks: Vec<_> = attacks().into_iter().enumerate().collect();
    assert!(attacks.len() >= 80, "{}", attacks.len());
    let mut lenient = Vec::new();
    for (index, Attack { name, expected, bytes }) in &attacks {
        let after = "GET /after/000 HTTP/1.1\r\nHost: web.mesh\r\nConnection: close\r\n\r\n";
        let sent = numbered(&[bytes, after.as_bytes()].concat(), *index);
        let answers = talk(stage.entry, &sent, name);
        let statuses: Vec<_> = answers.iter().map(|(status, _)| *status).collect();
        match (expected, &statuses[..]) {
            (Expected::Refused, [400]) | (Expected::OneMessage, [200] | [200, 200]) => {}
            (Expected::Refused, [200] | [200, 200]) => lenient.push((*index, *name)),
            _ => panic!("{name}: answered {answers:?}"),
        }
        stage.serves_the_honest(*index, name);
    }
    let received = stage.received();
    for (index, Attack { name, expected, bytes }) in &attacks {
        let got = |what: &str| received.get(&format!("/{what}/{index:03}"));
        assert_eq!(got("smuggled"), None, "{name}");
        if *expected == Expected::OneMessage || lenient.iter().any(|(known, _)| known == index) {
            continue; // both readers agreed on what came
        }
        assert_eq!(got("after"), None, "{name}: it went on behind what was refused");
        let has_head = bytes.windows(7).any(|part| part == b"chunked"); // its chunks are refused later
        let came = got("attack");
        assert!(came.is_none_or(|message| has_head && !message.is_whole), "{name}: {came:?}");
    }
    for message in received.values() {
        let forged = message.headers.iter().find(|(name, value)| {
            NEVER_FORWARDED.contains(&name.as_str()) || value.contains("forged")
        });
        assert_eq!(forged, None, "{message:?}");
        assert_ne!(message.header("upgrade"), Some("h2c"), "{message:?}");
    }
    println!("{} attacks, lenient: {lenient:?}", attacks.len());
    assert!(lenient.len() <= LENIENT_MAX, "{lenient:?}");
}

#[test]
fn no_application_sees_in_frames_what_is_not_one_request() {
    let _turn = beside_others();
    let stage = Stage::new();
    let attacks: Vec<_> = frame_attacks().into_iter().enumerate().collect();
    let mut lenient = Vec::new();
    for (index, (name, expected, request)) in &attacks {
        let mut request = frames::Request {
            fields: request.fields.clone(),
            body: request.body,
            trailers: request.trailers.clone(),
        };
        for (_, value) in &mut request.fields {
            *value = value.replace("000", &format!("{index:03}"));
        }
        match (expected, frames::send(stage.entry, &request)) {
            (Expected::Refused, Outcome::Reset | Outcome::Answered(0x8c)) => {}
            (Expected::OneMessage, Outcome::Answered(0x88)) => {}
            (Expected::Refused, Outcome::Answered(0x88)) => lenient.push((*index, *name)),
            (_, outcome) => panic!("{name}: {outcome:?}"),
        }
        stage.serves_the_honest(*index, name);
    }
    let received = stage.received();
    for (index, (name, expected, _)) in &attacks {
        let got = |what: &str| received.get(&format!("/{what}/{index:03}"));
        assert_eq!(got("smuggled"), None, "{name}");
        if *expected == Expected::Refused && !lenient.iter().any(|(known, _)| known == index) {
            assert!(got("attack").is_none_or(|message| !message.is_whole), "{name}");
        }
    }
    let forged = received
        .values()
        .find(|message| message.headers.iter().any(|(_, value)| value.contains("forged")));
    assert_eq!(forged, None);
    println!("{} attacks in frames, lenient: {lenient:?}", attacks.len());
    assert!(lenient.len() <= LENIENT_MAX, "{lenient:?}");
}

/// The number of an attack for its place-holder, in as many bytes.
fn numbered(bytes: &[u8], index: usize) -> Vec<u8> {
    let mut numbered = bytes.to_vec();
    for at in 0..numbered.len().saturating_sub(2) {
        if numbered[at..].starts_with(b"/000") {
            numbered[at + 1..at + 4].copy_from_slice(format!("{index:03}").as_bytes());
        }
    }
    numbered
}

/// Sends bytes, and reads status and body of every answer until the agent closes.
#[track_caller]
fn talk(entry: SocketAddr, bytes: &[u8], name: &str) -> Vec<(u16, String)> {
    let mut stream = TcpStream::connect(entry).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(bytes); // refused half-way: the answer tells
    let mut answered = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => answered.extend_from_slice(&chunk[..len]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{name}: {error} after {}", answered.escape_ascii()),
        }
    }
    answers(&answered, name)
}

#[track_caller]
fn answers(mut bytes: &[u8], name: &str) -> Vec<(u16, String)> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let mut slots = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut slots);
        let Ok(httparse::Status::Complete(head)) = response.parse(bytes) else {
            panic!("{name}: answered {}", bytes.escape_ascii());
        };
        let header = |wanted: &str| {
            let mut found = response.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(wanted));
            found.next().map(|header| String::from_utf8_lossy(header.value).into_owned())
        };
        let code = response.code.unwrap();
        if code == 400 {
            assert_eq!(header("x-murmesh-reason").as_deref(), Some("malformed"), "{name}");
        }
        let len: usize = header("content-length").map_or(0, |len| len.parse().unwrap());
        let body = String::from_utf8_lossy(&bytes[head..head + len]).into_owned();
        bytes = &bytes[head + len..];
        if code != 100 {
            answers.push((code, body));
        }
    }
    answers
}
