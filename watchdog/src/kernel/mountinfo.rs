//! `/proc/PID/mountinfo`, as `proc_pid_mountinfo(5)` describes it.
//!
//! A parser of bytes: mount points may hold any byte but NUL, and the kernel writes space, tab,
//! newline, backslash and `#` as three octal digits.

use crate::model::DeviceNumber;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The mount's number (reusable).
    pub number: u64,
    /// The number of the mount it is on.
    pub parent: u64,
    /// The file system's device number.
    pub device: DeviceNumber,
    /// Which part of the file system is mounted.
    pub root: Vec<u8>,
    /// Where it is mounted, relative to the reader's root.
    pub point: Vec<u8>,
    /// The peer group that it shares its mounts with.
    pub peers: Option<u64>,
    /// The peer group that it gets mounts from.
    pub master: Option<u64>,
    /// The file system's type.
    pub filesystem: String,
    /// What was mounted, in the mounter's words.
    pub source: Vec<u8>,
    /// The file system's own options, where they tell its layers (overlays); else empty.
    pub layers: Vec<u8>,
    /// For whom a FUSE file system was mounted.
    pub user: Option<u32>,
}

/// Why a line is none of mountinfo's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of mountinfo has no valid {field}")]
pub struct ParseError {
    /// Its number, from 1.
    pub line: usize,
    /// The field that is missing or wrong.
    pub field: &'static str,
}

/// Parses a whole file.
///
/// # Errors
/// The first line that is not as the kernel documents it. A list with a line left out would be a
/// list that hides a mount, so there is no lenient way.
pub fn parse(bytes: &[u8]) -> Result<Vec<Entry>, ParseError> {
    // Room for all from the start: moving thousands of entries to larger places costs as much as reading
    // them. No line is shorter than the guess by much.
    let mut entries = Vec::with_capacity(bytes.len() / 64);
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    for (index, line) in lines.enumerate() {
        entries.push(parse_line(line).map_err(|field| ParseError { line: index + 1, field })?);
    }
    Ok(entries)
}

fn parse_line(line: &[u8]) -> Result<Entry, &'static str> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = number(fields.next()).ok_or("mount number")?;
    let parent = self::number(fields.next()).ok_or("parent number")?;
    let device = fields
        .next()
        .and_then(|field| std::str::from_utf8(field).ok())
        .and_then(DeviceNumber::parse)
        .ok_or("device number")?;
    let root = unescape(fields.next().ok_or("root")?);
    let point = unescape(fields.next().ok_or("mount point")?);
    fields.next().ok_or("options")?;
    let (mut peers, mut master) = (None, None);
    loop {
        let field = fields.next().ok_or("separator")?;
        if field == b"-" {
            break;
        } else if let Some(group) = field.strip_prefix(b"shared:") {
            peers = Some(self::number(Some(group)).ok_or("peer group")?);
        } else if let Some(group) = field.strip_prefix(b"master:") {
            master = Some(self::number(Some(group)).ok_or("master group")?);
        }
    }
    let filesystem = fields.next().ok_or("file system type")?;
    let filesystem = String::from_utf8_lossy(&unescape(filesystem)).into_owned();
    let source = unescape(fields.next().ok_or("source")?);
    let options = fields.next();
    let layers = options.filter(|_| filesystem == "overlay").map(unescape).unwrap_or_default();
    // The kernel writes `fuseblk`, and `fuse.` with whatever the server calls itself.
    let is_fuse = filesystem.starts_with("fuse") && filesystem != "fusectl";
    let user = options.filter(|_| is_fuse).and_then(fuse_user);
    Ok(Entry { number, parent, device, root, point, peers, master, filesystem, source, layers, user })
}

/// The kernel itself writes this option, and first of all but `rw` or `ro` (`fuse_show_options`).
fn fuse_user(options: &[u8]) -> Option<u32> {
    let option = options.split(|byte| *byte == b',').nth(1)?;
    std::str::from_utf8(option.strip_prefix(b"user_id=")?).ok()?.parse().ok()
}

