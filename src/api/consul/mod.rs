//! Routes in the shape of Consul's HTTP API, so that its clients find the services of the mesh.
//!
//! What Consul's clients would take for done and this agent does not do is refused, never let pass:
//! checks of other kinds, filters to apply.

mod checks;
mod registration;
pub(super) mod rows;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, body::Body};
use hyper::StatusCode;
use serde_json::Value;

use super::ApiState;
use super::blocking::{Served, Wait};
use super::control::{Control, Lifetime, Maintenance};
use super::problem::Refusal;
use super::routes::{named, whole_body};
use crate::health::CheckResult;
use crate::model::{InstanceId, ServiceName};
use rows::{Narrow, World};

type Answer = Result<Response, Refusal>;
type Pairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// Longest reason of a maintenance, in characters: it is shown in listings.
const REASON_LEN_MAX: usize = 200;

pub(super) async fn agent_self(State(state): State<ApiState>) -> Json<Value> {
    Json(rows::agent_self(&state))
}

pub(super) async fn agent_members(State(state): State<ApiState>) -> Json<Value> {
    Json(rows::agent_members(&state))
}

pub(super) async fn agent_services(State(state): State<ApiState>) -> Json<Value> {
    Json(World::of(&state).agent_services())
}

pub(super) async fn register(State(state): State<ApiState>, request: Request) -> Answer {
    let spec = registration::read(&whole_body(request).await?)?;
    let lifetime = Lifetime::Restarts;
    Control::ask(&state.control, |reply| Control::Expose { spec, lifetime, reply }).await?;
    Ok(done())
}

pub(super) async fn deregister(State(state): State<ApiState>, Path(id): Path<String>) -> Answer {
    let id = named::<InstanceId>(&id)?;
    Control::ask(&state.control, |reply| Control::Unexpose { id, reply }).await?;
    Ok(done())
}

pub(super) async fn maintenance(
    State(state): State<ApiState>,
    Path(id): Path<String>,
    pairs: Pairs,
) -> Answer {
    let id = named::<InstanceId>(&id)?;
    let pairs = read_pairs(pairs)?;
    let value = |name| pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let maintenance = match value("enable") {
        Some("true" | "1") => {
            let reason = value("reason").filter(|reason| !reason.is_empty());
            Maintenance::Begin(reason.map(|reason| {
                reason.chars().filter(|c| !c.is_control()).take(REASON_LEN_MAX).collect()
            }))
        }
        Some("false" | "0") => Maintenance::End,
        _ => return Err(Refusal::malformed("say either ?enable=true or ?enable=false")),
    };
    Control::ask(&state.control, |reply| Control::Maintain { id, maintenance, reply }).await?;
    Ok(done())
}

pub(super) async fn agent_checks(State(state): State<ApiState>) -> Json<Value> {
    Json(World::of(&state).agent_checks())
}

pub(super) async fn pass(state: State<ApiState>, id: Path<String>, pairs: Pairs) -> Answer {
    tell(state, id, pairs, CheckResult::Pass).await
}

pub(super) async fn warn(state: State<ApiState>, id: Path<String>, pairs: Pairs) -> Answer {
    tell(state, id, pairs, CheckResult::Warn).await
}

pub(super) async fn fail(state: State<ApiState>, id: Path<String>, pairs: Pairs) -> Answer {
    tell(state, id, pairs, CheckResult::Fail).await
}

/// The word of an application about a check that it pushes.
async fn tell(
    State(state): State<ApiState>,
    Path(check): Path<String>,
    pairs: Pairs,
    result: CheckResult,
) -> Answer {
    let pairs = read_pairs(pairs)?;
    let note = pairs.into_iter().find(|(key, _)| key == "note").map(|(_, note)| note);
    let output = note.filter(|note| !note.is_empty()).unwrap_or_else(|| match result {
        CheckResult::Pass => "it says that it is well".to_owned(),
        CheckResult::Warn => "it says that something is worth a look".to_owned(),
        CheckResult::Fail => "it says that it fails".to_owned(),
    });
    let told = |reply| Control::TellCheck { check, result, output, reply };
    Control::ask(&state.control, told).await?;
    Ok(done())
}

