//! Breakers alone and shared: how many calls fail, who is ejected, and how they come back.

mod model;

use std::time::Duration;

use model::{Answer, Kind, Run, Setting, Way, run};

const START: f64 = 10.0;

fn when(is_ill: bool, answer: Answer) -> Answer {
    if is_ill { answer } else { Answer::WELL }
}

fn dies(instance: usize, at: Duration, _: usize) -> Answer {
    when(instance == 0 && at.as_secs_f64() >= START, Answer::DEAD)
}
fn grey30(instance: usize, at: Duration, _: usize) -> Answer {
    when(instance == 0 && at.as_secs_f64() >= START, Answer::grey(0.3))
}
fn grey50(instance: usize, at: Duration, _: usize) -> Answer {
    when(instance == 0 && at.as_secs_f64() >= START, Answer::grey(0.5))
}
fn slow(instance: usize, at: Duration, _: usize) -> Answer {
    let slow = Answer { latency: Duration::from_millis(505), ..Answer::WELL };
    when(instance == 0 && at.as_secs_f64() >= START, slow)
}
fn flapping(instance: usize, at: Duration, _: usize) -> Answer {
    let at = at.as_secs_f64();
    when(instance == 0 && at >= START && (at / 5.0) as u64 % 2 == 0, Answer::DEAD)
}
fn well(_: usize, _: Duration, _: usize) -> Answer { Answer::WELL }
fn noisy(_: usize, _: Duration, _: usize) -> Answer { Answer::grey(0.01) }
fn noisy5(_: usize, _: Duration, _: usize) -> Answer { Answer::grey(0.05) }
fn dependency(_: usize, at: Duration, _: usize) -> Answer {
    when((10.0..40.0).contains(&at.as_secs_f64()), Answer::DEAD)
}
fn recovers(instance: usize, at: Duration, _: usize) -> Answer {
    when(instance == 0 && (10.0..25.0).contains(&at.as_secs_f64()), Answer::DEAD)
}
fn zone(instance: usize, at: Duration, _: usize) -> Answer {
    when(instance < 4 && at.as_secs_f64() >= START, Answer::DEAD)
}
/// Each takes 40 a second and fails the rest.
fn overload(_: usize, at: Duration, load: usize) -> Answer {
    let extra = if (10.0..30.0).contains(&at.as_secs_f64()) { 2.0 } else { 1.0 };
    let load = load as f64 * extra;
    Answer::grey((1.0 - 40.0 / load.max(40.0)).max(0.0))
}

#[test]
fn explore() {
    let kinds = |special: &[Kind], n: usize| { let mut v = vec![Kind::Honest; n]; v[..special.len()].copy_from_slice(special); v };
    let with = |answer, callers| { let mut s = Setting::new(answer); s.callers = callers; s };
    let settings: Vec<(&str, Setting)> = vec![
        ("dies", Setting::new(dies)), ("grey30", Setting::new(grey30)), ("grey50", Setting::new(grey50)),
        ("slow", Setting::new(slow)), ("flapping", Setting::new(flapping)),
        ("noisy 1%", Setting::new(noisy)), ("noisy 5%", Setting::new(noisy5)),
        ("broken caller", with(well, kinds(&[Kind::Broken], 50))),
        ("1 liar", with(well, kinds(&[Kind::Liar{accused:1}], 20))),
        ("1 liar all", with(well, kinds(&[Kind::Liar{accused:10}], 20))),
        ("1 liar noisy", with(noisy, kinds(&[Kind::Liar{accused:1}], 20))),
        ("3 liars", with(well, kinds(&[Kind::Liar{accused:1};3], 20))),
        ("3 liars all", with(well, kinds(&[Kind::Liar{accused:10};3], 20))),
        ("3 liars noisy", with(noisy, kinds(&[Kind::Liar{accused:1};3], 20))),
        ("dependency", Setting::new(dependency)), ("recovers", Setting::new(recovers)), ("zone", Setting::new(zone)), ("overload", Setting::new(overload)),
    ];
    for (name, mut s) in settings {
        let ms = |name: &str, or: u64| Duration::from_millis(std::env::var(name).ok().and_then(|t| t.parse().ok()).unwrap_or(or));
        s.news = (ms("NEWS_MIN", 100), ms("NEWS_MAX", 700));
        s.shared.rebuttal = ms("REBUTTAL", 2000);
        s.shared.samples_max = ms("CAP", 3).as_millis() as u16;
        let s = &s;
        if std::env::var("ONLY").is_ok_and(|only| !name.contains(&only)) { continue }
        if std::env::var("MANY").is_ok() {
            let all: Vec<_> = (1..=20).map(|seed| { let r = run(s, Way::Shared, seed); (r.failed, r.ejected.len(), r.reports, r.failed_in(45.0,60.0)) }).collect();
            println!("{name:13} shared  many: {all:?}");
            continue;
        }
        for way in Way::ALL.into_iter().take(std::env::var("WAYS").map_or(3, |n| n.parse().unwrap())) {
            let r = run(s, way, 1);
            println!("{name:13} {:10}: calls {} failed {:5} honest {:5} after3s {:5} after45 {:5} opened {:4} reports {} ejected {} quorum {:?} first {:?} last {:?}", way.as_str(), r.calls, r.failed, r.honest_failed, r.failed_in(13.0, 60.0), r.failed_in(45.0, 60.0), r.opened, r.reports, r.ejected.len(), r.quorum_at.get(&0), r.ejected.first(), r.ejected.iter().max());
            if std::env::var("DETAIL").is_ok() {
            println!("   per s: {:?}", (9..60).map(|t| r.reached_in(0, t as f64, t as f64+1.0)).collect::<Vec<_>>());
            println!("   failed per s: {:?}", (9..60).map(|t| r.failed_in(t as f64, t as f64+1.0)).collect::<Vec<_>>());
            println!("   probes: {:?}", r.probes[0]);
            println!("   ej: {:?}", r.ejected);
            }
        }
    }
}
