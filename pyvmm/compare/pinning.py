"""Gives each vCPU a CPU of its own during a measurement. Without this the figures measure the
scheduler, too.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def possible(vcpus: int) -> bool:
    """Whether this process may use more than ``vcpus`` CPUs."""
    return len(os.sched_getaffinity(0)) > vcpus


@contextmanager
def pinned(tasks: Iterable[tuple[str, int]], vcpus: int) -> Iterator[None]:
    """Give each vCPU's thread a CPU of its own. The other threads, the calling thread, and the
    programs that it starts share the rest.

    A thread that has CPUs of its own already (``worker-cpu=``) keeps them. At the end only the
    calling thread gets all CPUs back.

    :param tasks: (role, tid) of the threads; the role of a vCPU is "vcpu".
    :param vcpus: how many vCPUs there are; fewer than the CPUs that this process may use.
    """
    allowed = os.sched_getaffinity(0)
    cpus = sorted(allowed)
    own, rest = iter(cpus[:vcpus]), set(cpus[vcpus:])
    for role, tid in sorted(tasks):
        try:
            if role == "vcpu":
                os.sched_setaffinity(tid, {next(own)})
            elif os.sched_getaffinity(tid) >= allowed:  # a kernel thread may have more CPUs
                os.sched_setaffinity(tid, rest)
        except (OSError, StopIteration):
            continue  # the thread has ended meanwhile
    os.sched_setaffinity(0, rest)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
