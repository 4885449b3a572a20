"""`pyvmm compare` finds the process that moves the packets of a vhost-user card."""

from __future__ import annotations

import os
from collections.abc import Callable

from pyvmm import Machine, Net
from pyvmm.compare import counters


def test_the_card_s_own_back_end_is_counted(guest: Callable[[str], str]) -> None:
    me = os.getpid()
    assert counters.backends_of(me) == []
    with Machine(guest("hello"), memory="16M", nets=[Net("vhost-user")]) as machine:
        (pid,) = counters.backends_of(me)
        threads = counters.threads_of(pid)
        assert threads
        first = counters.snapshot([("backend", tid) for tid in threads])
        assert len(first) == len(threads)
        machine.start()
        machine.wait(60)
        again = counters.snapshot([("backend", tid) for tid in threads])
        assert counters.by_role(first, again)["backend"]["threads"] == len(threads)
    assert counters.backends_of(me) == []
