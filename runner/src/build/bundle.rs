//! What is kept of a build that failed: one folder that a person can open, and a program can read.
//!
//! [`Bundle`] is plain data; [`Bundle::page`] and [`Bundle::document`] are pure. [`Bundle::write`] puts
//! all into a folder: `index.html`, `failure.json`, and beside them what there is of `console.log`,
//! `installer.log`, `screen.png`, `screen.txt` and `qemu.txt`. The page needs nothing but that folder:
//! no script, no network. What guests and mirrors said is in it as text only. Deliberately absent: a
//! bundle for a build that somebody stopped; nothing failed in it.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::class::Class;
use crate::event::Stage;
use crate::vm::run::Report;

/// What the name of a bundle's folder ends with.
pub const ENDING: &str = ".failure";
/// Every file that may be in one, the page last.
pub const FILES: [&str; 7] =
    ["console.log", "installer.log", "screen.png", "screen.txt", "qemu.txt", "failure.json", "index.html"];

/// What is known of a failure.
#[derive(Clone, Debug)]
pub struct Bundle<'a> {
    /// The image's name.
    pub name: &'a str,
    /// The class.
    pub class: Class,
    /// What went wrong, with its causes, in one line.
    pub message: String,
    /// The stages and how long each took; the last is the one that failed.
    pub stages: Vec<(Stage, Duration)>,
    /// How long the build took.
    pub took: Duration,
    /// The guest that failed, if one did.
    pub guest: Option<Guest<'a>>,
}

/// The guest that failed.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// What was seen of it.
    pub report: &'a Report,
    /// Its console's log, in the scratch directory.
    pub console_log: &'a Path,
    /// Its installer's log, in the scratch directory, if it has any.
    pub installer_log: Option<&'a Path>,
    /// The picture of its screen, in the scratch directory, if there is one.
    pub picture: Option<&'a Path>,
}

impl Bundle<'_> {
    /// Writes all files into `folder`, which is made. Their paths, the page last.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn write(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        fs::create_dir_all(folder)?;
        let mut there = Vec::new();
        for name in FILES {
            let path = folder.join(name);
            let from = self.guest.and_then(|guest| match name {
                "console.log" => Some(guest.console_log),
                "installer.log" => guest.installer_log,
                "screen.png" => guest.picture,
                _ => None,
            });
            let text = match name {
                "screen.txt" => self.guest.map(|guest| format!("{}\n", guest.report.screen)),
                "qemu.txt" => self.guest.map(|guest| format!("{}\n", guest.report.command.join("\n"))),
                "failure.json" => Some(format!("{:#}\n", self.document())),
                "index.html" => Some(self.page(&names(&there))),
                _ => None,
            };
            match (from, text) {
                (Some(from), _) if fs::metadata(from).is_ok_and(|data| data.len() > 0) => {
                    fs::rename(from, &path)?;
                }
                (_, Some(text)) => fs::write(&path, text)?,
                _ => continue,
            }
            there.push(path);
        }
        Ok(there)
    }

    /// All of it, for programs.
    #[must_use]
    pub fn document(&self) -> Value {
        let seconds = |time: &Duration| (time.as_secs_f64() * 1000.0).round() / 1000.0;
        let stages: Vec<Value> = self
            .stages
            .iter()
            .map(|(stage, took)| json!({ "stage": stage, "seconds": seconds(took) }))
            .collect();
        let mut document = json!({
            "name": self.name,
            "class": self.class,
            "message": self.message,
            "advice": self.class.advice(),
            "seconds": seconds(&self.took),
            "stages": stages,
        });
        if let Some(Guest { report, .. }) = self.guest {
            let steps: Vec<Value> = report
                .stages
                .iter()
                .map(|(step, began)| json!({ "step": step, "began": seconds(began) }))
                .collect();
            document["guest"] = json!({
                "seconds": seconds(&report.took),
                "steps": steps,
                "findings": report.findings,
                "refused": report.refused,
                "console_bytes": report.console_bytes,
                "disk": {
                    "read": report.blocks.read,
                    "written": report.blocks.written,
                    "operations": report.blocks.operations,
                },
                "isolated": report.isolated,
                "landlock": report.enforced,
                "screen": report.screen,
                "command": report.command,
            });
        }
        document
    }

    /// The page, beside which these files are.
    #[must_use]
    pub fn page(&self, files: &[String]) -> String {
        let mut body = String::new();
        let _ = write!(
            body,
            "<h1>{} was not built</h1>\n<p class=\"what\"><code>{}</code> {}</p>\n<p class=\"do\">What to do: {}.</p>\n",
            escaped(self.name),
            self.class,
            escaped(&self.message),
            escaped(self.class.advice()),
        );
        if let Some(guest) = self.guest {
            show_guest(&mut body, guest, files);
        }
        body.push_str("<h2>Where the time went</h2>\n<table>\n");
        for (stage, took) in &self.stages {
            let _ =
                writeln!(body, "<tr><td>{stage}</td><td class=\"n\">{:.1} s</td></tr>", took.as_secs_f64());
        }
        let _ = writeln!(
            body,
            "<tr><th>all</th><th class=\"n\">{:.1} s</th></tr>\n</table>",
            self.took.as_secs_f64()
        );
        if let Some(Guest { report, .. }) = self.guest {
            show_machine(&mut body, report);
        }
        body.push_str("<h2>Files</h2>\n<ul>\n");
        for file in files {
            let file = escaped(file);
            let _ = writeln!(body, "<li><a href=\"{file}\">{file}</a></li>");
        }
        body.push_str("</ul>\n");
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'\">\n<title>{}: {}</title>\n<style>{}</style>\n</head>\n<body>\n{body}</body>\n</html>\n",
            escaped(self.name),
            self.class,
            include_str!("bundle.css"),
        )
    }
}

