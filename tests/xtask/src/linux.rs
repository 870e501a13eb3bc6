//! A Linux for guests, built once per machine (`resources/linux`).
//!
//! The recipes are two shell scripts; this module decides whether they have to run. What they make is kept outside of the
//! checkout, in one folder per result, named for the Debian package it was made from and a hash of everything else that
//! went in: `kernel-6.1.192-2-0123456789abcdef`. A folder stands under its final name only when it is whole, and never
//! changes afterwards, so finding one is all that a second call does. A newer package is taken up when the recipe
//! changes, or when somebody removes the folder: a kernel that tests trust should not change under them.
//!
//! Two builds at once wait for each other, at a lock that ends with the process that holds it.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

use serde_json::Value;

use crate::{
    house::{House, Outcome, show, stdout_of},
    setup::{self, Tool},
};

/// Where the recipes are.
const FOLDER: &str = "resources/linux";

/// What the recipes call beyond what every build needs.
const TOOLS: &[Tool] = &[
    Tool {
        program: "make",
        probe: &["--version"],
        packages: &["make"],
        why: "builds the guest's Linux",
    },
    Tool {
        program: "flex",
        probe: &["--version"],
        packages: &["flex"],
        why: "reads the guest Linux's configuration",
    },
    Tool {
        program: "bison",
        probe: &["--version"],
        packages: &["bison"],
        why: "reads the guest Linux's configuration",
    },
    Tool {
        program: "bc",
        probe: &["--version"],
        packages: &["bc"],
        why: "computes constants of the guest's Linux",
    },
    Tool {
        program: "patch",
        probe: &["--version"],
        packages: &["patch"],
        why: "patches the guest's Linux",
    },
    Tool {
        program: "xz",
        probe: &["--version"],
        packages: &["xz-utils"],
        why: "unpacks the guest's Linux",
    },
    Tool {
        program: "lz4",
        probe: &["--version"],
        packages: &["lz4"],
        why: "packs the guest's Linux",
    },
    Tool {
        program: "cc",
        probe: &["-E", "-include", "libelf.h", "-x", "c", "/dev/null"],
        packages: &["libelf-dev"],
        why: "has libelf.h, for the tool that checks the guest Linux's objects",
    },
    Tool {
        program: "musl-gcc",
        probe: &["--version"],
        packages: &["musl-tools"],
        why: "links the guest's first program",
    },
];

/// One recipe.
struct Part {
    name: &'static str,
    script: &'static str,
    /// Files and folders below [`FOLDER`] that the script reads.
    inputs: &'static [&'static str],
    package: &'static str,
}

const KERNEL: Part = Part {
    name: "kernel",
    script: "kernel.sh",
    inputs: &["config", "patches"],
    package: "linux-source-6.1",
};

const INITRAMFS: Part = Part {
    name: "initramfs",
    script: "initramfs.sh",
    inputs: &["guest"],
    package: "busybox-static",
};

/// How the kernel code of guests runs on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ring0 {
    Native,
    Emulated,
    /// Nobody could say, and why.
    Unknown(String),
}

/// What a test needs to boot Linux.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Linux {
    kernel: PathBuf,
    initramfs: PathBuf,
    cmdline: String,
}

impl Linux {
    /// The names under which tests and benchmarks find it all.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        let path = |folder: &Path, file| folder.join(file).display().to_string();
        vec![
            ("UMBRA_LINUX_KERNEL", path(&self.kernel, "vmlinux")),
            ("UMBRA_LINUX_BZIMAGE", path(&self.kernel, "bzImage")),
            ("UMBRA_LINUX_INITRD", path(&self.initramfs, "initramfs")),
            ("UMBRA_LINUX_INITRD_TOOLS", path(&self.initramfs, "initramfs-tools")),
            ("UMBRA_LINUX_PROGRAM", path(&self.initramfs, "umbra-linux")),
            ("UMBRA_LINUX_CMDLINE", self.cmdline.clone()),
        ]
    }

    /// The same as lines for a shell.
    fn lines(&self) -> String {
        let line = |(name, value): (&str, String)| format!("export {name}='{}'\n", value.replace('\'', r"'\''"));
        self.environment().into_iter().map(line).collect()
    }
}

