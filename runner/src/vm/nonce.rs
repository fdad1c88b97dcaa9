//! The number used once that proves a guest's success.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// 128 random bits in hexadecimal.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn nonce() -> io::Result<String> {
    let mut bytes = [0_u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_alike() {
        let one = nonce().unwrap();
        assert_eq!(one.len(), 32);
        assert_ne!(one, nonce().unwrap());
    }
}
