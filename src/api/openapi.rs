//! One route with all that is to be said of it, and the document that says it (OpenAPI 3.1).

use axum::handler::Handler;
use axum::routing::{self, MethodRouter};
use hyper::Method;
use serde_json::{Map, Value, json};

use super::blocking::Served;
use super::door::wants_token;

/// What an agent's own words are served as.
const PROBLEM: &str = "application/problem+json";

/// A route: where it is, what it says of itself and who answers.
pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: &'static str,
    summary: &'static str,
    query: &'static [Parameter],
    body: Option<&'static str>,
    pub(super) handler: MethodRouter<Served>,
}

/// What may follow the question mark.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) text: &'static str,
}

macro_rules! route_of_method {
    ($($function:ident $method:ident;)*) => {$(
        /// A route of this method without parameters and body.
        pub(super) fn $function<H: Handler<T, Served>, T: 'static>(
            path: &'static str,
            summary: &'static str,
            handler: H,
        ) -> Route {
            let (method, handler) = (Method::$method, routing::$function(handler));
            Route { method, path, summary, query: &[], body: None, handler }
        }
    )*};
}

route_of_method! {
    get GET;
    put PUT;
    post POST;
    delete DELETE;
}

impl Route {
    /// Takes these parameters, all of them optional.
    pub(super) fn query(self, query: &'static [Parameter]) -> Self {
        Self { query, ..self }
    }

    /// Takes a body of JSON, for instance this one.
    pub(super) fn body(self, example: &'static str) -> Self {
        Self { body: Some(example), ..self }
    }

    fn describe(&self) -> Value {
        let parameter = |name: &str, place: &str, text: &str| {
            json!({
                "name": name,
                "in": place,
                "required": place == "path",
                "description": text,
                "schema": { "type": "string" },
            })
        };
        let segments = self.path.split('/').filter_map(|segment| {
            let name = segment.strip_prefix('{')?.strip_suffix('}')?;
            Some(parameter(name, "path", ""))
        });
        let query = self.query.iter().map(|told| parameter(told.name, "query", told.text));
        let mut operation = json!({
            "summary": self.summary,
            "parameters": segments.chain(query).collect::<Vec<_>>(),
            "responses": {
                "2XX": { "description": "Done, or the answer" },
                "default": { "$ref": "#/components/responses/Problem" },
            },
        });
        if wants_token(&self.method, self.path) {
            operation["security"] = json!([{ "bearer": [] }, { "consul": [] }]);
        }
        if let Some(example) = self.body {
            let example: Value = serde_json::from_str(example).unwrap_or_default();
            let content = json!({ "schema": { "type": "object" }, "example": example });
            operation["requestBody"] = json!({ "content": { "application/json": content } });
        }
        operation
    }
}

/// The document of `routes`.
pub(super) fn document<'r>(routes: impl IntoIterator<Item = &'r Route>) -> Value {
    let mut paths = Map::new();
    for route in routes {
        let operations = paths.entry(route.path).or_insert_with(|| json!({}));
        operations[route.method.as_str().to_ascii_lowercase()] = route.describe();
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "murmesh: the local API of an agent",
            "version": env!("CARGO_PKG_VERSION"),
            "description": DESCRIPTION,
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "consul": { "type": "apiKey", "in": "header", "name": "X-Consul-Token" },
            },
            "responses": {
                "Problem": {
                    "description": "What went wrong and what to try (RFC 9457)",
                    "content": { PROBLEM: { "schema": { "$ref": "#/components/schemas/Problem" } } },
                },
            },
            "schemas": {
                "Problem": {
                    "type": "object",
                    "required": ["type", "title", "status", "detail"],
                    "properties": {
                        "type": { "type": "string", "description": "urn:murmesh:WORD" },
                        "title": { "type": "string" },
                        "status": { "type": "integer" },
                        "detail": { "type": "string" },
                    },
                },
            },
        },
    })
}

const DESCRIPTION: &str = "On loopback and on <data_dir>/api.sock. Every request needs a Host of this \
machine; what changes anything or tells secrets needs the token of <data_dir>/api.token. \
/v1/agent, /v1/catalog and /v1/health have the shape of Consul's API, so that its clients work; they \
tell of the whole mesh, as seen from this agent.\n\n\
Service.Address and Service.Port (ServiceAddress and ServicePort in the catalog) are where programs \
of this machine reach the service through the mesh: its upstream on this machine if one listens on \
TCP, else the instance itself if it runs on this machine, else NAME.mesh with the natural port, which \
this machine's SOCKS5 entry takes and nobody can dial around the mesh. Node.Address is where the \
node's agent is dialled. Datacenter is the region of the node's zone (eu1 of eu1/a), dc1 without one. \
A weight of 1 is murmesh's 100. Rows have no CreateIndex and no ModifyIndex: there is no log.";
