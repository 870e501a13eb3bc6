//! A guest's process gives up what it does not need, before the guest can have an influence on it.
//!
//! A guest that breaks out of its virtual machine is a thread of this process. What it can do then is what this process
//! can do, so the process keeps as little as it can: no other user's rights, no capability, no system call that it never
//! makes, no file that it was not told of.
//!
//! ```text
//!   options read ─▶ sockets, identity, images, TAPs, /dev/kvm opened ─▶ confined ─▶ network, API, guest
//!                                                                          │
//!                                          limits · user · capabilities · Landlock · seccomp
//! ```
//!
//! All of these but the limits belong to a *thread* in Linux, and are inherited by the threads it makes. So the main thread
//! confines itself before it makes the runtime, and the machine's threads, which are made earlier, confine themselves
//! when they start: [`enter`] in both cases. A vCPU's thread keeps less than the others: it is the one that a
//! guest reaches first.
//!
//! There is no way back: every part of this is one that the kernel only ever lets tighten.

mod seccomp;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    path_beneath_rules,
};
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{self, CapabilitySet, CapabilitySets};
use umbra_machine::ThreadClass;
use umbra_machine::config::devices::Devices;

pub(crate) use self::seccomp::Class;
use crate::args::{ConfineArgs, FileAccess, ProcessArgs, Seccomp, Serial};
use crate::exit::{Code, Failure};
use crate::say;

/// What this process keeps. It is the process's own, as its log is: whichever thread starts asks here.
static KEPT: OnceLock<Kept> = OnceLock::new();

/// What a process keeps.
#[derive(Debug)]
struct Kept {
    user: Option<(Uid, Gid)>,
    /// Capabilities without which what was asked for cannot be done.
    capabilities: CapabilitySet,
    seccomp: Seccomp,
    /// What Landlock leaves within reach; everything, if `None`.
    files: Option<Vec<(PathBuf, BitFlags<AccessFs>)>>,
}

/// What a process will do after it was confined.
#[derive(Debug, Default)]
pub(crate) struct Plans {
    /// Files it opens again, or for the first time.
    pub(crate) files: Vec<(PathBuf, FileAccess)>,
    /// Whether it attaches to network interfaces.
    pub(crate) interfaces: bool,
}

impl Plans {
    /// To boot from `boot` again when the guest resets, and to connect it to `devices`.
    pub(crate) fn of<'a>(boot: impl IntoIterator<Item = &'a PathBuf>, devices: &Devices) -> Self {
        let mut files: Vec<_> = boot.into_iter().map(|path| (path.clone(), FileAccess::Read)).collect();
        files.extend(devices.disk.iter().map(|disk| {
            let access = if disk.readonly == Some(true) {
                FileAccess::Read
            } else {
                FileAccess::ReadWrite
            };
            (disk.path.clone(), access)
        }));
        files.extend(devices.rng.iter().map(|rng| (rng.src.clone(), FileAccess::Read)));
        // Sockets for the guest's connections are looked for beside it.
        let sockets = devices.vsock.iter().map(|vsock| directory(&vsock.socket));
        files.extend(sockets.map(|directory| (directory, FileAccess::ReadWrite)));
        let interfaces = devices.net.iter().any(|net| net.tap.is_some());
        if interfaces {
            files.push(("/dev/net/tun".into(), FileAccess::ReadWrite));
        }
        Self { files, interfaces }
    }
}

/// Decide what this process keeps; before it starts its first thread. Limits are set at once.
pub(crate) fn prepare(process: &ProcessArgs, plans: Plans) -> Result<(), Failure> {
    let args = &process.confine;
    limit(args)?;
    let user = match (args.uid, args.gid) {
        (None, None) => None,
        (uid, gid) => {
            if !rustix::process::geteuid().is_root() {
                return Err(Failure::arguments(
                    "uid, gid: only root can run a guest as somebody else",
                ));
            }
            let uid = uid.map_or_else(rustix::process::geteuid, Uid::from_raw);
            let gid = gid.map_or_else(rustix::process::getegid, Gid::from_raw);
            Some((uid, gid))
        }
    };
    let kept = Kept {
        user,
        capabilities: if plans.interfaces {
            CapabilitySet::NET_ADMIN
        } else {
            CapabilitySet::empty()
        },
        seccomp: args.seccomp,
        files: args.landlock.then(|| within_reach(process, plans.files)),
    };
    KEPT.set(kept)
        .map_err(|_| Failure::failed("this process was confined already"))?;
    umbra_machine::on_thread_start(|class| {
        enter_or_end(match class {
            ThreadClass::Vcpu => Class::Vcpu,
            ThreadClass::Device => Class::Host,
        });
    });
    Ok(())
}

/// Confine the calling thread, and those it makes from now on. Without [`prepare`], as in tests, nothing happens.
pub(crate) fn enter(class: Class) -> Result<(), Failure> {
    KEPT.get().map_or(Ok(()), |kept| kept.enter(class))
}

