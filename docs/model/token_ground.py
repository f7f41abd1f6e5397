"""The ground of the token protocol: its times, its rules, its values, and how commands are sent.

What an instance `a` holds is in the world under `("a", "memory", …)`, which a crash empties, and
`("a", "disk", …)`, which it does not. What no instance can see but the judge of a row must know is
under `("judge", …)`.
"""

from typing import NamedTuple

from explore import GONE, LOST, WAIT, Step
from server import on_other_server

# Seconds.
TTL = 300  # A token lives so long,
MARK_MARGIN = 60  # and its mark so much longer.
CLOCKS_APART = 5  # A bound reaches so far past the clock of whoever raises it.
UNDER_WAY = 30  # A mark that is younger may be of a redemption that still runs.
TO_SIGN = 25  # A redemption that takes longer gives up.
GRACE = 10  # For so long after a return of Redis nothing is judged that others may have to enter.
PATIENCE = 2  # An issue that still runs is not older.
NAME_LEASE = 30  # An instance id is a process' own for so long, unless it is renewed.

KILLED = "killed"

# The rules of the protocol. A row leaves one out, or several that cover for each other.
RULES = {
    "one table": "a process has one table of attempts, whichever store it asks",
    "no resending": "an issue is not sent again; what is read decides, not the reply of an NX",
    "lease by swap": "a stale lease is taken over by compare-and-set",
    "lease with end": "a lease is set together with its end",
    "withdraw by swap": "a mark is withdrawn by compare-and-delete",
    "dead marks": "an older mark of this instance of which nothing came is dead, and is taken over",
    "dead by token": "that nothing came of it is looked up by the token's hash, not by the serial",
    "killed is final": "a mark that says `killed` is never dead",
    "mark last": "the mark is read last, after the token was seen",
    "mark last again": "so it is after a dead mark was taken over",
    "row again": "the row is read again after a dead mark was taken over",
    "long marks": "a mark lives for its token's whole lifetime and a minute",
    "long marks ahead": "and besides for as long as the token's `iat` lies ahead",
    "killed marks": "a token that is killed gets a mark before its key goes",
    "kill over all": "the mark of a kill goes over whatever mark stands",
    "spares the later": "a kill spares a token above its bound, which was issued after it",
    "kill seen": "before it signs, a redemption looks whether the token was killed here",
    "look again": "an onboarding that has the lease looks for a certificate once more",
    "enter recorded": "an instance that returns enters a mark for each token that its record names",
    "enter older": "and for those that were used before the outage, too",
    "marks first": "marks are entered before tokens, and of a used token only the mark",
    "marks over all": "a mark that is entered goes over whatever mark stands",
    "copies wait": "a copy that is presented while it is to be entered is entered if that fails",
    "switch when told": "Redis serves again only if nothing was added since the last list",
    "none keeps back": "under `none` memory neither redeems nor enters what may have reached Redis",
    "fresh": "after an issue that was lost or refused memory hands out one that was never sent",
    "bounds": "a kill raises the device's bound: a token whose `iat` is not above it is dead",
    "bound on disk": "the bound is on the killer's disk before it is in Redis",
    "bound with margin": "the bound reaches five seconds past the killer's clock",
    "bound past row": "it reaches past each `iat` that the bound before may have caused, too",
    "bound before look": "a replacement raises the bound, then looks for a running redemption",
    "born alive": "a token that would not be above the bound is issued anew above it",
    "row at take-over": "the row is read again after a stale lease was taken over",
    "redeemed has lease": "what the bound kills has its lease while a young mark may be of a redemption",
    "bound for certificates": "a revocation's bound holds for certificates, by when they were paid",
    "under way": "a replacement is refused while a young mark may be of a running redemption",
    "grace": "after the return of a Redis that may forget, `none` is 503 for older tokens, 10 s",
    "dated waits": "so does one whose `iat` is the bound and one, which lies ahead, if it is not its own",
    "not known yet": "for 10 s after an outage an unknown token is 503, not 401",
    "watch": "an instance that nobody asks notices within 5 s that Redis was restarted",
    "deletions": "a token that is gone from Redis was deleted, and is dead",
    "deletions by witness": "only the instance that had Redis' confirmation of it judges so",
    "deletions after": "and only if it had that before the attempt began",
    "deletions if present": "and only if it was not away since",
    "own name": "of two processes under one instance id the later one draws another",
    "two trips": "in a cluster the row is read in a trip of its own, after the mark was set",
    "awaited bound": "in a cluster the bound's reply is awaited before the mark is looked at",
    "own line": "an operation speaks only over connections of the time in which it began",
    "signed in time": "a redemption signs only while its mark is young",
    "same run": "`none` enters a copy again into the run of Redis that gave no reply to its entry",
    "grace at start": "the grace is given at a start, too, unless the run id is the last one seen",
    "awaited replicas": "with REDIS_WAIT_REPLICAS a mark counts once the replicas have it",
    "name first": "a process serves from Redis only under an instance id that is its own",
    "name waits": "an id that is in use is kept: its marks are 503 until its lease has ended",
}

