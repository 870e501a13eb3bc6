//! One host: the loops that join any guest, the core and the link.
