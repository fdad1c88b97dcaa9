//! Binary packages: an `ar` archive of two compressed tar archives (deb(5)).
//!
//! Reads control members into memory, which are small, and hands the file tree out entry by entry.
//! Deliberately absent: what becomes of the entries (see the disk's unpacking), and signatures: a
//! package's digest was checked before it is opened here. Still nothing in it is trusted: sizes are
//! limited, and what is malformed is an error.

use std::io::{self, BufReader, Read};

use super::long_names::LongNames;

/// Maintainer scripts, templates and lists: generous for the largest there are.
const CONTROL_LIMIT: u64 = 64 << 20;

/// Why a package cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// Its outer archive is damaged.
    #[error("it is no Debian package, or damaged: fetch it again")]
    Archive {
        /// What the reader said.
        #[source]
        source: io::Error,
    },
    /// A part is missing, or comes out of order.
    #[error("it has no {0} where one must be")]
    Missing(&'static str),
    /// It is compressed in an unknown way.
    #[error("its {member} is compressed in a way that cannot be read here: xz, gz and none can")]
    Compression {
        /// The member.
        member: String,
    },
    /// A control member is too large.
    #[error("its control archive is larger than {CONTROL_LIMIT} bytes")]
    ControlTooLarge,
}

/// A file of the control archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlMember {
    /// Its name, such as `preinst`: no slash, not `.` or `..`.
    pub name: String,
    /// Permission bits.
    pub mode: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The control archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Text of the file `control`.
    pub fields: String,
    /// All other files.
    pub members: Vec<ControlMember>,
}

impl Control {
    /// The text of a member, lines and all; empty when it is absent.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        let member = self.members.iter().find(|member| member.name == name);
        member.map_or_else(String::new, |member| String::from_utf8_lossy(&member.bytes).into_owned())
    }
}

/// Reads a package: its control archive, then `data` gets its file tree.
///
/// # Errors
/// The package is malformed, or `data` fails.
pub fn read<T, E: From<DebError>>(
    file: impl Read,
    data: impl FnOnce(Control, &mut tar::Archive<&mut dyn Read>) -> Result<T, E>,
) -> Result<T, E> {
    let mut archive = ar::Archive::new(BufReader::with_capacity(1 << 18, file));
    let mut control = None;
    let mut first = true;
    while let Some(entry) = archive.next_entry() {
        let entry = entry.map_err(|source| DebError::Archive { source })?;
        let name = String::from_utf8_lossy(entry.header().identifier()).into_owned();
        let name = name.trim_end_matches('/');
        if first && name != "debian-binary" {
            return Err(DebError::Missing("debian-binary").into());
        }
        first = false;
        if name.starts_with("control.tar") {
            let mut plain = decompress(name, entry)?;
            control = Some(read_control(&mut *plain)?);
        } else if name.starts_with("data.tar") {
            let control = control.ok_or(DebError::Missing("control.tar"))?;
            let mut plain = LongNames::new(decompress(name, entry)?);
            let reader: &mut dyn Read = &mut plain;
            return data(control, &mut tar::Archive::new(reader));
        }
    }
    Err(DebError::Missing("data.tar").into())
}

fn decompress<'a>(member: &str, entry: impl Read + 'a) -> Result<Box<dyn Read + 'a>, DebError> {
    let suffix = member.split_once(".tar").map_or("", |(_, suffix)| suffix);
    Ok(match suffix {
        "" => Box::new(entry),
        ".xz" => {
            let plain = crate::xz::decoder(entry).map_err(|source| DebError::Archive { source })?;
            Box::new(BufReader::with_capacity(1 << 17, plain))
        }
        ".gz" => Box::new(BufReader::with_capacity(1 << 17, flate2::read::MultiGzDecoder::new(entry))),
        _ => {
            return Err(DebError::Compression { member: member.to_owned() });
        }
    })
}

