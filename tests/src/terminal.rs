//! A terminal of a test's own, with a program on it.
