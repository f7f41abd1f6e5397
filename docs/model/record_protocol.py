"""The protocol of the shared record: its rules, and what each instance does.

The world of an instance is laid out as in the token protocol. `(a, "disk", "record")` is the whole
record of a, `(a, "memory", "unsent")` the names of what it has still to tell Redis.
"""

from typing import NamedTuple

from explore import WAIT, Crash
from record_merge import (
    Certificate,
    Record,
    Registration,
    Revocation,
    Row,
    merge_records,
    merge_revocations,
    merge_rows,
    order,
)
from server import DEL, GET, SETNX, SWAP, Command, contents, put, value_of
from token_ground import Line, arrives, clock, facts, here, trip, unanswered

CLOCKS_APART = 5  # A bound reaches so many seconds past the clock of whoever raises it.
LEASE_LIFE = 300
HOLDER_LIFE = 600  # Long enough for every instance to merge what the holder names.
STALE = 300  # Whoever has read nothing for so long reads before Redis serves its onboardings.
HOUR = 3600

RULES = {
    "sent again": "what could not be sent, or was not confirmed, is sent again",
    "taken first": "what is to be sent is taken off the list before it is looked up",
    "announced again": "at its start an instance announces what it signed in the last day",
    "rows announced again": "and the rows and revocations that it changed",
    "whole at start": "at its start an instance compares its whole record with Redis",
    "whole after a gap": "and when entries of the stream are gone that it has not read",
    "whole after a restart": "and when Redis has another run id",
    "whole after an overflow": "and when there was more to tell than the list of it holds",
    "whole every day": "and every day",
    "cursor first": "where the stream ends is read before the whole is compared",
    "put back": "what Redis lacks is put there when the whole is compared",
    "by merge": "rows and revocations are read, merged and compare-and-set, never set blindly",
    "mac": "what is not signed with the CA's own key counts as absent",
    "overwritten": "and is overwritten with what is right",
    "bound": "a revocation raises the device's bound: what was paid for up to it is revoked",
    "bound on disk": "the bound is on the revoker's disk before it is answered",
    "paid is inherited": "what is renewed was paid for when its predecessor was",
    "paid before row": "when something is paid for is noted before the device's row is read",
    "paid above bound": "or it is just above the bound that the row has, if that is later",
    "holder": "an onboarding asks Redis for the device's newest certificate",
    "holder before lease": "the certificate and its holder are in Redis before the lease is freed",
    "holder is proven": "a holder counts if its certificate is known, here or in Redis, and active",
    "read before serving": "who has read nothing for five minutes reads before Redis serves it",
    "own limit": "what has passed an instance's own limit is neither entered nor put by it",
    "true clock": "nothing is pruned by a clock that is an hour off that of Redis",
    "block as seen": "a block is lifted up to the latest one that whoever lifts it has seen",
    "version above": "a change takes a version above each that was seen of the device",
    "tombstone": "a forgotten registration leaves its version behind",
    "tombstone stays": "for as long as what it forgot would have lived",
    "puts are announced": "whoever puts a value announces it then, on the same server",
    "begun first": "a registration that was begun later counts, whatever was noted on an older one",
    "content last": "of two changes of one version and one instance the content decides",
}

OPEN = {}


class Forged(NamedTuple):
    """A value with a wrong mac, from somebody who can write to Redis."""

    value: object


