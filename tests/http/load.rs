//! More than the instances can do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Stage;
use super::instance::{Instance, Manners};
use crate::support::{alone, raise_file_limit, runtime, sized, skip};

/// What was answered.
#[derive(Debug, Default)]
struct Answers {
    ok: AtomicU64,
    overflow: AtomicU64,
    other: AtomicU64,
}

impl Answers {
    fn of(&self) -> [u64; 3] {
        [&self.ok, &self.overflow, &self.other].map(|count| count.load(Ordering::Relaxed))
    }
}

/// One request on a connection of its own, counted.
async fn ask(entry: SocketAddr, answers: Arc<Answers>) {
    let mut answer = String::new();
    let exchange = async {
        let mut stream = TcpStream::connect(entry).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await?;
        stream.read_to_string(&mut answer).await
    };
    let outcome = exchange.await;
    let is_overflow = answer.contains("x-murmesh-reason: overflow");
    let counter = match (outcome, answer.get(9..12)) {
        (Ok(_), Some("200")) => &answers.ok,
        (Ok(_), Some("503")) if is_overflow => &answers.overflow,
        _ => &answers.other,
    };
    counter.fetch_add(1, Ordering::Relaxed);
}

/// So many requests a second for so long, whatever comes of them. Returns what came of those whose
/// answer is there in the end.
fn offer(entry: SocketAddr, rate: u64, length: Duration) -> (Arc<Answers>, u64) {
    let answers = Arc::<Answers>::default();
    let offered = runtime().block_on(async {
        let (mut ticks, mut offered) = (tokio::time::interval(Duration::from_millis(10)), 0);
        let begun = tokio::time::Instant::now();
        while begun.elapsed() < length {
            ticks.tick().await;
            while offered < rate * begun.elapsed().as_millis() as u64 / 1_000 {
                tokio::spawn(ask(entry, Arc::clone(&answers)));
                offered += 1;
            }
        }
        offered
    });
    (answers, offered)
}

#[test]
fn double_load_is_shed_with_a_word_and_the_rest_is_served_as_well_as_ever() {
    let _turn = alone();
    if !raise_file_limit(10_000) {
        return skip("this machine does not let us open so many files");
    }
    let (workers, work) = (4, Duration::from_millis(20));
    let manners = Manners { workers: Some(workers), work, rest_max: None };
    let instances = ["1", "2"].map(|name| Instance::with(name, manners));
    let stage = Stage::of("http", &instances.each_ref().map(|instance| instance.address));
    // A timer of the kernel is late by one millisecond or so.
    let capacity = 2 * workers as u64 * 1_000 / 22;
    let length = Duration::from_secs(sized(10, 20));
    let (during, offered) = offer(stage.entry, 2 * capacity, length);
    let [ok, overflow, other] = during.of();
    let goodput = ok as f64 / length.as_secs_f64() / capacity as f64;
    eprintln!("{offered} offered: {ok} answered, {overflow} shed, {other} other, {goodput:.2}");
    assert!(goodput >= 0.8, "{goodput}");
    assert!(overflow > 0, "nothing was shed");
    assert_eq!(other, 0, "each that was answered was served or shed");
    // Half of what they can do from now on: in five seconds they have caught up.
    offer(stage.entry, capacity / 2, Duration::from_secs(5));
    let (after, offered) = offer(stage.entry, capacity / 2, Duration::from_secs(3));
    crate::support::eventually("all of it is answered", crate::support::SOON, || {
        let [ok, overflow, other] = after.of();
        let rest = offered - ok - overflow - other;
        crate::support::check(rest == 0, (offered, ok, overflow, other))
    });
    assert_eq!(after.of(), [offered, 0, 0]);
}
