//! Reading the files again: what they say now holds as if the agent had just started, or nothing of
//! it does.

use std::path::PathBuf;
use std::sync::Arc;

use tracing::{info, warn};

use super::control::{Controller, check_loop, local_error};
use super::ingress::Ingress;
use super::local::LocalServices;
use super::seeds;
use crate::api::{ControlError, Effective, ExposeSpec, Reloaded, SettingView, UpstreamSpec};
use crate::config::{self, Origin, Overrides, PublicService, Setting, Settings};
use crate::model::InstanceId;
use crate::runtime::blocking;
use crate::telemetry::EventKind;

/// An entry that files or flags asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// As written; the port may be 0.
    pub(super) written: UpstreamSpec,
    /// As it listens.
    pub(super) opened: UpstreamSpec,
}

/// What becomes of the entries.
#[derive(Default)]
struct Entries {
    /// As written.
    open: Vec<Setting<UpstreamSpec>>,
    /// What listens and shall lead elsewhere: as it is, and as written now.
    redirect: Vec<(UpstreamSpec, Setting<UpstreamSpec>)>,
    close: Vec<UpstreamSpec>,
    /// As they are already.
    keep: Vec<Asked>,
}

/// What was done to the entries so far, to be undone.
enum Step {
    Opened(UpstreamSpec),
    Redirected { before: UpstreamSpec },
}

impl Controller {
    /// Reads the files again and applies what they say, or nothing at the first fault.
    pub(super) async fn reload(&mut self) -> Result<Reloaded, ControlError> {
        let reloaded = self.apply_files().await;
        match &reloaded {
            Ok(Reloaded { applied, needs_restart }) => {
                info!(?applied, ?needs_restart, "files were read again");
                let mut reason = format!("applied: {}", or_nothing(applied));
                if !needs_restart.is_empty() {
                    reason += &format!("; at the next start: {}", needs_restart.join(", "));
                }
                self.events.record(EventKind::ConfigReloaded, &self.name, reason);
            }
            Err(error) => {
                warn!(%error, "files were read again, and nothing of them applied");
                let reason = format!("nothing was applied: {error}");
                self.events.record(EventKind::ConfigRefused, &self.name, reason);
            }
        }
        reloaded
    }

    async fn apply_files(&mut self) -> Result<Reloaded, ControlError> {
        let Some(read_by) = self.settings.read_by.clone() else {
            let text = "this agent is part of a program, which read no files for it";
            return Err(ControlError::Invalid(text.to_owned()));
        };
        let here = self.dir.path().to_owned();
        let new = blocking(move || read(&read_by, here)).await;
        let new = new.ok_or_else(|| ControlError::Failed("reading the files broke".to_owned()))?;
        let (new, elsewhere) = new.map_err(|error| ControlError::Invalid(error.to_string()))?;

        let mut report = Reloaded::default();
        let entries = self.entries_of(&new)?;
        let services = self.services_of(&new, &entries, &mut report)?;
        let public = match &self.ingress {
            Some(_) if new.public.value.is_some() => {
                let read = Ingress::read(&new).await;
                Some(read.map_err(at(&new.certificates.origin, "gateway.certificates".to_owned()))?)
            }
            _ => None,
        };
        let asked = self.change_entries(entries, &services, &mut report).await?;
        // Nothing can fail from here on.
        self.asked = asked;
        self.services = services;
        self.take_seeds(&new, &mut report).await;
        if let (Some(ingress), Some(loaded)) = (&self.ingress, public) {
            ingress.set(&new, loaded);
            report.applied.extend(public_differences(&self.settings, &new));
        }
        let (before, after) = (self.settings.forget_after.value, new.forget_after.value);
        if before != after {
            let after = humantime::format_duration(after);
            report.applied.push(format!("join.forget_after {after}"));
        }
        report.needs_restart.extend(elsewhere);
        if let Some(log) = &self.access_log {
            log.reopen();
        }
        report.needs_restart.extend(fixed_differences(&self.settings, &new));
        self.settings = Settings {
            exposes: new.exposes,
            upstreams: new.upstreams,
            publics: new.publics,
            certificates: new.certificates,
            seeds: new.seeds,
            forget_after: new.forget_after,
            ..self.settings.clone()
        };
        self.effective.store(Arc::new(effective(&self.settings)));
        self.publish().await;
        Ok(report)
    }