fn read_control(reader: &mut dyn Read) -> Result<Control, DebError> {
    let failed = |source| DebError::Archive { source };
    let mut archive = tar::Archive::new(LongNames::new(reader.take(CONTROL_LIMIT)));
    let mut control = Control::default();
    let mut total = 0_u64;
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        total = total.saturating_add(entry.size());
        if total > CONTROL_LIMIT {
            return Err(DebError::ControlTooLarge);
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(failed)?;
        let path = entry.path_bytes();
        let name = String::from_utf8_lossy(&path).trim_start_matches("./").to_owned();
        if name == "control" {
            control.fields = String::from_utf8(bytes)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        } else if is_member_name(&name) {
            control.members.push(ControlMember {
                name,
                mode: entry.header().mode().map_err(failed)? & 0o777,
                bytes,
            });
        }
    }
    if control.fields.is_empty() {
        return Err(DebError::Missing("control"));
    }
    Ok(control)
}

/// Members become files in dpkg's database; dpkg itself knows no others than such names.
fn is_member_name(name: &str) -> bool {
    !name.is_empty()
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o755);
            builder.append_data(&mut header, name, *bytes).expect("appended");
        }
        builder.into_inner().expect("finished")
    }

    fn deb(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut builder = ar::Builder::new(Vec::new());
        for (name, bytes) in members {
            let header = ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64);
            builder.append(&header, bytes.as_slice()).expect("appended");
        }
        builder.into_inner().expect("finished")
    }

    fn names(bytes: &[u8]) -> Result<(Control, Vec<String>), DebError> {
        read(bytes, |control, data| {
            let failed = |source| DebError::Archive { source };
            let mut names = Vec::new();
            for entry in data.entries().map_err(failed)? {
                let entry = entry.map_err(failed)?;
                names.push(String::from_utf8_lossy(&entry.path_bytes()).into_owned());
            }
            Ok((control, names))
        })
    }

    #[test]
    fn control_and_data_are_read() {
        let control =
            tar_of(&[("./control", b"Package: a\n"), ("./preinst", b"#!/bin/sh\n"), ("./a/b", b"")]);
        let data = tar_of(&[("./usr/x", b"x")]);
        let package =
            deb(&[("debian-binary", b"2.0\n".to_vec()), ("control.tar", control), ("data.tar", data)]);
        let (control, names) = names(&package).expect("valid");
        assert_eq!(control.fields, "Package: a\n");
        assert_eq!(control.text("preinst"), "#!/bin/sh\n");
        assert_eq!(control.members.len(), 1);
        assert_eq!(names, ["usr/x"]);
    }

    #[test]
    fn malformed_packages_are_errors() {
        assert!(matches!(names(b""), Err(DebError::Missing(_) | DebError::Archive { .. })));
        assert!(matches!(names(b"rubbish rubbish"), Err(DebError::Archive { .. })));
        let data_first = deb(&[("debian-binary", b"2.0\n".to_vec()), ("data.tar", Vec::new())]);
        assert!(matches!(names(&data_first), Err(DebError::Missing("control.tar"))));
        let unknown = deb(&[("debian-binary", b"2.0\n".to_vec()), ("control.tar.lz9", Vec::new())]);
        assert!(matches!(names(&unknown), Err(DebError::Compression { .. })));
        let damaged = deb(&[("debian-binary", b"2.0\n".to_vec()), ("control.tar.xz", b"xxxx".to_vec())]);
        assert!(matches!(names(&damaged), Err(DebError::Archive { .. })));
    }

    #[test]
    fn a_name_that_is_longer_than_any_is_refused_in_either_part() {
        let long = tar_of(&[(&"a/".repeat(50_000), b"x")]);
        let control = || tar_of(&[("./control", b"Package: a\n")]);
        for (control, data) in [(long.clone(), control()), (control(), long)] {
            let members =
                [("debian-binary", b"2.0\n".to_vec()), ("control.tar", control), ("data.tar", data)];
            let error = names(&deb(&members)).expect_err("too long");
            let told = crate::causes::in_one_line(&error);
            assert!(told.contains("longer than any file's"), "{told}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = names(&bytes);
            let mut framed = b"!<arch>\n".to_vec();
            framed.extend(bytes);
            let _ = names(&framed);
        }
    }
}
