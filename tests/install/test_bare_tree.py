"""The README's two commands on a bare Debian: a tree made by debootstrap with nothing but make in
it. Needs root, debootstrap and a network; takes some minutes per release: ``make check-install``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recorded import set_up_packages

ROOT = Path(__file__).resolve().parents[2]
MIRROR = os.environ.get("PYVMM_MIRROR", "http://deb.debian.org/debian")

#: Runs the rest of its arguments in the tree $1, in namespaces of its own: whatever the commands
#: leave behind ends with the first process. pip reaches its index by what this machine is
#: configured for, certificates among it. pivot_root and not chroot: in a chroot nobody may make a
#: user namespace.
ENTER = """
set -eu
tree=$1; shift
mount --make-rprivate /
mount --bind "$tree" "$tree"
mount -t proc proc "$tree/proc"
mount --rbind /sys "$tree/sys"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/tmp"
mount -t tmpfs tmpfs "$tree/run"
if [ -e /etc/pip.conf ]; then cp /etc/pip.conf "$tree/etc"; fi
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
    cp /etc/ssl/certs/ca-certificates.crt "$tree/run/certificates"
    export PIP_CERT=/run/certificates
fi
cp /etc/resolv.conf "$tree/etc/resolv.conf"
cd "$tree"
pivot_root . .
umount -l .
exec "$@"
"""


class Tree:
    """A directory with a Debian system in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, script: str, timeout: float = 1800) -> str:
        """A shell script in the tree, which must succeed; its output."""
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        clean |= {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        done = subprocess.run(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", ENTER, "enter", str(self.directory), "sh", "-c", script),
            ],
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def checkout(self) -> None:
        """Put the files of this checkout into the tree, as a clone would."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for name in filter(None, listed.decode().split("\0")):
            if not (ROOT / name).exists():
                continue
            target = self.directory / "root" / "pyvmm" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)


def plant(release: str, directory: Path, *packages: str) -> Tree:
    """A tree of the release with these packages and no other."""
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.fail("as root: tools/setup.sh --trees", pytrace=False)
    subprocess.run(
        [
            *("debootstrap", "--variant=minbase", f"--include={','.join(packages)}"),
            *(release, str(directory), MIRROR),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    made = Tree(directory)
    made.checkout()
    return made


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_the_demo(tmp_path: Path, release: str) -> None:
    """`make demo` sets up what it needs and ends well; then a second guest runs at once. No package
    comes that only tests need.
    """
    tree = plant(release, tmp_path / "tree", "make", "ca-certificates")
    out = tree.run("cd /root/pyvmm && make demo")
    assert "5 packets transmitted, 5 packets received" in out, out
    out = tree.run("cd /root/pyvmm && .venv/bin/pyvmm run -- uname -r 2>/dev/null")
    assert "cloud-amd64" in out
    installed = tree.run("dpkg-query -W -f '${Package} '").split()
    assert not {"chromium", "clang-format", "acpica-tools"} & set(installed)
    assert not (tree.directory / "root/.cache/pyvmm/dpdk").exists()
    # The others, too, are packages: a virtual one would be installed again by each set-up.
    known = set(tree.run("apt-cache pkgnames").split())
    assert known > set_up_packages(), set_up_packages() - known
    again = tree.run("cd /root/pyvmm && make setup")
    assert "installing" not in again and "fetching" not in again, again


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel of a clean clone, test kernels, and the README's test."""
    place = tmp_path_factory.mktemp("goods")
    clone = place.with_name("clone")
    subprocess.run(
        ["git", "-c", "safe.directory=*", "clone", "-q", str(ROOT), str(clone)], check=True
    )
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place)]
    subprocess.run([*wheel, str(clone)], check=True)
    subprocess.run(["make", "-s", "-C", str(clone / "guest")], check=True)
    for name in ("hello.elf", "pcinet.elf"):
        shutil.copy(clone / "guest/build" / name, place)
    (test,) = re.findall(
        r"(?s)```python\n(import pytest\n.*?)```", (ROOT / "README.md").read_text()
    )
    (place / "test_network.py").write_text(test)
    place.chmod(0o755)
    return place


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_a_wheel_for_an_ordinary_user(tmp_path: Path, goods: Path, release: str) -> None:
    """Without a compiler, in a home directory whose name no list could hold: what is missing is
    said in a line. Then a guest runs with a directory of the user's, so do a test kernel and
    commands in the testbed, and the pytest plugin gives a guest to a test.
    """
    tree = plant(release, tmp_path / "tree", "python3-venv", "ca-certificates")
    shutil.rmtree(tree.directory / "root/pyvmm")
    shutil.copytree(goods, tree.directory / "srv/goods")
    begin = """
        cd; python3 -m venv env; env/bin/pip install -q "$(echo /srv/goods/*.whl)[pytest]"
        env/bin/pyvmm run -- true || echo "status $?"
        env/bin/pyvmm testbed setup || echo "status $?"
    """
    end = """
        cd; export PATH="$PWD/env/bin:$PATH"
        pyvmm testbed setup; pyvmm image build; pyvmm doctor || echo "doctor: $?"
        mkdir 'to: share'; echo words >'to: share/file'; cd 'to: share'
        pyvmm run --share . -- sh -c 'cat file; id -u; pwd'
        pyvmm test --host testbed /srv/goods/hello.elf
        pyvmm testbed -- sh -c 'echo "L1 $(uname -r), $PWD"'
        mkdir mytests; cp /srv/goods/test_network.py mytests
        pytest -p no:cacheprovider --pyvmm-host auto mytests
    """
    (tree.directory / "srv/begin").write_text(begin)
    (tree.directory / "srv/end").write_text(end)
    as_her = "su her -c 'export LANG=C.UTF-8; exec sh -eu /srv/{}'"
    out = tree.run("useradd -m -d '/home/of, her é' her\n" + as_her.format("begin"))
    assert "status 105" in out and "status 110" in out and "Traceback" not in out, out
    for packages in re.findall(r"apt-get install --no-install-recommends ([^)]+)\)", out):
        one = " || ".join(
            f"apt-get install -q -y --no-install-recommends {name}"
            for name in packages.split(" or ")
        )
        tree.run(f"export DEBIAN_FRONTEND=noninteractive; {one}")
    out = tree.run(as_her.format("end"), timeout=3600)
    print(out)
    assert "doctor: 3\n" in out, "nothing is missing but a KVM that she may use"
    here = "/home/of, her é/to: share"
    assert f"words\n0\n{here}\n" in out
    assert "[1/1] PASS hello" in out
    assert re.search(rf"(?m)^L1 \S+-cloud-amd64, {here}$", out)
    assert re.search(r"(?m)^=+ 1 passed in ", out)
    if Path("/dev/kvm").exists():  # root may use it; the user's installation is the same
        out = tree.run("'/home/of, her é/env/bin/pyvmm' test --host local /srv/goods/hello.elf")
        assert "[1/1] PASS hello" in out