class Sharing:
    def __init__(self, without=(), also=(), keep=(), reenroll="allow"):
        assert RULES.keys() >= set(without) and OPEN.keys() >= set(also), (without, also)
        self.rules = (RULES.keys() - set(without)) | set(also)
        self.keep = dict(keep)  # instance -> how long what has ended is kept
        self.reenroll = reenroll

    def has(self, rule):
        return rule in self.rules

    # The record on this instance's disk.

    def record(self, world, me):
        return world[me, "disk", "record"]

    def merge_in(self, world, me, news):
        """Adds what is known now to the record, but for what has passed this instance's limit."""
        if self.has("own limit"):
            fit = [found for found in news.certificates if not self.has_passed(world, me, found)]
            news = news._replace(certificates=frozenset(fit))
        record = merge_records(self.record(world, me), news, self.merge_rows)
        world[me, "disk", "record"] = record

    def merge_rows(self, one, other):
        rules = self.has("begun first"), self.has("content last")
        return merge_rows(one, other, lambda registration: order(registration, *rules))

    def has_passed(self, world, me, certificate):
        return certificate.ends + self.keep.get(me, 10**9) < clock(world, me)

    def change_row(self, world, me, device, change):
        row = change(self.record(world, me).row(device))
        rows = dict(self.record(world, me).rows) | {device: row}
        world[me, "disk", "record"] = self.record(world, me)._replace(rows=frozenset(rows.items()))
        self.note_unsent(world, me, ("row", device))

    def note_unsent(self, world, me, *names):
        unsent = world.get((me, "memory", "unsent"), ())
        unsent += tuple(name for name in names if name not in unsent)
        room = world.get((me, "room"), len(unsent))
        if len(unsent) > room and self.has("whole after an overflow"):
            world[me, "memory", "day"] = True
        world[me, "memory", "unsent"] = unsent[:room]

    def valid(self, value):
        """What was read, if its mac is right."""
        if isinstance(value, Forged):
            return None if self.has("mac") else value.value
        return value

    # Enrolment, under REENROLL=deny or not, and renewal.

    def enrol(self, me, device, serial):
        """`200` with a certificate, or `409`."""
        line, paid = yield arrives(me, "enrolment", lambda w: self.begin(w, me, device, serial))
        row, held = None, None
        if line:
            replies = yield from trip(
                line,
                SETNX(("lease", device), serial, LEASE_LIFE),
                GET(("holder", device)),
                self.read_row(device, serial),
            )
            if not unanswered(replies):
                won, held, row = replies
                if not won:
                    return "409"
                if held and self.has("holder") and (yield from self.counts(line, held, device)):
                    yield from trip(line, SWAP(("lease", device), serial, None))
                    return "409"
        if not self.has("paid before row"):
            paid = yield here("time", lambda w: clock(w, me))
        if row and self.has("paid above bound"):
            paid = max(paid, self.valid(row).c + 1) if self.valid(row) else paid
        signed = Certificate(serial, device, paid)
        answer = yield here("signed", lambda w: self.sign(w, me, signed, line))
        if line and (answer == "409" or not self.has("holder before lease")):
            yield from trip(line, SWAP(("lease", device), serial, None))
        return answer

    def begin(self, world, me, device, serial):
        last_read = world.get((me, "memory", "last read"), world["now"])
        stale = self.has("read before serving") and world["now"] - last_read > STALE
        reaches = self.reaches(world, me) and not stale
        return Line(me, None) if reaches else None, clock(world, me)

    def reaches(self, world, me):
        if world["run"] is None or (me, "cut") in world:
            return False
        world[me, "memory", "connection"] = world["run"]
        return True

    def read_row(self, device, serial):
        """What reads the row before a revocation raises its bound was paid for before that."""

        def act(world):
            world["judge", "paid", serial] = device
            return value_of(world, ("row", device))

        return Command(f"GET row:{device}", act)

    def counts(self, line, serial, device):
        """Whether a holder is an active certificate of the device. One that is not known here is
        read and merged."""
        me = line.me
        if not self.has("holder is proven"):
            return True
        known = yield here("known?", lambda w: self.record(w, me).certificate(serial))
        if known is None:
            (value,) = yield from trip(line, GET(("certs", serial)))
            known = None if unanswered([value]) else self.valid(value)
            if known:
                news = Record(frozenset([known]))
                yield here("merged", lambda w: self.merge_in(w, me, news))

        def is_active(world):
            return known is not None and known in self.record(world, me).active(device)

        return (yield here("active?", is_active))

    def sign(self, world, me, certificate, line):
        record = self.record(world, me)
        if self.reenroll == "deny" and record.active(certificate.device):
            return "409"
        world[me, "disk", "record"] = merge_records(record, Record(frozenset([certificate])))
        self.note_unsent(world, me, ("certs", certificate.serial))
        world["judge", "paid", certificate.serial] = certificate.device
        world["judge", "answered", certificate.serial] = certificate
        if line:
            world["judge", "through Redis", certificate.serial] = True
        return "200"

    def renew(self, me, old, serial):
        def act(world):
            record = self.record(world, me)
            before = record.certificate(old)
            if before is None or record.is_revoked(before):
                return "401"
            world["judge", "heir", serial] = old
            paid = before.paid if self.has("paid is inherited") else clock(world, me)
            return self.sign(world, me, Certificate(serial, before.device, paid), None)

        return (yield arrives(me, "renewed", act))

    # Revocation, and other changes of a row.

    def revoke(self, me, device):
        """`200`, or `200 here` where Redis is not told yet."""
        begun = yield arrives(me, "revocation", lambda w: self.raise_bound(w, me, device))
        line, victims = begun
        told = False
        if line:
            name = ("row", device)
            announcing = [XADD((name,))] if self.has("puts are announced") else []
            commands = self.put(me, name), *announcing, GET(("holder", device))
            replies = yield from trip(line, *commands)
            told = not unanswered(replies)
            if told and replies[-1]:
                yield from self.counts(line, replies[-1], device)
        return (yield here("answered", lambda w: self.judge_revoked(w, me, victims, told)))

    def raise_bound(self, world, me, device):
        bound = clock(world, me) + CLOCKS_APART

        def raised(row):
            return row._replace(t=max(row.t, bound), c=max(row.c, bound))

        if self.has("bound") and self.has("bound on disk"):
            self.change_row(world, me, device, raised)
        elif self.has("bound"):
            world[me, "memory", "bound", device] = bound
            self.note_unsent(world, me, ("row", device))
        else:
            mine = self.record(world, me).active(device)
            revoked = [(found.serial, Revocation(clock(world, me))) for found in mine]
            news = Record(revocations=frozenset(revoked))
            world[me, "disk", "record"] = merge_records(self.record(world, me), news)
            self.note_unsent(world, me, *(("revoked", serial) for serial, _ in revoked))
        paid = [serial for (serial,), of in facts(world, "judge", "paid") if of == device]
        return Line(me, None) if self.reaches(world, me) else None, tuple(paid)

    def judge_revoked(self, world, me, victims, told):
        """What was paid for, anywhere, when the bound was raised is dead with this answer."""
        for serial in victims:
            if told or self.record(world, me).certificate(serial):
                world["judge", "dead", serial] = True
        return "200" if told else "200 here"

    def block(self, me, device):
        def act(world):
            def blocked(row):
                return row._replace(blocked=self.version(world, me, row))

            self.change_row(world, me, device, blocked)
            world["judge", "blocked", device] = self.record(world, me).row(device).blocked
            return "200"

        return (yield arrives(me, "block", act))

    def unblock(self, me, device):
        def act(world):
            def lifted(row):
                up_to = row.blocked if self.has("block as seen") else self.version(world, me, row)
                return row._replace(lifted=max(row.lifted, up_to))

            seen = self.record(world, me).row(device).blocked
            self.change_row(world, me, device, lifted)
            world["judge", "lifted", device] = seen
            return "200"

        return (yield arrives(me, "unblock", act))

    def version(self, world, me, row):
        seen = max(row.blocked, row.lifted, row.registration.version)
        return max(clock(world, me), seen + 1 if self.has("version above") else 0)

    def register(self, me, device, content):
        """Registers the device, or forgets its registration where there is no content."""

        def act(world):
            def registered(row):
                name, before = world[me, "disk", "id"], row.registration.begun
                begun = max(clock(world, me), before + 1 if self.has("version above") else 0)
                made = Registration(self.version(world, me, row), name, content, begun)
                gone = content is None and not self.has("tombstone")
                return row._replace(registration=Registration() if gone else made)

            self.change_row(world, me, device, registered)
            world["judge", "registered", device] = content
            return "200"

        return (yield arrives(me, f"registration: {content}", act))

    def note(self, me, device, note):
        """Changes the note of a registration, and leaves the rest of it as it is known here."""

        def act(world):
            def noted(row):
                version, name = self.version(world, me, row), world[me, "disk", "id"]
                changed = {"version": version, "instance": name, "note": note}
                return row._replace(registration=row.registration._replace(**changed))

            if self.record(world, me).row(device).registration.content is None:
                return "400"
            self.change_row(world, me, device, noted)
            return "200"

        return (yield arrives(me, f"note: {note}", act))

    def tidy_rows(self, me, device):
        """A row without anything that still matters goes, here and in Redis."""

        def act(world):
            row = self.record(world, me).row(device)
            tombstone = row.registration.version and row.registration.content is None
            if tombstone and self.has("tombstone stays"):
                return False
            rows = dict(self.record(world, me).rows)
            rows.pop(device, None)
            record = self.record(world, me)._replace(rows=frozenset(rows.items()))
            world[me, "disk", "record"] = record
            return True

        if (yield arrives(me, "rows tidied", act)):
            yield from trip(Line(me, None), DEL(("row", device)))

    # The sharing thread.

    def share(self, me, start=0):
        """Runs from a start of the instance to its end."""
        while True:
            work = yield arrives(me, "sharing", lambda w: self.next_work(w, me, start))
            if work == "whole":
                yield from self.compare_whole(me)
            elif work == "read":
                yield from self.read(me)
            elif work == "nothing new":
                yield here("up to date", lambda w: w.pop((me, "memory", "last read")) and None)
            else:
                yield from self.send(me, work)

    def next_work(self, world, me, start):
        if world.get((me, "starts"), 0) != start or not self.reaches(world, me):
            return WAIT
        newest = newest_id(world)
        run = world.get((me, "memory", "run"))
        if run is None and not self.has("whole at start"):
            run = world[me, "memory", "run"] = world["run"]
            world[me, "memory", "cursor"] = newest
        restarted = run != world["run"] and self.has("whole after a restart")
        if run is None or restarted or world.pop((me, "memory", "day"), False):
            return "whole"
        if world.get((me, "memory", "unsent")):
            return self.begin_send(world, me)
        if newest != world[me, "memory", "cursor"]:
            return "read"
        return "nothing new" if (me, "memory", "last read") in world else WAIT

    def send(self, me, names):
        """Recorded, answered, then shared: certificate, holder, stream; then the lease is freed."""
        line = Line(me, None)
        commands = [command for name in names for command in self.puts(me, name)]
        replies = yield from trip(line, *commands, XADD(names))
        leases = yield here("sent", lambda w: self.end_send(w, me, names, unanswered(replies)))
        if leases and self.has("holder before lease"):
            yield from trip(line, *(SWAP(lease, serial, None) for lease, serial in leases))

    def begin_send(self, world, me):
        """What changes from now on is noted again."""
        names = world[me, "memory", "unsent"]
        if self.has("taken first"):
            del world[me, "memory", "unsent"]
        return names

    def end_send(self, world, me, names, lost):
        if lost and self.has("sent again"):
            self.note_unsent(world, me, *names)
            return ()
        if not self.has("taken first"):
            unsent = world.get((me, "memory", "unsent"), ())
            left = tuple(name for name in unsent if name not in names)
            world[me, "memory", "unsent"] = left
        signed = [self.record(world, me).certificate(key) for kind, key in names if kind == "certs"]
        return tuple((("lease", found.device), found.serial) for found in signed if found)

    def puts(self, me, name):
        holder = [HOLDER(self, me, name[1])] if name[0] == "certs" else []
        return [self.put(me, name), *holder]

    def put(self, me, name):
        """Puts what is known here where it belongs: a certificate if there is none; what can
        change by reading, merging and compare-and-set, until nobody comes between, and what
        stands then is merged here."""

        def act(world):
            value, stands = self.value(world, me, name), value_of(world, name)
            right = self.valid(stands)
            if value is None or (
                stands is not None and right is None and not self.has("overwritten")
            ):
                return
            if right is not None and self.has("by merge"):
                value = self.merge_values(name, right, value)
            put(world, name, value)
            if self.has("by merge"):
                self.merge_in(world, me, self.news({name: value}))

        return Command(f"put {':'.join(name)}", act)

    def merge_values(self, name, one, other):
        if name[0] == "certs":
            return one
        return self.merge_rows(one, other) if name[0] == "row" else merge_revocations(one, other)

    def value(self, world, me, name):
        kind, key = name
        record = self.record(world, me)
        if kind == "certs":
            found = record.certificate(key)
            kept_back = found and self.has("own limit") and self.has_passed(world, me, found)
            return None if kept_back else found
        if kind == "revoked":
            return dict(record.revocations).get(key)
        bound = world.get((me, "memory", "bound", key), 0)
        return merge_rows(record.row(key), Row(t=bound, c=bound))

    def read(self, me):
        """What the stream names is read, merged and durable, and then the cursor moves."""
        line = Line(me, None)
        (reply,) = yield from trip(line, XREAD(me))
        if unanswered([reply]):
            return
        names, last, gap = reply
        if gap and self.has("whole after a gap"):
            yield from self.compare_whole(me)
            return
        replies = yield from trip(line, *(GET(name) for name in names))
        if unanswered(replies):
            return
        news = self.news(dict(zip(names, replies)))

        def merged(world):
            self.merge_in(world, me, news)
            world[me, "memory", "cursor"] = last
            world.pop((me, "memory", "last read"), None)

        yield here("merged", merged)

    def news(self, values):
        """What was read, as a record."""
        right = [(name, self.valid(value)) for name, value in values.items()]
        right = [(name, value) for name, value in right if value is not None]
        return Record(
            frozenset(value for (kind, _), value in right if kind == "certs"),
            frozenset((key, value) for (kind, key), value in right if kind == "revoked"),
            frozenset((key, value) for (kind, key), value in right if kind == "row"),
        )

    def compare_whole(self, me):
        """Everything in Redis is merged; what it lacks is put there."""
        line = Line(me, None)
        commands = [LAST, ALL] if self.has("cursor first") else [ALL, LAST]
        replies = yield from trip(line, *commands)
        if unanswered(replies):
            return
        last, values = replies if self.has("cursor first") else replies[::-1]
        lacking = yield here("merged", lambda w: self.merge_whole(w, me, last, dict(values)))
        commands = [command for name in lacking for command in self.puts(me, name)]
        if lacking and self.has("puts are announced"):
            commands.append(XADD(lacking))
        yield from trip(line, *commands)

    def merge_whole(self, world, me, last, values):
        self.merge_in(world, me, self.news(values))
        world[me, "memory", "run"] = world[me, "memory", "connection"]
        world[me, "memory", "cursor"] = last
        world.pop((me, "memory", "last read"), None)
        if not self.has("put back"):
            return ()
        names = all_names(self.record(world, me))
        return tuple(n for n in names if self.valid(values.get(n)) != self.value(world, me, n))

    def prune(self, me):
        """What ended longer ago than this instance keeps leaves its disk, and Redis."""

        def act(world):
            record = self.record(world, me)
            if self.has("true clock") and abs(clock(world, me) - world["now"]) >= HOUR:
                return ()
            old = [found for found in record.certificates if self.has_passed(world, me, found)]
            kept = record.certificates - frozenset(old)
            world[me, "disk", "record"] = record._replace(certificates=kept)
            return tuple(sorted(found.serial for found in old))

        for serial in (yield arrives(me, "pruned", act)):
            yield from trip(Line(me, None), DEL(("certs", serial)))

    # Starts and ends.

    def crash(self, me):
        def act(world):
            for key in [key for key in world if key[:2] == (me, "memory")]:
                del world[key]
            world[me, "down"] = True
            return Crash(me)

        yield arrives(me, "crashes", act)

    def boot(self, me):
        def load(world):
            if (me, "down") not in world:
                return WAIT
            del world[me, "down"]
            world[me, "starts"] = world.get((me, "starts"), 0) + 1
            self.note_unsent(world, me, *self.recent(self.record(world, me)))

        yield here("starts", load)

    def recent(self, record):
        """What was signed or changed in the last day; in these rows that is everything."""
        kinds = ["certs"] if self.has("announced again") else []
        kinds += ["revoked", "row"] if self.has("rows announced again") else []
        return [name for name in all_names(record) if name[0] in kinds]


