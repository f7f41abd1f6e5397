//! The exchange in Redis: hashes, one stream, and nothing newer than Redis 5. No command names two
//! keys.

use super::exchange::{Changes, Exchange, Name, News, Place, Swap};
use crate::config;
use crate::device::DeviceId;
use crate::serial::Serial;
use crate::store::StoreError;
use crate::store::redis::{Command, Commands, Info, Line, Replies};

/// Entries that the stream keeps at least. Who has missed more compares everything.
const STREAM_ENTRIES: u64 = 10_000;
/// Entries read at once.
const READ_ENTRIES: u64 = 256;
/// How long a holder lives, in seconds: long enough for every instance to merge what it names.
const HOLDER_S: u64 = 600;
/// Of its memory, the part of which no more than this may be used before certificates are put no more.
const FULL: (u64, u64) = (7, 10);

/// The exchange of one instance.
#[derive(Debug)]
pub struct RedisExchange {
    line: Line,
    stream: String,
}

impl RedisExchange {
    /// An exchange without a connection yet.
    pub fn new(config: &config::Redis) -> Self {
        RedisExchange { line: Line::new(config), stream: String::new() }
    }

    /// The replies, if none is an error.
    fn ask(&self, commands: impl IntoIterator<Item = Command>) -> Result<Replies, StoreError> {
        let mut all = Commands::default();
        commands.into_iter().for_each(|command| all.push(&command));
        if all.count() == 0 {
            return Ok(Replies::new(Vec::new()));
        }
        Replies::all_or_error(self.line.ask(&all)?)
    }

    /// A command with a key for each of these; the items of the lists that are the replies.
    fn items(&self, command: &str, keys: &[String]) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut replies = self.ask(keys.iter().map(|key| self.line.on(command, key)))?;
        let mut items = Vec::new();
        for _ in keys {
            let mut list = replies.list()?;
            while !list.is_empty() {
                items.push(list.bytes()?);
            }
        }
        Ok(items)
    }

    /// An entry without its names.
    fn entry(&self) -> Command {
        let entry = self.line.on("XADD", &self.stream).arg("MAXLEN").arg("~");
        entry.number(STREAM_ENTRIES).arg("*")
    }
}

impl Exchange for RedisExchange {
    fn connect(
        &mut self,
        fp: &str,
        shares_record: bool,
    ) -> Result<(Option<String>, bool), StoreError> {
        self.stream = format!("changes:{fp}");
        let run_id = self.line.connect()?;
        let key = format!("share:{fp}");
        let mode = if shares_record { "true" } else { "false" };
        let set = self.line.on("SET", &key).arg(mode).arg("NX");
        let mut replies = self.ask([set, self.line.on("GET", &key)])?;
        replies.skip();
        Ok((run_id, replies.text()?.map_or(shares_record, |mode| mode == "true")))
    }

    /// An entry that says nothing, so that the end has a name also where the stream was empty.
    fn end(&mut self) -> Result<String, StoreError> {
        let mut replies = self.ask([self.entry().arg("begin").arg("")])?;
        Ok(replies.text()?.unwrap_or_default())
    }

    /// The first and the last entry are looked at after the others were read: what is gone then and
    /// was not read lies before the first one.
    fn changes(&mut self, cursor: &str) -> Result<Changes, StoreError> {
        let read = Command::new("XREAD").arg("COUNT").number(READ_ENTRIES).arg("STREAMS");
        let read = self.line.key(read, &self.stream).arg(cursor);
        let edge = |command, from, to| {
            self.line.on(command, &self.stream).arg(from).arg(to).arg("COUNT").number(1)
        };
        let mut replies =
            self.ask([read, edge("XRANGE", "-", "+"), edge("XREVRANGE", "+", "-")])?;
        let mut changes = Changes { cursor: cursor.to_owned(), ..Changes::default() };
        let mut count = 0;
        // One stream: its name, and its entries.
        let mut streams = replies.list()?;
        if !streams.is_empty() {
            let mut stream = streams.list()?;
            stream.skip();
            for (id, names) in read_entries(stream.list()?)? {
                changes.names.extend(names);
                changes.cursor = id;
                count += 1;
            }
        }
        let mut edge = || -> Result<_, StoreError> {
            Ok(read_entries(replies.list()?)?.pop().map(|(id, _)| place_of(&id)))
        };
        let (first, last, read) = (edge()?, edge()?, place_of(cursor));
        changes.gap = first.is_none_or(|first| first > read) || last.is_none_or(|last| last < read);
        changes.more = count == READ_ENTRIES;
        Ok(changes)
    }

