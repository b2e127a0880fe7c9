//! What this node makes of all words: from accused to ejected, and the way back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{CASES_MAX, InstanceChange, SharedBreaker, SharedEvent, TICK};
use crate::breaker::case::{Case, Stage};
use crate::breaker::grounds::{Bench, Scale};
use crate::breaker::report::{Report, Seen};
use crate::breaker::{Grounds, InstanceKey, Turn, turn};
use crate::model::{MemberId, Moment, ServiceName};

/// By how much two members' clocks of a turn differ, and how long a call in it may take.
const TURN_SLACK: Duration = Duration::from_millis(250);

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
    /// Weighs what is said of an instance.
    pub(super) fn weigh(&self, now: Moment, key: &InstanceKey, bench: Bench) -> Grounds {
        self.scale(key, bench).weigh(now, key, self.words(key))
    }

    /// The same of all who speak, and of all that they say.
    pub(super) fn weigh_anew(&self, now: Moment, key: &InstanceKey) -> Grounds {
        let scale = Scale { since: Moment::START, onset: None, ..self.scale(key, Bench::All) };
        scale.weigh(now, key, self.words(key))
    }

    /// What all know. An own accusation that is not published would count here only, and nobody would
    /// object to it.
    fn words(&self, key: &InstanceKey) -> impl Iterator<Item = (MemberId, &Report)> {
        let others = self.reports.iter().map(|(member, report)| (*member, report));
        let is_accusing =
            |windows: &BTreeMap<InstanceKey, Seen>| windows.get(key).is_some_and(Seen::is_accusing);
        let is_public = !is_accusing(&self.own.windows) || is_accusing(&self.voice.said);
        others.chain(is_public.then_some((self.id, &self.own)))
    }

    fn scale(&self, key: &InstanceKey, bench: Bench) -> Scale<'_> {
        let service = self.service_of(key);
        let callers = service.map_or(0, |service| self.callers(service).len());
        let failed_until = service.and_then(|service| self.services.get(service)?.failed_until);
        let case = self.cases.get(key);
        let since = case.map_or(Moment::START, Case::since);
        let since = failed_until.map_or(since, |at| at.max(since));
        let onset = case.map(|case| case.onset).filter(|at| *at >= since);
        Scale { config: &self.config, callers, since, onset, bench }
    }

    /// Looks again at one instance.
    pub(super) fn judge(&mut self, now: Moment, key: &InstanceKey) {
        let Some(service) = self.service_of(key).cloned() else { return };
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
        self.judge_service(now, &service);
    }

    fn judge_new(&self, now: Moment, key: &InstanceKey) -> Step {
        let all = self.weigh(now, key, Bench::All);
        if !all.has_quorum(&self.config) || self.cases.len() >= CASES_MAX {
            return Step::Stay;
        }
        Step::To(Case::new(now, all.first_failure_at))
    }

    fn judge_accused(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        service: &ServiceName,
        case: &Case,
        since: Moment,
    ) -> Step {
        let all = self.weigh(now, key, Bench::All);
        if !all.has_quorum(&self.config) {
            return Step::Over;
        }
        self.judge_service(now, service); // what was said while it failed as a whole counts nothing
        let grounds = self.weigh(now, key, Bench::Credible);
        if now.since(since) < self.rebuttal(&grounds) {
            return Step::Stay;
        }
        let is_late = now.since(since) >= self.config.rebuttal_max;
        if self.is_well_here(key, case) || (is_late && !all.is_carried(&self.config)) {
            self.tell(key, InstanceChange::Acquitted);
            return Step::To(Case { stage: Stage::Watched { since: now }, ..case.clone() });
        }
        let is_plain = grounds.is_clear(&self.config) || !self.has_company(now, service, key);
        if !grounds.is_carried(&self.config) || !is_plain || !self.may_eject(now, service, key) {
            return Step::Stay;
        }
        Step::To(self.eject(now, key, case, grounds))
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
        let again = self.weigh(now, key, Bench::Credible);
        let is_open = now.since(since) < self.config.rebuttal_max;
        if is_open && again.has_quorum(&self.config) && !again.is_carried(&self.config) {
            self.tell(key, InstanceChange::Restored);
            return Step::To(Case { stage: Stage::Watched { since: now }, ..case.clone() });
        }
        let probed_from = tried_at + case.period(&self.config) / 2;
        let said = || {
            let all = self.words(key).filter(|(_, report)| !report.condemns());
            all.filter_map(|(member, report)| Some((member, *report.windows.get(key)?)))
        };
        let well = said().find(|(_, seen)| seen.is_well_after(probed_from));
        if let Some((by, _)) = well {
            self.tell(key, InstanceChange::Returning(by));
            let stage = Stage::Returning { since: now, grounds: Arc::clone(grounds) };
            return Step::To(Case { stage, is_witness: by == self.id, ..case.clone() });
        }
        // Of a probe that failed only its caller can tell: else one liar could keep it out for ever.
        let has_probed = |member, at| {
            let turn = self.turn_of(member, key, case, tried_at);
            turn.is_some_and(|turn| turn.covers(at, TURN_SLACK))
                || at >= self.anyone_at(case, tried_at)
        };
        let is_relapse =
            said().any(|(by, seen)| seen.last_failure_at.is_some_and(|at| has_probed(by, at)));
        if !is_relapse {
            return Step::Stay;
        }
        let stage = Stage::Ejected { since, tried_at: now, grounds: Arc::clone(grounds) };
        Step::To(Case { stage, relapses: case.relapses + 1, ..case.clone() })
    }

    /// From when on anyone may probe: all have let their turns pass.
    pub(super) fn anyone_at(&self, case: &Case, tried_at: Moment) -> Moment {
        tried_at + case.period(&self.config) + self.config.period_max
    }

    /// When it is a caller's turn to probe.
    pub(super) fn turn_of(
        &self,
        caller: MemberId,
        key: &InstanceKey,
        case: &Case,
        tried_at: Moment,
    ) -> Option<Turn> {
        let callers = self.callers(self.service_of(key)?);
        let place = turn::place(caller, key, case.relapses, callers)?;
        let length = self.config.turn;
        Some(Turn {
            from: tried_at + case.period(&self.config) + length.saturating_mul(place),
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
        let grounds = self.weigh(now, key, Bench::Credible);
        if grounds.outweighs(&self.config) && self.may_eject(now, service, key) {
            return Step::To(self.eject(now, key, case, grounds));
        }
        if now.since(since) < self.config.ramp {
            return Step::Stay;
        }
        self.tell(key, InstanceChange::Returned);
        Step::To(Case { stage: Stage::Watched { since: now }, ..case.clone() })
    }

    fn judge_watched(&self, now: Moment, key: &InstanceKey, case: &Case, since: Moment) -> Step {
        let all = self.weigh(now, key, Bench::All);
        if all.has_quorum(&self.config) {
            let stage = Stage::Accused { since: now };
            return Step::To(Case { stage, onset: all.first_failure_at, ..case.clone() });
        }
        match now.since(since) < case.period(&self.config) {
            true => Step::Stay,
            false => Step::Over,
        }
    }

    fn eject(&mut self, now: Moment, key: &InstanceKey, case: &Case, grounds: Grounds) -> Case {
        let testimony = self.scale(key, Bench::Credible).testimony(now, key, self.words(key));
        let grounds = Grounds { testimony, ..grounds };
        let grounds = Arc::new(grounds);
        self.tell(key, InstanceChange::Ejected(Arc::clone(&grounds)));
        let stage = Stage::Ejected { since: now, tried_at: now, grounds };
        Case { stage, relapses: case.relapses + 1, ..case.clone() }
    }

    /// Whether this node's own calls have only succeeded since the first failure that was told: its
    /// own experience goes before what others say.
    fn is_well_here(&self, key: &InstanceKey, case: &Case) -> bool {
        let own = self.own.windows.get(key);
        own.is_some_and(|seen| seen.failures == 0 && seen.is_well_after(case.onset))
    }

    /// Whether another instance of the service is accused, too: where calls succeed besides, that is
    /// rather load than the instance.
    fn has_company(&self, now: Moment, name: &ServiceName, key: &InstanceKey) -> bool {
        let Some(service) = self.services.get(name) else { return false };
        let mut others = service.instances.iter().filter(|other| *other != key);
        others.any(|other| self.weigh_anew(now, other).has_quorum(&self.config))
    }

    /// Not the last one, and not while more than half are accused, be others heard or not: then it is
    /// rather the service.
    fn may_eject(&self, now: Moment, name: &ServiceName, key: &InstanceKey) -> bool {
        let Some(service) = self.services.get(name) else { return false };
        let is_left = |other: &&InstanceKey| {
            *other != key && !self.cases.get(*other).is_some_and(Case::is_ejected)
        };
        let is_accused =
            |key: &&InstanceKey| self.weigh(now, key, Bench::All).outweighs(&self.config);
        let accused = service.instances.iter().filter(is_accused).count();
        !service.is_failing
            && accused * 2 <= service.instances.len()
            && service.instances.iter().any(|other| is_left(&other))
    }

    /// Whether an accusation holds, whoever makes it, after the time to speak against it.
    fn is_condemned(&self, now: Moment, key: &InstanceKey) -> bool {
        let Some(case) = self.cases.get(key) else { return false };
        let all = self.weigh(now, key, Bench::All);
        let rebuttal = self.rebuttal(&all);
        let is_heard = match case.stage {
            Stage::Accused { since } => now.since(since) >= rebuttal,
            Stage::Ejected { .. } | Stage::Returning { .. } => true,
            Stage::Watched { .. } => false,
        };
        is_heard && all.is_carried(&self.config)
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
        let accused = service.instances.iter().filter(|key| self.is_condemned(now, key));
        let (accused, count) = (accused.count(), service.instances.len());
        let is_failing = accused * 2 > count;
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
        if service.is_failing && !is_failing {
            service.failed_until = Some(now);
        }
        if service.is_failing != is_failing {
            self.events.push_back(SharedEvent::Failing { service: name.clone(), is_failing });
            self.is_changed = true;
        }
        if service.panic_since.is_some() != panic_since.is_some() {
            let is_panic = panic_since.is_some();
            self.events.push_back(SharedEvent::Panic { service: name.clone(), is_panic });
            self.is_changed = true;
        }
        service.is_failing = is_failing;
        service.panic_since = panic_since;
    }
}
