//! A real `hostlerd` on a socket, a state folder and a port of its own.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hostler_protocol::lease::{LeaseId, LeaseState, LeaseView};
use hostler_protocol::methods::{HostStatus, Planned};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::failure::{OrFail, wait_for};
use crate::place::{self, Mounts, Place};
use crate::program::{self, Ended};
use crate::wire::Client;

/// How a daemon is set up. Times are as the configuration writes them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `[reclaim] grace`.
    pub grace: &'static str,
    /// `[reclaim] term_timeout`.
    pub term_timeout: &'static str,
    /// `[reclaim] step_timeout`.
    pub step_timeout: &'static str,
    /// `[limits] leases`.
    pub leases: usize,
    /// More of `[limits]`.
    pub limits: String,
    /// Whether it serves metrics.
    pub metrics: bool,
    /// More sections, as the configuration has them: `[sweep]`, `[[policy]]`, `[protect]`.
    pub more: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grace: "0s",
            term_timeout: "1s",
            step_timeout: "10s",
            leases: 256,
            limits: String::new(),
            metrics: false,
            more: String::new(),
        }
    }
}

/// The daemon. Killed at the latest when it is dropped.
#[derive(Debug)]
pub struct Daemon<'place> {
    place: &'place Place,
    child: Option<Child>,
    metrics: Option<SocketAddr>,
}

impl<'place> Daemon<'place> {
    /// Starts one, and returns when it answers.
    ///
    /// # Panics
    /// When it does not within seconds.
    #[must_use]
    pub fn start(place: &'place Place, settings: &Settings) -> Self {
        let metrics = settings.metrics.then(free_port);
        let mut daemon = Self { place, child: None, metrics };
        daemon.configure(settings);
        daemon.start_again();
        daemon
    }

