//! Tests that need a host to themselves, with systemd, udev and kernel modules: among the host's own
//! mounts, which are shared, and with names that are the whole host's. They only run in a virtual
//! machine of `make test-vm`, and fail everywhere else.
//!
//! A test of what the watchdog is to do and cannot do yet gets `#[ignore = "not yet: REASON"]`: the run
//! prints it as not yet, never as passed, and `make test-vm NOT_YET=yes` runs it all the same. There is
//! none now.

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
fn partitions_as_maps() {
    leak_and_want_it_gone(Shape::Kpartx);
}

#[test]
fn a_linear_map() {
    leak_and_want_it_gone(Shape::Linear);
}

#[test]
fn logical_volumes() {
    leak_and_want_it_gone(Shape::Lvm);
}

#[test]
fn an_encrypted_loop_device() {
    leak_and_want_it_gone(Shape::Luks);
}

#[test]
fn an_array_of_two_loop_devices() {
    leak_and_want_it_gone(Shape::Raid1);
}

#[test]
fn an_image_that_qemu_nbd_serves() {
    leak_and_want_it_gone(Shape::Nbd);
}

#[test]
fn a_logical_volume_on_an_encrypted_array() {
    leak_and_want_it_gone(Shape::Tower);
}
