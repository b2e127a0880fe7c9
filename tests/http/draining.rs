//! An agent that stops: what has begun ends, and nobody is cut.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;

use super::client::Client;
use super::instance::Instance;
use super::{Stage, stage};
use crate::support::{SOON, TestMesh, beside_others, check, eventually};

#[test]
fn agent_of_callers_ends_resting_connections_lets_exchanges_end_and_cuts_nobody() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut resting: Vec<_> = (0..3).map(|_| stage.client()).collect();
    for client in &mut resting {
        assert_eq!(client.get("/").unwrap().status, 200);
    }
    // Longer than it takes until a connection that rests is parked.
    let mut streaming = stage.client();
    streaming.say("GET /events?150 HTTP/1.1\r\nhost: web\r\n\r\n").unwrap();
    let mut fresh = stage.client();
    for _ in 0..120 {
        while !streaming.line().unwrap().starts_with("data: ") {}
    }
    assert_eq!(fresh.get("/").unwrap().status, 200);
    let mut asking = stage.client();
    asking.say("GET /events?50 HTTP/1.1\r\nhost: web\r\n\r\n").unwrap();
    assert!(asking.line().unwrap().ends_with("200 OK"));
    stage.a().signal(Signal::TERM);
    for client in resting.iter_mut().chain([&mut fresh]) {
        assert_eq!(client.rest().unwrap(), b"", "an end and no cut");
    }
    let rest = String::from_utf8(streaming.rest().unwrap()).unwrap();
    assert_eq!(rest.matches("data: ").count(), 30);
    assert!(rest.ends_with("\r\n0\r\n\r\n"), "whole: {rest}");
    assert!(String::from_utf8(asking.rest().unwrap()).unwrap().ends_with("\r\n0\r\n\r\n"));
    assert_eq!(stage.a().wait_end(SOON).code(), Some(0));
}

#[test]
fn agent_of_instances_stops_without_one_failed_request() {
    let _turn = beside_others();
    let instances = ["b", "c"].map(Instance::start);
    let mesh = TestMesh::of(&["a", "b", "c"]);
    for (name, instance) in ["b", "c"].iter().zip(&instances) {
        let address = instance.address.to_string();
        mesh.agent(name).run(&["expose", "web", &address, "--protocol", "http"]).ok();
    }
    mesh.agent("a").wait_endpoints("web", 2);
    let entry = mesh.agent("a").upstream("web");
    let is_over = AtomicBool::new(false);
    let served = std::thread::scope(|scope| {
        let is_over = &is_over;
        let call = move |caller: usize| {
            let (mut client, mut served) = (Client::to(entry).unwrap(), 0);
            while !is_over.load(Ordering::Relaxed) {
                let id = format!("x-id: {caller}-{served}\r\n");
                let answer = client.ask("POST", "/", &id, b"pay 100").unwrap();
                assert_eq!(answer.status, 200, "{served}: {answer:?}");
                served += 1;
            }
            served
        };
        let callers: Vec<_> = (0..4).map(|caller| scope.spawn(move || call(caller))).collect();
        eventually("both serve", SOON, || {
            let seen = [instances[0].seen.requests(), instances[1].seen.requests()];
            check(seen.iter().all(|requests| *requests > 50), seen)
        });
        mesh.agent("b").signal(Signal::TERM);
        let status = mesh.agent("b").wait_end(SOON);
        let at_the_end = instances[1].seen.requests();
        eventually("the other goes on", SOON, || {
            let requests = instances[1].seen.requests();
            check(requests > at_the_end + 50, requests)
        });
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(status.code(), Some(0));
        callers.into_iter().map(|caller| caller.join().unwrap()).sum::<usize>()
    });
    for instance in &instances {
        assert!(instance.seen.deliveries().values().all(|count| *count == 1));
    }
    let delivered: usize = instances.iter().map(|one| one.seen.deliveries().len()).sum();
    assert_eq!(delivered, served);
}

#[test]
fn agent_stops_although_its_instance_never_closes_a_connection_that_rested() {
    let _turn = beside_others();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut for_ever = Vec::new();
        for mut stream in listener.incoming().flatten() {
            // Whoever only looks whether somebody is here says nothing.
            if stream.read(&mut [0; 4096]).is_ok_and(|len| len > 0) {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
            for_ever.push(stream);
        }
    });
    let stage = Stage::of("http", &[address]);
    assert_eq!(stage.client().get("/").unwrap().status, 200);
    stage.b().signal(Signal::TERM);
    assert_eq!(stage.b().wait_end(SOON).code(), Some(0), "it waited for nobody, and cut nobody");
}