    /// Writes its configuration anew, for its next start.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn configure(&self, settings: &Settings) {
        let (place, metrics) = (self.place, self.metrics);
        let listen = metrics.map_or_else(String::new, |port| format!("[metrics]\nlisten = \"{port}\"\n"));
        let text = format!(
            "[api]\nsocket = {:?}\n[state]\ndirectory = {:?}\n[reclaim]\ngrace = {:?}\nterm_timeout = {:?}\nstep_timeout = {:?}\n[limits]\nleases = {}\n{}{listen}{}",
            place.path("hostler.sock"),
            place.path("state"),
            settings.grace,
            settings.term_timeout,
            settings.step_timeout,
            settings.leases,
            settings.limits,
            settings.more,
        );
        fs::write(place.path("hostlerd.toml"), text).or_fail("writing the configuration");
    }

    /// Starts it again after it was killed or stopped.
    ///
    /// # Panics
    /// When it does not answer within seconds.
    pub fn start_again(&mut self) {
        self.launch();
        let socket = self.socket();
        wait_for("an answer of hostlerd", Duration::from_secs(15), || {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                panic!("hostlerd ended with {status}:\n{}", self.log());
            }
            // An answer, not just a connection: the socket of one that was killed while it started
            // a worker lives on in that worker until it is another program.
            let mut client = Client::connect(&socket).ok()?;
            client.send(&json!({ "method": "org.varlink.service.GetInfo" }), &[]).ok()?;
            client.receive().ok()
        });
    }

    /// Starts it without waiting for it to answer.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn launch(&mut self) {
        self.launch_by(Command::spawn);
    }

    /// The same, by whoever has something done to it.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn launch_by(&mut self, spawn: impl FnOnce(&mut Command) -> std::io::Result<Child>) {
        assert!(self.child.is_none(), "hostlerd runs already");
        let log = File::options().create(true).append(true).open(self.place.path("hostlerd.log"));
        let log = log.or_fail("opening the daemon's log");
        let mut command = self.place.command(program::path("hostlerd"));
        command.arg("--config").arg(self.place.path("hostlerd.toml"));
        if self.place.mounts() == Mounts::Own {
            command.arg("--own-mount-namespace");
        }
        command.env("HOSTLER_LOG", "info").env_remove("JOURNAL_STREAM");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(spawn(&mut command).or_fail("starting hostlerd"));
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> &'place Place {
        self.place
    }

    /// Its process number: the shell that entered the control groups became it.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().or_fail("a running hostlerd").id()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Gone already is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and wants a clean end.
    ///
    /// # Panics
    /// When it does not end, or with an error.
    pub fn stop(&mut self) {
        let mut child = self.child.take().or_fail("a running hostlerd");
        place::signal(child.id(), Signal::SIGTERM);
        let (status, _) = wait_for("the end of hostlerd", Duration::from_secs(10), || {
            child.try_wait().or_fail("waiting for hostlerd")
        });
        assert!(status.success(), "hostlerd ended with {status}:\n{}", self.log());
        assert!(!self.socket().exists(), "hostlerd left its socket");
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.place.path("hostler.sock")
    }

    /// Where it serves metrics.
    ///
    /// # Panics
    /// When it was set up without.
    #[must_use]
    pub fn metrics(&self) -> SocketAddr {
        self.metrics.or_fail("a daemon with metrics")
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.place.path("hostlerd.log")).unwrap_or_default()
    }

    /// A connection to it.
    ///
    /// # Panics
    /// When it does not listen.
    #[must_use]
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).or_fail("connecting to hostlerd")
    }

    /// A command of `hostler` that talks to it, in the place's control groups.
    #[must_use]
    pub fn hostler(&self, arguments: &[&str]) -> Command {
        let mut command = self.place.command(program::path("hostler"));
        command.args(arguments).env("HOSTLER_SOCKET", self.socket());
        command
    }

    /// The same as the test user.
    #[must_use]
    pub fn hostler_of_user(&self, arguments: &[&str]) -> Command {
        let mut command = self.place.command_of_user(program::path("hostler"));
        command.args(arguments).env("HOSTLER_SOCKET", self.socket());
        command
    }

    /// Runs such a command to its end.
    #[track_caller]
    pub fn ask(&self, arguments: &[&str]) -> Ended {
        program::finish(&mut self.hostler(arguments))
    }

    /// A command that runs a shell script under a lease that claims a directory.
    #[must_use]
    pub fn run_script(&self, name: &str, claim: &Path, script: &str) -> Command {
        let mut command = self.hostler(&["run", "--name", name, "--claim"]);
        command.arg(claim).args(["--", "/bin/sh", "-eu", "-c", script]).current_dir(claim);
        command
    }

    /// What it knows.
    ///
    /// # Panics
    /// When it does not tell.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> HostStatus {
        let answer = self.client().call("Status", &json!({}), &[]).or_fail("asking for the status");
        serde_json::from_value(answer).or_fail("reading the status")
    }

    /// What it would do.
    ///
    /// # Panics
    /// When it does not tell.
    #[must_use]
    #[track_caller]
    pub fn plan(&self) -> Planned {
        let text = self.ask(&["plan", "--json"]).succeeded();
        serde_json::from_str(&text).or_fail("reading the plan")
    }

    /// The steps of every plan that its journal says was made for a lease, a list for each round.
    ///
    /// # Panics
    /// When the journal is not as its documentation says.
    #[must_use]
    #[track_caller]
    pub fn planned_in_journal(&self, lease: LeaseId) -> Vec<Vec<Value>> {
        let text = fs::read_to_string(self.place.path("state/journal")).or_fail("reading the journal");
        let entries = text.lines().filter_map(|line| {
            let entry: Value = serde_json::from_str(line.splitn(3, ' ').nth(2)?).ok()?;
            (entry["entry"] == "planned" && entry["lease"] == json!(lease)).then_some(entry)
        });
        entries
            .map(|entry| entry["plan"]["steps"].as_array().or_fail("the steps of a plan").clone())
            .collect()
    }

    /// The lease of that name.
    #[must_use]
    #[track_caller]
    pub fn lease(&self, name: &str) -> Option<LeaseView> {
        self.status().leases.into_iter().find(|lease| lease.name == name)
    }

    /// Waits until the lease of that name is in a state.
    ///
    /// # Panics
    /// When it is not within `limit`.
    #[track_caller]
    pub fn wait_for_state(&self, name: &str, state: LeaseState, limit: Duration) -> (LeaseView, Duration) {
        wait_for(format_args!("lease {name} to be {state:?}\n{}", self.log()), limit, || {
            self.lease(name).filter(|lease| lease.state == state)
        })
    }

    /// Waits until the lease of that name has ended.
    ///
    /// # Panics
    /// When it has not within `limit`.
    #[track_caller]
    pub fn wait_for_end(&self, name: &str, limit: Duration) -> (LeaseView, Duration) {
        self.wait_for_state(name, LeaseState::Ended, limit)
    }

    /// Waits until no lease is left that has not ended. After a restart the ended ones are forgotten,
    /// so their names cannot be waited for.
    ///
    /// # Panics
    /// When one is left after `limit`.
    #[track_caller]
    pub fn wait_until_idle(&self, limit: Duration) -> Duration {
        wait_for("the end of all leases", limit, || {
            self.status().leases.iter().all(|lease| lease.state == LeaseState::Ended).then_some(())
        })
        .1
    }

    /// The number of the lease of that name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    #[track_caller]
    pub fn lease_number(&self, name: &str) -> LeaseId {
        self.lease(name).or_fail(format_args!("lease {name}")).lease
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("hostlerd's log:\n{}", self.log());
        }
    }
}

/// A port of the loopback address that was free a moment ago.
fn free_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").or_fail("finding a free port");
    listener.local_addr().or_fail("asking for the port")
}
