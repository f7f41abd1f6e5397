//! Who may enrol, and how registrations and blocks are made. Pure: a row, what is asked, the time.
//!
//! A change is made as news for the row that was seen: the caller merges and writes them. A version is
//! later than whatever was seen of the device, so that a change made here wins over all that who made
//! it could know of, however far the clocks of two instances are apart.

use sha2::{Digest as _, Sha256};

use super::{Block, Instance, Registration, Row, SecretHash, Terms, Text};
use crate::clock::{DAY_S, Now};
use crate::config::Enrolment;
use crate::problem::Code;

/// How long a registration lives if nothing else is said: devices lie on shelves for months.
const REGISTERED_FOR_S: u64 = 90 * DAY_S;

/// What somebody who wants to enrol a device has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    Nothing,
    /// `ONBOARDING_API_KEY`.
    Key,
    Secret(SecretHash),
    Wrong,
}

/// How it is with the registration of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    None,
    /// It permits to enrol.
    Open,
    Spent,
    Ended,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::None => "none",
            Stage::Open => "open",
            Stage::Spent => "spent",
            Stage::Ended => "ended",
        }
    }
}

/// What is to be changed of a device. What is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Begins a registration, with this secret or without; one that there is ends.
    pub register: Option<Option<SecretHash>>,
    /// It ends so many seconds from now.
    pub expires_in_s: Option<u64>,
    pub cert_days: Option<u32>,
    /// The note, or that there is none any more.
    pub note: Option<Option<Text>>,
    pub blocked: Option<bool>,
}

/// Who changes something, where and when.
#[derive(Clone, Debug)]
pub struct Maker {
    /// The name of the key that was shown.
    pub name: Option<Text>,
    pub instance: Instance,
    pub now: Now,
}

impl Row {
    /// Whether the device may enrol by this rule with what was shown. Whether it has a certificate is
    /// not looked at. Who has shown nothing that counts learns nothing of the device.
    pub fn may_enrol(&self, rule: Enrolment, shown: &Shown, now_s: u64) -> Result<(), Code> {
        let living = self.living(now_s);
        let secret = living.and_then(|terms| terms.secret);
        let entitled = *shown == Shown::Key || fits(secret, shown);
        match rule {
            Enrolment::Key if *shown != Shown::Key => return Err(Code::ApiKeyRequired),
            Enrolment::Registered if !entitled => return Err(Code::SecretInvalid),
            Enrolment::Open if secret.is_some() && !entitled => return Err(Code::SecretInvalid),
            _ => {}
        }
        match () {
            () if self.block.stands() => Err(Code::DeviceBlocked),
            () if rule == Enrolment::Registered && living.is_none() => {
                Err(Code::DeviceNotRegistered)
            }
            () => Ok(()),
        }
    }

    /// Whether the secret of the device's registration was shown.
    pub fn has_shown_secret(&self, shown: &Shown, now_s: u64) -> bool {
        fits(self.living(now_s).and_then(|terms| terms.secret), shown)
    }

    /// When the registration was begun, if the secret was shown by which it was used up.
    pub fn spent_by(&self, shown: &Shown) -> Option<u64> {
        let is_right = fits(self.terms().and_then(|terms| terms.secret), shown);
        let begun = self.registration.as_ref()?.made_at;
        (is_right && self.spent.contains(&self.ticket()?)).then_some(begun)
    }

    /// What the registration permits, while it lives.
    pub fn living(&self, now_s: u64) -> Option<&Terms> {
        self.terms().filter(|_| self.stage(now_s) == Stage::Open)
    }

    /// What the registration permits, or has permitted.
    pub fn terms(&self) -> Option<&Terms> {
        self.registration.as_ref()?.terms.as_ref()
    }

    /// How it is with the registration.
    pub fn stage(&self, now_s: u64) -> Stage {
        let Some(terms) = self.terms() else { return Stage::None };
        let is_spent = || self.ticket().is_some_and(|ticket| self.spent.contains(&ticket));
        match () {
            // A ticket takes a hash, and most rows have nothing that is spent.
            () if !self.spent.is_empty() && is_spent() => Stage::Spent,
            () if terms.end <= now_s => Stage::Ended,
            () => Stage::Open,
        }
    }

    /// The news that the registration is used up; `None` if there is none that lives.
    pub fn spend(&self, now_s: u64) -> Option<Row> {
        self.living(now_s)?;
        Some(Row { spent: [self.ticket()?].into(), ..Row::default() })
    }

