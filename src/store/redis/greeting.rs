//! The first words on a new connection: who is there, and does it do for us what we will ask?

use std::time::Instant;

use super::command::Commands;
use super::connection::Connection;
use super::flow::Context;
use super::layout::Layout;
use super::name::CLAIM;
use super::reply::{Info, Replies, Reply};
use crate::clock;
use crate::store::StoreError;
use crate::store::failover::Hello;

/// Asks who the server is, whether it takes writes, whether this user may do all that will be
/// needed, and whose CA is entered there. All in one round trip, and the writing is real: a server
/// that is full, or a replica, refuses only writes.
pub(super) fn greet(
    context: &Context,
    connection: &mut Connection,
    ca: Option<&str>,
    deadline: Instant,
) -> Result<Hello, StoreError> {
    let layout = &context.layout;
    let mut commands = Commands::default();
    Info::ask(&mut commands);
    commands.push(&layout.time());
    let rights = push_every_kind(layout, &mut commands);
    let about_rows = push_about_rows(layout, &mut commands);
    if let Some(name) = &layout.name {
        name.push_claim(layout, &mut commands);
    }
    if let Some(ca) = ca {
        commands.push(&layout.enter_ca(ca));
    }
    commands.push(&layout.get_ca());
    let replies = connection.round_trip(&commands, deadline).map_err(StoreError::Down)?;
    let mut replies = replies.into_iter();
    let mut first = Replies::new(replies.by_ref().take(3).collect());
    let server = first.info();
    if server.mode.as_deref() == Some("sentinel") {
        let why =
            "it is a sentinel: name it in REDIS_SENTINELS, in place of REDIS_URL or REDIS_HOST";
        return Err(StoreError::Down(connection.unusable(why)));
    }
    context.clock.set(first.time_ms()?, clock::now());
    replies.by_ref().take(rights).find_map(Result::err).map_or(Ok(()), Err)?;
    let about_rows: Vec<Reply> = replies.by_ref().take(about_rows).collect();
    let rows_refused = about_rows.into_iter().find_map(Result::err);
    if let Some(name) = &layout.name {
        name.claimed(replies.by_ref().take(CLAIM).collect(), clock::now())?;
    }
    let mut replies = Replies::new(replies.collect());
    if ca.is_some() {
        replies.text()?;
    }
    let entered = replies.text()?;
    let keeps_all = server.keeps_all();
    Ok(Hello {
        run_id: server.run_id,
        eviction: server.policy.filter(|_| !keeps_all),
        foreign_ca: entered.filter(|entered| ca.is_some_and(|ca| ca != entered)),
        rows_refused: rows_refused.map(|error| error.to_string()),
    })
}

/// The same for the rows of devices, which are left out where a right for them is missing.
fn push_about_rows(layout: &Layout, commands: &mut Commands) -> usize {
    const ANY: &str = "devices:00";
    let before = commands.count();
    commands.push(&layout.on("HGET", ANY, "").arg(""));
    commands.push(&layout.compare_and_set_field(ANY, "", b"never there", b""));
    commands.count() - before
}

/// Every command that is used, on every kind of key, in a form that changes nothing: a right that
/// the user lacks is to be found before it is needed. Returns how many commands these are.
fn push_every_kind(layout: &Layout, commands: &mut Commands) -> usize {
    let before = commands.count();
    commands.push(&layout.on("DEL", "token:", ""));
    commands.push(&layout.on("EXISTS", "token:", ""));
    commands.push(&layout.on("GET", "device:", ""));
    commands.push(&layout.on("PTTL", "device:", ""));
    commands.push(&layout.compare_and_delete("device:", "", ""));
    commands.push(&layout.on("GET", "used:", ""));
    commands.push(&layout.compare_and_delete("used:", "", ""));
    commands.push(&layout.on("ZADD", "live", "").arg("XX").number(0).arg(""));
    commands.push(&layout.on("ZREM", "live", "").arg(""));
    commands.push(&layout.count_live(u64::MAX / 1000));
    commands.push(&layout.oldest_live(0, 1));
    if layout.wait_replicas > 0 {
        commands.push(&layout.wait_for(0, 1));
    }
    commands.count() - before
}
