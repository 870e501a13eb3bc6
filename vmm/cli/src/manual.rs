//! `umbra completions` and `umbra man`: what a package installs beside the program.

use clap::CommandFactory;

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::exit::{Code, Failure};

/// Print a completion script.
pub(crate) fn completions(args: &CompletionsArgs) -> Code {
    clap_complete::generate(args.shell, &mut Cli::command(), "umbra", &mut std::io::stdout());
    Code::Success
}

/// Print a manual page.
pub(crate) fn man(args: &ManArgs) -> Result<Code, Failure> {
    let mut command = Cli::command();
    command.build();
    if let Some(name) = &args.command {
        let found = command.find_subcommand(name).cloned();
        let names: Vec<_> = command
            .get_subcommands()
            .map(|command| command.get_name().to_owned())
            .collect();
        let expected = || Failure::arguments(format!("command: expected one of {}, got '{name}'", names.join(", ")));
        command = found.ok_or_else(expected)?;
    }
    clap_mangen::Man::new(command)
        .render(&mut std::io::stdout())
        .map_err(Failure::on("standard output"))?;
    Ok(Code::Success)
}
