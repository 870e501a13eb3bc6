//! The command line: what each command takes, and the values it is read into.
//!
//! Values are read here, once, into types that cannot be wrong; the commands do not check them again. Each option with
//! an inner syntax shows it from its `SYNTAX` text, which the errors use as well.

use core::time::Duration;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use umbra_machine::{Backing, DirtyLog, HugePages, RingEntries};
use umbra_quic::{ListenSpec, PathSpec};
use umbra_units::Bytes;

use crate::api::types::Capture;
use crate::devices::DeviceArgs;
use crate::limits;
use crate::units::{self, BadValue, Fields};

/// The program.
#[derive(Debug, Parser)]
#[command(
    name = "umbra",
    version,
    about = "Runs KVM guests, keeps a shadow of them on another host, and moves them with one short pause",
    long_about = "Runs KVM guests, keeps a standing shadow of each on another host, and moves a guest there with one \
                  short pause. One process per guest: `umbra run` where it starts, `umbra shadow` where it may go; \
                  the other commands talk to these over their API socket.",
    after_help = "Exit codes: 0 success, 1 failed or refused, 2 bad arguments, 3 guest faulted, 4 no KVM, 5 guest ended \
                  with a code, 6 handed over and unconfirmed, 7 no answer at the API socket.",
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// Where the program's own words go.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// Say more: -v what happens, -vv why, -vvv everything
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    /// Write the log to this file instead of standard error
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) log_file: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a guest in this process
    Run(RunArgs),
    /// Run a guest as it was when a snapshot of it was taken
    Restore(RestoreArgs),
    /// Hold the shadow of a guest, and run it once it is handed over
    Shadow(ShadowArgs),
    /// Start keeping a shadow of a running guest
    Protect(ProtectArgs),
    /// Stop keeping a shadow; the guest stays where it is
    Unprotect(TargetArgs),
    /// Move the guest to its shadow
    Migrate(MigrateArgs),
    /// Have the shadow commit the guest as it is at one instant, while it runs on
    Cut(CutArgs),
    /// Keep the guest as it is at one instant in a folder, while it runs
    Snapshot(SnapshotArgs),
    /// Take back a switchover that has not reached its commit point, or a cut or snapshot that is not done
    Cancel(TargetArgs),
    /// Say where everything stands
    Status(StatusArgs),
    /// Stop the guest's vCPUs
    Pause(TargetArgs),
    /// Let the guest's vCPUs run
    Resume(ResumeArgs),
    /// Press the guest's power button: a guest that listens powers itself off in good order
    PowerButton(TargetArgs),
    /// Boot the guest again, whatever it does, as its reset button would
    Reboot(TargetArgs),
    /// Ask the guest to leave memory to its balloon, or take some back
    Resize(ResizeArgs),
    /// Print what the guest's vCPUs have done, as JSON
    Counters(TargetArgs),
    /// Show which memory the guest writes how often, while a shadow follows it
    Heat(HeatArgs),
    /// End the guest and its process
    Stop(TargetArgs),
    /// Follow what happens, one JSON object per line
    Events(TargetArgs),
    /// Make or show the key and certificate that peers know this host by
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Find out what this host's KVM can do, by trying
    Doctor(DoctorArgs),
    /// What guests may see of this host's processor, and how two processors differ
    #[command(subcommand)]
    Cpu(CpuCommand),
    /// Watch a guest move over three bad networks, two of which are cut on the way
    Demo(DemoArgs),
    /// Print a completion script
    Completions(CompletionsArgs),
    /// Print the manual page, or that of one command
    Man(ManArgs),
}

/// `umbra run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The kernel: an ELF file (vmlinux, or one with a PVH note) or a bzImage
    #[arg(long, value_name = "PATH", required_unless_present = "restore")]
    pub(crate) kernel: Option<PathBuf>,
    /// An initial RAM disk for it
    #[arg(long, alias = "initrd", value_name = "PATH")]
    pub(crate) initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) cmdline: String,
    /// How many vCPUs, and what the guest sees of the processor (`umbra cpu templates`)
    #[arg(long, value_name = Cpus::SYNTAX, value_parser = Cpus::parse, default_value = "boot=1")]
    pub(crate) cpus: Cpus,
    /// How much memory; whether it lies in a memfd that others can map, in huge pages, and is all taken at the start
    #[arg(long, value_name = Memory::SYNTAX, value_parser = Memory::parse, default_value = "size=256M,shared=on")]
    pub(crate) memory: Memory,
    #[command(flatten)]
    pub(crate) devices: DeviceArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Build the guest but do not start it; `umbra resume` does
    #[arg(long)]
    pub(crate) paused: bool,
    /// When the guest asks for a reset, end with success instead of booting it again
    #[arg(long)]
    pub(crate) no_reboot: bool,
    /// Instead of booting, go on from a snapshot, as `umbra restore` does
    #[arg(
        long,
        value_name = Restore::SYNTAX,
        value_parser = Restore::parse,
        conflicts_with_all = ["kernel", "initramfs", "cmdline", "cpus", "memory", "paused"]
    )]
    pub(crate) restore: Option<Restore>,
}

