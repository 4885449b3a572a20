"""Package lists of Debian's archive as they were on one day, for tests of what pyvmm takes from the
archive: ``tests/data/packages/SUITE``, in the archive's form, so that the real apt reads them.

``python -m tests.recorded`` records them anew. It needs apt and a network, and lists of another day
need other numbers in ``tests/unit/test_releases.py``. A list has the kernels that could be meant by
mistake, the packages that are named anywhere in pyvmm, and all that the image's programs depend on.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pyvmm.host import apt
from pyvmm.host.apt import Apt
from pyvmm.images.sources import recipe
from pyvmm.testbed.assets import VIRTIOFSDS

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data" / "packages"
#: Suite -> which of its kernels are recorded. The backports keep dozens.
SUITES = {
    "bookworm": r"(cloud-)?amd64(-unsigned)?",
    "bookworm-backports": "cloud-amd64(-unsigned)?",
    "trixie": r"(cloud-)?amd64(-unsigned)?",
    "trixie-backports": "cloud-amd64",
    "sid": r"(cloud-)?amd64",
}
#: What is kept of an entry.
FIELDS = (
    *("Package", "Version", "Architecture", "Pre-Depends", "Depends"),
    *("Filename", "Size", "SHA256"),
)
#: The packages of the QEMU that the testbed takes from backports.
QEMU = ("qemu-system-x86", "qemu-system-data", "seabios")


def set_up_packages() -> set[str]:
    """All that tools/setup.sh installs by a list."""
    script = (ROOT / "tools/setup.sh").read_text()
    lists = re.findall(r'(?m)^\w*PACKAGES="([^"$]+)"$', script)
    assert len(lists) == 5
    return {name for one in lists for name in one.split()}


def told_packages() -> set[str]:
    """All that a message of pyvmm tells the user to install, but for virtiofsd's."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "pyvmm").rglob("*.py")))
    calls = re.findall(r'\binstall\(((?:"[a-z0-9.+-]+"(?:, )?)+)\)', sources)
    assert len(calls) > 5
    return {name for one in calls for name in re.findall(r'"([^"]+)"', one)}


class Archive:
    """Makes the real apt see lists of ours and nothing else, until the test ends.

    :param directory: where the lists and apt's state go. As root, apt reads as a user of its own,
        who must be able to enter.
    :param base: the text of the list that the system itself has.
    :param suites: what ``Apt`` may be asked for, such as "backports" -> the text of its list. None
        on a system that is not Debian, where ``Apt`` has to find out that there is no mirror.
    """

    def __init__(
        self,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        base: str,
        suites: dict[str, str] | None,
    ) -> None:
        settings = {
            "Dir::Etc::SourceList": _archive(directory / "base", base),
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Status": directory / "status",
            # Where Apt puts them, for an apt that we do not call.
            "Dir::State::Lists": directory / "cache/pyvmm/apt/base/lists",
            # As root, apt would keep its index of these lists in the system's.
            "Dir::Cache": directory / "apt-cache",
            "APT::Architecture": "amd64",
        }
        (directory / "status").write_text("")
        (directory / "apt-cache").mkdir()
        (directory / "apt.conf").write_text("".join(f'{k} "{v}";\n' for k, v in settings.items()))
        monkeypatch.setenv("APT_CONFIG", str(directory / "apt.conf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        init = Apt.__init__

        def private(own: Apt, *args: Any, **options: Any) -> None:
            init(own, *args, **options)
            own._private = True

        monkeypatch.setattr(Apt, "__init__", private)
        if suites is None:
            monkeypatch.setattr(apt, "codename", lambda: "")
        else:
            lists = {suite: _archive(directory / suite, text) for suite, text in suites.items()}
            monkeypatch.setattr(Apt, "_sources", lambda own: lists[own._release])


def _archive(directory: Path, text: str) -> Path:
    """Make an archive with this list; its sources file."""
    directory.mkdir()
    (directory / "Packages").write_text(text)
    sources = directory.with_suffix(".list")
    sources.write_text(f"deb [trusted=yes] file:{directory} ./\n")
    return sources


def debian(directory: Path, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """A machine with this release of Debian, as of the day of the record."""
    texts = {suite: (DATA / suite).read_text() for suite in SUITES}
    suites = {"backports": texts[f"{release}-backports"], **texts}
    Archive(directory, monkeypatch, texts[release], suites)


def record(suite: str) -> str:
    """The list of a suite, cut to what the tests need."""
    own = Apt(suite, lambda line: print(f"{suite}: {line}", file=sys.stderr))
    kernels = re.compile(rf"linux-(image|base|binary|modules)-([0-9].*-)?({SUITES[suite]})")
    wanted = {name for name in own.names("linux-") if kernels.fullmatch(name)}
    if suite.endswith("-backports"):
        wanted |= set(QEMU)
    elif suite != "sid":
        wanted |= (
            set_up_packages() | told_packages() | {one.package for one in VIRTIOFSDS} | set(QEMU)
        )
        wanted |= set(own.closure(recipe()["programs"].values()))
    text = own._attempt(lambda: own._apt("apt-cache", "dumpavail"))
    kept = []
    for entry in text.strip().split("\n\n"):
        fields = dict(re.findall(r"(?m)^([A-Z][\w-]*): (.*(?:\n .*)*)", entry))
        if fields["Package"] in wanted:
            kept.append("".join(f"{k}: {fields[k]}\n" for k in FIELDS if k in fields))
    return "\n".join(sorted(kept))


def main() -> None:
    """Record all suites."""
    with tempfile.NamedTemporaryFile("w") as settings:
        # Else apt would name a version that is installed here before that of the archive.
        settings.write('Dir::State::Status "/dev/null";\n')
        settings.flush()
        os.environ["APT_CONFIG"] = settings.name
        DATA.mkdir(exist_ok=True)
        for suite in SUITES:
            (DATA / suite).write_text(record(suite))


if __name__ == "__main__":
    main()