    /// The instances as they would be after a start with `new`.
    fn services_of(
        &self,
        new: &Settings,
        entries: &Entries,
        report: &mut Reloaded,
    ) -> Result<LocalServices, ControlError> {
        let mut services = self.services.clone();
        let is_kept = |id: &InstanceId| new.exposes.iter().any(|kept| kept.value.id == *id);
        let gone = self.settings.exposes.iter().map(|old| &old.value.id).filter(|id| !is_kept(id));
        for id in gone {
            // What the command line added under this id was covered by the file, and is no more.
            match self.runtime.expose.iter().find(|spec| spec.id == *id) {
                Some(spec) => drop(services.declare(spec.clone()).map_err(local_error)?),
                None if services.withdraw(id) => {
                    report.applied.push(format!("expose.{id} is gone"))
                }
                None => {}
            }
        }
        let opened = entries.open.iter().map(|setting| &setting.value);
        let kept = self.upstreams.iter().filter(|spec| !entries.close.contains(spec));
        let listeners = kept.chain(opened).map(|spec| &spec.listen);
        let listeners: Vec<_> = listeners.chain(self.doors.open()).collect();
        for Setting { value, origin } in &new.exposes {
            let what = || format!("expose {}", value.id);
            check_loop(&value.to, listeners.iter().copied()).map_err(at(origin, what()))?;
            let declared = services.declare(value.clone()).map_err(local_error);
            let before = declared.map_err(at(origin, what()))?;
            report.applied.extend(difference(before.as_ref(), value));
        }
        Ok(services)
    }

    /// What becomes of the entries with `new`.
    fn entries_of(&self, new: &Settings) -> Result<Entries, ControlError> {
        let mut entries = Entries::default();
        let is_open = |spec: &UpstreamSpec| self.upstreams.contains(spec);
        let is_written =
            |asked: &Asked| new.upstreams.iter().any(|spec| spec.value == asked.written);
        let (kept, gone): (Vec<_>, Vec<_>) = self
            .asked
            .iter()
            .filter(|asked| is_open(&asked.opened))
            .partition(|asked| is_written(asked));
        entries.keep = kept.into_iter().cloned().collect();
        let is_kept = |spec: &UpstreamSpec| entries.keep.iter().any(|asked| asked.written == *spec);
        let mut gone: Vec<_> = gone.into_iter().map(|asked| asked.opened.clone()).collect();
        for setting in new.upstreams.iter().filter(|setting| !is_kept(&setting.value)) {
            let UpstreamSpec { listen, service, .. } = &setting.value;
            // What the command line opened is as the file says from now on.
            let is_same = |open: &&UpstreamSpec| {
                open.listen == *listen && open.service == *service && **open != setting.value
            };
            let open = self.upstreams.iter().find(is_same);
            match (gone.iter().position(|spec| spec.listen == *listen), open) {
                (Some(index), _) => entries.redirect.push((gone.remove(index), setting.clone())),
                (None, Some(open)) => entries.redirect.push((open.clone(), setting.clone())),
                (None, None) => entries.open.push(setting.clone()),
            }
        }
        // What the command line opened as well stays.
        gone.retain(|spec| !self.runtime.upstream.contains(spec));
        entries.close = gone;
        Ok(entries)
    }

    /// Opens, redirects and closes entries, or undoes what it did. Returns those asked for.
    async fn change_entries(
        &mut self,
        entries: Entries,
        services: &LocalServices,
        report: &mut Reloaded,
    ) -> Result<Vec<Asked>, ControlError> {
        // An entry must not lead to what it is, so that it is opened beside the instances to come.
        let before = std::mem::replace(&mut self.services, services.clone());
        let (mut done, mut asked) = (Vec::new(), entries.keep);
        let changed = self.try_entries(&entries.open, &entries.redirect, &mut done, &mut asked);
        let changed = changed.await;
        self.services = before;
        if let Err(error) = changed {
            self.undo(done).await;
            self.show();
            return Err(error);
        }
        for step in &done {
            report.applied.push(match step {
                Step::Opened(spec) => format!("upstream {} at {}", spec.service, spec.listen),
                Step::Redirected { before } => {
                    let now = self.upstreams.iter().find(|spec| spec.listen == before.listen);
                    let now = now.map_or(before, |now| now);
                    format!("upstream {} at {}, was {}", now.service, now.listen, before.service)
                }
            });
        }
        for spec in entries.close {
            self.close(&spec).await;
            report.applied.push(format!("upstream {} at {} is gone", spec.service, spec.listen));
        }
        Ok(asked)
    }

