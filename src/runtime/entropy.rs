//! Seeds for the generators that the pure layers are given, and bytes for keys and nonces.

use ring::rand::{SecureRandom, SystemRandom};

use super::machine;

/// The system gave no random bytes; nothing safe can be done without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system's random generator failed")]
pub struct EntropyError;

/// `N` bytes from the system's generator.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], EntropyError> {
    let mut bytes = [0; N];
    match machine::simulated() {
        None => SystemRandom::new().fill(&mut bytes).map_err(|_| EntropyError)?,
        Some(machine) => machine.fill_random(&mut bytes),
    }
    Ok(bytes)
}

/// A seed for one generator.
pub fn seed() -> Result<u64, EntropyError> {
    random_bytes().map(u64::from_le_bytes)
}
