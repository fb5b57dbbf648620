//! Numbers that look random and come again for the same seed.
//!
//! Not for secrets: SplitMix64 (Steele, Lea and Flood, *Fast splittable pseudorandom number
//! generators*, 2014), which is ten lines and needs no crate.

use std::time::Duration;

/// A source of chance with a seed that is shown where a test fails.
pub(crate) struct Chance(u64);

impl Chance {
    /// From `PUMPHOUSE_TEST_SEED`, or else a new seed; says which one it is.
    pub(crate) fn new() -> Self {
        let given = std::env::var("PUMPHOUSE_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| getrandom::u64().expect("there are random numbers"));
        say(&format!("PUMPHOUSE_TEST_SEED={seed}"));
        Self(seed)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from 0 up to, but never, `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A span from nothing up to `end`.
    pub(crate) fn span(&mut self, end: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(end.as_micros()).unwrap_or(u64::MAX)))
    }
}

/// Spreads the bits of a number over the whole of it.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Writes a line that the test runner shows if the test fails.
#[expect(clippy::disallowed_macros, reason = "the test runner keeps it until a test fails")]
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}