/// `umbra restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The folder of the snapshot; what it goes on from lies beside it
    #[arg(long, value_name = "DIR")]
    pub(crate) from: PathBuf,
    /// Be the guest the snapshot was taken of, in the next term, instead of a new one. You vouch that it runs nowhere
    /// else and never will: if it does, there are two
    #[arg(long)]
    pub(crate) same_id: bool,
    /// Build no guest with more memory than this
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| units::size("memory-limit", text))]
    pub(crate) memory_limit: Option<Bytes>,
    #[command(flatten)]
    pub(crate) devices: DeviceArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Leave the guest as it was at the cut; `umbra resume` lets it run
    #[arg(long)]
    pub(crate) paused: bool,
}

/// `umbra snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// The folder it is to be: a new one, an empty one, or a snapshot that it replaces once it is complete
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Keep only what was written since the last snapshot, which lies in the same folder of folders
    #[arg(long)]
    pub(crate) diff: bool,
    /// Leave the guest paused at the cut, so that its disks can be copied; `umbra resume` lets it run
    #[arg(long)]
    pub(crate) pause: bool,
    /// Go on recording writes, so that a differential snapshot may follow
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = |text: &str| units::toggle("record", text), action = ArgAction::Set)]
    pub(crate) record: bool,
    /// What is compared before the guest runs on: nothing more, or every page of memory with what was kept
    #[arg(long, value_enum, default_value_t = Verify::Digest)]
    pub(crate) verify: Verify,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `umbra shadow`.
#[derive(Debug, Args)]
pub(crate) struct ShadowArgs {
    /// Where sources may come; port 0 takes a free one, which is printed
    #[arg(long, value_name = "quic:IP:PORT", required = true, value_parser = quic::<ListenSpec>)]
    pub(crate) listen: Vec<ListenSpec>,
    /// A source that may come: its certificate file or fingerprint
    #[arg(long = "peer", value_name = "FILE|FINGERPRINT", required = true)]
    pub(crate) peers: Vec<String>,
    #[command(flatten)]
    pub(crate) devices: DeviceArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// The guest's kernel, from which it is booted again if it asks for a reset after it has moved here; without it such a
    /// guest ends
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: Option<PathBuf>,
    /// The initial RAM disk for it
    #[arg(long, alias = "initrd", value_name = "PATH", requires = "kernel")]
    pub(crate) initramfs: Option<PathBuf>,
    /// What the guest's memory is made of here; how much it is, its source says
    #[arg(long, value_name = ShadowMemory::SYNTAX, value_parser = ShadowMemory::parse)]
    pub(crate) memory: Option<ShadowMemory>,
    /// Build no guest with more memory than this
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| units::size("memory-limit", text))]
    pub(crate) memory_limit: Option<Bytes>,
    /// Memory that may be taken to keep a committed epoch apart from what comes after it; a quarter of the guest's, and at
    /// least 64M, if not given. When it is half full the source cuts another epoch by itself
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| units::size("staging", text))]
    pub(crate) staging: Option<Bytes>,
    /// End with exit code 1 when the first session ends without the guest running here
    #[arg(long)]
    pub(crate) once: bool,
}

/// A command line kept in a file; see [`config`](crate::config), which reads these before anything else is read.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Take options from this TOML file, named as here; what the command line gives wins
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print all options, defaults included, as such a file, and end
    #[arg(long)]
    pub(crate) print_config: bool,
}

/// What `run` and `shadow` have in common: a process that is, or becomes, a guest's VMM.
#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Where the guest's serial console goes
    #[arg(long, value_name = Serial::SYNTAX, value_parser = Serial::parse, default_value = "stdio")]
    pub(crate) serial: Serial,
    /// Answer the other commands at this UNIX socket
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<PathBuf>,
    /// What people call the guest
    #[arg(long, value_parser = name)]
    pub(crate) name: Option<String>,
    /// The key and certificate of this host, as made by `umbra identity create`; without it new ones are made for this
    /// process, and their fingerprint is printed
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// Write every event, one JSON object per line, to a file, a FIFO or an open file descriptor
    #[arg(long, value_name = Monitor::SYNTAX, value_parser = Monitor::parse)]
    pub(crate) event_monitor: Option<Monitor>,
    /// How the guest's writes are recorded while it has a shadow; auto measures which is cheaper here
    #[arg(long, value_name = DIRTY_LOG, value_parser = dirty_log, default_value = "auto")]
    pub(crate) dirty_log: DirtyLog,
    #[command(flatten)]
    pub(crate) confine: ConfineArgs,
}

/// `--dirty-log`.
const DIRTY_LOG: &str = "auto|bitmap|ring[,entries=N]";

fn dirty_log(text: &str) -> Result<DirtyLog, BadValue> {
    let fields = Fields::of(text, &["log", "entries"])?;
    let log = fields.read("log", |_, text| Ok(text))?;
    let entries = fields.read("entries", |key, text| {
        let entries: u32 = text.parse().map_err(|_| BadValue::new(key, "a number", text))?;
        RingEntries::new(entries).map_err(|error| {
            let text = error.to_string();
            BadValue(text.strip_prefix("dirty-log: ").unwrap_or(&text).to_owned())
        })
    })?;
    match (log, entries) {
        (Some("auto"), None) => Ok(DirtyLog::Auto),
        (Some("bitmap"), None) => Ok(DirtyLog::Bitmap),
        (Some("ring"), entries) => Ok(DirtyLog::Ring(entries.unwrap_or_default())),
        _ => Err(BadValue::new("dirty-log", DIRTY_LOG, text)),
    }
}

