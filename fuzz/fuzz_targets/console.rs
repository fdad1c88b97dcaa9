//! What a guest's console says, in pieces of any size: nothing of it that is shown has a control character,
//! and nothing that is kept grows without end.
#![no_main]

use hostler_runner::vm::console::Console;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let mut console = Console::new(std::io::sink(), 1 << 20);
    for piece in bytes.chunks(usize::from(*first).max(1)) {
        let _ = console.push(piece).expect("a sink takes everything");
    }
    let _ = console.look();
    let shown = [console.last_line(), console.screen()].into_iter().chain(console.tail());
    for text in shown {
        assert!(!text.contains(|one: char| one.is_control() && one != '\n'), "{text:?}");
    }
});
