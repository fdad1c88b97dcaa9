//! What qemu is told, as a pure function from plain data.
//!
//! Deliberately absent: finding qemu, opening anything, any path that is not in the specification.
//! Channels are sockets at fixed descriptor numbers ([`CONSOLE_FD`] and its neighbours), which the
//! shim puts in place just before it turns into qemu, so that no port and no socket file exists
//! that another program could reach. Paths and nonces go in as JSON or as escaped option text:
//! qemu's option syntax gives commas a meaning.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// The descriptor of the serial console's socket, as qemu sees it.
pub const CONSOLE_FD: i32 = 100;
/// The descriptor of the control port's socket, as qemu sees it.
pub const CONTROL_FD: i32 = 101;
/// The descriptor of the QMP socket, as qemu sees it.
pub const QMP_FD: i32 = 102;
/// The descriptor of the log port's socket, as qemu sees it.
pub const LOG_FD: i32 = 103;

/// Where the guest finds the mirror: the address that user networking gives to the host.
pub const GUEST_GATEWAY: &str = "10.0.2.2";

/// The port of the mirror in the machine's own network namespace. Nothing else lives there, so a
/// fixed number cannot collide, and the guest's files can name it before qemu runs.
pub const MIRROR_PORT: u16 = 8080;
/// The UDP port at [`GUEST_GATEWAY`] that takes an installer's syslog.
pub const SYSLOG_PORT: u16 = 514;

/// The name of the virtio port of a builder guest.
pub const CONTROL_PORT: &str = "org.hostler.control";
/// The name of the virtio port on which a finished image proves that it booted.
pub const PROOF_PORT: &str = "org.hostler.proof";

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// The kernel's virtualization.
    Kvm,
    /// qemu's translator: works everywhere, about ten times slower.
    Tcg,
}

impl Accelerator {
    /// The word qemu and the messages use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// By how much limits made for kvm are stretched.
    #[must_use]
    pub fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Tcg => 6,
        }
    }
}

/// How a disk file is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// Sector by sector.
    Raw,
    /// qemu's own.
    Qcow2,
}

impl DiskFormat {
    /// qemu's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// One disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// Its layout.
    pub format: DiskFormat,
    /// What the guest reads as its serial number, up to 20 letters.
    pub serial: Option<&'static str>,
    /// How it is attached.
    pub attachment: Attachment,
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// As a virtio disk.
    Virtio,
    /// As a disc in a drive, which cannot be written to.
    Disc,
}

impl Disk {
    /// A disk without a serial number.
    #[must_use]
    pub fn new(path: PathBuf, format: DiskFormat) -> Self {
        Self { path, format, serial: None, attachment: Attachment::Virtio }
    }

    /// An ISO image in a drive.
    #[must_use]
    pub fn disc(path: PathBuf) -> Self {
        Self { attachment: Attachment::Disc, ..Self::new(path, DiskFormat::Raw) }
    }
}

/// Where the guest's first instructions come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// From the first disk, through the BIOS.
    Disk,
    /// Straight into this kernel.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The initial file system.
        initramfs: PathBuf,
        /// The kernel's command line.
        command_line: String,
    },
}

/// What the guest can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Nothing: it has no card.
    None,
    /// The mirror at [`GUEST_GATEWAY`]:[`MIRROR_PORT`], and nothing else.
    Mirror,
}

/// A machine, as plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// What executes it.
    pub accelerator: Accelerator,
    /// Virtual processors, at least 1.
    pub processors: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// How it starts.
    pub boot: Boot,
    /// Its disks, `/dev/vda` first.
    pub disks: Vec<Disk>,
    /// What it reaches.
    pub network: Network,
    /// The name of the virtio port that the control channel is.
    pub port_name: &'static str,
    /// The name of the virtio port to which an installer writes its log, if it does.
    pub log_port: Option<&'static str>,
    /// Text that the guest reads as its SMBIOS serial number.
    pub smbios_serial: Option<String>,
}

