//! The first words on a new connection: who is there, and does it do for us what we will ask?

use std::time::Instant;

use super::command::{Ask, Commands};
use super::connection::Connection;
use super::flow::Context;
use super::layout::Layout;
use super::reply::Info;
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
    let info = Info::ask(&mut commands);
    let time = commands.try_ask(layout.time());
    ask_every_kind(layout, &mut commands);
    let about_rows = ask_about_rows(layout, &mut commands);
    let claim = layout.name.as_ref().map(|name| (name, name.ask(layout, &mut commands)));
    if let Some(ca) = ca {
        commands.ask(layout.enter_ca(ca));
    }
    let entered = commands.ask(layout.get_ca());
    let mut replies = connection.round_trip(&commands, deadline).map_err(StoreError::Down)?;
    let server = info(&mut replies);
    if server.mode.as_deref() == Some("sentinel") {
        let why =
            "it is a sentinel: name it in REDIS_SENTINELS, in place of REDIS_URL or REDIS_HOST";
        return Err(StoreError::Down(connection.unusable(why)));
    }
    context.clock.set(replies.take(time).time_ms()?, clock::now());
    let mut replies = commands.judge(replies)?;
    let rows_refused = about_rows.into_iter().find_map(|ask| replies.take(ask).0.err());
    if let Some((name, claimed)) = claim {
        claimed(name, &mut replies, clock::now())?;
    }
    let entered = replies.take(entered).text()?;
    let keeps_all = server.keeps_all();
    Ok(Hello {
        run_id: server.run_id,
        eviction: server.policy.filter(|_| !keeps_all),
        foreign_ca: entered.filter(|entered| ca.is_some_and(|ca| ca != entered)),
        rows_refused: rows_refused.map(|error| error.to_string()),
    })
}

/// The same for the rows of devices, which are left out where a right for them is missing.
fn ask_about_rows(layout: &Layout, out: &mut Commands) -> [Ask; 2] {
    const ANY: &str = "devices:00";
    let asked = [
        layout.on("HGET", ANY, "").arg(""),
        layout.compare_and_set_field(ANY, "", b"never there", b""),
    ];
    asked.map(|command| out.try_ask(command))
}

/// Every command that is used, on every kind of key, in a form that changes nothing: a right that
/// the user lacks is to be found before it is needed.
fn ask_every_kind(layout: &Layout, out: &mut Commands) {
    let asked = [
        layout.on("DEL", "token:", ""),
        layout.on("EXISTS", "token:", ""),
        layout.on("GET", "device:", ""),
        layout.on("PTTL", "device:", ""),
        layout.compare_and_delete("device:", "", ""),
        layout.on("GET", "used:", ""),
        layout.compare_and_delete("used:", "", ""),
        layout.on("ZADD", "live", "").arg("XX").number(0).arg(""),
        layout.on("ZREM", "live", "").arg(""),
        layout.count_live(u64::MAX / 1000),
        layout.oldest_live(0, 1),
    ];
    let wait = (layout.wait_replicas > 0).then(|| layout.wait_for(1));
    for command in asked.into_iter().chain(wait) {
        out.ask(command);
    }
}
