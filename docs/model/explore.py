"""Explores every state that a few processes can reach when their steps interleave in every order.

A process is a Python generator. It yields one `Step` at a time and is sent the reply of that step,
so that a protocol reads here as it does in the program: ask, look at the reply, ask again. What
processes share is the world, a flat dict of hashable keys and values. A step reads or changes it at
one instant, and between two steps of one process any step of the others may come.

What a process does next depends on nothing but the replies that it has had. So a state of the whole
is the world and, for each process, its replies. States are remembered, and two orders of steps that
lead to the same state are followed once: that is what makes millions of orders cheap.

Three things can go wrong at every step. A reply is lost: the command is carried out later, at any
moment, or never (`Scenario.lossy`). An instance dies (a step whose reply is `Crash`). And whatever
else a process of the scenario does to the world, such as restarting Redis.
"""

from collections import deque
from typing import Any, Callable, NamedTuple


class Sign:
    """A value that stands for itself."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


WAIT = Sign("wait")  # The step cannot be taken yet. It has changed nothing.
LOST = Sign("no reply")  # The command was sent, and no reply will come.
GONE = Sign("no connection")  # The command was not sent.
LATE = Sign("it arrives late")  # The command is carried out when nobody waits for its reply.


class Step(NamedTuple):
    """One thing that happens at one instant."""

    label: str
    act: Callable[[dict], Any]
    kind: str = "local"  # "ask": a command whose reply can be lost. "sent": it is lost already.
    late: Any = None  # What a command does when it arrives late.


class Crash(NamedTuple):
    """As a reply: whatever this instance had begun is over. What it sent may still arrive, unless
    it is the server that stopped: then nothing that was on its way arrives."""

    instance: str


class Ended(NamedTuple):
    """A process that is over, and what it came to."""

    outcome: Any


class State(NamedTuple):
    """All of it, by numbers, which are quick to compare."""

    world: frozenset  # A number for each (key, value).
    places: tuple  # For each process a number that stands for the replies that it has had.
    flights: tuple  # Places whose command is under way and awaited by nobody, oldest first.
    losses: int  # Replies that may yet be lost.


class Scenario(NamedTuple):
    """Processes in a world, and what must be true of it."""

    world: dict
    processes: dict  # name -> a generator function and its arguments
    check: Callable[[dict, dict, bool], Any]  # (world, outcomes, nothing moves any more) -> a fault
    after: dict = {}  # name -> names of those that must have ended before it begins
    lossy: tuple = ()  # Names of those of whom one reply may be lost.


class Found(NamedTuple):
    """What a search came to."""

    states: int
    fault: Any = None
    schedule: tuple = ()


def instance_of(process):
    """Processes are named after their instance: `a.redeem` runs on a, and dies with it."""
    return process.split(".")[0]


def explore(scenario, most=2_000_000):
    """Looks at every state, nearest first, so that the schedule of a fault is a shortest one."""
    return Search(scenario).run(most)


class Search:
    def __init__(self, scenario):
        self.scenario = scenario
        self.names = tuple(scenario.processes)
        self.facts = {}  # (key, value) -> its number
        self.numbers = {}  # (process, replies) -> its number as a place
        self.places = []  # By that number: process, replies, and the next step or the end.

    def run(self, most):
        world = dict(self.scenario.world)
        places = tuple(self.place(at, ()) for at in range(len(self.names)))
        losses = 1 if self.scenario.lossy else 0
        start = State(frozenset(map(self.number_of, world.items())), places, (), losses)
        came_from = {start: None}
        waiting = deque([(start, world)])
        while waiting:
            state, world = waiting.popleft()
            moves = list(self.moves(state, world))
            fault = self.scenario.check(world, self.outcomes(state), not moves)
            if fault:
                return Found(len(came_from), fault, self.schedule(came_from, state))
            for how, following, changed in moves:
                if following not in came_from:
                    came_from[following] = (state, how)
                    waiting.append((following, changed))
            if len(came_from) > most:
                return Found(len(came_from), f"not decided after {most} states")
        return Found(len(came_from))

    def outcomes(self, state):
        places = [self.places[place] for place in state.places]
        return {self.names[at]: step.outcome for at, _, step in places if isinstance(step, Ended)}

    def moves(self, state, world):
        for place in state.places:
            at, replies, step = self.places[place]
            if isinstance(step, Ended) or not (replies or self.may_begin(at, state)):
                continue
            changed = dict(world)
            reply = step.act(changed)
            if reply is WAIT:
                continue
            yield (place, reply), self.following(state, world, changed, at, reply), changed
            if step.kind == "ask" and state.losses and self.names[at] in self.scenario.lossy:
                lost = state._replace(flights=state.flights + (place,), losses=state.losses - 1)
                yield (place, LOST), self.following(lost, world, world, at, LOST), world
        yield from self.landings(state, world)

    def landings(self, state, world):
        """Of each sender the oldest command arrives first: one connection keeps the order."""
        senders = set()
        for nth, place in enumerate(state.flights):
            at, _, step = self.places[place]
            if at not in senders:
                senders.add(at)
                changed = dict(world)
                step.late(changed)
                rest = state.flights[:nth] + state.flights[nth + 1 :]
                numbers = self.renumbered(state, world, changed)
                yield (place, LATE), state._replace(world=numbers, flights=rest), changed

    def may_begin(self, at, state):
        before = self.scenario.after.get(self.names[at])
        return not before or self.outcomes(state).keys() >= set(before)

    def following(self, state, world, changed, at, reply):
        """The state in which the process has its reply, and what it gave up on is on its way."""
        places, flights = list(state.places), state.flights
        if isinstance(reply, Crash):
            places = [self.crashed(place, reply, at) for place in places]
            flights = () if reply.instance == "redis" else flights
        place = self.place(at, self.places[places[at]][1] + (reply,))
        while getattr(self.places[place][2], "kind", "") == "sent":
            flights += (place,)
            place = self.place(at, self.places[place][1] + (LOST,))
        places[at] = place
        return State(self.renumbered(state, world, changed), tuple(places), flights, state.losses)

    def crashed(self, place, crash, by):
        at, replies, step = self.places[place]
        dies = instance_of(self.names[at]) == crash.instance and at != by
        begun = replies and not isinstance(step, Ended)
        return self.place(at, (crash,)) if dies and begun else place

    def renumbered(self, state, world, changed):
        """The numbers of the changed world. Most values are the very objects that they were."""
        missing = object()
        gone = [fact for fact in world.items() if changed.get(fact[0], missing) is not fact[1]]
        come = [fact for fact in changed.items() if world.get(fact[0], missing) is not fact[1]]
        if not gone and not come:
            return state.world
        return state.world.difference(map(self.number_of, gone)).union(map(self.number_of, come))

    def number_of(self, fact):
        return self.facts.setdefault(fact, len(self.facts))

    def place(self, at, replies):
        number = self.numbers.get((at, replies))
        if number is None:
            step = self.next_step(at, replies)
            # How a process came to its end no longer matters.
            key = (at, Ended, step) if isinstance(step, Ended) else (at, replies)
            number = self.numbers.setdefault(key, len(self.places))
            self.numbers[at, replies] = number
            if number == len(self.places):
                self.places.append((at, replies, step))
        return number

    def next_step(self, at, replies):
        """What a process does after these replies: it is run again, once for each such list."""
        if (
            replies
            and isinstance(replies[-1], Crash)
            and replies[-1].instance == instance_of(self.names[at])
        ):
            return Ended("crashed")
        function, *arguments = self.scenario.processes[self.names[at]]
        process = function(*arguments)
        try:
            step = next(process)
            for reply in replies:
                step = process.send(reply)
            return step
        except StopIteration as end:
            return Ended(end.value)

    def schedule(self, came_from, state):
        lines = []
        while came_from[state] is not None:
            state, (place, reply) = came_from[state]
            at, _, step = self.places[place]
            lines.append(f"{self.names[at]}: {step.label}{'' if reply is None else f' -> {reply}'}")
        return tuple(reversed(lines))
