//! What the guest does with its memory while it runs.

use core::fmt;
use core::time::Duration;

use umbra_units::Rng;

/// Which pages are written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Pattern {
    /// None: what hides lost retransmissions from every other pattern's eyes.
    Idle,
    /// One page, over and over.
    Hot,
    /// Any page.
    Uniform,
    /// Few pages often, many pages seldom.
    Zipf,
    /// A small window that moves.
    Phase,
}

/// What is written to a page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Content {
    Zeros,
    Counter,
    Random,
    /// What the page held before its latest write: equal to something the shadow once held, or holds.
    Older,
    /// What it holds: dirty, but unchanged.
    Same,
}

/// Which guests a run of many worlds is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guests {
    /// As drawn: some of each.
    #[default]
    Drawn,
    /// None writes anything but while its devices are saved.
    Idle,
    /// All write.
    Busy,
}

/// The guest's work.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) pattern: Pattern,
    /// `None` draws one for each write.
    pub(crate) content: Option<Content>,
    /// Between two bursts, on average.
    pub(crate) every: Duration,
    /// Writes of one burst.
    pub(crate) burst: u64,
}

impl Program {
    /// The program of a world.
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let pattern = match rng.below(8) {
            0 | 1 => Pattern::Idle,
            2 => Pattern::Hot,
            3 | 4 => Pattern::Uniform,
            5 | 6 => Pattern::Zipf,
            _ => Pattern::Phase,
        };
        let content = match rng.below(6) {
            0 => Some(Content::Random),
            1 => Some(Content::Counter),
            2 => Some(Content::Older),
            _ => None,
        };
        Self {
            pattern,
            content,
            every: crate::conditions::log_uniform(rng, 300, 100_000),
            burst: 1 + rng.below(4),
        }
    }

    /// The same program for a guest of this kind.
    pub(crate) fn of(mut self, guests: Guests) -> Self {
        match (guests, self.pattern) {
            (Guests::Idle, _) => self.pattern = Pattern::Idle,
            (Guests::Busy, Pattern::Idle) => self.pattern = Pattern::Uniform,
            _ => {}
        }
        self
    }

    /// Whether it writes at all.
    pub(crate) fn is_idle(&self) -> bool {
        self.pattern == Pattern::Idle
    }

    /// The writes of one burst to a guest of `pages` pages.
    pub(crate) fn writes(&self, pages: usize, ticks: u64, rng: &mut Rng) -> Vec<(usize, Content)> {
        if self.is_idle() || pages == 0 {
            return Vec::new();
        }
        (0..self.burst)
            .map(|_| {
                (
                    self.page(pages as u64, ticks, rng),
                    self.content.unwrap_or_else(|| any(rng)),
                )
            })
            .collect()
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a draw within 0..pages, clamped"
    )]
    fn page(&self, pages: u64, ticks: u64, rng: &mut Rng) -> usize {
        let page = match self.pattern {
            Pattern::Idle | Pattern::Hot => 0,
            Pattern::Uniform => rng.below(pages),
            // The inverse of a bounded Pareto: pages^u is log-uniform, which is Zipf with exponent one.
            Pattern::Zipf => (pages as f64).powf(rng.unit()) as u64 - 1,
            Pattern::Phase => (ticks / 64 * 7 + rng.below(4)) % pages,
        };
        page.min(pages - 1) as usize
    }
}

fn any(rng: &mut Rng) -> Content {
    match rng.below(8) {
        0 => Content::Zeros,
        1 | 2 => Content::Counter,
        3 | 4 => Content::Random,
        5 | 6 => Content::Older,
        _ => Content::Same,
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_idle() {
            return f.write_str("idle");
        }
        let content = self
            .content
            .map_or_else(|| "mixed".to_owned(), |content| format!("{content:?}"));
        let content = content.to_lowercase();
        let pattern = format!("{:?}", self.pattern).to_lowercase();
        write!(
            f,
            "{pattern}, {} pages of {content} content every {:?}",
            self.burst, self.every
        )
    }
}
