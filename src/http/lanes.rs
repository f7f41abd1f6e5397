//! The kinds of lanes, and all that differs between them. An endpoint names its kind, and lanes are made
//! for the kinds that are named; one that no other endpoint has may stand beside its handler.

/// What kind of work a request is. Each kind has lanes of its own, so that one kind that is slow delays
/// no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneKind {
    /// For the log.
    pub name: &'static str,
    /// How many there are.
    pub lanes: Lanes,
    /// How many requests may wait in each.
    pub max_waiting: usize,
    /// How many of them its worker answers together, at most.
    pub max_batch: usize,
}

/// A number of lanes, each of which has a worker of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// Half of the workers that are configured, so that neither half can starve the other …
    Half,
    /// … which is this one.
    Rest,
    /// One more than are configured.
    One,
}

/// Everything that takes microseconds; and revoking, which must not wait behind the redemptions
/// that it is to overtake. At 15 µs each, 1,024 are a wait of 15 ms.
pub const PLAIN: LaneKind =
    LaneKind { name: "Plain", lanes: Lanes::Rest, max_waiting: 1024, max_batch: usize::MAX };
/// What signs a certificate and waits for the disk.
pub const CERTIFICATE: LaneKind = LaneKind { name: "Certificate", lanes: Lanes::Half, ..PLAIN };
/// What has a reply of hundreds of KiB, for which others would wait. A connection with a request in work
/// never gives way, and large replies take long: the clients that wait for one must not take all the
/// places. And the replies to a batch are held until all are made: large ones are made one by one.
pub const BULK: LaneKind =
    LaneKind { name: "Bulk", lanes: Lanes::One, max_waiting: 16, max_batch: 1 };

impl Lanes {
    /// How many that is, where so many `workers` are configured.
    pub fn of(self, workers: usize) -> usize {
        let half = (workers / 2).max(1);
        match self {
            Lanes::Half => half,
            Lanes::Rest => workers.saturating_sub(half).max(1),
            Lanes::One => 1,
        }
    }
}
