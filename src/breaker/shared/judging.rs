//! What this node makes of all words: from accused to ejected, and the way back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::{CASES_MAX, InstanceChange, SharedBreaker, SharedEvent, TICK, Weighed};
use crate::breaker::case::{Case, Stage};
use crate::breaker::grounds::{Bench, Scale};
use crate::breaker::report::{Report, Seen};
use crate::breaker::{Grounds, InstanceKey, SharedConfig, Turn, turn};
use crate::model::{MemberId, Moment, ServiceName};

/// By how much two members may differ on when a turn begins.
const TURN_SLACK: Duration = Duration::from_millis(250);

/// Instances that the word of a failing service names.
const FAILING_TOLD_MAX: usize = 16;

/// Words that are kept as evidence of each of them: such events are kept by the thousand.
const FAILING_TESTIMONY_MAX: usize = 4;

/// What becomes of a case.
enum Step {
    /// It is as it was.
    Stay,
    /// It is so now.
    To(Case),
    /// There is none any more.
    Over,
}

impl SharedBreaker {
    /// Weighs what is said of an instance. What others are judged by is what this left.
    fn weigh(&mut self, now: Moment, key: &InstanceKey) {
        let scale = self.scale(key, Bench::All);
        let ever =
            Scale { since: Moment::START, onset: None, ..scale }.weigh(now, key, self.words(key));
        if ever.accusers == 0 {
            self.weighed.remove(key);
        } else {
            let all = self.scale(key, Bench::All).weigh(now, key, self.words(key));
            let credible = self.scale(key, Bench::Credible).weigh(now, key, self.words(key));
            self.weighed.insert(key.clone(), Weighed { credible, all, ever });
        }
        let voices = self.voices.get(key).map_or(0, BTreeSet::len);
        self.words_weighed += voices as u64;
    }

    /// Whether something holds of what was said of an instance when it was last weighed.
    fn has(&self, key: &InstanceKey, holds: impl Fn(&Weighed, &SharedConfig) -> bool) -> bool {
        self.weighed.get(key).is_some_and(|weighed| holds(weighed, &self.config))
    }

    /// What all know. An own accusation that is not published would count here only, and nobody would
    /// object to it.
    pub(super) fn words(&self, key: &InstanceKey) -> impl Iterator<Item = (MemberId, &Report)> {
        let voices = self.voices.get(key).into_iter().flatten();
        let others =
            voices.filter_map(|member| self.reports.get(member).map(|report| (*member, report)));
        let is_accusing =
            |windows: &BTreeMap<InstanceKey, Seen>| windows.get(key).is_some_and(Seen::is_accusing);
        let is_public = !is_accusing(&self.own.windows) || is_accusing(&self.voice.said);
        others.chain(is_public.then_some((self.id, &self.own)))
    }

