//! Sizes as people write them: `1MiB`, `512KiB`, or a number of bytes.

/// The largest size that can be asked for; a larger message would not fit into memory many times over.
const SIZE_MAX: usize = 256 << 20;

/// Reads a size from 1 byte to 256 MiB; fails with what would be right.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let rule = "a size is a number of bytes, or of KiB or MiB, as in 512KiB; from 1 byte to 256MiB";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        _ => None,
    };
    factor
        .and_then(|factor| number.parse::<usize>().ok()?.checked_mul(factor))
        .filter(|size| (1..=SIZE_MAX).contains(size))
        .ok_or_else(|| rule.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        for (text, size) in [("1", 1), ("1000", 1000), ("512KiB", 524_288), ("1 MiB", 1_048_576)] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for bad in ["", "0", "MiB", "1MB", "1.5MiB", "-1", "257MiB", "99999999999999999999", "1GiB"]
        {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