/// The same, for a thread that has nobody to report to: rather no process than an unconfined one.
pub(crate) fn enter_or_end(class: Class) {
    if let Err(failure) = enter(class) {
        say::note(failure);
        #[expect(clippy::exit, reason = "fail closed, from whichever thread it is")]
        std::process::exit(Code::Failure as i32);
    }
}

impl Kept {
    fn enter(&self, class: Class) -> Result<(), Failure> {
        self.leave_rights()
            .map_err(Failure::on("cannot give up the rights of root"))?;
        thread::set_no_new_privs(true).map_err(Failure::on("cannot give up new privileges"))?;
        if let Some(files) = &self.files {
            landlock(files)?;
        }
        seccomp::apply(class, self.seccomp)
    }

    /// Another user, and no capability beyond those kept.
    fn leave_rights(&self) -> Result<(), rustix::io::Errno> {
        let mine = thread::capabilities(None)?;
        if mine.effective.contains(CapabilitySet::SETPCAP) {
            for capability in CapabilitySet::all().difference(self.capabilities).iter() {
                // EINVAL: one that this kernel does not know yet.
                match thread::remove_capability_from_bounding_set(capability) {
                    Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if let Some((uid, gid)) = self.user
            && (rustix::process::geteuid(), rustix::process::getegid()) != (uid, gid)
        {
            // Becoming somebody else clears what is effective; what is kept is taken up again below.
            thread::set_keep_capabilities(true)?;
            thread::set_thread_groups(&[])?;
            thread::set_thread_res_gid(gid, gid, gid)?;
            thread::set_thread_res_uid(uid, uid, uid)?;
        }
        let keeps = self.capabilities.intersection(mine.permitted);
        let sets = CapabilitySets {
            effective: keeps,
            permitted: keeps,
            inheritable: CapabilitySet::empty(),
        };
        thread::set_capabilities(None, sets)
    }
}

/// The kernel's rules that we know of.
const KNOWN: ABI = ABI::V3;

/// Everything a process opens or removes after it was confined.
fn within_reach(process: &ProcessArgs, plans: Vec<(PathBuf, FileAccess)>) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let rights = |access| match access {
        FileAccess::Read => AccessFs::from_read(KNOWN),
        FileAccess::ReadWrite => AccessFs::from_all(KNOWN),
    };
    let rules = process.confine.landlock_rules.iter();
    let mut files: Vec<_> = rules
        .map(|rule| (rule.path.clone(), rule.access))
        .chain(plans)
        .chain([(PathBuf::from("/dev/kvm"), FileAccess::ReadWrite)])
        .map(|(path, access)| (path, rights(access)))
        .collect();
    // A socket is removed when its process ends.
    let serial = match &process.serial {
        Serial::Socket(path) => Some(path),
        _ => None,
    };
    let sockets = process.api_socket.iter().chain(serial);
    files.extend(sockets.map(|path| (directory(path), AccessFs::RemoveFile.into())));
    files
}

/// Where a file lies.
fn directory(path: &Path) -> PathBuf {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    parent.unwrap_or_else(|| Path::new(".")).to_owned()
}

/// The process's resource limits.
fn limit(args: &ConfineArgs) -> Result<(), Failure> {
    // A core would hold the guest's secrets that are in our own buffers; its memory is left out anyway.
    let mut limits = vec![(Resource::Core, 0)];
    if let Some(limit) = args.resource_limit {
        limits.extend(limit.nofile.map(|most| (Resource::Nofile, most)));
        limits.extend(limit.fsize.map(|most| (Resource::Fsize, most.0)));
    }
    for (resource, most) in limits {
        let ceiling = getrlimit(resource).maximum;
        let most = Some(ceiling.map_or(most, |ceiling| most.min(ceiling)));
        setrlimit(
            resource,
            Rlimit {
                current: most,
                maximum: most,
            },
        )
        .map_err(Failure::on(format!("cannot set the limit on {resource:?}")))?;
    }
    Ok(())
}

/// Put every file but these out of reach.
fn landlock(files: &[(PathBuf, BitFlags<AccessFs>)]) -> Result<(), Failure> {
    let failed = |error: landlock::RulesetError| Failure::failed(format!("landlock: {error}"));
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (path, rights) in files {
        let fd = PathFd::new(path).map_err(|error| Failure::arguments(format!("landlock: {error}")))?;
        let rights = if path.is_dir() {
            *rights
        } else {
            *rights & AccessFs::from_file(KNOWN)
        };
        rules = rules.add_rule(PathBeneath::new(fd, rights)).map_err(failed)?;
    }
    // What any process reads of the system.
    let system = ["/proc/self", "/dev/urandom", "/dev/null", "/etc/localtime"];
    let status = rules
        .add_rules(path_beneath_rules(system, AccessFs::from_read(KNOWN)))
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(failed)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(Failure::failed(
            "landlock: expected a kernel that has it (from 5.13, with landlock among its security modules)",
        ));
    }
    Ok(())
}