/// The arguments after the program's name.
#[must_use]
pub fn arguments(spec: &VmSpec) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    arguments.flag("-nodefaults").flag("-no-user-config");
    arguments.flag("-no-reboot");
    arguments.pair("-display", "none");
    arguments.pair("-name", "hostler,debug-threads=on");
    arguments.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    // Without graphics the firmware, and a boot loader that uses it, speak on the serial console too.
    arguments.pair("-machine", "q35,vmport=off,hpet=off,graphics=off");
    match spec.accelerator {
        Accelerator::Kvm => {
            arguments.pair("-accel", "kvm").pair("-cpu", "host");
        }
        Accelerator::Tcg => {
            // The default model: `max` makes the guest use instructions that are dear to translate.
            arguments.pair("-accel", "tcg,thread=multi,tb-size=512");
        }
    }
    arguments.pair("-smp", spec.processors.to_string());
    arguments.pair("-m", format!("{}M", spec.memory_mib));
    arguments.pair("-device", "virtio-rng-pci");
    arguments.pair("-chardev", format!("socket,id=console,fd={CONSOLE_FD}"));
    arguments.pair("-serial", "chardev:console");
    arguments.pair("-device", "virtio-serial-pci");
    arguments.pair("-chardev", format!("socket,id=control,fd={CONTROL_FD}"));
    arguments.pair("-device", format!("virtserialport,chardev=control,name={}", escaped(spec.port_name)));
    if let Some(name) = spec.log_port {
        arguments.pair("-chardev", format!("socket,id=log,fd={LOG_FD}"));
        arguments.pair("-device", format!("virtserialport,chardev=log,name={}", escaped(name)));
    }
    arguments.pair("-chardev", format!("socket,id=qmp,fd={QMP_FD}"));
    arguments.pair("-mon", "chardev=qmp,mode=control");
    for (number, disk) in spec.disks.iter().enumerate() {
        arguments.pair("-drive", drive(number, disk));
        // The machine stops where the host's disk is full, so that the runner can tell it from a
        // fault of the guest's.
        let serial = disk.serial.map_or(String::new(), |serial| format!(",serial={}", escaped(serial)));
        arguments.pair(
            "-device",
            match disk.attachment {
                Attachment::Virtio => {
                    format!("virtio-blk-pci,drive=disk{number},werror=stop,rerror=stop{serial}")
                }
                Attachment::Disc => format!("ide-cd,drive=disk{number},bus=ide.0"),
            },
        );
    }
    // For pictures of the screen: what boots from a disk shows its first words nowhere else.
    arguments.pair("-device", "VGA,vgamem_mb=4");
    match spec.network {
        Network::None => {
            arguments.pair("-nic", "none");
        }
        Network::Mirror => {
            arguments.pair("-netdev", "user,id=mirror,ipv6=off");
            // No option ROM: nothing boots from this card.
            arguments.pair("-device", "virtio-net-pci,netdev=mirror,romfile=");
        }
    }
    if let Some(serial) = &spec.smbios_serial {
        arguments.pair("-smbios", format!("type=1,serial={}", escaped(serial)));
    }
    if let Boot::Kernel { kernel, initramfs, command_line } = &spec.boot {
        arguments.pair("-kernel", kernel);
        arguments.pair("-initrd", escaped_path(initramfs));
        arguments.pair("-append", command_line);
    }
    arguments.0
}

fn drive(number: usize, disk: &Disk) -> OsString {
    if disk.attachment == Attachment::Disc {
        let mut text = OsString::from(format!(
            "if=none,id=disk{number},format=raw,readonly=on,media=cdrom,file.driver=file,file.filename="
        ));
        text.push(escaped_path(&disk.path));
        return text;
    }
    let mut text = OsString::from(format!(
        "if=none,id=disk{number},format={},cache=unsafe,discard=unmap,detect-zeroes=unmap,file.driver=file,file.filename=",
        disk.format.name()
    ));
    text.push(escaped_path(&disk.path));
    text
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(option.into());
        self.0.push(value.into());
        self
    }
}

fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

