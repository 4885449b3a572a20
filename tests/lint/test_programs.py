"""No process of pyvmm looks for modules or programs in the current directory (``pyvmm.programs``).

Whoever owns that directory would otherwise run code as the user of pyvmm.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "pyvmm").rglob("*.py"))
#: A command that the user gives, looked up as the user's shell would look it up.
USERS = {"cli/testbed.py": {"os.execvp"}, "testbed/agent.py": {"os.execvpe"}}
BY_PATH = {"os.execvp", "os.execvpe", "os.execlp", "os.execlpe", "os.spawnvp", "os.spawnlp"}
BY_PATH |= {"os.posix_spawnp", "os.system", "os.popen", "shutil.which"}
#: These give a command that begins with an absolute path.
ABSOLUTE = {"module", "program", "tethered", "self.command"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def first_word(command: ast.expr) -> ast.expr:
    """The expression that names the program of a command."""
    if isinstance(command, ast.List | ast.Tuple) and command.elts:
        return first_word(command.elts[0])
    return command.value if isinstance(command, ast.Starred) else command


def is_by_name(call: ast.Call) -> bool:
    """Whether a call of subprocess may look its program up in PATH."""
    if any(keyword.arg == "executable" for keyword in call.keywords):
        return False
    word = first_word(call.args[0])
    if isinstance(word, ast.Call):
        return ast.unparse(word.func) not in ABSOLUTE
    if isinstance(word, ast.Constant):
        return not str(word.value).startswith("/")
    if isinstance(word, ast.JoinedStr):
        return not isinstance(word.values[0], ast.FormattedValue)
    return False  # a variable: it has been looked up before


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "pyvmm")))
def test_programs_are_run_by_their_paths(path: Path) -> None:
    users = USERS.get(str(path.relative_to(ROOT / "pyvmm")), set())
    for name, call in calls(path):
        where = f"{path}:{call.lineno}: {ast.unparse(call)[:80]}"
        assert name not in BY_PATH or name in users, where
        if name in ("subprocess.run", "subprocess.Popen", "subprocess.check_output"):
            assert not is_by_name(call), where
            assert not any(k.arg == "shell" for k in call.keywords), where


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "pyvmm")))
def test_modules_are_run_by_the_launcher(path: Path) -> None:
    """``python -m`` puts the current directory first."""
    if path.name == "programs.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.List | ast.Tuple):
            words = [ast.unparse(word) for word in node.elts]
            assert "sys.executable" not in words, f"{path}:{node.lineno}: use programs.module"


def test_the_rule_finds_what_it_should() -> None:
    def found(text: str) -> bool:
        call = ast.parse(text).body[0].value  # type: ignore[attr-defined]
        return is_by_name(call)

    assert found('subprocess.run(["gcc", "-c"])')
    assert found('subprocess.run(shlex.split("gcc -c"))')
    assert not found('subprocess.run([program("gcc"), "-c"])')
    assert not found('subprocess.run(command, executable=program("gcc"))')