/// `cargo xtask linux`: builds what is missing and says where it is; with `--print`, says it and builds nothing.
pub(crate) fn linux(house: &House, args: &[String]) -> Outcome<()> {
    let may_build = match args {
        [] => true,
        [flag] if flag == "--print" => false,
        _ => return Err(format!("`linux` takes `--print` or nothing, not `{}`", args.join(" "))),
    };
    print!("{}", find_or_build(house, may_build)?.lines());
    Ok(())
}

/// Linux for the tests of this host, built now if this machine has not got it yet.
pub(crate) fn ready(house: &House) -> Outcome<Linux> {
    find_or_build(house, true)
}

fn find_or_build(house: &House, may_build: bool) -> Outcome<Linux> {
    let cache = cache(&|name| env::var_os(name).map(PathBuf::from))?;
    let kernel = part(house, &cache, &KERNEL, None, may_build)?;
    let initramfs = part(house, &cache, &INITRAMFS, Some(&kernel), may_build)?;
    let ring0 = ring0(house);
    eprintln!("linux: {}", verdict(&ring0));
    let read = |file: &str| house.read(&format!("{FOLDER}/cmdline/{file}"));
    let cmdline = cmdline(&ring0, &read("common")?, &read("emulated")?);
    Ok(Linux {
        kernel,
        initramfs,
        cmdline,
    })
}

/// Which way this host goes, and why.
fn verdict(ring0: &Ring0) -> String {
    match ring0 {
        Ring0::Emulated => "the kernel code of guests is emulated on this host, so stock kernels do not boot: guests \
                            get the kernel built here, with the command line that spares the emulator"
            .to_owned(),
        Ring0::Native => "the kernel code of guests runs on this host's processor, so stock kernels boot as well \
                          (resources/linux/README.md): tests use the kernel built here, with nothing held back"
            .to_owned(),
        Ring0::Unknown(why) => {
            format!("taking the kernel code of guests to be emulated, with a command line for any host: {why}")
        }
    }
}

fn cmdline(ring0: &Ring0, common: &str, emulated: &str) -> String {
    let words = common.split_whitespace();
    match ring0 {
        Ring0::Native => words.collect::<Vec<_>>().join(" "),
        Ring0::Emulated | Ring0::Unknown(_) => words.chain(emulated.split_whitespace()).collect::<Vec<_>>().join(" "),
    }
}

/// Asks `umbra doctor`, if there is an `umbra` already. This program must not depend on KVM itself.
fn ring0(house: &House) -> Ring0 {
    let built = ["checked", "release", "debug"].map(|profile| house.target().join(profile).join("umbra"));
    let Some(umbra) = built.into_iter().find(|path| path.exists()) else {
        return Ring0::Unknown("`umbra doctor` is not built yet".to_owned());
    };
    let mut doctor = Command::new(umbra);
    doctor.args(["doctor", "--json"]);
    match stdout_of(doctor) {
        Ok(report) => diagnosis(&report),
        Err(why) => Ring0::Unknown(why),
    }
}

fn diagnosis(report: &str) -> Ring0 {
    let report: Value = serde_json::from_str(report).unwrap_or_default();
    match report["guest_kernel_code"].as_str() {
        Some("native") => Ring0::Native,
        Some("emulated") => Ring0::Emulated,
        _ => Ring0::Unknown("`umbra doctor` could not tell".to_owned()),
    }
}