/// What a process gives up before its guest runs; see [`confine`](crate::confine).
#[derive(Debug, Args)]
#[command(next_help_heading = "Confinement")]
pub(crate) struct ConfineArgs {
    /// What happens when the process makes a system call that it never makes: it ends, or the kernel's log says so
    #[arg(long, value_enum, default_value_t = Seccomp::On)]
    pub(crate) seccomp: Seccomp,
    /// Put every file out of reach that the other options do not name
    #[arg(long)]
    pub(crate) landlock: bool,
    /// With --landlock, what is within reach nevertheless, as the directory of snapshots to come; repeats
    #[arg(long, value_name = LandlockRule::SYNTAX, value_parser = LandlockRule::parse, requires = "landlock")]
    pub(crate) landlock_rules: Vec<LandlockRule>,
    /// Run as this user once everything is open; root only
    #[arg(long, value_name = "UID")]
    pub(crate) uid: Option<u32>,
    /// Run as this group once everything is open; root only
    #[arg(long, value_name = "GID")]
    pub(crate) gid: Option<u32>,
    /// Limits on open files and on the size of a file this process writes
    #[arg(long, value_name = ResourceLimit::SYNTAX, value_parser = ResourceLimit::parse)]
    pub(crate) resource_limit: Option<ResourceLimit>,
}

/// `--seccomp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Seccomp {
    /// The process ends.
    On,
    /// Nothing happens: every call is allowed.
    Off,
    /// The kernel's log says so.
    Log,
}

/// What may be done with a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileAccess {
    /// It may be read.
    Read,
    /// It may be read and written, and files in it made and removed.
    ReadWrite,
}

/// `--landlock-rules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LandlockRule {
    pub(crate) path: PathBuf,
    pub(crate) access: FileAccess,
}

impl LandlockRule {
    const SYNTAX: &'static str = "path=PATH[,access=r|rw]";

    fn parse(text: &str) -> Result<Self, BadValue> {
        let fields = Fields::of(text, &["path", "access"])?;
        let access = |key, text: &str| match text {
            "r" => Ok(FileAccess::Read),
            "rw" => Ok(FileAccess::ReadWrite),
            _ => Err(BadValue::new(key, "r or rw", text)),
        };
        let path = fields.read("path", |_, text| Ok(PathBuf::from(text)))?;
        Ok(Self {
            path: path.ok_or_else(|| BadValue::new("path", Self::SYNTAX, text))?,
            access: fields.read("access", access)?.unwrap_or(FileAccess::Read),
        })
    }
}

/// `--resource-limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResourceLimit {
    pub(crate) nofile: Option<u64>,
    pub(crate) fsize: Option<Bytes>,
}

impl ResourceLimit {
    const SYNTAX: &'static str = "[nofile=N][,fsize=SIZE]";
    /// Fewer open files than this and not even an idle guest's process runs.
    const NOFILE_LEAST: u64 = 64;

    fn parse(text: &str) -> Result<Self, BadValue> {
        let fields = Fields::of(text, &["nofile", "fsize"])?;
        let nofile = |key, text: &str| match text.parse() {
            Ok(most) if most >= Self::NOFILE_LEAST => Ok(most),
            _ => Err(BadValue::new(key, "a number of files from 64", text)),
        };
        Ok(Self {
            nofile: fields.read("nofile", nofile)?,
            fsize: fields.read("fsize", units::size)?,
        })
    }
}

/// Which process to talk to.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// The API socket of the guest's process
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: PathBuf,
}

/// `umbra protect`.
#[derive(Debug, Args)]
pub(crate) struct ProtectArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// A path to the shadow, and the local address it leaves from; once per network route
    #[arg(
        long,
        value_name = "quic:IP:PORT[,local=IP[:PORT]]",
        required = true,
        value_parser = quic::<PathSpec>
    )]
    pub(crate) to: Vec<PathSpec>,
    /// Who the shadow must be: its certificate file or fingerprint
    #[arg(long = "peer", value_name = "FILE|FINGERPRINT", required = true)]
    pub(crate) peers: Vec<String>,
    /// Show this identity instead of the process's own
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// How to follow: memory for deltas, compression of batches, the longest time between two harvests of a guest that
    /// writes, threads and processor share for encoding, which page ships next, and the pause that a stop with all hot
    /// pages still to go must keep to (off: none wait)
    #[arg(long, value_name = Follow::SYNTAX, value_parser = Follow::parse)]
    pub(crate) follow: Option<Follow>,
    /// Return only when the shadow has everything and is ready for a switchover
    #[arg(long)]
    pub(crate) wait: bool,
}

