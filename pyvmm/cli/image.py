"""Build and list guest images: a kernel and an initramfs that `pyvmm run` boots.

  pyvmm image build                         the prebuilt cloud kernel of this Debian release
  pyvmm image build --kernel-version 6.12   that kernel, also if only a newer Debian has it
  pyvmm image build --from-host             this machine's own kernel and programs
  pyvmm image build --tiny                  a small kernel built from Debian's source
  pyvmm image list                          the images that are built

No root is needed. See docs/images.md.

Exit status: 0; 2 bad usage; 101 the cache cannot be read or written; 111 the image cannot be built,
and the line says what is missing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pyvmm.cli.support.results import add_json, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from pyvmm.images import Image


def add_arguments(parser: ArgumentParser) -> None:
    """The command's actions and their options."""
    sub = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = sub.add_parser(
        "build", help="build an image unless it is up to date", allow_abbrev=False
    )
    build.add_argument(
        "--kernel-version",
        metavar="V",
        help="series of Debian's kernel, such as 6.12 (default: what this Debian release has)",
    )
    build.add_argument(
        "--from-host", action="store_true", help="use this machine's kernel, modules and programs"
    )
    build.add_argument(
        "--tiny", action="store_true", help="build a small kernel from Debian's source (minutes)"
    )
    build.add_argument(
        "--output", type=Path, metavar="DIR", help="also copy the image's files to DIR"
    )
    build.add_argument("--force", action="store_true", help="build again, from the newest packages")
    build.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(build, "an object: what the image is made of, its directory, and fresh")
    listing = sub.add_parser("list", help="list the images that are built", allow_abbrev=False)
    add_json(listing, "an array of objects: what each image is made of, and its directory")


def run(args: Namespace) -> int:
    """Build or list; returns the exit status."""
    return _build(args) if args.action == "build" else _list(args)


def _build(args: Namespace) -> int:
    from pyvmm.errors import UsageError
    from pyvmm.images import is_series
    from pyvmm.images.build import build

    if (args.kernel_version is not None) + args.from_host + args.tiny > 1:
        raise UsageError(
            "--kernel-version, --from-host and --tiny exclude each other", "give one of them"
        )
    if args.kernel_version is not None and not is_series(args.kernel_version):
        raise UsageError(f"{args.kernel_version!r} is no series of kernels", "write it as 6.12")
    start = time.monotonic()

    def progress(line: str) -> None:
        if not args.quiet:
            print(f"[{time.monotonic() - start:5.1f} s] {line}", file=sys.stderr, flush=True)

    image, fresh = build(
        args.kernel_version,
        from_host=args.from_host,
        tiny=args.tiny,
        output=args.output,
        force=args.force,
        progress=progress,
    )
    if args.json:
        print_json(_about(image) | {"fresh": fresh})
        return 0
    print(
        f"image {image.name}: kernel {image.version}, "
        f"{'built' if fresh else 'up to date'} in {image.directory}"
    )
    return 0


def _about(image: Image) -> dict[str, object]:
    """The same for each action: ``image.json``, and where it is."""
    return {**image.info, "directory": image.directory}


def _list(args: Namespace) -> int:
    from pyvmm import images
    from pyvmm.cli.support.screen import columns
    from pyvmm.cli.support.tables import rows_as_text

    found = images.built()
    if args.json:
        print_json([_about(image) for image in found])
        return 0
    if not found:
        print(f"no image is built; {images.remedy('default')}")
        return 0
    rows = []
    for image in found:
        # An image that has travelled into a testbed has no bzImage.
        files = [
            file for name in images.FILES[:3] if (file := Path(image.directory, name)).exists()
        ]
        text = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in files)
        rows.append((image.name, image.version, text))
    print(rows_as_text(rows, columns(), ()))
    return 0
