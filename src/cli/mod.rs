//! The command line: one file per verb family. Talks to a running agent through its API only.

mod calls;
mod certs;
mod check;
mod client;
mod curl;
mod debug;
mod demo;
mod exit;
mod found;
mod generate;
mod issuer;
mod later;
mod look;
mod notify;
mod offer;
mod operate;
mod output;
mod run;
mod settings;
mod shell;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Arg, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use exit::{Exit, Failure, Outcome};
use output::{Listing, has_colour, note, print};

const EXAMPLES: &str = "\
A first mesh, on machine 1:
  murmesh init
  murmesh agent                        # in another terminal, or as a service
  murmesh invite                       # prints a token

On machine 2:
  murmesh join TOKEN
  murmesh agent
  murmesh expose web 127.0.0.1:8080    # in another terminal

Back on machine 1:
  murmesh upstream web 127.0.0.1:9000
  curl http://127.0.0.1:9000

Or everything on this machine, to look at: murmesh demo

Exit codes: 0 done, 1 a warning or \"no\", 2 failed, 3 timed out, 64 usage, 69 no agent,
77 not permitted.";

/// A service mesh with nothing in the middle.
#[derive(Debug, Parser)]
#[command(name = "murmesh", version, about, after_help = EXAMPLES)]
#[command(subcommand_required = true, disable_help_subcommand = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Keys, certificates and state [default: /var/lib/murmesh as root, else the XDG data home]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "MURMESH_DATA_DIR",
        hide_env_values = true
    )]
    pub(crate) data_dir: Option<PathBuf>,
    /// The local API [default: where the agent of the data directory says, else 127.0.0.1:7371]
    #[arg(
        long,
        global = true,
        value_name = "ADDR|unix:PATH",
        env = "MURMESH_API",
        hide_env_values = true
    )]
    pub(crate) api: Option<String>,
    #[arg(skip)]
    pub(crate) data_dir_is_env: bool,
    #[arg(skip)]
    pub(crate) api_is_env: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// See a whole mesh on this machine: three agents, traffic, a crash
    Demo(demo::DemoArgs),
    /// Found a mesh, with this machine as its first member
    Init(found::InitArgs),
    /// Print a token with which another machine can join
    Invite(found::InviteArgs),
    /// Join a mesh with a token
    Join(found::JoinArgs),
    /// Run this machine's agent
    Agent(run::AgentArgs),
    /// Offer a local instance of a service to the mesh
    Expose(offer::ExposeArgs),
    /// Take an instance back
    Unexpose(offer::UnexposeArgs),
    /// Open a local entry to a service of the mesh
    Upstream(offer::UpstreamArgs),
    /// Run curl through this machine's gateway
    Curl(curl::CurlArgs),
    /// Show this machine and its mesh on one screen
    Status(Listing),
    /// List the members of the mesh
    Members(Listing),
    /// List the services of the mesh
    Services(Listing),
    /// List the instances of a service
    Endpoints(look::EndpointsArgs),
    /// List instances that fail, or did of late: who says so, since when, and when they are tried next
    Breakers(calls::BreakersArgs),
    /// Call every instance of a service once, and see how long it takes
    Ping(calls::PingArgs),
    /// What would happen to a call: who may take it, in which time, how often it is tried
    Routes(calls::RoutesArgs),
    /// List certificates, and when they end
    Certs(certs::CertsArgs),
    /// Tell what happened
    Events(look::EventsArgs),
    /// Say what is wrong with this machine and its mesh; also without an agent
    Check(check::CheckArgs),
    /// List the ways to the other members
    Net(Listing),
    /// Say what a member may offer; on an issuer
    Grant(issuer::GrantArgs),
    /// Say who may let members in and renew their certificates
    #[command(subcommand)]
    Issuer(issuer::IssuerVerb),
    /// Take this machine or one of its instances out of rotation, and wait until it is empty
    Drain(operate::DrainArgs),
    /// Take an instance out for maintenance
    Maint(operate::MaintArgs),
    /// Wait until this machine's agent or an instance of it is ready or empty
    Wait(operate::WaitArgs),
    /// Make the agent read its configuration files again
    Reload,
    /// Hide a member that is down or left from listings here
    Forget(operate::ForgetArgs),
    /// Leave the mesh for good
    Leave,
    /// Check a configuration file
    Validate(settings::ValidateArgs),
    /// Show effective settings
    #[command(subcommand)]
    Config(settings::ConfigVerb),
    /// Change what the running agent logs
    LogLevel(debug::LogLevelArgs),
    /// Collect what others need to find a fault
    #[command(subcommand)]
    Debug(debug::DebugVerb),
    /// Print files for other programs
    #[command(subcommand)]
    Generate(generate::GenerateVerb),
    /// Print a completion script for a shell
    Completions(shell::CompletionsArgs),
    /// Print the manual as a man page
    Man(shell::ManArgs),
}

