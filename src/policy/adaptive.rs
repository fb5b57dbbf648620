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
    served: u32,
    seconds: f64,
    /// The most that were open at once.
    open: u32,
    refused: bool,
}

/// A delivery that has ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When it began.
    pub began: Instant,
    /// How many were open when it ended, this one too.
    pub open: u32,
    /// What it says of the handler's load.
    pub load: Load,
}

/// What a delivery says of its handler's load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// It was served, and took so long.
    Served(Duration),
    /// The handler said that it has too much to do, or did not answer in time.
    Refused,
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
        match sample.load {
            // It began with more open than the look wants to see.
            Load::Served(_) if self.looking.is_some() && sample.began < window.began => return,
            Load::Served(took) => {
                window.served += 1;
                window.seconds += took.as_secs_f64();
            }
            Load::Refused => window.refused = true,
        }
        window.open = window.open.max(sample.open);
        let lasted = now.saturating_duration_since(window.began).as_secs_f64();
        // As long as a delivery at least, so that what it does is seen before the next step.
        let long = lasted >= WINDOW_MIN.as_secs_f64().max(self.quickest.unwrap_or(0.0));
        if long && (window.refused || window.served >= SERVED_MIN) {
            let window = std::mem::replace(&mut self.window, Window::new(now));
            self.move_limit(window, bounds, now);
        }
    }

    fn move_limit(&mut self, window: Window, bounds: Bounds, now: Instant) {
        let looked = self.looking.take();
        self.limit = looked.unwrap_or(self.limit);
        if looked.is_some() {
            self.until_look = LOOK_EVERY;
        }
        if window.refused {
            self.limit *= BACK_OFF;
        } else {
            let mean = window.seconds / f64::from(window.served);
            if looked.is_some() {
                self.quickest = Some(mean);
            } else {
                let quickest = self.quickest.map_or(mean, |quickest| quickest.min(mean));
                self.quickest = Some(quickest);
                self.approach(mean, quickest, window.open);
            }
        }
        self.limit = self.limit.clamp(f64::from(bounds.min), f64::from(bounds.max));
        self.until_look = self.until_look.saturating_sub(1);
        if self.until_look == 0 {
            self.looking = Some(self.limit);
            self.limit = (self.limit / 2.0).max(f64::from(bounds.min));
            self.window = Window::new(now);
        }
    }

    /// Goes a part of the way to the limit at which deliveries take little longer than the quickest.
    fn approach(&mut self, mean: f64, quickest: f64, open: u32) {
        let gradient = (TOLERANCE * quickest / mean.max(f64::EPSILON)).clamp(0.5, 1.0);
        let wanted = self.limit * gradient + self.limit.sqrt();
        // Grown only where it is used, or an idle queue would say that everything is well.
        if wanted < self.limit || f64::from(open) * 2.0 >= self.limit {
            self.limit += (wanted - self.limit) * SMOOTHING;
        }
    }
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { began: now, served: 0, seconds: 0.0, open: 0, refused: false }
    }
}

