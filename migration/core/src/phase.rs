//! What a source and a shadow can be doing, and every way from one to the next, in one table each.
//!
//! The table is the protocol: the methods, the diagram in `docs/phases.md` and the exhaustive tests all come from it,
//! so they cannot disagree. A move that is not in the table is refused and changes nothing.

/// Declares a phase type with its moves: `name: From | From => To`. Each move becomes a method that makes it or
/// refuses, and all of them become `MOVES`.
macro_rules! moves {
    (
        $(#[$type_doc:meta])* $Phase:ident:
        { $( $(#[$phase_doc:meta])* $variant:ident, )+ }
        { $( $(#[$move_doc:meta])* $name:ident: $($from:ident)|+ => $to:ident; )+ }
    ) => {
        $(#[$type_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $Phase { $( $(#[$phase_doc])* $variant, )+ }

        impl $Phase {
            /// Every phase.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Every move: its name, whence, whither.
            pub const MOVES: &[(&str, &[Self], Self)] =
                &[$((stringify!($name), &[$(Self::$from),+], Self::$to)),+];

            $(
                $(#[$move_doc])*
                #[doc = ""]
                #[doc = "Refused, with nothing changed, from any phase the table does not list."]
                pub fn $name(&mut self) -> Result<(), crate::error::Refused> {
                    self.make(stringify!($name), &[$(Self::$from),+], Self::$to)
                }
            )+

            fn make(&mut self, name: &str, from: &[Self], to: Self) -> Result<(), crate::error::Refused> {
                if from.contains(self) {
                    *self = to;
                    Ok(())
                } else {
                    Err(crate::error::Refused(format!("`{name}` does not follow the phase `{self}`")))
                }
            }

            /// The graph in Graphviz's language.
            pub fn dot() -> String {
                let mut dot = format!("digraph {} {{\n", stringify!($Phase));
                for (name, from, to) in Self::MOVES {
                    for from in *from {
                        dot.push_str(&format!("    {from:?} -> {to:?} [label=\"{name}\"];\n"));
                    }
                }
                dot.push_str("}\n");
                dot
            }
        }
    };
}

moves! {
    /// What a source is doing.
    SourcePhase:
    {
        /// Said hello; the shadow is building the guest's twin.
        Joining,
        /// The first full copy is under way.
        Seeding,
        /// Every page has been there once; changes follow continuously.
        Following,
        /// The guest is stopped for an instant, so that an epoch can be cut; it runs on as soon as its pages are kept.
        Cutting,
        /// The guest is stopped and its final epoch is travelling. Until the shadow is prepared, this can be undone.
        Final,
        /// This node gave the guest up and said go. It never runs the guest again on its own.
        HandedOver,
        /// The shadow runs the guest. The end, and a good one.
        Done,
        /// This session is over; the guest is here.
        Abandoned,
    }
    {
        /// The shadow has a twin ready to be filled.
        welcomed: Joining => Seeding;
        /// Every page has been held by the shadow once.
        seeded: Seeding => Following;
        /// An epoch is to be cut: stop the guest for an instant.
        stopped_to_cut: Following => Cutting;
        /// The guest runs on, and the epoch's pages travel; or the cut failed.
        ran_on: Cutting => Following;
        /// The decision to switch fell: stop the guest and cut the final epoch.
        stopped: Following => Final;
        /// The final epoch did not get through in time, or somebody cancelled: run on here, follow on.
        withdrew: Final => Following;
        /// The commit point: the shadow is prepared, so give the guest up and say go.
        gave_up: Final => HandedOver;
        /// The shadow says the guest runs there.
        confirmed: HandedOver => Done;
        /// The shadow says it did not run the guest and never will: the guest is handed back.
        handed_back: HandedOver => Abandoned;
        /// End the session; the guest stays here.
        abandoned: Joining | Seeding | Following | Cutting | Final => Abandoned;
        /// An operator vouches that the shadow is dead and never ran: the guest is taken back.
        reclaimed: HandedOver => Abandoned;
    }
}

moves! {
    /// What a shadow is doing.
    ShadowPhase:
    {
        /// Nobody has said hello yet.
        Listening,
        /// Building the guest's twin.
        Building,
        /// Receiving pages; what it holds is no consistent cut.
        Following,
        /// Has every page of the final epoch, verified; loading vCPU and device state.
        Preparing,
        /// Could run this instant, and waits to be told. Never runs without being told.
        Prepared,
        /// Was told; starting the vCPUs.
        Starting,
        /// Runs the guest: it is no shadow any more. The end, and a good one.
        Running,
        /// This session is over, and what it received will never run.
        Abandoned,
    }
    {
        /// A source said hello.
        greeted: Listening => Building;
        /// The twin stands.
        built: Building => Following;
        /// The final epoch is whole and its digest is right.
        verified: Following => Preparing;
        /// An operator vouches that the source is dead: go back to the epoch that was committed last, and load its state.
        recalled: Following => Preparing;
        /// State is loaded.
        prepared: Preparing => Prepared;
        /// The source took the final epoch back, or the committed one could not be loaded.
        withdrawn: Preparing | Prepared => Following;
        /// The source gave the guest up and said go.
        told: Prepared => Starting;
        /// The vCPUs run.
        started: Starting => Running;
        /// Starting failed before any instruction of the guest ran.
        declined: Starting => Abandoned;
        /// End the session.
        abandoned: Listening | Building | Following | Preparing | Prepared => Abandoned;
        /// An operator vouches that the source is dead and will not return: run the prepared final epoch.
        vouched: Prepared => Starting;
    }
}

macro_rules! display_as_words {
    ($($Phase:ident { $($variant:ident = $words:literal),+ $(,)? })+) => {$(
        impl core::fmt::Display for $Phase {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(match self { $(Self::$variant => $words),+ })
            }
        }
    )+};
}

display_as_words! {
    SourcePhase {
        Joining = "joining", Seeding = "seeding", Following = "following", Cutting = "cutting", Final = "final",
        HandedOver = "handed over", Done = "done", Abandoned = "abandoned",
    }
    ShadowPhase {
        Listening = "listening", Building = "building", Following = "following", Preparing = "preparing",
        Prepared = "prepared", Starting = "starting", Running = "running", Abandoned = "abandoned",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn into(to: SourcePhase) -> Vec<&'static str> {
        SourcePhase::MOVES
            .iter()
            .filter(|(_, _, t)| *t == to)
            .map(|(name, _, _)| *name)
            .collect()
    }

    fn out_of(from: SourcePhase) -> Vec<&'static str> {
        SourcePhase::MOVES
            .iter()
            .filter(|(_, f, _)| f.contains(&from))
            .map(|(name, _, _)| *name)
            .collect()
    }

    #[test]
    fn a_source_that_gave_up_runs_again_only_by_the_shadows_or_an_operators_word() {
        assert_eq!(into(SourcePhase::HandedOver), ["gave_up"]);
        assert_eq!(
            out_of(SourcePhase::HandedOver),
            ["confirmed", "handed_back", "reclaimed"]
        );
        assert!(out_of(SourcePhase::Done).is_empty());
        assert!(out_of(SourcePhase::Abandoned).is_empty());
    }

    #[test]
    fn a_shadow_starts_only_when_told_or_vouched_for_and_only_when_prepared() {
        let starting: Vec<_> = ShadowPhase::MOVES
            .iter()
            .filter(|(_, _, to)| *to == ShadowPhase::Starting)
            .collect();
        assert_eq!(
            starting.iter().map(|(name, _, _)| *name).collect::<Vec<_>>(),
            ["told", "vouched"]
        );
        assert!(starting.iter().all(|(_, from, _)| *from == [ShadowPhase::Prepared]));
        let running: Vec<_> = ShadowPhase::MOVES
            .iter()
            .filter(|(_, _, to)| *to == ShadowPhase::Running)
            .collect();
        assert!(running.iter().all(|(_, from, _)| *from == [ShadowPhase::Starting]));
    }

    #[test]
    fn a_move_that_is_not_in_the_table_changes_nothing() {
        for phase in SourcePhase::ALL {
            let mut it = *phase;
            let allowed = out_of(*phase).contains(&"gave_up");
            assert_eq!(it.gave_up().is_ok(), allowed);
            assert_eq!(
                it == SourcePhase::HandedOver,
                allowed || *phase == SourcePhase::HandedOver
            );
        }
        let refusal = SourcePhase::Seeding.clone().gave_up().unwrap_err();
        assert_eq!(refusal.0, "`gave_up` does not follow the phase `seeding`");
    }

    #[test]
    fn the_book_shows_these_very_graphs() {
        let book = include_str!("../../../docs/phases.md");
        for dot in [SourcePhase::dot(), ShadowPhase::dot()] {
            assert!(book.contains(&dot), "docs/phases.md lacks this graph; paste it:\n{dot}");
        }
    }
}
