//! When a schedule is due: the times of cron expressions and of intervals, and what becomes of missed ones.
//!
//! What cron does where clocks are put forward or back follows Vixie cron, in the words of the Open Cron Pattern
//! Specification: an expression of fixed times (one second, one minute, one hour) whose time is skipped is due at the first
//! moment after the gap, and one whose time comes twice is due the first time only; any other is due at each time
//! that the clocks show, so not in the gap, and in both of the hours that look alike.

use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use crate::model::{Invalid, MISSED_MAX, Missed, Timetable};

/// The shortest time between two firings of an interval.
const EVERY_MIN: Duration = Duration::from_secs(1);
/// The longest: a year.
const EVERY_MAX: Duration = Duration::from_secs(366 * 86_400);
/// How late a time may be found to be due and still count as met.
const LATE: Duration = Duration::from_secs(60);
/// How many fields and characters an expression has at most.
const EXPRESSION_MAX: usize = 255;

/// A timetable that can be read.
#[derive(Debug, Clone)]
pub enum Times {
    /// The times of an expression in a time zone.
    Cron(Box<Cron>, TimeZone),
    /// Always after as long.
    Every(Duration, Timestamp),
}

/// What is to be done about the times that have come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// The times for which something is to be sent, in order.
    pub fire: Vec<Timestamp>,
    /// How many times were missed for which nothing is sent; of very many, at least so many.
    pub skipped: u32,
    /// When it is due next.
    pub next_at: Option<Timestamp>,
}

impl Times {
    /// Reads a timetable; says what is wrong with it.
    pub fn read(timetable: &Timetable) -> Result<Self, Invalid> {
        match timetable {
            Timetable::Cron { expression, time_zone } => {
                let zone = TimeZone::get(time_zone).map_err(|_| {
                    let detail = "a time zone is a name of the IANA database, like Europe/Berlin";
                    Invalid::new("/time_zone", detail)
                })?;
                let wrong = |why: String| Invalid::new("/cron", why);
                if expression.len() > EXPRESSION_MAX {
                    return Err(wrong("at most 255 characters".to_owned()));
                }
                let parser =
                    CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
                let cron = parser.parse(expression).map_err(|error| {
                    wrong(format!(
                        "this is no cron expression of minute, hour, day, month and weekday: {error}"
                    ))
                })?;
                Ok(Self::Cron(Box::new(cron), zone))
            }
            Timetable::Every { every, from } => {
                if !(EVERY_MIN..=EVERY_MAX).contains(every) {
                    return Err(Invalid::new("/every", "from 1s to 366d"));
                }
                Ok(Self::Every(*every, *from))
            }
        }
    }

    /// The first time after this moment; `None` where there is none before the year 5000.
    pub fn after(&self, moment: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Cron(cron, zone) => {
                let start = Zoned::new(moment, zone.clone());
                let next = cron.find_next_occurrence(&start, false).ok()?.timestamp();
                // An expression has whole seconds, and so has what is after it.
                (next > moment).then_some(next)
            }
            Self::Every(every, from) => {
                let nth = steps(*every, *from, moment) + 1;
                nth_after(*every, *from, nth.max(1))
            }
        }
    }

    /// The last time up to this moment.
    fn upto(&self, moment: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Cron(cron, zone) => {
                let start = Zoned::new(moment, zone.clone());
                let last = cron.find_previous_occurrence(&start, true).ok()?.timestamp();
                (last <= moment).then_some(last)
            }
            Self::Every(every, from) => {
                let nth = steps(*every, *from, moment);
                if nth < 1 { None } else { nth_after(*every, *from, nth) }
            }
        }
    }

    /// What is to be done at `now`, where something was due at `next_at`.
    pub fn due(&self, next_at: Timestamp, missed: Missed, now: Timestamp) -> Due {
        let next_after = |moment| self.after(moment);
        if next_at > now {
            return Due { fire: Vec::new(), skipped: 0, next_at: Some(next_at) };
        }
        let mut come = Vec::new();
        let mut last = self.upto(now);
        // From the latest on, so that what lies a year back costs no more than what lies a day back.
        while let Some(time) =
            last.filter(|time| *time > next_at && come.len() < MISSED_MAX as usize)
        {
            come.push(time);
            last = time.checked_sub(Duration::from_micros(1)).ok().and_then(|it| self.upto(it));
        }
        if come.len() < MISSED_MAX as usize {
            come.push(next_at);
        }
        come.reverse();
        let wanted = match missed {
            Missed::Skip => {
                let latest = come.last().copied().unwrap_or(next_at);
                let is_late = now.duration_since(latest) > LATE.try_into().unwrap_or_default();
                usize::from(!is_late)
            }
            Missed::Once => 1,
            Missed::All { max } => max.clamp(1, MISSED_MAX) as usize,
        };
        let skipped = come.len().saturating_sub(wanted);
        Due {
            fire: come.split_off(skipped),
            skipped: u32::try_from(skipped).unwrap_or(u32::MAX),
            next_at: next_after(now),
        }
    }
}

