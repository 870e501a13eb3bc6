//! Do the crates depend on each other as the architecture allows?
//!
//! A crate here exists mostly because it must be *unable* to reach something. That is worth nothing unless somebody
//! looks: this module holds the real edges, as cargo resolves them, against [`PLAN`], the list in
//! `docs/architecture.md`. Crates that are planned but not written yet are in it too, so that what they must not reach
//! is decided before anybody needs it.
//!
//! Dev-dependencies are free: a test may reach for anything.

use std::collections::BTreeMap;

use crate::house::{House, Outcome, Room};

/// One crate's place in the house.
#[derive(Debug)]
struct Place {
    name: &'static str,
    folder: &'static str,
    /// The only members it may depend on.
    may_use: &'static [&'static str],
    /// Packages that must not be in a build of it, however they got there.
    never: &'static [&'static [&'static str]],
    /// Time, chance and the outside come in as arguments: the crate's `clippy.toml` bans the ways around that.
    pure: bool,
}

/// Threads that wait, sockets, TLS: whoever has none of these cannot do I/O behind our back.
const NETWORK: &[&str] = &[
    "tokio",
    "mio",
    "quinn",
    "quinn-proto",
    "quinn-udp",
    "socket2",
    "rustls",
    "hyper",
    "axum",
];
/// System calls by another door.
const SYSTEM: &[&str] = &[
    "libc",
    "nix",
    "rustix",
    "getrandom",
    "rand",
    "ring",
    "tempfile",
    "vmm-sys-util",
];
/// The hypervisor and the memory of its guests.
const KVM: &[&str] = &["kvm-ioctls", "kvm-bindings", "vm-memory", "umbra-machine"];

/// The house, bottom up. Folders depend downward only: `vmm`, then `transport`, then `migration`.
const PLAN: &[Place] = &[
    Place {
        name: "umbra-units",
        folder: "migration/units",
        may_use: &[],
        never: &[NETWORK, SYSTEM, KVM],
        pure: true,
    },
    Place {
        name: "umbra-core",
        folder: "migration/core",
        may_use: &["umbra-units"],
        never: &[NETWORK, SYSTEM, KVM],
        pure: true,
    },
    Place {
        name: "umbra-orchestration",
        folder: "migration/orchestration",
        may_use: &["umbra-units"],
        never: &[NETWORK, SYSTEM, KVM],
        pure: true,
    },
    Place {
        name: "umbra-paths",
        folder: "transport/paths",
        may_use: &["umbra-units"],
        // Not SYSTEM: the SIMD half of reed-solomon-erasure names its C types through libc, and calls nothing.
        never: &[NETWORK, KVM],
        pure: true,
    },
    Place {
        name: "umbra-quic",
        folder: "transport/quic",
        may_use: &["umbra-paths", "umbra-units"],
        never: &[KVM, &["umbra-core", "umbra-node"]],
        pure: false,
    },
    Place {
        name: "umbra-netem",
        folder: "transport/netem",
        may_use: &["umbra-units"],
        never: &[KVM, &["tokio", "quinn", "rustls", "umbra-core", "umbra-paths"]],
        pure: true,
    },
    Place {
        name: "umbra-devices",
        folder: "vmm/devices",
        may_use: &["umbra-units"],
        // Virtqueues live in guest memory: docs/decisions/0016-devices-see-guest-memory.md.
        never: &[NETWORK, &["kvm-ioctls", "kvm-bindings", "umbra-machine"]],
        pure: false,
    },
    Place {
        name: "umbra-machine",
        folder: "vmm/machine",
        may_use: &["umbra-core", "umbra-devices", "umbra-units"],
        never: &[NETWORK, &["umbra-node", "umbra-quic", "umbra-paths"]],
        pure: false,
    },
    Place {
        name: "umbra-node",
        folder: "vmm/node",
        may_use: &[
            "umbra-core",
            "umbra-orchestration",
            "umbra-paths",
            "umbra-quic",
            "umbra-units",
        ],
        // The plugin boundary: the node drives any guest, so it must be unable to know ours.
        never: &[KVM, &["umbra-devices", "vmm-sys-util"]],
        pure: false,
    },
    Place {
        name: "umbra",
        folder: "vmm/cli",
        // More than node and machine: docs/decisions/0009-what-the-program-joins.md.
        may_use: &[
            "umbra-core",
            "umbra-machine",
            "umbra-netem",
            "umbra-node",
            "umbra-paths",
            "umbra-quic",
            "umbra-units",
        ],
        never: &[],
        pure: false,
    },
    Place {
        name: "umbra-sim",
        folder: "tests/sim",
        may_use: &[
            "umbra-core",
            "umbra-netem",
            "umbra-orchestration",
            "umbra-paths",
            "umbra-units",
        ],
        never: &[KVM, &["tokio", "quinn", "rustls", "umbra-node", "umbra-quic"]],
        pure: false,
    },
    Place {
        name: "umbra-e2e",
        folder: "tests/e2e",
        // It drives real processes, so it needs no room of the product but the weather.
        may_use: &["umbra-netem", "umbra-units"],
        never: &[],
        pure: false,
    },
    Place {
        name: "umbra-bench",
        folder: "tests/bench",
        may_use: &[
            "umbra-core",
            "umbra-devices",
            "umbra-e2e",
            "umbra-machine",
            "umbra-netem",
            "umbra-node",
            "umbra-paths",
            "umbra-quic",
            "umbra-sim",
            "umbra-units",
        ],
        never: &[],
        pure: false,
    },
    Place {
        name: "xtask",
        folder: "tests/xtask",
        may_use: &[],
        // It compiles first on every fresh machine; see its Cargo.toml.
        never: &[NETWORK, KVM, &["clap", "syn"]],
        pure: false,
    },
];