fn number(field: Option<&[u8]>) -> Option<u64> {
    std::str::from_utf8(field?).ok()?.parse().ok()
}

/// Undoes the kernel's octal escapes. What only looks like one stays as it is.
pub(super) fn unescape(field: &[u8]) -> Vec<u8> {
    if !field.contains(&b'\\') {
        return field.to_vec();
    }
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_a_line_as_the_kernel_writes_it() {
        let line = b"36 35 98:0 /mnt1 /mnt\\0402/x\\134y master:1 shared:7 - ext3 /dev/root\\012 rw,errors=continue\n";
        // The manual's own example, with a space and a backslash in the mount point, a newline in
        // the source, and the options field where the kernel has it.
        let line = String::from_utf8_lossy(line).replace(" master", " rw,noatime master");
        assert_eq!(
            parse(line.as_bytes()),
            Ok(vec![Entry {
                number: 36,
                parent: 35,
                device: DeviceNumber { major: 98, minor: 0 },
                root: b"/mnt1".to_vec(),
                point: b"/mnt 2/x\\y".to_vec(),
                peers: Some(7),
                master: Some(1),
                filesystem: "ext3".to_owned(),
                source: b"/dev/root\n".to_vec(),
                layers: Vec::new(),
                user: None,
            }])
        );
    }

    #[test]
    fn tells_for_whom_a_fuse_file_system_was_mounted() {
        let user = |line: &str| parse(line.as_bytes()).expect("a valid line")[0].user;
        let line = |kind: &str, source: &str, options: &str| {
            user(&format!("1 0 0:50 / /m rw - {kind} {source} {options}\n"))
        };
        let options = "rw,user_id=1000,group_id=100,default_permissions";
        assert_eq!(line("fuse.sshfs", "host:", options), Some(1000));
        assert_eq!(line("fuseblk", "/dev/sda1", options), Some(1000));
        assert_eq!(line("ext4", "/dev/sda1", options), None);
        assert_eq!(line("fusectl", "none", "rw"), None);
        // What a server calls itself and its source, it makes up.
        assert_eq!(line("fuse.user_id=5", "user_id=7", "rw,user_id=8"), Some(8));
    }

    #[test]
    fn keeps_bytes_that_are_no_text() {
        let entries = parse(b"1 0 7:1 / /m\xff\xfe rw - ext4 \xff rw\n").expect("a valid line");
        assert_eq!(entries[0].point, b"/m\xff\xfe");
        assert_eq!(entries[0].source, b"\xff");
    }

    #[test]
    fn an_empty_source_is_a_source() {
        let entries = parse(b"1 0 0:50 / /m rw - tmpfs  rw\n").expect("a valid line");
        assert_eq!(entries[0].source, b"");
    }

    #[test]
    fn a_broken_line_fails_the_whole_and_says_where() {
        assert_eq!(
            parse(b"1 0 0:1 / / rw - proc proc rw\n2 1 zero / /x rw - proc proc rw\n"),
            Err(ParseError { line: 2, field: "device number" })
        );
        assert_eq!(parse(b"1 0 0:1 / / rw shared:1\n"), Err(ParseError { line: 1, field: "separator" }));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn finds_back_every_mount_point(point in proptest::collection::vec(1u8.., 1..60)) {
            let mut line = b"1 0 7:1 / ".to_vec();
            for byte in &point {
                if matches!(byte, b' ' | b'\t' | b'\n' | b'\\' | b'#') {
                    line.extend(format!("\\{byte:03o}").bytes());
                } else {
                    line.push(*byte);
                }
            }
            line.extend(b" rw - ext4 src rw\n");
            let entries = parse(&line).expect("as the kernel would write it");
            prop_assert_eq!(&entries[0].point, &point);
        }
    }
}
