"""Try out a vhost-user back-end without a guest: its features, and its answer to each message.

Examples:
  pyvmm vhost-user probe /tmp/s
  pyvmm vhost-user probe --timeout 10 --json /tmp/s

Exit status: 0 all was answered and nothing refused, 1 something was refused, 112 no connection, a broken protocol, or no answer.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("action", choices=("probe",), help="what to do")
    parser.add_argument("socket", metavar="SOCKET", help="where the back-end listens")
    parser.add_argument("--timeout", metavar="S", type=float, default=2.0, help="seconds for each answer (2)")
    parser.add_argument("--json", action="store_true", help="an object with features and steps")


def run(args: argparse.Namespace) -> int:
    """Probe and print."""
    from pyvmm.datapath.vu_probe import Probe
    from pyvmm.datapath.vu_wire import protocol_names
    from pyvmm.errors import UsageError, VhostUserError
    from pyvmm.virtio.features import names

    if not 0 < args.timeout <= 3600:
        raise UsageError(f"--timeout {args.timeout:g}", "use a positive number of seconds")
    error: VhostUserError | None = None
    with Probe(args.socket, timeout=args.timeout) as probe:
        try:
            probe.run()
        except VhostUserError as e:
            error = e
    features = [n if n != "bit-30" else "PROTOCOL_FEATURES" for n in names(probe.features)]
    if args.json:
        import json

        steps = [
            {k: getattr(s, k) for k in ("message", "outcome", "detail", "microseconds")} for s in probe.steps
        ]
        report = {
            "features": features,
            "protocol_features": protocol_names(probe.protocol),
            "queue_pairs": probe.queues,
            "steps": steps,
            "error": str(error) if error else None,
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"features:          {' '.join(features)}")
        print(f"protocol features: {' '.join(protocol_names(probe.protocol)) or 'none'}")
        print(f"queue pairs:       {probe.queues if probe.queues is not None else 'does not say (1)'}")
        for s in probe.steps:
            print(f"{s.microseconds:10.0f} us  {s.message:44} {s.outcome} {s.detail}".rstrip())
    if error is not None:
        raise error
    return int(any(s.outcome == "refused" for s in probe.steps))
