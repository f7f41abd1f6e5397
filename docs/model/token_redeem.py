"""Redeeming: the table of attempts, one round trip, the last looks, the signature."""

from typing import NamedTuple

from server import AGE, DEL, EXISTS, GET, REPLICATED, SETNX, SWAP
from token_ground import (
    KILLED,
    MARK_MARGIN,
    TO_SIGN,
    TTL,
    Ground,
    Line,
    Mark,
    arrives,
    clock,
    epoch_of,
    facts,
    here,
    serves,
    trip,
    unanswered,
)


class Attempt(NamedTuple):
    """One presentation of a token. The serial is the one that its certificate would bear."""

    me: str
    serial: str
    token: object
    line: Line = None
    mark: Mark = None
    life: int = 0
    since: int = 0
    copy: str = None  # What is known of this instance's own copy when the attempt begins.


class Redeem(Ground):
    def redeem(self, me, serial, token, fails=False):
        """`200` with a certificate, `401 …`, `409` or `503`. `fails`: it cannot be signed."""
        if isinstance(token, str):
            token = yield self.handed_out(token)
        attempt = Attempt(me, serial, token)
        begun = yield arrives(me, f"{token} is presented", lambda w: self.begin_redeem(w, attempt))
        if isinstance(begun, str):
            return begun
        attempt = begun
        if attempt.line:
            decided = yield from self.consume(attempt)
            if decided == "dated":
                decided = yield here("how old?", lambda w: self.age_of_dated(w, attempt))
            if decided == "granted" and self.wait_replicas:
                decided = yield from self.await_replicas(attempt)
            if decided == "granted":
                decided = yield here("granted", lambda w: self.grant(w, attempt))
            if decided != "granted":
                return (yield from self.refuse(attempt, decided))
        return (yield from self.sign(attempt, fails))

    def begin_redeem(self, world, attempt):
        """In one look under one lock: what is known here, and which store is to decide."""
        me, serial, token = attempt[:3]
        if ("judge", "dead", token) in world or ("judge", "dead", token, me) in world:
            world["judge", "late", serial] = True
        now = clock(world, me)
        if token.iat + TTL <= now:
            return "401 expired"
        entry = self.own_entry(world, me, token) if self.has("one table") else None
        if entry and entry[0] != "unknown" or self.is_dead_here(world, me, token):
            return "401 used"
        if self.is_certified(world, me, token.device):
            return "409"
        if not serves(world, me):
            return self.begin_from_memory(world, attempt)
        if entry or self.is_in_grace(world, me, token):
            return "503"
        world[me, "memory", "entry", token] = ("running", serial)
        mark = Mark(world[me, "memory", "id"], serial)
        return attempt._replace(
            line=self.line(world, me),
            mark=mark,
            life=self.mark_life(token, now),
            since=world["now"],
            copy=world.get((me, "memory", "copy", token)),
        )

    def begin_from_memory(self, world, attempt):
        me, serial, token = attempt[:3]
        copy = world.get((me, "memory", "copy", token))
        if world[me, "memory", "mode"] != "memory" or copy is None:
            return "503"
        if self.keeps_back(world, me, copy):
            return "503"
        world[me, "memory", "entry", token] = ("used", serial)
        world[me, "memory", "todo", "mark", token] = True
        return attempt

    def is_in_grace(self, world, me, token):
        """Another instance may still have to enter the mark that this Redis has lost."""
        until, issued_by = world.get((me, "memory", "grace"), (0, 0))
        return self.outage_redeem == "none" and world["now"] < until and token.iat <= issued_by

    def mark_life(self, token, now):
        if not self.has("long marks"):
            return token.iat + TTL - now
        return TTL + MARK_MARGIN + (max(0, token.iat - now) if self.has("long marks ahead") else 0)

    def consume(self, attempt):
        """`granted`; `lost` where nobody knows; or why not."""
        token, key = attempt.token, ("used", attempt.token)
        replies = yield from self.mark_and_look(attempt, SETNX(key, attempt.mark, attempt.life))
        if unanswered(replies):
            return "lost"
        there, bound, shown, age = replies
        if shown is None or shown == attempt.mark:
            return self.decide(attempt, there, bound, shown)
        state = yield here("whose mark?", lambda w: self.state_of(w, attempt, shown, age))
        if state != "dead":
            return state
        replies = yield from trip(
            attempt.line,
            SWAP(key, shown, attempt.mark, attempt.life),
            EXISTS(("token", token)),
            GET(("row", token.device)),
            GET(key),
        )
        if unanswered(replies):
            return "lost"
        taken, there, again, last = replies
        bound = again if self.has("row again") else bound
        last = attempt.mark if taken and not self.has("mark last again") else last
        return self.decide(attempt, there, bound, last)

    def mark_and_look(self, attempt, set_mark):
        """Sets the mark if there is none. Returns: token there, bound, mark, age of the mark."""
        token, line = attempt.token, attempt.line
        key = ("used", token)
        there, row, shown = (
            EXISTS(("token", token)),
            GET(("row", token.device)),
            (GET(key), AGE(key)),
        )
        if not self.has("mark last"):
            replies = yield from trip(line, set_mark, *shown, there, row)
            return [*replies[3:], *replies[1:3]]
        if not self.cluster:
            return (yield from trip(line, set_mark, there, row, *shown))[1:]
        if not self.has("two trips"):
            # The row's node may be the faster one.
            replies = yield from trip(line, row, set_mark, there, *shown)
            return [replies[2], replies[0], *replies[3:]]
        replies = yield from trip(line, set_mark)
        return replies if unanswered(replies) else (yield from trip(line, there, row, *shown))

    def decide(self, attempt, there, bound, shown):
        if shown is None:
            return "lost"  # It was withdrawn just now.
        if shown != attempt.mark:
            return "used"
        if self.has("bounds") and attempt.token.iat <= (bound or 0):
            return "dead"
        if not there:
            return "unknown"
        return "dated" if attempt.token.iat == (bound or 0) + 1 else "granted"

    def age_of_dated(self, world, attempt):
        """What is dated just after its device's past lies ahead, and may be older than it says. By the
        time when the attempt began."""
        until, _ = world.get((attempt.me, "memory", "grace"), (0, 0))
        in_grace = self.outage_redeem == "none" and attempt.since < until
        own = world.get((attempt.me, "memory", "copy", attempt.token)) == "confirmed"
        return "doubted" if in_grace and not own and self.has("dated waits") else "granted"

    def state_of(self, world, attempt, shown, age):
        """What an older mark means. No other attempt for the token runs here: this one began."""
        me, token = attempt.me, attempt.token
        own = shown.by == world[me, "memory", "id"] and self.has("dead marks")
        if (me, "memory", "kept name") in world and shown.by == world[me, "memory", "kept name"]:
            return "young"
        if not own or (shown.serial == KILLED and self.has("killed is final")):
            return "used"
        if (me, "memory", "name not own") in world and self.has("own name"):
            return "used"
        if self.has("dead by token"):
            recorded = (me, "disk", "certificate", token) in world
        else:
            serials = [serial for _, serial in facts(world, me, "disk", "certificate")]
            recorded = shown.serial in serials
        return "used" if recorded else "dead"

    def await_replicas(self, attempt):
        replies = yield from trip(attempt.line, REPLICATED(("used", attempt.token)))
        if unanswered(replies):
            return "lost"
        return "granted" if replies[0] else "unsafe"

    def grant(self, world, attempt):
        me, serial, token = attempt[:3]
        running = world.get((me, "memory", "entry", token)) == ("running", serial)
        if self.has("one table") and not running:
            return "used"  # It was killed here meanwhile.
        world[me, "memory", "entry", token] = ("used", serial)
        if not serves(world, me) or attempt.line.epoch not in (None, epoch_of(world, me)):
            world[me, "memory", "todo", "mark", token] = True
        return "granted"

    def refuse(self, attempt, why):
        me = attempt.me
        if why == "lost":
            yield here("nobody knows", lambda w: self.note_unknown(w, attempt))
            yield from self.lose(me)
            return "503"
        if why in ("dead", "unknown", "unsafe", "doubted"):
            yield from self.withdraw(attempt)
        return (yield here("refused", lambda w: self.release(w, attempt, why)))

    def note_unknown(self, world, attempt):
        me, serial, token = attempt[:3]
        if world.get((me, "memory", "entry", token)) == ("running", serial):
            world[me, "memory", "entry", token] = ("unknown", serial)
        world[me, "memory", "todo", "withdraw", token, attempt.mark] = True

    def release(self, world, attempt, why):
        me, serial, token = attempt[:3]
        if world.get((me, "memory", "entry", token)) in (("running", serial), ("used", serial)):
            del world[me, "memory", "entry", token]
        world.pop((me, "memory", "todo", "mark", token), None)
        if why == "unknown":
            return self.judge_unknown(world, attempt)
        return "503" if why in ("young", "unsafe", "doubted") else "401 used"

    def judge_unknown(self, world, attempt):
        """Redis does not know the token: it was deleted, or lost, or is still to be entered."""
        me, token = attempt.me, attempt.token
        copy = world.get((me, "memory", "copy", token))
        away = not serves(world, me) or attempt.line.epoch not in (None, epoch_of(world, me))
        confirmed = attempt.copy if self.has("deletions after") else copy
        witness = confirmed == "confirmed" or not self.has("deletions by witness")
        if not self.has("deletions if present"):
            witness, away = witness or copy is not None, False
        if self.has("deletions") and witness and not away:
            world.pop((me, "memory", "copy", token), None)
            world[me, "memory", "entry", token] = ("killed", KILLED)
            return "401 unknown"
        settling = world["now"] < world.get((me, "memory", "settling"), 0)
        entering = copy is not None and (
            self.outage_redeem == "own" or (me, "memory", "todo", "copy", token) in world
        )
        if entering or away or (settling and self.has("not known yet")):
            return "503"
        return "401 unknown"

    def withdraw(self, attempt):
        replies = yield from trip(attempt.line, self.withdrawal(attempt.token, attempt.mark))
        if unanswered(replies):
            yield self.note(attempt.me, "withdraw", attempt.token, attempt.mark)
            yield from self.lose(attempt.me)

    def withdrawal(self, token, mark):
        key = ("used", token)
        return SWAP(key, mark, None) if self.has("withdraw by swap") else DEL(key)

    def sign(self, attempt, fails):
        """Under the record's lock the last looks, the signature and the record are one step."""
        answer = yield here("signed", lambda w: self.record(w, attempt, fails))
        if answer == "200":
            if attempt.line:
                yield from trip(attempt.line, *self.removal(attempt.token))
            return answer
        if attempt.line:
            yield from self.withdraw(attempt)
        yield here("given back", lambda w: self.release(w, attempt, "not signed"))
        return answer

    def record(self, world, attempt, fails):
        me, serial, token = attempt[:3]
        entry = world.get((me, "memory", "entry", token))
        killed = entry and entry[0] == "killed" or self.is_dead_here(world, me, token)
        if self.has("kill seen") and killed:
            return "401 used"
        if self.has("one table") and (me, "disk", "certificate", token) in world:
            return "401 used"
        if self.is_certified(world, me, token.device):
            return "409"
        late = attempt.line and world["now"] - attempt.since > TO_SIGN
        if fails or (late and self.has("signed in time")):
            return "503"
        self.judge_signature(world, attempt)
        world[me, "disk", "certificate", token] = serial
        return "200"

    def judge_signature(self, world, attempt):
        token = attempt.token
        faults = {
            (
                "judge",
                "replaced",
                token,
            ): f"{token} is signed for after its replacement",
            ("judge", "late", attempt.serial): f"{token} is redeemed after its kill",
            ("judge", "certificate", token): f"two certificates for {token}",
        }
        for key, fault in faults.items():
            if key in world:
                world["judge", "fault"] = fault
        world["judge", "certificate", token] = attempt.serial
