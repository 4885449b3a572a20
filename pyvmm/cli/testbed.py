"""Run a command in the testbed: a virtual machine, under emulation, that has real KVM and real
vhost-net; or on another machine that has them, by ssh.

  pyvmm testbed [OPTIONS] [-- COMMAND...]   run COMMAND (default: a shell) in the running testbed,
                                            or in a testbed that is started and stopped for it
  pyvmm testbed up [OPTIONS]                start a testbed and keep it running
  pyvmm testbed down                        stop the testbed, with everything that runs in it
  pyvmm testbed status [--json]             show whether it runs, and how; exit status 1 if not
  pyvmm testbed doctor                      run `pyvmm doctor` there
  pyvmm testbed setup [--kernel-version V]  fetch and build its parts (no root; quick when done);
                      [--vdpa-sim]          with the kernel's vDPA simulator, for Linux 6.12
  pyvmm testbed --cpu intel ...             the same with an Intel processor (slower; one vCPU)
  pyvmm testbed --host ssh://NAME ...       the same on another machine, without emulation

COMMAND sees this machine's files. It can change the checkout (else the working directory), the
directories of -w, pyvmm's cache and the temporary directory. Other changes go to an overlay that is
thrown away. With --cpu intel or --host, it has pyvmm, Python, the built guest images, and what
--add and -w name; what it writes in a directory of -w comes back when it ends. Input, output,
terminal, signals, environment and exit status pass through. With --host, nothing needs to be
installed there, nothing is written to a disk there, and no process stays when the testbed ends.

Examples:
  pyvmm testbed -- pyvmm run --net vhost-net -- ping -c 3 192.168.100.1
  pyvmm testbed --cpu intel doctor
  pyvmm testbed --cpu intel -w out --add tests -- pytest tests --junitxml=out/junit.xml
  pyvmm testbed --host ssh://me@box doctor
  pyvmm testbed --host ssh://box -- pyvmm run --net vhost-net -- ping -c 3 192.168.100.1

Exit status: the command's; 124 if --timeout ended it, 110 if the testbed failed.
"""

from __future__ import annotations

import argparse
import os
import sys

from pyvmm.cli.support.options import count, seconds
from pyvmm.cli.support.parser import Parser
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.errors import UsageError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.testbed.testbed import Testbed

ACTIONS = ("up", "down", "status", "doctor", "setup")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, and the words that follow them."""
    _options(parser)
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="up|down|status|doctor|setup|-- COMMAND",
        help=argparse.SUPPRESS,
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu",
        choices=("auto", "amd", "intel"),
        default="auto",
        help="the processor: AMD by QEMU (auto, quicker), or Intel by Bochs",
    )
    parser.add_argument(
        "--host",
        metavar="ssh://[USER@]NAME[:PORT]",
        default="",
        help="another machine with /dev/kvm, which ssh reaches without a question",
    )
    parser.add_argument(
        "--kvm",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the module kvm_amd or kvm_intel, such as npt=0 or ept=0",
    )
    parser.add_argument(
        "--add",
        metavar="FILE|DIR[:PATH]",
        action="append",
        default=[],
        help="with --cpu intel or --host: a file or directory that COMMAND needs",
    )
    parser.add_argument(
        "-w",
        "--writable",
        metavar="DIR",
        action="append",
        default=[],
        help="another directory in which the command may write",
    )
    parser.add_argument(
        "--cpus",
        type=count(1, 8),
        default=0,
        help="vCPUs, 1 to 8 (default: 2; 1 with --cpu intel or a QEMU older than 8.1)",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", default="", help="memory (4G; 1G with --cpu intel)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds(0, 1e7), help="kill COMMAND after S seconds"
    )
    parser.add_argument(
        "--kernel-version",
        metavar="V",
        help="series of Debian's cloud kernel (6.1, else the newest that is there)",
    )
    parser.add_argument(
        "--vdpa-sim",
        action="store_true",
        help="with setup: build vdpa_sim_net and vp_vdpa, for which 170 MB are fetched",
    )
    parser.add_argument(
        "--vdpa-card",
        action="store_true",
        help="an IOMMU, and a PCI network card for the driver vp_vdpa with a cable to another card",
    )
    parser.add_argument(
        "--name", help="name of the testbed (default: $PYVMM_TESTBED, else default)"
    )
    parser.add_argument(
        "--watchdog",
        metavar="S",
        type=seconds(0, 1e7),
        default=0.0,
        help="seconds of silence that count as a hang (30; with --cpu intel 60 of processor time;"
        " with --host 60)",
    )
    add_json(parser, "an object (status, doctor)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Do what the words say; returns the exit status."""
    from pyvmm.testbed import testbed
    from pyvmm.testbed.machines import CPUS

    words = args.words
    action, command = "", []
    if words and words[0] == "--":
        command = words[1:]
    elif words:
        action = words[0]
        if action not in ACTIONS:
            raise UsageError(
                f"testbed: unknown word {action!r}",
                f"{did_you_mean(action, ACTIONS)}for a command: pyvmm testbed -- {' '.join(words)}",
            )
        more = Parser(prog=f"pyvmm testbed {action}")
        _options(more)
        args = more.parse_args(words[1:], args)
    if args.json and action not in ("status", "doctor"):
        raise UsageError("--json without status or doctor", "leave it out")
    if args.host and args.cpu != "auto":
        raise UsageError("--cpu does not go with --host", "leave one of them out")
    cpu = CPUS[0] if args.cpu == "auto" else args.cpu
    bed = testbed.Testbed(
        args.name,
        cpu=cpu,
        host=args.host,
        cpus=args.cpus,
        memory=_size(args.memory),
        kernel=args.kernel_version,
        kvm=[_option(text) for text in args.kvm],
        writable=args.writable,
        add=args.add,
        vdpa_card=args.vdpa_card,
        watchdog=args.watchdog,
        progress=_progress(args.quiet),
    )
    if action == "up":
        return _up(bed)
    if action == "down":
        if not bed.down():
            print("the testbed is down")
        return 0
    if action == "status":
        return _status(bed, args.json)
    if action == "setup":
        bed.setup(_progress(args.quiet), args.kernel_version, cpu, args.host)
        if args.vdpa_sim:
            from pyvmm.testbed import simulator

            simulator.setup(_progress(args.quiet))
        return 0
    if action == "doctor":
        from pyvmm.programs import module

        command = module("pyvmm", "doctor", *(["--json"] if args.json else []))
    return _command(bed, command, args.timeout)


