//! `--config FILE` and `--print-config`: what the command line says, kept in a file.
//!
//! The file is TOML, and its names are the options' names; there is no second set of names to learn and none that can
//! be forgotten when an option is added. A list of `key=value` is written as on the command line or as a table, an
//! option that repeats is an array:
//!
//! ```toml
//! kernel = "vmlinux"
//! cmdline = "console=ttyS0"
//! cpus = 2                                     # as --cpus 2
//! memory = { size = "1G", shared = true }      # as --memory size=1G,shared=on
//! listen = ["quic:192.0.2.1:7000", "quic:198.51.100.1:7000"]
//! ```
//!
//! A file is turned into the words that say the same on a command line, which clap then reads: every value is checked in
//! one place, with one wording. What the command line itself says wins: an option given there replaces all of that
//! option's values in the file.

use core::fmt;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches};
use toml::{Table, Value};

use crate::args::Cli;
use crate::limits;

/// The commands that describe a process, and so may be kept in a file.
const COMMANDS: [&str; 3] = ["run", "restore", "shadow"];
/// Options that mean nothing in a file.
const NOT_IN_A_FILE: [&str; 4] = ["config", "print_config", "help", "version"];

/// What the command line and its file together ask for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// This.
    Command(Box<Cli>),
    /// To print this instead of doing it.
    Print(String),
}

/// Why they do not ask for anything.
#[derive(Debug)]
pub(crate) enum Unread {
    /// The command line is wrong, or asks for help: clap says it.
    Line(clap::Error),
    /// The file is wrong: one line that names it.
    File(String),
}

/// Read the command line `words`, program name first, and the file that it may name.
pub(crate) fn read(words: Vec<OsString>) -> Result<Asked, Unread> {
    let file = File::named_by(&words)?;
    let mut all = words;
    if let Some(file) = &file {
        all.extend(file.words.iter().map(OsString::from));
    }
    let blame = |error| match &file {
        Some(file) => file.blame(error),
        None => Unread::Line(error),
    };
    let matches = Cli::command().try_get_matches_from(all).map_err(blame)?;
    if let Some((name, command)) = matches.subcommand()
        && COMMANDS.contains(&name)
        && command.get_flag("print_config")
    {
        return Ok(Asked::Print(print(name, command)));
    }
    let cli = Cli::from_arg_matches(&matches).map_err(Unread::Line)?;
    Ok(Asked::Command(Box::new(cli)))
}

/// A file, as words for a command line.
struct File {
    path: PathBuf,
    words: Vec<String>,
    /// The options that those words give, as `--name`.
    options: Vec<String>,
}

impl File {
    /// The file that `words` name, if they do.
    fn named_by(words: &[OsString]) -> Result<Option<Self>, Unread> {
        // What is missing may be in the file, and what is wrong is found again when everything is read.
        let Ok(matches) = Cli::command().ignore_errors(true).try_get_matches_from(words) else {
            return Ok(None);
        };
        let Some((name, given)) = matches.subcommand().filter(|(name, _)| COMMANDS.contains(name)) else {
            return Ok(None);
        };
        let Some(path) = given.get_one::<PathBuf>("config") else {
            return Ok(None);
        };
        Self::open(path, name, given)
            .map(Some)
            .map_err(|why| Unread::File(format!("{}: {why}", path.display())))
    }

    fn open(path: &Path, name: &str, given: &ArgMatches) -> Result<Self, String> {
        use std::io::Read as _;

        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(|error| format!("cannot read it: {error}"))?;
        file.take(limits::CONFIG_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|error| format!("cannot read it: {error}"))?;
        if text.len() as u64 > limits::CONFIG_BYTES {
            return Err(format!("expected at most {} bytes", limits::CONFIG_BYTES));
        }
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let line = text[..error.span().map_or(0, |span| span.start.min(text.len()))]
                .lines()
                .count()
                .max(1);
            format!("line {line}: {}", error.message().lines().next().unwrap_or("not TOML"))
        })?;
        Self::of(path, &table, name, given)
    }

    fn of(path: &Path, table: &Table, name: &str, given: &ArgMatches) -> Result<Self, String> {
        let options = options(name);
        let mut file = Self {
            path: path.to_owned(),
            words: Vec::new(),
            options: Vec::new(),
        };
        for (key, value) in table {
            let option = options.iter().find(|option| option.get_long() == Some(key.as_str()));
            let Some(option) = option else {
                let names: Vec<_> = options.iter().filter_map(Arg::get_long).collect();
                return Err(format!("key: expected one of {}, got '{key}'", names.join(", ")));
            };
            if given.value_source(option.get_id().as_str()) != Some(ValueSource::CommandLine) {
                file.words.extend(words(key, option, value)?);
                file.options.push(format!("--{key}"));
            }
        }
        Ok(file)
    }

    /// Whose fault an error is: the file's, if it is about an option that the file gave.
    fn blame(&self, error: clap::Error) -> Unread {
        let Some(ContextValue::String(about)) = error.get(ContextKind::InvalidArg) else {
            return Unread::Line(error);
        };
        let option = about.split([' ', '=']).next().unwrap_or(about);
        if !self.options.iter().any(|ours| ours == option) {
            return Unread::Line(error);
        }
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        let line = line.strip_prefix("error: ").unwrap_or(line);
        Unread::File(format!("{}: {line}", self.path.display()))
    }
}

