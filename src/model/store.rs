//! How full a bounded store is.

/// One store that peers can fill, and its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreSize {
    /// A fixed word: what is in it.
    pub name: &'static str,
    /// Items in it now.
    pub len: usize,
    /// Items that it never exceeds.
    pub len_max: usize,
}

impl StoreSize {
    /// A store called `name` that holds `len` of at most `len_max` items.
    pub const fn new(name: &'static str, len: usize, len_max: usize) -> Self {
        Self { name, len, len_max }
    }
}