/// Where results are kept: a folder of caches, which may be removed at any time.
fn cache(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Outcome<PathBuf> {
    let root = variable("UMBRA_CACHE_DIR")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("umbra")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/umbra")))
        .ok_or("no place for a cache: set UMBRA_CACHE_DIR, XDG_CACHE_HOME or HOME")?;
    // The recipes run in other folders.
    if root.is_absolute() {
        Ok(root.join("linux"))
    } else {
        Err(format!("the cache folder `{}` is not an absolute path", root.display()))
    }
}

/// One part's folder.
fn part(house: &House, cache: &Path, part: &Part, kernel: Option<&Path>, may_build: bool) -> Outcome<PathBuf> {
    let hash = hash(&inputs(house, part)?)?;
    if let Some(found) = find(cache, part.name, &hash) {
        return Ok(found);
    }
    if !may_build {
        return Err(format!(
            "no {} for guests yet: `cargo xtask linux` builds it",
            part.name
        ));
    }
    setup::install_missing(TOOLS)?;
    fs::create_dir_all(cache).map_err(|error| format!("cannot make {}: {error}", cache.display()))?;
    let _lock = Lock::wait(&cache.join(format!("{}.lock", part.name)))?;
    // Somebody else may have built it while we waited.
    match find(cache, part.name, &hash) {
        Some(found) => Ok(found),
        None => build(house, cache, part, kernel, &hash),
    }
}

/// Everything but the package that decides the result: names and contents, in one order.
fn inputs(house: &House, part: &Part) -> Outcome<Vec<(String, Vec<u8>)>> {
    let mut names = vec![part.script.to_owned()];
    for folder in part.inputs {
        let path = house.path(FOLDER).join(folder);
        let failed = |error: io::Error| format!("cannot list {}: {error}", path.display());
        for entry in fs::read_dir(&path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            names.push(format!("{folder}/{}", name.to_string_lossy()));
        }
    }
    names.sort();
    let read = |name: String| {
        let path = house.path(FOLDER).join(&name);
        let bytes = fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        Ok((name, bytes))
    };
    names.into_iter().map(read).collect()
}

/// The first sixteen digits of the SHA-256 of all inputs, each led by its name and length.
fn hash(inputs: &[(String, Vec<u8>)]) -> Outcome<String> {
    let mut text = Vec::new();
    for (name, bytes) in inputs {
        text.extend(format!("{name} {}\n", bytes.len()).into_bytes());
        text.extend(bytes);
    }
    // A program of every Debian, so that this one needs no library for it.
    let mut program = Command::new("sha256sum");
    program.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = program
        .spawn()
        .map_err(|error| format!("cannot start sha256sum: {error}"))?;
    let sent = child
        .stdin
        .take()
        .expect("stdin is piped: asked for above")
        .write_all(&text);
    let output = child
        .wait_with_output()
        .map_err(|error| format!("cannot wait for sha256sum: {error}"))?;
    let digits = String::from_utf8_lossy(&output.stdout);
    match (sent, digits.get(..16)) {
        (Ok(()), Some(digits)) if output.status.success() => Ok(digits.to_owned()),
        _ => Err(format!("sha256sum failed ({})", output.status)),
    }
}

/// A whole result of these inputs; the newest by name if it was built from several packages.
fn find(cache: &Path, name: &str, hash: &str) -> Option<PathBuf> {
    let is_one = |path: &PathBuf| {
        let folder = path.file_name().unwrap_or_default().to_string_lossy();
        folder.starts_with(&format!("{name}-")) && folder.ends_with(&format!("-{hash}")) && path.is_dir()
    };
    let listing = fs::read_dir(cache).ok()?;
    listing.flatten().map(|entry| entry.path()).filter(is_one).max()
}

fn build(house: &House, cache: &Path, part: &Part, kernel: Option<&Path>, hash: &str) -> Outcome<PathBuf> {
    let version = version(part.package)?;
    // Epochs: a colon separates paths.
    let done = cache.join(format!("{}-{}-{hash}", part.name, version.replace(':', ".")));
    eprintln!(
        "linux: building the guest's {} from {} {version}, once for this machine, into {}",
        part.name,
        part.package,
        done.display()
    );
    // The lock is ours, so whatever is here was left by a build that died.
    let work = cache.join(format!("building-{}", part.name));
    let (package, tree, out) = (work.join("package"), work.join("tree"), work.join("out"));
    let _ = fs::remove_dir_all(&work);
    for folder in [&package, &tree] {
        fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    }
    let mut download = Command::new("apt-get");
    // The user that apt would otherwise become may not write here.
    download
        .args(["--option", "APT::Sandbox::User=root", "--quiet", "download"])
        .arg(format!("{}={version}", part.package))
        .current_dir(&package);
    finish(&mut download)?;
    let deb = only_file(&package)?;
    let mut script = Command::new("sh");
    script.arg(house.path(FOLDER).join(part.script)).arg(deb);
    script.arg(kernel.unwrap_or(&tree)).arg(&out);
    finish(&mut script).map_err(|why| format!("{why}; what it left is in {}", work.display()))?;
    fs::rename(&out, &done).map_err(|error| format!("cannot rename to {}: {error}", done.display()))?;
    let _ = fs::remove_dir_all(&work);
    Ok(done)
}

/// The version of a package that apt would fetch.
fn version(package: &str) -> Outcome<String> {
    let ask = || {
        let mut show = Command::new("apt-cache");
        show.args(["show", "--no-all-versions", package]).stderr(Stdio::null());
        let text = stdout_of(show).ok()?;
        let version = text.lines().find_map(|line| line.strip_prefix("Version: "))?;
        Some(version.trim().to_owned())
    };
    if let Some(version) = ask() {
        return Ok(version);
    }
    // A fresh container has no lists yet.
    setup::update_lists()?;
    ask().ok_or_else(|| format!("apt knows no package {package}: the guest's Linux is made from Debian 12's"))
}

fn only_file(folder: &Path) -> Outcome<PathBuf> {
    let listing = fs::read_dir(folder).map_err(|error| format!("cannot list {}: {error}", folder.display()))?;
    let files: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).collect();
    match files.as_slice() {
        [file] => Ok(file.clone()),
        files => Err(format!("{} files in {}, not one", files.len(), folder.display())),
    }
}

