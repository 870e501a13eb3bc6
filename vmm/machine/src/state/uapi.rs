//! KVM's structures as bytes.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use umbra_units::{Malformed, Reader};

/// A structure of KVM's interface that is nothing but its bytes.
///
/// # Safety
/// The type is `repr(C)`, has no padding between or behind its fields (what the interface leaves out, it names
/// `padding`), and any bytes are a value of it.
pub(crate) unsafe trait Uapi: Copy + Default {}

// SAFETY: in each of these every field is an integer, an array of integers, or a structure or union of such, and KVM's
// headers pad them by name up to their alignment: the sizes of the fields add up to the size of the structure.
unsafe impl Uapi for kvm_mp_state {}
// SAFETY: as above.
unsafe impl Uapi for kvm_regs {}
// SAFETY: as above.
unsafe impl Uapi for kvm_sregs {}
// SAFETY: as above.
unsafe impl Uapi for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Uapi for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Uapi for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Uapi for kvm_vcpu_events {}
// SAFETY: as above; the union's first member covers all of it.
unsafe impl Uapi for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Uapi for kvm_pit_state2 {}
// SAFETY: as above.
unsafe impl Uapi for kvm_clock_data {}

/// The bytes of `value`.
pub(crate) fn bytes_of<T: Uapi>(value: &T) -> &[u8] {
    // SAFETY: `Uapi` promises that all of these bytes are initialised; they live as long as `value` is borrowed.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The value these bytes are, which must be exactly as many as it has.
pub(crate) fn from_bytes<T: Uapi>(bytes: &[u8], what: &'static str) -> Result<T, Malformed> {
    if bytes.len() != size_of::<T>() {
        return Err(Malformed { what, at: 0 });
    }
    // SAFETY: there are enough bytes (checked above), and `Uapi` promises that any are a value.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// The next length-prefixed value.
pub(crate) fn read<T: Uapi>(r: &mut Reader<'_>, what: &'static str) -> Result<T, Malformed> {
    let at = r.position();
    from_bytes(r.bytes_within(size_of::<T>(), what)?, what).map_err(|malformed| Malformed { at, ..malformed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_and_its_bytes_are_the_same_thing() {
        let regs = kvm_regs {
            rip: 0x1122_3344_5566_7788,
            r8: 8,
            ..Default::default()
        };
        let bytes = bytes_of(&regs);
        assert_eq!(from_bytes::<kvm_regs>(bytes, "regs"), Ok(regs));
        assert_eq!(bytes[16 * 8..17 * 8], 0x1122_3344_5566_7788_u64.to_le_bytes());
        for wrong in [&bytes[1..], &[bytes, &[0]].concat()] {
            assert_eq!(
                from_bytes::<kvm_regs>(wrong, "regs"),
                Err(Malformed { what: "regs", at: 0 })
            );
        }
    }
}
