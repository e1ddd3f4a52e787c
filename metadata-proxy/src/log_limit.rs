//! Lines of the log that somebody else can cause at will.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// So many at once, and after that one in this time.
const BURST: u32 = 20;
const EACH: Duration = Duration::from_secs(1);

/// Lets some lines through and counts the others.
#[derive(Default)]
pub(crate) struct LogLimit(Mutex<State>);

#[derive(Default)]
struct State {
    /// When all lines that were let through will have had their time.
    due: Option<Instant>,
    unsaid: u64,
}

/// One line may be written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// So many of its kind were not, since the last that was.
    pub(crate) unsaid: Option<u64>,
}

impl LogLimit {
    pub(crate) fn line(&self) -> Option<Line> {
        self.line_at(Instant::now())
    }

    fn line_at(&self, now: Instant) -> Option<Line> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = state.due.map_or(now, |due| due.max(now)) + EACH;
        if due > now + EACH * BURST {
            state.unsaid += 1;
            return None;
        }
        state.due = Some(due);
        let unsaid = std::mem::take(&mut state.unsaid);
        Some(Line { unsaid: (unsaid > 0).then_some(unsaid) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_a_second_that_says_how_many() {
        let limit = LogLimit::default();
        let start = Instant::now();
        let said = (0..1000).filter(|_| limit.line_at(start).is_some()).count();
        assert_eq!(said, 20);
        assert_eq!(limit.line_at(start + EACH), Some(Line { unsaid: Some(980) }));
        assert_eq!(limit.line_at(start + EACH), None);
        let later = start + EACH * 60;
        assert_eq!(limit.line_at(later), Some(Line { unsaid: Some(1) }));
        assert_eq!(limit.line_at(later), Some(Line { unsaid: None }));
    }
}
