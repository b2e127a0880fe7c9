//! What is lost on the way: never done twice, never answered with less than there was.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::client::Client;
use super::instance::{Instance, Manners, Seen, sum};
use super::{Stage, stage};
use crate::support::{SOON, beside_others, check, eventually, free_address, sized, until};

#[test]
fn post_that_an_instance_read_before_it_went_is_delivered_once_and_answered_502() {
    let _turn = beside_others();
    let instances = ["1", "2"].map(Instance::start);
    let stage = Stage::of("http", &instances.each_ref().map(|instance| instance.address));
    let mut client = stage.client();
    let trials = sized(100, 1_000);
    for trial in 0..trials {
        // Some on new connections to the instance, some on those that an answer has left behind.
        if trial % 2 == 0 {
            assert_eq!(client.get("/").unwrap().status, 200);
        }
        let id = format!("x-id: {trial}\r\n");
        let answer = client.ask("POST", "/lose", &id, &vec![b'p'; 1 + trial * 37]).unwrap();
        assert_eq!((answer.status, answer.header("x-murmesh-reason")), (502, Some("lost")));
    }
    let mut deliveries = instances[0].seen.deliveries();
    for (id, count) in instances[1].seen.deliveries() {
        *deliveries.entry(id).or_default() += count;
    }
    assert_eq!(deliveries.len(), trials, "each was delivered");
    assert!(deliveries.values().all(|count| *count == 1), "{deliveries:?}");
    assert_eq!(stage.a().metric("murmesh_retries_total", &[]), 0.0);
}

/// What `a` tells of failures, newest last: kind, word, and of whom what is said.
fn told(stage: &Stage, kind: &str) -> Vec<[String; 3]> {
    let events = stage.a().events(kind);
    let tell = |event: &Value| {
        let field = |name: &str| event["fields"][name].as_str().unwrap_or_default().to_owned();
        let whom = format!("{} at {}", field("instance"), field("node"));
        [event["reason"].as_str().unwrap().to_owned(), whom, field("said")]
    };
    events.iter().map(tell).collect()
}

#[test]
fn failure_is_told_with_the_instance_and_with_what_its_agent_says() {
    let _turn = beside_others();
    let (stage, mut instance) = stage();
    let lost = stage.client().ask("POST", "/lose", "", b"pay 100").unwrap();
    assert!(lost.text().starts_with("web: no answer of web-0 at b; it may have"), "{lost:?}");
    assert_eq!(told(&stage, "request_failed"), [["lost", "web-0 at b", ""]]);
    assert!(stage.client().get("/cut-chunked").is_err());
    assert_eq!(told(&stage, "request_failed")[1], ["cut", "web-0 at b", ""]);
    instance.stop();
    let refused = stage.client().get("/").unwrap();
    assert_eq!(refused.header("x-murmesh-reason"), Some("unreachable"));
    assert!(refused.text().contains("(web-0 at b: Connection refused"), "{refused:?}");
    let refusal = &told(&stage, "connection_refused")[0];
    assert_eq!(refusal[..2], ["unreachable", "web-0 at b"]);
    assert!(refusal[2].starts_with("Connection refused"), "{refusal:?}");
}

#[test]
fn instance_that_may_have_had_a_request_is_named_and_not_the_next_one_that_did_not_take_it() {
    let _turn = beside_others();
    let takes_and_goes = says_the_same_to_all(b"");
    let stage = Stage::of("http", &[takes_and_goes, free_address()]);
    let addresses = [takes_and_goes, free_address()];
    for (number, address) in addresses.iter().enumerate() {
        let (id, to) = (format!("web-{number}"), address.to_string());
        let expose = ["expose", "web", &to, "--id", &id, "--protocol", "http"];
        stage.b().run(&[&expose[..], &["--idempotent", "GET *"]].concat()).ok();
    }
    eventually("the caller knows it", SOON, || {
        let routes = stage.a().get("/v1/mesh/routes?service=web&method=GET&path=/");
        check(routes[0]["repeatable"] == true, routes)
    });
    for _ in 0..5 {
        let answer = stage.client().get("/").unwrap();
        assert_eq!(answer.header("x-murmesh-reason"), Some("lost"), "{answer:?}");
        assert!(answer.text().starts_with("web: no answer of web-0 at b; it may"), "{answer:?}");
    }
}

