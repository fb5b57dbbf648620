//! How many deliveries at once serve a handler best, found by watching how long they take.
//!
//! The limit grows as long as deliveries take no longer than they do with few of them open, and shrinks in
//! proportion once they do: the gradient of Netflix' concurrency-limits (after TCP Vegas, Brakmo and Peterson,
//! 1994). How long they take with few open is looked at again and again, by opening half as many for a
//! moment (BBR's ProbeRTT, Cardwell et al., 2016): a handler may have become slower, or faster.

use std::time::{Duration, Instant};

use crate::model::Bounds;

/// Finds the limit.
#[derive(Debug, Clone)]
pub struct Adaptive {
    limit: f64,
    window: Window,
    /// The mean of the quickest window since the last look, in seconds.
    quickest: Option<f64>,
    /// The windows until the next look.
    until_look: u32,
    /// The limit to go on with after the look that is going on.
    looking: Option<f64>,
}

/// What was seen since it began.
#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    count: u32,
    seconds: f64,
    /// The most that were open at once.
    open: u32,
    overloaded: bool,
}

/// A delivery that has ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// How long it took.
    pub took: Duration,
    /// How many were open when it ended, this one too.
    pub open: u32,
    /// Whether the handler said that it had too much to do, or did not answer in time.
    pub overloaded: bool,
}

impl Adaptive {
    /// Begins with this limit.
    pub fn new(limit: u32, bounds: Bounds, now: Instant) -> Self {
        let limit = f64::from(limit.clamp(bounds.min, bounds.max));
        Self {
            limit,
            window: Window::new(now),
            quickest: None,
            until_look: LOOK_EVERY,
            looking: None,
        }
    }

    /// How many may be open now.
    pub fn limit(&self, bounds: Bounds) -> u32 {
        // Rounded, and within bounds that may have been moved.
        (self.limit.round() as u32).clamp(bounds.min, bounds.max)
    }

    /// Takes note of a delivery; the limit may be another one afterwards.
    pub fn note(&mut self, sample: Sample, bounds: Bounds, now: Instant) {
        let window = &mut self.window;
        window.count += 1;
        window.seconds += sample.took.as_secs_f64();
        window.open = window.open.max(sample.open);
        window.overloaded |= sample.overloaded;
        let took = now.saturating_duration_since(window.began);
        if window.count >= SAMPLES_MIN && took >= WINDOW_MIN {
            let window = std::mem::replace(&mut self.window, Window::new(now));
            self.move_limit(window, bounds);
        }
    }

    fn move_limit(&mut self, window: Window, bounds: Bounds) {
        let mean = window.seconds / f64::from(window.count);
        if let Some(limit) = self.looking.take() {
            // What was opened before the look has ended by now only in part; it counts as the best there is.
            self.quickest = Some(mean);
            self.until_look = LOOK_EVERY;
            self.limit = limit;
            return;
        }
        let quickest = self.quickest.map_or(mean, |quickest| quickest.min(mean));
        self.quickest = Some(quickest);
        let gradient = (TOLERANCE * quickest / mean.max(f64::EPSILON)).clamp(0.5, 1.0);
        let wanted = self.limit * gradient + self.limit.sqrt();
        if window.overloaded {
            self.limit *= BACK_OFF;
        } else if wanted < self.limit || f64::from(window.open) * 2.0 >= self.limit {
            // Grown only where it is used, or an idle queue would say that everything is well.
            self.limit += (wanted - self.limit) * SMOOTHING;
        }
        self.limit = self.limit.clamp(f64::from(bounds.min), f64::from(bounds.max));
        self.until_look = self.until_look.saturating_sub(1);
        if self.until_look == 0 {
            self.looking = Some(self.limit);
            self.limit = (self.limit / 2.0).max(f64::from(bounds.min));
        }
    }
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { began: now, count: 0, seconds: 0.0, open: 0, overloaded: false }
    }
}

