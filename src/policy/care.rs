//! How many messages that have met crashes may be open beside each other.
//!
//! A message that kills its process takes with it whatever is open beside it, and all of it comes back
//! together: it would die together as well. So the company gets smaller with each crash, as in Dorfman's group
//! tests (*The Detection of Defective Members of Large Populations*, 1943), until the one that kills is alone.

/// With how many others that have met crashes a message may be open at most, itself among them; `None` for
/// any number: it has met none, or one, which is bad luck.
///
/// It is alone at the fourth crash, and for the last attempt that it has before it is given up.
pub fn company(crashes: u32, crashes_max: u32) -> Option<usize> {
    match crashes {
        0 => None,
        _ if crashes.saturating_add(1) >= crashes_max => Some(1),
        1 => None,
        2 => Some(16),
        3 => Some(4),
        4.. => Some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_company_gets_smaller_with_each_crash() {
        let company = |crashes| company(crashes, 20);
        assert_eq!(
            [0, 1, 2, 3, 4, 19].map(company),
            [None, None, Some(16), Some(4), Some(1), Some(1)]
        );
        assert_eq!(company(u32::MAX), Some(1));
    }

    #[test]
    fn the_last_attempt_is_made_alone() {
        assert_eq!([0, 1, 2].map(|crashes| company(crashes, 3)), [None, None, Some(1)]);
        assert_eq!([0, 1].map(|crashes| company(crashes, 2)), [None, Some(1)]);
        assert_eq!(company(0, 1), None, "nobody knows anything of it yet");
    }
}
