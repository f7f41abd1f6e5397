//! The exchange in Redis: hashes, one stream, and nothing newer than Redis 5. No command names two
//! keys.

use super::exchange::{Changes, Exchange, Name, News, Place, Swap};
use crate::config;
use crate::device::DeviceId;
use crate::serial::Serial;
use crate::store::redis::{Ask, Command, Commands, FromRedisValue, Info, Line, Reply, is_denied};
use crate::store::{Down, DownKind, StoreError};

/// Entries that the stream keeps at least. Who has missed more compares everything.
const STREAM_ENTRIES: u64 = 10_000;
/// Entries read at once.
const READ_ENTRIES: u64 = 256;
/// How long a holder lives, in seconds: long enough for every instance to merge what it names.
const HOLDER_S: u64 = 600;
/// Certificates are put in Redis only while it uses at most this part of its `maxmemory`.
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
    fn ask(&self, commands: impl IntoIterator<Item = Command>) -> Result<Vec<Reply>, StoreError> {
        let mut all = Commands::default();
        let asked: Vec<Ask> = commands.into_iter().map(|command| all.ask(command)).collect();
        let mut replies = self.line.ask(&all)?;
        Ok(asked.into_iter().map(|ask| replies.take(ask)).collect())
    }

    /// A command with a key for each of these; the items of the lists that are the replies.
    fn items<T: FromRedisValue>(
        &self,
        command: &str,
        keys: &[String],
    ) -> Result<Vec<T>, StoreError> {
        let mut items = Vec::new();
        for reply in self.ask(keys.iter().map(|key| self.line.on(command, key)))? {
            items.append(&mut reply.read()?);
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
    const NAME: &'static str = "Redis";

    fn connect(
        &mut self,
        fp: &str,
        shares_record: bool,
    ) -> Result<(Option<String>, bool), StoreError> {
        self.stream = format!("changes:{fp}");
        let key = format!("share:{fp}");
        let mode = if shares_record { "true" } else { "false" };
        let mut commands = Commands::default();
        commands.ask_in_reach(self.line.on("SET", &key).arg(mode).arg("NX"));
        let entered = commands.ask_in_reach(self.line.on("GET", &key));
        let greeted =
            self.line.connect().and_then(|run_id| Ok((run_id, self.line.ask(&commands)?)));
        let (run_id, mut replies) = greeted.map_err(|error| match error {
            error if is_denied(&error) => error,
            // Who refuses everybody from the start is away for tokens, too: the store tells of it.
            StoreError::Down(down) if down.kind == DownKind::Refused => {
                StoreError::Down(Down { kind: DownKind::Lost, ..down })
            }
            error => error,
        })?;
        let entered = replies.take(entered).text().ok().flatten();
        Ok((run_id, entered.map_or(shares_record, |entered| entered == "true")))
    }

    fn reaches(&self, key: &str) -> bool {
        self.line.reaches(&self.line.on("HGET", key))
    }

    fn can_reach_more(&mut self) -> Result<bool, StoreError> {
        self.line.can_reach_more()
    }

    /// An entry that says nothing, so that the end has a name also where the stream was empty.
    fn end(&mut self) -> Result<String, StoreError> {
        let mut commands = Commands::default();
        let entry = commands.ask(self.entry().arg("begin").arg(""));
        Ok(self.line.ask(&commands)?.take(entry).text()?.unwrap_or_default())
    }

    /// The first and the last entry are looked at after the others were read: what is gone then and
    /// was not read lies before the first one.
    fn changes(&mut self, cursor: &str) -> Result<Changes, StoreError> {
        let read = Command::new("XREAD").arg("COUNT").number(READ_ENTRIES).arg("STREAMS");
        let read = self.line.key(read, &self.stream).arg(cursor);
        let edge = |command, from, to| {
            self.line.on(command, &self.stream).arg(from).arg(to).arg("COUNT").number(1)
        };
        let mut commands = Commands::default();
        let read = commands.ask(read);
        let edges = [edge("XRANGE", "-", "+"), edge("XREVRANGE", "+", "-")];
        let edges = edges.map(|edge| commands.ask(edge));
        let mut replies = self.line.ask(&commands)?;
        let mut changes = Changes { cursor: cursor.to_owned(), ..Changes::default() };
        let mut count = 0;
        let streams: Vec<(Vec<u8>, Vec<Entry>)> = replies.take(read).read()?;
        for (id, names) in streams.into_iter().flat_map(|(_, entries)| entries) {
            changes.names.extend(names.iter().filter_map(read_name));
            changes.cursor = id;
            count += 1;
        }
        let [first, last]: [Result<Vec<Entry>, _>; 2] = edges.map(|ask| replies.take(ask).read());
        let place = |entries: Vec<Entry>| entries.last().map(|(id, _)| place_of(id));
        let (first, last, read) = (place(first?), place(last?), place_of(cursor));
        changes.gap = first.is_none_or(|first| first > read) || last.is_none_or(|last| last < read);
        changes.more = count == READ_ENTRIES;
        Ok(changes)
    }

    fn fields(&mut self, keys: &[String]) -> Result<Vec<String>, StoreError> {
        // A field that is no text is none of ours.
        Ok(self.items("HKEYS", keys)?.into_iter().flat_map(String::from_utf8).collect())
    }

    fn all(&mut self, keys: &[String]) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let pairs = self.items("HGETALL", keys)?.into_iter();
        Ok(pairs
            .filter_map(|(field, value)| Some((String::from_utf8(field).ok()?, value)))
            .collect())
    }

    fn values(&mut self, places: &[Place]) -> Result<Vec<Vec<u8>>, StoreError> {
        let get = |Place { key, field }: &Place| self.line.on("HGET", key).arg(field);
        self.ask(places.iter().map(get))?.into_iter().map(Reply::read).collect()
    }

    fn tell(&mut self, news: &News) -> Result<Vec<bool>, StoreError> {
        let swap = |Swap { place: Place { key, field }, seen, value }: &Swap| match seen {
            None => self.line.on("HSETNX", key).arg(field).bytes(value),
            Some(seen) => self.line.swap(key, field, seen, value),
        };
        let hold = |(device, serial): &(DeviceId, Serial)| {
            let set = self.line.on_holder("SET", device).arg(&serial.to_string());
            set.arg("EX").number(HOLDER_S)
        };
        let name = |entry: Command, name: &Name| entry.arg(name.kind()).arg(&name.to_string());
        let entry = news.names.iter().fold(self.entry(), name);
        // What is announced stands by then, be it on other nodes.
        let mut commands = Commands::default();
        let swaps: Vec<Ask> = news.swaps.iter().map(|s| commands.ask(swap(s))).collect();
        commands.then();
        for held in &news.holders {
            commands.ask_in_reach(hold(held));
        }
        commands.then();
        if !news.names.is_empty() {
            commands.ask(entry);
        }
        let mut replies = self.line.ask(&commands)?;
        swaps.into_iter().map(|ask| Ok(replies.take(ask).number()? == 1)).collect()
    }

    fn holders(&mut self, devices: &[DeviceId]) -> Result<Vec<Serial>, StoreError> {
        let get = devices.iter().map(|device| self.line.on_holder("GET", device));
        let replies = self.ask(get.filter(|get| self.line.reaches(get)))?.into_iter();
        let held = replies.map(Reply::text).collect::<Result<Vec<_>, _>>()?;
        Ok(held.iter().flatten().filter_map(|serial| Serial::from_hex(serial)).collect())
    }

    fn remove(&mut self, places: &[Place]) -> Result<(), StoreError> {
        let delete = |Place { key, field }: &Place| self.line.on("HDEL", key).arg(field);
        self.ask(places.iter().map(delete)).map(drop)
    }

    /// A server that may not be asked says nothing.
    fn is_filling(&mut self) -> Result<bool, StoreError> {
        let is_full = |(used, most): (u64, u64)| most > 0 && used / FULL.0 > most / FULL.1;
        let infos = self.line.info()?;
        Ok(infos.iter().any(|Info { used, most, .. }| used.zip(*most).is_some_and(is_full)))
    }
}

/// The id of an entry of the stream, and its fields with their values.
type Entry = (String, Vec<(Vec<u8>, Vec<u8>)>);

/// What cannot be read names nothing.
fn read_name((kind, name): &(Vec<u8>, Vec<u8>)) -> Option<Name> {
    Name::read(str::from_utf8(kind).ok()?, str::from_utf8(name).ok()?)
}

/// The id of an entry: the time, and a number.
fn place_of(id: &str) -> (u64, u64) {
    let (time, number) = id.split_once('-').unwrap_or((id, "0"));
    (time.parse().unwrap_or(0), number.parse().unwrap_or(0))
}
