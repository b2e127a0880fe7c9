//! `completions`, `man`: for shells and manuals.

use clap::{Args, Command};
use clap_complete::Shell;

use super::exit::{Exit, Failure, Outcome};
use super::output::print;

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The page of one command; the whole manual without
    verb: Option<String>,
}

/// Prints a completion script.
pub(super) fn completions(mut command: Command, args: &CompletionsArgs) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "murmesh", &mut script);
    print(String::from_utf8_lossy(&script))?;
    Ok(Exit::Ok)
}

/// Prints a manual page.
pub(super) fn man(mut command: Command, args: &ManArgs) -> Outcome {
    command.build();
    let page = match &args.verb {
        None => command,
        Some(verb) => match command.find_subcommand(verb) {
            Some(found) => found.clone(),
            None => return Err(Failure::usage(format!("there is no command '{verb}'"))),
        },
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text).map_err(Failure::failed)?;
    print(String::from_utf8_lossy(&text))?;
    Ok(Exit::Ok)
}
