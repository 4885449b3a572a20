"""What pyvmm takes from the archives of Debian and Ubuntu, by the real apt from lists of packages:
Debian's are recorded (``tests.recorded``).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.host import apt, virtiofsd
from pyvmm.host.apt import Apt, Package
from pyvmm.images import packages, sources
from pyvmm.programs import install
from pyvmm.testbed import assets
from tests.recorded import QEMU, Archive, debian, set_up_packages, told_packages

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
RELEASES = ["bookworm", "trixie"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that apt's own user may enter. Those of pytest are for their owner alone, and
    each pytest that starts sees to it.
    """
    with tempfile.TemporaryDirectory(prefix="pyvmm-archive-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def found(series: str | None) -> tuple[str, list[str]]:
    """Where there is a kernel of the series, and the packages with its files."""
    own, names = apt.find_kernel_package(sources.recipe()["kernel"], series, lambda _: None)
    return own._release, names


def parts(number: str, *kinds: str) -> list[str]:
    return [f"linux-{kind}-{number}" for kind in ("image", *kinds)]


@pytest.mark.parametrize("release", RELEASES)
def test_debians_kernels_are_found(
    place: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    debian(place, monkeypatch, release)
    own, number = {
        "bookworm": ("6.1", "6.1.0-50-cloud-amd64"),
        "trixie": ("6.12", "6.12.117+deb13-cloud-amd64"),
    }[release]
    assert found(None) == found(own) == ("", parts(number))
    if release == "bookworm":
        assert found("6.12") == ("backports", parts("6.12.95+deb12-cloud-amd64"))
    newer = {"bookworm": "trixie-backports", "trixie": "backports"}[release]
    # Older series are in one package, newer ones in several; and the newest number is meant, which
    # is not the last by the alphabet.
    assert found("6.18") == (newer, parts("6.18.15+deb13-cloud-amd64"))
    number = "7.2.12+deb13-cloud-amd64"
    assert found("7.2") == (newer, parts(number, "base", "binary", "modules"))
    # The archive still has the packages named linux-image, but their modules are gone.
    with pytest.raises(HostError, match=r"no kernel 7\.1 for virtual"):
        found("7.1")
    with pytest.raises(HostError, match=r"no kernel 5\.10 for virtual"):
        found("5.10")


#: Library -> the package that has it, without the end that Debian 13 gave to some names.
LIBRARIES = {
    "libc.so.6": "libc6",
    "libm.so.6": "libc6",
    "libresolv.so.2": "libc6",
    "libiperf.so.0": "libiperf0",
    "libcrypto.so.3": "libssl3",
    "libsctp.so.1": "libsctp1",
    "libmnl.so.0": "libmnl0",
    "libbsd.so.0": "libbsd0",
    "libmd.so.0": "libmd0",
}
#: Package -> the libraries that its files need, as in Debian 12.
NEEDED = {
    "dash": ["libc.so.6"],
    "iperf3": ["libiperf.so.0", "libc.so.6"],
    "libiperf0": ["libcrypto.so.3", "libsctp.so.1", "libm.so.6", "libc.so.6"],
    "libssl3": ["libc.so.6"],
    "libsctp1": ["libc.so.6"],
    "ethtool": ["libm.so.6", "libmnl.so.0", "libc.so.6"],
    "libmnl0": ["libc.so.6"],
    "netcat-openbsd": ["libbsd.so.0", "libresolv.so.2", "libc.so.6"],
    "libbsd0": ["libmd.so.0", "libc.so.6"],
    "libmd0": ["libc.so.6"],
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_images_libraries_are_found(
    place: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """All packages that the programs of the image need, by what the archive says of them. Nothing
    is downloaded.
    """
    debian(place, monkeypatch, release)
    there: list[str] = []

    def needed(package: str) -> set[str]:
        """The libraries that the package needs and that no package so far has."""
        have = {name.removesuffix("t64") for name in there}
        return {name for name in NEEDED.get(package, ()) if LIBRARIES[name] not in have}

    def lacking(program: Path, roots: list[Path]) -> set[str]:
        return {name for one in there for name in needed(one.removesuffix("t64"))}

    def download(self: Apt, packages: Iterable[Package]) -> list[Path]:
        return [Path(package.name) for package in packages]

    monkeypatch.setattr(packages, "lacking", lacking)
    monkeypatch.setattr(packages, "unpack", lambda deb, root: there.append(deb.name))
    monkeypatch.setattr(Apt, "download", download)
    programs = list(sources.recipe()["programs"].values())
    got = packages.gather(Apt(), programs, lambda: [place], place)
    names = [package.name for package in got]
    assert names == there and names[: len(programs)] == programs
    ssl = {"bookworm": "libssl3", "trixie": "libssl3t64"}[release]
    assert {ssl, "libc6", "libiperf0", "libsctp1", "libmnl0", "libbsd0", "libmd0"} <= set(names)
    assert len(names) < 20, "more than the programs need"


@pytest.mark.parametrize("release", RELEASES)
def test_the_packages_that_are_named_exist(
    place: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """Those of tools/setup.sh, and those that a message tells the user to install."""
    debian(place, monkeypatch, release)
    own = Apt()
    names = sorted(set_up_packages() | told_packages())
    assert [package.name for package in own.resolve(names)] == names
    # After resolve, which has fetched the lists.
    right = {"bookworm": "qemu-system-common", "trixie": "virtiofsd"}[release]
    assert install("|".join(virtiofsd.PACKAGES.values())).endswith(f" {right}")


@pytest.mark.parametrize("release", RELEASES)
def test_the_testbeds_qemu_is_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """Where the release's QEMU has one vCPU only, that of backports is unpacked: program and data
    of one version.
    """
    debian(place, monkeypatch, release)
    program, data, _ = Apt("backports" if release == "bookworm" else "").resolve(QEMU)
    assert program.version == data.version
    assert int(re.sub(r"^\d+:", "", program.version).partition(".")[0]) >= 10


#: Ubuntu's lists could not be recorded. Most names and numbers of 24.04 are those in the
#: description of Ubuntu's source linux 6.8.0-55.57, those of 22.04 are from logs of apt on such
#: machines. The rest (6.8.0-31, versions of metapackages) and all dependencies are written by hand.
UBUNTU = {
    "24.04": """
        linux-image-virtual 6.8.0-55.57: linux-image-6.8.0-55-generic
        linux-image-generic 6.8.0-55.57: linux-image-6.8.0-55-generic,
          linux-modules-extra-6.8.0-55-generic
        linux-image-6.8.0-55-generic 6.8.0-55.57: kmod, linux-base, linux-modules-6.8.0-55-generic
        linux-image-6.8.0-31-generic 6.8.0-31.31: kmod, linux-base, linux-modules-6.8.0-31-generic
        linux-image-unsigned-6.8.0-55-generic 6.8.0-55.57: linux-modules-6.8.0-55-generic
        linux-image-6.8.0-31-lowlatency 6.8.0-31.31: linux-modules-6.8.0-31-lowlatency
        linux-modules-6.8.0-55-generic 6.8.0-55.57:
        linux-modules-6.8.0-31-generic 6.8.0-31.31:
        linux-modules-extra-6.8.0-55-generic 6.8.0-55.57: linux-modules-6.8.0-55-generic
        linux-modules-ipu6-6.8.0-55-generic 6.8.0-55.57:
        linux-modules-iwlwifi-6.8.0-55-generic 6.8.0-55.57:
        linux-modules-usbio-6.8.0-55-generic 6.8.0-55.57:
        linux-buildinfo-6.8.0-55-generic 6.8.0-55.57:
        """,
    "22.04": """
        linux-image-virtual 5.15.0.41.43: linux-image-5.15.0-41-generic
        linux-image-5.15.0-41-generic 5.15.0-41.44: kmod, linux-base,
          linux-modules-5.15.0-41-generic
        linux-image-5.15.0-25-generic 5.15.0-25.25: kmod, linux-base,
          linux-modules-5.15.0-25-generic
        linux-image-6.8.0-57-generic 6.8.0-57.59~22.04.1: kmod, linux-base,
          linux-modules-6.8.0-57-generic
        linux-modules-5.15.0-41-generic 5.15.0-41.44:
        linux-modules-5.15.0-25-generic 5.15.0-25.25:
        linux-modules-6.8.0-57-generic 6.8.0-57.59~22.04.1:
        """,
}


def packages_of(text: str) -> str:
    """The list as an archive has it."""
    entries = re.findall(r"(\S+) (\S+):((?:[^:]*\n(?= {10}))?.*)", text)
    return "\n".join(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x\n"
        f"Depends: {' '.join(needs.split()) or 'kmod'}\nFilename: ./{name}.deb\nSize: 1\n"
        f"SHA256: {hashlib.sha256(name.encode()).hexdigest()}\n"
        for name, version, needs in entries
    )


@pytest.mark.parametrize("release", UBUNTU)
def test_ubuntus_kernels_are_found(
    place: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """On a system that knows Ubuntu's names only."""
    Archive(place, monkeypatch, packages_of(UBUNTU[release]), None)
    number = {"24.04": "6.8.0-55", "22.04": "5.15.0-41"}[release]
    wanted = ("", parts(f"{number}-generic", "modules"))
    assert found(None) == found(number.rpartition(".")[0]) == wanted
    if release == "22.04":  # the newer one is in the archive, but not the release's own
        assert found("6.8")[1][0] == "linux-image-6.8.0-57-generic"
    with pytest.raises(HostError, match="name no Debian mirror"):
        found("6.12")
    assert f"{number}-generic".endswith(assets.FLAVOURS)
