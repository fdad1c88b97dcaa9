//! On a terminal: keys, job control and size are the command's.

use std::process::{Child, Command};
use std::time::Duration;

use hostler_tests::failure::{OrFail, wait_for};
use hostler_tests::program;
use hostler_tests::terminal::Terminal;

/// The program on the terminal; killed when it is dropped.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock").env("PS1", "prompt> ").env_remove("ENV");
        Self(command.spawn().or_fail("starting a program on the terminal"))
    }

    fn status(&mut self) -> Option<i32> {
        let patience = Duration::from_secs(10);
        let (status, _) = wait_for("its end", patience, || self.0.try_wait().or_fail("waiting for it"));
        status.code()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hostler(terminal: &Terminal, script: &str) -> Program {
    let mut command = terminal.command(program::path("hostler"));
    Program::start(command.args(["run", "--no-watchdog", "--", "sh", "-c", script]))
}

#[test]
fn ctrl_c_reaches_the_command_exactly_once() {
    let mut terminal = Terminal::new(24, 80);
    let script = r#"
        count=0; trap 'count=$((count+1))' INT; trap 'echo "INT $count times"; exit 6' TERM
        echo ready; while :; do sleep 0.05; done
    "#;
    let mut program = hostler(&terminal, script);
    terminal.wait_for("ready");
    terminal.type_text("\x03");
    std::thread::sleep(Duration::from_millis(500));
    // SIGTERM to hostler, which passes it on.
    hostler_tests::place::signal(program.0.id(), nix::sys::signal::Signal::SIGTERM);
    terminal.wait_for("INT 1 times");
    assert_eq!(program.status(), Some(6));
}

#[test]
fn ctrl_c_ends_a_command_that_does_not_care() {
    let mut terminal = Terminal::new(24, 80);
    let mut program = Program::start(terminal.command("sh").args([
        "-c",
        r#""$0" run --no-watchdog -- sh -c 'echo ready; sleep 30'; echo "status $?"; exit 9"#,
        &program::path("hostler").to_string_lossy(),
    ]));
    terminal.wait_for("ready");
    terminal.type_text("\x03");
    // A shell whose child died of SIGINT dies of it as well: so it was seen to die of the signal.
    assert_eq!(program.status(), None);
}

#[test]
fn ctrl_z_stops_the_job_and_fg_goes_on() {
    let mut terminal = Terminal::new(24, 80);
    let mut shell = Program::start(terminal.command("sh").arg("-i"));
    terminal.wait_for("prompt> ");
    let script = r#"trap "echo went-on" CONT; echo rea""dy; while :; do sleep 0.05; done"#;
    let hostler = program::path("hostler");
    terminal.type_text(&format!("'{}' run --no-watchdog -- sh -c '{script}'\n", hostler.display()));
    // The echo of what was typed has the quotes in the word.
    terminal.wait_for("ready");
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(300));
        terminal.type_text("\x1a");
        terminal.wait_for("Stopped");
        terminal.wait_for("prompt> ");
        terminal.type_text("fg\n");
        terminal.wait_for("went-on");
    }
    terminal.type_text("\x03");
    terminal.wait_for("prompt> ");
    terminal.type_text("echo status=$?\n");
    terminal.wait_for("status=130");
    terminal.type_text("exit 4\n");
    assert_eq!(shell.status(), Some(4));
}

#[test]
fn the_terminal_and_its_size_are_the_commands() {
    let mut terminal = Terminal::new(31, 97);
    let script = r#"
        [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo "all three"
        stty size; trap 'stty size; exit 0' WINCH; stty rows 40 cols 120; while :; do sleep 0.05; done
    "#;
    let mut program = hostler(&terminal, script);
    terminal.wait_for("all three");
    terminal.wait_for("31 97");
    terminal.wait_for("40 120");
    assert_eq!(program.status(), Some(0));
}

#[test]
fn what_is_typed_is_the_commands_input() {
    let mut terminal = Terminal::new(24, 80);
    let mut program = hostler(&terminal, "echo ask; read -r line; echo \"<$line>\"; cat; echo end");
    terminal.wait_for("ask");
    terminal.type_text("hello there\n");
    terminal.wait_for("<hello there>");
    terminal.type_text("\x04");
    terminal.wait_for("end");
    assert_eq!(program.status(), Some(0));
}
