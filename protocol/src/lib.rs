//! Placeholder door, filled by the first slice.
