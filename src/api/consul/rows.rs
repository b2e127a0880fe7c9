//! The mesh in Consul's JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::registration::WEIGHT_UNIT;
use crate::api::control::ExposeSpec;
use crate::api::views::{age_ms, is_shown, reason};
use crate::api::{ApiState, Local, Readiness};
use crate::mesh::{Endpoint, EndpointState, MemberView, Snapshot};
use crate::model::{InstanceId, MemberState, Moment, ServiceName, Target, Weight};
use crate::proxy::CheckReport;

/// Where a node without a zone is, as Consul's own default is called.
const DATACENTER: &str = "dc1";

/// Which rows are wanted, and in what order.
#[derive(Clone, Debug, Default)]
pub(super) struct Narrow {
    /// Only instances all of whose checks pass.
    pub(super) is_passing: bool,
    /// Only instances with all of these tags.
    pub(super) tags: Vec<String>,
    /// Only nodes there.
    pub(super) datacenter: Option<String>,
    /// The nearest to this node first; `_agent` is this one.
    pub(super) near: Option<String>,
}

/// The mesh and this machine's part in it, at one moment.
pub(super) struct World<'a> {
    api: &'a ApiState,
    now: Moment,
    snapshot: Arc<Snapshot>,
    local: Arc<Local>,
}

/// The region of a zone, which clients of Consul know as the datacenter: `eu1` of `eu1/a`.
fn region(zone: &str) -> &str {
    match zone.split('/').next() {
        None | Some("") => DATACENTER,
        Some(region) => region,
    }
}

/// `/v1/agent/self`: the shape of existing clients, and beside it `Mesh`, which is ours.
pub(super) fn agent_self(state: &ApiState) -> Value {
    let snapshot = state.snapshot();
    let me = snapshot.members.get(&state.me);
    let zone = me.map_or("", |view| view.zone.as_str());
    let identity = state.identity.load();
    let doors = state.local().doors.clone();
    let (is_ready, reason) = match state.readiness() {
        Readiness::Ready => (true, ""),
        Readiness::NotReady(reason) => (false, reason),
    };
    json!({
        "Config": {
            "Datacenter": region(zone),
            "PrimaryDatacenter": region(zone),
            "NodeName": state.name,
            "NodeID": state.me.to_string(),
            "Revision": "",
            "Server": false,
            "Version": env!("CARGO_PKG_VERSION"),
        },
        "Coord": {},
        "Member": me.map(|view| member(view)),
        "Stats": {},
        "Meta": me.map(|view| node_meta(view)),
        "Mesh": {
            "id": state.me.to_string(),
            "mesh": state.mesh.to_string(),
            "name": state.name,
            "zone": zone,
            "address": me.map(|view| view.address.to_string()),
            "version": env!("CARGO_PKG_VERSION"),
            "gateway": doors.gateway,
            "socks": doors.socks,
            "public": doors.public,
            "ready": is_ready,
            "reason": reason,
            "certificate_expires_at": identity.credentials.expires_at(),
            "certificate_renews_at": identity.renews_at,
            "degraded": identity.degraded,
            "uptime_ms": age_ms(state.clock.now(), Moment::START),
        },
    })
}

/// `/v1/agent/members`.
pub(super) fn agent_members(state: &ApiState) -> Value {
    let (now, snapshot) = (state.clock.now(), state.snapshot());
    let shown = snapshot.members.values().filter(|view| is_shown(state, view, now));
    shown.map(|view| member(view)).collect()
}

/// The numbers of states are Serf's; versions are those of the mesh's own protocol, of which there is
/// one.
fn member(view: &MemberView) -> Value {
    let status = match view.state {
        MemberState::Alive | MemberState::Suspect => 1,
        MemberState::Restarting => 2,
        MemberState::Left => 3,
        MemberState::Down => 4,
    };
    json!({
        "Name": view.name,
        "Addr": view.address.ip().to_string(),
        "Port": view.address.port(),
        "Tags": { "id": view.id.to_string(), "dc": region(&view.zone), "role": "node" },
        "Status": status,
        "ProtocolMin": 1,
        "ProtocolMax": 1,
        "ProtocolCur": 1,
        "DelegateMin": 1,
        "DelegateMax": 1,
        "DelegateCur": 1,
    })
}

