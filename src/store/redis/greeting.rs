//! The first words on new connections: who is there, and does it do for us what we will ask?

use std::time::Instant;

use super::cluster::{Nodes, Route};
use super::command::{Ask, Command, Commands};
use super::flow::Context;
use super::layout::{Key, Layout};
use super::reply::Info;
use crate::clock;
use crate::device::DeviceId;
use crate::jwt::TokenHash;
use crate::store::StoreError;

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Changes with every start of the server (of any master: `runs`); `None` if it may not be asked.
    pub run_id: Option<String>,
    /// What works and is not as it should be, a line each.
    pub warnings: Vec<String>,
    /// The fingerprint of another CA, entered by another instance.
    pub foreign_ca: Option<String>,
}

/// Asks each node who it is, whether it takes writes, and whether this user may do all that will be
/// needed; and whose CA is entered. All in one round trip, and the writing is real: a server that is
/// full, or a replica, refuses only writes.
pub(super) fn greet(
    context: &Context,
    nodes: &mut Nodes,
    ca: Option<&str>,
    deadline: Instant,
) -> Result<Hello, StoreError> {
    let layout = &context.layout;
    let mut commands = Commands::default();
    let mut asked = Vec::new();
    for node in nodes.connected() {
        commands.route = Route::Node(node);
        let info = Info::ask(&mut commands);
        let time = commands.try_ask(Command::new("TIME"));
        ask_every_kind(layout, nodes.map.device_at(node).as_ref(), &mut commands);
        asked.push((node, info, time, ask_about_rows(layout, &mut commands)));
    }
    commands.route = Route::Key;
    let claim = layout.name.as_ref().map(|name| (name, name.ask(layout, &mut commands)));
    if let Some(ca) = ca {
        commands.ask(layout.enter_ca(ca));
    }
    let entered = commands.ask(layout.on("GET", Key::Named("ca")));
    let mut replies = nodes.ask(&commands, deadline);
    let (mut hello, mut runs) = (Hello::default(), Vec::new());
    let (mut policy, mut refused) = (None, None);
    let refusal = commands.refusal(&replies);
    for (node, info, time, about_rows) in asked {
        let server = info(&mut replies);
        check_mode(layout, server.mode.as_deref()).map_err(|why| nodes.unusable(node, why))?;
        if !nodes.has(node) {
            continue;
        }
        context.clock.set(replies.take(time).time_ms()?, clock::now());
        refused = about_rows.into_iter().find_map(|ask| replies.take(ask).0.err()).or(refused);
        let keeps_all = server.keeps_all();
        policy = policy.or(server.policy.filter(|_| !keeps_all));
        runs.push(server.run_id);
    }
    refusal.map_or(Ok(()), Err)?;
    nodes.check()?;
    hello.run_id = nodes.run_id(runs);
    hello.warnings.extend(policy.map(|policy| {
        format!(
            "maxmemory-policy of this Redis is {policy}: it may drop the marks of used tokens, set it \
             to noeviction"
        )
    }));
    hello.warnings.extend(refused.map(|why| {
        format!(
            "the rows of devices are not kept in this Redis, so a kill reaches only the tokens that \
             are known where it is made: {why}"
        )
    }));
    if let Some((name, claimed)) = claim {
        claimed(name, &mut replies, clock::now())?;
    }
    let entered = replies.take(entered).text().ok().flatten();
    hello.foreign_ca = entered.filter(|entered| ca.is_some_and(|ca| ca != entered));
    Ok(hello)
}

/// It is what the settings say.
fn check_mode(layout: &Layout, mode: Option<&str>) -> Result<(), &'static str> {
    match mode {
        Some("sentinel") => {
            Err("it is a sentinel: name it in REDIS_SENTINELS, in place of REDIS_URL or REDIS_HOST")
        }
        Some("cluster") if !layout.is_spread => {
            Err("it is a node of a cluster, which needs REDIS_CLUSTER=true")
        }
        _ => Ok(()),
    }
}

/// The same for the rows of devices, which are left out where a right for them is missing.
fn ask_about_rows(layout: &Layout, out: &mut Commands) -> [Ask; 2] {
    const ANY: &str = "devices:00";
    let asked = [
        layout.on("HGET", Key::Named(ANY)).arg(""),
        layout.compare_and_set_field(ANY, "", b"never there", b""),
    ];
    asked.map(|command| out.try_ask(command))
}

/// Every command that is used, on every kind of key, in a form that changes nothing: a right that
/// the user lacks is to be found before it is needed. A node that says only that another one has the
/// key allows it.
fn ask_every_kind(layout: &Layout, device: Option<&DeviceId>, out: &mut Commands) {
    let Some(device) = device else { return };
    let hash = TokenHash::of("");
    let (token, lease) = (Key::Token(device, ""), Key::Lease(device));
    let mark = Key::Mark(device, &hash);
    let live = layout.all_live().first().copied().unwrap_or_default();
    let asked = [
        layout.write_nothing(device),
        layout.on("DEL", token),
        layout.on("EXISTS", token),
        layout.on("GET", lease),
        layout.on("PTTL", lease),
        layout.compare_and_delete(lease, ""),
        layout.on("GET", mark),
        layout.compare_and_delete(mark, ""),
    ];
    let counts = [
        layout.on("ZADD", Key::Named(live)).arg("XX").number(0).arg(""),
        layout.on("ZREM", Key::Named(live)).arg(""),
        layout.count_live(live, u64::MAX / 1000),
        layout.oldest_live(live, 0, 1),
    ];
    let wait = (layout.wait_replicas > 0).then(|| Command::new("WAIT").number(0).number(1));
    for command in asked.into_iter().chain(wait) {
        out.ask(command);
    }
    for command in counts {
        out.ask_in_reach(command);
    }
}
