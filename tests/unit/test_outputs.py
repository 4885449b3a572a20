"""The files that a command writes: opened early, written whole, told if they are lost, removed if
they are empty. And the same for what is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.support.outputs import Output, Outputs
from pyvmm.errors import HostError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_a_bad_path_is_told_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    good = tmp_path / "good"
    with pytest.raises(UsageError) as e:
        Outputs({"--junit": str(good), "--log": None, "--json": "/nonexistent/x"})
    assert str(e.value) == (
        "--json /nonexistent/x: No such file or directory; name a file that can be written"
    )
    assert not good.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(UsageError, match=r"--json .*: embedded null (byte|character.*); name"):
        Output("--json", "a\0b")
    with pytest.raises(UsageError, match=r"--json .*: Is a directory; name"):
        Output("--json", str(tmp_path))


@pytest.mark.parametrize("keep", [False, True])
def test_a_new_file_without_content_is_removed(tmp_path: Path, keep: bool) -> None:
    with Outputs({"--json": str(tmp_path / "x")}, keep=keep) as outputs:
        assert (tmp_path / "x").exists(), "it can be written"
    assert not (tmp_path / "x").exists()
    outputs.close()


def test_an_older_file_is_not_removed(tmp_path: Path) -> None:
    """Without ``keep`` it is empty from the start, so that nobody takes it for the new result."""
    file = tmp_path / "x"
    file.write_text("old")
    with Outputs({"--json": str(file)}, keep=True):
        pass
    assert file.read_text() == "old"
    with Outputs({"--json": str(file)}):
        assert file.read_text() == ""
    assert file.exists()


def test_what_has_the_name_now_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with Outputs({"--json": str(file)}):
        file.unlink()
        file.touch()
    assert file.exists()
    with Outputs({"--json": str(tmp_path / "y")}):
        (tmp_path / "y").unlink()


@pytest.mark.parametrize("keep", [False, True])
def test_a_later_text_replaces_the_earlier(tmp_path: Path, keep: bool) -> None:
    file = tmp_path / "x"
    file.write_text("a long old text")
    with Outputs({"--json": str(file)}, keep=keep) as outputs:
        outputs.write("--json", "a first text")
        outputs.write("--json", "gr\u00fcn")
        assert outputs.status(0) == 0
    assert file.read_bytes() == "gr\u00fcn".encode()


def test_a_stream_is_written_whole(tmp_path: Path) -> None:
    """Also to a reader that takes little at a time."""
    read, write = os.pipe()
    data = os.urandom(1 << 20)
    with subprocess.Popen(["md5sum"], stdin=read, stdout=subprocess.PIPE) as child:
        os.close(read)
        output = Output("--log", f"/dev/fd/{write}")
        os.close(write)
        output.write(data[:1])
        output.write(data[1:])
        output.close()
        out, _ = child.communicate(timeout=60)
    assert out == subprocess.run(["md5sum"], input=data, capture_output=True).stdout


def test_a_full_disk_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other outputs are written, and a status that says more is kept."""
    files = {"--junit": "/dev/full", "--json": str(tmp_path / "x"), "--log": "/dev/full"}
    with Outputs(files) as outputs:
        outputs.write("--junit", "<testsuites/>")
        outputs.write("--json", "{}")
        with pytest.raises(OSError):
            outputs["--log"].write(b"line\n")
        assert outputs.status(0) == HostError.exit_code
        assert outputs.status(7) == 7
    assert (tmp_path / "x").read_text() == "{}"
    lost = [
        f"pyvmm: {o} /dev/full is lost: No space left on device\n" for o in ("--junit", "--log")
    ]
    assert capsys.readouterr().err == "".join(lost), "each is told once"
    assert Path("/dev/full").exists()


def test_a_reader_that_has_gone_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    with Outputs({"--json": f"/dev/fd/{write}"}) as outputs:
        os.close(read)
        os.close(write)
        outputs.write("--json", "{}")
        assert outputs.status(0) == HostError.exit_code
    assert "--json /dev/fd/" in (err := capsys.readouterr().err) and "Broken pipe" in err


def pyvmm(code: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """A body of ``cli.guard`` in a shell's redirection."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    program = (
        "import sys\nfrom pyvmm.cli import guard\n"
        f"from pyvmm.cli.support.outputs import Outputs\n{code}\n"
    )
    program += "sys.exit(guard(body))"
    argv = ["bash", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", program]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


PRINTS = "def body():\n    print('some words')\n    return {status}"


def test_standard_output_keeps_what_is_there(tmp_path: Path) -> None:
    """Results for ``-`` come after what was printed and written there before, by anybody."""
    code = """def body():
    print("printed")
    with Outputs({"--json": "-"}) as outputs:
        outputs.write("--json", "{}\\n")
        return outputs.status(0)"""
    file = tmp_path / "x"
    file.write_text("older\n")
    assert pyvmm(code, f">>{file}").returncode == 0
    assert file.read_text() == "older\nprinted\n{}\n"
    done = pyvmm(code, ">&-")
    assert done.returncode == 2 and "--json -: Bad file descriptor" in done.stderr


@pytest.mark.parametrize(("status", "expected"), [(0, 101), (3, 3)])
def test_printing_to_a_full_disk(status: int, expected: int) -> None:
    done = pyvmm(PRINTS.format(status=status), ">/dev/full")
    assert done.returncode == expected
    assert done.stderr == "pyvmm: cannot write all of the output: No space left on device\n"


def test_printing_to_nobody() -> None:
    alone = "import select\nend = select.poll()\nend.register(1, 0)\nend.poll()\n"
    done = pyvmm(alone + PRINTS.format(status=0), "| exit 0; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")
    assert pyvmm(PRINTS.format(status=5), ">&-").returncode == 5