# Rules that the program does not have. Each mends a row that breaks without it.
OPEN = {}


class Token(NamedTuple):
    name: str
    device: str
    iat: int

    def __str__(self):
        return f"{self.name}@{self.iat}"


class Mark(NamedTuple):
    """By which instance, and for the certificate of which serial; or `killed`."""

    by: str
    serial: str

    def __str__(self):
        return f"'{self.by} {self.serial}'"


class Lease(NamedTuple):
    """What stands under a device's key."""

    token: Token
    has_end: bool = True

    def __str__(self):
        return str(self.token)


class Line(NamedTuple):
    """The connections of an instance in one epoch: from one loss of Redis to the next."""

    me: str
    epoch: int


def here(label, act):
    """A step within one instance: under a lock of its own, or on its disk."""
    return Step(label, act)


def arrives(me, label, act):
    """The first step of what is asked of an instance. It waits while the instance is down."""
    return Step(label, lambda world: WAIT if (me, "down") in world else act(world))


def ask(line, command):
    def act(world):
        run = world.get((line.me, "memory", "connection"))
        if line.epoch is not None and line.epoch != epoch_of(world, line.me):
            return GONE
        if run is not None and run == world["run"]:
            return command.act(world)
        if run is not None and run == world.get("other run"):
            return on_other_server(world, command.act)
        return GONE

    return Step(command.label, act, "ask", command.act)


def trip(line, *commands):
    """Commands that are written together, and their replies. After a lost one none comes."""
    replies = []
    for command in commands:
        if LOST in replies:
            replies.append((yield Step(command.label, command.act, "sent", command.act)))
        elif GONE in replies:
            replies.append(GONE)
        else:
            replies.append((yield ask(line, command)))
    return replies


def unanswered(replies):
    return LOST in replies or GONE in replies


def clock(world, me):
    return world["now"] + world.get((me, "skew"), 0)


def epoch_of(world, me):
    return world.get((me, "memory", "epoch"), 0)


def serves(world, me):
    """Redis serves this instance's requests."""
    return world[me, "memory", "mode"] == "redis"


def facts(world, *start):
    """The rest of each key that begins so, and its value."""
    length = len(start)
    return sorted((key[length:], value) for key, value in world.items() if key[:length] == start)


def of_device(world, me, kind, device):
    """The tokens of a device that stand under `(me, kind…, token)`."""
    return [token for (token,), _ in facts(world, me, *kind) if token.device == device]


class Ground:
    """Instances of one version and one configuration."""

    def __init__(
        self,
        without=(),
        also=(),
        outage_redeem="own",
        reenroll="allow",
        cluster=False,
        wait_replicas=False,
    ):
        assert RULES.keys() >= set(without) and OPEN.keys() >= set(also), (without, also)
        self.rules = (RULES.keys() - set(without)) | set(also)
        self.outage_redeem = outage_redeem
        self.reenroll = reenroll
        self.cluster = cluster
        self.wait_replicas = wait_replicas and self.has("awaited replicas")

    def has(self, rule):
        return rule in self.rules

    def line(self, world, me):
        return Line(me, epoch_of(world, me) if self.has("own line") else None)

    def own_entry(self, world, me, token):
        """What the record, and else the table of attempts, knows of the token: (state, serial)."""
        if (me, "disk", "certificate", token) in world:
            return ("used", world[me, "disk", "certificate", token])
        return world.get((me, "memory", "entry", token))

    def own_bound(self, world, me, device):
        return world.get((me, "disk", "bound", device), 0)

    def is_dead_here(self, world, me, token):
        return self.has("bounds") and token.iat <= self.own_bound(world, me, token.device)

    def is_certified(self, world, me, device):
        """Under REENROLL=deny: the device has a certificate, as far as this instance knows."""
        return self.reenroll == "deny" and of_device(world, me, ("disk", "certificate"), device)

    def keeps_back(self, world, me, copy):
        """Under OUTAGE_REDEEM=none: a copy that is not memory's alone. That it was sent to the run
        of Redis that is there now does no harm: this one has the mark of whoever redeemed it."""
        if self.outage_redeem == "own" or not self.has("none keeps back") or copy == "unsent":
            return False
        to_this_run = copy == f"sent to {world.get((me, 'memory', 'connection'))}"
        return not (to_this_run and self.has("same run"))

    def note(self, me, *work):
        """Something that Redis is still to be told."""

        def act(world):
            world[(me, "memory", "todo", *work)] = True

        return here(f"noted: {work[0]}", act)

    def lose(self, me):
        """The connections are closed. Until fresh ones show what it was, Redis does not serve here
        and memory redeems nothing. Whoever comes second finds that done."""

        def act(world):
            if not serves(world, me):
                return
            world[me, "memory", "mode"] = "suspect"
            world[me, "memory", "epoch"] = epoch_of(world, me) + 1
            del world[me, "memory", "connection"]
            for (token,), state in facts(world, me, "memory", "copy"):
                if state == "confirmed":
                    world[me, "memory", "copy", token] = "sent"

        yield arrives(me, "Redis is lost", act)