    fn scale(&self, key: &InstanceKey, bench: Bench) -> Scale<'_> {
        let service = self.service_of(key);
        let callers = service.map_or(0, |service| self.callers(service).len());
        let failed_until = service.and_then(|service| self.services.get(service)?.failed_until);
        let since = self.cases.get(key).map_or(Moment::START, Case::since);
        let since = failed_until.map_or(since, |at| at.max(since));
        let onset = self.cases.get(key).map(|case| case.onset).filter(|at| *at >= since);
        let counts_for = self.counts_for(key);
        Scale { config: &self.config, callers, since, counts_for, onset, bench }
    }

    /// How long a word on an instance counts: while its service fails as a whole as long as its caller
    /// does, so that it is seldom said again. Whoever calls with success takes it back, or objects.
    pub(super) fn counts_for(&self, key: &InstanceKey) -> Duration {
        match self.service_of(key).is_some_and(|service| self.is_failing(service)) {
            true => self.config.caller_for,
            false => self.config.window,
        }
    }

    /// What is held against an instance, word by word.
    fn told(
        &self,
        now: Moment,
        key: &InstanceKey,
        grounds: &Grounds,
        bench: Bench,
    ) -> Arc<Grounds> {
        let testimony = self.scale(key, bench).testimony(now, key, self.words(key));
        Arc::new(Grounds { testimony, ..grounds.clone() })
    }

    /// Looks again at one instance.
    pub(super) fn judge(&mut self, now: Moment, key: &InstanceKey) {
        let Some(service) = self.service_of(key).cloned() else { return };
        self.weigh(now, key);
        if !self.weighed.is_empty() {
            self.tick_at.get_or_insert(now + TICK);
        }
        let case = self.cases.get(key).cloned();
        let next = match &case {
            None => self.judge_new(now, key),
            Some(case) => match &case.stage {
                Stage::Accused { since } => self.judge_accused(now, key, &service, case, *since),
                Stage::Ejected { since, tried_at, grounds } => {
                    self.judge_ejected(now, key, case, [*since, *tried_at], grounds)
                }
                Stage::Returning { since, .. } => {
                    self.judge_returning(now, key, &service, case, *since)
                }
                Stage::Watched { since } => self.judge_watched(now, key, case, *since),
            },
        };
        match next {
            Step::Stay => return,
            Step::To(case) => self.cases.insert(key.clone(), case),
            Step::Over => self.cases.remove(key),
        };
        self.is_changed = true;
        self.tick_at.get_or_insert(now + TICK);
        self.weigh(now, key); // what counts may be another part of it
        self.judge_service(now, &service);
    }

    fn judge_new(&self, now: Moment, key: &InstanceKey) -> Step {
        match self.weighed.get(key).map(|said| &said.all) {
            Some(all) if all.has_quorum(&self.config) && self.cases.len() < CASES_MAX => {
                Step::To(Case::new(now, all.first_failure_at))
            }
            _ => Step::Stay,
        }
    }

    fn judge_accused(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        service: &ServiceName,
        case: &Case,
        since: Moment,
    ) -> Step {
        self.judge_service(now, service); // what was said while it failed as a whole counts nothing
        let Some(Weighed { all, credible, .. }) = self.weighed.get(key).cloned() else {
            return Step::Over;
        };
        if !all.has_quorum(&self.config) {
            return Step::Over;
        }
        if now.since(since) < self.rebuttal(&credible) {
            return Step::Stay;
        }
        let is_late = now.since(since) >= self.config.rebuttal_max;
        if self.is_well_here(key, case) || (is_late && !all.is_carried(&self.config)) {
            let grounds = self.told(now, key, &all, Bench::All);
            self.tell(key, InstanceChange::Acquitted(grounds));
            return Step::To(Case { stage: Stage::Watched { since: now }, ..case.clone() });
        }
        // To take it for load it takes a quorum, too: fewer shield nothing by saying that it is well.
        let is_load = credible.is_disputed() && self.has_company(service, key);
        let is_plain = credible.is_clear(&self.config) || !is_load;
        if !credible.is_carried(&self.config) || !is_plain || !self.may_eject(service, key) {
            return Step::Stay;
        }
        // All see the quorum at about the same time, and some believe it later than others: turns are
        // counted from what all share.
        Step::To(self.eject(now, since + self.config.rebuttal_min, key, case, &credible))
    }

    fn judge_ejected(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        case: &Case,
        [since, tried_at]: [Moment; 2],
        grounds: &Arc<Grounds>,
    ) -> Step {
        // Words of the time of the accusation may still come in.
        let is_open = now.since(since) < self.config.rebuttal_max;
        let again = self.weighed.get(key).map(|said| &said.credible).filter(|again| {
            is_open && again.has_quorum(&self.config) && !again.is_carried(&self.config)
        });
        if let Some(again) = again {
            let grounds = self.told(now, key, again, Bench::Credible);
            self.tell(key, InstanceChange::Restored(grounds));
            return Step::To(Case { stage: Stage::Watched { since: now }, ..case.clone() });
        }
        let probed_from = tried_at + case.period(&self.config) / 2;
        let said = || {
            let all = self.words(key).filter(|(_, report)| !report.condemns());
            all.filter_map(|(member, report)| Some((member, *report.windows.get(key)?)))
        };
        // By the word of whose turn has come, though its probe may end long after it: else who vouches for
        // what is ill would put it back each time, and one liar could keep it out for ever.
        let first_turn_at = tried_at + case.period(&self.config);
        let may_tell = |member, at: Moment| {
            if at + TURN_SLACK < first_turn_at || at < since {
                return false; // before anybody's turn: whose it was need not be worked out
            }
            let turn = self.turn_of(member, key, case, tried_at);
            turn.is_some_and(|turn| at + TURN_SLACK >= turn.from)
                || at >= self.anyone_at(case, tried_at)
        };
        // What has reached an own instance has passed its gate, whoever's turn others take it for.
        let is_back = |member, seen: &Seen| {
            seen.is_well_after(probed_from)
                && seen
                    .last_success_at
                    .is_some_and(|at| key.member == self.id || may_tell(member, at))
        };
        let well = said().find(|(by, seen)| is_back(*by, seen));
        if let Some((by, _)) = well {
            self.tell(key, InstanceChange::Returning(by));
            let stage = Stage::Returning { since: now, grounds: Arc::clone(grounds) };
            let (is_witness, failed_for) = (by == self.id, None);
            return Step::To(Case { stage, is_witness, failed_for, ..*case });
        }
        let mut failed = said().filter_map(|(by, seen)| Some((by, seen.last_failure_at?)));
        let Some((by, tried_at)) = failed.find(|(by, at)| may_tell(*by, *at)) else {
            return Step::Stay;
        };
        // And for a long pause it takes the word of another, who looks soon: one that lies delays little.
        let is_short = case.period(&self.config) * 2 <= self.config.period_doubted;
        let (relapses, failed_for) = match case.failed_for {
            None if !is_short && !self.is_alone(key) => (case.relapses, Some(by)),
            _ => (case.relapses + 1, None),
        };
        // As its caller tells it, and not as it was heard: nodes that hear it late agree on the next turns.
        let stage = Stage::Ejected { since, tried_at, grounds: Arc::clone(grounds) };
        Step::To(Case { stage, relapses, failed_for, ..*case })
    }

    /// From when on anyone may probe: all have let their turns pass.
    pub(super) fn anyone_at(&self, case: &Case, tried_at: Moment) -> Moment {
        tried_at + case.period(&self.config) + self.config.period_max
    }

    /// Whether nobody else calls what it serves.
    fn is_alone(&self, key: &InstanceKey) -> bool {
        self.service_of(key).is_none_or(|service| self.callers(service).len() < 2)
    }

    /// When it is a caller's turn to probe. The one for whom the last probe failed comes after all others
    /// have had some time: they may have stopped calling.
    pub(super) fn turn_of(
        &self,
        caller: MemberId,
        key: &InstanceKey,
        case: &Case,
        tried_at: Moment,
    ) -> Option<Turn> {
        let callers = self.callers(self.service_of(key)?);
        let place = turn::place(caller, key, case.round(), callers)?;
        let length = self.config.turn;
        let after_others = match case.failed_for == Some(caller) {
            true => self.config.period_doubted,
            false => length.saturating_mul(place),
        };
        Some(Turn {
            from: tried_at + case.period(&self.config) + after_others,
            length,
            every: length.saturating_mul(callers.len() as u32),
        })
    }

    fn judge_returning(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        service: &ServiceName,
        case: &Case,
        since: Moment,
    ) -> Step {
        // A tenth of the calls makes a tenth of the evidence: fewer failures have to do.
        let grounds = self.weighed.get(key).map(|said| said.credible.clone());
        let grounds = grounds.filter(|grounds| grounds.outweighs(&self.config));
        if let Some(grounds) = grounds
            && self.may_eject(service, key)
        {
            return Step::To(self.eject(now, now, key, case, &grounds));
        }
        if now.since(since) < self.config.ramp {
            return Step::Stay;
        }
        self.tell(key, InstanceChange::Returned);
        Step::To(Case { stage: Stage::Watched { since: now }, ..case.clone() })
    }

    fn judge_watched(&self, now: Moment, key: &InstanceKey, case: &Case, since: Moment) -> Step {
        let all = self.weighed.get(key).map(|said| &said.all);
        if let Some(all) = all.filter(|all| all.has_quorum(&self.config)) {
            let stage = Stage::Accused { since: now };
            return Step::To(Case { stage, onset: all.first_failure_at, ..case.clone() });
        }
        match now.since(since) < case.period(&self.config) {
            true => Step::Stay,
            false => Step::Over,
        }
    }

    fn eject(
        &mut self,
        now: Moment,
        tried_at: Moment,
        key: &InstanceKey,
        case: &Case,
        grounds: &Grounds,
    ) -> Case {
        let grounds = self.told(now, key, grounds, Bench::Credible);
        self.tell(key, InstanceChange::Ejected(Arc::clone(&grounds)));
        let stage = Stage::Ejected { since: now, tried_at, grounds };
        Case { stage, relapses: case.relapses + 1, failed_for: None, ..*case }
    }

    /// Whether this node's own calls have only succeeded since the first failure that was told: its
    /// own experience goes before what others say.
    fn is_well_here(&self, key: &InstanceKey, case: &Case) -> bool {
        let own = self.own.windows.get(key);
        own.is_some_and(|seen| seen.failures == 0 && seen.is_well_after(case.onset))
    }

    /// Whether another instance of the service is accused, too: where many calls succeed besides, that is
    /// rather load than the instance.
    fn has_company(&self, name: &ServiceName, key: &InstanceKey) -> bool {
        let Some(service) = self.services.get(name) else { return false };
        let mut others = service.instances.iter().filter(|other| *other != key);
        others.any(|other| self.has(other, |said, config| said.ever.has_quorum(config)))
    }

    /// Not the last one, and not while more than half are accused, be others heard or not: then it is
    /// rather the service.
    fn may_eject(&self, name: &ServiceName, key: &InstanceKey) -> bool {
        let Some(service) = self.services.get(name) else { return false };
        let is_left = |other: &&InstanceKey| {
            *other != key && !self.cases.get(*other).is_some_and(Case::is_ejected)
        };
        let is_accused =
            |key: &&InstanceKey| self.has(key, |said, config| said.all.outweighs(config));
        let accused = service.instances.iter().filter(is_accused).count();
        !service.is_failing
            && accused * 2 <= service.instances.len()
            && service.instances.iter().any(|other| is_left(&other))
    }

    /// Whether an accusation holds, whoever makes it, after the time to speak against it.
    fn is_condemned(&self, now: Moment, key: &InstanceKey) -> bool {
        let (Some(case), Some(said)) = (self.cases.get(key), self.weighed.get(key)) else {
            return false;
        };
        let is_heard = match case.stage {
            Stage::Accused { since } => now.since(since) >= self.rebuttal(&said.all),
            Stage::Ejected { .. } | Stage::Returning { .. } => true,
            Stage::Watched { .. } => false,
        };
        is_heard && said.all.is_carried(&self.config)
    }

    /// How long others have to speak against it.
    fn rebuttal(&self, grounds: &Grounds) -> Duration {
        match grounds.is_clear(&self.config) {
            true => self.config.rebuttal_min,
            false => self.config.rebuttal_max,
        }
    }

    /// Looks again at a service as a whole.
    pub(super) fn judge_service(&mut self, now: Moment, name: &ServiceName) {
        let Some(service) = self.services.get(name) else { return };
        let accused = || service.instances.iter().filter(|key| self.is_condemned(now, key));
        let count = service.instances.len();
        let is_failing = accused().count() * 2 > count;
        let has_turned = service.is_failing != is_failing;
        let grounds: Vec<_> = match is_failing && has_turned {
            true => accused()
                .take(FAILING_TOLD_MAX)
                .filter_map(|key| {
                    let all = &self.weighed.get(key)?.all;
                    let mut told = self.told(now, key, all, Bench::All);
                    Arc::make_mut(&mut told).testimony.truncate(FAILING_TESTIMONY_MAX);
                    Some((key.clone(), told))
                })
                .collect(),
            false => Vec::new(),
        };
        let ejected = service
            .instances
            .iter()
            .filter(|key| self.cases.get(*key).is_some_and(Case::is_ejected));
        let share = ejected.count() as f32 / count.max(1) as f32;
        let (enter, leave) = self.config.panic;
        let panic_since = match service.panic_since {
            None => (share > enter).then_some(now),
            Some(since) if share <= leave && now.since(since) >= self.config.panic_hold => None,
            since => since,
        };
        let Some(service) = self.services.get_mut(name) else { return };
        if has_turned {
            let service = name.clone();
            self.events.push_back(SharedEvent::Failing { service, is_failing, grounds });
            self.is_changed = true;
        }
        if service.panic_since.is_some() != panic_since.is_some() {
            let is_panic = panic_since.is_some();
            self.events.push_back(SharedEvent::Panic { service: name.clone(), is_panic });
            self.is_changed = true;
        }
        service.is_failing = is_failing;
        service.panic_since = panic_since;
        if has_turned && !is_failing {
            service.failed_until = Some(now);
            for key in service.instances.clone() {
                self.weigh(now, &key);
            }
        }
    }
}
