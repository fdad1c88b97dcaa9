//! What holds qemu, tried from where it is.

use hostler_runner::vm::probe::examine;

use super::*;

#[test]
fn all_that_is_said_to_hold_qemu_does() {
    let folder = tempfile::tempdir().unwrap();
    let held = examine(&programs(), 256, folder.path()).unwrap().held;
    for held in &held {
        println!("{}: {}", held.what, held.how);
        assert!(held.holds, "{held:?}");
    }
    assert_eq!(held.len(), 5);
    assert!(!folder.path().join("probe.beside").exists());
}
