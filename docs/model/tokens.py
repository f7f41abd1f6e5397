#!/usr/bin/env python3
"""The rows of the token protocol. Each is run without the rules that it names, which must break,
and with all of them, which must hold."""

from explore import WAIT, Crash, Scenario
from runner import Rows
from server import contents, load, put
from token_ground import OPEN, RULES, Lease, Mark, Token, facts, here, serves
from token_issue import Issue
from token_kill import Kill
from token_redeem import Redeem
from token_return import Return


class Service(Issue, Redeem, Kill, Return):
    """What an instance does."""


T1 = Token("t1", "d", 100)
T2 = Token("t2", "d", 100)
ROWS = Rows(Service, RULES, OPEN)
row = ROWS.row

# Worlds.


def world(*instances, now=100):
    """Instances that an empty Redis serves. A and a are two processes with one instance id."""
    found = {"now": now, "run": 1}
    for me in instances:
        found |= {
            (me, "memory", "mode"): "redis",
            (me, "memory", "connection"): 1,
            (me, "memory", "run"): 1,
            (me, "disk", "run"): 1,
            (me, "memory", "id"): me.lower(),
            (me, "disk", "id"): me.lower(),
        }
    return found


def held(found, token, by, copy="confirmed"):
    """A token that was handed out. `unsent`: from memory, and Redis has not heard of it."""
    found[by, "memory", "copy", token] = copy
    found["judge", "answered", token] = True
    if copy == "unsent":
        found[by, "memory", "todo", "copy", token] = True
        return found
    put(found, ("token", token), True, token.iat + 300 - found["now"])
    put(found, ("device", token.device), Lease(token), token.iat + 300 - found["now"])
    return found


def cut(found, *instances):
    """Instances that cannot reach Redis and serve from memory."""
    for me in instances:
        found[me, "cut"] = True
        found[me, "memory", "mode"] = "memory"
        found[me, "memory", "epoch"] = 1
        del found[me, "memory", "connection"]
        for (token,), copy in facts(found, me, "memory", "copy"):
            found[me, "memory", "copy", token] = "sent" if copy == "confirmed" else copy
    return found


def certified(found, token, by, serial):
    """A token that was redeemed before, and a Redis that knows of it."""
    found[by, "disk", "certificate", token] = serial
    found["judge", "certificate", token] = serial
    found.pop(("redis", ("token", token)), None)
    found.pop(("redis", ("device", token.device)), None)
    put(found, ("used", token), Mark(by, serial), 360)
    return found


def emptied(found):
    """Redis came back with nothing."""
    load(found, (), found["run"])
    return found


# Events.


def event(label, act):
    def process():
        yield here(label, act)

    return (process,)


def mend(me):
    return event(f"{me} can reach Redis again", lambda found: found.pop((me, "cut")) and None)


def passes(seconds, wait=lambda found: False):
    def act(found):
        if wait(found):
            return WAIT
        found["now"] += seconds

    return event(f"{seconds} s pass", act)


def restarts(dump, run=2):
    """Redis stops, and starts with what a dump holds; None: it does not start."""

    def act(found):
        load(found, dump or (), None if dump is None else run)
        return Crash("redis")

    return event("Redis dies" if dump is None else "Redis restarts", act)


# Faults.


def judged(found, outcomes, over):
    """What the judge notes in every row: a token with two certificates, or redeemed by whoever
    presents it after its kill was answered, or signed for after its replacement was answered."""
    return found.get(("judge", "fault"))


def fault_if(is_fault, name):
    def check(found, outcomes, over):
        return judged(found, outcomes, over) or (is_fault(found, outcomes, over) and name)

    return check


def certificates(found):
    return facts(found, "judge", "certificate")


def both_answered(*processes):
    return fault_if(
        lambda found, outcomes, over: all(outcomes.get(name) == "200" for name in processes),
        "both were answered 200",
    )


def refused(process, answers=("401 used", "401 unknown")):
    """A token that nobody has used or killed is refused."""
    return fault_if(
        lambda found, outcomes, over: (
            over and outcomes.get(process) in answers and not certificates(found)
        ),
        "a good token is refused",
    )


def active_after(process, rules):
    """A certificate whose token was issued before a revocation counts after it."""

    def is_fault(found, outcomes, over):
        bounds = [kept.value for key, kept in contents(found) if key[1] == ("row", "d")]
        bounds += [bound for key, bound in found.items() if key[1:] == ("disk", "bound", "d")]
        reach = max(bounds, default=0) if "bound for certificates" in rules else 0
        active = [token for (token,), _ in certificates(found) if token.iat > reach]
        return over and outcomes.get(process) == "200" and active

    return fault_if(is_fault, "a certificate is active after its revocation was answered")


# tests/service/model_rows.rs stages the first of these on real servers, under the same numbers.


@row(
    1,
    "a token is replaced, and its issuer, who was away, enters its copy",
    "the replaced token is redeemed",
    without=["killed marks", "bounds"],
)
def _(s):
    return Scenario(
        cut(held(world("a", "b", "c"), T1, "a"), "a"),
        {
            "b.replace": (s.replace, "b", "d", "t2"),
            "net.mends": mend("a"),
            "a.supervisor": (s.supervise, "a"),
            "c.redeem": (s.redeem, "c", "c1", T1),
        },
        judged,
    )


