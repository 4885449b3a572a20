"""Scenarios: what a file may say, those that pyvmm brings, and how they are played."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import UsageError
from pyvmm.faultopt import ACTS
from pyvmm.netopt import Net
from pyvmm.scenario import FILE_MAX, STEPS_MAX, Player, library, load, parse
from tests.driver import wait_for
from tests.pci_guest import frame
from tests.unit.test_switch import Rig as Card

PATIENCE = 60.0


def test_a_file_has_steps(tmp_path: Path) -> None:
    text = """
        about = "x"
        seed = 7
        [[step]]
        faults = "rx loss=10%"
        [[step]]
        at = "1.5s"
        nic = 1
        faults = []
        do = ["needs-reset", "kick"]
        [[step]]
        packets = 3
        flap = { times = 2, down = "20ms", up = "30ms" }
    """
    path = tmp_path / "s.toml"
    path.write_text(text)
    found = load(str(path))
    assert (found.name, found.about, found.seed) == ("s", "x", 7)
    first, second, third, *flaps = found.steps
    assert (first.at, first.nic) == (0, 0) and [str(r) for r in first.rules or ()] == [
        "rx loss=10%"
    ]
    assert (second.at, second.nic, second.rules) == (1_500_000_000, 1, [])
    assert second.acts == ["needs-reset", "kick"]
    assert third.packets == 3 and third.rules is None
    assert [(s.then, s.acts) for s in flaps] == [
        (0, ["link-down"]),
        (20_000_000, ["link-up"]),
        (30_000_000, ["link-down"]),
        (20_000_000, ["link-up"]),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no steps"),
        ("step = 3", "no steps"),
        ("step = [3]", "no steps"),
        ("[[step]]", "step 1: it does nothing"),
        ("x = [", "write TOML"),
        ("a = " + "[" * 5000, "write TOML"),
        ("\udcff", "write TOML"),
        ("[[steps]]\nat = '1s'", "did you mean step?"),
        ("about = 3\n[[step]]\ndo = 'kick'", "about is no text"),
        ("seed = true\n[[step]]\ndo = 'kick'", "seed is no number"),
        ("seed = -1\n[[step]]\ndo = 'kick'", "seed -1"),
        ("[[step]]\ndo = 'kik'", "did you mean kick?"),
        ("[[step]]\ndo = 3", "do is neither"),
        ("[[step]]\nfaults = ['rx los']", "step 1: fault: unknown word 'los'"),
        ('[[step]]\nfaults = ["rx \'loss"]', "step 1: fault:"),
        ("[[step]]\nat = 3\ndo = 'kick'", "at is no time"),
        ("[[step]]\nat = '3'\ndo = 'kick'", "write a time"),
        ("[[step]]\nat = '1s'\npackets = 3\ndo = 'kick'", "leave one of them out"),
        ("[[step]]\npackets = 0\ndo = 'kick'", "packets = 0"),
        ("[[step]]\nnic = 31\ndo = 'kick'", "nic = 31"),
        ("[[step]]\nflap = 3", "flap is no table"),
        ("[[step]]\nflap = { time = 3 }", "did you mean times?"),
        ("[[step]]\nflap = { times = 101 }", "times = 101"),
        ("[[step]]\ndo = 'kick'\n" * (STEPS_MAX + 1), "too many steps"),
    ],
)
def test_what_is_no_scenario_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        parse(text.encode("utf-8", "surrogateescape"), "x.toml")
    assert said in str(e.value) and "\n" not in str(e.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="did you mean overload"):
        load("overlaod")
    (tmp_path / "big.toml").write_bytes(b"#" * (FILE_MAX + 1))
    with pytest.raises(UsageError, match="more than 64 KiB"):
        load(str(tmp_path / "big.toml"))


def test_the_library() -> None:
    """Every scenario is one, says what it is for, and is in its page."""
    page = (Path(__file__).parents[2] / "docs/scenarios.md").read_text()
    assert len(library()) >= 13
    seeds = set()
    for name, path in library().items():
        scenario = load(name)
        assert scenario.name == name and len(scenario.about) > 80 and Path(path).is_file()
        assert f"`{name}`" in page
        seeds.add(scenario.seed)
    assert len(seeds) == len(library())
    for word in ACTS:
        assert f"`{word}`" in (Path(__file__).parents[2] / "docs/fault-injection.md").read_text()


def test_a_scenario_is_played_on_a_card() -> None:
    text = b"""
        seed = 5
        [[step]]
        faults = "tx loss=1/2"
        do = "config-interrupt"
        [[step]]
        packets = 10
        faults = []
        [[step]]
        flap = { times = 2, down = "1ms", up = "1ms" }
        [[step]]
        do = "needs-reset"
    """
    with Card(drive=False) as card:
        player = Player(parse(text), lambda: [card.nic])
        assert player.done == 0  # no driver yet
        card.drive()
        assert wait_for(lambda: player.done == 1)
        generation = card.guest.pci.get("config_generation")
        assert card.nic.faults()["rules"] == ["tx loss=1/2"]
        card.guest.net.send(*(frame(i) for i in range(10)))
        assert wait_for(player.over.is_set)
        assert player.finished and not player.problem
        assert [card.cable.receive()[12:] for _ in range(5)] == [frame(i) for i in range(0, 10, 2)]
        counters = card.nic.counters()
        assert counters["tx_fault_loss"] == 5 and counters["fault_config_interrupt"] == 1
        assert counters["fault_link_down"] == counters["fault_link_up"] == 2
        assert counters["fault_needs_reset"] == 1 and card.guest.pci.status & 64
        assert card.guest.pci.get("config_generation") != generation  # link and status, not in vain
        assert player.report()["played"] == 8  # a flap is as many as it has changes
        player.close()


def test_a_scenario_that_cannot_go_on_says_why() -> None:
    text = b"[[step]]\ndo = 'kick'\n[[step]]\nat = '100ms'\nfaults = 'rx loss'\n[[step]]\ndo='kick'"
    with Card() as card:
        card.nic._route.net = Net("vhost-user", socket="/of/somebody/else")
        player = Player(parse(text), lambda: [card.nic])
        assert wait_for(player.over.is_set)
        assert player.done == 1 and "no faults on demand on vhost-user" in player.problem
        player.close()


def test_the_end_waits_for_no_step() -> None:
    with Card() as card:
        player = Player(parse(b"[[step]]\nat = '60s'\ndo = 'kick'"), lambda: [card.nic])
        player.close()
        assert player.over.is_set() and player.done == 0
    with pytest.raises(UsageError, match="nic=3: the machine has 0 cards"):
        Player(parse(b"[[step]]\nnic = 3\ndo = 'kick'"), list)
