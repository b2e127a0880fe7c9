//! What is long or never ends goes through as it comes.

use super::instance::now_us;
use super::{Stage, curl, run_curl, stage};
use crate::support::{alone, beside_others, sized};

const MIB: u64 = 1024 * 1024;

#[test]
fn server_sent_events_arrive_within_50_ms_of_being_sent() {
    let _turn = alone();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    client.say("GET /events?100 HTTP/1.1\r\nhost: web\r\n\r\n").unwrap();
    let mut gaps = Vec::new();
    while gaps.len() < 100 {
        let line = client.line().unwrap();
        if let Some(sent_at) = line.strip_prefix("data: ") {
            gaps.push((now_us() - sent_at.parse::<u128>().unwrap()) / 1_000);
        }
    }
    gaps.sort_unstable();
    // One in a hundred may meet a busy moment of the machine.
    assert!(gaps[98] < if cfg!(debug_assertions) { 250 } else { 50 }, "in ms: {gaps:?}");
}

#[test]
fn a_connection_that_is_to_end_with_a_long_answer_ends_with_it() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    // Longer than it takes until a connection that rests is parked.
    client.say("GET /events?100 HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").unwrap();
    let answer = String::from_utf8(client.rest().unwrap()).unwrap();
    assert_eq!(answer.matches("data: ").count(), 100);
    assert!(answer.ends_with("\r\n0\r\n\r\n"), "{answer}");
}

/// How much an agent may grow by what it carries: windows, buffers, and what an allocator keeps.
const GROWTH_MAX: u64 = 48 * MIB;

#[test]
fn large_bodies_go_up_and_down_in_flat_memory() {
    let _turn = alone();
    let (stage, _instance) = stage();
    let len = sized(64 * MIB, 1024 * MIB);
    let warm = stage.client().get("/large?1000000").unwrap();
    assert_eq!(warm.body.len(), 1_000_000);
    let before = [stage.a().memory(), stage.b().memory()];
    let grown = |stage: &Stage| {
        let now = [stage.a().memory(), stage.b().memory()];
        [0, 1].map(|agent| now[agent].saturating_sub(before[agent]))
    };
    let mut most = [0; 2];
    let mut note = || {
        let grown = grown(&stage);
        most = [0, 1].map(|agent| most[agent].max(grown[agent]));
    };
    let mut client = stage.client();
    client.say(format!("GET /large?{len} HTTP/1.1\r\nhost: web\r\n\r\n")).unwrap();
    while client.line().unwrap() != "" {}
    let (mut left, mut buffer) = (len, vec![0; MIB as usize]);
    while left > 0 {
        let read = client.read(&mut buffer).unwrap() as u64;
        assert!(read > 0, "ended {left} bytes early");
        if left / (8 * MIB) != (left - read) / (8 * MIB) {
            note();
        }
        left -= read;
    }
    let head = format!("POST /count HTTP/1.1\r\nhost: web\r\ncontent-length: {len}\r\n\r\n");
    client.say(head).unwrap();
    for number in 0..len / MIB {
        client.say(&buffer).unwrap();
        if number % 8 == 0 {
            note();
        }
    }
    assert_eq!(client.hear(true).unwrap().text(), len.to_string());
    eprintln!("agents grew by {most:?} bytes at most");
    assert!(most.iter().all(|grown| *grown < GROWTH_MAX), "{most:?}");
}

#[test]
fn curl_sends_and_gets_large_bodies_over_http_2() {
    let _turn = beside_others();
    let Some(curl) = curl() else { return };
    let (stage, _instance) = stage();
    let file = stage.mesh.home.path().join("large");
    std::fs::write(&file, vec![b'l'; 32 * MIB as usize]).unwrap();
    let (from, url) = (file.display().to_string(), format!("http://{}", stage.entry));
    let up = ["--http2-prior-knowledge", "-T", &from, &format!("{url}/count")];
    assert_eq!(run_curl(&curl, &up).ok(), (32 * MIB).to_string());
    let down = format!("{url}/large?{}", 32 * MIB);
    let got = ["--http2-prior-knowledge", "-o", "/dev/null", "-w", "%{size_download}", &down];
    assert_eq!(run_curl(&curl, &got).ok(), (32 * MIB).to_string());
}
