//! The kinds of lanes, and all that differs between them. An endpoint names its kind, and lanes are made
//! for the kinds that are named.

/// What kind of work a request is. Each kind has lanes of its own, so that one kind that is slow delays
/// no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneKind {
    /// Everything that takes microseconds; and revoking, which must not wait behind the redemptions
    /// that it is to overtake.
    Plain,
    /// What signs a certificate and waits for the disk.
    Certificate,
    /// What has a reply of hundreds of KiB. Other requests in the same lane would wait until all of
    /// it is made.
    Bulk,
}

/// What the lanes of one kind are like.
#[derive(Clone, Copy, Debug)]
pub struct LaneRules {
    /// How many there are.
    pub lanes: usize,
    /// How many requests may wait in each.
    pub max_waiting: usize,
    /// How many of them its worker answers together, at most.
    pub max_batch: usize,
}

/// At 15 µs each, 1,024 are a wait of 15 ms.
const MAX_WAITING: usize = 1024;

impl LaneKind {
    /// The table, for so many `workers` as are configured.
    pub fn rules(self, workers: usize) -> LaneRules {
        // Half of the workers sign, so that neither kind can starve the other.
        let signing = (workers / 2).max(1);
        let rules = |lanes| LaneRules { lanes, max_waiting: MAX_WAITING, max_batch: usize::MAX };
        match self {
            LaneKind::Plain => rules(workers.saturating_sub(signing).max(1)),
            LaneKind::Certificate => rules(signing),
            // A connection with a request in work never gives way, and large replies take long: the
            // clients that wait for one must not take all the places. And the replies to a batch are
            // held until all are made: large ones are made one by one.
            LaneKind::Bulk => LaneRules { lanes: 1, max_waiting: 16, max_batch: 1 },
        }
    }
}
