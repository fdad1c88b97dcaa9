//! Release trees of rpms whose mirrors are not of the same day.

use std::sync::Arc;

use hostler_runner::cache::{Cache, Digest, Fetcher};
use hostler_runner::event::Silent;
use hostler_runner::mirror::Plan;
use hostler_runner::mirror::rpm::{PlanError, Wish, plan};

use super::upstream::{Fault, Upstream};
use super::world::World;

/// Puts the tree of a day on a mirror: its indices, and what `.treeinfo` says of them.
fn publish(upstream: &Upstream, day: &str, info_of: &str) {
    let repomd = |day: &str| {
        let primary = format!("<metadata day=\"{day}\"/>");
        let digest = Digest::of(primary.as_bytes());
        let size = primary.len();
        let text = format!(
            "<repomd><data type=\"primary\"><checksum type=\"sha256\">{digest}</checksum><location href=\"repodata/{day}.xml\"/><size>{size}</size><open-size>{size}</open-size></data></repomd>"
        );
        (text, primary)
    };
    let info =
        format!("[checksums]\nrepodata/repomd.xml = sha256:{}\n", Digest::of(repomd(info_of).0.as_bytes()));
    let (text, primary) = repomd(day);
    let files =
        [("repodata/repomd.xml", text), (".treeinfo", info), (&format!("repodata/{day}.xml"), primary)]
            .map(|(path, text)| (format!("/tree/{path}"), text.into_bytes()));
    upstream.state.lock().unwrap().files.extend(files);
}

fn planned(mirrors: [&Upstream; 2]) -> Result<Plan, PlanError> {
    let directory = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(directory.path()).unwrap());
    let fetcher = Fetcher::new(cache, World::options()).unwrap();
    let wish = Wish {
        name: "tree".to_owned(),
        roots: mirrors.map(|mirror| format!("http://{}/tree", mirror.address)).to_vec(),
        mirror_list: None,
        keyring: None,
        architectures: Vec::new(),
        packages: Vec::new(),
        images: false,
    };
    plan(&wish, &fetcher, &Silent)
}

fn has(plan: &Plan, day: &str) -> bool {
    plan.files.iter().any(|(path, _)| *path == format!("tree/repodata/{day}.xml"))
}

#[test]
fn a_mirror_that_is_just_being_updated_is_passed_over() {
    let [first, second] = [(); 2].map(|()| Upstream::start());
    publish(&second, "today", "today");
    // Its indices are older than what it says of them, or newer.
    for (day, info_of) in [("before", "today"), ("today", "before"), ("before", "before")] {
        publish(&first, day, info_of);
        let whole = planned([&first, &second]).unwrap();
        let expected = if day == info_of { day } else { "today" };
        assert!(has(&whole, expected), "{day}, {info_of}: {:?}", whole.files);
    }
    // Where no two fit, that is said.
    publish(&first, "before", "other");
    publish(&second, "today", "another");
    let error = planned([&first, &second]).unwrap_err();
    assert!(matches!(error, PlanError::Torn), "{error:?}");
}

#[test]
fn an_index_that_is_shorter_than_it_is_said_to_be_is_refused() {
    let upstream = Upstream::start();
    publish(&upstream, "today", "today");
    {
        let mut state = upstream.state.lock().unwrap();
        let text = String::from_utf8(state.files["/tree/repodata/repomd.xml"].clone()).unwrap();
        let (before, rest) = text.split_once("<open-size>").unwrap();
        let (size, after) = rest.split_once('<').unwrap();
        let longer = size.parse::<u64>().unwrap() + 1;
        let text = format!("{before}<open-size>{longer}<{after}");
        state.files.insert("/tree/repodata/repomd.xml".to_owned(), text.into_bytes());
    }
    upstream.fault("/tree/.treeinfo", Fault::Status(404));
    let error = hostler_runner::causes::in_one_line(&planned([&upstream, &upstream]).unwrap_err());
    assert!(error.contains("shorter unpacked than its own index says"), "{error}");
}