    /// The news of an edit; `None` if it would change a registration that there is not. One whose time is
    /// over is not brought back by a later end: that would be another. Whoever begins a registration has
    /// to raise the bound, too.
    pub fn edited(&self, edit: &Edit, maker: &Maker) -> Option<Row> {
        let Edit { register, expires_in_s, cert_days, note, .. } = edit;
        let registration = match register {
            Some(secret) => Some(self.begun(*secret, edit, maker)),
            None if expires_in_s.is_some() || cert_days.is_some() || note.is_some() => {
                Some(self.changed(edit, maker)?)
            }
            None => None,
        };
        let (version, Block { blocked, lifted, .. }) = (self.next_version(maker.now), self.block);
        let block = match edit.blocked {
            Some(true) => Block { blocked: version, lifted, changed: version },
            Some(false) => Block { blocked, lifted: blocked, changed: version },
            None => Block::default(),
        };
        Some(Row { registration, block, ..Row::default() })
    }

    /// The news that the registration is forgotten. The block stays.
    pub fn forgotten(&self, maker: &Maker) -> Row {
        Row { registration: Some(self.made(None, maker)), ..Row::default() }
    }

    fn begun(&self, secret: Option<SecretHash>, edit: &Edit, maker: &Maker) -> Registration {
        let lives_s = edit.expires_in_s.unwrap_or(REGISTERED_FOR_S);
        let end = maker.now.unix_s().saturating_add(lives_s);
        let (cert_days, note) = (edit.cert_days, edit.note.clone().flatten());
        self.made(Some(Terms { secret, end, cert_days, note }), maker)
    }

    fn changed(&self, edit: &Edit, maker: &Maker) -> Option<Registration> {
        let now_s = maker.now.unix_s();
        let latest = self.registration.as_ref()?;
        let mut terms = latest.terms.clone()?;
        if let Some(lives_s) = edit.expires_in_s {
            if terms.end <= now_s {
                return None;
            }
            terms.end = now_s.saturating_add(lives_s);
        }
        terms.cert_days = edit.cert_days.or(terms.cert_days);
        terms.note = edit.note.clone().unwrap_or(terms.note);
        Some(Registration { made_at: latest.made_at, ..self.made(Some(terms), maker) })
    }

    /// Begun now, by this maker.
    fn made(&self, terms: Option<Terms>, maker: &Maker) -> Registration {
        Registration {
            version: self.next_version(maker.now),
            instance: maker.instance,
            made_at: self.next_made_at(maker.now),
            made_by: maker.name.clone(),
            terms,
        }
    }

    /// What stands for the registration among what is spent: its secret, or when it was begun, which no
    /// change of it alters.
    fn ticket(&self) -> Option<SecretHash> {
        let made_at = self.registration.as_ref()?.made_at;
        let begun = || format!("a registration without a secret, begun at {made_at}");
        let hash = || SecretHash(Sha256::digest(begun().as_bytes()).into());
        Some(self.terms()?.secret.unwrap_or_else(hash))
    }

    fn next_version(&self, now: Now) -> u64 {
        let registered = self.registration.as_ref().map_or(0, |latest| latest.version);
        let Block { blocked, lifted, changed } = self.block;
        let highest = registered.max(blocked).max(lifted).max(changed);
        now.unix_ms.max(highest.saturating_add(1))
    }

    /// Later than that of the registration before: by it the two are told apart when one is spent.
    fn next_made_at(&self, now: Now) -> u64 {
        let before = self.registration.as_ref().map_or(0, |latest| latest.made_at);
        now.unix_s().max(before.saturating_add(1))
    }
}

