//! A screen as one line of text, and whether it shows a prompt.

/// The most of a screen that is looked at, in characters.
const MOST: usize = 16 * 1024;

/// A screen's text as one line: frames of dialogs are left out, and lines that a dialog had to break
/// are joined by one space.
#[must_use]
pub fn flattened(screen: &str) -> String {
    let mut text = String::new();
    for word in screen.split(|character: char| character.is_whitespace() || is_frame(character)) {
        if word.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(word);
        if text.len() > MOST {
            break;
        }
    }
    text
}

/// Box drawing and block elements of Unicode.
fn is_frame(character: char) -> bool {
    ('\u{2500}'..='\u{259f}').contains(&character)
}

/// The text before the cursor, if a program seems to wait behind it for somebody to type: it ends as
/// questions end, and nothing is behind it.
#[must_use]
pub fn prompt(cursors_line: &str) -> Option<&str> {
    let line = cursors_line.trim();
    let ends = ["?", ":", "]", "]:", ")", "> ", ">", "#", "$"];
    (line.len() > 1 && ends.iter().any(|end| line.ends_with(end))).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dialog_becomes_its_text() {
        let screen = "  ┌───────┤ [!!] Download ├──────┐\n  │                              │\n  │ Downloading a file           │\n  │ failed:                      │\n  └──────────────────────────────┘\n";
        assert_eq!(flattened(screen), "[!!] Download Downloading a file failed:");
    }

    #[test]
    fn questions_are_prompts_and_statements_are_none() {
        for line in ["Do you want to continue? [Y/n]", "Password: ", "Continue? (yes|no)", "root@x:~#"] {
            assert!(prompt(line).is_some(), "{line}");
        }
        for line in ["Setting up less (590) ...", "done.", "", ":", "Reading package lists... 50%"] {
            assert!(prompt(line).is_none(), "{line}");
        }
    }
}
