//! Tests that need a host to themselves, with udev and kernel modules. They only run in a virtual machine
//! of `make test-vm`, and fail everywhere else.

#[path = "guest/kernel_maps.rs"]
mod kernel_maps;
#[path = "guest/kernel_nbd.rs"]
mod kernel_nbd;
#[path = "privileged/worker.rs"]
mod worker;
