//! Parts of files, asked for as clients of rpm repositories do: by zchunk's own client, which has an older file and
//! fetches what is different, many parts in one answer. Debian's dnf is built without it.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use hostler_runner::cache::offer::{Offer, Offered};
use hostler_runner::cache::{Cache, Clients, Digest, Fetcher, Mirror, Wanted};

use super::upstream::Upstream;
use super::world::World;

struct One(Wanted);

impl Offer for One {
    fn find(&self, path: &str) -> Option<Offered> {
        (path == "/primary.zck").then(|| Offered { wanted: self.0.clone(), local: None, modified: None })
    }
}

fn run(directory: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: apt-get install zchunk: {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An index of packages, of which some are of this version.
fn index(version: u32) -> String {
    let package = |number: u32| {
        let version = if number.is_multiple_of(2500) { version } else { 0 };
        let noise = Digest::of(&[number.to_le_bytes(), version.to_le_bytes()].concat());
        format!("<package><name>p{number}</name><checksum>{noise}</checksum></package>\n")
    };
    (0..20_000).map(package).collect()
}

#[test]
fn a_client_that_has_an_older_file_gets_the_parts_that_it_lacks() {
    let directory = tempfile::tempdir().unwrap();
    for (folder, version) in [("old", 1), ("new", 2), ("got", 0)] {
        let folder = directory.path().join(folder);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("primary"), index(version)).unwrap();
        run(&folder, "zck", &["-o", "primary.zck", "primary"]);
    }
    let new = std::fs::read(directory.path().join("new/primary.zck")).unwrap();
    std::fs::remove_file(directory.path().join("got/primary.zck")).unwrap();

    let upstream = Upstream::start();
    upstream.state.lock().unwrap().files.insert("/primary.zck".to_owned(), new.clone());
    let wanted = Wanted {
        name: "primary.zck".to_owned(),
        urls: vec![format!("http://{}/primary.zck", upstream.address)],
        size: Some(new.len() as u64),
        digest: Digest::of(&new),
    };
    let cache = Arc::new(Cache::open(&directory.path().join("cache")).unwrap());
    let fetcher = Arc::new(Fetcher::new(cache, World::options()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mirror = Mirror::start(listener, One(wanted), Clients::Anyone, fetcher).unwrap();

    let url = format!("http://127.0.0.1:{port}/primary.zck");
    run(&directory.path().join("got"), "zckdl", &["--fail-no-ranges", "-s", "../old/primary.zck", &url]);
    assert!(std::fs::read(directory.path().join("got/primary.zck")).unwrap() == new);
    let report = mirror.stop();
    assert_eq!(report.failures, []);
    let (served, size) = (report.served_bytes, new.len() as u64);
    println!("{served} bytes of {size} in {} answers", report.requests);
    assert!(served > 0 && served < size / 2, "{served} bytes of {size} in {} answers", report.requests);
}