/// The options of a command that a file may give.
fn options(name: &str) -> Vec<Arg> {
    let mut all = Cli::command();
    all.build();
    let command = all.find_subcommand(name).expect("COMMANDS are commands");
    command
        .get_arguments()
        .filter(|option| option.get_long().is_some() && !NOT_IN_A_FILE.contains(&option.get_id().as_str()))
        .cloned()
        .collect()
}

/// What `key = value` is on a command line.
fn words(key: &str, option: &Arg, value: &Value) -> Result<Vec<String>, String> {
    let bad = |expected: &str| Err(format!("{key}: expected {expected}, got {}", Kind(value)));
    match (option.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(yes)) => Ok(yes.then(|| format!("--{key}")).into_iter().collect()),
        (ArgAction::SetTrue, _) => bad("true or false"),
        (ArgAction::Count, Value::Integer(n @ 0..=9)) => Ok((0..*n).map(|_| format!("--{key}")).collect()),
        (ArgAction::Count, _) => bad("a number from 0 to 9"),
        (ArgAction::Append, Value::Array(values)) => values.iter().map(|value| word(key, value)).collect(),
        _ => Ok(vec![word(key, value)?]),
    }
}

/// One value, as one word.
fn word(key: &str, value: &Value) -> Result<String, String> {
    let text = match value {
        Value::Table(fields) => {
            let mut parts = Vec::with_capacity(fields.len());
            for (name, value) in fields {
                let within = format!("{key}.{name}");
                let text = plain(value)
                    .ok_or_else(|| format!("{within}: expected text, a number, true or false, got {}", Kind(value)))?;
                if text.contains(',') {
                    return Err(format!("{within}: expected text without a comma, got '{text}'"));
                }
                parts.push(format!("{name}={text}"));
            }
            parts.join(",")
        }
        value => plain(value).ok_or_else(|| format!("{key}: expected one value or a table, got {}", Kind(value)))?,
    };
    Ok(format!("--{key}={text}"))
}

/// A value without parts, as on the command line.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(true) => Some("on".to_owned()),
        Value::Boolean(false) => Some("off".to_owned()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// What kind of value it is, for an error.
struct Kind<'a>(&'a Value);

impl fmt::Display for Kind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let article = match self.0 {
            Value::Integer(_) | Value::Array(_) => "an",
            _ => "a",
        };
        write!(f, "{article} {}", self.0.type_str())
    }
}