/// Workspaces of their own: never members, so that their profiles, lints and toolchains do not leak in.
const APART: &[&str] = &["resources/guest", "tests/fuzz"];

/// The only crate that may contain `unsafe`.
const UNSAFE_LIVES_IN: &str = "umbra-machine";

/// What each pure crate's `clippy.toml` must ban.
const BANS: &[&str] = &[
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "std::thread::sleep",
    "std::thread::spawn",
    "std::collections::HashMap",
    "std::collections::HashSet",
    "std::net::UdpSocket",
    "std::net::TcpStream",
    "std::fs::File",
];

/// Everything that is not as planned, one line each.
pub(crate) fn check(house: &House) -> Outcome<Vec<String>> {
    let rooms = house.rooms()?;
    let mut complaints = edges(&rooms);
    for room in &rooms {
        let manifest = house.read(&format!("{}/Cargo.toml", room.folder))?;
        complaints.extend(lints(room, &manifest));
        for root in &room.roots {
            complaints.extend(unsafety(room, root, &house.read(root)?));
        }
        if place_of(&room.name).is_some_and(|place| place.pure) {
            let bans = house.read(&format!("{}/clippy.toml", room.folder)).unwrap_or_default();
            complaints.extend(missing_bans(room, &bans));
        }
    }
    Ok(complaints)
}

fn place_of(name: &str) -> Option<&'static Place> {
    PLAN.iter().find(|place| place.name == name)
}

fn edges(rooms: &[Room]) -> Vec<String> {
    let mut complaints = Vec::new();
    let by_name: BTreeMap<&str, &Room> = rooms.iter().map(|room| (room.name.as_str(), room)).collect();
    for (name, room) in by_name {
        if APART.contains(&room.folder.as_str()) {
            complaints.push(format!(
                "{} is a workspace of its own, and must not be a member",
                room.folder
            ));
            continue;
        }
        let Some(place) = place_of(name) else {
            complaints.push(format!(
                "{name} has no place in the plan (tests/xtask/src/edges.rs): give it one"
            ));
            continue;
        };
        if room.folder != place.folder {
            complaints.push(format!("{name} lives in {}, planned is {}", room.folder, place.folder));
        }
        for used in &room.uses {
            if !place.may_use.contains(&used.as_str()) {
                complaints.push(format!("{name} uses {used}; it may use {}", list(place.may_use)));
            }
        }
        for banned in place.never.iter().copied().flatten() {
            if room.reaches.contains(*banned) {
                complaints.push(format!(
                    "{name} reaches {banned}, which it must not: `cargo tree -p {name} -e normal -i {banned}` shows how"
                ));
            }
        }
    }
    complaints
}

fn lints(room: &Room, manifest: &str) -> Option<String> {
    let mut lines = manifest
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let inherits = lines.any(|line| line == "[lints]") && lines.next() == Some("workspace = true");
    (!inherits).then(|| format!("{}/Cargo.toml lacks `[lints] workspace = true`", room.folder))
}

fn unsafety(room: &Room, root: &str, source: &str) -> Option<String> {
    let forbids = source.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]");
    (!forbids && room.name != UNSAFE_LIVES_IN).then(|| format!("{root} lacks `#![forbid(unsafe_code)]`"))
}

fn missing_bans(room: &Room, clippy: &str) -> Vec<String> {
    let banned = |path: &&&str| !clippy.contains(&format!("path = \"{path}\""));
    BANS.iter()
        .filter(banned)
        .map(|path| format!("{}/clippy.toml does not ban {path}", room.folder))
        .collect()
}

