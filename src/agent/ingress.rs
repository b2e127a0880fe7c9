//! The public gateway's side of the agent: what it proves itself with, and what it leads to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::api::ControlError;
use crate::config::{PublicService, Settings};
use crate::proxy::{PublicHosts, Route};
use crate::runtime::blocking;
use crate::telemetry::{EventKind, EventLog};
use crate::tls::public::{CertificateFiles, Loaded, Look, News, PublicCertificates, load};

/// How often files are looked at. What has changed is read at the next look that finds it at rest.
const LOOK_PERIOD: Duration = Duration::from_secs(2);

/// What of the public gateway changes while it is open.
pub(super) struct Ingress {
    pub(super) hosts: PublicHosts,
    pub(super) certificates: Arc<PublicCertificates>,
    /// For whoever looks at them again.
    files: watch::Sender<Vec<CertificateFiles>>,
}

impl Ingress {
    /// Nothing public yet.
    pub(super) fn new(certificates: Arc<PublicCertificates>) -> Self {
        Self { hosts: PublicHosts::default(), certificates, files: watch::Sender::default() }
    }

    /// Reads what `settings` name, without using it yet.
    pub(super) async fn read(settings: &Settings) -> Result<Loaded, ControlError> {
        let files = settings.certificates.value.clone();
        let loaded = blocking(move || load(&files)).await;
        let loaded = loaded.ok_or_else(|| ControlError::Failed("reading broke".to_owned()))?;
        loaded.map_err(|error| ControlError::Invalid(error.to_string()))
    }

    /// Begins with what of it can be used: a machine that starts while a certificate is broken had better
    /// serve everything else. The broken ones are read again when their files change.
    pub(super) async fn begin(&self, settings: &Settings, events: &EventLog) {
        let (files, of) = (settings.certificates.value.clone(), Arc::clone(&self.certificates));
        if let Some(news) = blocking(move || of.read(&files)).await {
            note(News { renewed: Vec::new(), ..news }, events);
        }
        self.publish(settings, &self.certificates.used());
    }

    /// From now on these hold.
    pub(super) fn set(&self, settings: &Settings, loaded: Loaded) {
        self.publish(settings, &loaded);
        self.certificates.replace(loaded);
    }

    fn publish(&self, settings: &Settings, loaded: &Loaded) {
        let publics = settings.publics.iter().map(|public| &public.value);
        let hosts = publics.flat_map(|PublicService { service, hosts, options }| {
            let route = Route { service: service.clone(), options: Arc::new(options.clone()) };
            hosts.iter().map(move |host| (host.clone(), route.clone()))
        });
        let hosts: BTreeMap<_, _> = hosts.collect();
        for host in hosts.keys().filter(|host| !loaded.has(host)) {
            warn!(host, "no public certificate is for this host: its clients are refused");
        }
        self.hosts.set(hosts);
        self.files.send_replace(settings.certificates.value.clone());
    }

    /// Reads certificates again when their files have changed, for ever.
    pub(super) fn watch(&self, events: EventLog) -> impl Future<Output = ()> + Send + use<> {
        let (files, certificates) = (self.files.subscribe(), Arc::clone(&self.certificates));
        async move {
            let mut before = None;
            loop {
                sleep(LOOK_PERIOD).await;
                let (files, of) = (files.borrow().clone(), Arc::clone(&certificates));
                let looked = blocking(move || {
                    let look = of.look(&files, &mut before);
                    (look, before)
                });
                let Some((look, now)) = looked.await else { return };
                before = now;
                if let Look::Read(news) = look {
                    note(news, &events);
                }
            }
        }
    }
}

fn note(News { renewed, refused }: News, events: &EventLog) {
    for certificate in renewed {
        let (path, names) = (certificate.files.cert.display(), certificate.names.join(", "));
        info!(%path, names, "public certificate in use");
        events.record(EventKind::PublicCertificateRenewed, path, format!("for {names}"));
    }
    for error in refused {
        warn!(%error, "a public certificate is broken; that of before stays in use, if there was one");
        events.record(EventKind::PublicCertificateRefused, error.path.display(), &error.fault);
    }
}