/// Everything that a command was asked to do, defaults included, as a file that asks for the same.
fn print(name: &str, given: &ArgMatches) -> String {
    let mut table = Table::new();
    for option in options(name) {
        let (Some(key), id) = (option.get_long(), option.get_id().as_str()) else {
            continue;
        };
        let value = match option.get_action() {
            ArgAction::SetTrue => Some(Value::Boolean(given.get_flag(id))),
            ArgAction::Count => Some(Value::Integer(given.get_count(id).into())),
            action => {
                let mut values = given
                    .get_raw(id)
                    .into_iter()
                    .flatten()
                    .map(|text| Value::String(text.to_string_lossy().into_owned()));
                match action {
                    ArgAction::Append => given.contains_id(id).then(|| Value::Array(values.collect())),
                    _ => values.next(),
                }
            }
        };
        if let Some(value) = value {
            table.insert(key.to_owned(), value);
        }
    }
    toml::to_string(&table).expect("a table of plain values is TOML")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, Cpus, RunArgs};

    /// Read `line` with a file of this content, named where the line says FILE.
    fn read_with(content: &str, line: &str) -> Result<Asked, Unread> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("guest.toml");
        std::fs::write(&path, content).unwrap();
        let line = line.replace("FILE", path.to_str().unwrap());
        read(line.split_whitespace().map(OsString::from).collect())
    }

    fn run(content: &str, line: &str) -> RunArgs {
        match read_with(content, line) {
            Ok(Asked::Command(cli)) => match cli.command {
                Command::Run(args) => args,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    /// What an operator reads, without the directory of the file.
    fn error(content: &str, line: &str) -> String {
        let text = match read_with(content, line) {
            Err(Unread::File(text)) => text,
            Err(Unread::Line(error)) => error.to_string().lines().next().unwrap().to_owned(),
            Ok(asked) => panic!("{asked:?}"),
        };
        assert!(!text.contains('\n'), "{text}");
        match text.split_once("guest.toml") {
            Some((_, rest)) => format!("FILE{rest}"),
            None => text,
        }
    }

    #[test]
    fn a_file_says_what_the_command_line_would_and_the_command_line_wins() {
        let content = "kernel = \"k\"\ncpus = 4\npaused = true\nverbose = 2\n\
                       memory = { size = \"1G\", shared = false }\ncmdline = \"a=b,c --d\"\n";
        let args = run(content, "umbra run --config FILE");
        assert_eq!((args.cpus, args.paused), (Cpus::plain(4), true));
        assert_eq!((args.memory.size.0, args.memory.shared), (1 << 30, false));
        assert_eq!(args.cmdline, "a=b,c --d");
        let args = run(content, "umbra run --cpus 2 --config FILE --memory 2G");
        assert_eq!(
            (args.cpus, args.memory.size.0, args.memory.shared),
            (Cpus::plain(2), 2 << 30, true)
        );
    }

    #[test]
    fn an_option_given_on_the_command_line_replaces_all_its_values_in_the_file() {
        let content = "listen = [\"quic:127.0.0.1:1\", \"quic:127.0.0.1:2\"]\npeer = \"p\"\n";
        let listens = |line: &str| match read_with(content, line) {
            Ok(Asked::Command(cli)) => match cli.command {
                Command::Shadow(args) => args.listen.len(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        assert_eq!(listens("umbra shadow --config FILE"), 2);
        assert_eq!(listens("umbra shadow --config FILE --listen quic:127.0.0.1:3"), 1);
    }

    #[test]
    fn what_is_printed_asks_for_the_same_again() {
        let first = match read_with(
            "kernel = \"k\"\nmemory = { size = \"1G\" }\n",
            "umbra run --print-config --config FILE --cpus boot=3 --name web",
        ) {
            Ok(Asked::Print(text)) => text,
            other => panic!("{other:?}"),
        };
        assert!(
            first.contains("cpus = \"boot=3\"") && first.contains("serial = \"stdio\""),
            "{first}"
        );
        let second = match read_with(&first, "umbra run --print-config --config FILE") {
            Ok(Asked::Print(text)) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(first, second);
        assert_eq!(run(&first, "umbra run --config FILE").cpus, Cpus::plain(3));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_one_line_that_names_it_and_the_option() {
        let line = "umbra run --config FILE";
        for (content, expected) in [
            ("kernel = \"k\"\ncpus = 0\n", "FILE: invalid value '0' for '--cpus <"),
            ("kernel = \"k\"\nkernels = 1\n", "FILE: key: expected one of kernel, "),
            (
                "kernel = [1]\n",
                "FILE: kernel: expected one value or a table, got an array",
            ),
            (
                "kernel = \"k\"\npaused = 1\n",
                "FILE: paused: expected true or false, got an integer",
            ),
            (
                "kernel = \"k\"\nmemory = { size = [1] }\n",
                "FILE: memory.size: expected text, a number, true or false, got an array",
            ),
            (
                "kernel = \"k\"\nmemory = { size = \"1,2\" }\n",
                "FILE: memory.size: expected text without a comma, got '1,2'",
            ),
            ("a = 1\n\nkernel = \n", "FILE: line 3: "),
            ("config = \"other\"\n", "FILE: key: expected one of "),
            (
                "kernel = 1979-05-27\n",
                "FILE: kernel: expected one value or a table, got a datetime",
            ),
        ] {
            let got = error(content, line);
            assert!(got.starts_with(expected), "{got}");
        }
        assert!(error("", "umbra run --config FILE.not").contains("cannot read it"));
        let big = "#".repeat(usize::try_from(limits::CONFIG_BYTES).unwrap() + 1);
        assert!(error(&big, line).contains("expected at most"));
        // What is wrong on the command line is not the file's fault.
        assert!(error("kernel = \"k\"\n", "umbra run --config FILE --cpus 0").starts_with("error: invalid value '0'"));
    }

    #[test]
    fn the_examples_that_come_with_the_program_are_understood() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../resources/configs");
        let mut read_all = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let words = ["umbra", "run", "--config", path.to_str().unwrap()];
                match read(words.map(OsString::from).into()) {
                    Ok(Asked::Command(_)) => read_all += 1,
                    other => panic!("{}: {other:?}", path.display()),
                }
            }
        }
        assert!(read_all >= 2, "{read_all} examples");
    }

    #[test]
    fn what_neither_gives_is_asked_for_by_name() {
        let Err(Unread::Line(error)) = read_with("cpus = 1\n", "umbra run --config FILE") else {
            panic!("a guest without a kernel")
        };
        assert!(error.to_string().contains("--kernel"), "{error}");
    }
}