fn names(paths: &[PathBuf]) -> Vec<String> {
    paths.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect()
}

fn show_guest(body: &mut String, guest: Guest<'_>, files: &[String]) {
    let report = guest.report;
    body.push_str("<h2>The last screen</h2>\n");
    if files.iter().any(|file| file == "screen.png") {
        body.push_str("<p><img src=\"screen.png\" alt=\"the machine's display\"></p>\n");
    }
    if report.screen.is_empty() {
        body.push_str("<p>The console is empty.</p>\n");
    } else {
        let _ = writeln!(body, "<pre>{}</pre>", escaped(&report.screen));
    }
    if !report.findings.is_empty() {
        body.push_str("<h2>What was recognised</h2>\n<table>\n");
        for finding in &report.findings {
            let _ = writeln!(
                body,
                "<tr><td><code>{}</code></td><td>{}<br><small>rule {}/{} of version {}</small></td><td><code>{}</code></td></tr>",
                finding.class,
                escaped(&finding.meaning),
                escaped(&finding.pack),
                escaped(&finding.rule),
                finding.version,
                escaped(&finding.line),
            );
        }
        body.push_str("</table>\n");
    }
    if !report.refused.is_empty() {
        body.push_str("<h2>What the mirror could not give</h2>\n<table>\n");
        for refused in &report.refused {
            let status = refused.status.map_or_else(String::new, |status| status.to_string());
            let _ = writeln!(
                body,
                "<tr><td><code>{}</code></td><td>{status}</td><td>{}</td></tr>",
                escaped(&refused.path),
                escaped(&refused.reason),
            );
        }
        body.push_str("</table>\n");
    }
    for (title, lines) in [
        ("The console's last lines", &report.console_tail),
        ("The installer's log, its last lines", &report.installer_tail),
    ] {
        if !lines.is_empty() {
            let _ = writeln!(body, "<h2>{title}</h2>\n<pre>{}</pre>", escaped(&lines.join("\n")));
        }
    }
}

