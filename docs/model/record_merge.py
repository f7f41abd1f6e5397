"""How two states of knowledge become one: the pure functions by which records are merged.

Nothing is ever taken back, and each function is commutative, associative and idempotent, so that no
order of messages, no loss and no repetition makes instances disagree for good. `record.py` tries
that on every combination of a few values of each register.
"""

from typing import Any, NamedTuple


class Certificate(NamedTuple):
    """What is fixed once it is signed. `paid`: when what paid for it came to be."""

    serial: str
    device: str
    paid: int
    ends: int = 10_000

    def __str__(self):
        return f"{self.serial} of {self.device}"


class Revocation(NamedTuple):
    at: int
    reason: str = "unspecified"


class Registration(NamedTuple):
    """What permits an enrolment; without content it was forgotten."""

    version: int = 0
    instance: str = ""
    content: Any = None  # The secret.
    begun: int = 0  # When it was registered or forgotten, which a later note leaves as it is.
    note: str = ""


class Row(NamedTuple):
    """What is kept of a device by itself. Each field is a register with a merge of its own."""

    t: int = 0  # The bound for tokens
    c: int = 0  # and the one for certificates.
    blocked: int = 0  # The version of the latest block,
    lifted: int = 0  # and of the latest one that whoever lifted it had seen.
    registration: Registration = Registration()
    spent: frozenset = frozenset()  # Secrets for which there is a certificate.

    def __str__(self):
        changed = [(name, value) for name, value in self._asdict().items() if value]
        return " ".join(f"{name}={value}" for name, value in changed)

    def is_blocked(self):
        return self.blocked > self.lifted


class Record(NamedTuple):
    """All that an instance keeps."""

    certificates: frozenset = frozenset()
    revocations: frozenset = frozenset()  # of (serial, Revocation)
    rows: frozenset = frozenset()  # of (device, Row)

    def certificate(self, serial):
        return next((found for found in self.certificates if found.serial == serial), None)

    def row(self, device):
        return dict(self.rows).get(device, Row())

    def is_revoked(self, certificate):
        named = certificate.serial in dict(self.revocations)
        return named or certificate.paid <= self.row(certificate.device).c

    def active(self, device):
        mine = [found for found in self.certificates if found.device == device]
        return [found for found in mine if not self.is_revoked(found)]


def merge_revocations(one, other):
    """The earlier one counts."""
    return min(one, other)


def order(registration, begun_first=True, content_last=True):
    """Whoever changes a note has not heard of a secret that was given out meanwhile. And two instances
    may have one name: a restored copy, a clone."""
    version, instance, content, begun, note = registration
    first = (begun, str(content)) if begun_first else ()
    last = (str(content), begun, note) if content_last else ()
    return (*first, version, instance, *last)


def merge_rows(one, other, order=order):
    return Row(
        t=max(one.t, other.t),
        c=max(one.c, other.c),
        blocked=max(one.blocked, other.blocked),
        lifted=max(one.lifted, other.lifted),
        registration=max(one.registration, other.registration, key=order),
        spent=one.spent | other.spent,
    )


def merge_records(one, other, merge_rows=merge_rows):
    return Record(
        one.certificates | other.certificates,
        merge_by_name(one.revocations, other.revocations, merge_revocations),
        merge_by_name(one.rows, other.rows, merge_rows),
    )


def merge_by_name(one, other, merge):
    merged = dict(one)
    for name, value in other:
        merged[name] = merge(merged[name], value) if name in merged else value
    return frozenset(merged.items())
