//! Signatures of Release files, as gpgv judges them.
//!
//! [`verify`] runs gpgv; [`judge`] decides, from its status lines alone, whether to trust. What is
//! trusted afterwards is only the text that gpgv wrote out: around the signed part of a file there can
//! be text that nobody signed. gpgv's exit status is not used: it is 2 as soon as one of several
//! signers is unknown, which is how archives announce their next key.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::beside::plain_file;
use crate::child::{HostTool, ToolError};
use crate::stop::Stop;

const GPGV: HostTool = HostTool { name: "gpgv", package: "gpgv" };
/// The largest keyring, in bytes; that of all of Debian's developers has half of it.
const LARGEST_KEYRING: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// Why a text is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// A signature does not fit the text.
    #[error("its signature by key {0} is BAD: the file was altered on its way")]
    Bad(String),
    /// None of the signers is in the keyring.
    #[error(
        "none of its signers ({0}) is in the keyring: if it is not Debian's, name its own keyring as debian.keyring in the recipe"
    )]
    UnknownSigner(String),
    /// The key has expired or is revoked, or the signature has expired.
    #[error(
        "it is only signed by a key or signature that has run out or is revoked ({0}): update the keyring"
    )]
    RunOut(String),
    /// The signature uses a digest that can be forged.
    #[error("its signature by key {0} uses a digest that is too weak to be trusted")]
    Weak(String),
    /// There is no signature, or several texts.
    #[error("it is not one text with a signature: the mirror answers with something else")]
    Unsigned,
}

