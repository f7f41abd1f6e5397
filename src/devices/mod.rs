//! What is kept of a device by itself, apart from its certificates: its row.
//!
//! A row is four registers: how far its past is dead ([`Bound`]), whether it is blocked ([`Block`]),
//! how it may enrol ([`Registration`]) and which secrets are used up. Each register has its own merge
//! ([`merge`]), so that no order of messages, no loss or repetition, and no older copy of a file or of
//! Redis can make two instances disagree for good. [`table`] holds the rows of this instance, each
//! change on disk ([`mod@file`]) before it counts; [`codec`] is a row as bytes, in memory and in Redis.
//! Who may enrol by a row, and how rows are changed, is in [`enrol`]; a device's secret in [`secret`].

pub(crate) mod codec;
pub(crate) mod enrol;
mod file;
pub(crate) mod identity;
mod merge;
pub(crate) mod secret;
pub mod table;

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;

use crate::clock::Now;
use crate::digits::{self, hex};
use crate::jwt::MAX_LIFETIME_S;

/// Clocks of instances are taken to be within so many seconds of each other: a kill reaches so far
/// into the future, where the token of an instance whose clock is ahead may lie.
pub const CLOCKS_APART_S: u64 = 5;
/// Farthest that replacing a token may put the bound ahead of the clock, in seconds. Each replacement
/// adds some, and the next token is dated after it: without a limit, whoever replaces in a loop would
/// date a device's tokens into next year.
const REPLACE_AHEAD_S: u64 = 60;
/// How long a bound can still meet a token that it kills, in seconds: the longest life of a token, and
/// two minutes for clocks and marks.
const BOUND_LASTS_S: u64 = MAX_LIFETIME_S + 120;
/// Longest life of a registration, in seconds: ten years.
pub const LONGEST_REGISTRATION_S: u64 = 3_653 * 86_400;
/// How long a registration that has ended can still be seen, in seconds.
const ENDED_IS_SHOWN_S: u64 = 90 * 86_400;

/// What is kept of one device. The default is the row of a device of which nothing is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// How far its past is dead.
    pub bound: Bound,
    /// Whether it is blocked.
    pub block: Block,
    /// The latest registration, or that it was forgotten.
    pub registration: Option<Registration>,
    /// Secrets that a certificate was given for. Never taken back, also when the same secret is
    /// registered again.
    pub spent: BTreeSet<SecretHash>,
}

/// How far a device's past is dead, in seconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bound {
    /// Every token of the device whose `iat` is at most this is dead.
    pub t: u64,
    /// Every certificate of the device that was paid for at this time or before is revoked.
    pub c: u64,
}

/// Two versions, so that nobody lifts a block that he had not seen, and one for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// The version of the latest block.
    pub blocked: u64,
    /// The `blocked` that was seen by whoever unblocked the device last.
    pub lifted: u64,
    /// The version of the latest change, which tells when the device was unblocked.
    pub changed: u64,
}

/// How a device may enrol. Of two registrations of one device the greater one counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The time in milliseconds since 1970, or one more than the highest version seen of the device.
    pub version: u64,
    /// The instance on which it was made.
    pub instance: Instance,
    /// When it was begun, in seconds since 1970: what is changed later leaves that as it is.
    pub made_at: u64,
    /// The name of the key with which it was begun, or changed last.
    pub made_by: Option<Text>,
    /// What it permits; `None` if it was forgotten.
    pub terms: Option<Terms>,
}

/// What a registration permits: one enrolment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Terms {
    /// The secret that the device must show, if any.
    pub secret: Option<SecretHash>,
    /// When it ends, in seconds since 1970.
    pub end: u64,
    /// Lifetime of the certificate, where it is not the usual one.
    pub cert_days: Option<u32>,
    /// For people.
    pub note: Option<Text>,
}

/// SHA-256 of a secret. `Debug` shows the beginning only, as for tokens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecretHash(pub [u8; 32]);

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "{:08x}", u32::from_be_bytes([a, b, c, d]))
    }
}

/// The id of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance(pub [u8; 16]);

