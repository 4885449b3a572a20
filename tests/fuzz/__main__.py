"""``make fuzz MINUTES=10``: all fuzz targets on the processors that there are (docs/fuzzing.md).

Exit status: 0 nothing was found, 1 something was, 2 wrong usage, 3 clang or atheris is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from datetime import date
from pathlib import Path

from tests.fuzz import engine
from tests.fuzz.engine import Missing, Outcome
from tests.fuzz.registry import BY_NAME, TARGETS, C, Target

EXAMPLES = """examples:
  make fuzz MINUTES=10                     all targets, today's seed
  make fuzz MINUTES=2 SEED=7 ARGS="net life"
  .venv/bin/python -m tests.fuzz --again build/fuzz/found/net-crash-0123
"""
#: Seconds between two lines of progress.
EVERY_S = 15
#: Bytes of an archive of inputs in the repository.
PACKED_MAX = 12 << 10


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Runs the fuzz targets, and sums up what they did and found.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help="by default all; see --list")
    add("--minutes", type=float, default=10, help="for all together (10)")
    add("--seed", type=int, default=None, help="by default the day: YYYYMMDD")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="targets at once (processors)")
    add("--json", metavar="FILE", help="the summary (build/fuzz/report.json)")
    add("--keep", action="store_true", help="put the best inputs into tests/fuzz/corpus")
    add("--again", metavar="FILE", help="run one input again")
    add("--list", action="store_true", help="what targets there are")
    args = parser.parse_args()
    for name in args.targets:
        if name not in BY_NAME:
            parser.error(f"{name} is no target: {', '.join(BY_NAME)}")
    if args.minutes <= 0 or args.jobs < 1 or (args.seed is not None and args.seed < 0):
        parser.error("--minutes and --jobs must be more than 0, --seed at least 0")
    return args


class Board:
    """Runs targets side by side, and says from time to time how they do."""

    def __init__(self, jobs: int, seed: int) -> None:
        self._jobs, self._seed = jobs, seed
        self._lock = threading.Lock()
        self._queue: list[tuple[Target, int]] = []
        self._running: dict[str, Outcome] = {}
        self.done: list[Outcome] = []
        self.failed: list[str] = []

    def run(self, targets: list[Target], seconds: float) -> None:
        """:param seconds: of all processors together."""
        shares = sum(target.share for target in targets)
        self._queue = [(t, max(1, int(seconds * t.share / shares))) for t in targets]
        self._queue.sort(key=lambda one: one[1])  # the longest first, from the end
        threads = [threading.Thread(target=self._work) for _ in range(self._jobs)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            until = time.monotonic() + EVERY_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
            self._tell()
        ran = {o.target.name for o in self.done} | {text.partition(":")[0] for text in self.failed}
        self.failed += [f"{t.name}: it never came to an end" for t in targets if t.name not in ran]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    return
                target, seconds = self._queue.pop()
            try:
                outcome = engine.run(target, seconds, self._seed, self._progress)
            except Exception as e:  # whatever it is, the target has not been fuzzed
                traceback.print_exc()
                with self._lock:
                    self._running.pop(target.name, None)
                    self.failed.append(f"{target.name}: {type(e).__name__}: {e}")
                continue
            with self._lock:
                self._running.pop(target.name, None)
                self.done.append(outcome)
            say(line(outcome) + (f"; FOUND: {outcome.finding}" if outcome.finding else "; done"))

    def _progress(self, outcome: Outcome) -> None:
        with self._lock:
            self._running[outcome.target.name] = outcome

    def _tell(self) -> None:
        with self._lock:
            for outcome in self._running.values():
                say(line(outcome))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def line(outcome: Outcome) -> str:
    edges = "" if outcome.edges is None else f", {outcome.edges} edges"
    return (
        f"{outcome.target.name}: {outcome.seconds:.0f} s, {outcome.executions:,} executions{edges}"
    )


def table(outcomes: list[Outcome]) -> str:
    rows = [("target", "seconds", "executions", "edges", "inputs", "found")]
    for o in outcomes:
        edges = "-" if o.edges is None else f"{o.edges:,}"
        found = Path(o.finding).name if o.finding else "nothing"
        rows.append(
            (o.target.name, f"{o.seconds:.0f}", f"{o.executions:,}", edges, f"{o.inputs:,}", found)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main() -> int:
    args = options()
    if args.list:
        for target in TARGETS:
            print(f"{target.name:16}{target.about}")
        return 0
    targets = [BY_NAME[name] for name in args.targets] or list(TARGETS)
    try:
        if args.again:
            return 1 if engine.again(Path(args.again)) else 0
        if any(isinstance(TARGETS[t], C) for t in targets):
            engine.clang()
        if any(not isinstance(TARGETS[t], C) for t in targets):
            engine.check_atheris()
        if args.keep:
            for target in targets:
                if engine.guided(target):
                    say(f"{target.name}: {engine.keep(target, PACKED_MAX)} inputs kept")
            return 0
    except Missing as e:
        say(f"fuzz: {e}")
        return 3
    seed = args.seed if args.seed is not None else int(date.today().strftime("%Y%m%d"))
    say(f"seed {seed}: {len(targets)} targets, {args.minutes:g} minutes on {args.jobs} processors")
    board = Board(args.jobs, seed)
    board.run(targets, args.minutes * 60 * args.jobs)
    order = list(TARGETS)
    outcomes = sorted(board.done, key=lambda o: order.index(o.target))
    found = [o for o in outcomes if o.finding]
    report = {
        "seed": seed,
        "minutes": args.minutes,
        "jobs": args.jobs,
        "executions": sum(o.executions for o in outcomes),
        "findings": len(found),
        "failed": board.failed,
        "targets": [o.row() for o in outcomes],
    }
    file = Path(args.json) if args.json else engine.WORK / "report.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(table(outcomes))
    print(f"seed {seed}: {report['executions']:,} executions, {len(found)} findings; see {file}")
    for o in found:
        print(f"\n{o.target.name}: what it said at the end\n{o.log[-2000:]}")
        if o.finding.endswith("-log.txt"):
            print(f"log: {o.finding}")
        else:
            print(f"again: .venv/bin/python -m tests.fuzz --again {o.finding}")
    for text in board.failed:
        print(f"did not run: {text}")
    return 1 if found or board.failed else 0


if __name__ == "__main__":
    sys.exit(main())
