//! Where in a recipe's text something is wrong.

use std::ops::Range;
use std::path::Path;

use toml::Spanned;

use super::RecipeError;

/// What is wrong, and where in the text.
pub(super) struct Refusal {
    pub(super) span: Option<Range<usize>>,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn at<T>(place: &Spanned<T>, message: String) -> Self {
        Self { span: Some(place.span()), message }
    }
}

/// The refusal with its line shown.
pub(super) fn locate(text: &str, path: &Path, refusal: Refusal) -> RecipeError {
    let span = refusal.span.unwrap_or(0..0);
    let start = floor_boundary(text, span.start);
    let end = floor_boundary(text, span.end).max(start);
    let line_start = text[..start].rfind('\n').map_or(0, |index| index + 1);
    let line_end = text[start..].find('\n').map_or(text.len(), |index| start + index);
    let line = text[..start].matches('\n').count() + 1;
    let column = text[line_start..start].chars().count() + 1;
    let marks = text[start..end.min(line_end)].chars().count().max(1);
    let number = line.to_string();
    let margin = " ".repeat(number.len());
    let snippet = format!(
        "{margin} |\n{number} | {}\n{margin} | {}{}",
        &text[line_start..line_end],
        " ".repeat(column - 1),
        "^".repeat(marks)
    );
    RecipeError::Invalid { path: path.to_owned(), line, column, message: refusal.message, snippet }
}

fn floor_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}