/// `umbra migrate`.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Stop the guest only when the pause is predicted to be at most this
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = |text: &str| units::span("downtime-limit", text))]
    pub(crate) downtime_limit: Duration,
    /// Give up when the guest could not be stopped within this time
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = |text: &str| units::span("timeout", text))]
    pub(crate) timeout: Duration,
    /// Once stopped, run the guest on here when the shadow is not prepared within this time
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = |text: &str| units::span("pause-limit", text))]
    pub(crate) pause_limit: Duration,
    /// What is compared before the guest runs at the shadow: the digest of everything sent, or every page of both
    /// memories as well (about 0.2 ms of pause per MiB)
    #[arg(long, value_enum, default_value_t = Verify::Digest)]
    pub(crate) verify: Verify,
    /// Print the report as JSON, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

/// `umbra cut`.
#[derive(Debug, Args)]
pub(crate) struct CutArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// How long pages that have settled may be shipped before the guest is stopped for an instant
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = |text: &str| units::span("settle", text))]
    pub(crate) settle: Duration,
    /// Give up when the last page could not be handed to the link within this time
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = |text: &str| units::span("timeout", text))]
    pub(crate) timeout: Duration,
    /// Send with parity, so that a lost packet costs no round trip
    #[arg(long)]
    pub(crate) urgent: bool,
    /// How the pages of the cut are kept while the guest runs on; as seems quickest, if not given
    #[arg(long, value_enum)]
    pub(crate) capture: Option<Capture>,
    /// What is compared before the guest runs on: the digest of everything sent, or every page of both memories as well
    /// (about 0.2 ms of pause per MiB)
    #[arg(long, value_enum, default_value_t = Verify::Digest)]
    pub(crate) verify: Verify,
    /// Wait until the shadow has committed it, and print where the pause went
    #[arg(long)]
    pub(crate) wait: bool,
    /// Print the report as JSON; waits for it
    #[arg(long)]
    pub(crate) json: bool,
}

/// How much is compared in a switchover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verify {
    /// The digest over the hashes of everything sent.
    Digest,
    /// Every page of both memories as well.
    Full,
}

/// `umbra status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Again and again, until the process ends or Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,
}

/// `umbra heat`.
#[derive(Debug, Args)]
pub(crate) struct HeatArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Write a picture as well, one point for each region of memory
    #[arg(long, value_name = "FILE")]
    pub(crate) png: Option<PathBuf>,
    /// Regions in a row: 8 to 512
    #[arg(long, value_name = "REGIONS", default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..=512))]
    pub(crate) width: u16,
    /// Print what the API answers
    #[arg(long)]
    pub(crate) json: bool,
}

/// `umbra resize`.
#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// How much of its memory the guest is to leave to the balloon
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| units::size("balloon", text))]
    pub(crate) balloon: Bytes,
}

/// `umbra resume`.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// You vouch that the other host is dead and will not run the guest: take it back at a source that handed it over,
    /// or run what stands prepared at a shadow. If the other host does run it, there are two
    #[arg(long)]
    pub(crate) peer_is_dead: bool,
}

/// `umbra identity`.
#[derive(Debug, Subcommand)]
pub(crate) enum IdentityCommand {
    /// Make a key and a certificate
    Create(IdentityCreateArgs),
    /// Print the fingerprint that peers pin
    Show(IdentityShowArgs),
}

/// `umbra identity create`.
#[derive(Debug, Args)]
pub(crate) struct IdentityCreateArgs {
    /// Where to write key.pem (mode 0600) and cert.pem
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// A name that helps people to tell certificates apart
    #[arg(long, default_value = "umbra")]
    pub(crate) name: String,
}

/// `umbra identity show`.
#[derive(Debug, Args)]
pub(crate) struct IdentityShowArgs {
    /// Where the identity lies
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// Print the certificate, to be copied to peers, instead of its fingerprint
    #[arg(long)]
    pub(crate) certificate: bool,
}

/// `umbra doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `umbra cpu`.
#[derive(Debug, Subcommand)]
pub(crate) enum CpuCommand {
    /// List the templates for `umbra run --cpus boot=N,template=NAME`
    Templates,
    /// Print what a guest would see here, as a template that another host can be compared with
    Show(CpuShowArgs),
    /// Name every feature in which two processors differ; exit code 1 if the second lacks any
    Compare(CpuCompareArgs),
}

/// `umbra cpu show`.
#[derive(Debug, Args)]
pub(crate) struct CpuShowArgs {
    /// As this template shows it
    #[arg(default_value = "host")]
    pub(crate) template: String,
}

/// `umbra cpu compare`.
#[derive(Debug, Args)]
pub(crate) struct CpuCompareArgs {
    /// What a guest has: `host` for all of this host, a template's name, or a file that `umbra cpu show` wrote
    pub(crate) guest: String,
    /// Where it shall run, likewise
    #[arg(default_value = "host")]
    pub(crate) here: String,
}

/// `umbra demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Print the report as JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the report, as JSON, to this file as well
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
}

/// `umbra completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    pub(crate) shell: clap_complete::Shell,
}

/// `umbra man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The command; all of them in overview, without
    pub(crate) command: Option<String>,
}

/// `--cpus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cpus {
    pub(crate) boot: u8,
    /// What the guest sees of the processor: a template's name, or its file.
    pub(crate) template: Option<String>,
}

impl Cpus {
    const SYNTAX: &'static str = "N|boot=N[,template=NAME|FILE]";

