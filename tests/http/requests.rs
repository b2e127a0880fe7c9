//! Requests and answers of every shape that HTTP/1.1 has, unharmed across two agents.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::instance::{Instance, sum};
use super::{H2, H2_CLIENT, Stage, curl, run_curl, run_python, stage};
use crate::support::{SOON, beside_others, check, eventually, python, until};

#[test]
fn bodies_of_known_length_and_chunked_arrive_whole_both_ways() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    for len in [1, 1_000, 70_000, 3_000_000] {
        let body = vec![b'b'; len];
        let known = client.ask("POST", "/echo", "", &body).unwrap();
        assert_eq!(known.text().trim(), format!("{len} {}", sum(&body)));
        let head = "POST /echo HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n";
        client.say(head).unwrap();
        for chunk in body.chunks(len.div_ceil(3)) {
            client.say(format!("{:x}\r\n", chunk.len())).unwrap();
            client.say([chunk, b"\r\n"].concat()).unwrap();
        }
        client.say("0\r\n\r\n").unwrap();
        let chunked = client.hear(true).unwrap();
        assert_eq!((chunked.status, chunked.text()), (200, known.text()), "{len} bytes");
        let down = client.get(&format!("/large?{len}")).unwrap();
        assert_eq!(down.body.len(), len);
    }
}

#[test]
fn answers_without_a_body_keep_their_fields_and_their_connection() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let mut client = stage.client();
    for _ in 0..3 {
        assert_eq!(client.get("/nothing").unwrap().status, 204);
        let unchanged = client.get("/unchanged").unwrap();
        assert_eq!((unchanged.status, unchanged.header("etag")), (304, Some("\"1\"")));
        let measured = client.ask("HEAD", "/measure", "", b"").unwrap();
        assert_eq!(measured.header("content-length"), Some("12345"), "{measured:?}");
        assert_eq!(client.get("/headers?0").unwrap().header("content-length"), Some("0"));
        assert_eq!(client.get("/").unwrap().text(), "web");
    }
    assert_eq!(instance.seen.connections(), 1, "one connection to the instance served all");
    assert_eq!((stage.exchanges("success"), stage.exchanges("failure")), (15.0, 0.0));
}

#[test]
fn connection_to_the_instance_is_kept_between_clients_of_all_shapes_of_answers() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    for path in ["/", "/trailers", "/large?100000", "/echo", "/nothing"] {
        for _ in 0..4 {
            let answer = stage.client().get(path).unwrap();
            assert!(answer.status < 300, "{answer:?}");
        }
    }
    assert_eq!(instance.seen.connections(), 1);
    assert_eq!(stage.exchanges("failure"), 0.0);
}

#[test]
fn interim_answer_comes_before_the_body_is_sent() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    client
        .say(
            "POST /echo HTTP/1.1\r\nhost: web\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
        )
        .unwrap();
    assert_eq!(client.hear_one(true).unwrap().status, 100);
    client.say("hello").unwrap();
    assert!(client.hear(true).unwrap().text().starts_with("5 "));
    let Some(curl) = curl() else { return };
    let url = format!("http://{}/echo", stage.entry);
    let ran = run_curl(&curl, &["-H", "Expect: 100-continue", "-d", "hello", "-i", &url]).ok();
    assert!(ran.starts_with("HTTP/1.1 100 Continue"), "{ran}");
    assert!(ran.contains("\r\n\r\n5 "), "{ran}");
}

#[test]
fn trailers_travel_both_ways() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    client.say("GET /trailers HTTP/1.1\r\nhost: web\r\nte: trailers\r\n\r\n").unwrap();
    let answer = client.hear(true).unwrap();
    assert_eq!((answer.text().as_str(), answer.trailers.as_str()), ("hello", "x-sum: 42"));
    client
        .say(
            "POST /echo HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\
             \r\n5\r\nhello\r\n0\r\nx-sum: 43\r\n\r\n",
        )
        .unwrap();
    let answer = client.hear(true).unwrap();
    assert!(answer.text().ends_with("x-sum: 43"), "{}", answer.text());
}

#[test]
fn http_1_0_is_answered_and_ended_unless_it_asks_to_go_on() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    client.say("GET /trailers HTTP/1.0\r\n\r\n").unwrap();
    let answer = client.hear(true).unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "hello"), "no chunks for it");
    assert_eq!(client.rest().unwrap(), b"", "and its end");
    let mut client = stage.client();
    for _ in 0..2 {
        client.say("GET / HTTP/1.0\r\nhost: web\r\nconnection: keep-alive\r\n\r\n").unwrap();
        assert_eq!(client.hear(true).unwrap().text(), "web");
    }
}