impl<'a> World<'a> {
    pub(super) fn of(api: &'a ApiState) -> Self {
        Self { api, now: api.clock.now(), snapshot: api.snapshot(), local: api.local() }
    }

    /// `/v1/agent/services`: what this machine offers, by id.
    pub(super) fn agent_services(&self) -> Value {
        let me = self.snapshot.members.get(&self.api.me);
        let datacenter = region(me.map_or("", |view| &view.zone));
        let row = |spec: &ExposeSpec| {
            let (address, port) = match &spec.to {
                Target::Tcp(at) => (at.ip().to_string(), at.port()),
                Target::Unix(_) => (String::new(), spec.port),
            };
            let mut row = json!({
                "ID": spec.id,
                "Service": spec.service,
                "Tags": spec.tags,
                "Meta": { "protocol": spec.protocol, "to": spec.to },
                "Address": address,
                "TaggedAddresses": {},
                "Port": port,
                "Weights": weights(spec.weight),
                "EnableTagOverride": false,
                "Datacenter": datacenter,
            });
            if let Target::Unix(path) = &spec.to {
                row["SocketPath"] = path.display().to_string().into();
            }
            (spec.id.to_string(), row)
        };
        Value::Object(self.local.exposed.iter().map(row).collect())
    }

    /// `/v1/agent/checks`: those of this machine's instances, by their ids.
    pub(super) fn agent_checks(&self) -> Value {
        let Some(me) = self.snapshot.members.get(&self.api.me) else { return json!({}) };
        let reports = self.api.reports();
        let exposed = self.local.exposed.iter();
        let known = exposed.filter_map(|spec| reports.get(&spec.id).map(|report| (spec, report)));
        let rows = known.flat_map(|(spec, report)| {
            report.checks.iter().map(|check| {
                let row = instance_check(me, &spec.service, &spec.id, &spec.tags, check);
                (check.id.clone(), row)
            })
        });
        Value::Object(rows.collect())
    }

    /// `/v1/catalog/services`: the tags of each service that somebody offers.
    pub(super) fn catalog_services(&self, narrow: &Narrow) -> Value {
        let mut services: BTreeMap<&ServiceName, BTreeSet<&str>> = BTreeMap::new();
        for name in self.snapshot.services.keys() {
            for (_, endpoint) in self.instances(name, narrow) {
                let tags = endpoint.tags.iter().map(String::as_str);
                services.entry(name).or_default().extend(tags);
            }
        }
        json!(services)
    }

    /// `/v1/catalog/nodes`.
    pub(super) fn catalog_nodes(&self, narrow: &Narrow) -> Value {
        let members = self.snapshot.members.values().map(Arc::as_ref);
        let mut nodes: Vec<_> = members.filter(|view| self.is_node(view, narrow)).collect();
        nodes.sort_by_key(|view| (self.distance(narrow, view), &view.name, view.id));
        nodes.into_iter().map(node).collect()
    }

    /// `/v1/catalog/service/{name}`: every instance, well or not.
    pub(super) fn catalog_service(&self, name: &ServiceName, narrow: &Narrow) -> Value {
        let row = |(view, endpoint): (&MemberView, &Endpoint)| {
            let (address, port) = self.reached_at(name, endpoint);
            json!({
                "ID": view.id.to_string(),
                "Node": view.name,
                "Address": view.address.ip().to_string(),
                "Datacenter": region(&view.zone),
                "TaggedAddresses": tagged_addresses(view),
                "NodeMeta": node_meta(view),
                "ServiceID": endpoint.instance,
                "ServiceName": name,
                "ServiceTags": endpoint.tags,
                "ServiceAddress": address,
                "ServiceTaggedAddresses": {},
                "ServicePort": port,
                "ServiceMeta": {},
                "ServiceWeights": weights(endpoint.weight),
                "ServiceEnableTagOverride": false,
            })
        };
        let narrow = Narrow { is_passing: false, ..narrow.clone() }; // the catalogue knows no checks
        self.instances(name, &narrow).into_iter().map(row).collect()
    }