#[test]
fn instance_that_does_not_speak_what_it_was_exposed_with_is_told_from_one_that_went_away() {
    let _turn = beside_others();
    for (protocol, says, missed) in [
        ("h2", &b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"[..], "HTTP/2"),
        ("http", &b"\0\0\0\x04\0\0\0\0\0"[..], "HTTP/1.1"), // SETTINGS
    ] {
        let stage = Stage::of(protocol, &[says_the_same_to_all(says)]);
        let answer = stage.client().ask("POST", "/", "", b"pay 100").unwrap();
        assert_eq!((answer.status, answer.header("x-murmesh-reason")), (502, Some("lost")));
        let hint = format!("web: no sound {missed} of web-0 at b: ");
        assert!(answer.text().starts_with(&hint), "{answer:?}");
        let [word, whom, said] = &told(&stage, "request_failed")[0];
        assert_eq!([word.as_str(), whom.as_str()], ["lost", "web-0 at b"]);
        assert!(!said.is_empty());
    }
}

/// A server that answers whatever it is told with the same bytes; where there are none it goes.
fn says_the_same_to_all(answer: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                if stream.read(&mut [0; 4_096]).is_ok_and(|len| len > 0)
                    && stream.write_all(answer).is_ok()
                    && !answer.is_empty()
                {
                    let _ = io::copy(&mut stream, &mut io::sink()); // until the other side has enough
                }
            });
        }
    });
    address
}

#[test]
fn long_body_of_which_no_instance_had_a_byte_goes_to_the_one_that_takes_it() {
    let _turn = beside_others();
    let instance = Instance::start("web");
    // One of seven listens: the first to be asked hardly ever does.
    let mut addresses: Vec<_> = (0..6).map(|_| free_address()).collect();
    addresses.push(instance.address);
    let stage = Stage::of("http", &addresses);
    let body = vec![b'p'; 1 << 20];
    let answer = stage.client().ask("POST", "/echo", "x-id: 1\r\n", &body).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.text().trim(), format!("{} {}", body.len(), sum(&body)));
    assert_eq!(instance.seen.deliveries().get("1"), Some(&1));
}

#[test]
fn post_after_the_instance_has_ended_its_connection_is_done_once_and_never_fails() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let mut client = stage.client();
    let trials = sized(300, 3_000);
    for trial in 0..trials {
        let id = format!("x-id: {trial}\r\n");
        let answer = client.ask("POST", "/curt", &id, b"pay 100").unwrap();
        assert_eq!(answer.status, 200, "trial {trial}: {answer:?}");
        // It did not say that it would. A request that is there before has reached it.
        eventually("the instance has ended it", SOON, || {
            let open = instance.seen.open();
            check(open == 0, open)
        });
    }
    let deliveries = instance.seen.deliveries();
    assert_eq!(deliveries.len(), trials);
    assert!(deliveries.values().all(|count| *count == 1), "{deliveries:?}");
}

/// The end of a resting connection crosses with a request: its agent stands still while both happen.
fn crossing(body: &[u8]) -> (super::client::Answer, Arc<Seen>) {
    let rest_max = Some(Duration::from_millis(200));
    let instance = Instance::with("web", Manners { rest_max, ..Manners::default() });
    let stage = Stage::of("http", &[instance.address]);
    let mut client = stage.client();
    assert_eq!(client.get("/").unwrap().status, 200);
    stage.b().signal(Signal::STOP);
    eventually("the instance has closed the connection", SOON, || {
        let open = instance.seen.open();
        check(open == 0, open)
    });
    let half = body.len() / 2;
    let head = "POST /echo HTTP/1.1\r\nhost: web\r\nx-id: 1\r\ntransfer-encoding: chunked\r\n\r\n";
    client.say(head).unwrap();
    for chunk in [&body[..half], &body[half..]] {
        client.say([format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat()).unwrap();
    }
    client.say("0\r\n\r\n").unwrap();
    // As much of it as may be on its way is.
    until(Instant::now() + Duration::from_millis(100));
    stage.b().signal(Signal::CONT);
    let answer = client.hear(true).unwrap();
    (answer, Arc::clone(&instance.seen))
}

#[test]
fn post_that_crosses_with_the_end_of_its_connection_is_sent_again_on_proof_that_it_did_not_arrive()
{
    let _turn = beside_others();
    let body = vec![b'p'; 10_000];
    let (answer, seen) = crossing(&body);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.text().trim(), format!("10000 {}", sum(&body)));
    assert_eq!(seen.deliveries().get("1"), Some(&1));
}

#[test]
fn body_that_is_too_long_to_be_said_again_is_never_delivered_without_its_beginning() {
    let _turn = beside_others();
    let (answer, seen) = crossing(&vec![b'p'; 180_000]);
    assert_eq!(answer.status, 502, "{answer:?}");
    assert_eq!(answer.header("x-murmesh-reason"), Some("unreachable"), "it may be sent again");
    assert_eq!(seen.deliveries().len(), 0);
}