/// How many deliveries that were served a window has at least.
const SERVED_MIN: u32 = 10;
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
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use super::*;

    const BOUNDS: Bounds = Bounds { min: 1, max: 200 };

    /// A handler that serves so many at once in `alone` each, and lets the others wait in line.
    struct Receiver {
        /// When each of its places is free again.
        places: BinaryHeap<Reverse<Instant>>,
        alone: Duration,
        chance: u64,
    }

    impl Receiver {
        fn new(knee: u32, alone: Duration, now: Instant) -> Self {
            let places = (0..knee).map(|_| Reverse(now)).collect();
            Self { places, alone, chance: 7 }
        }

        /// When a delivery that comes now ends; up to a tenth of its time is chance.
        fn serve(&mut self, now: Instant) -> Instant {
            let Reverse(free) = self.places.pop().unwrap();
            self.chance = self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let noise = (self.chance >> 40) as f64 / f64::from(1 << 24);
            let ends = free.max(now) + self.alone.mul_f64(0.9 + 0.2 * noise);
            self.places.push(Reverse(ends));
            ends
        }
    }

    /// Keeps as many open as may be for so long; gives how many were handled in a second, and the limits that were
    /// in force in the last third of that time.
    fn serve(
        adaptive: &mut Adaptive,
        now: &mut Instant,
        mut receiver: Receiver,
        time: Duration,
    ) -> (f64, Vec<u32>) {
        let (mut open, mut handled, mut limits) = (BinaryHeap::new(), 0.0, Vec::new());
        let (start, end) = (*now, *now + time);
        while *now < end {
            while open.len() < adaptive.limit(BOUNDS) as usize {
                open.push(Reverse((receiver.serve(*now), *now)));
            }
            let at_once = open.len() as u32;
            let Reverse((ended, began)) = open.pop().unwrap();
            *now = ended;
            handled += 1.0;
            let load = Load::Served(ended - began);
            adaptive.note(Sample { began, open: at_once, load }, BOUNDS, *now);
            if now.duration_since(start) > time * 2 / 3 {
                limits.push(adaptive.limit(BOUNDS));
            }
        }
        (handled / time.as_secs_f64(), limits)
    }

    fn median(all: &[u32]) -> u32 {
        let mut all = all.to_vec();
        all.sort_unstable();
        all[all.len() / 2]
    }

    #[test]
    #[expect(clippy::disallowed_macros, reason = "what was found is for the person who runs it")]
    fn it_finds_the_knee_follows_it_and_comes_back() {
        for alone in [20, 500].map(Duration::from_millis) {
            let mut now = Instant::now();
            let mut adaptive = Adaptive::new(1, BOUNDS, now);
            for knee in [32, 8, 64, 32] {
                let receiver = Receiver::new(knee, alone, now);
                // Long enough for many looks: each must see what few open take, and not what was open before.
                let (handled, limits) = serve(&mut adaptive, &mut now, receiver, alone * 15_000);
                let best = f64::from(knee) / alone.as_secs_f64();
                let (found, most) = (median(&limits), limits.iter().max().unwrap());
                let share = handled / best * 100.0;
                println!(
                    "{alone:?}, knee {knee}: limit {found}, at most {most}, {share:.0} % of the best"
                );
                assert!((knee..=knee * 3 / 2 + 6).contains(&found), "knee {knee}: {found}");
                assert!(*most <= knee * 2 + 8, "knee {knee}: at most {most}");
                assert!(handled >= 0.9 * best, "knee {knee}: {handled} of {best}");
            }
        }
    }

    #[test]
    fn it_does_not_take_a_slower_handler_for_a_crowded_one() {
        let mut now = Instant::now();
        let mut adaptive = Adaptive::new(1, BOUNDS, now);
        for alone in [20, 100, 20].map(Duration::from_millis) {
            let time = Duration::from_secs(180);
            let receiver = Receiver::new(32, alone, now);
            let (_, limits) = serve(&mut adaptive, &mut now, receiver, time);
            let found = median(&limits);
            assert!((32..=54).contains(&found), "{alone:?}: {found}");
        }
    }

    #[test]
    fn overload_narrows_it_and_nothing_to_do_does_not_widen_it() {
        let mut now = Instant::now();
        let mut adaptive = Adaptive::new(50, BOUNDS, now);
        let note = |adaptive: &mut Adaptive, now: &mut Instant, open, load| {
            for _ in 0..100 {
                let began = *now;
                *now += Duration::from_millis(20);
                adaptive.note(Sample { began, open, load }, BOUNDS, *now);
            }
        };
        note(&mut adaptive, &mut now, 1, Load::Served(Duration::from_millis(20)));
        assert_eq!(adaptive.limit(BOUNDS), 50, "with one open nobody knows what fifty would do");
        note(&mut adaptive, &mut now, 50, Load::Refused);
        assert!(adaptive.limit(BOUNDS) < 15, "{}", adaptive.limit(BOUNDS));
        let narrow = Bounds { min: 3, max: 5 };
        assert_eq!(adaptive.limit(narrow), 3, "bounds hold at once");
    }

    #[test]
    fn what_is_refused_while_it_looks_ends_the_look() {
        let mut now = Instant::now();
        let mut adaptive = Adaptive { until_look: 1, ..Adaptive::new(40, BOUNDS, now) };
        let mut note = |adaptive: &mut Adaptive, load| {
            let began = now;
            now += Duration::from_millis(20);
            adaptive.note(Sample { began, open: 40, load }, BOUNDS, now);
        };
        while adaptive.looking.is_none() {
            note(&mut adaptive, Load::Served(Duration::from_millis(20)));
        }
        let before = adaptive.looking.unwrap();
        while adaptive.looking.is_some() {
            note(&mut adaptive, Load::Refused);
        }
        assert_eq!(adaptive.limit(BOUNDS), (before * BACK_OFF).round() as u32);
        assert_eq!(adaptive.until_look, LOOK_EVERY - 1, "not at once again");
    }
}
