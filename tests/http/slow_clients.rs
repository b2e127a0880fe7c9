//! Clients that take their time, and what they may cost those that do not.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::Stage;
use super::client::Client;
use super::instance::Instance;
use crate::support::{SOON, alone, check, eventually, is_long, raise_file_limit, sized, skip};

/// How an honest client fares while `crowd` goes on: everything is answered, and fast.
fn honest_client_is_served(entry: SocketAddr, crowd: &mut [TcpStream], byte: Option<u8>) {
    let (mut client, mut times) = (Client::to(entry).unwrap(), Vec::new());
    for number in 0..sized(300, 2_000) {
        if number % 100 == 0
            && let Some(byte) = byte
        {
            for slow in &mut *crowd {
                let _ = slow.write_all(&[byte]); // one that was given up is no matter
            }
        }
        let begun = Instant::now();
        let answer = client.ask("POST", "/echo", "", b"hello").unwrap();
        times.push(begun.elapsed());
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    eprintln!("p99 of an honest client: {p99:?}");
    if is_long() && !cfg!(debug_assertions) {
        assert!(p99 < Duration::from_millis(100), "p99 {p99:?}");
    }
}

fn crowd(entry: SocketAddr, begins: &str) -> Vec<TcpStream> {
    let open = |_| {
        let mut slow = TcpStream::connect(entry).unwrap();
        slow.write_all(begins.as_bytes()).unwrap();
        slow
    };
    (0..500).map(open).collect()
}

fn two() -> (Stage, [Instance; 2]) {
    let instances = ["1", "2"].map(Instance::start);
    (Stage::of("http", &instances.each_ref().map(|instance| instance.address)), instances)
}

#[test]
fn five_hundred_slow_heads_do_not_disturb_an_honest_client() {
    let _turn = alone();
    let (stage, _instances) = two();
    let mut slow = crowd(stage.entry, "GET / HTTP/1.1\r\nhost: we");
    honest_client_is_served(stage.entry, &mut slow, Some(b'b'));
    // A head that is never whole is given up.
    let mut first = slow.swap_remove(0);
    first.set_read_timeout(Some(SOON)).unwrap();
    assert!(matches!(first.read(&mut [0; 1]), Ok(0) | Err(_)), "it is over");
}

#[test]
fn five_hundred_slow_bodies_do_not_disturb_an_honest_client() {
    let _turn = alone();
    let (stage, _instances) = two();
    let head = "POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: 1000000\r\n\r\nbeginning";
    let mut slow = crowd(stage.entry, head);
    honest_client_is_served(stage.entry, &mut slow, Some(b'b'));
}

#[test]
fn five_hundred_slow_readers_do_not_disturb_an_honest_client() {
    let _turn = alone();
    let (stage, _instances) = two();
    let mut slow = crowd(stage.entry, "GET /large?10000000 HTTP/1.1\r\nhost: web\r\n\r\n");
    honest_client_is_served(stage.entry, &mut slow, None);
}

#[test]
fn resting_connections_cost_10_kb_each_and_give_all_of_it_back() {
    let _turn = alone();
    // What is asserted of memory is what release builds cost; a debug build shows that it ends.
    let (count, each_max) = match (cfg!(debug_assertions), is_long()) {
        (false, true) => (10_000, 10_000),
        (false, false) => (2_000, 12_000),
        (true, _) => (1_000, 40_000),
    };
    if !raise_file_limit(count + 2_000) {
        return skip("this machine does not let us open so many files");
    }
    let (stage, _instances) = two();
    let baseline = |stage: &Stage| {
        for _ in 0..200 {
            assert_eq!(stage.client().get("/").unwrap().status, 200);
        }
        eventually("all before is closed", SOON, || {
            let descriptors = stage.a().descriptors();
            check(descriptors < 100, descriptors)
        });
        (stage.a().memory(), stage.a().descriptors())
    };
    let (memory, descriptors) = baseline(&stage);
    let ask = |client: &mut Client| assert_eq!(client.get("/").unwrap().status, 200);
    let mut clients = Vec::new();
    for _ in 0..count {
        let mut client = stage.client();
        ask(&mut client);
        clients.push(client);
    }
    let mut each = 0;
    eventually("they rest in little memory", SOON, || {
        each = stage.a().memory().saturating_sub(memory) / count;
        check(each <= each_max, each)
    });
    eprintln!("{each} bytes for each of {count} connections that rest");
    clients.iter_mut().step_by(97).for_each(ask); // and are served when they go on
    drop(clients);
    eventually("every descriptor is given back", SOON, || {
        let now = stage.a().descriptors();
        check(now <= descriptors + 4, (now, descriptors))
    });
}