impl Instance {
    /// Reads 32 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        digits::from_hex(text).map(Instance)
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// 1 to 64 characters that a person has written, none of them a control character: such a text fits
/// into one field of a line of the file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text(Box<str>);

impl Text {
    /// Takes the text as it stands, or `None` if it breaks the rule above.
    pub fn parse(text: &str) -> Option<Self> {
        let length = text.chars().take(65).count();
        let fits = (1..=64).contains(&length) && !text.chars().any(char::is_control);
        fits.then(|| Text(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Bound {
    /// A token that `t` kills may still be alive.
    pub fn is_recent(self, now_s: u64) -> bool {
        self.t.saturating_add(BOUND_LASTS_S) > now_s
    }
}

impl Block {
    /// The device is blocked.
    pub fn stands(self) -> bool {
        self.blocked > self.lifted
    }
}

impl Row {
    /// Whether the device is listed for its row alone: a bound is no sign that there is such a device.
    pub fn is_listed(&self) -> bool {
        self.registration.is_some() || self.block.blocked > 0 || !self.spent.is_empty()
    }

    /// Whether anything would be different without this row. One of which nothing matters any more
    /// is dropped, on each instance for itself; should it come back from elsewhere, it does no harm.
    ///
    /// `c`, a block that was lifted and a spent secret matter for good: certificates may live for a
    /// hundred years, and an instance that was away must not bring back the block or the secret.
    pub fn matters(&self, now_s: u64) -> bool {
        let Row { bound, block, registration, spent } = self;
        let for_good = bound.c > 0 || block.blocked > 0 || !spent.is_empty();
        for_good
            || bound.is_recent(now_s)
            || registration.as_ref().is_some_and(|latest| latest.matters(now_s))
    }
}

impl Registration {
    /// First when it was begun, and with which secret: whoever changes a note does not undo a secret that
    /// was given out meanwhile, of which he has not heard. Then by version and by instance. Should even
    /// these be equal, by what they say: any order will do as long as it is the same everywhere.
    fn order(&self) -> impl Ord + '_ {
        let Registration { version, instance, made_at, made_by, terms } = self;
        let secret = terms.as_ref().map(|terms| terms.secret);
        (made_at, secret, version, instance, made_by, terms)
    }

    /// Forgetting matters for as long as the registrations that it hides could have lived.
    fn matters(&self, now_s: u64) -> bool {
        let until = match &self.terms {
            Some(terms) => terms.end.saturating_add(ENDED_IS_SHOWN_S),
            None => (self.version / 1000).saturating_add(LONGEST_REGISTRATION_S),
        };
        until > now_s
    }
}

impl Ord for Registration {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

impl PartialOrd for Registration {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The `t` that kills a device's past: 5 s after the latest of now and the `iat` of each token of the
/// device that is known.
pub fn kill_time(now: Now, known_iats: impl IntoIterator<Item = u64>) -> u64 {
    known_iats.into_iter().fold(now.unix_s(), u64::max).saturating_add(CLOCKS_APART_S)
}

/// Replacing a token is refused where it would put `t` over a minute ahead of the clock. Returns in how
/// many seconds it can be done then.
pub fn too_far_ahead(t: u64, now: Now) -> Option<u64> {
    t.checked_sub(now.unix_s().saturating_add(REPLACE_AHEAD_S)).filter(|seconds| *seconds > 0)
}

/// Rows for the tests of this room.
#[cfg(test)]
pub(crate) mod fixture {
    use super::*;

    pub fn bound(t: u64, c: u64) -> Row {
        Row { bound: Bound { t, c }, ..Row::default() }
    }

    pub fn block(blocked: u64, lifted: u64) -> Row {
        Row { block: Block { blocked, lifted, changed: blocked }, ..Row::default() }
    }

    pub fn spent(secret: u8) -> Row {
        Row { spent: [SecretHash([secret; 32])].into(), ..Row::default() }
    }

    /// The forty-second's, ending at `end`.
    pub fn registration(version: u64, end: u64) -> Registration {
        let secret = Some(SecretHash([9; 32]));
        let terms = Terms { secret, end, cert_days: Some(30), note: Text::parse("Halle 3 äöü") };
        let made_by = Text::parse("admin");
        let instance = Instance([0x42; 16]);
        Registration { version, instance, made_at: version / 1000, made_by, terms: Some(terms) }
    }

    pub fn registered(version: u64, end: u64) -> Row {
        Row { registration: Some(registration(version, end)), ..Row::default() }
    }

    pub fn forgotten(version: u64) -> Row {
        let begun = registration(version, 0);
        let latest = Registration { made_at: begun.made_at + 1, terms: None, ..begun };
        Row { registration: Some(latest), ..Row::default() }
    }

    /// Something in every register.
    pub fn full() -> Row {
        Row {
            bound: Bound { t: 1_764_237_600, c: 1_764_237_500 },
            block: block(1_764_237_600_007, 1_764_237_600_006).block,
            registration: Some(registration(1_764_237_600_008, 1_772_013_600)),
            spent: [SecretHash([1; 32]), SecretHash([0xff; 32])].into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fixture::{block, bound, forgotten, full, registered, spent};
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn now() -> Now {
        Now { unix_ms: NOW * 1000, mono_ms: 0 }
    }

    #[test]
    fn a_kill_reaches_past_every_token_that_is_known() {
        for (iats, t) in [
            (&[][..], NOW + 5),
            (&[NOW - 300], NOW + 5),
            (&[NOW], NOW + 5),
            (&[NOW + 3, NOW + 2], NOW + 8),
            (&[NOW + 86_400], NOW + 86_405),
            (&[u64::MAX], u64::MAX),
        ] {
            assert_eq!(kill_time(now(), iats.iter().copied()), t, "{iats:?}");
        }
    }

    #[test]
    fn replacing_in_a_loop_is_refused_before_it_leaves_the_present() {
        for (t, wait) in
            [(0, None), (NOW + 60, None), (NOW + 61, Some(1)), (NOW + 1_000, Some(940))]
        {
            assert_eq!(too_far_ahead(t, now()), wait, "{t}");
        }
        let mut iat = NOW;
        let refused = (0..100).find(|_| {
            let t = kill_time(now(), [iat]);
            iat = t + 1;
            too_far_ahead(t, now()).is_some()
        });
        assert_eq!(refused, Some(10), "in one second");
    }

    #[test]
    fn a_block_is_lifted_by_whoever_has_seen_it() {
        for (blocked, lifted, stands) in [(0, 0, false), (7, 0, true), (7, 7, false), (9, 7, true)]
        {
            assert_eq!(block(blocked, lifted).block.stands(), stands, "{blocked} {lifted}");
        }
    }

    #[test]
    fn a_row_goes_when_nothing_of_it_matters() {
        let day = 86_400;
        for (row, matters) in [
            (Row::default(), false),
            (bound(NOW - BOUND_LASTS_S + 1, 0), true),
            (bound(NOW - BOUND_LASTS_S, 0), false),
            (bound(u64::MAX, 0), true),
            (bound(1, 1), true),
            (block(7, 0), true),
            (block(7, 7), true),
            (spent(1), true),
            (registered(1, NOW + 1), true),
            (registered(1, NOW - 90 * day + 1), true),
            (registered(1, NOW - 90 * day), false),
            (forgotten((NOW - 3_652 * day) * 1000), true),
            (forgotten((NOW - 3_654 * day) * 1000), false),
            (full(), true),
        ] {
            assert_eq!(row.matters(NOW), matters, "{row:?}");
        }
    }

    #[test]
    fn texts_of_people_fit_into_a_field() {
        let longest = "ä".repeat(64);
        for good in ["x", " Halle 3, =SUM(A1) ", "<script>", &longest] {
            assert_eq!(Text::parse(good).as_ref().map(Text::as_str), Some(good));
        }
        for bad in ["", "a\tb", "a\nb", "\0", "\u{85}", "\u{7f}", &"ä".repeat(65)] {
            assert_eq!(Text::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_instance_is_32_digits() {
        let text = "00112233445566778899aabbccddeeff";
        assert_eq!(Instance::from_hex(text).map(|id| id.to_string()).as_deref(), Some(text));
        let upper = text.to_uppercase();
        for bad in ["", "-", "+0112233445566778899aabbccddeeff", &upper, &text[1..]] {
            assert_eq!(Instance::from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", SecretHash([0xab; 32])), "abababab");
    }
}
