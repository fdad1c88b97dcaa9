//! Virtual machines: started, watched, judged and ended.
//!
//! Data flows one way. [`argv`] turns a [`argv::VmSpec`] into qemu's arguments; [`launch`] starts
//! the shim (`hostler __vm`), which confines itself and becomes qemu; [`run`] sees one boot through: `attend`
//! reads the machine's channels through the pure parsers [`console`], [`control`] and [`qmp`], and lets the pure
//! [`watch`] judge, `afterwards` ends it. [`canary`] uses all of that to find an accelerator that really runs a guest.
//! [`initramfs`] and [`modules`] make what a guest boots from.
//!
//! Deliberately absent: libvirt, any TCP or VNC port on the host, any reuse of a machine.

mod afterwards;
pub mod argv;
mod attend;
mod bounded;
pub mod canary;
mod channels;
pub mod confinement;
pub mod console;
pub mod control;
pub mod control_group;
pub mod initramfs;
pub mod launch;
mod line_drawing;
mod loopback;
pub mod modules;
pub mod nonce;
mod novelty;
pub mod outcome;
pub mod probe;
mod processors;
mod progress;
pub mod qemu;
pub mod qmp;
pub mod run;
pub mod shim;
pub mod viewers;
pub mod watch;

/// For the command line of a guest's kernel: without it, the kernel waits some milliseconds for a tick
/// of its clock and panics if none comes, as happens to an emulated one on a busy host.
pub const NO_TIMER_CHECK: &str = "no_timer_check";