    fn parse(text: &str) -> Result<Self, BadValue> {
        let most = umbra_machine::limits::CPUS;
        let number = |key, text: &str| match text.parse() {
            Ok(cpus) if (1..=most).contains(&cpus) => Ok(cpus),
            _ => Err(BadValue::new(key, &format!("a number from 1 to {most}"), text)),
        };
        let fields = Fields::of(text, &["boot", "template"])?;
        let boot = fields.read("boot", number)?;
        let boot = boot.ok_or_else(|| BadValue::new("boot", Self::SYNTAX, text))?;
        let template = fields.read("template", |_, text| Ok(text.to_owned()))?;
        Ok(Self { boot, template })
    }

    /// So many, seen as the host suggests.
    #[cfg(test)]
    pub(crate) const fn plain(boot: u8) -> Self {
        Self { boot, template: None }
    }
}

/// `--memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) size: Bytes,
    pub(crate) shared: bool,
    pub(crate) backing: Backing,
}

impl Memory {
    const SYNTAX: &'static str = "size=SIZE[,shared=on|off][,hugepages=on|off][,hugepage_size=2M|1G][,prefault=on|off]";

    fn parse(text: &str) -> Result<Self, BadValue> {
        let fields = Fields::of(text, &["size", "shared", "hugepages", "hugepage_size", "prefault"])?;
        let size = fields.read("size", units::size)?;
        let shared = fields.read("shared", units::toggle)?.unwrap_or(true);
        let size = size.ok_or_else(|| BadValue::new("size", Self::SYNTAX, text))?;
        let backing = backing(&fields)?;
        Ok(Self { size, shared, backing })
    }
}

/// What a host backs memory with. A size of huge pages asks for them.
fn backing(fields: &Fields<'_>) -> Result<Backing, BadValue> {
    let huge_size = |key, text: &str| match units::size(key, text)? {
        size if size == HugePages::TwoMib.bytes() => Ok(HugePages::TwoMib),
        size if size == HugePages::OneGib.bytes() => Ok(HugePages::OneGib),
        _ => Err(BadValue::new(key, "2M or 1G", text)),
    };
    let size = fields.read("hugepage_size", huge_size)?;
    let huge = fields
        .read("hugepages", units::toggle)?
        .unwrap_or_else(|| size.is_some());
    Ok(Backing {
        huge_pages: huge.then(|| size.unwrap_or_default()),
        prefault: fields.read("prefault", units::toggle)?.unwrap_or(false),
    })
}

/// `--memory` of `umbra shadow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ShadowMemory(pub(crate) Backing);

impl ShadowMemory {
    const SYNTAX: &'static str = "[hugepages=on|off][,hugepage_size=2M|1G][,prefault=on|off]";

    fn parse(text: &str) -> Result<Self, BadValue> {
        let fields = Fields::of(text, &["hugepages", "hugepage_size", "prefault"])?;
        backing(&fields).map(Self)
    }
}

/// `--restore`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Restore {
    pub(crate) from: PathBuf,
    pub(crate) resume: bool,
    pub(crate) same_id: bool,
}

impl Restore {
    const SYNTAX: &'static str = "from=DIR[,resume=on|off][,same-id=on|off]";

    fn parse(text: &str) -> Result<Self, BadValue> {
        let fields = Fields::of(text, &["from", "resume", "same-id"])?;
        let from = fields.read("from", |_, text| Ok(PathBuf::from(text)))?;
        Ok(Self {
            from: from.ok_or_else(|| BadValue::new("from", Self::SYNTAX, text))?,
            resume: fields.read("resume", units::toggle)?.unwrap_or(true),
            same_id: fields.read("same-id", units::toggle)?.unwrap_or(false),
        })
    }
}

/// `--serial`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Serial {
    /// Standard output, and standard input.
    Stdio,
    /// Nowhere.
    Off,
    /// A file, begun anew.
    File(PathBuf),
    /// A UNIX socket that one reader at a time may attach to.
    Socket(PathBuf),
}

impl Serial {
    const SYNTAX: &'static str = "stdio|off|file=PATH|socket=PATH";

    fn parse(text: &str) -> Result<Self, BadValue> {
        // The rest of the text is the path, commas and all.
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "off" => Ok(Self::Off),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(BadValue::new("serial", Self::SYNTAX, text)),
        }
    }
}

/// `--event-monitor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Monitor {
    /// A file, appended to, or a FIFO.
    Path(PathBuf),
    /// A file descriptor this process was started with.
    Fd(u32),
}

impl Monitor {
    const SYNTAX: &'static str = "path=FILE|fd=N";

    fn parse(text: &str) -> Result<Self, BadValue> {
        match text.split_once('=') {
            Some(("path", path)) if !path.is_empty() => Ok(Self::Path(path.into())),
            Some(("fd", fd)) => match fd.parse() {
                Ok(fd) => Ok(Self::Fd(fd)),
                Err(_) => Err(BadValue::new("fd", "the number of an open file descriptor", fd)),
            },
            _ => Err(BadValue::new("event-monitor", Self::SYNTAX, text)),
        }
    }
}