/// How many deliveries a window has at least.
const SAMPLES_MIN: u32 = 10;
/// How long a window is at least.
const WINDOW_MIN: Duration = Duration::from_millis(100);
/// How much longer than with few open deliveries may take before there are too many.
const TOLERANCE: f64 = 1.1;
/// How much of the way to the limit that is wanted is gone in a window.
const SMOOTHING: f64 = 0.5;
/// What is left of the limit after a window in which the handler was overloaded.
const BACK_OFF: f64 = 0.8;
/// How many windows there are from one look with few open to the next.
const LOOK_EVERY: u32 = 40;

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { min: 1, max: 200 };

    /// A handler that serves so many at once in `alone` each; with more of them, each takes longer.
    #[derive(Clone, Copy)]
    struct Receiver {
        knee: u32,
        alone: Duration,
    }

    impl Receiver {
        fn takes(self, open: u32, noise: f64) -> Duration {
            let crowd = (f64::from(open) / f64::from(self.knee)).max(1.0);
            self.alone.mul_f64(crowd * (0.9 + 0.2 * noise))
        }
    }

    /// Keeps as many open as may be for so long; gives how many were handled, and the limits that were in force
    /// in the last third of that time.
    fn serve(
        adaptive: &mut Adaptive,
        now: &mut Instant,
        receiver: Receiver,
        time: Duration,
    ) -> (f64, Vec<u32>) {
        let (mut chance, mut handled, mut limits) = (7u64, 0.0, Vec::new());
        let (start, end) = (*now, *now + time);
        while *now < end {
            let open = adaptive.limit(BOUNDS);
            chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let took = receiver.takes(open, (chance >> 40) as f64 / f64::from(1 << 24));
            // One of `open` ends: the next one does after a part of its time.
            *now += took / open;
            handled += 1.0;
            adaptive.note(Sample { took, open, overloaded: false }, BOUNDS, *now);
            if now.duration_since(start) > time * 2 / 3 {
                limits.push(adaptive.limit(BOUNDS));
            }
        }
        (handled / time.as_secs_f64(), limits)
    }

    fn median(mut all: Vec<u32>) -> u32 {
        all.sort_unstable();
        all[all.len() / 2]
    }

    #[test]
    fn it_finds_the_knee_follows_it_and_comes_back() {
        let mut now = Instant::now();
        let mut adaptive = Adaptive::new(1, BOUNDS, now);
        let alone = Duration::from_millis(20);
        let minute = Duration::from_secs(60);
        for knee in [32, 8, 64, 32] {
            let receiver = Receiver { knee, alone };
            let (handled, limits) = serve(&mut adaptive, &mut now, receiver, minute);
            let best = f64::from(knee) / alone.as_secs_f64();
            let found = median(limits);
            println!("knee {knee}: limit {found}, {:.0} % of the best", handled / best * 100.0);
            assert!((knee..=knee * 3 / 2 + 4).contains(&found), "knee {knee}: {found}");
            assert!(handled >= 0.9 * best, "knee {knee}: {handled} of {best}");
        }
    }

    #[test]
    fn it_does_not_take_a_slower_handler_for_a_crowded_one() {
        let mut now = Instant::now();
        let mut adaptive = Adaptive::new(1, BOUNDS, now);
        for alone in [20, 100, 20].map(Duration::from_millis) {
            let receiver = Receiver { knee: 32, alone };
            serve(&mut adaptive, &mut now, receiver, Duration::from_secs(120));
            let (_, limits) = serve(&mut adaptive, &mut now, receiver, Duration::from_secs(60));
            let found = median(limits);
            assert!((32..=52).contains(&found), "{alone:?}: {found}");
        }
    }

    #[test]
    fn overload_narrows_it_and_nothing_to_do_does_not_widen_it() {
        let mut now = Instant::now();
        let mut adaptive = Adaptive::new(50, BOUNDS, now);
        let mut note = |adaptive: &mut Adaptive, open, overloaded| {
            for _ in 0..100 {
                now += Duration::from_millis(20);
                let took = Duration::from_millis(20);
                adaptive.note(Sample { took, open, overloaded }, BOUNDS, now);
            }
        };
        note(&mut adaptive, 1, false);
        assert_eq!(adaptive.limit(BOUNDS), 50, "with one open nobody knows what fifty would do");
        note(&mut adaptive, 50, true);
        assert!(adaptive.limit(BOUNDS) < 15, "{}", adaptive.limit(BOUNDS));
        let narrow = Bounds { min: 3, max: 5 };
        assert_eq!(adaptive.limit(narrow), 5, "bounds hold at once");
    }
}
