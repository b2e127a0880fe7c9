//! Request smuggling and its kin, over raw sockets, against real agents and an application behind
//! one of them that writes down every byte.
//!
//! A message in which two readers can see different things is refused, and nothing behind it on its
//! connection counts. What does reach the application is read by two readers that disagree where
//! they can ([`reading`]): they must see the same requests, and none hidden in another one.

mod frames;
mod reading;
mod recorder;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::support::{Agent, TestMesh, beside_others, check, free_address};
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

/// How many attacks there may be at one entry.
const ATTACKS_MAX: usize = 300;
/// The host of the service, inside the mesh and for the public.
const HOST: &str = "web.mesh";

/// A way in.
#[derive(Clone)]
struct Entry {
    address: SocketAddr,
    /// Where clients speak TLS, and with which protocol inside.
    tls: Option<Arc<ClientConfig>>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Entry {
    /// A new connection, on which nothing takes longer than [`PATIENCE`].
    fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let Some(config) = &self.tls else { return Ok(Box::new(stream)) };
        let name = HOST.try_into().map_err(std::io::Error::other)?;
        let client = ClientConnection::new(Arc::clone(config), name);
        Ok(Box::new(StreamOwned::new(client.map_err(std::io::Error::other)?, stream)))
    }
}

/// An application behind one agent, and the entries to it at another one: an upstream, the gateway,
/// and the public one.
struct Stage {
    mesh: TestMesh,
    recorder: Recorder,
    entries: Vec<Entry>,
}

impl Stage {
    fn new() -> Self {
        let (mut mesh, gateway, public) = (TestMesh::new(), free_address(), free_address());
        let home = mesh.home.path().to_owned();
        let own = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
        let (cert, key, file) = (home.join("pem"), home.join("key"), home.join("caller.toml"));
        fs::write(&cert, own.cert.pem()).unwrap();
        fs::write(&key, own.signing_key.serialize_pem()).unwrap();
        let text = format!(
            "[listen]\ngateway = \"{gateway}\"\n[gateway]\npublic = \"{public}\"\n\
             certificates = [{{ cert = {cert:?}, key = {key:?} }}]\n\
             [[upstream]]\nservice = \"web\"\npublic = true\nhosts = [\"{HOST}\"]\n"
        );
        fs::write(&file, text).unwrap();
        let mut caller = Agent::new(&mesh.home, "caller");
        caller.arguments = vec!["-c".to_owned(), file.display().to_string()];
        mesh.found_with(caller);
        let token = mesh.invite(1);
        mesh.join("server", &token);
        let recorder = Recorder::start();
        let to = recorder.address.to_string();
        mesh.agent("server").run(&["expose", "web", &to, "--protocol", "http"]).ok();
        let caller = mesh.agent("caller");
        let mut roots = RootCertStore::empty();
        roots.add(own.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let plain = [caller.upstream("web"), gateway].map(|address| Entry { address, tls: None });
        let mut entries = Vec::from(plain);
        entries.push(Entry { address: public, tls: Some(Arc::new(tls)) });
        caller.wait_endpoints("web", 1);
        Self { mesh, recorder, entries }
    }

    /// Every attack at every entry, with its number.
    fn each<'a, T>(&self, attacks: &'a [T]) -> impl Iterator<Item = (&Entry, usize, &'a T)> {
        assert!(attacks.len() <= ATTACKS_MAX);
        self.entries.iter().enumerate().flat_map(move |(at, entry)| {
            let numbered = attacks.iter().enumerate();
            numbered.map(move |(index, attack)| (entry, at * ATTACKS_MAX + index, attack))
        })
    }

    /// An honest client gets the answer to its own request, or what went wrong.
    fn serve_the_honest(&self, entry: &Entry, index: usize) -> Result<(), String> {
        let target = format!("/honest/{index:03}");
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: web.mesh\r\nConnection: close\r\n\r\n");
        let answers = talk(entry, request.as_bytes())?;
        check(answers == [(200, format!("GET {target}"))], ("an honest client", answers))
    }