/// The parser. A flag that a command refuses is not in its help either.
fn command() -> Command {
    let refused = [("init", &["api"][..]), ("join", &["api"]), ("demo", &["api", "data_dir"])];
    refused.into_iter().fold(Cli::command(), |whole, (verb, flags)| {
        let is_refused = |flag: &&Arg| flags.contains(&flag.get_id().as_str());
        let flags: Vec<_> = whole.get_arguments().filter(is_refused).cloned().collect();
        whole.mut_subcommand(verb, |verb| verb.args(flags.into_iter().map(|flag| flag.hide(true))))
    })
}

/// Runs the command line `arguments`, of which the first is the program's name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.len() < 2 {
        note(command().render_help().to_string().trim_end());
        return Exit::Usage.into();
    }
    let outcome = match parse(arguments) {
        Ok(Some(cli)) => start(cli),
        Ok(None) => Ok(Exit::Ok),
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => {
            note(&failure);
            failure.exit.into()
        }
    }
}

/// `None` when help or version was all that was asked for.
fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Cli>, Failure> {
    let parsed = command().try_get_matches_from(arguments).and_then(|matches| {
        let mut cli = Cli::from_arg_matches(&matches)?;
        let is_env = |name| matches.value_source(name) == Some(ValueSource::EnvVariable);
        cli.global.data_dir_is_env = is_env("data_dir");
        cli.global.api_is_env = is_env("api");
        Ok(cli)
    });
    match parsed {
        Ok(cli) => takes_what_was_told(&cli).map(|()| Some(cli)),
        Err(error) if !error.use_stderr() => {
            let text = error.render();
            match has_colour() {
                true => print(text.ansi()),
                false => print(text),
            }
            .map(|_| None)
        }
        Err(error) => Err(later::not_yet(&error).unwrap_or_else(|| {
            let text = error.render().to_string();
            Failure::usage(plain(text.trim_start_matches("error: ").trim_end()))
        })),
    }
}

/// The parser writes where a value belongs as its usage line does: `for '[NAME]'`, `for '<ID>'`,
/// `for '--ttl <TIME>'`. People read the place: `for NAME`, `for ID`, `for --ttl`.
fn plain(text: &str) -> String {
    let Some((before, rest)) = text.split_once("' for '") else { return text.to_owned() };
    let Some((place, after)) = rest.split_once('\'') else { return text.to_owned() };
    let place = match place.split_once(' ') {
        Some((flag, _)) if flag.starts_with('-') => flag,
        _ => place.trim_matches(['[', ']', '<', '>', '.']),
    };
    format!("{before}' for {place}{after}")
}

/// Every flag that is taken means something. What is set in the environment is for other commands.
fn takes_what_was_told(cli: &Cli) -> Result<(), Failure> {
    let is_told = |is_some: bool, is_env: bool| is_some && !is_env;
    let Global { api, api_is_env, data_dir, data_dir_is_env } = &cli.global;
    let api = is_told(api.is_some(), *api_is_env);
    let data_dir = is_told(data_dir.is_some(), *data_dir_is_env);
    match &cli.verb {
        Verb::Init(_) | Verb::Join(_) if api => {
            let message = "--api says where an agent answers, and this command starts none";
            Err(Failure::usage(message).hint("murmesh agent --api ADDR, or 'api' under [listen]"))
        }
        Verb::Demo(_) if api || data_dir => {
            let message = "the demo chooses its own addresses and directories";
            Err(Failure::usage(message).hint("murmesh demo, without --api and --data-dir"))
        }
        _ => Ok(()),
    }
}

/// A time on the command line.
fn duration(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|_| "expected a duration with a unit, for instance 30m or 7d".to_owned())?;
    match time.is_zero() {
        true => Err("expected more than nothing, for instance 30s".to_owned()),
        false => Ok(time),
    }
}

/// A number on the command line, from `least` to `most`.
fn number<T: TryFrom<u64>>(
    least: u64,
    most: u64,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync {
    move |text| {
        let read = text.parse().ok().filter(|number| (least..=most).contains(number));
        let read = read.and_then(|number| T::try_from(number).ok());
        read.ok_or_else(|| format!("expected a whole number from {least} to {most}"))
    }
}

fn start(cli: Cli) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("cannot start: {error}")))?;
    let outcome = runtime.block_on(answer(cli));
    // A name that is still being resolved must not hold up the end.
    runtime.shutdown_background();
    outcome
}

