//! Recognises known ways to fail by what a guest and its installer say.
//!
//! The knowledge is in the rule packs (`rules/*.toml`), which are data with a version; [`Pack`] reads
//! them, [`Rules`] finds them in text, [`Lines`] and [`flattened`] turn what a console printed into the
//! text that a person sees. Pure. Deliberately absent: what follows from a finding, which
//! [`crate::vm::watch`] judges, and regular expressions: a guest's output is searched in one pass,
//! whatever it is.

mod find;
mod lines;
mod pack;
mod screen;

pub use find::{Finding, Rules};
pub use lines::Lines;
pub use pack::{Origin, Pack, PackError, Place, Rule, Weight};
pub use screen::{flattened, prompt};
