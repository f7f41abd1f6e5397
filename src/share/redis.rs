//! The exchange in Redis: hashes, one stream, and nothing newer than Redis 5. No command names two
//! keys.

use super::{Changes, Exchange, Fault, Hello, Name, News, Place, Swap, Told};
use crate::config;
use crate::device::DeviceId;
use crate::serial::Serial;
use crate::store::redis::{Command, Commands, Line, Replies, Reply};
use crate::store::{DownKind, StoreError};

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
}

impl RedisExchange {
    /// An exchange without a connection yet.
    pub fn new(config: &config::Redis) -> Self {
        RedisExchange { line: Line::new(config) }
    }

    /// The replies, if none is an error.
    fn ask(&self, commands: &Commands) -> Result<Vec<Reply>, Fault> {
        let replies = self.line.ask(commands)?;
        match replies.iter().find_map(|reply| reply.as_ref().err()) {
            None => Ok(replies),
            Some(error) => Err(error.clone().into()),
        }
    }

    fn lists(&self, command: &str, keys: &[String]) -> Result<Vec<Replies>, Fault> {
        let mut commands = Commands::default();
        keys.iter().for_each(|key| commands.push(&self.line.on(command, key)));
        let mut replies = Replies::new(self.ask(&commands)?);
        keys.iter().map(|_| Ok(replies.list()?)).collect()
    }

    fn ask_for(&self, command: Command) -> Result<Replies, Fault> {
        let mut commands = Commands::default();
        commands.push(&command);
        Ok(Replies::new(self.ask(&commands)?))
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Down(down) if down.kind != DownKind::Refused => Fault::Lost(down.why),
            other => Fault::Refused(other.to_string()),
        }
    }
}

fn stream(fp: &str) -> String {
    format!("changes:{fp}")
}

impl Exchange for RedisExchange {
    fn connect(&mut self, fp: &str, shares_record: bool) -> Result<Hello, Fault> {
        let run_id = self.line.connect()?;
        let key = format!("share:{fp}");
        let mut commands = Commands::default();
        let mode = if shares_record { "true" } else { "false" };
        commands.push(&self.line.on("SET", &key).arg(mode).arg("NX"));
        commands.push(&self.line.on("GET", &key));
        let mut replies = Replies::new(self.ask(&commands)?);
        replies.skip();
        Ok(Hello { run_id, shares_record: replies.text()?.map(|mode| mode == "true") })
    }

    /// An entry that says nothing, so that the end has a name also where the stream was empty.
    fn end(&mut self, fp: &str) -> Result<String, Fault> {
        let command = self.line.on("XADD", &stream(fp)).arg("MAXLEN").arg("~");
        let command = command.number(STREAM_ENTRIES).arg("*").arg("begin").arg("");
        Ok(self.ask_for(command)?.text()?.unwrap_or_default())
    }

    /// The first and the last entry are looked at after the others were read: what is gone then and
    /// was not read lies before the first one.
    fn changes(&mut self, fp: &str, cursor: &str) -> Result<Changes, Fault> {
        let stream = stream(fp);
        let mut commands = Commands::default();
        let read = Command::new("XREAD").arg("COUNT").number(READ_ENTRIES);
        commands.push(&self.line.key(read.arg("STREAMS"), &stream).arg(cursor));
        commands.push(&self.line.on("XRANGE", &stream).arg("-").arg("+").arg("COUNT").number(1));
        commands.push(&self.line.on("XREVRANGE", &stream).arg("+").arg("-").arg("COUNT").number(1));
        let mut replies = Replies::new(self.ask(&commands)?);
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
        let mut edge = || -> Result<Option<Id>, Fault> {
            Ok(read_entries(replies.list()?)?.pop().map(|(id, _)| Id::read(&id)))
        };
        let (first, last, read) = (edge()?, edge()?, Id::read(cursor));
        changes.gap = first.is_none_or(|first| first > read) || last.is_none_or(|last| last < read);
        changes.more = count == READ_ENTRIES;
        Ok(changes)
    }

