//! The program: hands its arguments to [`murmesh::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    murmesh::cli::run(std::env::args_os())
}
