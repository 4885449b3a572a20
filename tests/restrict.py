"""What containers and CI systems forbid, made here for a command: each function gives the words
that go before it. All but ``DOCKER_CALLS`` need root, to make namespaces and control groups.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: System calls of x86-64 that Docker's list refuses without CAP_SYS_ADMIN, by EPERM.
REFUSED = {
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "unshare": 272,
    "setns": 308,
    "bpf": 321,
    "keyctl": 250,
    "add_key": 248,
    "request_key": 249,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "userfaultfd": 323,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "init_module": 175,
    "finit_module": 313,
    "delete_module": 176,
    "kexec_load": 246,
    "swapon": 167,
    "quotactl": 179,
    "reboot": 169,
}
CLONE, CLONE3 = 56, 435
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of clone(2)
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
#: The capabilities that Docker leaves.
DOCKER_CAPS = (
    "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,"
    "sys_chroot,mknod,audit_write,setfcap"
)
DOCKER_CALLS = [sys.executable, str(Path(__file__).resolve())]


def docker() -> list[str]:
    """Docker's capabilities and system calls."""
    caps = ",".join(f"+{name}" for name in DOCKER_CAPS.split(","))
    return ["setpriv", f"--bounding-set=-all,{caps}", "--inh-caps=-all", *DOCKER_CALLS]


def in_mounts(*commands: str) -> list[str]:
    """A mount namespace of its own, in which these commands have been run."""
    script = "; ".join(["mount --make-rprivate /", *commands, 'exec "$@"'])
    return ["unshare", "--mount", "sh", "-ec", script, "sh"]


def no_user_namespaces() -> list[str]:
    """No capability, and no user namespace that would give any."""
    drop = 'exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    script = f"echo 0 >/proc/sys/user/max_user_namespaces; {drop}"
    return ["unshare", "--user", "--map-root-user", "sh", "-ec", script, "sh"]


def no_tun() -> list[str]:
    """No /dev/net/tun."""
    return in_mounts("mount -t tmpfs none /dev/net")


def read_only_root() -> list[str]:
    """No file can be made anywhere."""
    return in_mounts(
        # The checkout may lie in one of them, so what is there stays.
        *(f"mount --bind {d} {d}; mount -o remount,bind,ro {d}" for d in ("/tmp", "/run")),
        "mount -o remount,bind,ro /",
    )


def no_shm() -> list[str]:
    """A /dev without shm."""
    return in_mounts(
        "mount -t tmpfs none /mnt",
        "for n in kvm null zero full random urandom tty; do mknod /mnt/$n c $(stat -c '%Hr %Lr' "
        "/dev/$n); done",
        "mkdir /mnt/net",
        "mknod /mnt/net/tun c 10 200",
        "mount --move /mnt /dev",
    )


@contextmanager
def memory_limit(size: int) -> Iterator[list[str]]:
    """A control group with so many bytes of memory; None of them is left at the end.

    :raises OSError: there is no group in which this process may make one.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, name = f"/sys/fs/cgroup/memory{path}", "memory.limit_in_bytes"
            break
    else:
        base, name = f"/sys/fs/cgroup{path}", "memory.max"
    group = Path(base, f"pyvmm-test-{os.getpid()}")
    group.mkdir()
    try:
        (group / name).write_text(str(size))
        yield ["sh", "-ec", f'echo $$ >{group}/cgroup.procs; exec "$@"', "sh"]
    finally:
        group.rmdir()


def _filter() -> bytes:
    """The BPF program: a call of ``REFUSED``, or a clone into new namespaces, gets EPERM."""

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    program = [step(load, 0)]
    for number in REFUSED.values():
        program += [step(equal, number, 0, 1), step(give, ERRNO | EPERM)]
    program += [step(equal, CLONE3, 0, 1), step(give, ERRNO | ENOSYS)]
    program += [step(equal, CLONE, 1, 0), step(give, ALLOW)]
    program += [step(load, 16), step(any_bit, NEW_NAMESPACES, 0, 1), step(give, ERRNO | EPERM)]
    return b"".join([*program, step(give, ALLOW)])


def main() -> None:
    """Confine this process and become the command."""
    code = _filter()
    buffer = ctypes.create_string_buffer(code)
    head = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_no_new_privs, pr_set_seccomp, filtered = 38, 22, 2
    for words in ((pr_set_no_new_privs, 1), (pr_set_seccomp, filtered, head)):
        if libc.prctl(*words, *[0] * (5 - len(words))):
            raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
