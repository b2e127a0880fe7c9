//! Who plays: three agents, the sample services behind them, and the doors to these.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

use super::agents::{Agent, PATIENCE, Ports, Scratch};
use super::instances::{BREAK, Outage, Service, serve};
use super::screen::{Ink, Screen};
use super::view::{View, watch_mesh};
use super::{DemoError, say};
use crate::model::Moment;
use crate::runtime::TaskGroup;
use crate::runtime::clock::Clock;

/// One running instance of a sample service.
struct Sample {
    service: Service,
    node: &'static str,
    address: SocketAddr,
}

/// Three agents. Dropped in this order: they end before their directory does.
pub(super) struct Stage {
    /// Founds the mesh; traffic enters here.
    pub(super) ash: Agent,
    /// Serves greeter; is killed.
    pub(super) birch: Agent,
    /// Serves greeter and clock.
    pub(super) cedar: Agent,
    samples: Vec<Sample>,
    /// Where ash takes connections to greeter.
    pub(super) greeter: SocketAddr,
    /// Where ash takes connections to clock.
    pub(super) clock: SocketAddr,
    gateway: SocketAddr,
    socks: SocketAddr,
    binary: PathBuf,
    pub(super) scratch: Scratch,
    pub(super) outage: Outage,
}

impl Stage {
    pub(super) fn new() -> Result<Self, DemoError> {
        let binary = std::env::current_exe()
            .map_err(|error| DemoError::System { action: "find my own program", error })?;
        let scratch = Scratch::new()?;
        let mut ports = Ports::default();
        let sample = |service, node, ports: &mut Ports| {
            ports.take().map(|address| Sample { service, node, address })
        };
        let samples = vec![
            sample(Service::Greeter, "birch", &mut ports)?,
            sample(Service::Greeter, "cedar", &mut ports)?,
            sample(Service::Clock, "cedar", &mut ports)?,
        ];
        let (greeter, clock) = (ports.take()?, ports.take()?);
        let (gateway, socks) = (ports.take()?, ports.take()?);
        let entries = vec![
            "--upstream".to_owned(),
            format!("greeter={greeter}"),
            "--upstream".to_owned(),
            format!("clock={clock}"),
            "--gateway".to_owned(),
            gateway.to_string(),
            "--socks".to_owned(),
            socks.to_string(),
        ];
        let mut agent = |name, arguments| {
            let mine = samples.iter().filter(|sample| sample.node == name);
            let exposed = mine.map(|Sample { service, address, .. }| {
                let name = service.name();
                format!("[[expose]]\nname = \"{name}\"\nto = \"{address}\"\nprotocol = \"http\"\n")
            });
            Agent::new(name, &binary, &scratch, &mut ports, arguments, exposed.collect())
        };
        Ok(Self {
            ash: agent("ash", entries)?,
            birch: agent("birch", Vec::new())?,
            cedar: agent("cedar", Vec::new())?,
            samples,
            greeter,
            clock,
            gateway,
            socks,
            binary,
            scratch,
            outage: Outage::default(),
        })
    }

    /// From nothing to three agents that see each other.
    pub(super) async fn set_up(
        &mut self,
        screen: &mut Screen,
        tasks: &TaskGroup,
        clock: Clock,
    ) -> Result<watch::Receiver<View>, DemoError> {
        say(screen, "A mesh of three agents on this machine, with nothing in the middle.\n")?;
        for sample in &self.samples {
            let listener = TcpListener::bind(sample.address).await.map_err(|error| {
                DemoError::System { action: "listen for a sample service", error }
            })?;
            let Sample { service, node, address } = *sample;
            tasks.spawn("sample", serve(listener, address, service, node, self.outage.clone()));
        }
        say(
            screen,
            "  ash     murmesh init      a new mesh: its root, its first member and issuer",
        )?;
        self.ash.init().await?;
        say(
            screen,
            "  ash     murmesh agent     one UDP port; local entries to greeter and clock",
        )?;
        self.ash.start()?;
        self.ash.ready().await?;
        say(screen, "  ash     murmesh invite    a token, good for two")?;
        let token = self.ash.invite(2).await?;
        say(screen, "  birch   murmesh join      a key and a certificate of its own")?;
        say(screen, "  cedar   murmesh join      the same")?;
        tokio::try_join!(self.birch.join(&token), self.cedar.join(&token))?;
        say(screen, "  birch   murmesh agent     serves greeter")?;
        self.birch.start()?;
        say(screen, "  cedar   murmesh agent     serves greeter and clock")?;
        self.cedar.start()?;
        tokio::try_join!(self.birch.ready(), self.cedar.ready())?;

        let (sender, mut view) = watch::channel(View::default());
        tasks.spawn("watch", watch_mesh(self.ash.api, sender));
        let is_seen = matches!(timeout(PATIENCE, view.wait_for(is_complete)).await, Ok(Ok(_)));
        if !is_seen {
            let seen = format!("{:?}", *view.borrow());
            return Err(DemoError::Incomplete(PATIENCE, seen));
        }
        let took = clock.now().since(Moment::START).as_secs_f64();
        say(screen, format!("\nAll three see each other, {took:.1} s after the start."))?;
        Ok(view)
    }

    /// Commands to paste into another terminal.
    pub(super) fn tell_commands(&self, screen: &mut Screen) -> Result<(), DemoError> {
        let murmesh = self.binary_to_type();
        let ash = &self.ash;
        let broken = self.samples.iter().find(|sample| sample.node == "cedar");
        let broken = broken.map_or(self.greeter, |sample| sample.address);
        say(screen, "Paste into a second terminal:")?;
        let mut tell = |command: String, what: &str| {
            let what = screen.ink(Ink::Quiet, &format!("    # {what}"));
            say(screen, format!("{what}\n    {command}"))
        };
        tell(format!("curl http://{}/you", self.greeter), "through ash to birch or cedar")?;
        let gateway = format!("curl -x http://{} http://greeter.mesh/you", self.gateway);
        tell(gateway, "the same by name, over HTTP")?;
        let socks = format!("curl -x socks5h://{} http://clock.mesh/now", self.socks);
        tell(socks, "clock by name, over SOCKS5")?;
        tell(format!("{murmesh} members --api {}", ash.api), "who is there, as ash sees it")?;
        tell(format!("{murmesh} events -f --api {}", ash.api), "what happens, as it happens")?;
        let refuses = format!("break cedar's greeter for {BREAK:?}; no request fails");
        tell(format!("curl http://{broken}/break"), &refuses)?;
        say(screen, "")
    }

    /// The program as a person would type it here.
    fn binary_to_type(&self) -> String {
        let here = std::env::current_dir().ok();
        let below = here.as_deref().and_then(|here| self.binary.strip_prefix(here).ok());
        below.unwrap_or(&self.binary).display().to_string()
    }

    /// Fails if an agent has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), DemoError> {
        [&mut self.ash, &mut self.birch, &mut self.cedar].into_iter().try_for_each(Agent::check)
    }

    /// Stops all agents in order.
    pub(super) async fn stop(&mut self) {
        tokio::join!(self.birch.stop(), self.cedar.stop(), self.ash.stop());
    }
}

/// Three members alive, every instance ready.
fn is_complete(view: &View) -> bool {
    ["ash", "birch", "cedar"].iter().all(|name| view.is_alive(name))
        && view.ready("greeter") == (2, 2)
        && view.ready("clock") == (1, 1)
}