pub(super) async fn join(State(state): State<ApiState>, Path(address): Path<String>) -> Answer {
    Control::ask(&state.control, |reply| Control::Join { address, reply }).await?;
    Ok(done())
}

/// Consul takes a dead node out; here it is hidden, because nobody but itself can say that it left.
pub(super) async fn force_leave(State(state): State<ApiState>, Path(node): Path<String>) -> Answer {
    Control::ask(&state.control, |reply| Control::Forget { node, reply }).await?;
    Ok(done())
}

pub(super) async fn catalog_services(State(served): State<Served>, pairs: Pairs) -> Answer {
    let asked = Asked::read(pairs)?;
    asked.answer(&served, "services", |world, narrow| world.catalog_services(narrow)).await
}

pub(super) async fn catalog_nodes(State(served): State<Served>, pairs: Pairs) -> Answer {
    let asked = Asked::read(pairs)?;
    asked.answer(&served, "nodes", |world, narrow| world.catalog_nodes(narrow)).await
}

pub(super) async fn catalog_service(
    State(served): State<Served>,
    Path(name): Path<String>,
    pairs: Pairs,
) -> Answer {
    let (name, asked) = (named::<ServiceName>(&name)?, Asked::read(pairs)?);
    let question = format!("service {name}");
    asked.answer(&served, &question, |world, narrow| world.catalog_service(&name, narrow)).await
}

pub(super) async fn health_service(
    State(served): State<Served>,
    Path(name): Path<String>,
    pairs: Pairs,
) -> Answer {
    let (name, asked) = (named::<ServiceName>(&name)?, Asked::read(pairs)?);
    let question = format!("health {name}");
    asked.answer(&served, &question, |world, narrow| world.health_service(&name, narrow)).await
}

/// What a query of the catalogue asks for.
struct Asked {
    narrow: Narrow,
    wait: Option<Wait>,
}

impl Asked {
    /// Reads what is known. What is not known is let pass as Consul lets it pass, except where the
    /// answer would then hold what the client wants to be spared.
    fn read(pairs: Pairs) -> Result<Self, Refusal> {
        let mut narrow = Narrow::default();
        let (mut index, mut wait) = (None, None);
        for (key, value) in read_pairs(pairs)? {
            match key.as_str() {
                "passing" => narrow.is_passing = !matches!(value.as_str(), "false" | "0"),
                "tag" if !value.is_empty() => narrow.tags.push(value),
                "dc" if !value.is_empty() => narrow.datacenter = Some(value),
                "near" if !value.is_empty() => narrow.near = Some(value),
                "index" => index = Some(value),
                "wait" => wait = Some(value),
                "filter" | "node-meta" if !value.is_empty() => {
                    return Err(not_yet(format!("?{key} is not available yet; leave it out")));
                }
                _ => {}
            }
        }
        let wait = Wait::read(index.as_deref(), wait.as_deref())?;
        Ok(Self { narrow, wait })
    }

    async fn answer(
        self,
        served: &Served,
        what: &str,
        look: impl Fn(&World<'_>, &Narrow) -> Value,
    ) -> Answer {
        let question = format!("{what} {:?}", self.narrow);
        served.answer(&question, self.wait, |api| look(&World::of(api), &self.narrow)).await
    }
}

fn read_pairs(pairs: Pairs) -> Result<Vec<(String, String)>, Refusal> {
    pairs.map(|Query(pairs)| pairs).map_err(|error| Refusal::malformed(error.body_text()))
}

fn not_yet(detail: String) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "not_yet", "Not available yet", detail)
}

/// Consul answers its changes with an empty 200.
fn done() -> Response {
    Body::empty().into_response()
}
