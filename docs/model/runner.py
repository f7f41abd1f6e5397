"""Runs rows, each twice, and says which of them are not as said."""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

from explore import explore

PAGE = Path(__file__).with_name("README.md")


class Row(NamedTuple):
    """A situation in which the protocol breaks without some rules, and holds with them."""

    number: str
    title: str
    breaks: str  # What goes wrong without the rules.
    without: tuple  # Rules of the protocol, left out where it must break.
    also: tuple  # Or rules that it lacks, added where it must hold.
    lacking: tuple  # Rules that neither run has.
    needs: tuple  # Rules that the protocol lacks and both runs have.
    settings: dict
    build: Callable[[Any], Any]

    def is_limit(self):
        """It breaks, and that is known and accepted."""
        return not self.without and not self.also

    def line(self):
        """Its line in the table of the page."""
        kind = ", ".join(self.without) or (
            "open: " + ", ".join(self.also) if self.also else "limit"
        )
        return f"| {self.number} | {self.title} | {self.breaks} | {kind} |"


class Rows:
    def __init__(self, service, rules, open_rules):
        self.service, self.rules, self.open_rules = service, rules, open_rules
        self.rows = []

    def row(self, number, title, breaks, without=(), also=(), lacking=(), needs=(), **settings):
        def add(build):
            given = map(tuple, (without, also, lacking, needs))
            self.rows.append(Row(str(number), title, breaks, *given, settings, build))

        return add

    def run(self, job):
        row, holds = job
        without = row.lacking + (() if holds else row.without)
        also = row.needs + (row.also if holds else ())
        return explore(row.build(self.service(without=without, also=also, **row.settings)))

    def main(self, description, check_more=lambda: 0):
        """Exits with 1 if a row is not as said, a rule has no row, or the page is behind."""
        options = argparse.ArgumentParser(description=description)
        options.add_argument("number", nargs="*", help="run these rows only")
        options.add_argument("--schedule", action="store_true", help="show each step to a fault")
        options.add_argument("--table", action="store_true", help="print the table of the page")
        asked = options.parse_args()
        if asked.table:
            return print(*(row.line() for row in self.rows), sep="\n")
        bad = self.run_all(asked.number, asked.schedule)
        if not asked.number:
            bad += check_more() + self.report_unused() + self.report_page()
        sys.exit(bad > 0)

    def run_all(self, numbers, with_schedule):
        chosen = [row for row in self.rows if not numbers or row.number in numbers]
        jobs = [(row, False) for row in chosen]
        jobs += [(row, True) for row in chosen if not row.is_limit()]
        jobs.sort(key=lambda job: chosen.index(job[0]))
        bad = 0
        with ProcessPoolExecutor(os.cpu_count(), initializer=share, initargs=(self, jobs)) as pool:
            for (row, holds), found in zip(jobs, pool.map(run_job, range(len(jobs)))):
                bad += not report(row, holds, found, with_schedule)
        return bad

    def report_unused(self):
        """A rule without which nothing breaks is not needed, or its row is missing."""
        shown = {rule for row in self.rows for rule in row.without + row.also}
        unused = [rule for rule in self.rules | self.open_rules if rule not in shown]
        for rule in unused:
            print(f"NO ROW BREAKS WITHOUT: {rule}")
        return len(unused)

    def report_page(self):
        page = PAGE.read_text(encoding="utf-8").splitlines()
        missing = [row.line() for row in self.rows if row.line() not in page]
        for line in missing:
            print(f"README.md LACKS: {line}")
        return len(missing)


def report(row, holds, found, with_schedule):
    """Prints what a run came to. Returns whether that is as said."""
    if not holds:
        print(f"{row.number:>4}  {row.title}")
    if row.also or row.is_limit():
        how = f"with {', '.join(row.also)}" if holds else "as it is"
    else:
        how = "with all rules" if holds else f"without {', '.join(row.without)}"
    is_as_said = holds != bool(found.fault)
    print(f"      {how}: {found.fault or 'holds'} ({found.states} states)", flush=True)
    if not is_as_said:
        print("      NOT AS SAID")
    if found.fault and (with_schedule or not is_as_said):
        print(*(f"          {line}" for line in found.schedule), sep="\n", flush=True)
    return is_as_said


def share(rows, jobs):
    """Scenarios hold functions, which cannot be sent to a process: it has them from its start."""
    global SHARED
    SHARED = rows, jobs


def run_job(at):
    rows, jobs = SHARED
    return rows.run(jobs[at])
