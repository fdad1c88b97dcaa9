//! Programs of the host that are run to their end: qemu-img, gpgv, mke2fs, debugfs, e2fsck, apt-config.
//!
//! A [`Tool`] gets a cleared environment, no input, a process group of its own and a deadline. It is
//! killed and reaped when its time is up, when someone wants to stop, when its caller goes away, and
//! by the kernel when this process dies, however that dies: [`spawner`] is the one thread that starts
//! processes. Deliberately absent: shells, and what the tools are for.

mod find;
mod run;
pub(crate) mod spawner;
mod tool;

pub use find::find_program;
pub use tool::{Finished, HostTool, Tool, ToolError};
