//! A KVM virtual machine, and the only unsafe code in the product.
