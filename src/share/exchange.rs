//! The way to the other instances, as the sharing thread knows it: places that hold values, and a
//! stream that names what has changed.

use crate::device::DeviceId;
use crate::serial::Serial;
use crate::store::StoreError;

/// What stands in the server under a place of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    Certificate(Serial),
    /// That a certificate is revoked.
    Revocation(Serial),
    /// What is kept of a device by itself.
    Row(DeviceId),
}

/// A field of a hash, without the prefix of all keys.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub key: String,
    pub field: String,
}

/// A value that is set if the place still holds what was seen there; nothing is the empty value. Where
/// nobody has looked, it is set if there is none at all.
#[derive(Clone, Debug)]
pub struct Swap {
    pub place: Place,
    pub seen: Option<Vec<u8>>,
    pub value: Vec<u8>,
}

/// What is told in one go: the values stand when they are announced.
#[derive(Clone, Debug, Default)]
pub struct News {
    pub swaps: Vec<Swap>,
    /// The newest certificate of each of these devices.
    pub holders: Vec<(DeviceId, Serial)>,
    /// What is announced.
    pub names: Vec<Name>,
}

/// What was announced after a place in the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The names, by whoever announced them.
    pub names: Vec<Name>,
    /// The place after them.
    pub cursor: String,
    /// Entries are gone that were not read, or the stream is an older one.
    pub gap: bool,
    /// There may be more.
    pub more: bool,
}

/// Where instances exchange what they know. Only the sharing thread uses it; each call is one round
/// trip, and fails when the server does not answer, or not what was asked. Of a cluster a part may be
/// away ([`StoreError::is_part`]): what is there is not to be asked for.
pub trait Exchange: Send {
    /// What the log calls the server.
    const NAME: &'static str;

    /// Connects anew, to share with instances of the CA with this fingerprint. Returns the server's run
    /// id, if it may be asked, and whether the record is shared, as the first instance has entered it.
    fn connect(
        &mut self,
        fp: &str,
        shares_record: bool,
    ) -> Result<(Option<String>, bool), StoreError>;

    /// Whether the hash of this name is in reach, as far as is known.
    fn reaches(&self, key: &str) -> bool;

    /// Whether of what is away more is in reach by now; then all is to be connected anew.
    fn can_reach_more(&mut self) -> Result<bool, StoreError>;

    /// Where the stream ends. Never a cursor that was given before for another entry, even when the data
    /// was lost or set back meanwhile: [`Exchange::changes`] could not see the gap.
    fn end(&mut self) -> Result<String, StoreError>;

    /// What was announced after `cursor`.
    fn changes(&mut self, cursor: &str) -> Result<Changes, StoreError>;

    /// The fields of these hashes.
    fn fields(&mut self, keys: &[String]) -> Result<Vec<String>, StoreError>;

    /// The fields of these hashes and their values.
    fn all(&mut self, keys: &[String]) -> Result<Vec<(String, Vec<u8>)>, StoreError>;

    /// What stands in these places; nothing is the empty value.
    fn values(&mut self, places: &[Place]) -> Result<Vec<Vec<u8>>, StoreError>;

    /// Sets values, then the holders that are in reach, then announces the names. Returns of each value whether it stands
    /// there now. After an error part of it may have been done.
    fn tell(&mut self, news: &News) -> Result<Vec<bool>, StoreError>;

    /// The newest certificates of these devices, if they were signed lately and are in reach.
    fn holders(&mut self, devices: &[DeviceId]) -> Result<Vec<Serial>, StoreError>;

    /// Removes what stands in these places.
    fn remove(&mut self, places: &[Place]) -> Result<(), StoreError>;

    /// So much of its memory is used that certificates are not put there any more.
    fn is_filling(&mut self) -> Result<bool, StoreError>;
}