/// `--follow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Follow {
    pub(crate) cache: Option<Bytes>,
    pub(crate) compression: Option<Compression>,
    pub(crate) harvest: Option<Duration>,
    pub(crate) encode_threads: Option<u8>,
    pub(crate) encode_cpu_percent: Option<u32>,
    pub(crate) order: Option<Order>,
    pub(crate) pause_promise: Option<Duration>,
}

/// Which page ships next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// The one least likely to be written again. The default.
    ColdFirst,
    /// In rounds over memory: what is written during a round is left to the next.
    Round,
    /// In rounds, without pages that were written again before their turn.
    SkipRedirtied,
    /// The one that has waited longest.
    Oldest,
    /// The one most likely to be written again.
    HotFirst,
}

impl From<Order> for umbra_core::order::Order {
    fn from(order: Order) -> Self {
        match order {
            Order::ColdFirst => Self::ColdFirst,
            Order::Round => Self::Round,
            Order::SkipRedirtied => Self::SkipRedirtied,
            Order::Oldest => Self::Oldest,
            Order::HotFirst => Self::HotFirst,
        }
    }
}

impl From<umbra_core::order::Order> for Order {
    fn from(order: umbra_core::order::Order) -> Self {
        use umbra_core::order::Order as Core;
        match order {
            Core::ColdFirst => Self::ColdFirst,
            Core::Round => Self::Round,
            Core::SkipRedirtied => Self::SkipRedirtied,
            Core::Oldest => Self::Oldest,
            Core::HotFirst => Self::HotFirst,
        }
    }
}

/// When batches are compressed, and how: `auto`, `off`, `lz4` (also called `on`), `zstd` or `zstd:LEVEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Compression(pub(crate) umbra_core::pack::Compression);

impl TryFrom<String> for Compression {
    type Error = umbra_core::pack::NotCompression;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<Compression> for String {
    fn from(compression: Compression) -> Self {
        compression.0.to_string()
    }
}

impl Follow {
    const SYNTAX: &'static str = "[cache=SIZE][,compression=auto|off|lz4|zstd[:LEVEL]][,harvest=TIME][,encode-threads=N]\
                                  [,encode-cpu=PERCENT][,order=cold-first|round|skip-redirtied|oldest|hot-first]\
                                  [,pause-promise=TIME|off]";
    /// More than anybody would call a short pause.
    const PROMISE_MOST: Duration = Duration::from_secs(60);
    /// A shorter time between harvests costs the guest more than it gives the shadow; a longer one is no following.
    const HARVEST: core::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(10);
    /// Beyond this nothing is gained: the cache holds a copy of what the shadow has.
    const CACHE_MOST: Bytes = Bytes::mib(16 << 10);

    fn parse(text: &str) -> Result<Self, BadValue> {
        let fields = Fields::of(
            text,
            &[
                "cache",
                "compression",
                "harvest",
                "encode-threads",
                "encode-cpu",
                "order",
                "pause-promise",
            ],
        )?;
        let compression = |key, text: &str| {
            let expected = "auto, off, lz4, zstd, or zstd:LEVEL with a level from -7 to 19 other than 0";
            text.parse()
                .map(Compression)
                .map_err(|_| BadValue::new(key, expected, text))
        };
        let threads = |key, text: &str| match text.parse() {
            Ok(threads) if limits::ENCODE_THREADS.contains(&threads) => Ok(threads),
            _ => Err(BadValue::new(key, "a number from 1 to 64", text)),
        };
        let cpu = |key, text: &str| match text.trim_end_matches('%').parse() {
            Ok(percent) if limits::ENCODE_CPU_PERCENT.contains(&percent) => Ok(percent),
            _ => Err(BadValue::new(key, "percent of one core, from 1 to 6400", text)),
        };
        let cache = |key, text: &str| match units::size(key, text)? {
            size if size <= Self::CACHE_MOST => Ok(size),
            _ => Err(BadValue::new(key, "at most 16G", text)),
        };
        let harvest = |key, text: &str| match units::span(key, text)? {
            span if Self::HARVEST.contains(&span) => Ok(span),
            _ => Err(BadValue::new(key, "1ms to 10s", text)),
        };
        let order = |key, text: &str| {
            let order = text.parse::<umbra_core::order::Order>();
            order
                .map(Order::from)
                .map_err(|_| BadValue::new(key, "cold-first, round, skip-redirtied, oldest or hot-first", text))
        };
        let promise = |key, text: &str| match text {
            "off" => Ok(Duration::ZERO),
            _ => match units::span(key, text)? {
                span if span <= Self::PROMISE_MOST => Ok(span),
                _ => Err(BadValue::new(key, "off, or at most 60s", text)),
            },
        };
        Ok(Self {
            cache: fields.read("cache", cache)?,
            compression: fields.read("compression", compression)?,
            harvest: fields.read("harvest", harvest)?,
            encode_threads: fields.read("encode-threads", threads)?,
            encode_cpu_percent: fields.read("encode-cpu", cpu)?,
            order: fields.read("order", order)?,
            pause_promise: fields.read("pause-promise", promise)?,
        })
    }
}

fn name(text: &str) -> Result<String, BadValue> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.chars().count() > limits::NAME_CHARS || !text.chars().all(plain) {
        return Err(BadValue::new("name", "1 to 63 letters, digits, '-', '_' or '.'", text));
    }
    Ok(text.to_owned())
}

