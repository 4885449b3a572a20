"""Try out a vhost-user back-end without a guest.

probe: show the back-end's features, and its answer to each message.
check: test its conformance. The check fills rings as a driver does, with each set of features,
stops, wraps, reconnects and misbehaves, and prints the result of each item: ok; FAIL with the
clause that is broken and what was in the rings; - if the back-end does not offer it; ? if it cannot
be checked. The back-end should send every packet back; if it does not, receiving is not checked.

Examples:
  pyvmm vhost-user probe $DIR/s
  pyvmm vhost-user probe --timeout 10 --json $DIR/s
  pyvmm vhost-user check --junit result.xml $DIR/s
  pyvmm vhost-user check --server $DIR/s                  the back-end connects
  pyvmm vhost-user check --respawn "CMD $DIR/s" $DIR/s    the back-end ends with its session

Exit status: 0 every message was answered and none refused, or no item failed; 1 a message was
refused, an item failed, or the back-end has gone before the end; 101 a result could not be written;
112 no connection, a broken protocol, or no answer; 130, 143, 129 check was ended by SIGINT,
SIGTERM, SIGHUP.
"""

from __future__ import annotations

from pyvmm.cli.support.options import count, seconds
from pyvmm.cli.support.outputs import Outputs
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import columns
from pyvmm.errors import UsageError, VhostUserError
from pyvmm.netopt import UID_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from pyvmm.conformance.check import Checker, Item


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("action", choices=("probe", "check"), help="what to do")
    parser.add_argument("socket", metavar="SOCKET", help="where the back-end listens")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds(0, 3600),
        help="seconds per answer (2), or with check per answer and per burst (5)",
    )
    add_json(parser, "an object with features and steps, or with items")
    parser.add_argument(
        "--server", action="store_true", help="check: listen at SOCKET; the back-end connects"
    )
    parser.add_argument(
        "--respawn",
        metavar="CMD",
        default="",
        help="check: start the back-end by this shell command, now and whenever it has ended",
    )
    parser.add_argument(
        "--peer",
        metavar="UID",
        type=count(0, UID_MAX),
        help="check: the back-end's user, if it is neither root nor the user of this command",
    )
    parser.add_argument("--junit", metavar="FILE", help="check: write JUnit XML")
    parser.add_argument(
        "--queues",
        metavar="N",
        type=count(1, 32),
        help="check: queue pairs to use at once (default: all of the back-end, up to 4)",
    )


def run(args: argparse.Namespace) -> int:
    """Probe or check, and print."""
    if args.action == "check":
        from pyvmm.cli.support.signals import orderly

        # A back-end of --respawn is to end with this command.
        return orderly(lambda: _check_and_write(args))
    for option in ("junit", "queues", "server", "respawn", "peer"):
        if getattr(args, option) not in (None, False, ""):
            raise UsageError(f"--{option} with probe", "it is for check")
    return _probe(args)


def _check_and_write(args: argparse.Namespace) -> int:
    with Outputs({"--junit": args.junit}) as outputs:
        return outputs.status(_check(args, outputs))


def _check(args: argparse.Namespace, outputs: Outputs) -> int:
    from pyvmm.conformance.check import Checker
    from pyvmm.conformance.subject import Subject

    timeout = args.timeout or 5.0
    subject = Subject(
        args.socket, timeout=timeout, server=args.server, command=args.respawn, peer=args.peer
    )
    try:
        checker = Checker(subject, timeout=timeout, queues=args.queues)
        checker.run(lambda item: None if args.json else _print_item(item))
        if checker.reason is not None and not checker.features:
            raise checker.reason  # there has never been a back-end
    finally:
        subject.end()
    if args.json:
        fields = ("name", "result", "detail", "clause", "rings", "seconds")
        items = [{k: getattr(i, k) for k in fields} for i in checker.items]
        print_json({"echoes": checker.echoes, "items": items})
    else:
        counts = [
            (n, sum(i.result == n for i in checker.items))
            for n in ("passed", "failed", "skipped", "unchecked")
        ]
        print(", ".join(f"{count} {name}" for name, count in counts))
    if "--junit" in outputs:
        outputs.write("--junit", _junit(checker))
    return int(checker.gone or any(i.result == "failed" for i in checker.items))


def _print_item(item: Item) -> None:
    word = {"passed": "ok", "failed": "FAIL", "skipped": "-", "unchecked": "?"}[item.result]
    width = columns()
    pad = 54 if width is None or width >= 80 else 0
    print(
        f"{word:4} {item.name:{pad}} {item.seconds * 1000:6.0f} ms  {item.detail}".rstrip(),
        flush=True,
    )
    if item.clause:
        print(f"     see {item.clause}", flush=True)
    for ring in item.rings:
        print(f"     {ring}", flush=True)


def _junit(checker: Checker) -> str:
    from pyvmm.testing.junit import TestCase, document

    cases = [
        TestCase(
            "vhost-user",
            i.name,
            i.seconds,
            "skipped" if i.result == "unchecked" else i.result,
            message="\n".join(filter(None, (i.detail, i.clause, *i.rings)))
            if i.result != "passed"
            else "",
        )
        for i in checker.items
    ]
    return document("pyvmm vhost-user check", cases, sum(i.seconds for i in checker.items))


def _probe(args: argparse.Namespace) -> int:
    from pyvmm.conformance.probe import Probe
    from pyvmm.vhostuser.wire import OWN_FEATURES, protocol_names
    from pyvmm.virtio.features import names

    error: VhostUserError | None = None
    with Probe(args.socket, timeout=args.timeout or 2.0) as probe:
        try:
            probe.run()
        except VhostUserError as e:
            error = e
    own = {f"bit-{bit}": name for bit, name in OWN_FEATURES.items()}
    features = [own.get(n, n) for n in names(probe.features)]
    if args.json:
        steps = [
            {k: getattr(s, k) for k in ("message", "outcome", "detail", "microseconds")}
            for s in probe.steps
        ]
        report = {
            "features": features,
            "protocol_features": protocol_names(probe.protocol),
            "queue_pairs": probe.queues,
            "steps": steps,
            "error": str(error) if error else None,
        }
        print_json(report)
    else:
        print(f"features:          {' '.join(features)}")
        print(f"protocol features: {' '.join(protocol_names(probe.protocol)) or 'none'}")
        print(
            f"queue pairs:       {probe.queues if probe.queues is not None else 'does not say (1)'}"
        )
        for s in probe.steps:
            print(f"{s.microseconds:10.0f} us  {s.message:44} {s.outcome} {s.detail}".rstrip())
    if error is not None:
        raise error
    return int(any(s.outcome == "refused" for s in probe.steps))
