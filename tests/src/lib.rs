//! Cross-program tests.