    /// `/v1/health/service/{name}`.
    pub(super) fn health_service(&self, name: &ServiceName, narrow: &Narrow) -> Value {
        let row = |(view, endpoint): (&MemberView, &Endpoint)| {
            let (address, port) = self.reached_at(name, endpoint);
            json!({
                "Node": node(view),
                "Service": {
                    "ID": endpoint.instance,
                    "Service": name,
                    "Tags": endpoint.tags,
                    "Address": address,
                    "TaggedAddresses": {},
                    "Meta": {},
                    "Port": port,
                    "Weights": weights(endpoint.weight),
                    "EnableTagOverride": false,
                },
                "Checks": self.checks(name, view, endpoint),
            })
        };
        self.instances(name, narrow).into_iter().map(row).collect()
    }

    fn instances<'s>(
        &'s self,
        name: &ServiceName,
        narrow: &Narrow,
    ) -> Vec<(&'s MemberView, &'s Endpoint)> {
        let has_tags =
            |endpoint: &Endpoint| narrow.tags.iter().all(|tag| endpoint.tags.contains(tag));
        let passes = |view: &MemberView, endpoint: &Endpoint| {
            node_status(view) == "passing" && instance_status(endpoint.state) == "passing"
        };
        let found = self.snapshot.endpoints(name).iter().filter_map(|endpoint| {
            let view = self.snapshot.members.get(&endpoint.member)?;
            let is_wanted = self.is_node(view, narrow)
                && has_tags(endpoint)
                && (!narrow.is_passing || passes(view, endpoint));
            is_wanted.then_some((view.as_ref(), endpoint))
        });
        let mut found: Vec<_> = found.collect();
        found.sort_by_key(|(view, _)| self.distance(narrow, view)); // stable
        found
    }

    /// Whoever has left or lost its rights is no node any more, and who is gone for long is hidden.
    fn is_node(&self, view: &MemberView, narrow: &Narrow) -> bool {
        view.state != MemberState::Left
            && !view.is_revoked
            && is_shown(self.api, view, self.now)
            && narrow.datacenter.as_deref().is_none_or(|wanted| wanted == region(&view.zone))
    }

    /// How far a node is from the one that was named: the same, its zone, its region, elsewhere.
    fn distance(&self, narrow: &Narrow, view: &MemberView) -> u8 {
        let Some(near) = &narrow.near else { return 0 };
        let members = &self.snapshot.members;
        let from = match near.as_str() {
            "_agent" => members.get(&self.api.me),
            name => members.values().find(|view| view.name.as_str() == name),
        };
        match from {
            None => 0,
            Some(from) if from.id == view.id => 0,
            Some(from) if from.zone == view.zone => 1,
            Some(from) if region(&from.zone) == region(&view.zone) => 2,
            Some(_) => 3,
        }
    }

    /// Where programs of this machine reach the service: at its entry here; at the instance itself
    /// where that is here; else at its name, which the SOCKS5 entry takes. Never at the instance's own
    /// address on another machine, around the mesh.
    fn reached_at(&self, name: &ServiceName, endpoint: &Endpoint) -> (String, u16) {
        let tcp = |target: &Target| match target {
            Target::Tcp(address) => Some(*address),
            Target::Unix(_) => None,
        };
        let mut entries = self.local.upstreams.iter().filter(|entry| entry.service == *name);
        let entry = entries.find_map(|entry| tcp(&entry.listen));
        let own = || {
            let is_own =
                |spec: &&ExposeSpec| endpoint.member == self.api.me && spec.id == endpoint.instance;
            self.local.exposed.iter().find(is_own).and_then(|spec| tcp(&spec.to))
        };
        match entry.or_else(own) {
            Some(address) => (dialled(address), address.port()),
            None => (format!("{name}.mesh"), endpoint.port),
        }
    }

    fn checks(&self, name: &ServiceName, view: &MemberView, endpoint: &Endpoint) -> Value {
        let check = |id: String, title: &str, status: &str, output: String| {
            let is_node = id == NODE_CHECK;
            json!({
                "Node": view.name,
                "CheckID": id,
                "Name": title,
                "Status": status,
                "Notes": "",
                "Output": output,
                "ServiceID": if is_node { "" } else { endpoint.instance.as_str() },
                "ServiceName": if is_node { "" } else { name.as_str() },
                "ServiceTags": if is_node { &[] } else { endpoint.tags.as_slice() },
                "Type": "",
                "Definition": {},
            })
        };
        let id = &endpoint.instance;
        let (node_id, node_output) =
            (NODE_CHECK.to_owned(), format!("the agent is {}", view.state));
        let node = check(node_id, "Serf Health Status", node_status(view), node_output);
        let instance = match endpoint.state {
            EndpointState::Maint => {
                let is_own = endpoint.member == self.api.me;
                let why = self.local.out.maintenance.get(id).filter(|_| is_own).cloned();
                let output = why.unwrap_or_else(|| reason(endpoint, Some(view.state), None));
                let title = "Service Maintenance Mode";
                check(format!("_service_maintenance:{id}"), title, "critical", output)
            }
            EndpointState::Ready | EndpointState::Failing
                if endpoint.member == self.api.me && self.api.reports().contains_key(id) =>
            {
                let reports = self.api.reports();
                let own = reports.get(id).into_iter().flat_map(|report| &report.checks);
                let own = own.map(|check| instance_check(view, name, id, &endpoint.tags, check));
                return [node].into_iter().chain(own).collect();
            }
            state => {
                let output = reason(endpoint, Some(view.state), None);
                let title = format!("Service '{name}' check");
                check(format!("service:{id}"), &title, instance_status(state), output)
            }
        };
        json!([node, instance])
    }
}