    fn fields(&mut self, keys: &[String]) -> Result<Vec<String>, Fault> {
        let mut all = Vec::new();
        for mut fields in self.lists("HKEYS", keys)? {
            while !fields.is_empty() {
                // A field that is no text is none of ours.
                all.extend(String::from_utf8(fields.bytes()?));
            }
        }
        Ok(all)
    }

    fn all(&mut self, keys: &[String]) -> Result<Vec<(String, Vec<u8>)>, Fault> {
        let mut all = Vec::new();
        for mut parts in self.lists("HGETALL", keys)? {
            while !parts.is_empty() {
                let (field, value) = (String::from_utf8(parts.bytes()?), parts.bytes()?);
                all.extend(field.map(|field| (field, value)));
            }
        }
        Ok(all)
    }

    fn values(&mut self, places: &[Place]) -> Result<Vec<Vec<u8>>, Fault> {
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let mut commands = Commands::default();
        for Place { key, field } in places {
            commands.push(&self.line.on("HGET", key).arg(field));
        }
        let mut replies = Replies::new(self.ask(&commands)?);
        places.iter().map(|_| Ok(replies.bytes()?)).collect()
    }

    fn tell(&mut self, fp: &str, news: &News) -> Result<Told, Fault> {
        let mut commands = Commands::default();
        for (Place { key, field }, value) in &news.new {
            commands.push(&self.line.on("HSETNX", key).arg(field).bytes(value));
        }
        for Swap { place: Place { key, field }, seen, value } in &news.swaps {
            commands.push(&self.line.swap(key, field, seen, value));
        }
        for (device, serial) in &news.holders {
            let key = format!("holder:{device}");
            let set = self.line.on("SET", &key).arg(&serial.to_string());
            commands.push(&set.arg("EX").number(HOLDER_S));
        }
        if !news.names.is_empty() {
            let entry = self.line.on("XADD", &stream(fp)).arg("MAXLEN").arg("~");
            let entry = entry.number(STREAM_ENTRIES).arg("*");
            let name = |entry: Command, name: &Name| entry.arg(name.kind()).arg(&name.to_string());
            commands.push(&news.names.iter().fold(entry, name));
        }
        let mut replies = Replies::new(self.ask(&commands)?);
        let mut stands = |count: usize| -> Result<Vec<bool>, Fault> {
            (0..count).map(|_| Ok(replies.number()? == 1)).collect()
        };
        Ok(Told { new: stands(news.new.len())?, swaps: stands(news.swaps.len())? })
    }

    fn holders(&mut self, devices: &[DeviceId]) -> Result<Vec<Option<Serial>>, Fault> {
        let mut commands = Commands::default();
        for device in devices {
            commands.push(&self.line.on("GET", &format!("holder:{device}")));
        }
        let mut replies = Replies::new(self.ask(&commands)?);
        let mut holder = || Ok(replies.text()?.and_then(|serial| Serial::from_hex(&serial)));
        devices.iter().map(|_| holder()).collect()
    }

    fn remove(&mut self, places: &[Place]) -> Result<(), Fault> {
        let mut commands = Commands::default();
        for Place { key, field } in places {
            commands.push(&self.line.on("HDEL", key).arg(field));
        }
        self.ask(&commands).map(drop)
    }

    fn is_filling(&mut self) -> Result<bool, Fault> {
        let command = Command::new("INFO").arg("memory");
        // One that may not be asked says nothing.
        let info = match self.ask_for(command) {
            Ok(mut replies) => replies.text()?.unwrap_or_default(),
            Err(Fault::Refused(_)) => String::new(),
            Err(lost) => return Err(lost),
        };
        let number = |name: &str| -> Option<u64> {
            info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        let (used, most) = (number("used_memory:"), number("maxmemory:"));
        let is_full = |(used, most): (u64, u64)| most > 0 && used / FULL.0 > most / FULL.1;
        Ok(used.zip(most).is_some_and(is_full))
    }
}

/// The id of each entry, and what it names. What cannot be read names nothing.
fn read_entries(mut entries: Replies) -> Result<Vec<(String, Vec<Name>)>, Fault> {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Id(u64, u64);

impl Id {
    fn read(text: &str) -> Self {
        let (time, number) = text.split_once('-').unwrap_or((text, "0"));
        Id(time.parse().unwrap_or(0), number.parse().unwrap_or(0))
    }
}
