"""Runs the tests of a module on both formats of rings. The module imports ``form`` and
``pytest_generate_tests``; ``NetGuest`` and the rigs of the tests look at ``Form.now``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyvmm.datapath.ringformat import PACKED, SPLIT, RingFormat
from pyvmm.spec.virtio import VIRTIO_F_RING_PACKED


class Form:
    """:cvar now: the format of the rings of the present test."""

    now: RingFormat = SPLIT

    @classmethod
    def features(cls, acked: int) -> int:
        """``acked`` with RING_PACKED as the format has it."""
        bit = 1 << VIRTIO_F_RING_PACKED
        return acked | bit if cls.now is PACKED else acked & ~bit


def only(form: RingFormat) -> Callable[[Any], Any]:
    """Marks a test that touches the inside of one format's rings."""

    def mark(test: Any) -> Any:
        test.only = form
        return test

    return mark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs on both formats of rings, unless it is marked."""
    one = getattr(metafunc.function, "only", None)
    forms = [one] if one is not None else [SPLIT, PACKED]
    metafunc.parametrize("form", forms, ids=[f.name for f in forms], indirect=True)


@pytest.fixture(autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RingFormat:
    """The format of the rings of each ``Rig``."""
    chosen: RingFormat = request.param
    monkeypatch.setattr(Form, "now", chosen)
    return chosen