/// One check of an own instance.
fn instance_check(
    me: &MemberView,
    service: &ServiceName,
    instance: &InstanceId,
    tags: &[String],
    check: &CheckReport,
) -> Value {
    json!({
        "Node": me.name,
        "CheckID": check.id,
        "Name": check.state.name,
        "Status": check.state.status.as_str(),
        "Notes": "",
        "Output": check.state.output,
        "ServiceID": instance,
        "ServiceName": service,
        "ServiceTags": tags,
        "Type": check.kind,
        "Definition": {},
    })
}

/// The name under which clients know the check of a node's agent.
const NODE_CHECK: &str = "serfHealth";

fn node_status(view: &MemberView) -> &'static str {
    match view.state {
        MemberState::Alive | MemberState::Suspect => "passing",
        MemberState::Restarting | MemberState::Down | MemberState::Left => "critical",
    }
}

fn instance_status(state: EndpointState) -> &'static str {
    match state {
        EndpointState::Ready => "passing",
        EndpointState::Doubtful => "warning", // the last resort
        EndpointState::Draining
        | EndpointState::Failing
        | EndpointState::Maint
        | EndpointState::Down => "critical",
    }
}

fn node(view: &MemberView) -> Value {
    json!({
        "ID": view.id.to_string(),
        "Node": view.name,
        "Address": view.address.ip().to_string(),
        "Datacenter": region(&view.zone),
        "TaggedAddresses": tagged_addresses(view),
        "Meta": node_meta(view),
    })
}

fn node_meta(view: &MemberView) -> Value {
    json!({ "zone": view.zone, "mesh_address": view.address.to_string() })
}

fn tagged_addresses(view: &MemberView) -> Value {
    let address = view.address.ip().to_string();
    json!({ "lan": address, "wan": address })
}

fn weights(weight: Weight) -> Value {
    let weight = weight.0.div_ceil(WEIGHT_UNIT);
    json!({ "Passing": weight, "Warning": weight })
}

/// An instance that listens on every address is reached on loopback.
fn dialled(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) if address.ip().is_unspecified() => "127.0.0.1".to_owned(),
        SocketAddr::V6(address) if address.ip().is_unspecified() => "::1".to_owned(),
        address => address.ip().to_string(),
    }
}