fn list(names: &[&str]) -> String {
    if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(name: &str, uses: &[&str], reaches: &[&str]) -> Room {
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Room {
            name: name.to_owned(),
            folder: place_of(name).map_or_else(|| "elsewhere".to_owned(), |place| place.folder.to_owned()),
            uses: own(uses),
            reaches: own(reaches),
            roots: Vec::new(),
        }
    }

    #[test]
    fn the_house_stands_as_planned() {
        let complaints = check(&House::find().unwrap()).unwrap();
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    }

    #[test]
    fn a_crate_may_use_only_what_the_plan_lists() {
        assert_eq!(
            edges(&[room("umbra-node", &["umbra-core", "umbra-quic"], &[])]),
            Vec::<String>::new()
        );
        assert_eq!(
            edges(&[room("umbra-core", &["umbra-units", "umbra-paths"], &[])]),
            ["umbra-core uses umbra-paths; it may use umbra-units"]
        );
        assert_eq!(
            edges(&[room("umbra-units", &["umbra-core"], &[])]),
            ["umbra-units uses umbra-core; it may use nothing"]
        );
    }

    #[test]
    fn no_folder_uses_one_above_it_and_only_tests_use_a_test() {
        let height = |name: &str| {
            let folder = place_of(name).expect("the plan names only crates it places").folder;
            ["migration/", "transport/", "vmm/", "tests/"]
                .iter()
                .position(|family| folder.starts_with(family))
        };
        for place in PLAN {
            for used in place.may_use {
                assert!(height(used) <= height(place.name), "{} may use {used}", place.name);
                let is_test = |name: &str| place_of(name).unwrap().folder.starts_with("tests/");
                assert!(is_test(place.name) || !is_test(used), "{} may use {used}", place.name);
            }
        }
    }

    #[test]
    fn the_plan_has_no_cycle() {
        // In the plan's own order everything stands on what came before it.
        for (n, place) in PLAN.iter().enumerate() {
            for used in place.may_use {
                assert!(
                    PLAN[..n].iter().any(|earlier| earlier.name == *used),
                    "{} uses {used} before it",
                    place.name
                );
            }
        }
    }

    #[test]
    fn the_node_cannot_reach_the_machine_not_even_through_others() {
        let complaints = edges(&[room("umbra-node", &["umbra-core"], &["umbra-core", "umbra-machine"])]);
        assert_eq!(complaints.len(), 1);
        assert!(
            complaints[0].starts_with("umbra-node reaches umbra-machine, which it must not"),
            "{complaints:?}"
        );
    }

    #[test]
    fn migration_reaches_no_io_crate_even_before_the_crate_is_written() {
        for name in ["umbra-units", "umbra-core", "umbra-orchestration"] {
            for banned in ["tokio", "quinn", "socket2", "libc", "rand", "kvm-ioctls"] {
                assert_eq!(
                    edges(&[room(name, &[], &[banned])]).len(),
                    1,
                    "{name} reaching {banned}"
                );
            }
        }
    }

    #[test]
    fn a_crate_without_a_place_or_in_the_wrong_place_is_refused() {
        assert_eq!(
            edges(&[room("umbra-extra", &[], &[])]),
            ["umbra-extra has no place in the plan (tests/xtask/src/edges.rs): give it one"]
        );
        let moved = Room {
            folder: "vmm/core".to_owned(),
            ..room("umbra-core", &[], &[])
        };
        assert_eq!(
            edges(&[moved]),
            ["umbra-core lives in vmm/core, planned is migration/core"]
        );
        let fuzz = Room {
            folder: "tests/fuzz".to_owned(),
            ..room("umbra-fuzz", &[], &[])
        };
        assert_eq!(
            edges(&[fuzz]),
            ["tests/fuzz is a workspace of its own, and must not be a member"]
        );
    }

    #[test]
    fn unsafe_code_is_forbidden_everywhere_but_in_the_machine() {
        let source = "//! Words.\nfn main() {}\n";
        let complaint = unsafety(&room("umbra-core", &[], &[]), "migration/core/src/lib.rs", source);
        assert_eq!(
            complaint.as_deref(),
            Some("migration/core/src/lib.rs lacks `#![forbid(unsafe_code)]`")
        );
        let source = "//! Words.\n#![forbid(unsafe_code)]\n";
        assert_eq!(unsafety(&room("umbra-core", &[], &[]), "lib.rs", source), None);
        assert_eq!(unsafety(&room("umbra-machine", &[], &[]), "lib.rs", ""), None);
    }

    #[test]
    fn every_crate_takes_the_workspaces_lints() {
        let core = room("umbra-core", &[], &[]);
        assert_eq!(
            lints(&core, "[package]\nname = \"x\"\n\n[lints]\nworkspace = true\n"),
            None
        );
        let complaint = Some("migration/core/Cargo.toml lacks `[lints] workspace = true`".to_owned());
        assert_eq!(lints(&core, "[package]\nname = \"x\"\n"), complaint);
        assert_eq!(
            lints(
                &core,
                "[lints]\nrust.unsafe_code = \"warn\"\n[other]\nworkspace = true\n"
            ),
            complaint
        );
    }

    #[test]
    fn a_pure_crate_bans_the_ways_around_its_arguments() {
        let core = room("umbra-core", &[], &[]);
        assert_eq!(missing_bans(&core, "").len(), BANS.len());
        let all: String = BANS
            .iter()
            .map(|path| format!("{{ path = \"{path}\", reason = \"\" }},\n"))
            .collect();
        assert_eq!(missing_bans(&core, &all), Vec::<String>::new());
        let without = all.replace("std::thread::sleep", "std::thread::park");
        assert_eq!(
            missing_bans(&core, &without),
            ["migration/core/clippy.toml does not ban std::thread::sleep"]
        );
    }
}
