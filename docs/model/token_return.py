"""Redis comes back: what an instance enters before Redis serves it again. Starts and ends."""

from explore import GONE, WAIT, Crash
from server import GET, MERGE, SET, SETNX
from token_ground import (
    GRACE,
    MARK_MARGIN,
    NAME_LEASE,
    TTL,
    Ground,
    Lease,
    Line,
    Mark,
    arrives,
    clock,
    facts,
    here,
    serves,
    trip,
    unanswered,
)

ORDER = ("mark", "withdraw", "remove", "copy")
NOT_ANY_MORE = ["not any more"]


class Return(Ground):
    def supervise(self, me, turns=1):
        """The supervisor: brings Redis back and tidies up, as often as the row has use for it."""
        for _ in range(turns):
            cause = yield arrives(me, "supervisor", lambda w: self.cause(w, me))
            if cause == "tidy":
                yield from self.tidy_up(me)
                continue
            if cause == "unnoticed":
                yield from self.lose(me)
            yield from self.bring_back(me)

    def cause(self, world, me):
        if not serves(world, me):
            return "lost"
        if self.has("watch") and world[me, "memory", "connection"] != world["run"]:
            return "unnoticed"
        return "tidy" if self.works(dict(world), me, False, ()) else WAIT

    def bring_back(self, me):
        while True:
            connected = yield here("connected", lambda w: self.connect(w, me))
            if connected is None:
                continue
            full, forgot = connected
            if self.has("name first") and not (yield from self.claim_name(me)):
                continue
            if full and self.has("bounds") and not (yield from self.enter_bounds(me)):
                continue
            if (yield from self.enter_all(me, full, forgot)):
                return

    def connect(self, world, me):
        """Whether everything is to be entered again, and whether this Redis may have forgotten."""
        if world["run"] is None or (me, "cut") in world:
            if world[me, "memory", "mode"] == "memory":
                return WAIT
            world[me, "memory", "mode"] = "memory"
            return None
        world[me, "memory", "connection"] = run = world["run"]
        last = world.get((me, "memory", "run"))
        full = world[me, "memory", "mode"] == "memory" or last != run
        if last is None and self.has("grace at start"):
            last = world.get((me, "disk", "run"), "none")
        return full, last not in (None, run)

    def enter_bounds(self, me):
        bounds = yield here("bounds", lambda w: tuple(facts(w, me, "disk", "bound")))
        for (device,), bound in bounds:
            replies = yield from trip(Line(me, None), MERGE(("row", device), bound, max))
            if unanswered(replies):
                return False

            def merged(world):
                world[me, "disk", "bound", device] = replies[0]

            yield here("merged", merged)
        return True

    def enter_all(self, me, full, forgot):
        """Enters what Redis does not know until nothing is left; then it serves. False: it was
        lost again."""
        done = ()
        while True:
            works = yield here("list", lambda w: self.list_or_switch(w, me, full, forgot, done))
            if not works:
                return True
            for work in works:
                replies = yield from self.enter(me, work)
                if unanswered(replies):
                    return False
                forgot = forgot or (full and work[0] == "mark" and replies[0] is None)
                yield here("entered", lambda w: self.note_entered(w, me, work, replies))
                done += () if replies == NOT_ANY_MORE else (work,)
            if not self.has("switch when told"):
                yield here("switched", lambda w: self.switch(w, me, full, forgot))
                return True

    def list_or_switch(self, world, me, full, forgot, done):
        """Under one lock: nothing is added between the look at the list and the switch."""
        works = self.works(world, me, full, done)
        if not works:
            self.switch(world, me, full, forgot)
        return works

    def switch(self, world, me, full, forgot):
        world[me, "memory", "mode"] = "redis"
        world[me, "memory", "run"] = world[me, "disk", "run"] = world[me, "memory", "connection"]
        if full:
            world[me, "memory", "settling"] = world["now"] + GRACE
        if forgot and self.has("grace"):
            world[me, "memory", "grace"] = (world["now"] + GRACE, clock(world, me))

    def tidy_up(self, me):
        """What was left to do is done while Redis serves."""
        for work in (yield here("list", lambda w: self.works(w, me, False, ()))):
            replies = yield from self.enter(me, work)
            if unanswered(replies):
                yield from self.lose(me)
                return
            yield here("entered", lambda w: self.note_entered(w, me, work, replies))

    def works(self, world, me, full, done):
        """What is to be entered now. What is not to be any more is dropped; a copy that is being
        presented waits, for nobody knows yet whether it is used."""
        found = {work for work, _ in facts(world, me, "memory", "todo")}
        if full:
            found |= {("mark", token) for token in self.used_here(world, me)}
            found |= {("copy", token) for (token,), _ in facts(world, me, "memory", "copy")}
        order = ORDER if self.has("marks first") else ("copy", *ORDER)
        fit = {work for work in found if self.is_fit(world, me, work)} - set(done)
        for work in found - fit:
            self.drop(world, me, work)
        return tuple(sorted(fit, key=lambda work: (order.index(work[0]), work)))

    def used_here(self, world, me):
        entries = facts(world, me, "memory", "entry")
        tokens = [token for (token,), (state, _) in entries if state in ("used", "killed")]
        if self.has("enter recorded"):
            tokens += [token for (token,), _ in facts(world, me, "disk", "certificate")]
        if not self.has("enter older"):
            tokens = [token for token in tokens if (me, "memory", "todo", "mark", token) in world]
        return tokens

    def is_fit(self, world, me, work):
        """Whether a piece of work is still to be done, by what is true now."""
        kind, token = work[:2]
        if kind == "mark":
            return self.mark_for(world, me, token) is not None
        if kind != "copy":
            return True
        copy, entry = world.get((me, "memory", "copy", token)), self.own_entry(world, me, token)
        spent = (entry and entry[0] != "unknown") and self.has("marks first")
        if copy is None or spent or self.is_dead_here(world, me, token):
            return False
        return not self.keeps_back(world, me, copy)

    def drop(self, world, me, work):
        world.pop((me, "memory", "todo", *work), None)
        entry = world.get((me, "memory", "entry", work[1]), ("none",))
        if work[0] == "copy" and entry[0] == "running" and self.has("copies wait"):
            world[(me, "memory", "todo", *work)] = True

    def mark_for(self, world, me, token):
        state, serial = self.own_entry(world, me, token) or (None, None)
        known = state in ("used", "killed")
        return Mark(world[me, "memory", "id"], serial) if known else None

    def enter(self, me, work):
        """Does one piece of work, as what is true of it now asks. Its replies."""
        token, line = work[1], Line(me, None)
        if work[0] == "withdraw":
            return (yield from trip(line, self.withdrawal(token, work[2])))
        if work[0] == "remove":
            return (yield from trip(line, *self.removal(token)))
        if work[0] == "copy":
            begun = yield here("copy", lambda w: self.begin_copy(w, me, token))
            if begun is None:
                return NOT_ANY_MORE
            life, before = begun
            lease = SETNX(("device", token.device), Lease(token), life)
            replies = yield from trip(line, SET(("token", token), True, life), lease)
            if replies[0] is GONE:
                yield here("not sent", lambda w: self.note_not_sent(w, me, token, before))
            return replies
        mark = yield here("mark", lambda w: self.mark_for(w, me, token))
        if mark is None:
            return NOT_ANY_MORE
        put = SET if self.has("marks over all") else SETNX
        key = ("used", token)
        return (
            yield from trip(line, GET(key), put(key, mark, TTL + MARK_MARGIN), *self.removal(token))
        )

    def begin_copy(self, world, me, token):
        """How long the copy has to live, if it is still to be entered. From now on it is not
        memory's alone."""
        if not self.is_fit(world, me, ("copy", token)):
            return None
        before = world[me, "memory", "copy", token]
        world[me, "memory", "copy", token] = f"sent to {world.get((me, 'memory', 'connection'))}"
        return max(1, token.iat + TTL - world["now"]), before

    def note_not_sent(self, world, me, token, before):
        if (me, "memory", "copy", token) in world:
            world[me, "memory", "copy", token] = before

    def note_entered(self, world, me, work, replies):
        if replies == NOT_ANY_MORE and self.has("copies wait"):
            return  # The next list decides.
        world.pop((me, "memory", "todo", *work), None)
        token = work[1]
        if work[0] == "copy" and (me, "memory", "copy", token) in world:
            world[me, "memory", "copy", token] = "confirmed"
        if work[0] == "withdraw":
            entry = (me, "memory", "entry", token)
            if world.get(entry) == ("unknown", work[2].serial):
                del world[entry]

    # Starts and ends.

    def boot(self, me):
        """A start after a crash: what is on disk is loaded, and Redis is looked for."""

        def load(world):
            if (me, "down") not in world:
                return WAIT
            del world[me, "down"]
            world[me, "memory", "mode"] = "memory"
            world[me, "memory", "id"] = world[me, "disk", "id"]

        yield here("starts", load)
        yield from self.bring_back(me)

    def crash(self, me):
        def act(world):
            for key in [key for key in world if key[:2] == (me, "memory")]:
                del world[key]
            world[me, "down"] = True
            return Crash(me)

        yield arrives(me, "crashes", act)

    def claim_name(self, me):
        """Finds out whether the instance id is this process' own. False: Redis was lost."""
        name = yield arrives(me, "id", lambda w: w[me, "disk", "id"])
        process = yield here("process", lambda w: (me, w.get((me, "starts"), 0)))
        key = ("instance", name)
        replies = yield from trip(Line(me, None), SETNX(key, process, NAME_LEASE), GET(key))
        if unanswered(replies):
            return False

        def settle(world):
            world.pop((me, "memory", "name not own"), None)
            world.pop((me, "memory", "kept name"), None)
            world[me, "memory", "id"] = name if replies[1] == process else f"{me}'"
            if replies[1] == process:
                return
            if self.has("name waits"):
                world[me, "memory", "kept name"] = name
            else:
                world[me, "disk", "id"] = f"{me}'"

        if self.has("own name"):
            yield here("named", settle)
        return True
