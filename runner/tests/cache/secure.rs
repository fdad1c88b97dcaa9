//! Upstreams that are spoken to with TLS: what their certificates have to be, how a CA of one's own is named,
//! and what is said of a certificate that is not accepted.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use hostler_runner::cache::{Cache, Digest, Fetcher, Wanted};
use hostler_runner::causes::in_one_line;

use super::upstream::Upstream;
use super::world::{Warnings, World};

/// A CA, and the certificate of `localhost` that it signed.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"
            set -e
            key="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            openssl req -x509 $key -keyout ca.key -out ca.pem -subj /CN=test-authority -days 2 \
                -addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign
            openssl req -new $key -keyout key.pem -out request.pem -subj /CN=localhost
            echo subjectAltName=DNS:localhost >extensions
            openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -out certificate.pem \
                -days 2 -extfile extensions
        "#;
        let output = Command::new("sh").args(["-c", script]).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(folder)
    }

    fn upstream(&self) -> Upstream {
        Upstream::start_secure(&self.0.path().join("certificate.pem"), &self.0.path().join("key.pem"))
    }
}

fn content() -> Vec<u8> {
    (0..30_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// What the child does: which CAs a process trusts it reads once, from its environment.
fn fetch(urls: &str) {
    let directory = tempfile::tempdir().unwrap();
    let fetcher = Fetcher::new(Arc::new(Cache::open(directory.path()).unwrap()), World::options()).unwrap();
    let wanted = Wanted {
        name: "file".to_owned(),
        urls: urls.split(' ').map(str::to_owned).collect(),
        size: None,
        digest: Digest::of(&content()),
    };
    let result = match fetcher.fetch(&wanted) {
        Ok(bytes) => format!("right: {}", bytes == content()),
        Err(error) => in_one_line(&error),
    };
    let told = Warnings::default();
    fetcher.tell_news(&told);
    println!(
        "result {result}; requests {}; {:?}",
        fetcher.counted().upstream_requests,
        told.0.lock().unwrap()
    );
}

/// What a process says that fetches from there, and has this file as its CAs.
fn fetch_with(authorities: Option<&Path>, urls: &[String]) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--nocapture", "secure::who_signed_an_upstreams_certificate_decides"]);
    child.env("HOSTLER_TEST_SECURE", urls.join(" ")).env_remove("SSL_CERT_FILE").env_remove("SSL_CERT_DIR");
    child.envs(authorities.map(|file| ("SSL_CERT_FILE", file)));
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let result =
        said.lines().find_map(|line| line.split_once("result ").map(|(_, result)| result.to_owned()));
    result.unwrap_or_else(|| panic!("{output:?}"))
}

#[test]
fn who_signed_an_upstreams_certificate_decides() {
    if let Ok(urls) = std::env::var("HOSTLER_TEST_SECURE") {
        return fetch(&urls);
    }
    let authority = Authority::new();
    let (secure, plain) = (authority.upstream(), Upstream::start());
    for upstream in [&secure, &plain] {
        upstream.state.lock().unwrap().files.insert("/file".to_owned(), content());
    }
    let port = secure.address.port();
    let (good, misnamed) =
        (format!("https://localhost:{port}/file"), format!("https://127.0.0.1:{port}/file"));
    let plain = format!("http://{}/file", plain.address);
    let own = authority.0.path().join("ca.pem");

    let said = fetch_with(Some(&own), std::slice::from_ref(&good));
    assert_eq!(said, "right: true; requests 1; []");
    // The host does not know this CA, the certificate is of another name, the CA is not there.
    for (authorities, url, why) in [
        (None, &good, "UnknownIssuer"),
        (Some(own.as_path()), &misnamed, "not valid for name"),
        (Some(Path::new("/nonexistent/ca.pem")), &good, "UnknownIssuer"),
    ] {
        let said = fetch_with(authorities, std::slice::from_ref(url));
        assert!(said.contains("the certificate of the upstream of file is not accepted"), "{said}");
        assert!(said.contains(why) && said.contains("SSL_CERT_FILE"), "{said}");
        assert!(said.contains("requests 1;"), "it was asked again: {said}");
        // Another upstream helps out.
        let said = fetch_with(authorities, &[url.clone(), plain.clone()]);
        assert!(said.starts_with("right: true; requests 2;"), "{said}");
        assert!(said.contains("is asked last from now on: its certificate is not accepted"), "{said}");
    }
    // A host without any CA gets what comes over plain HTTP.
    let said = fetch_with(Some(Path::new("/nonexistent/ca.pem")), &[plain]);
    assert_eq!(said, "right: true; requests 1; []");
}