#[test]
fn close_is_said_and_done_by_whoever_asks_for_it() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let mut client = stage.client();
    let answer = client.ask("GET", "/", "connection: close\r\n", b"").unwrap();
    assert_eq!((answer.text().as_str(), answer.header("connection")), ("web", Some("close")));
    assert_eq!(client.rest().unwrap(), b"");
    // The instance's own wish is between it and the agents: the client's connection goes on.
    let mut client = stage.client();
    for _ in 0..3 {
        assert_eq!(client.get("/last").unwrap().text(), "web");
        assert_eq!(client.get("/until-end").unwrap().text(), "all of it");
    }
    assert!(instance.seen.connections() >= 6);
}

#[test]
fn requests_sent_at_once_are_answered_in_their_order() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    let mut said = String::new();
    for number in 0..50 {
        let body = "x".repeat(number + 1);
        said += &format!(
            "POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: {}\r\n\r\n{body}",
            number + 1
        );
        said += "GET /trailers HTTP/1.1\r\nhost: web\r\n\r\n";
    }
    client.say(said).unwrap();
    for number in 0..50 {
        let echo = client.hear(true).unwrap().text();
        assert!(echo.starts_with(&format!("{} ", number + 1)), "{number}: {echo}");
        assert_eq!(client.hear(true).unwrap().text(), "hello");
    }
}

#[test]
fn request_sent_behind_a_long_answer_is_answered_however_long_that_takes() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let mut client = stage.client();
    // Longer than a connection may rest before it is parked.
    client.say("GET /events?200 HTTP/1.1\r\nhost: web\r\n\r\n").unwrap();
    client.line().unwrap();
    client
        .say("GET /echo HTTP/1.1\r\nhost: web\r\n\r\nGET / HTTP/1.1\r\nhost: web\r\n\r\n")
        .unwrap();
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"web") {
        bytes.extend(client.some().unwrap());
    }
    assert_eq!(String::from_utf8_lossy(&bytes).matches("data: ").count(), 200);
}

#[test]
fn early_no_is_heard_although_the_body_was_not_read() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    for number in 0..20 {
        let body = vec![0; 8_000_000];
        let path = if number % 2 == 0 { "/early" } else { "/early?1000000" };
        let answer = stage.client().ask("POST", path, "", &body).unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (413, "too large"));
    }
    let Some(curl) = curl() else { return };
    let big = stage.mesh.home.path().join("big");
    std::fs::write(&big, vec![0; 8_000_000]).unwrap();
    let (from, url) = (format!("@{}", big.display()), format!("http://{}/early", stage.entry));
    let ran = run_curl(&curl, &["--data-binary", &from, "-w", " %{http_code}", &url]);
    assert_eq!(ran.stdout, "too large 413", "{}", ran.stderr);
}

#[test]
fn heads_that_are_too_large_are_refused_cleanly_in_both_directions() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let large = format!("x-large: {}\r\n", "l".repeat(40_000));
    let answer = stage.client().ask("GET", "/", &large, b"").unwrap();
    assert_eq!(answer.status, 400, "{answer:?}");
    assert_eq!(answer.header("x-murmesh-reason"), Some("malformed"));
    let many: String = (0..150).map(|number| format!("x-{number}: 1\r\n")).collect();
    assert_eq!(stage.client().ask("GET", "/", &many, b"").unwrap().status, 400);
    let mut client = stage.client();
    assert_eq!(client.get("/headers?40").unwrap().status, 200, "40 KB are served");
    let answer = client.get("/headers?80").unwrap();
    assert_eq!(answer.status, 502, "80 KB are not: {answer:?}");
    assert_eq!(client.get("/").unwrap().status, 200, "and the client goes on");
}

#[test]
fn curl_speaks_either_version_to_a_service_of_http_1() {
    let _turn = beside_others();
    let Some(curl) = curl() else { return };
    let (stage, _instance) = stage();
    let url = |path: &str| format!("http://{}{path}", stage.entry);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let get = run_curl(&curl, &[version, "-w", " %{http_version}", &url("/")]).ok();
        assert!(get == "web 1.1" || get == "web 2", "{get}");
        assert!(run_curl(&curl, &[version, "-d", "hello", &url("/echo")]).ok().starts_with("5 "));
        let head = run_curl(&curl, &[version, "-I", &url("/measure")]).ok().to_lowercase();
        assert!(head.contains("content-length: 12345"), "{head}");
        let code = ["-o", "/dev/null", "-w", "%{http_code}"];
        let code = |path| run_curl(&curl, &[&[version][..], &code, &[&url(path)]].concat()).ok();
        assert_eq!((code("/nothing"), code("/unchanged")), ("204".into(), "304".into()));
        let cut = run_curl(&curl, &[version, &url("/cut-sized")]);
        assert!(matches!(cut.code, Some(18 | 56 | 92)), "{cut:?}");
    }
}