    async fn try_entries(
        &mut self,
        open: &[Setting<UpstreamSpec>],
        redirect: &[(UpstreamSpec, Setting<UpstreamSpec>)],
        done: &mut Vec<Step>,
        asked: &mut Vec<Asked>,
    ) -> Result<(), ControlError> {
        let what = |spec: &UpstreamSpec| format!("upstream {} {}", spec.service, spec.listen);
        for Setting { value, origin } in open {
            let was_open = self.upstreams.contains(value);
            let opened = self.open(value.clone()).await.map_err(at(origin, what(value)))?;
            if !was_open {
                done.push(Step::Opened(opened.clone()));
            }
            asked.push(Asked { written: value.clone(), opened });
        }
        for (before, Setting { value, origin }) in redirect {
            self.redirect(before, value).await.map_err(at(origin, what(value)))?;
            done.push(Step::Redirected { before: before.clone() });
            asked.push(Asked { written: value.clone(), opened: value.clone() });
        }
        Ok(())
    }

    async fn undo(&mut self, done: Vec<Step>) {
        for step in done.into_iter().rev() {
            match step {
                Step::Opened(spec) => self.close(&spec).await,
                Step::Redirected { before } => {
                    let now = self.upstreams.iter().find(|spec| spec.listen == before.listen);
                    let Some(now) = now.cloned() else { continue };
                    if let Err(error) = self.redirect(&now, &before).await {
                        warn!(listen = %now.listen, %error, "an entry leads where it should not");
                    }
                }
            }
        }
    }

    pub(super) async fn redirect(
        &mut self,
        before: &UpstreamSpec,
        after: &UpstreamSpec,
    ) -> Result<(), ControlError> {
        let UpstreamSpec { service, listen, .. } = after.clone();
        let redirected = self.proxy.redirect(listen, service, after.options()).await;
        redirected.map_err(|error| ControlError::Invalid(error.to_string()))?;
        self.upstreams.retain(|spec| spec != before);
        self.upstreams.push(after.clone());
        Ok(())
    }

    async fn close(&mut self, spec: &UpstreamSpec) {
        self.upstreams.retain(|open| open != spec);
        if let Err(error) = self.proxy.close_entry(spec.listen.clone()).await {
            warn!(listen = %spec.listen, %error, "entry was gone already");
        }
    }

    /// Asks new seeds, too. Those that are gone are asked until the next start: whom gossip has
    /// once been told of it does not forget.
    async fn take_seeds(&mut self, new: &Settings, report: &mut Reloaded) {
        let (before, after) = (&self.settings.seeds.value, &new.seeds.value);
        let added: Vec<_> = after.iter().filter(|seed| !before.contains(seed)).cloned().collect();
        report.applied.extend(added.iter().map(|seed| format!("join.seeds {seed}")));
        let gone = before.iter().filter(|seed| !after.contains(seed));
        let gone = gone.map(|seed| format!("join.seeds without {seed}"));
        report.needs_restart.extend(gone);
        for address in seeds::literal(&added) {
            self.gossip.add_seed(address).await;
        }
        self.seeds.send_replace(after.clone());
    }
}

/// What holds, as the local API tells it.
pub(super) fn effective(settings: &Settings) -> Effective {
    Effective { forget_after: settings.forget_after.value, settings: settings.dump() }
}

