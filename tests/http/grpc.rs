//! gRPC with a client and a server in another language.

use std::path::PathBuf;
use std::process::Command;

use super::{H2, H2_CLIENT, PythonServer, Stage, run_python};
use crate::support::{Program, SOON, beside_others, check, eventually, python};

const SERVER: &str = include_str!("grpc_server.py");
const CLIENT: &str = include_str!("grpc_client.py");

/// Servers of these names behind two agents; their directory is gone last.
struct Grpc {
    python: PathBuf,
    stage: Stage,
    servers: Vec<PythonServer>,
    _home: tempfile::TempDir,
}

impl Grpc {
    fn of(names: &[&str]) -> Option<Self> {
        Self::with(names, &[])
    }

    /// Servers that were given these arguments, too.
    fn with(names: &[&str], more: &[&str]) -> Option<Self> {
        let python = python(&["grpcio==1.76.0", H2])?;
        let home = tempfile::tempdir().expect("a directory");
        let start = |name: &&str| {
            PythonServer::start(&python, home.path(), SERVER, &[&[*name], more].concat())
        };
        let servers: Vec<_> = names.iter().map(start).collect();
        let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
        let stage = Stage::of("grpc", &addresses);
        Some(Self { python, stage, servers, _home: home })
    }

    #[track_caller]
    fn call(&self, what: &str, arguments: &[&str]) -> String {
        let entry = self.stage.entry.to_string();
        run_python(&self.python, CLIENT, &[&[what, &entry], arguments].concat())
    }
}

#[test]
fn all_four_kinds_of_calls_work_with_metadata_trailers_and_status() {
    let _turn = beside_others();
    let Some(grpc) = Grpc::of(&["one"]) else { return };
    let said = grpc.call("kinds", &[]);
    let expected = "unary one hello one 5\nlarge True\ndownload True\nupload 1000000\nboth True\n\
                    status FAILED_PRECONDITION not today: ä 42\n";
    assert_eq!(said, expected);
    assert_eq!(grpc.stage.exchanges("failure"), 0.0, "a status is an answer");
}

#[test]
fn deadline_and_cancellation_of_the_client_reach_the_server() {
    let _turn = beside_others();
    let Some(grpc) = Grpc::of(&["one"]) else { return };
    assert_eq!(grpc.call("deadline", &[]), "DEADLINE_EXCEEDED at once\n");
    grpc.servers[0].wait_for("slow deadline"); // it was told how much time there is
    grpc.servers[0].wait_for("ended early");
    assert_eq!(grpc.call("cancel", &[]), "FIRST\nCANCELLED\n");
    grpc.servers[0].wait_for("both cut");
}

#[test]
fn small_messages_that_a_client_does_not_read_end_no_call_and_delay_no_neighbour() {
    let _turn = beside_others();
    let Some(grpc) = Grpc::of(&["one"]) else { return };
    let mut unread = Command::new(&grpc.python);
    let entry = grpc.stage.entry.to_string();
    unread.args(["-c", H2_CLIENT, "unread", &entry]);
    let _unread = Program::start(&mut unread);
    grpc.servers[0].wait_for("download 20000"); // what nobody takes is full by and by
    assert_eq!(grpc.call("many", &["200"]), "200\n");
    assert_eq!(grpc.stage.a().events("request_failed").len(), 0);
    assert_eq!(grpc.stage.exchanges("failure"), 0.0);
}

#[test]
fn refusal_of_the_mesh_is_a_status_that_a_client_of_grpc_understands() {
    let _turn = beside_others();
    let Some(mut grpc) = Grpc::of(&["one"]) else { return };
    let late = grpc.call("limited", &[]);
    assert!(late.starts_with("DEADLINE_EXCEEDED web: "), "{late}");
    grpc.servers.clear(); // nobody listens any more
    let gone = grpc.call("refused", &[]);
    assert!(gone.starts_with("UNAVAILABLE unreachable web: "), "{gone}");
}

#[test]
fn calls_on_one_connection_spread_evenly_over_all_instances() {
    let _turn = beside_others();
    let Some(mut grpc) = Grpc::of(&["1", "2", "3", "4"]) else { return };
    grpc.stage.balance("least_request"); // by latency the slower ones would have less
    let said = grpc.call("many", &["4000"]);
    let shares: Vec<u32> = said.split_whitespace().map(|share| share.parse().unwrap()).collect();
    assert!(shares.len() == 4, "{said}");
    assert!(shares.iter().all(|share| (900..=1_100).contains(share)), "{said}");
}

/// How many calls of some seconds went well, and how many their server cancelled; no other may have
/// failed.
#[track_caller]
fn well_or_cancelled(said: &str) -> (u32, u32) {
    let words: Vec<_> = said.trim().splitn(3, ' ').collect();
    let [well, cancelled, "{}"] = words[..] else { panic!("{said}") };
    (well.parse().expect("a number"), cancelled.parse().expect("a number"))
}

#[test]
fn no_call_fails_while_servers_send_their_connections_away() {
    let _turn = beside_others();
    let Some(grpc) = Grpc::with(&["1", "2"], &["300"]) else { return };
    let (calls, cancelled) = well_or_cancelled(&grpc.call("steady", &["4"]));
    assert!(calls >= 100 && cancelled == 0, "{calls} well, {cancelled} cancelled");
    let opened = grpc.stage.b().metric("murmesh_requests_total", &["inbound"]);
    assert!(opened >= 8.0, "{opened} connections to servers that keep none for long");
    assert_eq!(grpc.stage.exchanges("failure"), 0.0);
}

/// A server of grpcio that stops cancels what comes in that very moment, whoever calls it: that is its
/// own answer, and no call may be repeated that has one.
#[test]
fn no_call_is_lost_while_a_server_stops_in_order() {
    let _turn = beside_others();
    let Some(grpc) = Grpc::of(&["1", "2"]) else { return };
    std::thread::scope(|scope| {
        let calls = scope.spawn(|| well_or_cancelled(&grpc.call("steady", &["4"])));
        eventually("both are called", SOON, || {
            let success = grpc.stage.exchanges("success");
            check(success >= 100.0, success)
        });
        grpc.servers[0].stop();
        grpc.servers[0].wait_for("stopped");
        let (calls, cancelled) = calls.join().unwrap();
        assert!(calls >= 100 && cancelled <= 8, "{calls} well, {cancelled} cancelled");
    });
}

/// Often enough to open a breaker, if it were a failure.
#[test]
fn method_that_a_server_does_not_have_says_nothing_against_it() {
    let _turn = beside_others();
    let Some(grpc) = Grpc::of(&["one"]) else { return };
    assert_eq!(grpc.call("unknown", &["30"]), "UNIMPLEMENTED None\n");
    assert_eq!(grpc.stage.a().get("/v1/mesh/breakers"), serde_json::json!([]));
    assert_eq!(grpc.stage.exchanges("failure"), 0.0);
    grpc.stage.b().run(&["unexpose", "web-0"]).ok();
    grpc.stage.a().wait_endpoints("web", 0);
    assert_eq!(grpc.call("unknown", &["1"]), "UNIMPLEMENTED unknown_service\n");
}
