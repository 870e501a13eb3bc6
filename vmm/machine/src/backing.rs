//! Whether this host has the memory a guest is to be backed by, asked before it is taken.
//!
//! Ordinary guest memory is overcommitted: a page costs the host something when it is first touched, and a host that then
//! has nothing left kills somebody. Who asks for huge pages or for all pages at once wants to know at the start instead,
//! and in words: taking what is not there would end in an out-of-memory kill (prefault) or a bus error (huge pages).

use std::path::Path;

use umbra_units::Bytes;

use crate::config::{Backing, HugePages, Shape};
use crate::error::Error;

/// Refuse what this host has no memory for.
pub(crate) fn check(shape: Shape, backing: Backing) -> Result<(), Error> {
    match backing.huge_pages {
        Some(huge) => huge_pages_are_free(shape.memory(), huge),
        None if backing.prefault => memory_is_available(shape.memory()),
        None => Ok(()),
    }
}

fn huge_pages_are_free(memory: Bytes, huge: HugePages) -> Result<(), Error> {
    let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", huge.bytes().0 >> 10);
    let count = |file: &str| read(Path::new(&folder).join(file).as_path()).and_then(|text| text.trim().parse().ok());
    let wanted = memory.0 / huge.bytes().0;
    let (Some(free), Some(promised)) = (count("free_hugepages"), count("resv_hugepages")) else {
        return Err(Error::Incompatible(format!(
            "memory: this host has no huge pages of {}",
            huge.bytes()
        )));
    };
    let free: u64 = u64::saturating_sub(free, promised);
    if wanted > free {
        return Err(Error::Incompatible(format!(
            "memory: {wanted} huge pages of {} needed, {free} are free: reserve more in {folder}/nr_hugepages",
            huge.bytes()
        )));
    }
    Ok(())
}

fn memory_is_available(memory: Bytes) -> Result<(), Error> {
    let host = read(Path::new("/proc/meminfo")).and_then(|text| mem_available(&text));
    let group = read(Path::new("/proc/self/cgroup")).and_then(|text| group_room(&text, read));
    // A host that does not tell is believed to have enough: it is asked again by taking.
    let Some(available) = host.into_iter().chain(group).min() else {
        return Ok(());
    };
    if memory > available {
        return Err(Error::Incompatible(format!(
            "memory: {memory} asked for at once (prefault), this host has {available} to give"
        )));
    }
    Ok(())
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// What can be taken without swapping, as the kernel estimates (proc(5), `MemAvailable`).
fn mem_available(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.saturating_mul(1024)))
}

/// What the control group of this process, and each above it, may still take (Documentation/admin-guide/cgroup-v2.rst).
fn group_room(own: &str, read: impl Fn(&Path) -> Option<String>) -> Option<Bytes> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let own = Path::new("/sys/fs/cgroup").join(path);
    let number = |folder: &Path, file: &str| read(&folder.join(file))?.trim().parse::<u64>().ok();
    own.ancestors()
        .take_while(|folder| folder.starts_with("/sys/fs/cgroup"))
        // A group without a limit says "max", which is no number.
        .filter_map(|folder| Some(number(folder, "memory.max")?.saturating_sub(number(folder, "memory.current")?)))
        .min()
        .map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sharing;

    #[test]
    fn what_is_available_is_the_kernels_own_estimate() {
        let text = "MemTotal:  100 kB\nMemFree:   10 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(mem_available(text), Some(Bytes::mib(2)));
        assert_eq!(mem_available("MemTotal: 100 kB\n"), None);
    }

    #[test]
    fn the_tightest_control_group_above_counts() {
        let files = |path: &Path| {
            let text = match path.to_str().unwrap() {
                "/sys/fs/cgroup/a/b/memory.max" => "max\n",
                "/sys/fs/cgroup/a/memory.max" => "1000\n",
                "/sys/fs/cgroup/a/memory.current" => "400\n",
                _ => return None,
            };
            Some(text.to_owned())
        };
        assert_eq!(group_room("0::/a/b\n", files), Some(Bytes(600)));
        assert_eq!(group_room("0::/\n", files), None);
        assert_eq!(group_room("3:cpu:/a\n", files), None);
    }

    #[test]
    fn more_than_the_host_has_is_refused_in_one_line_before_it_is_taken() {
        let shape = Shape::new(1, crate::limits::MEMORY_MOST, Sharing::Private).unwrap();
        let refused = |backing| check(shape, backing).unwrap_err().to_string();
        let line = refused(Backing {
            prefault: true,
            ..Backing::default()
        });
        assert!(line.starts_with("memory: 1024.00 GiB asked for at once"), "{line}");
        for huge in [HugePages::TwoMib, HugePages::OneGib] {
            let line = refused(Backing {
                huge_pages: Some(huge),
                ..Backing::default()
            });
            assert!(
                line.starts_with("memory: ") && line.contains("huge pages") && !line.contains('\n'),
                "{line}"
            );
        }
        check(shape, Backing::default()).unwrap();
    }
}