def pythons() -> dict[str, str]:
    """Per version of Python from 3.11 on that this machine has: a program."""
    found: dict[str, str] = {}
    places = [*os.environ["PATH"].split(":"), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    for place in places:
        for program in sorted(Path(place).glob("python3.*")):
            if match := re.fullmatch(r"python(3\.(\d+))", program.name):
                works = subprocess.run([program, "-m", "venv", "-h"], capture_output=True)
                if int(match[2]) >= 11 and not works.returncode:
                    found.setdefault(match[1], str(program))
    return found


#: What one wheel has to do under each Python: the extension, KVM, argparse's and pytest's hooks;
#: and the sandboxes of machine and back-end, which have to allow what this Python asks for.
TRY = """
cd /; "$1" -m venv "$2/env"; export PATH="$2/env/bin:$PATH"
pip install -q "$(echo "$3"/*.whl)[pytest]"
pyvmm --version; pyvmm doctor --json >"$2/doctor.json" || [ $? -le 3 ]
pyvmm run --help >/dev/null; pyvmm completion fish >/dev/null
if [ -e /dev/kvm ]; then
    pyvmm test --host local "$3/hello.elf"
    for mode in emulated vhost-user; do
        pyvmm run --host local --sandbox on --net $mode --kernel "$3/pcinet.elf" --append count=4
    done
fi
pytest -p no:cacheprovider --markers | grep -A1 pyvmm
python -W error -c 'import pyvmm.cli.run, pyvmm.testing.plugin'
"""


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_wheel_for_each_python(tmp_path: Path, goods: Path, version: str) -> None:
    python = pythons().get(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    clean = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    clean |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    command = ["sh", "-euxc", TRY, "try", python, str(tmp_path), str(goods)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (finding,) = (
        one
        for one in json.loads((tmp_path / "doctor.json").read_text())["findings"]
        if one["name"] == "extension"
    )
    assert finding["state"] == "ok"


def test_a_wheel_for_the_newest_python(tmp_path: Path, goods: Path) -> None:
    """Debian's unstable release has it."""
    tree = plant("sid", tmp_path / "tree", "python3-venv", "ca-certificates")
    shutil.copytree(goods, tree.directory / "srv/goods")
    (tree.directory / "srv/try").write_text(TRY)
    out = tree.run("mkdir /srv/of; sh -eux /srv/try /usr/bin/python3 /srv/of /srv/goods")
    number = tree.run("python3 -c 'import sys; print(sys.version_info[1])'")
    assert int(number) >= 14 and "Traceback" not in out, out


def steps(of: list[dict[str, Any]]) -> dict[str, str]:
    """Per name of a step of a GitHub workflow or action: its shell script."""
    return {step["name"]: step["run"] for step in of if "run" in step}


def test_the_action_for_github(tmp_path: Path) -> None:
    """In a job's container, as GitHub calls it: a step per shell, PATH and the like between them in
    files. The steps find each other's work, and the next one boots a guest.
    """
    action = yaml.safe_load((ROOT / "docs/ci/action.yml").read_text())
    tree = plant("trixie", tmp_path / "tree", "git", "ca-certificates")
    inputs = {name: value["default"] for name, value in action["inputs"].items()}
    script = [
        "export GITHUB_PATH=/root/path GITHUB_ACTION_PATH=/root/pyvmm/docs/ci",
        ": >/root/path",
    ]
    for step in action["runs"]["steps"]:
        assert step["shell"] == "sh"
        env = {
            k: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: inputs[m[1]], v)
            for k, v in step.get("env", {}).items()
        }
        words = " ".join(f"{k}={shlex.quote(v)}" for k, v in env.items())
        path = 'PATH="$(tr "\\n" : </root/path)$PATH"'
        script.append(f"{path} {words} sh -e -c {shlex.quote(step['run'])}")
    script.append(f"{path} pyvmm run -- uname -s")
    out = tree.run("set -e\n" + "\n".join(script))
    assert out.endswith("Linux\n"), out


def test_the_template_for_gitlab(tmp_path: Path) -> None:
    """In its image, as GitLab's runner calls it: one shell for all lines."""
    job = yaml.safe_load((ROOT / "docs/ci/gitlab.yml").read_text())[".pyvmm"]
    release = {"debian:12": "bookworm", "debian:13": "trixie"}[job["image"]]
    tree = plant(release, tmp_path / "tree", "apt")
    env = {"CI_PROJECT_DIR": "/builds/project", **job["variables"]}
    lines = [f'export {name}="{value}"' for name, value in env.items()]
    lines += ["umask 0000", "mkdir -p $CI_PROJECT_DIR/.cache/pyvmm", "cd $CI_PROJECT_DIR"]
    lines += ["umask 0022", *job["before_script"], "pyvmm run -- uname -s"]
    script = re.sub(r"git clone .*", "cp -r /root/pyvmm /opt/pyvmm", "\n".join(lines))
    out = tree.run(f"set -e\n{script}")
    assert out.endswith("Linux\n"), out
    assert sorted(job["cache"]["paths"]) == [f".cache/pyvmm/{part}" for part in ("debs", "images")]
    kept = tree.directory / "builds/project"
    assert all(any((kept / path).iterdir()) for path in job["cache"]["paths"])


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile."""
    lines = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", "").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def test_the_containerfile(tmp_path: Path) -> None:
    """Its instructions, in a tree with as little as the image that it begins with; then its
    program runs a guest where a plain container may not do more.
    """
    found = instructions((ROOT / "docs/ci/Containerfile").read_text())
    (base,) = (rest for name, rest in found if name == "FROM")
    release = {"debian:12": "bookworm", "debian:13": "trixie"}[base]
    tree = plant(release, tmp_path / "tree", "apt")
    script, entry = ["set -e", "cd /"], ""
    for name, rest in found:
        if name == "COPY":
            assert rest == ". /src/pyvmm"
            script.append("mkdir -p /src && cp -r /root/pyvmm /src/pyvmm && rm -r /root/pyvmm")
        elif name == "ENV":
            script.append(f"export {rest}")
        elif name == "RUN":
            script.append(f"( {rest} ) || exit 1")  # set -e ignores what is left of &&
        elif name == "WORKDIR":
            script.append(f"mkdir -p {rest} && cd {rest}")
        elif name == "ENTRYPOINT":
            (entry,) = json.loads(rest)
        else:
            assert name in ("FROM", "CMD"), name
    script.append(
        f"{entry} image list; {entry} doctor || [ $? -le 3 ]; command -v gcc || echo none"
    )
    out = tree.run("\n".join(script))
    assert "\ndefault " in out and "Traceback" not in out and out.endswith("\nnone\n"), out


def test_the_workflow_of_the_example(tmp_path: Path) -> None:
    """Its steps up to an installed pyvmm, in a tree with as little as Debian's container has; then
    the example's tests find pytest and the plugin.
    """
    text = (ROOT / "docs/examples/kernel-ci/.github/workflows/kernel.yml").read_text()
    (release,) = set(re.findall(r"image: debian:(\d+)", text))
    tree = plant({"12": "bookworm", "13": "trixie"}[release], tmp_path / "tree", "apt")
    run = steps(yaml.safe_load(text)["jobs"]["test"]["steps"])
    clone = re.sub(r"git clone .*", "cp -r /root/pyvmm /opt/pyvmm", run["Install pyvmm"])
    tree.run(
        f"set -e\n{run['Install what this workflow uses']}\nexport GITHUB_PATH=/tmp/path\n{clone}\n"
        'PATH="$(cat /tmp/path):$PATH"\ncd /opt/pyvmm/docs/examples/kernel-ci\n'
        "python -m pytest -q test_kernel.py\n"
    )