fn quic<T: core::str::FromStr<Err = umbra_quic::error::Unreadable>>(
    text: &str,
) -> Result<T, umbra_quic::error::Unreadable> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
    }

    /// The first line of what an operator reads.
    fn error(line: &str) -> String {
        parse(line).unwrap_err().to_string().lines().next().unwrap().to_owned()
    }

    #[test]
    fn a_dirty_log_is_named_and_only_a_ring_has_entries() {
        let ring = |entries| DirtyLog::Ring(RingEntries::new(entries).unwrap());
        for (text, log) in [
            ("auto", DirtyLog::Auto),
            ("bitmap", DirtyLog::Bitmap),
            ("ring", DirtyLog::Ring(RingEntries::default())),
            ("ring,entries=4096", ring(4096)),
        ] {
            assert_eq!(dirty_log(text).unwrap(), log, "{text}");
        }
        for (text, line) in [
            ("rings", "dirty-log: expected auto|bitmap|ring[,entries=N], got 'rings'"),
            (
                "auto,entries=4096",
                "dirty-log: expected auto|bitmap|ring[,entries=N], got 'auto,entries=4096'",
            ),
            (
                "entries=4096",
                "dirty-log: expected auto|bitmap|ring[,entries=N], got 'entries=4096'",
            ),
            ("ring,entries=x", "entries: expected a number, got 'x'"),
            (
                "ring,entries=5000",
                "entries: expected a power of two from 1024 to 65536, got 5000",
            ),
        ] {
            assert_eq!(dirty_log(text).unwrap_err().to_string(), line);
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_guest_is_described_as_in_cloud_hypervisor() {
        let line = "umbra run --kernel k --initrd i --cmdline console=ttyS0 --cpus boot=2 --memory size=512M,shared=off \
                    --serial socket=/s --api-socket /a --name web-1 --paused";
        let Ok(Command::Run(run)) = parse(line) else {
            panic!("not understood")
        };
        assert_eq!(
            (run.cpus, run.memory),
            (
                Cpus::plain(2),
                Memory {
                    size: Bytes::mib(512),
                    shared: false,
                    backing: Backing::default()
                }
            )
        );
        assert_eq!(run.process.serial, Serial::Socket("/s".into()));
        assert_eq!((run.cmdline.as_str(), run.paused), ("console=ttyS0", true));
        let Ok(Command::Run(run)) = parse("umbra run --kernel k --cpus 4 --memory 1G") else {
            panic!("not understood")
        };
        assert_eq!(
            (run.cpus, run.memory),
            (
                Cpus::plain(4),
                Memory {
                    size: Bytes::mib(1024),
                    shared: true,
                    backing: Backing::default()
                }
            )
        );
        let Ok(Command::Run(run)) = parse("umbra run --kernel k") else {
            panic!("not understood")
        };
        assert_eq!(
            (run.cpus, run.memory.size, run.process.serial),
            (Cpus::plain(1), Bytes::mib(256), Serial::Stdio)
        );
    }

    #[test]
    fn every_bad_value_gives_one_line_that_names_the_option() {
        for (line, expected) in [
            (
                "run --kernel k --cpus 0",
                "error: invalid value '0' for '--cpus <N|boot=N[,template=NAME|FILE]>': boot: expected a number from 1 to 32, got '0'",
            ),
            (
                "run --kernel k --cpus max=2",
                "error: invalid value 'max=2' for '--cpus <N|boot=N[,template=NAME|FILE]>': key: expected one of boot, template, got 'max'",
            ),
            (
                "run --kernel k --memory size=1X",
                "error: invalid value 'size=1X' for '--memory <size=SIZE[,shared=on|off][,hugepages=on|off][,\
                 hugepage_size=2M|1G][,prefault=on|off]>': size: expected a size as 4096, 512K, 256M or 2G, got '1X'",
            ),
            (
                "run --kernel k --serial tty",
                "error: invalid value 'tty' for '--serial <stdio|off|file=PATH|socket=PATH>': serial: expected \
                 stdio|off|file=PATH|socket=PATH, got 'tty'",
            ),
            (
                "run --kernel k --event-monitor fd=x",
                "error: invalid value 'fd=x' for '--event-monitor <path=FILE|fd=N>': fd: expected the number of an open \
                 file descriptor, got 'x'",
            ),
            (
                "run --kernel k --name a/b",
                "error: invalid value 'a/b' for '--name <NAME>': name: expected 1 to 63 letters, digits, '-', '_' or \
                 '.', got 'a/b'",
            ),
            (
                "shadow --peer p --listen 127.0.0.1:1",
                "error: invalid value '127.0.0.1:1' for '--listen <quic:IP:PORT>': `127.0.0.1:1`: quic:IP:PORT, IPv6 in \
                 brackets, expected",
            ),
            (
                "migrate --api-socket s --timeout 60",
                "error: invalid value '60' for '--timeout <TIME>': timeout: expected a time with its unit, as 250us, \
                 300ms, 2s or 1m, got '60'",
            ),
            (
                "protect --api-socket s --peer p --to quic:127.0.0.1:7 --follow harvest=1us",
                "error: invalid value 'harvest=1us' for '--follow \
                 <[cache=SIZE][,compression=auto|off|lz4|zstd[:LEVEL]][,harvest=TIME]\
                 [,encode-threads=N][,encode-cpu=PERCENT][,order=cold-first|round|skip-redirtied|oldest|hot-first]\
                 [,pause-promise=TIME|off]>': harvest: expected 1ms to 10s, got '1us'",
            ),
        ] {
            assert_eq!(error(&format!("umbra {line}")), expected);
        }
        let port = error("umbra protect --api-socket s --peer p --to quic:127.0.0.1:0");
        assert!(
            port.contains("'--to <quic:IP:PORT[,local=IP[:PORT]]>'") && port.contains("neither zero"),
            "{port}"
        );
    }

    #[test]
    fn what_a_command_cannot_do_without_is_asked_for_by_name() {
        for (line, missing) in [
            ("umbra run", "--kernel"),
            ("umbra shadow --listen quic:127.0.0.1:0", "--peer"),
            ("umbra shadow --peer p", "--listen"),
            ("umbra protect --api-socket s --to quic:127.0.0.1:7", "--peer"),
            ("umbra protect --api-socket s --peer p", "--to"),
            ("umbra migrate", "--api-socket"),
            ("umbra identity create", "--dir"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument, "{line}");
            assert!(error.to_string().contains(missing), "{line}: {error}");
            assert_eq!(error.exit_code(), i32::from(crate::exit::Code::BadArguments as u8));
        }
    }

    #[test]
    fn an_order_is_known_by_its_name_alone() {
        let line = "umbra protect --api-socket s --peer p --to quic:127.0.0.1:7 --follow";
        for (name, order) in [("cold-first", Order::ColdFirst), ("round", Order::Round)] {
            let Ok(Command::Protect(protect)) = parse(&format!("{line} order={name}")) else {
                panic!("not understood")
            };
            assert_eq!(protect.follow.unwrap().order, Some(order));
        }
        for (follow, wrong) in [
            (
                "order=hottest",
                "order: expected cold-first, round, skip-redirtied, oldest or hot-first, got 'hottest'",
            ),
            (
                "pause-promise=2m",
                "pause-promise: expected off, or at most 60s, got '2m'",
            ),
        ] {
            let error = parse(&format!("{line} {follow}")).unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn paths_and_listening_addresses_repeat() {
        let line = "umbra protect --api-socket s --to quic:192.0.2.1:7 --to quic:192.0.2.2:7,local=192.0.2.9 --peer p \
                    --follow 128M,compression=off,harvest=50ms,encode-threads=2,encode-cpu=150,order=oldest,\
                    pause-promise=off";
        let Ok(Command::Protect(protect)) = parse(line) else {
            panic!("not understood")
        };
        assert_eq!(protect.to.len(), 2);
        let follow = Follow {
            cache: Some(Bytes::mib(128)),
            compression: Some(Compression(umbra_core::pack::Compression::Off)),
            harvest: Some(Duration::from_millis(50)),
            encode_threads: Some(2),
            encode_cpu_percent: Some(150),
            order: Some(Order::Oldest),
            pause_promise: Some(Duration::ZERO),
        };
        assert_eq!(protect.follow, Some(follow));
        let Ok(Command::Shadow(shadow)) =
            parse("umbra shadow --listen quic:127.0.0.1:0 --listen quic:[::1]:0 --peer p --peer q --memory-limit 2G")
        else {
            panic!("not understood")
        };
        assert_eq!(
            (shadow.listen.len(), shadow.peers.len(), shadow.memory_limit),
            (2, 2, Some(Bytes::mib(2048)))
        );
    }

    #[test]
    fn a_guest_goes_on_from_a_snapshot_or_boots_a_kernel_never_both() {
        let restore = |line: &str| match parse(line) {
            Ok(Command::Run(run)) => run.restore.unwrap(),
            other => panic!("{other:?}"),
        };
        let from = |resume, same_id| Restore {
            from: "/s/a".into(),
            resume,
            same_id,
        };
        assert_eq!(restore("umbra run --restore from=/s/a"), from(true, false));
        assert_eq!(
            restore("umbra run --restore /s/a,resume=off,same-id=on"),
            from(false, true)
        );
        for line in ["--kernel k", "--cmdline x", "--cpus 2", "--memory 1G", "--paused"] {
            let error = parse(&format!("umbra run --restore /s/a {line}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ArgumentConflict, "{line}");
        }
        let wrong = error("umbra run --restore from=/s/a,resume=maybe");
        assert!(wrong.ends_with("resume: expected on or off, got 'maybe'"), "{wrong}");
    }

    #[test]
    fn a_path_for_the_console_may_hold_commas_and_equals_signs() {
        assert_eq!(Serial::parse("file=/a,b=c"), Ok(Serial::File("/a,b=c".into())));
        assert_eq!(Monitor::parse("path=/a=b"), Ok(Monitor::Path("/a=b".into())));
        assert_eq!(Monitor::parse("fd=3"), Ok(Monitor::Fd(3)));
    }
}
