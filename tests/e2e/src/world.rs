//! One story: its folder, its hosts, everything that is observed, and what is printed when it goes wrong.

use std::any::Any;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use umbra_netem::Weather;

use crate::host::{Host, Shadow};
use crate::process::Evidence;
use crate::roads::Roads;

/// Long enough for anything here on a busy machine; nothing waits for it when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Stories told at once. Each has a guest, its twin and two network stacks: more of them than processors only makes
/// all of them late.
const AT_ONCE: usize = 2;

/// Tell a story: a test that needs guests. Fails with everything that was observed if the story does.
///
/// # Panics
/// When the story fails: this is for tests.
pub fn story(tell: impl FnOnce(&World) -> Result<()>) {
    if !kvm_is_here() {
        return;
    }
    let _place = Place::take();
    let world = World::new().expect("a folder and the programs under test");
    let told = catch_unwind(AssertUnwindSafe(|| tell(&world)));
    let failed: Box<dyn Any + Send> = match told {
        Ok(Ok(())) => return,
        Ok(Err(error)) => Box::new(format!("{error:#}")),
        Err(panic) => panic,
    };
    println!("{}", world.evidence());
    match failed.downcast::<String>() {
        Ok(text) => panic!("{text}"),
        Err(panic) => resume_unwind(panic),
    }
}

/// Whether guests can run. They fail without KVM, unless somebody says that this is known.
fn kvm_is_here() -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(why) if std::env::var_os("UMBRA_SKIP_KVM").is_some_and(|value| value == "1") => {
            eprintln!("SKIPPED: /dev/kvm: {why}");
            false
        }
        Err(why) => panic!("this test needs KVM (set UMBRA_SKIP_KVM=1 to skip it): /dev/kvm: {why}"),
    }
}

/// A place among the stories told at once.
struct Place;

static TAKEN: Mutex<usize> = Mutex::new(0);
static LEFT: Condvar = Condvar::new();

impl Place {
    fn take() -> Self {
        let full = |taken: &mut usize| *taken >= AT_ONCE;
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        *LEFT.wait_while(taken, full).unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        LEFT.notify_one();
    }
}

/// Wakes whoever waits, whenever anything was observed.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<u64>,
    ringing: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        *self.rung() += 1;
        self.ringing.notify_all();
    }

    /// Look again after every ring until there is something to see; `None` after [`PATIENCE`].
    pub(crate) fn wait<T>(&self, patience: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let until = Instant::now() + patience;
        let mut seen = *self.rung();
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let still = |rung: &mut u64| *rung == seen;
            let (rung, _) = self
                .ringing
                .wait_timeout_while(self.rung(), left, still)
                .unwrap_or_else(PoisonError::into_inner);
            seen = *rung;
        }
    }

    fn rung(&self) -> MutexGuard<'_, u64> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the programs under test are.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) umbra: PathBuf,
    pub(crate) guest: PathBuf,
}

impl Programs {
    fn find() -> Result<Self> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        // target/PROFILE/deps/this-test
        let exe = std::env::current_exe()?;
        let profile = exe.ancestors().nth(2).context("a test lies in its target folder")?;
        let target = profile.parent().context("a profile lies in its target folder")?;
        let umbra = find("UMBRA_BIN", &[target.join("release/umbra"), profile.join("umbra")])?;
        let own = workspace.join("resources/guest/target/release/umbra-guest");
        let guest = find("UMBRA_GUEST", &[target.join("guest/release/umbra-guest"), own])?;
        Ok(Self { umbra, guest })
    }
}

fn find(variable: &str, usual: &[PathBuf]) -> Result<PathBuf> {
    if let Some(given) = std::env::var_os(variable) {
        let given = PathBuf::from(given);
        anyhow::ensure!(given.is_file(), "{variable}={}: no such file", given.display());
        return Ok(given);
    }
    match usual.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!(
            "{} is missing: run `cargo xtask test`, which builds it, or set {variable}",
            usual.first().map(|path| path.display().to_string()).unwrap_or_default()
        ),
    }
}

/// Everything of one story.
#[derive(Debug)]
pub struct World {
    pub(crate) shared: Arc<Shared>,
    began: Instant,
}

/// What processes and guests need of their world.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) programs: Programs,
    pub(crate) folder: TempDir,
    pub(crate) bell: Arc<Bell>,
    evidence: Mutex<Vec<Arc<Evidence>>>,
    names: AtomicU32,
}

impl Shared {
    /// A path in the story's folder that nobody else has.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        self.folder
            .path()
            .join(format!("{}-{name}", self.names.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn keep(&self, evidence: Arc<Evidence>) {
        self.evidence
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(evidence);
    }
}

impl World {
    /// An empty one. Most tests want [`story`]; programs that measure build theirs here.
    pub fn new() -> Result<Self> {
        let shared = Arc::new(Shared {
            programs: Programs::find()?,
            folder: tempfile::Builder::new().prefix("umbra-e2e-").tempdir()?,
            bell: Arc::default(),
            evidence: Mutex::default(),
            names: AtomicU32::new(0),
        });
        Ok(Self {
            shared,
            began: Instant::now(),
        })
    }

    /// A host with an identity of its own.
    pub fn host(&self, name: &str) -> Result<Host> {
        Host::new(Arc::clone(&self.shared), name)
    }

    /// Paths to a shadow, each through a relay with its own weather.
    pub fn roads(&self, shadow: &Shadow, weather: &[Weather]) -> Result<Roads> {
        Roads::build(shadow, weather)
    }

    /// A path in the story's folder that nobody else has.
    pub fn fresh_path(&self, name: &str) -> PathBuf {
        self.shared.fresh(name)
    }

    /// Look again whenever anything was observed, until there is something to see.
    ///
    /// # Errors
    /// There was nothing for [`PATIENCE`].
    pub fn wait<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
        self.shared
            .bell
            .wait(PATIENCE, look)
            .with_context(|| format!("waited {PATIENCE:?} in vain for {what}"))
    }

    /// Everything that every process of the story said, for whoever has to find out why it went wrong.
    pub fn evidence(&self) -> String {
        let mut text = format!("evidence after {:.1?}:\n", self.began.elapsed());
        for evidence in self
            .shared
            .evidence
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            let _ = writeln!(text, "{}", evidence.text(self.began));
        }
        text
    }
}