/// As `printf .. | socat` does it. The agent stands still until the end is there, too.
#[test]
fn request_that_comes_with_its_client_s_end_is_answered_whole_however_long_that_takes() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n");
    let post = "POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\n\r\npay".to_owned();
    let asked = |requests: &[String]| {
        let mut client = stage.client();
        stage.a().signal(Signal::STOP);
        client.say(requests.concat()).unwrap();
        client.end().unwrap();
        stage.a().signal(Signal::CONT);
        let answers: Vec<_> = requests.iter().map(|_| client.hear(true).unwrap()).collect();
        assert_eq!(client.rest().unwrap(), b"", "an end, and not a cut");
        answers.into_iter()
    };
    assert_eq!(asked(&[get("/late?600")]).next().unwrap().text(), "web");
    let events = asked(&[get("/events?30")]).next().unwrap();
    assert_eq!(events.text().matches("data: ").count(), 30);
    let large = asked(&[get("/large?8000000")]).next().unwrap();
    assert_eq!(large.body.len(), 8_000_000);
    let mut row = asked(&[post, get("/late?300"), get("/")]);
    assert!(row.next().unwrap().text().starts_with("3 "));
    assert_eq!([row.next().unwrap().text(), row.next().unwrap().text()], ["web", "web"]);
}

#[test]
fn client_that_goes_away_while_it_waits_or_hears_is_a_cut_at_the_instance_at_once() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let mut left = 0;
    for path in ["/wait", "/hold"] {
        for is_half in [false, true] {
            let mut client = stage.client();
            client.say(format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n")).unwrap();
            left += 1;
            eventually("the request is there", SOON, || {
                let requests = instance.seen.requests();
                check(requests == left, requests)
            });
            // Not with its request: that would be a client that asks nothing more, and waits.
            until(Instant::now() + Duration::from_millis(400));
            if is_half {
                client.end().unwrap();
                assert_eq!(client.rest().unwrap_err().kind(), ErrorKind::ConnectionReset);
            } else {
                drop(client);
            }
            eventually("the instance sees the end", SOON, || {
                let endings = instance.seen.endings();
                check(endings.len() as u64 == left, endings)
            });
        }
    }
    assert_eq!(instance.seen.endings(), ["cut"; 4]);
}

#[test]
fn answer_that_the_instance_cuts_is_a_cut_at_the_client() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    for path in ["/cut-sized", "/cut-chunked", "/cut-reset"] {
        let mut client = stage.client();
        match client.get(path) {
            // A reset may overtake the head: then no answer has begun.
            Ok(answer) => assert_eq!((path, answer.status), ("/cut-reset", 502)),
            Err(error) => {
                let kinds = [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
                assert!(kinds.contains(&error.kind()), "{path}: {error}");
            }
        }
    }
    assert_eq!(stage.client().get("/").unwrap().text(), "web", "the next is served");
    assert_eq!(stage.exchanges("success"), 1.0);
}

#[test]
fn instances_of_a_service_share_its_requests_evenly_however_few_clients_there_are() {
    let _turn = beside_others();
    let instances: Vec<_> = ["1", "2", "3", "4"].map(Instance::start).into();
    let addresses: Vec<_> = instances.iter().map(|instance| instance.address).collect();
    let mut stage = Stage::of("http", &addresses);
    stage.balance("least_request"); // by latency the slower ones would have less
    let shares = || -> Vec<_> { instances.iter().map(|one| one.seen.requests()).collect() };
    let mut client = stage.client();
    for _ in 0..4_000 {
        assert_eq!(client.get("/").unwrap().status, 200);
    }
    let of_one = shares();
    assert!(of_one.iter().all(|share| (900..=1_100).contains(share)), "{of_one:?}");
    let Some(python) = python(&[H2]) else { return };
    let entry = stage.entry.to_string();
    assert_eq!(run_python(&python, H2_CLIENT, &["many", &entry, "4000"]), "all\n");
    let of_two: Vec<_> = shares().iter().zip(of_one).map(|(all, before)| all - before).collect();
    assert!(of_two.iter().all(|share| (900..=1_100).contains(share)), "HTTP/2: {of_two:?}");
}

#[test]
fn client_of_http_2_hears_an_early_no_and_sees_cuts_and_its_own_cut_is_one_at_the_instance() {
    let _turn = beside_others();
    let Some(python) = python(&[H2]) else { return };
    let (stage, instance) = stage();
    let entry = stage.entry.to_string();
    let call = |what| run_python(&python, H2_CLIENT, &[what, &entry]);
    assert_eq!(call("early"), "413 too large\n");
    assert_eq!(call("refused"), "400\n200 web\n400 |\n[]\n", "a refusal that no reset follows");
    assert_eq!(call("cut"), "None\n");
    assert_eq!(call("cancel"), "200 web\n200 web\n");
    eventually("no connection is in use at the instance", SOON, || {
        let open = instance.seen.open();
        check(open <= 2, open)
    });
    let deliveries = instance.seen.deliveries();
    assert!(deliveries.is_empty(), "half an upload is none: {deliveries:?}");
}
