"""Reads unittests.cfg of kvm-unit-tests, which says in QEMU's words what to boot and how, and maps
it to machines of pyvmm.

A test that needs something that a machine of pyvmm cannot have (a device, Hyper-V, a check that
fails) is skipped with the reason. An option that does not change the meaning of a test is left out
with a note.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import time
from pathlib import Path

from pyvmm.errors import UsageError
from pyvmm.kvm.cpu import Cpu

ARCH = "x86_64"
CHECK_MAX = 4096  # bytes of a file that a check looks at; a longer file holds no single value
KEYS = {
    "file", "smp", "extra_params", "qemu_params", "test_args", "groups", "arch", "check",
    "accel", "timeout",
}  # fmt: skip
#: Options of QEMU, without a value and with one, that every machine of pyvmm meets.
MET = {"-enable-kvm", "-no-reboot", "-nodefaults", "-nographic", "-no-user-config"}
MET_VALUE = {"-display", "-vnc", "-serial", "-monitor", "-overcommit", "-global", "-name"}
MET_DEVICES = {"pc-testdev", "testdev", "isa-debug-exit", "isa-debugcon", "pvpanic"}
#: Options of -machine that make no difference to a test, and why.
NO_MATTER = {"pit=off": "the PIT is there, and does not keep KVM from using AVIC"}
#: Of a CPU's options, those that every machine meets, and those that KVM gives no guest.
MET_CPU = {"host-phys-bits", "migratable"}
NOBODY_HAS = {"vmx-mbec"}
MET_MACHINE = {"accel=kvm", "pc", "kernel_irqchip=on", "kernel-irqchip=on", "acpi=on", "vmport=off"}


class Test:
    """One section of the file, as a machine of pyvmm can run it.

    :ivar kernel: path.
    :ivar append: command line.
    :ivar cpu: as ``--cpu`` takes it, or None.
    :ivar memory: as ``--memory`` takes it, or None.
    :ivar timeout: seconds, or None for the default.
    :ivar skip: why the test is not run; empty if it is run.
    :ivar notes: which options were left out.
    """

    __test__ = False  # not a pytest class

    def __init__(self, name: str, kernel: str) -> None:
        self.name, self.kernel = name, kernel
        self.append = ""
        self.initrd: str | None = None
        self.cpus = 1
        self.cpu: str | None = None
        self.memory: str | None = None
        self.timeout: float | None = None
        self.groups: list[str] = []
        self.skip = ""
        self.notes: list[str] = []

    @property
    def manual(self) -> bool:
        """Whether the test runs only if the user asks for it, for its group or for all tests (group
        ``nodefault``).
        """
        return "nodefault" in self.groups


class _NotHere(Exception):
    """The test needs something that a machine of pyvmm does not have."""


def sections(text: str, path: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The file's sections: name, and its keys with their values in order.

    :raises UsageError: the file is malformed; the message names file and line.
    """
    out: list[tuple[str, list[tuple[str, str]]]] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if stripped.startswith("[") and stripped.endswith("]") and stripped[1:-1].strip():
            out.append((stripped[1:-1].strip(), []))
            continue
        key, equals, value = stripped.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not out:
            raise UsageError(f"{path}, line {number}: {stripped!r}", "write [name] or key = value")
        if value.startswith('"""'):
            value = value[3:]
            while '"""' not in value:
                try:
                    value += "\n" + next(lines)[1]
                except StopIteration:
                    raise UsageError(
                        f"{path}, line {number}: the quotes are not closed", 'end it with """'
                    ) from None
            value = value.partition('"""')[0]
        out[-1][1].append((key, value.strip()))
    return out


def read(path: str, max_cpus: int) -> list[Test]:
    """The tests of a file. Their kernels are in the file's directory.

    :param max_cpus: the value of $MAX_SMP.
    :raises UsageError: the file is missing or malformed.
    """
    try:
        text = Path(path).read_text(errors="surrogateescape")
    except OSError as e:
        raise UsageError(f"--config {path}: {e.strerror}", "name a unittests.cfg") from e
    tests = []
    for name, items in sections(text, path):
        files = [v for k, v in items if k == "file"]
        if not files:
            raise UsageError(f"{path}: test {name!r} names no file", "write file = NAME")
        test = Test(name, str(Path(path).parent / files[-1]))
        for key, _ in items:
            if key not in KEYS:
                test.notes.append(f"key {key!r} is not known and was left out")
        try:
            _apply(test, items, max_cpus)
        except _NotHere as e:
            test.skip = str(e)
        tests.append(test)
    return tests


def _apply(test: Test, items: list[tuple[str, str]], max_cpus: int) -> None:
    last = dict(items)
    test.groups = last.get("groups", "").split()
    if last.get("timeout"):
        test.timeout = seconds(last["timeout"], test.name)
    if last.get("arch", ARCH) not in (ARCH, ""):
        raise _NotHere(f"{last['arch']} only")
    if last.get("accel", "kvm") not in ("kvm", ""):
        raise _NotHere(f"accelerator {last['accel']} only")
    for condition in " ".join(v for k, v in items if k == "check").split():
        _check(condition)
    test.cpus = _number("smp", last.get("smp") or "1", max_cpus)
    for key in ("extra_params", "qemu_params"):
        _parameters(test, last.get(key, ""), max_cpus)
    if last.get("test_args"):
        test.append = " ".join([*test.append.split(), *_words(last["test_args"])])
    if test.cpus > max_cpus:
        test.notes.append(f"{test.cpus} CPUs on a host of {max_cpus}")