def all_names(record):
    names = [("certs", found.serial) for found in record.certificates]
    names += [("revoked", serial) for serial, _ in record.revocations]
    return sorted(names + [("row", device) for device, _ in record.rows])


# The stream, and all that is in Redis.


def stream(world):
    return value_of(world, ("stream",)) or ()


def newest_id(world):
    return stream(world)[-1][0] if stream(world) else 0


def XADD(names):
    def act(world):
        world["last id"] = world.get("last id", 0) + 1
        put(world, ("stream",), stream(world) + ((world["last id"], tuple(names)),))

    return Command(f"XADD {' '.join(map(str, names))}", act)


def XREAD(me):
    """The names in the entries after the cursor, the last id, and whether entries are missing."""

    def act(world):
        cursor = world.get((me, "memory", "cursor"), 0)
        later = [named for number, named in stream(world) if number > cursor]
        names = tuple(sorted({name for named in later for name in named}))
        missing = cursor != 0 and cursor not in [number for number, _ in stream(world)]
        return names, newest_id(world), missing

    return Command("XREAD", act)


def HOLDER(sharing, me, serial):
    def act(world):
        found = sharing.value(world, me, ("certs", serial))
        if found:
            put(world, ("holder", found.device), serial, HOLDER_LIFE)

    return Command(f"SET holder {serial}", act)


LAST = Command("XREVRANGE COUNT 1", newest_id)
ALL = Command(
    "HKEYS, HMGET, HGETALL",
    lambda world: tuple(
        (key[1], kept.value)
        for key, kept in sorted(contents(world), key=str)
        if key[1][0] in ("certs", "revoked", "row")
    ),
)
