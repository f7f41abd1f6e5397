"""Killing: a revocation kills what a device has, a replacement also hands out a new token."""

from explore import LOST
from server import AGE, DEL, GET, MERGE, SET, SETNX, SWAP
from token_ground import (
    CLOCKS_APART,
    KILLED,
    MARK_MARGIN,
    TTL,
    UNDER_WAY,
    Ground,
    Lease,
    Mark,
    Token,
    arrives,
    clock,
    here,
    of_device,
    serves,
    trip,
    unanswered,
)


class Kill(Ground):
    def revoke(self, me, device):
        """`200`; `200 here` where Redis is not told yet."""
        return (yield from self.kill(me, device, None))

    def replace(self, me, device, name):
        """`200` and a token of that name, or `409`."""
        return (yield from self.kill(me, device, name))

    def kill(self, me, device, name):
        victims, line = yield arrives(me, "kill", lambda w: self.begin_kill(w, me, device))
        if line is None:
            return (yield from self.kill_here(me, device, name, None, victims))
        replies = yield from trip(line, GET(("device", device)), GET(("row", device)))
        if unanswered(replies):
            yield from self.lose(me)
            return (yield from self.kill_here(me, device, name, None, victims))
        lease, row = replies
        old = lease and lease.token
        bound = yield here("bound", lambda w: self.bound_for(w, me, device, old, row))
        raised = yield from self.raise_bound(line, device, bound, name and old)
        if raised is LOST:
            return (yield from self.kill_here(me, device, name, old, victims))
        bound, under_way = raised
        if under_way and self.has("under way"):
            return "409"
        dying = yield here("known here", lambda w: self.kill_known(w, me, device, old, bound))
        for token in dying:
            if not (yield from self.kill_token(line, token)):
                return (yield from self.kill_here(me, device, name, old, victims))
        if name:
            return (yield from self.succeed(line, Token(name, device, 0), lease, bound, victims))
        yield from trip(line, SWAP(("device", device), lease, None))
        return (yield here("answered", lambda w: self.judge_killed(w, victims, None)))

    def begin_kill(self, world, me, device):
        answered = tuple(of_device(world, "judge", ("answered",), device))
        return answered, self.line(world, me) if serves(world, me) else None

    def bound_for(self, world, me, device, old, row):
        """What the bound is raised to; on this instance's disk at once."""
        if not self.has("bounds"):
            return None
        known = of_device(world, me, ("memory", "copy"), device) + ([old] if old else [])
        margin = CLOCKS_APART if self.has("bound with margin") else 0
        before = self.own_bound(world, me, device)
        bound = max(before, clock(world, me) + margin, *[token.iat for token in known], 0)
        if self.has("bound past row"):
            bound = max(bound, before + 1, (row or 0) + 1)
        if self.has("bound on disk"):
            world[me, "disk", "bound", device] = bound
        return bound

    def raise_bound(self, line, device, bound, old):
        """The bound as it stands then, and whether a redemption of the old token is under way."""
        raising = [MERGE(("row", device), bound, max)] if bound is not None else []
        looking = [GET(("used", old)), AGE(("used", old))] if old else []
        together = self.cluster and not self.has("awaited bound")
        if together or not self.has("bound before look"):
            # The other node may be the faster one.
            seen = yield from trip(line, *looking, *raising)
            seen, raised = seen[: len(looking)], seen[len(looking) :]
        else:
            raised = yield from trip(line, *raising)
            seen = yield from trip(line, *looking)
        if unanswered(raised + seen):
            yield from self.lose(line.me)
            return LOST
        mark, age = seen or (None, None)
        under_way = mark and mark.serial != KILLED and age is not None and age < UNDER_WAY
        return raised[0] if raised else 0, under_way

    def kill_known(self, world, me, device, old, bound):
        """What is known here of the device is dead here from now on. Returns what gets a mark."""
        known = of_device(world, me, ("memory", "copy"), device)
        if self.has("bounds") and self.has("spares the later"):
            known = [token for token in known if token.iat <= bound]
        known += [old] if old and old not in known else []
        for token in known:
            world.pop((me, "memory", "copy", token), None)
            world.pop((me, "memory", "todo", "copy", token), None)
            if (me, "disk", "certificate", token) not in world:
                world[me, "memory", "entry", token] = ("killed", KILLED)
        return tuple(known)

    def kill_token(self, line, token):
        by = yield here("id", lambda w: w[line.me, "memory", "id"])
        commands = [DEL(("token", token))]
        if self.has("killed marks"):
            put = SET if self.has("kill over all") else SETNX
            commands.insert(0, put(("used", token), Mark(by, KILLED), TTL + MARK_MARGIN))
        replies = yield from trip(line, *commands)
        if unanswered(replies):
            yield from self.lose(line.me)
        return not unanswered(replies)

    def succeed(self, line, token, lease, bound, victims):
        """The new token takes the old one's place, unless another has taken it."""
        me, key = line.me, ("device", token.device)
        iat = yield here("time", lambda w: clock(w, me))
        token = token._replace(iat=max(iat, bound + 1 if self.has("born alive") else 0))
        take = [SWAP(key, lease, Lease(token), TTL) if lease else SETNX(key, Lease(token), TTL)]
        if not self.has("lease with end"):
            take = [SET(key, Lease(token, has_end=False)), SET(key, Lease(token), TTL)]
        replies = yield from trip(line, SET(("token", token), True, TTL), *take)
        if unanswered(replies):
            return (yield from self.issue_after_loss(me, token))
        if replies[1] is False:
            yield from self.take_back(line, token)
            return "409"
        answer = yield from self.hand_out(line, token)
        if answer == "200":
            yield here("answered", lambda w: self.judge_killed(w, victims, None, "replaced"))
        return answer

    def kill_here(self, me, device, name, old, victims):
        """Redis is away: the bound is on disk, and Redis is told of it at the return."""

        def act(world):
            bound = self.bound_for(world, me, device, old, None)
            if bound is not None:
                world[me, "disk", "bound", device] = bound
            for token in self.kill_known(world, me, device, old, bound):
                world[me, "memory", "todo", "mark", token] = True
            return Token(name, device, max(clock(world, me), (bound or 0) + 1))

        token = yield here("killed here", act)
        answer = yield here("answered", lambda w: self.judge_killed(w, victims, me))
        return (yield from self.issue_from_memory(me, token)) if name else answer

    def judge_killed(self, world, victims, where, how=None):
        """From now on none of the victims may be redeemed: anywhere, or at one place."""
        for token in victims:
            world[("judge", "dead", token, where) if where else ("judge", "dead", token)] = True
            if how:
                world["judge", how, token] = True
        return "200 here" if where else "200"
