//! A recipe, which a build as root reads only after it has given up root.
#![no_main]

use std::path::Path;

use hostler_runner::recipe::Recipe;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = Recipe::parse(text, Path::new("recipe.toml")) {
        assert!(!error.to_string().is_empty());
    }
});
