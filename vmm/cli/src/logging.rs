//! The log: standard error or a file, warnings unless more is asked for, never standard output.

use std::fs::OpenOptions;
use std::sync::Mutex;

use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::LogArgs;
use crate::exit::Failure;

/// Log from now on.
pub(crate) fn start(args: &LogArgs) -> Result<(), Failure> {
    let (ours, others) = match args.verbose {
        0 => (Level::WARN, Level::ERROR),
        1 => (Level::INFO, Level::WARN),
        2 => (Level::DEBUG, Level::INFO),
        _ => (Level::TRACE, Level::DEBUG),
    };
    let filter = Targets::new().with_default(others).with_target("umbra", ours);
    let registry = tracing_subscriber::registry().with(filter);
    match &args.log_file {
        None => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            let layer = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(ansi);
            registry.with(layer).init();
        }
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            let file = file.map_err(Failure::on(format!("log-file: {}", path.display())))?;
            registry
                .with(
                    tracing_subscriber::fmt::layer()
                        .with_writer(Mutex::new(file))
                        .with_ansi(false),
                )
                .init();
        }
    }
    Ok(())
}
