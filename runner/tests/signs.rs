//! The rule packs against the world: each text is still in what it was taken from, and the consoles of
//! builds that went well have none of them.
//!
//! Needs gpgv and the archive that the host's apt sources name, or a filled cache. What comes from
//! `source:` files, which no registry has as a package, cannot be looked up here and is only counted.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use hostler_runner::build::fetch_options;
use hostler_runner::cache::{Cache, Fetcher, default_directory};
use hostler_runner::debian::{self, Selection, deb};
use hostler_runner::event::Silent;
use hostler_runner::recipe::{PackageSource, Recipe};
use hostler_runner::signs::{Origin, Place, Rules, Weight};
use hostler_runner::stop::Stop;
use hostler_runner::vm::console::Console;

/// The archive, with and without the packages of Debian's installer.
struct Archive {
    fetcher: Fetcher,
    packages: Selection,
    installer: Selection,
}

impl Archive {
    fn open() -> Self {
        let directory = default_directory(|name| std::env::var_os(name)).unwrap();
        let cache = Arc::new(Cache::open(&directory).unwrap());
        let fetcher = Fetcher::new(cache, fetch_options(&Stop::default())).unwrap();
        let example = include_str!("../examples/debian-12.toml");
        let mut recipe = Recipe::parse(example, Path::new("debian-12.toml")).unwrap();
        let packages = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
        // The installer's packages are a component of the suite itself, which apt's sources do not name.
        let repository = packages
            .repositories
            .iter()
            .find(|one| one.suites.iter().any(|suite| suite.name == recipe.debian.suite))
            .unwrap();
        recipe.debian.source = PackageSource::Url(repository.uris[0].clone());
        recipe.debian.components.push("main/debian-installer".to_owned());
        let installer = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
        Self { fetcher, packages, installer }
    }

    /// Everything in a package that a text may be in.
    fn contents(&self, selection: &Selection, name: &str) -> Vec<u8> {
        let id = selection.catalogue.candidate(name).unwrap_or_else(|| panic!("there is no package {name}"));
        let wanted = selection.wanted(&selection.catalogue.file(id).unwrap());
        let package = self.fetcher.fetch(&wanted).unwrap();
        deb::read(package.as_slice(), |control, files| -> Result<Vec<u8>, deb::DebError> {
            let mut contents = Vec::new();
            for member in control.members {
                contents.extend(member.bytes);
                contents.push(0);
            }
            for file in files.entries().unwrap() {
                file.unwrap().read_to_end(&mut contents).unwrap();
                contents.push(0);
            }
            Ok(contents)
        })
        .unwrap()
    }

    fn of(&self, origin: &Origin) -> Option<Vec<u8>> {
        match origin {
            Origin::Deb(package) => Some(self.contents(&self.packages, package)),
            Origin::Udeb(package) => Some(self.contents(&self.installer, package)),
            Origin::Initrd(package) => {
                let contents = self.contents(&self.packages, package);
                Some(unpacked(&contents, b"\x1f\x8b\x08\0", |stream| {
                    let mut plain = Vec::new();
                    // What comes behind a stream is no part of it, and many a find is no stream.
                    let _ = flate2::read::GzDecoder::new(stream).read_to_end(&mut plain);
                    plain
                }))
            }
            // What is a module is there as it is.
            Origin::Kernel => {
                let mut contents = self.contents(&self.packages, &self.kernel());
                let image = unpacked(&contents, b"\x02\x21\x4c\x18", lz4);
                contents.extend(image);
                Some(contents)
            }
            Origin::Source(_) => None,
        }
    }

    fn kernel(&self) -> String {
        let catalogue = &self.packages.catalogue;
        let id = catalogue.candidate("linux-image-cloud-amd64").unwrap();
        let depends = catalogue.stanza(id).get("Depends").unwrap();
        depends.split([' ', ',']).find(|word| word.starts_with("linux-image-")).unwrap().to_owned()
    }
}

/// What every stream in there unpacks to that starts with `magic`; small ones are pictures and the like.
fn unpacked(contents: &[u8], magic: &[u8], unpack: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let streams = memchr::memmem::find_iter(contents, magic);
    streams.map(|at| unpack(&contents[at..])).filter(|plain| plain.len() > 4 << 20).flatten().collect()
}

/// LZ4's legacy frame, as kernels have it: after the magic number, blocks of at most 8 MiB, each with its
/// compressed length before it.
fn lz4(stream: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = &stream[4..];
    while let Some((length, blocks)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some(block) = blocks.get(..length) else { break };
        let Ok(block) = lz4_flex::block::decompress(block, 8 << 20) else { break };
        plain.extend(block);
        rest = &blocks[length..];
    }
    plain
}

#[test]
fn every_rules_text_is_in_what_it_was_taken_from() {
    let archive = Archive::open();
    let mut origins: BTreeMap<String, Option<Vec<u8>>> = BTreeMap::new();
    let (mut found, mut missing, mut unseen) = (0, Vec::new(), Vec::new());
    for pack in Rules::builtin().packs() {
        for rule in &pack.rules {
            let contents =
                origins.entry(format!("{:?}", rule.from)).or_insert_with(|| archive.of(&rule.from));
            let name = format!("{}/{}", pack.name, rule.id);
            match contents {
                None => unseen.push(name),
                Some(contents) => match memchr::memmem::find(contents, rule.shipped_text().as_bytes()) {
                    Some(_) => found += 1,
                    None => missing.push(format!("{name}: {:?} in {:?}", rule.shipped_text(), rule.from)),
                },
            }
        }
    }
    println!("{found} texts were found; not looked up, as no registry has them: {unseen:?}");
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(found >= 40, "{found}");
}

#[test]
fn no_rule_matches_the_console_of_a_build_that_went_well() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    let mut logs = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        logs += 1;
        let is_a_log = path.to_string_lossy().ends_with(".installer.log");
        if is_a_log {
            for line in String::from_utf8_lossy(&bytes).lines() {
                assert_eq!(Rules::builtin().find(Place::Log, line), None, "{}", path.display());
            }
            continue;
        }
        let mut console = Console::new(std::io::sink(), 0);
        // As it comes from a serial port: the screen is looked at again and again.
        for chunk in bytes.chunks(256) {
            assert_eq!(console.push(chunk).unwrap(), [], "{}", path.display());
            // A prompt for a moment is none that nobody answers.
            let seen = console.look().finding.filter(|finding| finding.weight != Weight::Stays);
            assert_eq!(seen, None, "{}: {}", path.display(), console.screen());
        }
    }
    assert!(logs >= 3, "{logs} golden logs");
}
