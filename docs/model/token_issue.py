"""Onboarding: one round trip, a second one if another token has the lease, or memory."""

from explore import LOST, WAIT
from server import AGE, DEL, EXISTS, GET, SET, SETNX, SWAP
from token_ground import (
    KILLED,
    PATIENCE,
    TTL,
    UNDER_WAY,
    Ground,
    Lease,
    Token,
    arrives,
    clock,
    facts,
    here,
    of_device,
    serves,
    trip,
    unanswered,
)


class Issue(Ground):
    def onboard(self, me, device, name):
        """`200`, with a token of that name, or `409`."""
        begun = yield arrives(me, "onboarding", lambda w: self.begin_issue(w, me, device, name))
        if begun is None:
            return "409"
        token, line = begun
        if line is None:
            return (yield from self.issue_from_memory(me, token))
        won = yield from self.issue(line, token)
        if won is LOST:
            return (yield from self.issue_after_loss(me, token))
        return (yield from self.hand_out(line, won)) if won else "409"

    def begin_issue(self, world, me, device, name):
        if self.is_certified(world, me, device):
            return None
        iat = clock(world, me)
        if self.has("born alive"):
            iat = max(iat, self.own_bound(world, me, device) + 1)
        return Token(name, device, iat), self.line(world, me) if serves(world, me) else None

    def issue(self, line, token):
        """The token that has won the lease, None, or LOST."""
        commands = (
            SET(("token", token), True, TTL),
            SETNX(("device", token.device), Lease(token), TTL),
            GET(("device", token.device)),
            GET(("row", token.device)),
        )
        replies = yield from trip(line, *commands)
        if not self.has("no resending") and unanswered(replies):
            replies = yield from trip(line, *commands)
            if replies[1] is False:
                return (yield from self.take_back(line, token))
        if unanswered(replies):
            return LOST
        _, _, lease, bound = replies
        if lease is None or lease.token != token:
            return (yield from self.contest(line, token, lease, bound or 0))
        if self.has("born alive") and token.iat <= (bound or 0):
            return (yield from self.issue_above(line, token, bound))
        return token

    def issue_above(self, line, token, bound):
        """The token was born dead: one above the bound takes its place."""
        key = ("device", token.device)
        while token.iat <= bound:
            better = token._replace(iat=bound + 1)
            replies = yield from trip(
                line,
                SET(("token", better), True, TTL),
                SWAP(key, Lease(token), Lease(better), TTL),
                DEL(("token", token)),
                GET(("row", token.device)),
            )
            if unanswered(replies):
                return LOST
            _, taken, _, bound = replies
            if not taken:
                return (yield from self.take_back(line, better))
            token = better
        return token

    def contest(self, line, token, lease, bound):
        """Another token has the lease: ours is taken back. A stale lease is taken over."""
        other = lease and lease.token
        replies = yield from trip(
            line,
            DEL(("token", token)),
            EXISTS(("token", other)),
            GET(("used", other)),
            AGE(("used", other)),
            AGE(("device", token.device)),
        )
        if unanswered(replies):
            return LOST
        _, there, mark, marked_for, age = replies
        if lease is None or age is None:
            return None
        is_old = marked_for is None or marked_for > UNDER_WAY
        redeemed = mark and mark.serial != KILLED and not is_old
        redeemed = redeemed and self.has("redeemed has lease")
        killed = self.has("bounds") and other.iat <= bound and not redeemed
        gone = not there or (mark and is_old)
        stale = killed or not lease.has_end or (age > PATIENCE and gone)
        return (yield from self.take_lease_over(line, token, lease, bound)) if stale else None

    def take_lease_over(self, line, token, stale, bound):
        if self.has("born alive") and token.iat <= bound:
            token = token._replace(iat=bound + 1)
        key = ("device", token.device)
        take = SWAP(key, stale, Lease(token), TTL)
        if not self.has("lease by swap"):
            take = SET(key, Lease(token), TTL)
        again = GET(("row", token.device))
        replies = yield from trip(line, SET(("token", token), True, TTL), take, again)
        if unanswered(replies):
            return LOST
        _, taken, bound = replies
        if taken is False:
            return (yield from self.take_back(line, token))
        if self.has("row at take-over") and token.iat <= (bound or 0):
            return (yield from self.issue_above(line, token, bound))
        return token

    def take_back(self, line, token):
        yield from trip(line, DEL(("token", token)))
        return None

    def hand_out(self, line, token):
        """The lease is won. Since the first look, a certificate may have been signed."""
        me = line.me

        def last_look(world):
            if self.has("look again") and self.is_certified(world, me, token.device):
                return "409"
            # An answer of a Redis that was lost meanwhile is entered again.
            state = "confirmed" if serves(world, me) else "sent"
            world[me, "memory", "copy", token] = state
            if state == "sent":
                world[me, "memory", "todo", "copy", token] = True
            world["judge", "answered", token] = True
            return "200"

        answer = yield here("handed out", last_look)
        if answer == "409" and unanswered((yield from trip(line, *self.removal(token)))):
            yield self.note(me, "remove", token)
        return answer

    def removal(self, token):
        """The token is used up, or nobody was given it."""
        return DEL(("token", token)), SWAP(("device", token.device), Lease(token), None)

    def issue_after_loss(self, me, token):
        """Whether the issue was carried out is not known; it may still be."""
        yield from self.lose(me)
        if self.has("fresh"):
            yield self.note(me, "remove", token)
            fresh = token._replace(name=token.name + "'")
            return (yield from self.issue_from_memory(me, fresh))
        return (yield from self.issue_from_memory(me, token, "sent"))

    def issue_from_memory(self, me, token, state="unsent"):
        def act(world):
            if not self.is_free_here(world, me, token.device):
                return "409"
            world[me, "memory", "copy", token] = state
            world[me, "memory", "todo", "copy", token] = True
            world["judge", "answered", token] = True
            return "200"

        return (yield here("handed out from memory", act))

    def is_free_here(self, world, me, device):
        copies = of_device(world, me, ("memory", "copy"), device)
        return all(
            self.own_entry(world, me, copy) or self.is_dead_here(world, me, copy) for copy in copies
        )

    def handed_out(self, name):
        """Waits until an onboarding has answered with the token of that name."""

        def act(world):
            tokens = [token for (token,), _ in facts(world, "judge", "answered")]
            named = [token for token in tokens if token.name.rstrip("'") == name]
            return named[-1] if named else WAIT

        return here(f"the device has {name}", act)
