//! Everything of a guest that is not memory: its description and its records, as they travel.
//!
//! `umbrasta`, then a list of one record (the description), then the list of state records, both in the encoding of
//! `docs/wire.md`, under *Records*.

use umbra_units::{Reader, Writer};

use super::Unreadable;
use crate::batch::{read_records, write_records};
use crate::guest::StateRecord;
use crate::limits;

const MARK: &[u8; 8] = b"umbrasta";

/// The bytes of the state part; refused if a reader would refuse them.
pub fn encode_state(description: &StateRecord, records: &[StateRecord]) -> Result<Vec<u8>, Unreadable> {
    let mut out = Writer::new();
    out.put(MARK);
    write_records(std::slice::from_ref(description), &mut out);
    write_records(records, &mut out);
    if out.len() as u64 > limits::SNAPSHOT_STATE_BYTES {
        let expected = format!("at most {} bytes", limits::SNAPSHOT_STATE_BYTES);
        return Err(Unreadable::expected("state", expected, out.len()));
    }
    Ok(out.into_bytes())
}

/// The description and the records.
pub fn decode_state(bytes: &[u8]) -> Result<(StateRecord, Vec<StateRecord>), Unreadable> {
    let mut reader = Reader::new(bytes);
    if reader.array::<8>("state mark")? != *MARK {
        return Err(reader.malformed("state mark").into());
    }
    let [description] =
        <[StateRecord; 1]>::try_from(read_records(&mut reader)?).map_err(|_| reader.malformed("description"))?;
    let records = read_records(&mut reader)?;
    reader.finish("state")?;
    Ok((description, records))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: &str, bytes: usize) -> StateRecord {
        StateRecord {
            kind: kind.to_owned(),
            version: 2,
            bytes: vec![7; bytes],
        }
    }

    #[test]
    fn state_is_read_as_it_was_written_and_no_shorter() {
        let (description, records) = (record("machine", 5), vec![record("vcpu/0", 9), record("serial/0", 0)]);
        let bytes = encode_state(&description, &records).unwrap();
        assert_eq!(decode_state(&bytes), Ok((description, records)));
        for len in 0..bytes.len() {
            assert!(decode_state(&bytes[..len]).is_err(), "{len}");
        }
        assert!(decode_state(&[bytes, vec![0]].concat()).is_err(), "trailing bytes");
    }

    #[test]
    fn state_that_could_not_be_read_again_is_not_written() {
        let records = vec![record("a", limits::RECORD_BYTES); 5];
        let error = encode_state(&record("machine", 1), &records).unwrap_err().to_string();
        assert!(
            error.starts_with("state: expected at most 16777216 bytes, got"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_reading_state_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_state(&bytes);
            let _ = decode_state(&[&MARK[..], &bytes].concat());
        }
    }
}