/// How many whole intervals lie between two moments; negative where the second is the earlier one.
fn steps(every: Duration, from: Timestamp, moment: Timestamp) -> i128 {
    let apart = i128::from(moment.as_microsecond()) - i128::from(from.as_microsecond());
    apart.div_euclid(i128::try_from(every.as_micros()).unwrap_or(i128::MAX).max(1))
}

fn nth_after(every: Duration, from: Timestamp, nth: i128) -> Option<Timestamp> {
    let every = i128::try_from(every.as_micros()).ok()?;
    let micros = i128::from(from.as_microsecond()).checked_add(every.checked_mul(nth)?)?;
    Timestamp::from_microsecond(i64::try_from(micros).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cron(expression: &str, time_zone: &str) -> Times {
        let (expression, time_zone) = (expression.to_owned(), time_zone.to_owned());
        Times::read(&Timetable::Cron { expression, time_zone }).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// The times after `from` and up to `to`.
    fn between(times: &Times, from: &str, to: &str) -> Vec<String> {
        let (mut last, to) = (at(from), at(to));
        let mut all = Vec::new();
        while let Some(next) = times.after(last).filter(|next| *next <= to) {
            assert!(next > last);
            all.push(next.to_string());
            last = next;
        }
        all
    }

    #[test]
    fn a_time_that_is_skipped_comes_after_the_gap_and_one_that_comes_twice_counts_once() {
        // Berlin: from 2:00 to 3:00 at 01:00Z on 29 March 2026; back from 3:00 to 2:00 at 01:00Z on 25 October.
        let nightly = cron("30 2 * * *", "Europe/Berlin");
        let spring = between(&nightly, "2026-03-28T00:00:00Z", "2026-03-30T23:00:00Z");
        assert_eq!(
            spring,
            ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]
        );
        let autumn = between(&nightly, "2026-10-24T00:00:00Z", "2026-10-26T23:00:00Z");
        assert_eq!(
            autumn,
            ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
        );
        // New York: from 2:00 to 3:00 at 07:00Z on 8 March 2026; back from 2:00 to 1:00 at 06:00Z on 1 November.
        let nightly = cron("30 2 * * *", "America/New_York");
        let spring = between(&nightly, "2026-03-07T12:00:00Z", "2026-03-09T12:00:00Z");
        assert_eq!(spring, ["2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"]);
        let nightly = cron("30 1 * * *", "America/New_York");
        let autumn = between(&nightly, "2026-10-31T12:00:00Z", "2026-11-02T12:00:00Z");
        assert_eq!(autumn, ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]);
    }

    #[test]
    fn what_is_due_every_so_often_is_due_in_both_hours_that_look_alike() {
        for (zone, gap, twice) in [
            ("Europe/Berlin", "2026-03-29T00:00:00Z", "2026-10-25T00:00:00Z"),
            ("America/New_York", "2026-03-08T06:00:00Z", "2026-11-01T05:00:00Z"),
        ] {
            let often = cron("*/30 * * * *", zone);
            for from in [gap, twice] {
                let to = at(from).checked_add(Duration::from_secs(3 * 3600)).unwrap().to_string();
                let times = between(&often, from, &to);
                assert_eq!(times.len(), 6, "half an hour is half an hour in {zone}: {times:?}");
            }
        }
    }

    #[test]
    fn an_interval_goes_by_no_clock_on_a_wall() {
        let from = at("2026-03-29T00:10:00Z");
        let times = Times::read(&Timetable::Every { every: Duration::from_secs(600), from });
        let times = times.unwrap();
        assert_eq!(times.after(from), Some(at("2026-03-29T00:20:00Z")));
        assert_eq!(times.after(at("2026-03-29T00:00:00Z")), Some(at("2026-03-29T00:20:00Z")));
        assert_eq!(times.after(at("2027-03-29T00:19:59.9Z")), Some(at("2027-03-29T00:20:00Z")));
        assert_eq!(times.upto(from), None);
        assert_eq!(times.upto(at("2026-03-29T00:39:59Z")), Some(at("2026-03-29T00:30:00Z")));
    }

    #[test]
    fn missed_times_are_made_up_for_as_the_policy_says() {
        let times = cron("*/10 * * * *", "UTC");
        let (next_at, now) = (at("2026-01-01T00:00:00Z"), at("2026-01-01T01:05:00Z"));
        let due = |missed, now| times.due(next_at, missed, now);
        let last = at("2026-01-01T01:00:00Z");
        let then = Some(at("2026-01-01T01:10:00Z"));
        let once = Due { fire: vec![last], skipped: 6, next_at: then };
        assert_eq!(due(Missed::Once, now), once);
        assert_eq!(due(Missed::Skip, now), Due { fire: vec![], skipped: 7, next_at: then });
        let barely = at("2026-01-01T01:00:59Z");
        assert_eq!(due(Missed::Skip, barely), once, "it is not late, those before it are");
        let all = due(Missed::All { max: 100 }, now);
        assert_eq!((all.fire.len(), all.fire[0], all.skipped), (7, next_at, 0));
        let some = due(Missed::All { max: 2 }, now);
        assert_eq!((some.fire, some.skipped), (vec![at("2026-01-01T00:50:00Z"), last], 5));
        let early = at("2025-12-31T23:59:59Z");
        assert_eq!(
            due(Missed::Once, early),
            Due { fire: vec![], skipped: 0, next_at: Some(next_at) }
        );
        for missed in [Missed::Once, Missed::Skip, Missed::All { max: 1 }] {
            let fire = vec![next_at];
            let in_time = Due { fire, skipped: 0, next_at: Some(at("2026-01-01T00:10:00Z")) };
            assert_eq!(due(missed, next_at), in_time);
        }
    }

    #[test]
    fn years_of_missed_times_cost_no_more_than_a_thousand() {
        let times = cron("* * * * * *", "UTC");
        let now = at("2026-01-01T00:00:00Z");
        let due = times.due(at("2020-01-01T00:00:00Z"), Missed::All { max: 3 }, now);
        assert_eq!((due.fire.len(), due.fire[2], due.skipped), (3, now, 997));
    }

    #[test]
    fn what_is_no_timetable_says_why() {
        for (expression, time_zone, pointer) in [
            ("x", "UTC", "/cron"),
            ("* * * *", "UTC", "/cron"),
            ("61 * * * *", "UTC", "/cron"),
            ("* * * * *", "Mars/Olympus", "/time_zone"),
        ] {
            let (expression, time_zone) = (expression.to_owned(), time_zone.to_owned());
            let wrong = Times::read(&Timetable::Cron { expression, time_zone }).unwrap_err();
            assert_eq!(wrong.pointer, pointer);
        }
        let every = Timetable::Every { every: Duration::ZERO, from: Timestamp::UNIX_EPOCH };
        assert_eq!(Times::read(&every).unwrap_err().pointer, "/every");
        assert_eq!(cron("0 0 30 2 *", "UTC").after(Timestamp::UNIX_EPOCH), None, "no such day");
    }
}
