//! Many faults at once, one after the other, as a seed has it, with calls all the time.

use std::time::Duration;

use murmesh::MemberPhase;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::fleet::Fleet;
use super::machine::Weather;
use crate::figures::{Times, with_seeds};

const NODES: usize = 6;
const FAULTS: usize = 14;

/// A fleet that things happen to.
struct Walk<'a> {
    fleet: Fleet<'a>,
    rng: StdRng,
    weather: Weather,
}

impl Walk<'_> {
    fn new(seed: u64) -> Self {
        let fleet = Fleet::whole(seed, NODES);
        let (rng, weather) = (StdRng::seed_from_u64(seed ^ 0x57a1), Weather::FAIR);
        Self { fleet, rng, weather }
    }

    fn any(&mut self) -> usize {
        self.rng.random_range(0..NODES)
    }

    fn running(&self) -> Vec<usize> {
        (0..NODES).filter(|&index| self.fleet.is_running(index)).collect()
    }

    /// For whoever reads a failure.
    fn note(&self, what: &str) {
        println!("  {:7.2} {what}", self.fleet.sim.elapsed().as_secs_f64());
    }

    /// One thing happens, unless it cannot. Tells whether it has.
    fn befall(&mut self) -> bool {
        let (one, other) = (self.any(), self.any());
        let is_running = self.fleet.is_running(one);
        let can_lose = self.running().len() > 2;
        match self.rng.random_range(0..16) {
            0 | 1 if is_running && can_lose => {
                self.note(&format!("kill {one}"));
                self.fleet.kill(one);
            }
            2 if is_running && can_lose => {
                self.note(&format!("stop {one} in order"));
                self.fleet.stop(one, MemberPhase::Restarting);
            }
            0..=3 if !is_running => {
                self.note(&format!("start {one}"));
                self.fleet.start(one);
            }
            4 if !is_running => {
                self.note(&format!("start {one} elsewhere, its clock ahead by ten minutes"));
                self.fleet.set_clock_ahead(one, 600);
                self.fleet.start_elsewhere(one);
            }
            5 if one != other => {
                self.note(&format!("cut {one} - {other}"));
                self.fleet.cut_link(one, other);
            }
            6 if one != other => {
                self.note(&format!("cut {one} > {other}"));
                self.fleet.cut_way(one, other);
            }
            7 => {
                let island: Vec<_> = (0..NODES).filter(|_| self.rng.random_bool(0.4)).collect();
                self.note(&format!("cut off {island:?}"));
                self.fleet.cut(&island);
            }
            8 | 9 => {
                self.note("heal all links");
                self.fleet.heal_all();
            }
            10 => {
                let lost = self.rng.random_range(0.0..0.25);
                self.weather = Weather { lost, doubled: 0.1, damaged: 0.05, ..self.weather };
                self.note(&format!("{:?}", self.weather));
                self.fleet.set_weather(self.weather);
            }
            11 => {
                self.weather = Weather { len_max: 1_252, ..Weather::FAIR };
                self.note("a narrow path");
                self.fleet.set_weather(self.weather);
            }
            12 => {
                let latency = Duration::from_millis(self.rng.random_range(1..150));
                self.note(&format!("slow {one}: {latency:?}"));
                self.fleet.slow(one, latency);
            }
            13 if is_running && one > 0 => {
                self.note(&format!("kill application {one}"));
                self.fleet.kill_application(one);
            }
            14 if is_running && one > 0 => {
                self.note(&format!("start application {one}"));
                self.fleet.start_application(one);
            }
            15 if is_running && one > 0 => {
                self.note(&format!("drain {one}"));
                self.fleet.drain(one);
            }
            _ => return false,
        }
        true
    }

    /// Calls of all sizes from everybody.
    fn go_on(&mut self) {
        let pause = Duration::from_millis(100);
        for _ in 0..self.rng.random_range(5..60) {
            for from in self.running() {
                let len = match self.rng.random_range(0..40) {
                    0 => 1_000_000,
                    1..=4 => 50_000,
                    _ => 500,
                };
                self.fleet.call(from, len);
            }
            self.fleet.run_for(pause);
        }
    }

    fn heal(&mut self) {
        self.note("heal everything");
        self.fleet.heal_all();
        self.fleet.set_weather(Weather::FAIR);
        for index in 0..NODES {
            self.fleet.slow(index, Duration::from_millis(1));
            if !self.fleet.is_running(index) {
                self.fleet.start(index);
            }
            if index > 0 {
                self.fleet.start_application(index);
                self.fleet.end_drain(index);
            }
        }
    }
}

#[test]
fn after_any_walk_of_faults_all_is_whole() {
    let name = "after_any_walk_of_faults_all_is_whole";
    let whole: Times = with_seeds(name, |seed| {
        println!("{name}: seed {seed}");
        let mut walk = Walk::new(seed);
        for _ in 0..FAULTS {
            while !walk.befall() {}
            walk.go_on();
        }
        walk.heal();
        let fleet = &mut walk.fleet;
        let whole = fleet.until("all see all", Duration::from_secs(60), Fleet::is_whole);
        // Who was ejected for long is tried once a minute, by a call.
        for _ in 0..70 {
            (0..NODES).for_each(|from| fleet.call(from, 500));
            fleet.run_for(Duration::from_secs(1));
        }
        let (_, cut) = fleet.settle_calls();
        let before: Vec<_> = (0..NODES).map(|index| fleet.delivered_at(index)).collect();
        for _ in 0..60 {
            (0..NODES).for_each(|from| fleet.call(from, 1_000));
            fleet.run_for(Duration::from_millis(50));
        }
        let (well, cut_later) = fleet.settle_calls();
        assert_eq!(cut_later, cut, "a call failed in a mesh that is whole");
        let after: Vec<_> = (0..NODES).map(|index| fleet.delivered_at(index)).collect();
        let used = (1..NODES).all(|index| after[index] > before[index]);
        assert!(used, "an instance gets no calls: {before:?} before, {after:?} now");
        let missed = fleet.missed_max();
        println!("{name}: seed {seed}: whole {whole:?}, {well} well, {cut} cut, missed {missed:?}");
        whole
    })
    .into_iter()
    .collect();
    println!("{name}: {whole} after the last fault");
}
