"""A Redis as the models see it: keys with values, ages and ends, and commands that name one key.

The world holds `("redis", key)` -> `Kept`; `"run"`, the server's run id, None while it is down; and
`"now"`, the true time in seconds, which is the server's clock, too.
"""

from typing import Any, Callable, NamedTuple

FOR_GOOD = 10**9


class Kept(NamedTuple):
    """What stands under a key."""

    value: Any
    since: int
    until: int


class Command(NamedTuple):
    label: str
    act: Callable[[dict], Any]


def SET(key, value, life=FOR_GOOD):
    return Command(f"SET {text(key)} {text(value)}", lambda world: put(world, key, value, life))


def SETNX(key, value, life=FOR_GOOD):
    def act(world):
        free = standing(world, key) is None
        if free:
            put(world, key, value, life)
        return free

    return Command(f"SET {text(key)} {text(value)} NX", act)


def GET(key):
    return Command(f"GET {text(key)}", lambda world: value_of(world, key))


def EXISTS(key):
    return Command(f"EXISTS {text(key)}", lambda world: standing(world, key) is not None)


def AGE(key):
    """How long ago the key was set, as PTTL tells who knows its whole life; None if it is gone."""

    def act(world):
        kept = standing(world, key)
        return kept and world["now"] - kept.since

    return Command(f"PTTL {text(key)}", act)


def DEL(key):
    def act(world):
        world.pop(("redis", key), None)

    return Command(f"DEL {text(key)}", act)


def SWAP(key, expected, value, life=FOR_GOOD):
    """Compare-and-set, or compare-and-delete where the new value is None: one EVAL with one key."""

    def act(world):
        if value_of(world, key) != expected:
            return False
        if value is None:
            world.pop(("redis", key), None)
        else:
            put(world, key, value, life)
        return True

    return Command(f"EVAL {text(key)}: {text(expected)} becomes {text(value)}", act)


def MERGE(key, value, merge):
    """Read, merge and compare-and-set, until nobody came between. The reply is what stands."""

    def act(world):
        old = value_of(world, key)
        put(world, key, value if old is None else merge(old, value))
        return value_of(world, key)

    return Command(f"EVAL {text(key)}: merged with {text(value)}", act)


def REPLICATED(key):
    """WAIT, as far as it concerns one key: whether the replica has what stands there."""

    def act(world):
        copy = world.get(("replica", key))
        return copy is not None and copy == standing(world, key)

    return Command(f"WAIT 1 (for {text(key)})", act)


def standing(world, key):
    kept = world.get(("redis", key))
    return kept if kept and world["now"] < kept.until else None


def value_of(world, key):
    kept = standing(world, key)
    return kept and kept.value


def put(world, key, value, life=FOR_GOOD):
    world["redis", key] = Kept(value, world["now"], world["now"] + life)


def contents(world):
    """What a dump of this moment holds."""
    return tuple((key, kept) for key, kept in world.items() if key[0] == "redis")


def load(world, dump, run):
    """The server starts with what a dump holds."""
    for key, _ in contents(world):
        del world[key]
    world.update(dump)
    world["run"] = run


def on_other_server(world, act):
    """Carries a command out on the server whose keys are under `("other", key)`."""
    exchange(world)
    reply = act(world)
    exchange(world)
    return reply


def exchange(world):
    moved = [(key, kept) for key, kept in world.items() if key[0] in ("redis", "other")]
    for key, _ in moved:
        del world[key]
    for (server, key), kept in moved:
        world["other" if server == "redis" else "redis", key] = kept


def text(value):
    return ":".join(map(text, value)) if type(value) is tuple else str(value)