    /// What the application got, by target, once both agents have ended.
    fn received(&self, verdicts: &mut Verdicts) -> BTreeMap<String, Message> {
        for agent in &self.mesh.agents {
            agent.stop();
        }
        let mut received = BTreeMap::new();
        for bytes in self.recorder.recorded() {
            let text = bytes.escape_ascii().to_string();
            let messages = strictly(&bytes).unwrap_or_else(|fault| {
                verdicts.faults.push(fault);
                Vec::new()
            });
            let (seen, last) = (carelessly(&bytes), messages.len().saturating_sub(1));
            let whole = |messages: &[Message]| -> Vec<_> {
                messages.iter().filter(|message| message.is_whole).map(outline).collect()
            };
            verdicts.note("both readers agree", check(whole(&messages) == whole(&seen), &text));
            for (index, message) in messages.into_iter().enumerate() {
                let is_overlooked = message.method != "POST" && !message.body.is_empty();
                let is_safe = !is_overlooked || index == last;
                verdicts
                    .note("nothing follows a body that may be overlooked", check(is_safe, &text));
                let is_new = !received.contains_key(&message.target);
                verdicts.note("nothing is delivered twice", check(is_new, &text));
                received.insert(message.target.clone(), message);
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
    let attacks = attacks();
    assert!(attacks.len() >= 80, "{}", attacks.len());
    let mut verdicts = Verdicts::default();
    for (entry, index, Attack { name, expected, bytes }) in stage.each(&attacks) {
        let after = "GET /after/000 HTTP/1.1\r\nHost: web.mesh\r\nConnection: close\r\n\r\n";
        let sent = numbered(&[bytes, after.as_bytes()].concat(), index);
        let answers = talk(entry, &sent);
        let statuses = answers.as_ref().map(|all| all.iter().map(|(status, _)| *status));
        match (expected, statuses.map(Vec::from_iter).as_deref()) {
            (Expected::Refused | Expected::Cut, Ok([400])) => {}
            (Expected::OneMessage, Ok([200, 200])) => {}
            (Expected::Refused | Expected::Cut, Ok([200, ..])) => verdicts.mended(index, name),
            _ => verdicts.faults.push(format!("{name}: {answers:?}")),
        }
        verdicts.note(name, stage.serve_the_honest(entry, index));
    }
    let received = stage.received(&mut verdicts);
    for (_, index, Attack { name, expected, .. }) in stage.each(&attacks) {
        verdicts.judge(&received, index, name, *expected);
    }
    verdicts.conclude(&received, attacks.len());
}

#[test]
fn no_application_sees_in_frames_what_is_not_one_request() {
    let _turn = beside_others();
    let stage = Stage::new();
    let attacks = frame_attacks();
    let mut verdicts = Verdicts::default();
    for (entry, index, (name, expected, request)) in stage.each(&attacks) {
        let mut request = request.clone();
        for (_, value) in &mut request.fields {
            *value = value.replace("000", &format!("{index:03}"));
        }
        match (expected, frames::send(entry, &request)) {
            (Expected::Refused | Expected::Cut, Outcome::Reset | Outcome::Answered(0x8c)) => {}
            (Expected::OneMessage, Outcome::Answered(0x88)) => {}
            (Expected::Refused | Expected::Cut, Outcome::Answered(0x88)) => {
                verdicts.mended(index, name);
            }
            (_, outcome) => verdicts.faults.push(format!("{name}: {outcome:?}")),
        }
        verdicts.note(name, stage.serve_the_honest(entry, index));
    }
    let received = stage.received(&mut verdicts);
    for (_, index, (name, expected, _)) in stage.each(&attacks) {
        verdicts.judge(&received, index, name, *expected);
    }
    verdicts.conclude(&received, attacks.len());
}

#[test]
fn a_request_of_http_1_0_without_a_host_gets_one_on_its_way() {
    let _turn = beside_others();
    let stage = Stage::new();
    let answers = talk(&stage.entries[0], b"GET /old HTTP/1.0\r\n\r\n");
    assert_eq!(answers, Ok(vec![(200, "GET /old".to_owned())]));
    let received = stage.received(&mut Verdicts::default());
    assert_eq!(received["/old"].header("host"), Some("web"));
}

/// What was found, all of it: a table is no place to stop at the first line.
#[derive(Default)]
struct Verdicts {
    faults: Vec<String>,
    /// What was mended where it should have been refused, and arrived as one message.
    lenient: BTreeMap<usize, String>,
}

impl Verdicts {
    fn note(&mut self, name: &str, found: Result<(), String>) {
        self.faults.extend(found.err().map(|fault| format!("{name}: {fault}")));
    }

    fn mended(&mut self, index: usize, name: &str) {
        self.lenient.insert(index, name.to_owned());
    }

    /// What was refused did not arrive, and nothing that came behind it.
    fn judge(
        &mut self,
        received: &BTreeMap<String, Message>,
        index: usize,
        name: &str,
        expected: Expected,
    ) {
        if expected == Expected::OneMessage || self.lenient.contains_key(&index) {
            return; // both readers agreed on what came
        }
        let got = |what: &str| received.get(&format!("/{what}/{index:03}"));
        let is_cut = |message: &Message| expected == Expected::Cut && !message.is_whole;
        self.note(name, check(got("attack").is_none_or(is_cut), got("attack")));
        self.note(name, check(got("after").is_none(), "what came behind it"));
    }

    #[track_caller]
    fn conclude(mut self, received: &BTreeMap<String, Message>, count: usize) {
        for (target, message) in received {
            let is_forged = |(name, value): &(String, String)| {
                NEVER_FORWARDED.contains(&name.as_str()) || value.contains("forged")
            };
            let is_sound = !target.starts_with("/smuggled")
                && !message.headers.iter().any(is_forged)
                && message.header("upgrade") != Some("h2c");
            self.note(target, check(is_sound, message));
        }
        println!("{count} attacks at each entry, lenient with {:?}", self.lenient);
        assert!(
            self.faults.is_empty(),
            "{} faults:\n{}",
            self.faults.len(),
            self.faults.join("\n")
        );
        let lenient: BTreeSet<_> = self.lenient.values().collect();
        assert!(lenient.len() <= LENIENT_MAX, "{lenient:?}");
    }
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
fn talk(entry: &Entry, bytes: &[u8]) -> Result<Vec<(u16, String)>, String> {
    let mut stream = entry.connect().map_err(|error| error.to_string())?;
    let _ = stream.write_all(bytes); // refused half-way: the answer tells
    let mut answered = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => answered.extend_from_slice(&chunk[..len]),
            // Of TLS: an end that was not said. Whether the answers are whole they say themselves.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => return Err(format!("{error} after {}", answered.escape_ascii())),
        }
    }
    answers(&answered).ok_or_else(|| format!("answered {}", answered.escape_ascii()))
}

/// `None` when it is not a row of whole answers, or a refusal without its reason.
fn answers(mut bytes: &[u8]) -> Option<Vec<(u16, String)>> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let mut slots = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut slots);
        let Ok(httparse::Status::Complete(head)) = response.parse(bytes) else { return None };
        let header = |wanted: &str| {
            let mut found = response.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(wanted));
            found.next().map(|header| String::from_utf8_lossy(header.value).into_owned())
        };
        let code = response.code?;
        if code == 400 && header("x-murmesh-reason").as_deref() != Some("malformed") {
            return None;
        }
        let len = header("content-length").map_or(Some(0), |len| len.parse().ok())?;
        let body = String::from_utf8_lossy(bytes.get(head..head + len)?).into_owned();
        bytes = &bytes[head + len..];
        if code != 100 {
            answers.push((code, body));
        }
    }
    Some(answers)
}