async fn answer(cli: Cli) -> Outcome {
    let global = &cli.global;
    match cli.verb {
        Verb::Demo(args) => demo::run(args).await,
        Verb::Init(args) => found::init(global, args).await,
        Verb::Invite(args) => found::invite(global, args).await,
        Verb::Join(args) => found::join(global, args).await,
        Verb::Agent(args) => run::agent(global, args).await,
        Verb::Expose(args) => offer::expose(global, args).await,
        Verb::Unexpose(args) => offer::unexpose(global, args).await,
        Verb::Upstream(args) => offer::upstream(global, args).await,
        Verb::Curl(args) => curl::curl(global, args).await,
        Verb::Status(listing) => look::status(global, listing).await,
        Verb::Members(listing) => look::members(global, listing).await,
        Verb::Services(listing) => look::services(global, listing).await,
        Verb::Endpoints(args) => look::endpoints(global, args).await,
        Verb::Breakers(args) => calls::breakers(global, args).await,
        Verb::Ping(args) => calls::ping(global, args).await,
        Verb::Routes(args) => calls::routes(global, args).await,
        Verb::Certs(args) => certs::certs(global, args).await,
        Verb::Events(args) => look::events(global, args).await,
        Verb::Check(args) => check::check(global, args).await,
        Verb::Net(listing) => check::net(global, listing).await,
        Verb::Grant(args) => issuer::grant(global, args).await,
        Verb::Issuer(verb) => issuer::issuer(global, verb).await,
        Verb::Drain(args) => operate::drain(global, args).await,
        Verb::Maint(args) => operate::maint(global, args).await,
        Verb::Wait(args) => operate::wait(global, args).await,
        Verb::Reload => operate::reload(global).await,
        Verb::Forget(args) => operate::forget(global, args).await,
        Verb::Leave => offer::leave(global).await,
        Verb::Validate(args) => settings::validate(&args),
        Verb::Config(verb) => settings::config(global, verb).await,
        Verb::LogLevel(args) => debug::log_level(global, args).await,
        Verb::Debug(verb) => debug::debug(global, verb).await,
        Verb::Generate(verb) => generate::generate(global, verb),
        Verb::Completions(args) => shell::completions(command(), &args),
        Verb::Man(args) => shell::man(command(), &args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_that_is_refused_is_not_in_the_help() {
        for (verb, hidden, shown) in [
            ("init", "--api", "--data-dir"),
            ("join", "--api", "--data-dir"),
            ("demo", "--api", "--for"),
            ("demo", "--data-dir", "--for"),
            ("expose", "--gateway", "--api"),
        ] {
            let mut command = command();
            command.build();
            let help = command.find_subcommand_mut(verb).unwrap().render_long_help().to_string();
            assert!(!help.contains(hidden) && help.contains(shown), "{help}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn verbs_and_flags_of_later_versions_say_so() {
        let refused = |words: &str| {
            let words = words.split(' ').map(OsString::from);
            let failure = parse(words).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            failure.to_string()
        };
        let later = "stat top tap-web edges \
                     explain-web policy-list \
                     split-web switch-web canary-web fault-web limit-web revoke-a rotate-node \
                     operator-list record replay sim-x";
        for words in later.split_whitespace().map(|words| words.replace('-', " ")) {
            let told = refused(&format!("murmesh {words}"));
            assert!(told.contains("not available yet"), "{words}: {told}");
        }
        for words in ["allow", "deny", "renew", "dashboard"] {
            let told = refused(&format!("murmesh {words}"));
            assert!(told.contains("unrecognized"), "{words}: {told}");
        }
        for words in [
            "murmesh init --deny",
            "murmesh invite --client",
            "murmesh agent --dns 127.0.0.1:53",
            "murmesh expose a 1 --allow b",
        ] {
            assert!(refused(words).contains("not available yet"), "{words}: {}", refused(words));
        }
        assert!(!refused("murmesh memers").contains("not available yet"));
        assert!(refused("murmesh memers").contains("members"), "a suggestion stays");
    }

    #[test]
    fn errors_of_the_parser_name_place_and_value() {
        for (words, place, value) in [
            ("expose Web 80", "for NAME:", "'Web'"),
            ("expose web :80", "for ADDR:", "':80'"),
            ("expose web 80 --weight x", "for --weight:", "'x'"),
            ("events --since 5", "for --since:", "'5'"),
            ("invite revoke 12", "for ID:", "'12'"),
            ("init --advertise x", "for --advertise:", "'x'"),
            ("agent --seed a:b", "for --seed:", "'a:b'"),
        ] {
            let words = ["murmesh"].into_iter().chain(words.split(' ')).map(OsString::from);
            let told = parse(words).unwrap_err().to_string();
            assert!(told.contains(place) && told.contains(value), "{told}");
            assert!(!told.contains(['[', '<']), "{told}");
        }
    }

    #[test]
    fn a_flag_without_a_meaning_is_refused() {
        for words in ["init --api 127.0.0.1:1", "join t --api 127.0.0.1:1", "demo --data-dir x"] {
            let words = ["murmesh"].into_iter().chain(words.split(' ')).map(OsString::from);
            assert_eq!(parse(words).unwrap_err().exit, Exit::Usage);
        }
    }
}