/// Runs a step whose words are for people: standard output is for what was asked for.
fn finish(command: &mut Command) -> Outcome<()> {
    let shown = show(command);
    let status = command
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`{shown}` failed ({status})"))
    }
}

/// A lock on a file, held by a `flock` of ours that ends when its standard input does: by drop, or with this process.
struct Lock {
    holder: Child,
    input: Option<ChildStdin>,
}

impl Lock {
    fn wait(file: &Path) -> Outcome<Self> {
        let mut command = Command::new("flock");
        command.arg(file).args(["sh", "-c", "echo locked; exec cat"]);
        let mut holder = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start flock: {error}"))?;
        let output = holder.stdout.take().expect("stdout is piped: asked for above");
        let mut word = String::new();
        let read = BufReader::new(output).read_line(&mut word);
        let input = holder.stdin.take();
        let lock = Self { holder, input };
        match read {
            Ok(_) if word == "locked\n" => Ok(lock),
            _ => Err(format!("cannot lock {}", file.display())),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.holder.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, text: &str) -> (String, Vec<u8>) {
        (name.to_owned(), text.as_bytes().to_vec())
    }

    /// An empty folder of this test's own.
    fn folder(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("umbra-xtask-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn a_change_of_any_input_is_another_result() {
        let before = hash(&[named("a", "one"), named("b", "two")]).unwrap();
        assert_eq!(before.len(), 16);
        assert_eq!(before, hash(&[named("a", "one"), named("b", "two")]).unwrap());
        assert_ne!(before, hash(&[named("a", "one"), named("b", "too")]).unwrap());
        assert_ne!(before, hash(&[named("a", "one"), named("c", "two")]).unwrap());
        assert_ne!(before, hash(&[named("a", "onetwo"), named("b", "")]).unwrap());
    }

    #[test]
    fn every_file_of_the_recipe_is_an_input_of_one_part() {
        let house = House::find().unwrap();
        let mut known: Vec<String> = Vec::new();
        for part in [&KERNEL, &INITRAMFS] {
            known.extend(inputs(&house, part).unwrap().into_iter().map(|(name, _)| name));
        }
        for name in ["kernel.sh", "initramfs.sh", "config/10-machine.config", "guest/main.c"] {
            assert!(known.iter().any(|known| known == name), "{name} is not among {known:?}");
        }
        assert!(known.iter().any(|name| name.starts_with("patches/")), "{known:?}");
    }

    #[test]
    fn a_result_is_found_by_its_inputs_and_only_when_it_is_whole() {
        let cache = folder("find");
        assert_eq!(find(&cache.join("nothing here"), "kernel", "cafe"), None);
        fs::create_dir(cache.join("building-kernel")).unwrap();
        fs::create_dir(cache.join("kernel-6.1.1-1-beef")).unwrap();
        fs::create_dir(cache.join("initramfs-1.35-4-cafe")).unwrap();
        assert_eq!(find(&cache, "kernel", "cafe"), None);
        fs::create_dir(cache.join("kernel-6.1.1-1-cafe")).unwrap();
        assert_eq!(find(&cache, "kernel", "cafe"), Some(cache.join("kernel-6.1.1-1-cafe")));
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn two_builds_at_once_wait_for_each_other() {
        let cache = folder("lock");
        let file = cache.join("kernel.lock");
        let is_free = || {
            let mut other = Command::new("flock");
            other.arg("--nonblock").arg(&file).arg("true");
            other.status().unwrap().success()
        };
        let lock = Lock::wait(&file).unwrap();
        assert!(!is_free());
        drop(lock);
        assert!(is_free());
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn only_a_host_that_says_so_is_not_spared() {
        let (common, emulated) = ("console=ttyS0\n", "noxsave\nrodata=off\n");
        assert_eq!(cmdline(&Ring0::Native, common, emulated), "console=ttyS0");
        for ring0 in [Ring0::Emulated, Ring0::Unknown("why".to_owned())] {
            assert_eq!(cmdline(&ring0, common, emulated), "console=ttyS0 noxsave rodata=off");
        }
        assert_eq!(diagnosis(r#"{ "guest_kernel_code": "native" }"#), Ring0::Native);
        assert_eq!(diagnosis(r#"{ "guest_kernel_code": "emulated" }"#), Ring0::Emulated);
        for report in ["", "{}", r#"{ "guest_kernel_code": { "unknown": "no" } }"#] {
            assert!(matches!(diagnosis(report), Ring0::Unknown(_)), "{report}");
        }
    }

    #[test]
    fn the_cache_is_where_the_user_keeps_caches() {
        let with = |set: &'static [(&str, &str)]| {
            cache(&move |name| {
                set.iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| PathBuf::from(value))
            })
        };
        assert_eq!(
            with(&[("HOME", "/home/u")]),
            Ok(PathBuf::from("/home/u/.cache/umbra/linux"))
        );
        assert_eq!(
            with(&[("HOME", "/home/u"), ("XDG_CACHE_HOME", "/c")]),
            Ok(PathBuf::from("/c/umbra/linux"))
        );
        assert_eq!(
            with(&[("UMBRA_CACHE_DIR", "/mine"), ("XDG_CACHE_HOME", "/c")]),
            Ok(PathBuf::from("/mine/linux"))
        );
        assert!(
            with(&[("UMBRA_CACHE_DIR", "here")])
                .unwrap_err()
                .contains("not an absolute path")
        );
        assert!(with(&[]).unwrap_err().contains("set UMBRA_CACHE_DIR"));
    }

    #[test]
    fn a_shell_can_read_what_is_printed() {
        let linux = Linux {
            kernel: PathBuf::from("/it's here"),
            initramfs: PathBuf::from("/i"),
            cmdline: "console=ttyS0 quiet".to_owned(),
        };
        let mut shell = Command::new("sh");
        let script = format!("{}echo \"$UMBRA_LINUX_KERNEL|$UMBRA_LINUX_CMDLINE\"", linux.lines());
        shell.args(["-c", &script]);
        assert_eq!(stdout_of(shell).unwrap(), "/it's here/vmlinux|console=ttyS0 quiet\n");
    }
}
