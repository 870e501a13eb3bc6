//! Whether one snapshot goes on where another ended.

use super::{Checksum, Manifest, Unreadable};

/// Whether `child` was made from `parent`, whose own checksum is `checksum`. The error says what does not fit.
pub fn goes_on(parent: &Manifest, checksum: Checksum, child: &Manifest) -> Result<(), Unreadable> {
    let Some(named) = &child.parent else {
        return Err(Unreadable("it is a full snapshot and goes on from none".to_owned()));
    };
    if named.id != parent.id {
        return Err(Unreadable::expected("id", named.id, parent.id));
    }
    if named.checksum != checksum {
        return Err(Unreadable::expected("checksum", named.checksum, checksum));
    }
    if child.guest != parent.guest {
        return Err(Unreadable::expected("guest", child.guest, parent.guest));
    }
    if child.spaces != parent.spaces {
        return Err(Unreadable::expected("spaces", "those of its child", "others"));
    }
    if child.first_batch != parent.next_batch() {
        return Err(Unreadable::expected(
            "last batch",
            child.first_batch.0.wrapping_sub(1),
            parent.next_batch().0 - 1,
        ));
    }
    if child.cut.0.checked_sub(1) != Some(parent.cut.0) {
        return Err(Unreadable::expected("cut", child.cut.0.wrapping_sub(1), parent.cut));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::manifest::tests::{differential, full};
    use umbra_units::{BatchId, Epoch, GuestId, PageCount, SnapshotId};

    #[test]
    fn a_child_goes_on_from_its_own_parent_and_no_other() {
        let parent = full();
        let (_, checksum) = parent.encode();
        let child = differential();
        assert_eq!(goes_on(&parent, checksum, &child), Ok(()));
        let line =
            |parent: &Manifest, checksum, child: &Manifest| goes_on(parent, checksum, child).unwrap_err().to_string();
        assert!(line(&parent, checksum, &parent).contains("full snapshot"));
        assert!(line(&parent, Checksum(7), &child).starts_with("checksum: expected "));
        let stranger = Manifest {
            id: SnapshotId([9; 16]),
            ..parent.clone()
        };
        assert!(line(&stranger, checksum, &child).starts_with("id: expected "));
        let of_another = Manifest {
            guest: GuestId([9; 16]),
            ..parent.clone()
        };
        assert!(line(&of_another, checksum, &child).starts_with("guest: expected "));
        let larger = Manifest {
            spaces: vec![crate::guest::Space::ram(PageCount(9))],
            ..parent.clone()
        };
        assert!(line(&larger, checksum, &child).starts_with("spaces: "));
        let gap = Manifest {
            first_batch: BatchId(9),
            ..child.clone()
        };
        assert!(line(&parent, checksum, &gap).starts_with("last batch: expected 8, got '2'"));
        let skipped = Manifest { cut: Epoch(3), ..child };
        assert!(line(&parent, checksum, &skipped).starts_with("cut: expected 2, got '1'"));
    }
}
