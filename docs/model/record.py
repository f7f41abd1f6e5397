#!/usr/bin/env python3
"""The rows of the shared record. Each is run without the rules that it names, which must break, and
with all of them, which must hold."""

import itertools

from explore import WAIT, Scenario
from record_merge import (
    Certificate,
    Record,
    Registration,
    Revocation,
    Row,
    merge_records,
    merge_rows,
)
from record_protocol import OPEN, RULES, Forged, Sharing, stream
from runner import Rows
from server import contents, load, put
from token_ground import facts
from tokens import event, mend, passes, restarts

ROWS = Rows(Sharing, RULES, OPEN)
row = ROWS.row
OLD = Certificate("old", "d", 50)

# Worlds.


def world(*instances, now=100):
    """Instances whose records and whose Redis are empty, and which share."""
    found = {"now": now, "run": 1}
    for me in instances:
        found |= {
            (me, "disk", "record"): Record(),
            (me, "disk", "id"): me.lower(),
            (me, "memory", "run"): 1,
            (me, "memory", "cursor"): 0,
            (me, "memory", "connection"): 1,
        }
    return found


def knowing(found, certificate, *instances, redis=True):
    """A certificate that was answered before and that these instances know."""
    found["judge", "answered", certificate.serial] = certificate
    found["judge", "paid", certificate.serial] = certificate.device
    for me in instances:
        news = Record(frozenset([certificate]))
        found[me, "disk", "record"] = merge_records(found[me, "disk", "record"], news)
    if redis:
        put(found, ("certs", certificate.serial), certificate)
    return found


def with_row(found, device, value, *instances):
    for me in instances:
        news = Record(rows=frozenset([(device, value)]))
        found[me, "disk", "record"] = merge_records(found[me, "disk", "record"], news)
    put(found, ("row", device), value)
    return found


def cut(found, *instances):
    for me in instances:
        found[me, "cut"] = True
        found[me, "memory", "last read"] = found["now"]
        del found[me, "memory", "connection"]
    return found


def stopped(found, me):
    """An instance that is not running."""
    for key in [key for key in found if key[:2] == (me, "memory")]:
        del found[key]
    found[me, "down"] = True
    return found


# Events.


def is_shared(serial):
    """Waits until the certificate was announced."""

    def act(found):
        names = [name for _, named in stream(found) for name in named]
        return None if ("certs", serial) in names else WAIT

    return act


def day(me):
    def act(found):
        if (me, "memory", "run") not in found:
            return WAIT
        found[me, "memory", "day"] = True

    return event(f"a day passes for {me}", act)


# Faults.


def connected(found):
    """Instances that run, and that reach Redis."""
    names = sorted({key[0] for key in found if key[1:] == ("disk", "record")})
    return [me for me in names if (me, "cut") not in found and (me, "down") not in found]


def settled(found, outcomes, over):
    """What must be so when nothing moves any more."""
    if not over:
        return None
    records = {me: found[me, "disk", "record"] for me in connected(found)}
    for me, record in records.items():
        for (serial,), certificate in facts(found, "judge", "answered"):
            if record.certificate(serial) is None:
                return f"{me} does not know {serial}, which was answered"
            if is_dead(found, serial) and not record.is_revoked(certificate):
                return f"{serial} is active at {me} after its revocation was answered"
    if len({(record.revocations, record.rows) for record in records.values()}) > 1:
        return "the records differ"
    return None


def is_dead(found, serial):
    """It was revoked, or it renews what was."""
    heir = found.get(("judge", "heir", serial))
    return ("judge", "dead", serial) in found or (heir is not None and is_dead(found, heir))


def fault_if(is_fault, name, first=settled):
    def check(found, outcomes, over):
        return first(found, outcomes, over) or (over and is_fault(found, outcomes) and name)

    return check


def two_active(found, outcomes):
    """Two certificates of a device, each enrolled through the same Redis."""
    record = Record()
    for me in {key[0] for key in found if key[1:] == ("disk", "record")}:
        record = merge_records(record, found[me, "disk", "record"])
    shared = {serial for (serial,), _ in facts(found, "judge", "through Redis")}
    return len([one for one in record.active("d") if one.serial in shared]) > 1


only_one = fault_if(two_active, "two active certificates of one device")

