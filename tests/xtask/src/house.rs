//! Where everything is, and how cargo is asked for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// What went well, or one line that says what did not.
pub(crate) type Outcome<T> = Result<T, String>;

/// The checkout this program was started from.
#[derive(Debug)]
pub(crate) struct House {
    /// The folder with the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
}

/// What the checks need to know of a workspace member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Room {
    /// The package's name.
    pub(crate) name: String,
    /// Its folder, relative to the root.
    pub(crate) folder: String,
    /// Workspace members among its normal and build dependencies, optional ones included.
    pub(crate) uses: BTreeSet<String>,
    /// Every package in a build of this crate alone, with its default features; dev-dependencies left out.
    pub(crate) reaches: BTreeSet<String>,
    /// The root file of each library and program, relative to the workspace's root.
    pub(crate) roots: Vec<String>,
}

impl House {
    /// Found through cargo, which sets `CARGO_MANIFEST_DIR` for whatever it runs or tests. Asked at run time, because a
    /// path compiled in would go on naming the old place after the checkout has moved.
    pub(crate) fn find() -> Outcome<Self> {
        let here =
            env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set: run this as `cargo xtask ...`")?;
        match Path::new(&here).ancestors().nth(2) {
            Some(root) if root.join("Cargo.lock").exists() => Ok(Self { root: root.to_owned() }),
            _ => Err(format!(
                "{} is not in a workspace's second level",
                Path::new(&here).display()
            )),
        }
    }

    /// A path below the root.
    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The text of a file below the root.
    pub(crate) fn read(&self, relative: &str) -> Outcome<String> {
        let path = self.path(relative);
        std::fs::read_to_string(&path).map_err(|error| format!("cannot read {relative}: {error}"))
    }

    /// Where cargo puts what it builds.
    pub(crate) fn target(&self) -> PathBuf {
        match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => self.root.join(dir),
            None => self.root.join("target"),
        }
    }

    /// A cargo call from the root. The same cargo that runs this program, so that toolchains do not mix.
    pub(crate) fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
        command.args(args).current_dir(&self.root);
        // Cargo set these for *this* program; a child would take them for its own.
        for (key, _) in env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST") || name == "CARGO_CRATE_NAME" {
                command.env_remove(&key);
            }
        }
        command
    }

    /// Every member of the workspace.
    pub(crate) fn rooms(&self) -> Outcome<Vec<Room>> {
        let text = stdout_of(self.cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
        let metadata: Value =
            serde_json::from_str(&text).map_err(|error| format!("`cargo metadata` is not JSON: {error}"))?;
        let packages = array(&metadata, "packages")?;
        let folders: BTreeMap<String, String> = packages
            .iter()
            .map(|package| {
                Ok((
                    string(package, "name")?,
                    self.relative(&string(package, "manifest_path")?)?,
                ))
            })
            .collect::<Outcome<_>>()?;
        packages.iter().map(|package| self.room(package, &folders)).collect()
    }

    fn room(&self, package: &Value, folders: &BTreeMap<String, String>) -> Outcome<Room> {
        let name = string(package, "name")?;
        let mut uses = BTreeSet::new();
        for dependency in array(package, "dependencies")? {
            let used = string(dependency, "name")?;
            let is_dev = dependency["kind"].as_str() == Some("dev");
            if !is_dev && folders.contains_key(&used) {
                uses.insert(used);
            }
        }
        let mut roots = Vec::new();
        for target in array(package, "targets")? {
            let is_product = array(target, "kind")?
                .iter()
                .any(|kind| matches!(kind.as_str(), Some("lib" | "bin")));
            if is_product {
                roots.push(self.relative(&string(target, "src_path")?)?);
            }
        }
        let folder = folders[&name].trim_end_matches("/Cargo.toml").to_owned();
        Ok(Room {
            reaches: self.reached_from(&name)?,
            name,
            folder,
            uses,
            roots,
        })
    }

    /// `cargo tree` rather than the graph in `cargo metadata`: the latter unites the features of all members, and would
    /// blame a crate for what only its neighbours switched on.
    fn reached_from(&self, name: &str) -> Outcome<BTreeSet<String>> {
        let tree = [
            "tree",
            "--package",
            name,
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ];
        let text = stdout_of(self.cargo(&tree))?;
        let mut reached: BTreeSet<String> = text
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect();
        reached.remove(name);
        Ok(reached)
    }

    fn relative(&self, path: &str) -> Outcome<String> {
        match Path::new(path).strip_prefix(&self.root) {
            Ok(inside) => Ok(inside.to_string_lossy().into_owned()),
            Err(_) => Err(format!("{path} is outside of the workspace {}", self.root.display())),
        }
    }
}

/// What a command printed, or why it failed.
pub(crate) fn stdout_of(mut command: Command) -> Outcome<String> {
    let shown = show(&command);
    let output = command
        .output()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "`{shown}` failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

/// A command as somebody would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut shown = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        shown.push(' ');
        if arg.contains(char::is_whitespace) {
            shown.push_str(&format!("'{arg}'"));
        } else {
            shown.push_str(&arg);
        }
    }
    shown
}

fn array<'a>(value: &'a Value, field: &str) -> Outcome<&'a Vec<Value>> {
    value[field]
        .as_array()
        .ok_or_else(|| format!("`cargo metadata`: `{field}` is not an array"))
}

fn string(value: &Value, field: &str) -> Outcome<String> {
    value[field]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("`cargo metadata`: `{field}` is not a string"))
}