fn show_machine(body: &mut String, report: &Report) {
    if !report.stages.is_empty() {
        body.push_str("<h3>Steps of the guest</h3>\n<table>\n");
        for (step, began) in &report.stages {
            let _ = writeln!(
                body,
                "<tr><td>{}</td><td class=\"n\">from {:.1} s</td></tr>",
                escaped(step),
                began.as_secs_f64()
            );
        }
        body.push_str("</table>\n");
    }
    let _ = writeln!(
        body,
        "<h2>The machine</h2>\n<p>It ran for {:.1} s, read {} and wrote {} on its disks in {} operations, and printed {} on its console.</p>\n<pre>{}</pre>",
        report.took.as_secs_f64(),
        bytesize::ByteSize(report.blocks.read),
        bytesize::ByteSize(report.blocks.written),
        report.blocks.operations,
        bytesize::ByteSize(report.console_bytes),
        escaped(&report.command.join(" ")),
    );
}

/// Text for a page, wherever in it: nothing in it is a tag or ends an attribute.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' => escaped.push('\n'),
            character if character.is_control() => {}
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Refusal;
    use crate::signs::{Place, Rules};
    use crate::vm::confinement::Enforced;
    use crate::vm::outcome::{Failure, Outcome, Refused};
    use crate::vm::qmp::BlockTotals;

    fn report() -> Report {
        Report {
            outcome: Outcome::Failed(Failure::PanicReported),
            screen: "<script>alert(1)</script>".into(),
            findings: vec![Rules::builtin().find(Place::Line, "x: No space left on device").unwrap()],
            refused: vec![Refused {
                path: "/a&b".into(),
                refusal: Refusal::Unavailable,
                status: Some(404),
                reason: "\"no\"".into(),
            }],
            has_picture: true,
            installer_log_bytes: 0,
            console_tail: vec!["last <b>".into()],
            installer_tail: Vec::new(),
            console_bytes: 2048,
            blocks: BlockTotals { read: 1024, written: 0, operations: 3 },
            stages: vec![("configure".into(), Duration::from_secs(3))],
            took: Duration::from_secs(9),
            isolated: true,
            enforced: Enforced::Fully,
            command: vec!["qemu".into(), "<x>".into()],
        }
    }

    fn bundle<'a>(report: &'a Report, folder: &'a Path) -> Bundle<'a> {
        Bundle {
            name: "debian-12",
            class: Class::DiskFull,
            message: "it's <full>".into(),
            stages: vec![(Stage::Guest, Duration::from_secs(9))],
            took: Duration::from_secs(10),
            guest: Some(Guest { report, console_log: folder, installer_log: None, picture: None }),
        }
    }

    #[test]
    fn what_a_guest_said_is_text_and_nothing_else() {
        let report = report();
        let page = bundle(&report, Path::new("x")).page(&["screen.png".into()]);
        for text in
            ["&lt;script&gt;", "it&#39;s &lt;full&gt;", "/a&amp;b", "&quot;no&quot;", "last &lt;b&gt;"]
        {
            assert!(page.contains(text), "{text} in {page}");
        }
        assert!(!page.contains("<script") && !page.contains("<full>") && !page.contains("<b>"));
        assert!(page.contains("<img src=\"screen.png\""));
    }

    #[test]
    fn a_program_reads_the_same() {
        let report = report();
        let document = bundle(&report, Path::new("x")).document();
        assert_eq!(document["class"], "disk_full");
        assert_eq!(document["guest"]["findings"][0]["rule"], "no-space");
        assert_eq!(document["guest"]["refused"][0]["status"], 404);
        assert_eq!(document["stages"][0]["stage"], "guest");
    }

    #[test]
    fn only_what_there_is_is_written_and_the_page_comes_last() {
        let scratch = tempfile::tempdir().unwrap();
        let log = scratch.path().join("x.console.log");
        fs::write(&log, "hello").unwrap();
        let report = report();
        let folder = scratch.path().join("x.failure");
        let files = bundle(&report, &log).write(&folder).unwrap();
        assert_eq!(names(&files), ["console.log", "screen.txt", "qemu.txt", "failure.json", "index.html"]);
        assert!(!log.exists());
        let page = fs::read_to_string(folder.join("index.html")).unwrap();
        assert!(page.contains("href=\"console.log\"") && !page.contains("screen.png"));
    }
}
