//! The binary: arguments, the composition root, commands.
//!
//! Exit codes: 0 did it, 1 the answer is "no", 2 could not run, 64 bad usage.

mod args;
mod components;
mod down;
mod exec;
mod fabric;
mod image;
mod plan;
mod publish;
mod state;
mod status;
mod up;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::args::{Cli, Command};
use crate::state::Paths;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    match run(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("portolan: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Up(args) => return up::run(args).map(|()| 0),
        Command::Down(args) => down::run(&args)?,
        Command::Status(args) => return runtime(1)?.block_on(status::run(&args)),
        Command::Kubeconfig(args) => {
            println!("{}", Paths::new(&args.name).running()?.kubeconfig.display());
        }
        Command::Exec(args) => match exec::run(&Paths::new(&args.named.name), &args.place, &args.command)? {},
        Command::Image(args) => image::run(args)?,
        Command::Proxy(args) => runtime(2)?.block_on(components::proxy(args))?,
        Command::Dns(args) => runtime(1)?.block_on(components::dns(args))?,
        Command::Gateway(args) => runtime(1)?.block_on(components::gateway(args))?,
        Command::Controller(args) => runtime(2)?.block_on(components::controller(args))?,
        Command::Lb(args) => runtime(1)?.block_on(components::lb(args))?,
        Command::Apiserver(args) => runtime(2)?.block_on(components::apiserver(args))?,
        Command::Plan(args) => runtime(1)?.block_on(plan::run(args))?,
        Command::Echo(args) => runtime(1)?.block_on(components::echo(args))?,
    }
    Ok(0)
}

/// A tokio runtime with so many workers; 1 keeps everything on the calling thread.
fn runtime(workers: usize) -> Result<tokio::runtime::Runtime> {
    let mut builder = if workers <= 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(workers);
        builder
    };
    builder.enable_all().build().context("cannot start the runtime")
}
