//! Several hosts on one machine, whose links can be cut: Linux network namespaces. Needs root.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A switch with hosts around it. All of it disappears when dropped.
pub struct Network {
    prefix: String,
    hosts: u8,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Network {
    /// A switch and this many hosts, or why this machine has none.
    pub fn try_new(hosts: u8) -> Result<Self, String> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("mm{}-{number}", std::process::id());
        let network = Self { prefix, hosts };
        network.make()?;
        Ok(network)
    }

    fn make(&self) -> Result<(), String> {
        let switch = self.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "hub", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "hub", "up"])?;
        for host in 0..self.hosts {
            let (name, port) = (self.host(host), format!("p{host}"));
            ip(&["netns", "add", &name])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            let veth = ["-n", &switch, "link", "add", &port, "type", "veth"];
            ip(&[&veth[..], &["peer", "name", "eth", "netns", &name]].concat())?;
            ip(&["-n", &switch, "link", "set", &port, "master", "hub", "up"])?;
            let address = format!("{}/24", self.address(host, 0).ip());
            ip(&["-n", &name, "address", "add", &address, "dev", "eth"])?;
            ip(&["-n", &name, "link", "set", "eth", "up"])?;
        }
        Ok(())
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.prefix)
    }

    /// The namespace of a host.
    pub fn host(&self, host: u8) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// An address of a host.
    pub fn address(&self, host: u8, port: u16) -> SocketAddr {
        (Ipv4Addr::new(10, 91, 7, host + 1), port).into()
    }

    /// Drops every packet from and to a host, silently: no carrier is lost and no error comes back.
    pub fn cut(&self, host: u8) {
        self.set_port(host, "0");
    }

    /// Lets packets through again.
    pub fn heal(&self, host: u8) {
        self.set_port(host, "3");
    }

    /// Bytes that each host has sent so far, in whole Ethernet frames.
    pub fn bytes_sent(&self) -> Vec<u64> {
        let listed = run("ip", &["-n", &self.switch(), "-s", "-j", "link"]).unwrap();
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        let ports = listed.as_array().unwrap();
        let sent = |host| {
            // What the switch receives at a port is what the host behind it has sent.
            let port = ports.iter().find(|port| port["ifname"] == format!("p{host}")).unwrap();
            port["stats64"]["rx"]["bytes"].as_u64().unwrap()
        };
        (0..self.hosts).map(sent).collect()
    }

    fn set_port(&self, host: u8, state: &str) {
        let port = format!("p{host}");
        let arguments = ["-n", &self.switch(), "link", "set", "dev", &port, "state", state];
        run("bridge", &arguments).unwrap();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let hosts = (0..self.hosts).map(|host| self.host(host));
        for name in hosts.chain([self.switch()]) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    run("ip", arguments).map(drop)
}

/// What the program printed.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = super::find(program).ok_or_else(|| format!("'{program}' is not installed"))?;
    let output = Command::new(path).args(arguments).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", arguments.join(" "), said.trim()))
}
