//! Bytes that can be made again and told apart.

use ring::digest::{Context, SHA256};

/// A reproducible stream of bytes that no compression or repetition can hide a fault in.
pub struct Noise {
    state: u64,
    left: u64,
}

impl Noise {
    /// `len` bytes of stream number `seed`.
    pub fn new(seed: u64, len: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, left: len }
    }

    /// Fills the front of `buffer`, and says how much; 0 at the end.
    pub fn fill(&mut self, buffer: &mut [u8]) -> usize {
        let len = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        for chunk in buffer[..len].chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            chunk.copy_from_slice(&self.state.to_le_bytes()[..chunk.len()]);
        }
        self.left -= len as u64;
        len
    }
}

/// SHA-256 of all that [`Noise`] with these arguments makes, in chunks of any size that is a
/// multiple of eight.
pub fn digest(seed: u64, len: u64) -> Vec<u8> {
    let (mut noise, mut context) = (Noise::new(seed, len), Context::new(&SHA256));
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let filled = noise.fill(&mut buffer);
        if filled == 0 {
            return context.finish().as_ref().to_vec();
        }
        context.update(&buffer[..filled]);
    }
}
