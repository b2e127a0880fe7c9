//! What a program asks of the agent inside it.

use std::time::Duration;

use super::seeds::literal;
use super::{Agent, JoinOptions, StartError, Watch, join};
use crate::api::{
    Control, ControlError, ExposeSpec, InviteMade, UpstreamSelector, UpstreamSpec, control,
};
use crate::config::{Seed, Settings, hostname};
use crate::mesh::{Endpoint, NoEndpoint, Snapshot};
use crate::model::{InstanceId, ServiceName, Target, Unlisted};
use crate::proxy::{DialError, MeshStream};
use crate::tls::store::{InitOptions, init};
use crate::transport::enrolment::InviteOptions;

/// How long certificates of a mesh live that [`Agent::found`] founds; [`init`] takes others.
const CERT_TTL: Duration = Duration::from_secs(7 * 24 * 3_600);

impl Agent {
    /// Starts the first agent of a mesh. Founds the mesh unless the data directory has an identity
    /// already, so a program may call this at every start. The name is that of the settings, or
    /// the hostname.
    ///
    /// Certificates live for 7 days; [`init`] before [`Agent::start`] takes another life.
    pub async fn found(settings: Settings) -> Result<Self, StartError> {
        let name = settings.name.value.clone().unwrap_or_else(hostname);
        let options = InitOptions { name, unlisted: Unlisted::Allow, cert_ttl: CERT_TTL };
        init(&settings.data_dir.value, &options)?;
        Self::start(settings).await
    }

    /// Starts an agent of the mesh that `token` invites to. Joins unless the data directory has an
    /// identity of that mesh already, so a program may call this at every start. The name is that
    /// of the settings, or the hostname.
    pub async fn join(mut settings: Settings, token: &str) -> Result<Self, StartError> {
        let report = join(JoinOptions {
            replace: false,
            data_dir: settings.data_dir.value.path().to_owned(),
            token: token.to_owned(),
            name: settings.name.value.clone().unwrap_or_else(hostname),
            seeds: literal(&settings.seeds.value),
        })
        .await?;
        settings.seeds.value.extend(report.seeds.into_iter().map(Seed::from));
        Self::start(settings).await
    }

    /// Makes a token that lets `uses` newcomers in within `ttl`. The token is a secret. Only issuers
    /// can: the member that founded the mesh, and those that were added.
    pub async fn invite(&self, ttl: Duration, uses: u32) -> Result<InviteMade, ControlError> {
        let options = InviteOptions { ttl, uses, name: None, services: None };
        self.ask(|reply| Control::Invite { options, reply }).await
    }

    /// Offers an instance to the mesh until it is taken back or the agent stops. The same id again
    /// replaces it.
    ///
    /// Returns when it is accepted; a moment later it is seen, also from here: [`Agent::watch`].
    pub async fn expose(&self, spec: ExposeSpec) -> Result<(), ControlError> {
        let spec = spec.check().map_err(|error| ControlError::Invalid(error.to_string()))?;
        let lifetime = control::Lifetime::Run;
        self.ask(|reply| Control::Expose { spec, lifetime, reply }).await.map(drop)
    }

    /// Takes an instance back: no new calls; those it has go on.
    pub async fn unexpose(&self, id: &InstanceId) -> Result<(), ControlError> {
        let id = id.clone();
        self.ask(|reply| Control::Unexpose { id, reply }).await
    }

    /// Opens a local entry until it is closed or the agent stops: whoever connects to `listen` (port
    /// 0 asks for any) reaches an instance of `service`, which need not exist yet. Returns where it
    /// listens.
    pub async fn upstream(
        &self,
        service: &ServiceName,
        listen: Target,
    ) -> Result<Target, ControlError> {
        let spec = UpstreamSpec::new(service.clone(), listen);
        let spec = spec.check().map_err(|error| ControlError::Invalid(error.to_string()))?;
        let lifetime = control::Lifetime::Run;
        let opened = self.ask(|reply| Control::Upstream { spec, lifetime, reply }).await?;
        Ok(opened.listen)
    }

    /// Closes the local entry at `listen`, as opening returned it: new connections are refused, open
    /// ones go on.
    pub async fn close_upstream(&self, listen: &Target) -> Result<(), ControlError> {
        let which = UpstreamSelector::Listen(listen.clone());
        self.ask(|reply| Control::CloseUpstreams { which, reply }).await.map(drop)
    }

    /// Connects to an instance of `service`, as a client of a local entry would be connected: the
    /// least busy of two drawn by weight; another one when that one refuses or cannot be reached.
    /// Takes 5 s at most.
    ///
    /// Cancel safe: a call that is given up is reset.
    ///
    /// ```
    /// # use murmesh::{Agent, DataDir, DialError, ExposeSpec, ServiceName, Settings, Target};
    /// # use tokio::io::{AsyncReadExt, AsyncWriteExt};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let agent = Agent::found(Settings::local(DataDir::new(dir.path()))).await?;
    /// let web: ServiceName = "web".parse()?;
    /// assert_eq!(agent.dial(&web).await.unwrap_err(), DialError::UnknownService);
    ///
    /// # let server = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    /// agent.expose(ExposeSpec::new(web.clone(), Target::Tcp(server.local_addr()?))?).await?;
    /// # let name = web.clone();
    /// # agent.watch(move |mesh| mesh.ready(&name).count()).wait_for(|count| *count == 1).await;
    /// let mut call = agent.dial(&web).await?;
    /// println!("{} on {}", call.endpoint().instance, call.endpoint().member_name);
    /// call.write_all(b"half a request").await?;
    /// drop(call); // its end was not said
    ///
    /// let (mut called, _) = server.accept().await?;
    /// let cut = called.read_to_end(&mut Vec::new()).await.unwrap_err();
    /// assert_eq!(cut.kind(), std::io::ErrorKind::ConnectionReset);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn dial(&self, service: &ServiceName) -> Result<MeshStream, DialError> {
        self.proxy.dial(service.clone()).await
    }

    /// The instance that the next call of `service` would go to first, without calling it.
    pub fn pick(&self, service: &ServiceName) -> Result<Endpoint, NoEndpoint> {
        self.proxy.pick(service)
    }

    /// Follows what `part` takes out of the mesh as seen from here: all instances of a service, the
    /// names of those alive, one member's state. See [`Watch`].
    ///
    /// ```
    /// # use murmesh::{Agent, DataDir, ExposeSpec, ServiceName, Settings};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let agent = Agent::found(Settings::local(DataDir::new(dir.path()))).await?;
    /// let mut names = agent.watch(|mesh| mesh.services.keys().cloned().collect::<Vec<_>>());
    /// assert_eq!(names.changed().await, Some(vec![])); // at once: as it is
    /// let web: ServiceName = "web".parse()?;
    /// agent.expose(ExposeSpec::new(web.clone(), "127.0.0.1:8080".parse()?)?).await?;
    /// assert_eq!(names.changed().await, Some(vec![web])); // when it differs
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch<T, F>(&self, part: F) -> Watch<T>
    where
        T: Clone + PartialEq,
        F: FnMut(&Snapshot) -> T + Send + 'static,
    {
        Watch::new(self.snapshots.clone(), part)
    }
}