# What was answered is known to everybody.


@row(
    "r1",
    "a dies between signing and announcing, and is started again",
    "b never learns of the certificate",
    without=["announced again"],
)
def _(s):
    return Scenario(
        world("a", "b"),
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.share": (s.share, "a"),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "a.share again": (s.share, "a", 1),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"a.share again": ("a.boot",)},
    )


@row(
    "r2",
    "b is down while a signs, or is started on a copy of a's folder",
    "it begins at the end of the stream, and never learns of the certificate",
    without=["whole at start"],
)
def _(s):
    return Scenario(
        stopped(world("a", "b"), "b"),
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.share": (s.share, "a"),
            "b.boot": (s.boot, "b"),
            "b.share": (s.share, "b", 1),
        },
        settled,
        after={"b.share": ("b.boot",)},
    )


@row(
    "r3",
    "a signs while b compares its whole record",
    "what is announced between the comparison and the look at the stream's end is missed",
    without=["cursor first"],
)
def _(s):
    return Scenario(
        stopped(world("a", "b"), "b"),
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.share": (s.share, "a"),
            "b.boot": (s.boot, "b"),
            "b.share": (s.share, "b", 1),
        },
        settled,
        after={"b.share": ("b.boot",)},
    )


@row(
    "r4",
    "the stream is cut short before b has read it",
    "b goes on after the gap, and never learns of the certificate",
    without=["whole after a gap"],
)
def _(s):
    def trims(found):
        kept = stream(found)
        if len(kept) < 2:
            return WAIT
        put(found, ("stream",), kept[-1:])

    start = world("a", "b")
    put(start, ("stream",), ((1, ()),))
    start["last id"] = 1
    start["a", "memory", "cursor"] = start["b", "memory", "cursor"] = 1
    return Scenario(
        cut(start, "b"),
        {
            "a.first": (s.enrol, "a", "d", "s1"),
            "a.second": (s.enrol, "a", "e", "s2"),
            "a.share": (s.share, "a"),
            "redis.trims": event("the stream is trimmed to one entry", trims),
            "net.mends": mend("b"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r5",
    "a signs while it is cut off, or a command of it is lost",
    "b never learns of the certificate",
    without=["sent again"],
)
def _(s):
    return Scenario(
        world("a", "b"),
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.share": (s.share, "a"),
            "net.cuts": event("a is cut off", lambda found: cut(found, "a") and None),
            "net.mends": mend("a"),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"net.mends": ("net.cuts",)},
    )


@row(
    "r5b",
    "a row changes at a while its last change is on its way",
    "the second change passes for sent with the first",
    without=["taken first"],
)
def _(s):
    return Scenario(
        world("a", "b"),
        {
            "a.block": (s.block, "a", "d"),
            "a.register": (s.register, "a", "d", "x"),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r6",
    "Redis is back with older data, which lacks what a has shared, and b had not read it",
    "nobody puts it there again",
    without=["whole after a restart"],
)
def _(s):
    start = world("a", "b")
    return Scenario(
        start,
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.share": (s.share, "a"),
            "redis.older": restarts(contents(start)),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r6b",
    "the same, and everybody compares the whole",
    "what Redis lacks stays lacking",
    without=["put back"],
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a")
    load(start, (), 1)
    return Scenario(
        start,
        {
            "redis.empty": restarts(()),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r6c",
    "the same, and b compares the whole before a has put it back",
    "b does not learn of it before its next day",
    without=["puts are announced"],
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a")
    load(start, (), 1)
    return Scenario(
        start,
        {
            "redis.empty": restarts(()),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r7",
    "a value is lost from Redis with nobody noticing, and a new instance starts",
    "it never learns of the certificate",
    without=["whole every day"],
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a")
    del start["redis", ("certs", "old")]
    days = {"a.day": day("a")} if s.has("whole every day") else {}
    return Scenario(
        stopped(start, "b"),
        {
            "a.share": (s.share, "a"),
            "b.boot": (s.boot, "b"),
            "b.share": (s.share, "b", 1),
        }
        | days,
        settled,
        after={"b.share": ("b.boot",)},
    )


@row(
    "r7b",
    "the news of a certificate are lost from the end of the stream with nobody noticing",
    "b, which runs on, does not learn of it before its next day",
    without=["whole every day"],
)
def _(s):
    def loses(found):
        kept = stream(found)
        if len(kept) < 2:
            return WAIT
        put(found, ("stream",), kept[:-1])

    start = world("a", "b")
    put(start, ("stream",), ((1, ()),))
    start["last id"] = start["a", "memory", "cursor"] = start["b", "memory", "cursor"] = 1
    days = {"b.day": day("b")} if s.has("whole every day") else {}
    return Scenario(
        start,
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.share": (s.share, "a"),
            "redis.loses": event("the newest entry of the stream is lost", loses),
            "b.share": (s.share, "b"),
        }
        | days,
        settled,
        after={"b.day": ("redis.loses",), "a.share": ("a.enrol",)},
    )


@row(
    "r7c",
    "a signs more than its list of news holds before it can tell any",
    "b never learns of what was dropped from the list",
    without=["whole after an overflow"],
)
def _(s):
    start = world("a", "b")
    start["a", "room"] = 1
    return Scenario(
        start,
        {
            "a.first": (s.enrol, "a", "d", "s1"),
            "a.second": (s.enrol, "a", "e", "s2"),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


# No revocation is lost.


@row(
    "r8",
    "a revokes a device while b signs for it, or has signed and not shared yet",
    "b's certificate is active after the revocation was answered",
    without=["bound"],
)
def _(s):
    return Scenario(
        world("a", "b"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.share": (s.share, "a"),
            "b.enrol": (s.enrol, "b", "d", "s1"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r9",
    "a and b change one row at the same moment: a revocation and a block",
    "one overwrites the other in Redis, and the records differ",
    without=["by merge"],
)
def _(s):
    return Scenario(
        knowing(world("a", "b"), OLD, "a", "b"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.share": (s.share, "a"),
            "b.block": (s.block, "b", "d"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r10",
    "a revokes while it is cut off, dies, and is started again",
    "the revocation is forgotten",
    without=["bound on disk"],
)
def _(s):
    return Scenario(
        cut(knowing(world("a", "b"), OLD, "a", "b"), "a"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "net.mends": mend("a"),
            "a.share": (s.share, "a", 1),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"a.crash": ("a.revoke",), "a.share": ("a.boot",)},
    )


@row(
    "r10b",
    "a revokes, dies before it has announced it, and is started again",
    "Redis has the bound, but b, which runs on, does not read it before its next day",
    without=["rows announced again"],
    lacking=["puts are announced"],
)
def _(s):
    return Scenario(
        knowing(world("a", "b"), OLD, "a", "b"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "a.share": (s.share, "a", 1),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"a.crash": ("a.revoke",)},
    )


@row(
    "r10c",
    "a revokes, Redis is back with older data, and b compares the whole before a does",
    "a puts the bound into this Redis, but b does not read it before its next day",
    without=["puts are announced"],
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a", "b")
    return Scenario(
        start,
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.share": (s.share, "a"),
            "redis.older": restarts(contents(start)),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"b.share": ("redis.older",)},
    )


@row(
    "r11",
    "a revokes a device; b, which has not read that yet, renews its certificate",
    "the new certificate is active after the revocation was answered",
    without=["paid is inherited"],
)
def _(s):
    return Scenario(
        knowing(world("a", "b"), OLD, "a", "b"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.share": (s.share, "a"),
            "time.passes": passes(10),
            "b.renew": (s.renew, "b", "old", "s1"),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"a.share": ("b.renew",), "b.share": ("b.renew", "a.revoke")},
    )


@row(
    "r12",
    "an enrolment at b reads the row, a revokes, and 10 s later b signs",
    "its certificate counts as paid for after the revocation",
    without=["paid before row"],
)
def _(s):
    return Scenario(
        world("a", "b"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.share": (s.share, "a"),
            "time.passes": passes(10),
            "b.enrol": (s.enrol, "b", "d", "s1"),
            "b.share": (s.share, "b"),
        },
        settled,
        after={"a.share": ("b.enrol",), "b.share": ("b.enrol", "a.revoke")},
    )


@row(
    "r13",
    "a device is revoked and enrols again within the five seconds that a bound reaches ahead",
    "its new certificate is revoked when it is signed",
    without=["paid above bound"],
)
def _(s):
    def is_fault(found, outcomes):
        signed = found["b", "disk", "record"].certificate("s1")
        return signed and found["b", "disk", "record"].is_revoked(signed)

    return Scenario(
        world("a", "b"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "a.share": (s.share, "a"),
            "b.enrol": (s.enrol, "b", "d", "s1"),
            "b.share": (s.share, "b"),
        },
        fault_if(is_fault, "a new certificate is revoked"),
        after={"b.enrol": ("a.revoke",)},
    )


@row(
    "r13b",
    "three instances: a signs, b revokes, c is cut off, and a dies and is started again",
    "what b has revoked is not revoked everywhere",
    without=["bound"],
)
def _(s):
    return Scenario(
        cut(world("a", "b", "c"), "c"),
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "b.revoke": (s.revoke, "b", "d"),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "a.share": (s.share, "a", 1),
            "b.share": (s.share, "b"),
            "net.mends": mend("c"),
            "c.share": (s.share, "c"),
        },
        settled,
        after={
            "a.share": ("b.revoke",),
            "b.share": ("b.revoke",),
            "net.mends": ("a.boot", "b.revoke"),
            "c.share": ("net.mends",),
        },
    )


# Whoever can write to Redis.


@row(
    "r14",
    "somebody writes a revocation into Redis",
    "it is believed",
    without=["mac"],
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a", "b")
    put(start, ("revoked", "old"), Forged(Revocation(100)))
    put(start, ("stream",), ((1, (("revoked", "old"),)),))
    start["last id"] = 1

    def is_fault(found, outcomes):
        return any(found[me, "disk", "record"].is_revoked(OLD) for me in "ab")

    return Scenario(
        start,
        {"a.share": (s.share, "a"), "b.share": (s.share, "b")},
        fault_if(is_fault, "a certificate is revoked, and nobody has revoked it"),
    )


@row(
    "r15",
    "somebody writes a wrong value where a certificate, and where a row, will go",
    "the right ones never get there",
    without=["overwritten"],
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a", "b")
    put(start, ("certs", "s1"), Forged(Certificate("s1", "x", 0)))
    put(start, ("row", "d"), Forged(Row(blocked=999)))
    return Scenario(
        start,
        {
            "a.enrol": (s.enrol, "a", "d", "s1"),
            "a.block": (s.block, "a", "d"),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        settled,
    )


@row(
    "r16",
    "somebody names a certificate that does not exist as a device's holder",
    "the device is locked out",
    without=["holder is proven"],
    reenroll="deny",
)
def _(s):
    start = world("a")
    put(start, ("holder", "d"), "none", 600)
    return Scenario(
        start,
        {"a.enrol": (s.enrol, "a", "d", "s1"), "a.share": (s.share, "a")},
        fault_if(
            lambda found, outcomes: outcomes.get("a.enrol") == "409", "409, and no certificate"
        ),
    )


# One active certificate a device, under REENROLL=deny.


def enrol_at_both(s, more=(), after=(), start=None):
    processes = {
        "a.enrol": (s.enrol, "a", "d", "s1"),
        "a.share": (s.share, "a"),
        "b.enrol": (s.enrol, "b", "d", "s2"),
        "b.share": (s.share, "b"),
    }
    start = start or world("a", "b")
    return Scenario(start, processes | dict(more), only_one, after=dict(after))


@row(
    "r17",
    "a device enrols at a, and at b before b has read of it",
    "it has two active certificates",
    without=["holder"],
    reenroll="deny",
)
def _(s):
    return enrol_at_both(s)


@row(
    "r18",
    "the same, if the lease were free as soon as the certificate is signed",
    "b finds neither lease nor holder",
    without=["holder before lease"],
    reenroll="deny",
)
def _(s):
    return enrol_at_both(s)


@row(
    "r19",
    "b was cut off for longer than a holder lives, and is asked as soon as it is back",
    "it finds no holder, and has not read of the certificate",
    without=["read before serving"],
    reenroll="deny",
)
def _(s):
    return enrol_at_both(
        s,
        {
            "a.shared": event("s1 is shared", is_shared("s1")),
            "time.passes": passes(700),
            "net.mends": mend("b"),
        },
        {
            "time.passes": ("a.shared",),
            "net.mends": ("time.passes",),
            "b.enrol": ("net.mends",),
        },
        cut(world("a", "b"), "b"),
    )


@row(
    "r20",
    "a dies before it has shared what it signed, and its lease ends",
    "b cannot know: two active certificates, and a warning when a is back",
    reenroll="deny",
)
def _(s):
    return enrol_at_both(
        s,
        {
            "a.crash": (s.crash, "a"),
            "time.passes": passes(301),
            "a.boot": (s.boot, "a"),
            "a.share again": (s.share, "a", 1),
        },
        {"time.passes": ("a.crash",), "b.enrol": ("time.passes",), "a.boot": ("b.enrol",)},
    )


# Pruning.


@row(
    "r21",
    "a keeps what has ended for a shorter time than b, which puts it back into Redis",
    "a enters again what it has just pruned",
    without=["own limit"],
    keep=(("a", 10), ("b", 1000)),
)
def _(s):
    ended = OLD._replace(ends=80)
    start = knowing(world("a", "b"), ended, "a", "b")
    del start["judge", "answered", "old"]
    return Scenario(
        start,
        {
            "a.prune": (s.prune, "a"),
            "a.share": (s.share, "a"),
            "b.day": day("b"),
            "b.share": (s.share, "b"),
        },
        fault_if(
            lambda found, outcomes: found["a", "disk", "record"].certificate("old"),
            "what was pruned is back",
        ),
        after={"b.day": ("a.prune",)},
    )


@row(
    "r22",
    "the clock of a is days ahead",
    "it prunes certificates that are valid",
    without=["true clock"],
    keep=(("a", 10),),
)
def _(s):
    start = knowing(world("a", "b"), OLD, "a", "b")
    start["a", "skew"] = 100_000
    return Scenario(
        start,
        {"a.prune": (s.prune, "a"), "a.share": (s.share, "a"), "b.share": (s.share, "b")},
        settled,
    )


# Rows: blocks and registrations.


@row(
    "r23",
    "a blocks a device; b, whose clock is ahead and which has not read that, lifts an older block",
    "the new block is lifted, too",
    without=["block as seen"],
)
def _(s):
    start = with_row(world("a", "b"), "d", Row(blocked=90), "a", "b")
    start["b", "skew"] = 50

    def is_fault(found, outcomes):
        seen = found.get(("judge", "lifted", "d"))
        return not found["a", "disk", "record"].row("d").is_blocked() and (
            seen != found["judge", "blocked", "d"]
        )

    return Scenario(
        start,
        {
            "a.block": (s.block, "a", "d"),
            "a.share": (s.share, "a"),
            "b.unblock": (s.unblock, "b", "d"),
            "b.share": (s.share, "b"),
        },
        fault_if(is_fault, "a block is lifted by somebody who had not seen it"),
    )


def registered(content):
    """Whether the last change that was answered is the one that counts."""

    def is_fault(found, outcomes):
        rows = [found[me, "disk", "record"].row("d") for me in connected(found)]
        return any(one.registration.content != content for one in rows)

    return is_fault


@row(
    "r24",
    "a device is registered anew at b, whose clock is behind",
    "the older registration counts",
    without=["version above"],
)
def _(s):
    start = with_row(world("a", "b"), "d", Row(registration=Registration(100, "a", "x", 100)), "a", "b")
    start["b", "skew"] = -50
    return Scenario(
        start,
        {
            "b.register": (s.register, "b", "d", "y"),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        fault_if(registered("y"), "the older registration counts"),
    )


@row(
    "r25",
    "a registration is forgotten at a",
    "b's copy of it brings it back",
    without=["tombstone"],
)
def _(s):
    start = with_row(world("a", "b"), "d", Row(registration=Registration(90, "a", "x", 90)), "a", "b")
    return Scenario(
        start,
        {
            "a.forget": (s.register, "a", "d", None),
            "a.share": (s.share, "a"),
            "b.share": (s.share, "b"),
        },
        fault_if(registered(None), "a forgotten registration lives"),
    )


@row(
    "r25b",
    "the same, the rows are tidied, and c was away meanwhile",
    "c's copy of it brings it back",
    without=["tombstone stays"],
)
def _(s):
    start = with_row(world("a", "c"), "d", Row(registration=Registration(90, "a", "x", 90)), "a", "c")
    return Scenario(
        stopped(start, "c"),
        {
            "a.forget": (s.register, "a", "d", None),
            "a.share": (s.share, "a"),
            "a.tidy": (s.tidy_rows, "a", "d"),
            "c.boot": (s.boot, "c"),
            "c.share": (s.share, "c", 1),
        },
        fault_if(registered(None), "a forgotten registration lives"),
        after={"a.tidy": ("a.forget",), "c.boot": ("a.tidy",), "c.share": ("c.boot",)},
    )


@row(
    "r25c",
    "a device is registered anew at a; b, which has not read that, changes the note of the old registration",
    "the new secret does not count, and the old one does",
    without=["begun first"],
)
def _(s):
    start = with_row(world("a", "b"), "d", Row(registration=Registration(90, "a", "x", 90)), "a", "b")
    return Scenario(
        start,
        {
            "a.register": (s.register, "a", "d", "y"),
            "a.share": (s.share, "a"),
            "time.passes": passes(10),
            "b.note": (s.note, "b", "d", "n"),
            "b.share": (s.share, "b"),
        },
        fault_if(registered("y"), "the older registration counts"),
    )


@row(
    "r25d",
    "the same, if it was forgotten at a",
    "a forgotten registration lives",
    without=["begun first"],
)
def _(s):
    start = with_row(world("a", "b"), "d", Row(registration=Registration(90, "a", "x", 90)), "a", "b")
    return Scenario(
        start,
        {
            "a.forget": (s.register, "a", "d", None),
            "a.share": (s.share, "a"),
            "time.passes": passes(10),
            "b.note": (s.note, "b", "d", "n"),
            "b.share": (s.share, "b"),
        },
        fault_if(registered(None), "a forgotten registration lives"),
    )


@row(
    "r26",
    "a folder and its clone register a device in the same millisecond",
    "the records differ for good: version and instance are the same, and the content is not",
    without=["content last"],
    lacking=["begun first"],
)
def _(s):
    return Scenario(
        world("a", "A"),
        {
            "a.register": (s.register, "a", "d", "x"),
            "a.share": (s.share, "a"),
            "A.register": (s.register, "A", "d", "y"),
            "A.share": (s.share, "A"),
        },
        settled,
    )


# The merge by itself.


def some_rows():
    changed = [(), (1, "a", "x", 1), (2, "a", "y", 2), (3, "b", "x", 1, "n"), (3, "b", None, 2)]
    registrations = [Registration(*found) for found in changed]
    registers = [(0, 1), (0, 1), (0, 2), (0, 2), registrations, (frozenset(), frozenset("x"))]
    return [Row(*values) for values in itertools.product(*registers)]


def some_records():
    s1, s2 = Certificate("s1", "d", 1), Certificate("s2", "d", 2)
    revocations = [(), [("s1", Revocation(1, "x"))], [("s1", Revocation(2, "y"))]]
    rows = [(), [("d", Row(c=1))], [("d", Row(t=3, c=2))]]
    kinds = [[(), [s1], [s2], [s1, s2]], revocations, rows]
    return [Record(*map(frozenset, parts)) for parts in itertools.product(*kinds)]


def merge_faults(name, values, merge):
    """The merge is commutative, associative and idempotent on these values."""
    for one, other in itertools.product(values, repeat=2):
        if merge(one, other) != merge(other, one) or merge(one, one) != one:
            yield f"{name}: {one} and {other}"
    for one, other, third in itertools.product(values[:40], repeat=3):
        if merge(merge(one, other), third) != merge(one, merge(other, third)):
            yield f"{name}: {one}, {other} and {third}"


def forgotten_revocations(values):
    for one, other in itertools.product(values, repeat=2):
        merged = merge_records(one, other)
        for certificate in one.certificates:
            if one.is_revoked(certificate) and not merged.is_revoked(certificate):
                yield f"{certificate} is revoked in {one}, and not with {other}"


def check_merges():
    faults = [*merge_faults("rows", some_rows(), merge_rows)]
    faults += merge_faults("records", some_records(), merge_records)
    faults += forgotten_revocations(some_records())
    print("      the merge in every order:", faults[0] if faults else "holds")
    return len(faults)


if __name__ == "__main__":
    ROWS.main(__doc__, check_merges)