def _up(bed: Testbed) -> int:
    if not bed.up():
        print("the testbed is up already", file=sys.stderr)
        warning = bed.check(os.getcwd())
        if warning:
            print(f"testbed: {warning}", file=sys.stderr)
    return 0


def _status(bed: Testbed, as_json: bool) -> int:
    status = bed.status()
    if as_json:
        print_json({"up": status is not None, "missing": _missing(bed), **(status or {})})
    elif status is None:
        lacks = _missing(bed)
        print(f"down, and not set up: {lacks}" if lacks else "down")
    else:
        print("up" if status["ready"] else "starting")
        print(
            f"  Linux {status['kernel']} on {status['cpus']} vCPU(s), "
            f"{status['memory'] >> 20} MiB, {status['emulator']}"
        )
        if status["cpus"] < 2 and status.get("max_cpus", 2) < 2:
            print("  one vCPU: this QEMU hangs with more (pyvmm testbed setup fetches a newer one)")
        print(
            f"  process {status['pid']}, for {status['up_s']:.0f} s, "
            f"ready after {status['ready_after_s']:.1f} s"
        )
        print(f"  {status['running']} command(s) running, {status['commands']} so far")
        if status["resting"]:
            print("  stopped until the next command")
        for option in status["kvm"]:
            print(f"  KVM: {option}")
        for text in status["add"]:
            print(f"  added: {text}")
        for path in status["writable"]:
            print(f"  {'writable' if status['shares'] else 'comes back'}: {path}")
        for note in status["notes"]:
            print(f"  {note}")
    return 0 if status else 1


def _missing(bed: Testbed) -> str:
    return bed.missing(bed.cpu, bed.host)


def _command(bed: Testbed, command: list[str], timeout: float | None) -> int:
    from pyvmm.testbed.testbed import inside

    argv = command or [os.environ.get("SHELL") or "/bin/sh"]
    if inside():  # this process is in the testbed
        os.execvp(argv[0], argv)
    return bed.run_attached(argv, timeout=timeout)


def _progress(quiet: bool) -> Callable[[str], None]:
    """A function that prints lines to stderr as they come, or does nothing if ``quiet``."""

    def show(text: str) -> None:
        if not quiet:
            print(f"testbed: {text}", file=sys.stderr, flush=True)

    return show


def _option(text: str) -> str:
    """An option of a kernel module as insmod takes it."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value.isalnum():
        raise UsageError(f"--kvm {text}", "write NAME=VALUE, for example ept=0")
    return text


def _size(text: str) -> int:
    """Bytes in "512M" or "4G"; 0 for an empty string."""
    from pyvmm.memory import parse_size

    if not text:
        return 0
    size = parse_size(text)
    if not 512 << 20 <= size <= 64 << 30:
        raise UsageError(f"--memory {text}", "use 512M to 64G")
    return size