#[test]
fn post_is_never_done_twice_while_instances_close_connections_and_are_killed() {
    let _turn = beside_others();
    let manners = Manners { rest_max: Some(Duration::from_millis(7)), ..Manners::default() };
    let mut instances = ["1", "2", "3"].map(|name| Instance::with(name, manners));
    let stage = Stage::of("http", &instances.each_ref().map(|instance| instance.address));
    let entry = stage.entry;
    let (callers, trials) = (4, sized(100, 1_000));
    let is_over = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let is_over = &is_over;
        let killer = scope.spawn(|| {
            let mut turn = 0;
            while !is_over.load(Ordering::Relaxed) {
                let victim = &mut instances[turn % 3];
                let (address, seen) = (victim.address, Arc::clone(&victim.seen));
                victim.stop(); // every connection of it is cut
                until(Instant::now() + Duration::from_millis(20));
                *victim = Instance::at(address, "again", manners, seen);
                until(Instant::now() + Duration::from_millis(30));
                turn += 1;
            }
        });
        let call = |caller: usize| {
            let mut answers = Vec::new();
            let mut client = Client::to(entry).unwrap();
            for trial in 0..trials {
                // About as long as a connection may rest.
                let pause = (caller * 37 + trial * 11) % 10;
                until(Instant::now() + Duration::from_millis(pause as u64));
                let id = format!("{caller}-{trial}");
                let field = format!("x-id: {id}\r\n");
                let path = if trial % 3 == 0 { "/curt" } else { "/" };
                let answer = client.ask("POST", path, &field, b"pay 100").unwrap();
                answers.push((id, answer));
            }
            answers
        };
        let callers: Vec<_> =
            (0..callers).map(|caller| scope.spawn(move || call(caller))).collect();
        let answers: Vec<_> =
            callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect();
        is_over.store(true, Ordering::Relaxed);
        killer.join().unwrap();
        answers
    });
    let mut delivered = 0;
    for (id, answer) in &answers {
        let seen = instances.iter().map(|instance| instance.seen.deliveries());
        let times: u64 = seen.filter_map(|deliveries| deliveries.get(id).copied()).sum();
        match answer.status {
            200 => assert_eq!(times, 1, "{id}: {answer:?}"),
            502 => assert!(times <= 1, "{id} was done {times} times"),
            _ => panic!("{id}: {answer:?}"),
        }
        delivered += times;
    }
    assert_eq!(answers.len(), callers * trials);
    let ok = answers.iter().filter(|(_, answer)| answer.status == 200).count();
    eprintln!("{ok} of {} answered 200, {delivered} delivered", answers.len());
    assert!(ok * 100 >= answers.len() * 90, "{ok}: most never noticed");
}

/// Answers every request of HTTP/2 with 200, but the first one of all: that hears that none of its
/// connection was begun with.
fn goes_away_once(has_gone: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let has_gone = Arc::clone(&has_gone);
            std::thread::spawn(move || answer_frames(stream?, &has_gone));
        }
    });
    address
}

fn answer_frames(mut stream: TcpStream, has_gone: &AtomicBool) -> io::Result<()> {
    let [headers, settings, goaway] = [1, 4, 7];
    let (end_stream, end_headers) = (1, 4);
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let len = (payload.len() as u32).to_be_bytes();
        [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    stream.read_exact(&mut [0; 24])?; // what a client begins with
    stream.write_all(&frame(settings, 0, 0, &[]))?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream.read_exact(&mut vec![0; len as usize])?;
        if head[3] != headers {
            continue;
        }
        if !has_gone.swap(true, Ordering::Relaxed) {
            stream.write_all(&frame(goaway, 0, 0, &[0; 8]))?; // the last stream: none; no error
            return io::copy(&mut stream, &mut io::sink()).map(drop); // an end now might be a reset
        }
        let number = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        stream.write_all(&frame(headers, end_stream | end_headers, number, &[0x88]))?; // 200
    }
}

#[test]
fn post_that_a_server_of_http_2_says_it_has_not_begun_with_is_sent_again() {
    let _turn = beside_others();
    let has_gone = Arc::<AtomicBool>::default();
    let instances = [(); 2].map(|()| goes_away_once(Arc::clone(&has_gone)));
    let stage = Stage::of("h2", &instances);
    let answer = stage.client().ask("POST", "/", "", b"").unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(has_gone.load(Ordering::Relaxed));
}