    fn fields(&mut self, keys: &[String]) -> Result<Vec<String>, StoreError> {
        // A field that is no text is none of ours.
        Ok(self.items("HKEYS", keys)?.into_iter().flat_map(String::from_utf8).collect())
    }

    fn all(&mut self, keys: &[String]) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let mut items = self.items("HGETALL", keys)?.into_iter();
        let pairs = std::iter::from_fn(|| Some((String::from_utf8(items.next()?), items.next()?)));
        Ok(pairs.filter_map(|(field, value)| Some((field.ok()?, value))).collect())
    }

    fn values(&mut self, places: &[Place]) -> Result<Vec<Vec<u8>>, StoreError> {
        let get = |Place { key, field }: &Place| self.line.on("HGET", key).arg(field);
        let mut replies = self.ask(places.iter().map(get))?;
        places.iter().map(|_| replies.bytes()).collect()
    }

    fn tell(&mut self, news: &News) -> Result<Vec<bool>, StoreError> {
        let swap = |Swap { place: Place { key, field }, seen, value }: &Swap| match seen[..] {
            [] => self.line.on("HSETNX", key).arg(field).bytes(value),
            _ => self.line.swap(key, field, seen, value),
        };
        let hold = |(device, serial): &(DeviceId, Serial)| {
            let set = self.line.on("SET", &format!("holder:{device}")).arg(&serial.to_string());
            set.arg("EX").number(HOLDER_S)
        };
        let name = |entry: Command, name: &Name| entry.arg(name.kind()).arg(&name.to_string());
        let entry = news.names.iter().fold(self.entry(), name);
        let entry = (!news.names.is_empty()).then_some(entry);
        let swaps = news.swaps.iter().map(swap);
        let mut replies = self.ask(swaps.chain(news.holders.iter().map(hold)).chain(entry))?;
        news.swaps.iter().map(|_| Ok(replies.number()? == 1)).collect()
    }

    fn holders(&mut self, devices: &[DeviceId]) -> Result<Vec<Serial>, StoreError> {
        let get = |device: &DeviceId| self.line.on("GET", &format!("holder:{device}"));
        let mut replies = self.ask(devices.iter().map(get))?;
        let held = devices.iter().map(|_| replies.text()).collect::<Result<Vec<_>, _>>()?;
        Ok(held.iter().flatten().filter_map(|serial| Serial::from_hex(serial)).collect())
    }

    fn remove(&mut self, places: &[Place]) -> Result<(), StoreError> {
        let delete = |Place { key, field }: &Place| self.line.on("HDEL", key).arg(field);
        self.ask(places.iter().map(delete)).map(drop)
    }

    /// A server that may not be asked says nothing.
    fn is_filling(&mut self) -> Result<bool, StoreError> {
        let mut commands = Commands::default();
        Info::ask(&mut commands);
        let Info { used, most, .. } = Replies::new(self.line.ask(&commands)?).info();
        let is_full = |(used, most): (u64, u64)| most > 0 && used / FULL.0 > most / FULL.1;
        Ok(used.zip(most).is_some_and(is_full))
    }
}

/// The id of each entry, and what it names. What cannot be read names nothing.
fn read_entries(mut entries: Replies) -> Result<Vec<(String, Vec<Name>)>, StoreError> {
    let mut read = Vec::new();
    while !entries.is_empty() {
        let mut entry = entries.list()?;
        let id = entry.text()?.unwrap_or_default();
        let (mut parts, mut names) = (entry.list()?, Vec::new());
        while !parts.is_empty() {
            let (kind, name) = (parts.bytes()?, parts.bytes()?);
            let texts = str::from_utf8(&kind).ok().zip(str::from_utf8(&name).ok());
            names.extend(texts.and_then(|(kind, name)| Name::read(kind, name)));
        }
        read.push((id, names));
    }
    Ok(read)
}

/// The id of an entry: the time, and a number.
fn place_of(id: &str) -> (u64, u64) {
    let (time, number) = id.split_once('-').unwrap_or((id, "0"));
    (time.parse().unwrap_or(0), number.parse().unwrap_or(0))
}