/// Whether the secret was shown. Where there is none, what was shown is compared all the same, so that
/// the time tells nobody.
fn fits(secret: Option<SecretHash>, shown: &Shown) -> bool {
    const DUMMY: SecretHash = SecretHash([0; 32]);
    let Shown::Secret(shown) = shown else { return false };
    shown.matches(&secret.unwrap_or(DUMMY)) & secret.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::fixture::{block, forgotten, registered, registration};
    use Code::{
        ApiKeyRequired as KeyRequired, DeviceBlocked as Blocked,
        DeviceNotRegistered as NotRegistered, SecretInvalid,
    };

    const T: u64 = 1_800_000_000;
    const SECRET: SecretHash = SecretHash([9; 32]);
    const OTHER: SecretHash = SecretHash([8; 32]);

    fn maker(s: u64) -> Maker {
        let now = Now { unix_ms: (T + s) * 1000, mono_ms: 0 };
        Maker { name: Text::parse("anna"), instance: Instance([1; 16]), now }
    }

    fn edit(row: &Row, edit: &Edit, s: u64) -> Row {
        row.clone().merge(row.edited(edit, &maker(s)).unwrap())
    }

    fn register(secret: Option<SecretHash>) -> Edit {
        Edit { register: Some(secret), ..Edit::default() }
    }

    fn without_secret(row: Row) -> Row {
        let mut row = row;
        row.registration.as_mut().unwrap().terms.as_mut().unwrap().secret = None;
        row
    }

    #[test]
    fn who_may_enrol() {
        let unknown = Row::default();
        let lives = registered(1, T + 1);
        let plain = without_secret(lives.clone());
        let ended = registered(1, T);
        let spent = lives.clone().merge(lives.spend(T).unwrap());
        let barred = lives.clone().merge(block(7, 0));
        let gone = lives.clone().merge(forgotten(2));
        let (nothing, key, right, wrong) =
            (Shown::Nothing, Shown::Key, Shown::Secret(SECRET), Shown::Secret(OTHER));
        let (open, keyed, closed) = (Enrolment::Open, Enrolment::Key, Enrolment::Registered);
        let none = Shown::Secret(SecretHash([0; 32]));
        for (row, rule, shown, expected) in [
            (&unknown, open, nothing, Ok(())),
            (&unknown, open, Shown::Wrong, Ok(())),
            (&unknown, open, right, Ok(())),
            (&plain, open, nothing, Ok(())),
            (&lives, open, nothing, Err(SecretInvalid)),
            (&lives, open, wrong, Err(SecretInvalid)),
            (&lives, open, right, Ok(())),
            (&lives, open, key, Ok(())),
            (&ended, open, nothing, Ok(())),
            (&spent, open, nothing, Ok(())),
            (&barred, open, nothing, Err(SecretInvalid)),
            (&barred, open, right, Err(Blocked)),
            (&unknown, keyed, nothing, Err(KeyRequired)),
            (&lives, keyed, right, Err(KeyRequired)),
            (&lives, keyed, key, Ok(())),
            (&barred, keyed, key, Err(Blocked)),
            (&barred, keyed, nothing, Err(KeyRequired)),
            (&unknown, closed, nothing, Err(SecretInvalid)),
            (&unknown, closed, none, Err(SecretInvalid)),
            (&unknown, closed, key, Err(NotRegistered)),
            (&lives, closed, right, Ok(())),
            (&lives, closed, wrong, Err(SecretInvalid)),
            (&lives, closed, Shown::Wrong, Err(SecretInvalid)),
            (&lives, closed, key, Ok(())),
            (&plain, closed, key, Ok(())),
            (&plain, closed, none, Err(SecretInvalid)),
            (&ended, closed, right, Err(SecretInvalid)),
            (&ended, closed, key, Err(NotRegistered)),
            (&spent, closed, right, Err(SecretInvalid)),
            (&gone, closed, right, Err(SecretInvalid)),
            (&barred, closed, wrong, Err(SecretInvalid)),
            (&barred, closed, right, Err(Blocked)),
        ] {
            assert_eq!(row.may_enrol(rule, &shown, T), expected, "{rule:?} {shown:?} {row:?}");
        }
        for (row, shown, has) in [
            (&lives, right, true),
            (&lives, wrong, false),
            (&plain, none, false),
            (&ended, right, false),
            (&spent, right, false),
            (&barred, right, true),
            (&lives, key, false),
        ] {
            assert_eq!(row.has_shown_secret(&shown, T), has, "{shown:?} {row:?}");
        }
    }

    #[test]
    fn a_registration_permits_one_enrolment() {
        for secret in [Some(SECRET), None] {
            let row = edit(&Row::default(), &register(secret), 0);
            assert_eq!(row.stage(T), Stage::Open);
            let spent = row.clone().merge(row.spend(T).unwrap());
            assert_eq!((spent.stage(T), spent.spend(T)), (Stage::Spent, None));
            assert_eq!(spent.spent_by(&Shown::Secret(SECRET)), secret.map(|_| T));
            assert_eq!(spent.spent_by(&Shown::Secret(OTHER)), None);
            assert_eq!(row.spent_by(&Shown::Secret(SECRET)), None);
            let note = Edit { note: Some(Text::parse("x")), ..Edit::default() };
            assert_eq!(edit(&spent, &note, 1).stage(T), Stage::Spent, "a note undoes nothing");
            // The note was made where the spend was not known yet.
            let parted = edit(&row, &note, 1).merge(row.spend(T).unwrap());
            assert_eq!(parted.stage(T), Stage::Spent);
            let again = edit(&spent, &register(secret), 0);
            let expected = if secret.is_some() { Stage::Spent } else { Stage::Open };
            assert_eq!(again.stage(T), expected, "the same secret stays spent");
            assert_eq!(edit(&spent, &register(Some(OTHER)), 0).stage(T), Stage::Open);
        }
        assert_eq!(Row::default().spend(T), None);
        assert_eq!(registered(1, T).spend(T), None);
    }

    #[test]
    fn what_a_registration_says() {
        let asked = Edit {
            expires_in_s: Some(60),
            cert_days: Some(7),
            note: Some(Text::parse("Halle 3")),
            ..register(Some(SECRET))
        };
        let row = edit(&Row::default(), &asked, 0);
        let latest = row.registration.clone().unwrap();
        let terms = latest.terms.clone().unwrap();
        assert_eq!((latest.version, latest.made_at), (T * 1000, T));
        assert_eq!(latest.made_by, Text::parse("anna"));
        assert_eq!((terms.end, terms.cert_days), (T + 60, Some(7)));
        let plain = edit(&Row::default(), &register(None), 0);
        assert_eq!(plain.living(T).unwrap().end, T + 90 * 86_400);

        let longer = Edit { expires_in_s: Some(90), note: Some(None), ..Edit::default() };
        let changed = edit(&row, &longer, 10).registration.unwrap();
        assert_eq!((changed.version, changed.made_at), ((T + 10) * 1000, T));
        let expected = Terms { end: T + 100, note: None, ..terms };
        assert_eq!(changed.terms, Some(expected));
        assert_eq!(row.edited(&longer, &maker(60)), None, "it has ended");
        assert_eq!(Row::default().edited(&longer, &maker(0)), None);
        assert_eq!(forgotten(1).edited(&longer, &maker(0)), None);
        assert_eq!(Row::default().edited(&Edit::default(), &maker(0)), Some(Row::default()));
        let gone = row.clone().merge(row.forgotten(&maker(0)));
        assert_eq!((gone.stage(T), gone.living(T)), (Stage::None, None));
        assert!(gone.registration > row.registration);
    }

    /// Whoever changes the note has not heard of the new secret, and changes it later.
    #[test]
    fn a_note_undoes_no_secret_and_no_forgetting_of_the_same_moment() {
        let row = edit(&Row::default(), &register(Some(SECRET)), 0);
        let note = Edit { note: Some(Text::parse("x")), ..Edit::default() };
        let noted = edit(&row, &note, 60);
        let anew = edit(&row, &register(Some(OTHER)), 30).merge(noted.clone());
        assert_eq!(anew.living(T + 60).and_then(|terms| terms.secret), Some(OTHER));
        assert_eq!(row.clone().merge(row.forgotten(&maker(30))).merge(noted).living(T + 60), None);
    }

    #[test]
    fn a_change_wins_over_all_that_was_seen_whatever_the_clock() {
        let ahead = (T + 3_600) * 1000;
        let seen = Row { registration: Some(registration(ahead, T + 9)), ..block(ahead + 5, 0) };
        let changed = edit(&seen, &register(None), 0);
        assert_eq!(changed.registration.as_ref().unwrap().version, ahead + 6);
        let (barred, lifted) = (Some(true), Some(false));
        let again = edit(&seen, &Edit { blocked: barred, ..Edit::default() }, 0);
        assert_eq!(again.block, block(ahead + 6, 0).block);
        let free = edit(&seen, &Edit { blocked: lifted, ..Edit::default() }, 0);
        assert_eq!(free.block, Block { changed: ahead + 6, ..block(ahead + 5, ahead + 5).block });
        assert!(!free.block.stands() && again.block.stands());
        assert!(again.merge(free).block.stands(), "nobody lifts a block that he had not seen");
    }
}
