//! Tests that need a host to themselves, with systemd, udev and kernel modules: among the host's own
//! mounts, which are shared, and with names that are the whole host's. They only run in a virtual
//! machine of `make test-vm`, and fail everywhere else.
//!
//! # What the watchdog cannot do yet
//!
//! The tests with `ignore` say what it is to do. The run prints them as not yet, never as passed. Take
//! the attribute away to have one run; `make test-vm NOT_YET=yes` runs them all as they are.

#[path = "guest/host.rs"]
mod host;
#[path = "guest/kernel_maps.rs"]
mod kernel_maps;
#[path = "guest/kernel_nbd.rs"]
mod kernel_nbd;
#[path = "guest/leak.rs"]
mod leak;
#[path = "guest/numbers.rs"]
mod numbers;
#[path = "privileged/worker.rs"]
mod worker;

use hostler_tests::stack::Shape;
use leak::leak_and_want_it_gone;

#[test]
fn a_loop_device_with_the_hosts_own_mounts_bound_below() {
    leak_and_want_it_gone(Shape::Plain);
}

/// What stays is the copies in the namespaces of services, of udev's for one, and they hold the device.
#[test]
#[ignore = "not yet: what is parted from its peers stays mounted in namespaces that follow the host's"]
fn a_loop_device_with_the_hosts_own_mounts_bound_below_recursively() {
    leak_and_want_it_gone(Shape::Recursive);
}

#[test]
fn partitions_of_a_loop_device() {
    leak_and_want_it_gone(Shape::Partitions);
}

#[test]
fn xfs() {
    leak_and_want_it_gone(Shape::Xfs);
}

#[test]
fn btrfs_whose_mount_has_a_device_number_of_its_own() {
    leak_and_want_it_gone(Shape::Btrfs);
}

#[test]
fn an_overlay_over_squashfs() {
    leak_and_want_it_gone(Shape::Overlay);
}

#[test]
#[ignore = "not yet: the watchdog knows no maps"]
fn partitions_as_maps() {
    leak_and_want_it_gone(Shape::Kpartx);
}

#[test]
#[ignore = "not yet: the watchdog knows no maps"]
fn a_linear_map() {
    leak_and_want_it_gone(Shape::Linear);
}

#[test]
#[ignore = "not yet: the watchdog knows no maps"]
fn logical_volumes() {
    leak_and_want_it_gone(Shape::Lvm);
}

#[test]
#[ignore = "not yet: the watchdog knows no maps"]
fn an_encrypted_loop_device() {
    leak_and_want_it_gone(Shape::Luks);
}

#[test]
#[ignore = "not yet: the watchdog knows no arrays"]
fn an_array_of_two_loop_devices() {
    leak_and_want_it_gone(Shape::Raid1);
}

#[test]
#[ignore = "not yet: the watchdog knows no nbd devices"]
fn an_image_that_qemu_nbd_serves() {
    leak_and_want_it_gone(Shape::Nbd);
}

#[test]
#[ignore = "not yet: the watchdog knows no maps and no arrays"]
fn a_logical_volume_on_an_encrypted_array() {
    leak_and_want_it_gone(Shape::Tower);
}