def _check(condition: str) -> None:
    """``PATH=VALUE``: the file must hold the value.

    Whoever wrote the configuration may not be the one who runs it. So a file that never ends or
    never answers holds nothing up, and what is in a file is not told.
    """
    path, equals, value = condition.partition("=")
    if not equals:
        raise _NotHere(f"check {condition!r} names no value")
    try:
        found = _head(path)
    except (OSError, ValueError) as e:
        raise _NotHere(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if found is None:
        raise _NotHere(f"{path} is no regular file")
    if len(found) > CHECK_MAX or found.strip() != os.fsencode(value):
        raise _NotHere(f"{path} is not {value!r}")


def _head(path: str) -> bytes | None:
    """The first ``CHECK_MAX`` + 1 bytes of a file; None if it is no regular file."""
    # Without O_NONBLOCK, opening a FIFO and reading some files of /proc would wait.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        return os.read(fd, CHECK_MAX + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def _number(what: str, text: str, max_cpus: int) -> int:
    if text in ("$MAX_SMP", "${MAX_SMP}"):
        return max_cpus
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 1000:
        raise _NotHere(f"{what} {text!r} is no number")
    return int(text)


def _words(text: str) -> list[str]:
    # The only shell substitution that the project's own file has. To allow others would mean to
    # run whatever the file says.
    text = re.sub(r"`date \+%s`|\$\(date \+%s\)", str(int(time.time())), text)
    if "`" in text or "$(" in text:
        raise _NotHere(f"{text!r} needs a shell")
    try:
        return shlex.split(text)
    except ValueError as e:
        raise _NotHere(f"{text!r}: {e}") from e


def _parameters(test: Test, text: str, max_cpus: int) -> None:
    """Map QEMU's options. An option goes into the machine, is met by every machine, or is a reason
    to skip the test.
    """
    words = iter(_words(text))
    for word in words:
        option = "-" + word.lstrip("-") if word.startswith("-") else word
        if option in MET:
            continue
        value = next(words, None)
        if value is None:
            raise _NotHere(f"needs QEMU's {word}")
        if option == "-append":
            test.append = f"{test.append} {value}".strip()
        elif option == "-initrd":
            test.initrd = value
        elif option == "-m":
            size = value.partition(",")[0].removeprefix("size=").upper()
            test.memory = size if size[-1:] in "KMG" else f"{size}M"
        elif option == "-smp":
            test.cpus = _number("-smp", value.partition(",")[0].removeprefix("cpus="), max_cpus)
        elif option == "-cpu":
            _cpu(test, value)
        elif option in ("-machine", "-M"):
            _machine(test, value)
        elif option == "-device":
            if value.partition(",")[0] not in MET_DEVICES:
                raise _NotHere(f"needs the device {value.partition(',')[0]}")
        elif option in MET_VALUE:
            test.notes.append(f"{word} {value} was left out")
        else:
            raise _NotHere(f"needs QEMU's {word} {value}")


def _machine(test: Test, value: str) -> None:
    wrong = []
    for part in value.split(","):
        if part in NO_MATTER:
            test.notes.append(f"-machine {part} was left out: {NO_MATTER[part]}")
        elif part.removeprefix("type=") not in MET_MACHINE:
            wrong.append(part)
    if wrong:
        raise _NotHere(f"needs a machine with {','.join(wrong)}")


def _cpu(test: Test, value: str) -> None:
    """The test's CPU: always the host's, without the features that are to be missing. More
    features than the model's do no harm, and neither does it if the host has no such feature: QEMU
    warns, and the test finds out.
    """
    model, *features = value.split(",")
    parts = ["host"]
    # With QEMU, only these two models have the host's performance counters.
    pmu = model in ("host", "max")
    for feature in features:
        name, equals, setting = feature.lstrip("+-").partition("=")
        hide = feature.startswith("-") or setting == "off"
        if name.startswith(("hv-", "hv_")):
            raise _NotHere(f"needs Hyper-V's {feature}")
        if name in MET_CPU or (hide and name in NOBODY_HAS):
            continue
        if name in ("vendor", "phys-bits"):
            parts.append(feature)
        elif equals and setting not in ("on", "off"):
            raise _NotHere(f"needs a CPU with {feature}")
        elif name == "pmu":
            pmu = not hide
        elif hide:
            parts.append(f"-{name}")
    if pmu:
        parts.append("+pmu")
    text = ",".join(parts)
    try:
        Cpu(text)
    except UsageError as e:
        raise _NotHere(f"needs -cpu {value}: {e}") from e
    test.cpu = text if text != "host" else None
    test.notes.append(f"-cpu {value}: the CPU is {text}")


def seconds(text: str, name: str) -> float | None:
    """A time-out as timeout(1) takes it: 90, 90s, 3m, 1h. 0 gives None, which means the default,
    because no test runs forever.

    :raises UsageError: ``text`` is not a time-out.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhd]?)", text)
    if match is None:
        raise UsageError(f"test {name!r}: timeout {text!r}", "write seconds, or 3m")
    unit = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    return float(match[1]) * unit or None
