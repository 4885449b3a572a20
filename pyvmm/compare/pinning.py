"""A CPU of its own for each vCPU while something is measured: otherwise the scheduler is, too."""

from __future__ import annotations

import os
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def possible(vcpus: int) -> bool:
    """Whether this process may use a CPU more than that."""
    return len(os.sched_getaffinity(0)) > vcpus


@contextmanager
def pinned(tasks: Iterable[tuple[str, int]], vcpus: int) -> Iterator[None]:
    """Each vCPU's thread has a CPU to itself; the others' and the calling one, and what it starts,
    share the rest.

    A thread that has been given CPUs of its own (``worker-cpu=``) keeps them. In the end only the
    calling thread is put back.

    :param tasks: (role, tid) of those that take part; the role of a vCPU is "vcpu".
    :param vcpus: how many there are; fewer than the CPUs that this process may use.
    """
    allowed = os.sched_getaffinity(0)
    cpus = sorted(allowed)
    own, rest = iter(cpus[:vcpus]), set(cpus[vcpus:])
    for role, tid in sorted(tasks):
        try:
            if role == "vcpu":
                os.sched_setaffinity(tid, {next(own)})
            elif os.sched_getaffinity(tid) >= allowed:  # a kernel thread may have more than we
                os.sched_setaffinity(tid, rest)
        except (OSError, StopIteration):
            continue  # ended meanwhile
    os.sched_setaffinity(0, rest)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