/// Why a file cannot be verified.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// gpgv has no result.
    #[error("cannot check the signature")]
    Tool(#[from] ToolError),
    /// The keyring cannot be read.
    #[error("cannot read keyring {}: install debian-archive-keyring, or name another as debian.keyring", path.display())]
    Keyring {
        /// The keyring.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The scratch directory fails.
    #[error("cannot use {} for checking a signature: check its space and permissions", path.display())]
    Scratch {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is not trusted.
    #[error(transparent)]
    Distrusted(Distrust),
}

/// Verifies the clear-signed `message` and returns the signed text, and only it. `scratch` is a
/// directory for this call alone.
///
/// # Errors
/// It cannot be verified, or is not trusted.
pub fn verify(message: &[u8], keyring: &Path, scratch: &Path, stop: &Stop) -> Result<String, SignatureError> {
    let keys = read_keyring(keyring)?;
    let binary = scratch.join("keyring");
    let input = scratch.join("message");
    let output = scratch.join("text");
    let failed = |path: &Path, source| SignatureError::Scratch { path: path.to_owned(), source };
    std::fs::write(&binary, keys).map_err(|source| failed(&binary, source))?;
    std::fs::write(&input, message).map_err(|source| failed(&input, source))?;
    // gpgv looks for a bare name in its home directory.
    let keyring = Path::new(".").join(binary);
    let check = GPGV
        .find()?
        .argument("--homedir")
        .argument(scratch)
        .arguments(["--status-fd", "1", "--keyring"])
        .argument(keyring)
        .argument("--output")
        .argument(&output)
        .argument(input);
    let finished = check.run(LIMIT, stop)?;
    if finished.status.code().is_none() {
        return Err(finished.failure().into());
    }
    let text = judge(&String::from_utf8_lossy(&finished.stdout)).and_then(|()| {
        let text = std::fs::read(&output).ok().and_then(|text| String::from_utf8(text).ok());
        text.filter(|text| is_whole(text, message)).ok_or(Distrust::Unsigned)
    });
    if text == Err(Distrust::Unsigned) {
        // gpgv says the same where its output's disk is full, or says nothing and cuts the text off.
        let room = scratch.join("room");
        std::fs::write(&room, message).map_err(|source| failed(&room, source))?;
    }
    text.map_err(SignatureError::Distrusted)
}

/// Is the text all that is between the message's frames? Spaces at the ends of lines are not signed.
fn is_whole(text: &str, message: &[u8]) -> bool {
    let message = String::from_utf8_lossy(message);
    let inner = message
        .split_once("-----BEGIN PGP SIGNED MESSAGE-----")
        .and_then(|(_, rest)| rest.split_once("\n-----BEGIN PGP SIGNATURE-----"));
    let Some((inner, _)) = inner else { return false };
    // Armor headers end with a blank line.
    let signed = inner.lines().skip(1).skip_while(|line| !line.trim().is_empty()).skip(1);
    let signed = signed.map(|line| line.strip_prefix("- ").unwrap_or(line).trim_end());
    signed.eq(text.lines().map(str::trim_end))
}

/// Verifies that the detached `signature` is of `message`. `scratch` is a directory for this call alone.
///
/// # Errors
/// It cannot be verified, or is not trusted.
pub fn verify_detached(
    message: &[u8],
    signature: &[u8],
    keyring: &Path,
    scratch: &Path,
    stop: &Stop,
) -> Result<(), SignatureError> {
    let keys = read_keyring(keyring)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = scratch.join(name);
        match std::fs::write(&path, bytes) {
            Ok(()) => Ok(path),
            Err(source) => Err(SignatureError::Scratch { path, source }),
        }
    };
    let keyring = Path::new(".").join(write("keyring", &keys)?);
    let check = GPGV
        .find()?
        .argument("--homedir")
        .argument(scratch)
        .arguments(["--status-fd", "1", "--keyring"])
        .argument(keyring)
        .argument(write("signature", signature)?)
        .argument(write("message", message)?);
    let finished = check.run(LIMIT, stop)?;
    if finished.status.code().is_none() {
        return Err(finished.failure().into());
    }
    judge_texts(&String::from_utf8_lossy(&finished.stdout), 0).map_err(SignatureError::Distrusted)
}

/// The keys of a keyring file in the form that gpgv reads, whichever of apt's two forms it has.
///
/// # Errors
/// It cannot be read, or is neither.
pub fn read_keyring(path: &Path) -> Result<Vec<u8>, SignatureError> {
    let failed = |source| SignatureError::Keyring { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = plain_file(path).map_err(failed)?;
    file.take(LARGEST_KEYRING + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LARGEST_KEYRING {
        let told = format!("it has more than {LARGEST_KEYRING} bytes: no keyring is that large");
        return Err(failed(std::io::Error::other(told)));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) if text.contains("-----BEGIN PGP PUBLIC KEY BLOCK-----") => dearmor(text).ok_or_else(|| {
            let kind = std::io::ErrorKind::InvalidData;
            failed(std::io::Error::new(kind, "its armor is damaged"))
        }),
        _ => Ok(bytes),
    }
}

/// Decodes the armored key blocks of a text (RFC 9580, 6.2). Their checksums are left alone: a key
/// that is damaged verifies nothing.
fn dearmor(text: &str) -> Option<Vec<u8>> {
    let mut keys = Vec::new();
    for block in text.split("-----BEGIN PGP PUBLIC KEY BLOCK-----").skip(1) {
        let (block, _) = block.split_once("-----END")?;
        // Headers end with a blank line, which may hold spaces.
        let mut lines = block.lines().map(str::trim).skip(1);
        lines.by_ref().find(|line| line.is_empty())?;
        let mut bits = 0_u32;
        let mut count = 0;
        for sign in lines.take_while(|line| !line.starts_with('=')).flat_map(str::bytes) {
            let value = match sign {
                b'A'..=b'Z' => sign - b'A',
                b'a'..=b'z' => sign - b'a' + 26,
                b'0'..=b'9' => sign - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                b'=' => continue,
                _ => return None,
            };
            bits = (bits << 6 | u32::from(value)) & 0xffff;
            count += 6;
            if count >= 8 {
                count -= 8;
                keys.push((bits >> count & 0xff) as u8);
            }
        }
    }
    Some(keys)
}

/// Decides from gpgv's status lines (GnuPG's doc/DETAILS) whether the one text is signed by a key of
/// the keyring that still holds.
///
/// # Errors
/// Why it is not trusted.
pub fn judge(status: &str) -> Result<(), Distrust> {
    judge_texts(status, 1)
}

/// The same for so many texts: with a detached signature, there is none in it.
fn judge_texts(status: &str, wanted: usize) -> Result<(), Distrust> {
    let mut texts = 0;
    let mut good = false;
    let mut valid = false;
    let mut trusted = false;
    let mut doubts: [Vec<String>; 3] = Default::default();
    for line in status.lines().filter_map(|line| line.strip_prefix("[GNUPG:] ")) {
        let words: Vec<&str> = line.split(' ').collect();
        let key = || words.get(1).copied().unwrap_or("?").to_owned();
        match words.first().copied() {
            Some("PLAINTEXT") => texts += 1,
            Some("NEWSIG") => (good, valid) = (false, false),
            Some("BADSIG") => return Err(Distrust::Bad(key())),
            Some("GOODSIG") => good = true,
            Some("VALIDSIG") => match words.get(8) {
                // MD5, SHA-1 and RIPEMD-160 in OpenPGP's numbering (RFC 9580, 9.5).
                Some(&("1" | "2" | "3")) | None => doubts[2].push(key()),
                Some(_) => valid = true,
            },
            Some("EXPKEYSIG" | "EXPSIG" | "REVKEYSIG") => doubts[1].push(key()),
            Some("NO_PUBKEY") => doubts[0].push(key()),
            _ => {}
        }
        trusted |= good && valid;
    }
    if texts == wanted && trusted {
        return Ok(());
    }
    let [unknown, run_out, weak] = doubts.map(|keys| keys.join(", "));
    Err(if texts > wanted {
        Distrust::Unsigned
    } else if !weak.is_empty() {
        Distrust::Weak(weak)
    } else if !run_out.is_empty() {
        Distrust::RunOut(run_out)
    } else if !unknown.is_empty() {
        Distrust::UnknownSigner(unknown)
    } else {
        Distrust::Unsigned
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[GNUPG:] PLAINTEXT 74 0 \n";
    const GOOD: &str = "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 6ED0 Name\n[GNUPG:] VALIDSIG 4CB5 2026-11-21 1795227090 0 4 0 1 8 01 B8B8\n";

    fn with(lines: &str) -> Result<(), Distrust> {
        judge(&format!("{TEXT}{lines}"))
    }

    #[test]
    fn a_text_that_was_cut_off_is_not_whole() {
        let message = b"-----BEGIN PGP SIGNED MESSAGE-----\r\nHash: SHA512\r\n\r\na: 1 \n- -b\n\nc\n-----BEGIN PGP SIGNATURE-----\nx";
        assert!(is_whole("a: 1\n-b\n\nc\n", message));
        for cut in ["", "a: 1\n-b\n\n", "a: 1\n-b\n\nc\nd\n", "a: 1\n-b"] {
            assert!(!is_whole(cut, message), "{cut:?}");
        }
        assert!(!is_whole("", b"no message"));
    }

    #[test]
    fn what_is_no_keyring_is_neither_waited_for_nor_read() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
        let huge = folder.path().join("huge");
        std::fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
        let told = |path: &Path| crate::causes::in_one_line(&read_keyring(path).unwrap_err());
        let why = told(&pipe);
        assert!(why.contains("cannot read keyring") && why.contains("it is not a plain file"), "{why}");
        let why = told(&huge);
        assert!(why.contains("no keyring is that large"), "{why}");
    }

    #[test]
    fn one_good_signer_suffices_beside_unknown_ones() {
        assert_eq!(with(GOOD), Ok(()));
        assert_eq!(with(&format!("[GNUPG:] NEWSIG\n[GNUPG:] NO_PUBKEY AB\n{GOOD}")), Ok(()));
    }

    #[test]
    fn a_bad_signature_spoils_a_good_one() {
        assert_eq!(
            with(&format!("{GOOD}[GNUPG:] NEWSIG\n[GNUPG:] BADSIG AB Name\n")),
            Err(Distrust::Bad("AB".to_owned()))
        );
    }

    #[test]
    fn valid_alone_is_not_good() {
        let expired = GOOD.replace("GOODSIG", "EXPKEYSIG");
        assert_eq!(with(&expired), Err(Distrust::RunOut("6ED0".to_owned())));
        // The good half of one signature and the valid half of another make no trusted one.
        let halves = "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 6ED0 N\n[GNUPG:] NEWSIG\n[GNUPG:] VALIDSIG 4CB5 d t 0 4 0 1 8 01 B8\n";
        assert_eq!(with(halves), Err(Distrust::Unsigned));
    }

    #[test]
    fn weak_digests_unknown_signers_and_no_text() {
        assert_eq!(with(&GOOD.replace(" 1 8 01", " 1 2 01")), Err(Distrust::Weak("4CB5".to_owned())));
        assert_eq!(
            with("[GNUPG:] NEWSIG\n[GNUPG:] NO_PUBKEY AB\n"),
            Err(Distrust::UnknownSigner("AB".to_owned()))
        );
        assert_eq!(judge(GOOD), Err(Distrust::Unsigned));
        assert_eq!(judge(&format!("{TEXT}{TEXT}{GOOD}")), Err(Distrust::Unsigned));
        assert_eq!(judge(""), Err(Distrust::Unsigned));
    }

    #[test]
    fn armored_keys_are_decoded() {
        let armored = "c\n-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: x\n\naGVsbG8s\nIHdvcmxkIQ==\n=abcd\n-----END PGP PUBLIC KEY BLOCK-----\n";
        assert_eq!(dearmor(armored).as_deref(), Some(&b"hello, world!"[..]));
        let two = format!("{armored}{armored}");
        assert_eq!(dearmor(&two).as_deref(), Some(&b"hello, world!hello, world!"[..]));
        assert_eq!(dearmor(&armored.replace("aGV", "a*V")), None);
        assert_eq!(dearmor(&armored.replace("-----END", "")), None);
    }

    proptest::proptest! {
        #[test]
        fn no_armor_panics(text in "(-----BEGIN PGP PUBLIC KEY BLOCK-----|-----END|\n|[A-z=]){0,30}") {
            let _ = dearmor(&text);
        }

        #[test]
        fn no_status_without_a_good_line_is_trusted(text in "(\\[GNUPG:\\] |VALIDSIG |PLAINTEXT|NEWSIG|8 |\n|x ){0,40}") {
            proptest::prop_assert!(judge(&text).is_err());
        }
    }
}