/// A path as an option's value. A relative one gets `./`, so that none starts with what qemu takes
/// for a protocol (`nbd:`).
fn escaped_path(path: &Path) -> OsString {
    let path = if path.is_absolute() { path.to_owned() } else { Path::new(".").join(path) };
    let mut bytes = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(byte);
        }
    }
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            accelerator: Accelerator::Tcg,
            processors: 2,
            memory_mib: 1024,
            boot: Boot::Kernel {
                kernel: "k/vmlinuz".into(),
                initramfs: "a,b.cpio".into(),
                command_line: "console=ttyS0 x=a,b".into(),
            },
            disks: vec![Disk::new("work/x,y.raw".into(), DiskFormat::Raw)],
            network: Network::Mirror,
            port_name: CONTROL_PORT,
            log_port: None,
            smbios_serial: None,
        }
    }

    fn values<'a>(arguments: &'a [OsString], option: &str) -> Vec<&'a str> {
        arguments
            .windows(2)
            .filter(|pair| pair[0] == option)
            .map(|pair| pair[1].to_str().expect("the tests' arguments are text"))
            .collect()
    }

    #[test]
    fn the_sandbox_denies_everything_it_can() {
        assert_eq!(
            values(&arguments(&spec()), "-sandbox"),
            ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        );
    }

    #[test]
    fn nothing_comes_from_a_configuration_and_no_display_opens() {
        let arguments = arguments(&spec());
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(arguments.iter().any(|argument| argument == flag), "{flag}");
        }
        assert_eq!(values(&arguments, "-display"), ["none"]);
    }

    #[test]
    fn commas_in_paths_do_not_become_options() {
        let arguments = arguments(&spec());
        assert_eq!(
            values(&arguments, "-drive"),
            [
                "if=none,id=disk0,format=raw,cache=unsafe,discard=unmap,detect-zeroes=unmap,file.driver=file,file.filename=./work/x,,y.raw"
            ]
        );
        // `-initrd` takes a list, split at single commas.
        assert_eq!(values(&arguments, "-initrd"), ["./a,,b.cpio"]);
        assert_eq!(values(&arguments, "-append"), ["console=ttyS0 x=a,b"]);
    }

    #[test]
    fn a_machine_without_network_has_no_card() {
        let arguments = arguments(&VmSpec { network: Network::None, ..spec() });
        assert_eq!(values(&arguments, "-nic"), ["none"]);
        assert!(values(&arguments, "-netdev").is_empty());
    }

    #[test]
    fn a_machine_that_boots_its_disk_gets_no_kernel() {
        let arguments = arguments(&VmSpec {
            boot: Boot::Disk,
            smbios_serial: Some("a,b".into()),
            disks: vec![Disk::new("/x.qcow2".into(), DiskFormat::Qcow2)],
            ..spec()
        });
        assert!(values(&arguments, "-kernel").is_empty());
        assert_eq!(values(&arguments, "-smbios"), ["type=1,serial=a,,b"]);
        assert!(values(&arguments, "-drive")[0].contains("format=qcow2"));
    }

    #[test]
    fn a_disc_is_in_a_drive_and_cannot_be_written_to() {
        let arguments = arguments(&VmSpec {
            disks: vec![
                Disk::new("/x.raw".into(), DiskFormat::Raw),
                Disk { serial: Some("a,b"), ..Disk::new("/y.raw".into(), DiskFormat::Raw) },
                Disk::disc("/z,1.iso".into()),
            ],
            ..spec()
        });
        assert_eq!(
            values(&arguments, "-drive")[2],
            "if=none,id=disk2,format=raw,readonly=on,media=cdrom,file.driver=file,file.filename=/z,,1.iso"
        );
        let devices = values(&arguments, "-device");
        assert!(devices.contains(&"ide-cd,drive=disk2,bus=ide.0"), "{devices:?}");
        assert!(devices.contains(&"virtio-blk-pci,drive=disk1,werror=stop,rerror=stop,serial=a,,b"));
    }

    #[test]
    fn kvm_uses_the_hosts_processor_and_tcg_threads() {
        let kvm = arguments(&VmSpec { accelerator: Accelerator::Kvm, ..spec() });
        assert_eq!(values(&kvm, "-accel"), ["kvm"]);
        assert_eq!(values(&kvm, "-cpu"), ["host"]);
        assert!(values(&arguments(&spec()), "-accel")[0].starts_with("tcg,thread=multi"));
        assert!(values(&arguments(&spec()), "-cpu").is_empty());
    }
}
