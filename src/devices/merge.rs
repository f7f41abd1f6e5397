//! How two copies of a row become one: each register for itself, and nothing is ever taken back.
//!
//! Every merge here is commutative, associative and idempotent: whichever way copies meet, however
//! often, all instances end with the same row.

use super::{Block, Bound, Row};

impl Row {
    /// The row that knows what either knows.
    pub fn merge(mut self, other: Row) -> Row {
        self.spent.extend(other.spent);
        Row {
            bound: self.bound.merge(other.bound),
            block: self.block.merge(other.block),
            registration: self.registration.max(other.registration),
            spent: self.spent,
        }
    }

    /// The registers of this row that `known` would gain from; the others are as in a new row.
    pub fn news_for(&self, known: &Row) -> Row {
        let bound = self.bound.merge(known.bound);
        let block = self.block.merge(known.block);
        let newer = self.registration > known.registration;
        Row {
            bound: if bound == known.bound { Bound::default() } else { self.bound },
            block: if block == known.block { Block::default() } else { self.block },
            registration: self.registration.clone().filter(|_| newer),
            spent: self.spent.difference(&known.spent).copied().collect(),
        }
    }
}

impl Bound {
    fn merge(self, other: Bound) -> Bound {
        Bound { t: self.t.max(other.t), c: self.c.max(other.c) }
    }
}

impl Block {
    fn merge(self, other: Block) -> Block {
        Block {
            blocked: self.blocked.max(other.blocked),
            lifted: self.lifted.max(other.lifted),
            changed: self.changed.max(other.changed),
        }
    }
}

/// Rows drawn at random, from few values so that every kind of tie comes up.
#[cfg(test)]
pub(super) mod random {
    use crate::devices::{Block, Bound, Instance, Registration, Row, SecretHash, Terms, Text};

    /// Xorshift (Marsaglia 2003): the same rows in every run.
    pub struct Random(pub u64);

    impl Random {
        pub fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) % n
        }

        fn some<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
            (self.below(3) > 0).then(|| make(self))
        }

        fn small(&mut self) -> u8 {
            self.below(3) as u8
        }

        fn text(&mut self) -> Text {
            let length = 1 + self.below(3) as usize;
            Text::parse(&"ä".repeat(length)).unwrap()
        }

        fn terms(&mut self) -> Terms {
            Terms {
                secret: self.some(|r| SecretHash([r.small(); 32])),
                end: self.below(3),
                cert_days: self.some(|r| r.below(2) as u32),
                note: self.some(Self::text),
            }
        }

        pub fn row(&mut self) -> Row {
            let registration = self.some(|r| Registration {
                version: r.below(3),
                instance: Instance([r.small(); 16]),
                made_at: r.below(2),
                made_by: r.some(Self::text),
                terms: r.some(Self::terms),
            });
            Row {
                bound: Bound { t: self.below(4), c: self.below(4) },
                block: Block {
                    blocked: self.below(4),
                    lifted: self.below(4),
                    changed: self.below(4),
                },
                registration,
                spent: (0..self.below(3)).map(|_| SecretHash([self.small(); 32])).collect(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::random::Random;
    use super::*;
    use crate::clock::Now;
    use crate::devices::Instance;
    use crate::devices::enrol::{Edit, Maker};
    use crate::devices::fixture::{block, forgotten, registered, spent};

    fn merged(a: &Row, b: &Row) -> Row {
        a.clone().merge(b.clone())
    }

    #[test]
    fn rows_end_the_same_whichever_way_they_meet() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (instance, now) = (Instance([1; 16]), Now { unix_ms: 0, mono_ms: 0 });
        let maker = Maker { name: None, instance, now };
        let secret = |row: &Row| row.registration.clone()?.terms.map(|terms| terms.secret);
        for n in 0..100_000 {
            let (a, b, c) = (random.row(), random.row(), random.row());
            let ab = merged(&a, &b);
            assert_eq!(ab, merged(&b, &a), "{n}: commutative");
            assert_eq!(merged(&ab, &c), merged(&a, &merged(&b, &c)), "{n}: associative");
            assert_eq!(merged(&ab, &b), ab, "{n}: idempotent");
            assert_eq!(merged(&ab, &Row::default()), ab, "{n}: a new row adds nothing");
            assert!(ab.bound.t >= a.bound.t && ab.bound.c >= a.bound.c, "{n}: the past stays dead");
            assert!(ab.spent.is_superset(&a.spent), "{n}: a spent secret never lives again");
            let unseen = a.block.stands() && b.block.lifted < a.block.blocked;
            assert!(!unseen || ab.block.stands(), "{n}: nobody lifts a block that he had not seen");
            assert_eq!(merged(&b, &a.news_for(&b)), ab, "{n}: the news are all that is new");
            assert_eq!(a.news_for(&ab), Row::default(), "{n}: and nothing that is known");
            let note = Edit { note: Some(None), ..Edit::default() };
            let edited = a.edited(&note, &maker).map_or(b.clone(), |edit| merged(&b, &edit));
            let edited = merged(&edited, &a);
            assert_eq!(secret(&edited), secret(&ab), "{n}: a note undoes no secret");
            assert_eq!(edited.block, ab.block, "{n}: nor a block");
        }
    }

    #[test]
    fn a_block_outlives_the_edit_of_a_note() {
        let blocked = block(7, 0).merge(registered(5, 100));
        let edited = merged(&blocked, &registered(8, 100));
        assert!(edited.block.stands() && edited.registration == registered(8, 100).registration);
        let forgot = merged(&edited, &forgotten(9));
        assert!(forgot.block.stands() && forgot.registration == forgotten(9).registration);
        assert!(!merged(&forgot, &block(7, 7)).block.stands());
        assert!(merged(&block(9, 0), &block(7, 7)).block.stands(), "blocked again meanwhile");
    }

    #[test]
    fn a_spent_secret_stays_spent_when_it_is_registered_again() {
        let enrolled = registered(5, 100).merge(spent(9));
        let again = merged(&enrolled, &registered(8, 200));
        let secret = again.registration.and_then(|r| r.terms).and_then(|terms| terms.secret);
        assert!(secret.is_some_and(|secret| again.spent.contains(&secret)));
    }

    #[test]
    fn an_older_copy_brings_no_registration_back() {
        let forgot = registered(5, 100).merge(forgotten(6));
        assert_eq!(merged(&registered(5, 100), &forgot).registration, forgotten(6).registration);
    }
}