/// Reads the files as at the start, for the data directory that is in use. Tells of another one that
/// they name now.
fn read(
    read_by: &Overrides,
    here: PathBuf,
) -> Result<(Settings, Option<String>), config::ConfigError> {
    let settings = config::load(read_by)?;
    let (path, origin) = (settings.data_dir.value.path(), &settings.data_dir.origin);
    if path == here {
        return Ok((settings, None));
    }
    let elsewhere = format!("node.data_dir {} -> {} ({origin})", here.display(), path.display());
    let data_dir = Some(Setting::new(here, Origin::Default));
    let settings = config::load(&Overrides { data_dir, ..read_by.clone() })?;
    Ok((settings, Some(elsewhere)))
}

/// What differs and waits for the next start: all but the keys that a reload applies.
fn fixed_differences(before: &Settings, after: &Settings) -> Vec<String> {
    let is_fixed = |view: &&SettingView| {
        let applied = ["join.seeds", "join.forget_after", "node.data_dir"];
        let is_list = ["expose.", "upstream.", "public.", "gateway.certificates"];
        let is_list = is_list.iter().any(|begin| view.key.starts_with(begin));
        !is_list && !applied.contains(&view.key.as_str())
    };
    let (before, after) = (before.dump(), after.dump());
    let fixed = after.iter().filter(is_fixed);
    let pairs = fixed.filter_map(|new| Some((before.iter().find(|old| old.key == new.key)?, new)));
    let changed = pairs.filter(|(old, new)| old.value != new.value);
    changed
        .map(|(old, new)| {
            format!("{} {} -> {} ({})", new.key, shown(&old.value), shown(&new.value), new.origin)
        })
        .collect()
}

/// What is public now and was not, or other than it was.
fn public_differences(before: &Settings, after: &Settings) -> Vec<String> {
    let word =
        |public: &PublicService| format!("{} at {}", public.service, public.hosts.join(", "));
    let words = |settings: &Settings| -> Vec<String> {
        settings.publics.iter().map(|public| word(&public.value)).collect()
    };
    let (old, new) = (words(before), words(after));
    let added = new.iter().filter(|word| !old.contains(word)).map(|word| format!("public {word}"));
    let gone = old.iter().filter(|word| !new.contains(word));
    let mut told: Vec<_> = added.chain(gone.map(|word| format!("public {word} is gone"))).collect();
    if before.certificates.value != after.certificates.value {
        told.push("gateway.certificates".to_owned());
    }
    told
}

fn shown(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) if text.is_empty() => "none".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "none".to_owned(),
        other => other.to_string(),
    }
}

fn difference(before: Option<&ExposeSpec>, after: &ExposeSpec) -> Option<String> {
    let Some(before) = before else {
        return Some(format!("expose.{} at {}", after.id, after.to));
    };
    let changes = after.changes_since(before);
    (!changes.is_empty()).then(|| format!("expose.{} {}", after.id, changes.join(", ")))
}

/// Says who asked for what cannot be had.
fn at(origin: &Origin, what: String) -> impl FnOnce(ControlError) -> ControlError {
    let origin = origin.to_string();
    move |error| ControlError::Invalid(format!("{what} ({origin}): {error}"))
}

fn or_nothing(words: &[String]) -> String {
    if words.is_empty() { "nothing new".to_owned() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeFile;
    use crate::tls::store::DataDir;

    #[test]
    fn another_data_directory_in_a_file_is_named_and_not_read() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        for (name, seed) in [("here", "10.0.0.1:7370"), ("there", "10.0.0.2:7370")] {
            std::fs::create_dir(at(name)).unwrap();
            let node = NodeFile { seeds: vec![seed.to_owned()], ..NodeFile::default() };
            node.save(&DataDir::new(at(name))).unwrap();
        }
        std::fs::write(at("m.toml"), format!("[node]\ndata_dir = {:?}\n", at("there"))).unwrap();
        let read_by = Overrides { config: Some(at("m.toml")), ..Overrides::default() };
        let (settings, elsewhere) = read(&read_by, at("here")).unwrap();
        assert_eq!(settings.data_dir.value.path(), at("here"));
        assert_eq!(settings.seeds.value, ["10.0.0.1:7370".parse().unwrap()]);
        let elsewhere = elsewhere.unwrap();
        assert!(elsewhere.starts_with("node.data_dir "), "{elsewhere}");
        assert_eq!(read(&read_by, at("there")).unwrap().1, None);
    }
}
