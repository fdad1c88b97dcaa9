//! Tests that need no privileges.

fn main() {}
