//! The tables `[[download]]`: files for the guest's commands that no archive has.

use serde::Deserialize;
use toml::Spanned;

use crate::cache::Digest;

use super::refusal::Refusal;
use super::written::{FILE_NAME_RULE, checked, is_file_name, is_url};

/// A file for the guest's commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    /// What the guest knows it by: it is at `$HOSTLER_MIRROR/downloads/NAME`.
    pub name: String,
    /// Where it can be had, in this order.
    pub urls: Vec<String>,
    /// What it has to be; else nothing vouches for it.
    pub sha256: Option<Digest>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenDownload {
    name: Spanned<String>,
    urls: Spanned<Vec<Spanned<String>>>,
    sha256: Option<Spanned<String>>,
}

impl WrittenDownload {
    pub(super) fn check(written: &[Self]) -> Result<Vec<Download>, Refusal> {
        let mut downloads: Vec<Download> = Vec::new();
        for Self { name, urls, sha256 } in written {
            let place = name;
            let name = checked(name, is_file_name, FILE_NAME_RULE)?;
            if downloads.iter().any(|one| one.name == name) {
                return Err(Refusal::at(place, format!("{name:?} is named twice: once is enough")));
            }
            if urls.get_ref().is_empty() {
                return Err(Refusal::at(urls, "urls is empty: name an address".to_owned()));
            }
            let rule = "is no http:// or https:// address";
            let urls = urls.get_ref().iter().map(|url| checked(url, is_url, rule));
            let digest = |text: &Spanned<String>| {
                let wrong = |_| Refusal::at(text, "sha256 has 64 hexadecimal digits".to_owned());
                text.get_ref().parse().map_err(wrong)
            };
            downloads.push(Download {
                name,
                urls: urls.collect::<Result<_, _>>()?,
                sha256: sha256.as_ref().map(digest).transpose()?,
            });
        }
        Ok(downloads)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::recipe::Recipe;

    const RECIPE: &str = "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\n[guest]\nrun = [\"true\"]\n";

    fn parse(more: &str) -> Result<Recipe, String> {
        Recipe::parse(&format!("{RECIPE}{more}"), Path::new("x.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_download_has_a_name_addresses_and_perhaps_a_digest() {
        let one = "[[download]]\nname = \"a.tar\"\nurls = [\"https://a.test/a?b=c\", \"http://b.test/a\"]\n";
        let recipe =
            parse(&format!("{one}sha256 = \"{}\"\n", crate::cache::Digest::of(b"a"))).expect("a recipe");
        assert_eq!(recipe.downloads[0].urls, ["https://a.test/a?b=c", "http://b.test/a"]);
        assert_eq!(recipe.downloads[0].sha256, Some(crate::cache::Digest::of(b"a")));
        assert_eq!(parse(one).expect("a recipe").downloads[0].sha256, None);
        for (wrong, told) in [
            (one.replace("a.tar", "../a"), "becomes a file name"),
            (one.replace("https://a.test/a?b=c", "ftp://a.test/a"), "is no http:// or https:// address"),
            (format!("{one}{one}"), "named twice"),
            (format!("{one}sha256 = \"1234\"\n"), "64 hexadecimal digits"),
            ("[[download]]\nname = \"a\"\nurls = []\n".to_owned(), "urls is empty"),
        ] {
            let said = parse(&wrong).expect_err("refused");
            assert!(said.contains(told), "{said}");
        }
        let idle = format!("{}{one}", RECIPE.replace("run = [\"true\"]\n", ""));
        let said = Recipe::parse(&idle, Path::new("x.toml")).expect_err("refused").to_string();
        assert!(said.contains("guest.run"), "{said}");
    }
}