@row(2, "two onboardings meet a stale lease", "both are answered 200", without=["lease by swap"])
def _(s):
    start = world("a", "b")
    put(start, ("device", "d"), Lease(Token("t0", "d", 90)), 290)
    start["now"] = 110
    return Scenario(
        start,
        {"a.onboard": (s.onboard, "a", "d", "t1"), "b.onboard": (s.onboard, "b", "d", "t2")},
        both_answered("a.onboard", "b.onboard"),
    )


@row(
    3,
    "a replacement and an onboarding of one device",
    "both are answered 200, for between two commands the lease has no end",
    without=["lease with end"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "a"),
        {"a.replace": (s.replace, "a", "d", "t2"), "b.onboard": (s.onboard, "b", "d", "t3")},
        both_answered("a.replace", "b.onboard"),
    )


@row(
    4,
    "a token is given back, the reply is lost, and it is given back again",
    "the second time it takes another's mark away",
    without=["withdraw by swap"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "a"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1, True),
            "a.supervisor": (s.supervise, "a"),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        fault_if(
            lambda found, outcomes, over: (
                certificates(found) and ("redis", ("used", T1)) not in found
            ),
            "a used token has no mark",
        ),
        lossy=("a.redeem",),
    )


@row(
    5,
    "an instance dies between mark and record, and is asked again after its start",
    "the token is burnt: it is used, and there is no certificate",
    without=["dead marks"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "b"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        refused("a.again"),
        after={"a.again": ("a.boot", "a.redeem")},
    )


@row(
    "5b",
    "the same, and the token is presented in three places at once",
    "the mark of an attempt that runs is taken over: two certificates",
    without=["one table"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "b"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "a.again": (s.redeem, "a", "a2", T1),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        judged,
    )


@row(
    6,
    "a mark arrives after it was withdrawn",
    "the token is burnt",
    without=["dead marks"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "b"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "a.supervisor": (s.supervise, "a"),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        refused("a.again"),
        after={"a.again": ("a.redeem", "a.supervisor")},
        lossy=("a.redeem",),
    )


@row(
    7,
    "two workers of one instance at the moment when Redis is lost",
    "Redis grants one and memory the other: two certificates",
    without=["one table"],
)
def _(s):
    return Scenario(
        held(world("a"), T1, "a"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "redis.dies": restarts(None),
            "a.worker": (s.lose, "a"),
            "a.supervisor": (s.supervise, "a"),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        judged,
        after={"a.worker": ("redis.dies",)},
    )


def mark_and_later_copy(s, token, skew, seconds):
    """b redeems; time passes; only then the token's issuer comes back and enters its copy."""
    start = cut(held(world("a", "b", "c"), token, "a"), "a")
    start["b", "skew"] = skew
    return Scenario(
        start,
        {
            "b.redeem": (s.redeem, "b", "b1", token),
            "time.passes": passes(seconds),
            "net.mends": mend("a"),
            "a.supervisor": (s.supervise, "a"),
            "c.redeem": (s.redeem, "c", "c1", token),
        },
        judged,
        after={
            "time.passes": ("b.redeem",),
            "net.mends": ("time.passes",),
            "c.redeem": ("a.supervisor",),
        },
    )


@row(
    8,
    "the clock of whoever sets the mark is ahead, and later the issuer enters its copy",
    "the mark ends before the token: two certificates",
    without=["long marks"],
)
def _(s):
    return mark_and_later_copy(s, T1, 250, 60)


@row(
    "8b",
    "the same with a token whose `iat` lies ahead, as a bound may make it",
    "the mark ends before the token: two certificates",
    without=["long marks ahead"],
)
def _(s):
    return mark_and_later_copy(s, T1._replace(iat=180), 0, 365)


@row(
    9,
    "an onboarding while the device's token is redeemed, under REENROLL=deny",
    "a device that has a certificate gets a token",
    without=["look again"],
    reenroll="deny",
)
def _(s):
    return Scenario(
        held(world("a"), T1, "a"),
        {"a.redeem": (s.redeem, "a", "a1", T1), "a.onboard": (s.onboard, "a", "d", "t2")},
        fault_if(
            lambda found, outcomes, over: (
                outcomes.get("a.onboard") == "200" and certificates(found)
            ),
            "a certificate and a token",
        ),
    )


@row(
    10,
    "redeemed from memory, then the instance is restarted, then Redis is back with the token",
    "another instance redeems it: two certificates",
    without=["enter recorded"],
)
def _(s):
    start = held(world("a", "b"), T1, "a")
    dump = contents(start)
    load(cut(start, "a"), (), None)
    start["b", "memory", "connection"] = start["b", "memory", "run"] = 2
    return Scenario(
        start,
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "a.crash": (s.crash, "a"),
            "redis.back": restarts(dump),
            "net.mends": mend("a"),
            "a.boot": (s.boot, "a"),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        judged,
        after={"a.crash": ("a.redeem",), "b.redeem": ("a.boot",)},
    )


@row(
    11,
    "the reply to an issue is lost",
    "409, while the lease names a token that is gone",
    without=["no resending"],
)
def _(s):
    def is_fault(found, outcomes, over):
        lease, kept = (found.get(("redis", key)) for key in (("device", "d"), ("token", T1)))
        return over and outcomes.get("a.onboard") == "409" and lease and not kept

    return Scenario(
        world("a"),
        {"a.onboard": (s.onboard, "a", "d", "t1"), "a.supervisor": (s.supervise, "a", 2)},
        fault_if(is_fault, "the device is locked out"),
        lossy=("a.onboard",),
    )


@row(
    12,
    "what was used in the outage is entered into an empty Redis that serves others",
    "the token stands there before its mark: two certificates",
    without=["marks first"],
)
def _(s):
    return Scenario(
        emptied(cut(certified(held(world("a", "b"), T1, "a"), T1, "a", "a0"), "a")),
        {
            "net.mends": mend("a"),
            "a.supervisor": (s.supervise, "a"),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        judged,
    )


@row(
    13,
    "a token is redeemed from memory while the return is under way",
    "it is on no list, and Redis still has the token: two certificates",
    without=["switch when told"],
)
def _(s):
    return Scenario(
        cut(held(world("a", "b"), T1, "a"), "a"),
        {
            "net.mends": mend("a"),
            "a.supervisor": (s.supervise, "a"),
            "a.redeem": (s.redeem, "a", "a1", T1),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        judged,
        after={"b.redeem": ("a.supervisor",)},
    )


@row(
    14,
    "Redis is back with the data of a second ago",
    "what was used before the outage is redeemed again",
    without=["enter older"],
)
def _(s):
    start = held(world("a", "b"), T1, "b")
    return Scenario(
        start,
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "redis.older": restarts(contents(start)),
            "a.supervisor": (s.supervise, "a"),
            "b.supervisor": (s.supervise, "b"),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        judged,
        after={"redis.older": ("a.redeem",), "b.redeem": ("a.supervisor", "b.supervisor")},
    )


@row(
    15,
    "under `none`, b has used a token, Redis is back empty, and only its issuer returns",
    "the issuer enters its copy: two certificates",
    without=["none keeps back"],
    outage_redeem="none",
)
def _(s):
    start = certified(held(world("a", "b", "c"), T1, "a"), T1, "b", "b0")
    return Scenario(
        emptied(cut(start, "a", "b")),
        {
            "net.mends": mend("a"),
            "a.supervisor": (s.supervise, "a"),
            "time.passes": passes(11),
            "c.redeem": (s.redeem, "c", "c1", T1),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        judged,
    )


@row(
    16,
    "a token that is still to be entered is presented to two other instances",
    "one is told that it is used, by a mark of the other that is then withdrawn",
)
def _(s):
    return Scenario(
        cut(held(world("a", "b", "c"), T1, "c", "unsent"), "c"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "b.redeem": (s.redeem, "b", "b1", T1),
            "net.mends": mend("c"),
            "c.supervisor": (s.supervise, "c"),
        },
        refused("b.redeem", ["401 used"]),
    )


@row(
    17,
    "a mark arrives late, when memory has granted the token under another serial",
    "the late mark passes for dead: two certificates",
    without=["dead by token", "one table", "marks over all"],
)
def _(s):
    start = held(world("a", "c"), T1, "a")
    start["c", "memory", "copy", T1] = "sent"
    return Scenario(
        cut(start, "c"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "net.cuts": event("a is cut off", lambda found: found.update({("a", "cut"): True})),
            "a.supervisor": (s.supervise, "a"),
            "a.again": (s.redeem, "a", "a2", T1),
            "net.mends": mend("a"),
            "net.mends c": mend("c"),
            "c.supervisor": (s.supervise, "c"),
            "a.third": (s.redeem, "a", "a3", T1),
        },
        judged,
        after={
            "net.cuts": ("a.redeem",),
            "a.again": ("net.cuts",),
            "net.mends": ("a.again",),
            "net.mends c": ("a.supervisor",),
            "a.third": ("c.supervisor",),
        },
        lossy=("a.redeem",),
    )


@row(
    18,
    "a kill, and a redemption that dies with its instance",
    "its dead mark is taken over after the kill was answered",
    without=["kill over all", "bounds"],
)
def _(s):
    return Scenario(
        cut(held(world("a", "b", "c"), T1, "c"), "c"),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "b.revoke": (s.revoke, "b", "d"),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "net.mends": mend("c"),
            "c.supervisor": (s.supervise, "c"),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        judged,
        after={
            "a.crash": ("b.revoke",),
            "net.mends": ("b.revoke",),
            "a.again": ("a.boot", "c.supervisor"),
        },
    )


@row(
    "18b",
    "a kill at the instance that redeems, between grant and signature",
    "a certificate is active after its revocation was answered",
    without=["kill seen", "bound for certificates"],
)
def _(s):
    return Scenario(
        held(world("a"), T1, "a"),
        {"a.redeem": (s.redeem, "a", "a1", T1), "a.revoke": (s.revoke, "a", "d")},
        active_after("a.revoke", s.rules),
    )


@row(
    19,
    "a token is killed here, entered by its issuer, and presented here after a restart",
    "the mark of the kill passes for a dead one",
    without=["killed is final", "bounds"],
)
def _(s):
    return Scenario(
        cut(held(world("a", "c"), T1, "c"), "c"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "net.mends": mend("c"),
            "c.supervisor": (s.supervise, "c"),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        judged,
        after={"a.crash": ("a.revoke",), "a.redeem": ("a.boot",)},
    )


def entered_by_two(s, dead_mark=False, again=False):
    """a has used a token and enters its mark; c enters its copy after that; b redeems meanwhile."""
    start = certified(held(world("a", "b", "c"), T1, "c"), T1, "a", "a0")
    start = emptied(cut(start, "a", "c"))
    if dead_mark:
        put(start, ("used", T1), Mark("b", "b0"))
    processes = {
        "b.redeem": (s.redeem, "b", "b1", T1),
        "net.mends a": mend("a"),
        "a.supervisor": (s.supervise, "a"),
        "net.mends c": mend("c"),
        "c.supervisor": (s.supervise, "c"),
    }
    after = {"net.mends c": ("a.supervisor",)}
    if again:
        processes["b.again"] = (s.redeem, "b", "b2", T1)
        after["b.again"] = ("b.redeem", "c.supervisor")
    return Scenario(start, processes, judged, after=after)


@row(
    20,
    "a mark is entered while another's tentative mark stands",
    "that one is withdrawn, and the token that c enters has no mark: two certificates",
    without=["marks over all"],
)
def _(s):
    return entered_by_two(s, again=True)


@row(
    "20b",
    "a mark and the token are entered between the commands of a redemption",
    "the mark was looked at before the token: two certificates",
    without=["mark last"],
)
def _(s):
    return entered_by_two(s)


@row(
    21,
    "the same, while a dead mark is taken over",
    "that it could be taken over decides: two certificates",
    without=["mark last again"],
)
def _(s):
    return entered_by_two(s, dead_mark=True)


@row(
    "21b",
    "a replacement, while a dead mark of its old token is taken over",
    "the old token is signed for after its replacement was answered",
    without=["row again"],
)
def _(s):
    start = world("a", "b", now=60)
    put(start, ("used", T1), Mark("b", "b0"), 360)
    start["now"] = 100
    return Scenario(
        held(start, T1, "a"),
        {"a.replace": (s.replace, "a", "d", "t2"), "b.redeem": (s.redeem, "b", "b1", T1)},
        judged,
    )


def kill_of_unknown(s, start, token):
    """a kills; b enters a token of the device that nobody else knew of; it is presented to c."""
    return Scenario(
        start,
        {
            "a.revoke": (s.revoke, "a", "d"),
            "net.mends": mend("b"),
            "b.supervisor": (s.supervise, "b"),
            "c.redeem": (s.redeem, "c", "c1", token),
        },
        judged,
        after={"c.redeem": ("b.supervisor",)},
    )


@row(
    22,
    "a kill, and a token of the device that another instance has issued from memory",
    "that token is redeemed after the kill was answered",
    without=["bounds"],
)
def _(s):
    start = held(held(world("a", "b", "c"), T1, "a"), T2, "b", "unsent")
    return kill_of_unknown(s, cut(start, "b"), T2)


@row(
    "22b",
    "a kill without a mark, a dead mark, and the issuer's copy",
    "the dead mark is taken over after the kill was answered",
    without=["bounds"],
    lacking=["killed marks"],
)
def _(s):
    start = cut(held(world("a", "b", "c"), T1, "c"), "c")
    put(start, ("used", T1), Mark("a", "a0"), 360)
    return Scenario(
        start,
        {
            "b.revoke": (s.revoke, "b", "d"),
            "net.mends": mend("c"),
            "c.supervisor": (s.supervise, "c"),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        judged,
        after={"net.mends": ("b.revoke",)},
    )


@row(
    23,
    "a revocation, while a redemption is under way elsewhere",
    "its certificate is active after the revocation was answered",
    without=["bound for certificates"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "a"),
        {"a.revoke": (s.revoke, "a", "d"), "b.redeem": (s.redeem, "b", "b1", T1)},
        active_after("a.revoke", s.rules),
    )


# Bounds.


@row(
    24,
    "a kill, then a Redis from an older file and a restart of the killer",
    "the kill is forgotten: the token is redeemed",
    without=["bound on disk"],
)
def _(s):
    start = held(world("a", "b"), T1, "b")
    return Scenario(
        start,
        {
            "a.revoke": (s.revoke, "a", "d"),
            "redis.older": restarts(contents(start)),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "b.supervisor": (s.supervise, "b"),
            "a.redeem": (s.redeem, "a", "a1", T1),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        judged,
        after={
            "redis.older": ("a.revoke",),
            "a.crash": ("redis.older",),
            "a.redeem": ("a.boot",),
            "b.redeem": ("a.boot", "b.supervisor"),
        },
    )


@row(
    25,
    "an onboarding in the second of a kill",
    "its token is dead when it is handed out",
    without=["born alive"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "a"),
        {
            "a.revoke": (s.revoke, "a", "d"),
            "b.onboard": (s.onboard, "b", "d", "t2"),
            "b.redeem": (s.redeem, "b", "b1", "t2"),
        },
        refused("b.redeem"),
        after={"b.onboard": ("a.revoke",)},
    )


@row(
    "25b",
    "a replacement and the token that it hands out",
    "the bound that killed the old token kills the new one",
    without=["born alive"],
)
def _(s):
    return Scenario(
        held(world("a", "b"), T1, "a"),
        {"a.replace": (s.replace, "a", "d", "t2"), "b.redeem": (s.redeem, "b", "b1", "t2")},
        refused("b.redeem"),
    )


@row(
    "25c",
    "a kill between the look at a stale lease and its take-over",
    "the token that takes the lease over is dead when it is handed out",
    without=["row at take-over"],
)
def _(s):
    def raise_bound(found):
        there = any(key[1][0] == "token" for key, _ in contents(found))
        found["judge", "bound came first"] = not there
        put(found, ("row", "d"), 115)

    start = world("a")
    put(start, ("device", "d"), Lease(Token("t0", "d", 90)), 290)
    start["now"] = 110
    return Scenario(
        start,
        {
            "a.onboard": (s.onboard, "a", "d", "t2"),
            "a.redeem": (s.redeem, "a", "a1", "t2"),
            "bound": event("another instance raises the bound", raise_bound),
        },
        fault_if(
            lambda found, outcomes, over: (
                outcomes.get("a.redeem") == "401 used" and found.get(("judge", "bound came first"))
            ),
            "a token that was dead is handed out",
        ),
    )


def kill_by_lagging_clock(s, skew):
    start = cut(held(world("a", "b", "c"), T2, "b", "unsent"), "b")
    start["a", "skew"] = skew
    return kill_of_unknown(s, start, T2)


@row(
    26,
    "the killer's clock is 3 s behind that of whoever has issued from memory",
    "the bound does not reach the token",
    without=["bound with margin"],
)
def _(s):
    return kill_by_lagging_clock(s, -3)


@row(
    "26b",
    "the killer's clock is 6 s behind",
    "clocks differ by more than the margin, and the kill misses a token that nobody else knows of",
)
def _(s):
    return kill_by_lagging_clock(s, -6)


@row(
    27,
    "two kills in one second, and between them a token from memory, above the first bound",
    "the second kill does not reach it",
    without=["bound past row"],
)
def _(s):
    above = T2._replace(iat=106)
    start = cut(held(world("a", "b", "c"), above, "b", "unsent"), "b")
    start["b", "disk", "bound", "d"] = 105
    put(start, ("row", "d"), 105)
    return kill_of_unknown(s, start, above)


def replacement_and_redemption(s, **more):
    processes = {"a.replace": (s.replace, "a", "d", "t2"), "b.redeem": (s.redeem, "b", "b1", T1)}
    return Scenario(held(world("a", "b"), T1, "a"), processes | more, judged)


@row(
    28,
    "a replacement, while a redemption is under way elsewhere",
    "the old token is signed for after its replacement was answered",
    without=["under way"],
)
def _(s):
    return replacement_and_redemption(s)


@row(
    "28b",
    "the same, looking at the mark before the bound is raised",
    "a redemption comes between the two",
    without=["bound before look"],
)
def _(s):
    return replacement_and_redemption(s)


@row(
    "28c",
    "the same, and the redeemer stands still for 31 s",
    "the replacement takes it for dead, and then it signs",
    without=["signed in time"],
)
def _(s):
    return replacement_and_redemption(s, **{"time.passes": passes(31)})


@row(
    "28d",
    "a replacement and an onboarding of one device at one instance",
    "the onboarding is answered 200, and the replacement kills its token and is answered 409",
    without=["spares the later"],
)
def _(s):
    def is_fault(found, outcomes, over):
        lost = outcomes.get("a.replace") == "409" and outcomes.get("a.onboard") == "200"
        handed_out = [token for (token,), _ in facts(found, "judge", "answered")]
        killed = [found.get(("a", "memory", "entry", token)) for token in handed_out if token != T1]
        return over and lost and ("killed", "killed") in killed

    return Scenario(
        held(world("a"), T1, "a"),
        {"a.replace": (s.replace, "a", "d", "t2"), "a.onboard": (s.onboard, "a", "d", "t3")},
        fault_if(is_fault, "200 for a token that is dead, and 409 for its killer"),
    )


@row(
    "28e",
    "the same as 28, with a second token of the device, which has no lease",
    "the replacement does not know whose mark to look at, and the other token is signed for after it",
)
def _(s):
    start = held(world("a", "b"), T2, "b")
    del start["redis", ("device", "d")]
    return Scenario(
        held(start, T1, "a"),
        {"a.replace": (s.replace, "a", "d", "t3"), "b.redeem": (s.redeem, "b", "b1", T2)},
        judged,
    )


@row(
    "28f",
    "the same as 28, and an onboarding after the replacement was refused",
    "the lease passes for stale: the device gets a token, and the redemption signs",
    without=["redeemed has lease"],
)
def _(s):
    def is_fault(found, outcomes, over):
        granted = found.get(("b", "memory", "entry", T1)) == ("used", "b1")
        signed = ("b", "disk", "certificate", T1) in found
        return outcomes.get("c.onboard") == "200" and granted and not signed

    scenario = replacement_and_redemption(s, **{"c.onboard": (s.onboard, "c", "d", "t3")})
    return scenario._replace(
        world=held(world("a", "b", "c"), T1, "a"),
        check=fault_if(is_fault, "the device has a token, and its redemption is under way"),
        after={"c.onboard": ("a.replace",)},
    )


@row(
    29,
    "the same as 28 in a cluster, where the row lies on another node",
    "the row was read before the mark was set",
    without=["two trips"],
    cluster=True,
)
def _(s):
    return replacement_and_redemption(s)


@row(
    "29b",
    "the same, if the bound and the look at the mark are sent together",
    "the mark was looked at before the bound was raised",
    without=["awaited bound"],
    cluster=True,
)
def _(s):
    return replacement_and_redemption(s)


# A Redis that forgets what it had acknowledged, under OUTAGE_REDEEM=none.


def is_settled(me):
    """The instance serves from the Redis that serves now, and no request of it is under way."""

    def is_so(found):
        if not serves(found, me) or found[me, "memory", "connection"] != found["run"]:
            return False
        entries = facts(found, me, "memory", "entry")
        signing = [t for (t,), (state, _) in entries if state in ("running", "used")]
        recorded = [t for (t,), _ in facts(found, me, "disk", "certificate")]
        return not facts(found, me, "memory", "todo") and set(signing) <= set(recorded)

    return is_so


def forgets(s, more=(), after=(), start=None, token=T1):
    """b has used a token, and Redis restarts from an older file. b, if it notices, enters its mark
    within the grace; then 11 s pass. a is asked all the while."""
    start = start or held(world("a", "b"), token, "a")
    dump = contents(start)
    b_is_settled = is_settled("b")
    processes = {
        "redis.older": restarts(dump),
        "a.supervisor": (s.supervise, "a"),
        "b.supervisor": (s.supervise, "b"),
        "time.passes": passes(11, lambda found: s.has("watch") and not b_is_settled(found)),
        "a.redeem": (s.redeem, "a", "a1", token),
    }
    after = {"a.redeem": ("redis.older",), "time.passes": ("redis.older",)} | dict(after)
    return Scenario(certified(start, token, "b", "b0"), processes | dict(more), judged, after=after)


@row(
    30,
    "b has used a token, Redis is back from an older file, and a is asked",
    "a grants it before b has entered its mark",
    without=["grace"],
    outage_redeem="none",
)
def _(s):
    return forgets(s)


@row(
    "30b",
    "the same, and nobody asks b for anything",
    "b does not notice that Redis was restarted, and never enters its mark",
    without=["watch"],
    outage_redeem="none",
)
def _(s):
    return forgets(s, {"a.worker": (s.lose, "a")}, {"a.worker": ("redis.older",)})


@row(
    "30c",
    "the same, and a's request waits for a connection while Redis is lost and found",
    "it goes out on a new connection, before anybody has entered anything",
    without=["own line"],
    outage_redeem="none",
)
def _(s):
    return forgets(s, after={"a.redeem": ()})


@row(
    "30d",
    "the same, and a is restarted after Redis",
    "a process that has just started finds no Redis changed, and gives no grace",
    without=["grace at start"],
    outage_redeem="none",
)
def _(s):
    return forgets(
        s,
        {"a.crash": (s.crash, "a"), "a.boot": (s.boot, "a")},
        {"a.crash": ("redis.older",), "a.redeem": ("a.boot",), "a.supervisor": ("a.boot",)},
    )


@row(
    "30e",
    "the same, and b is gone",
    "nobody is left who could enter the mark: two certificates",
    outage_redeem="none",
)
def _(s):
    start = held(world("a", "b"), T1, "a")
    dump = contents(start)
    return Scenario(
        certified(start, T1, "b", "b0"),
        {
            "redis.older": restarts(dump),
            "a.supervisor": (s.supervise, "a"),
            "time.passes": passes(11),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        judged,
    )


@row(
    "30f",
    "the same as 30, of a token that has replaced another, and so is dated ahead",
    "it passes for one that was issued after the return",
    without=["dated waits"],
    outage_redeem="none",
)
def _(s):
    dated = T1._replace(iat=106)
    start = held(world("a", "b"), dated, "b")
    start["b", "disk", "bound", "d"] = 105
    put(start, ("row", "d"), 105)
    return forgets(s, start=start, token=dated)


def fails_over(s, old_is_stopped):
    """A replica without b's mark becomes the master, and a goes there. The old one, to which b is
    connected, takes writes until it is demoted; b then enters what it has recorded."""

    def over(found):
        found |= {("other", key[1]): kept for key, kept in contents(found)}
        found["other run"], found["run"] = 1, 2
        del found["a", "memory", "connection"]
        found["a", "memory", "mode"] = "suspect"
        found["a", "memory", "epoch"] = 1

    def demoted(found):
        for key in [key for key in found if key[0] == "other" or key == "other run"]:
            del found[key]
        return Crash("redis")

    b_is_settled = is_settled("b")
    return Scenario(
        held(world("a", "b"), T1, "a"),
        {
            "redis.fails over": event("fail-over", over),
            "redis.demoted": event("the old master is demoted", demoted),
            "a.supervisor": (s.supervise, "a"),
            "b.supervisor": (s.supervise, "b", 2),
            "b.redeem": (s.redeem, "b", "b1", T1),
            "time.passes": passes(11, lambda found: old_is_stopped and not b_is_settled(found)),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        judged,
        after={
            "redis.demoted": ("redis.fails over",),
            "time.passes": ("redis.fails over",),
            "a.redeem": ("redis.fails over",),
        },
    )


@row(
    31,
    "a fail-over whose old master takes writes for some seconds more",
    "both masters grant the token",
    without=["grace"],
    outage_redeem="none",
)
def _(s):
    return fails_over(s, True)


@row(
    "31b",
    "the same, and the old master takes writes for longer than the grace lasts",
    "both masters grant the token; `min-replicas-to-write` in Redis is the remedy",
    outage_redeem="none",
)
def _(s):
    return fails_over(s, False)


@row(
    "31c",
    "b uses a token and is gone, and a replica that lags becomes the master",
    "it has not heard of the mark: two certificates",
    without=["awaited replicas"],
    outage_redeem="none",
    wait_replicas=True,
)
def _(s):
    def sync(found):
        found |= {("replica", key[1]): kept for key, kept in contents(found)}

    def over(found):
        replica = [(("redis", key[1]), kept) for key, kept in found.items() if key[0] == "replica"]
        load(found, replica, 2)
        return Crash("redis")

    start = held(world("a", "b"), T1, "a")
    sync(start)
    return Scenario(
        start,
        {
            "b.redeem": (s.redeem, "b", "b1", T1),
            "redis.syncs": event("the replica catches up", sync),
            "redis.fails over": event("fail-over", over),
            "a.supervisor": (s.supervise, "a"),
            "time.passes": passes(11),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        judged,
        after={"redis.fails over": ("b.redeem",), "time.passes": ("a.supervisor",)},
    )


# What was answered with 200 can be redeemed.


@row(
    32,
    "under `none`, the commands of an issue are lost",
    "memory hands out a token that it will neither redeem nor enter",
    without=["fresh"],
    outage_redeem="none",
)
def _(s):
    a_is_settled = is_settled("a")
    return Scenario(
        world("a"),
        {
            "a.onboard": (s.onboard, "a", "d", "t1"),
            "a.supervisor": (s.supervise, "a", 3),
            "time.passes": passes(11, lambda found: not a_is_settled(found)),
            "a.redeem": (s.redeem, "a", "a1", "t1"),
        },
        refused("a.redeem"),
        after={"time.passes": ("a.onboard",), "a.redeem": ("time.passes",)},
        lossy=("a.onboard",),
    )


@row(
    "32b",
    "the same of a replacement",
    "the old token is dead, and the new one cannot be redeemed",
    without=["fresh"],
    outage_redeem="none",
)
def _(s):
    a_is_settled = is_settled("a")
    return Scenario(
        held(world("a"), T1, "a"),
        {
            "a.replace": (s.replace, "a", "d", "t2"),
            "a.supervisor": (s.supervise, "a", 3),
            "time.passes": passes(11, lambda found: not a_is_settled(found)),
            "a.redeem": (s.redeem, "a", "a1", "t2"),
        },
        refused("a.redeem"),
        after={"time.passes": ("a.replace",), "a.redeem": ("time.passes",)},
        lossy=("a.replace",),
    )


@row(
    "32c",
    "under `none`, the entry of a token from memory gets no reply",
    "it may have reached Redis, so it is not entered again; if it did not, it is burnt",
    without=["same run"],
    outage_redeem="none",
)
def _(s):
    a_is_settled = is_settled("a")
    return Scenario(
        held(world("a"), T1, "a", "unsent"),
        {
            "a.supervisor": (s.supervise, "a", 3),
            "time.passes": passes(11, lambda found: not a_is_settled(found)),
            "a.redeem": (s.redeem, "a", "a1", T1),
        },
        refused("a.redeem"),
        after={"a.redeem": ("time.passes",)},
        lossy=("a.supervisor",),
    )


@row(
    33,
    "a token from memory is presented to another instance just after the outage",
    "401 for a token that is about to be entered",
    without=["not known yet"],
)
def _(s):
    return Scenario(
        cut(held(world("a", "b"), T1, "a", "unsent"), "a", "b"),
        {
            "net.mends a": mend("a"),
            "net.mends b": mend("b"),
            "a.supervisor": (s.supervise, "a"),
            "b.supervisor": (s.supervise, "b"),
            "b.redeem": (s.redeem, "b", "b1", T1),
        },
        refused("b.redeem"),
        after={"b.redeem": ("b.supervisor",)},
    )


# A person deletes a token from Redis.


@row(
    34,
    "a token is deleted and presented; then Redis is lost, and it is presented again",
    "its issuer redeems it from memory",
    without=["deletions"],
)
def _(s):
    def deletes(found):
        found.pop(("redis", ("token", T1)), None)
        found["judge", "dead", T1] = True

    return Scenario(
        held(world("a"), T1, "a"),
        {
            "person.deletes": event("a person deletes the token", deletes),
            "a.redeem": (s.redeem, "a", "a1", T1),
            "redis.dies": restarts(None),
            "a.worker": (s.lose, "a"),
            "a.supervisor": (s.supervise, "a"),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        judged,
        after={
            "a.redeem": ("person.deletes",),
            "redis.dies": ("a.redeem",),
            "a.worker": ("redis.dies",),
        },
    )


@row(
    "34b",
    "a token that is still to be entered is presented to another instance",
    "if everybody judged so, it would be burnt there",
    without=["deletions by witness"],
)
def _(s):
    return Scenario(
        cut(held(world("a", "b"), T1, "a", "unsent"), "a"),
        {
            "b.redeem": (s.redeem, "b", "b1", T1),
            "net.mends": mend("a"),
            "a.supervisor": (s.supervise, "a"),
            "b.again": (s.redeem, "b", "b2", T1),
        },
        refused("b.again"),
        after={"b.again": ("b.redeem", "a.supervisor")},
    )


@row(
    "34c",
    "Redis has lost a token in an outage, and gets it back from a better file",
    "its issuer has taken it for deleted",
    without=["deletions if present"],
    outage_redeem="none",
)
def _(s):
    start = held(world("a"), T1, "a")
    dump = contents(start)
    start["a", "memory", "copy", T1] = "sent"
    return Scenario(
        emptied(start),
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "redis.restored": restarts(dump),
            "a.supervisor": (s.supervise, "a"),
            "time.passes": passes(11),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        refused("a.again"),
        after={
            "redis.restored": ("a.redeem",),
            "time.passes": ("a.supervisor",),
            "a.again": ("time.passes",),
        },
    )


@row(
    "34d",
    "a token from memory is presented while it is being entered",
    "it is missed, then confirmed, and taken for deleted: it is burnt",
    without=["deletions after"],
)
def _(s):
    start = held(world("a"), T1, "a", "unsent")
    return Scenario(
        start,
        {
            "a.supervisor": (s.supervise, "a"),
            "a.redeem": (s.redeem, "a", "a1", T1),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        refused("a.again"),
        after={"a.again": ("a.redeem", "a.supervisor")},
    )


@row(
    "34e",
    "the same under `none`, and its turn comes while it is presented",
    "it is passed over and never entered: it is burnt",
    without=["copies wait"],
    outage_redeem="none",
)
def _(s):
    return Scenario(
        held(world("a"), T1, "a", "unsent"),
        {
            "a.supervisor": (s.supervise, "a", 2),
            "a.redeem": (s.redeem, "a", "a1", T1),
            "time.passes": passes(11, lambda found: not is_settled("a")(found)),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        refused("a.again"),
        after={"time.passes": ("a.redeem",), "a.again": ("time.passes",)},
    )


# Two processes under one instance id: A runs on a copy of a's folder.


def clone(s, first=(), more=(), after=()):
    start = held(world("a", "A"), T1, "a")
    put(start, ("instance", "a"), ("a", 0), 30)
    start["A", "memory", "name not own"] = True
    del start["a", "memory", "copy", T1]
    if s.has("name first"):
        cut(start, "A")
        del start["A", "cut"]
    processes = {
        "a.redeem": (s.redeem, "a", "a1", T1),
        "A.start": (s.supervise, "A") if s.has("name first") else (s.claim_name, "A"),
        "A.redeem": (s.redeem, "A", "A1", T1),
    }
    return Scenario(start, processes | dict(more), judged, after=dict(after))


@row(
    35,
    "a clone of a folder is started beside its origin, and asked when it has its name",
    "it takes a mark of the other for a dead one of its own: two certificates",
    without=["own name"],
)
def _(s):
    return clone(s, after={"A.redeem": ("A.start",)})


@row(
    "35b",
    "the same, and the clone is asked before it has a name of its own",
    "the origin takes the clone's mark for a dead one: two certificates",
    without=["name first"],
)
def _(s):
    return clone(s)


@row(
    "35c",
    "the same, when the origin has not renewed its lease of the id",
    "the clone has the id, and takes the origin's mark for a dead one: two certificates",
)
def _(s):
    return clone(s, more={"time.passes": passes(31)})


@row(
    "35d",
    "no clone: an instance dies between mark and record, and is started at once",
    "its own lease makes it a stranger to its marks: the token is burnt",
    without=["name waits"],
)
def _(s):
    start = held(world("a", "b"), T1, "b")
    put(start, ("instance", "a"), ("a", 1), 30)
    return Scenario(
        start,
        {
            "a.redeem": (s.redeem, "a", "a1", T1),
            "a.crash": (s.crash, "a"),
            "a.boot": (s.boot, "a"),
            "time.passes": passes(31),
            "a.names": (s.claim_name, "a"),
            "a.again": (s.redeem, "a", "a2", T1),
        },
        refused("a.again"),
        after={
            "time.passes": ("a.boot",),
            "a.names": ("time.passes",),
            "a.again": ("a.names", "a.redeem"),
        },
    )


# What no rule mends.


@row(
    36,
    "a kill at one instance, while the issuer of the token is cut off and redeems from memory",
    "what is cut off cannot know: under `own` any copy, under `none` what it issued meanwhile",
    outage_redeem="none",
)
def _(s):
    return Scenario(
        cut(held(world("a", "b"), T1, "b", "unsent"), "b"),
        {"a.revoke": (s.revoke, "a", "d"), "b.redeem": (s.redeem, "b", "b1", T1)},
        judged,
    )


if __name__ == "__main__":
    ROWS.main(__doc__)
