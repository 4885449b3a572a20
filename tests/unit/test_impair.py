"""Faults on demand: how rules are written (faultopt), and what workers do by them
(cext/impair.h).
"""

from __future__ import annotations

import errno
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm._ext import lib
from pyvmm.backend.net import NetService
from pyvmm.backend.ports import joined_ports, loop_port
from pyvmm.datapath.impair import ImpairPoint, deeds
from pyvmm.datapath.ringformat import PACKED, SPLIT
from pyvmm.errors import HostError, UsageError
from pyvmm.faultopt import FRAMES_MAX, RULES_MAX, of_option, of_text, of_wire, of_words
from pyvmm.faulttc import shapes
from pyvmm.hostnet.traffic import Shape, control
from pyvmm.kvm.recorder import FAULT, LATER, PACKET, Recorder
from pyvmm.netopt import Net
from tests.driver import bits, wait_for
from tests.ringforms import Form
from tests.unit.test_net_worker import (
    ALL,
    CSUM,
    EVENT_IDX,
    GSO,
    INDIRECT_DESC,
    LONG_MS,
    PATIENCE,
    Rig,
    frame,
    interrupted,
)
from tests.unit.test_switch import Rig as Card

# --- how rules are written ------------------------------------------------------------------------


def test_a_rule_has_its_words() -> None:
    (rule,) = of_option("rx+loss=10%+delay=20ms+jitter=1.5ms+rate=10mbit+burst=3000+until=2s")
    assert rule.ways == 1 and rule.frames
    assert rule.chance("loss").share == pytest.approx(0.1)
    assert rule.chance("chance").share == 1 and rule.chance("corrupt").share == 0
    assert rule.times == {"delay": 20_000_000, "jitter": 1_500_000, "until": 2_000_000_000}
    assert rule.rate == 10_000_000 and rule.numbers == {"burst": 3000}
    assert str(rule) == "rx loss=10% delay=20ms jitter=1.5ms rate=10mbit burst=3000 until=2s"


def test_a_direction_begins_a_rule() -> None:
    rules = of_words(["loss", "tx", "delay=1us", "both", "corrupt=1/100"])
    assert [rule.ways for rule in rules] == [3, 2, 3]
    assert rules[2].chance("corrupt").every == 100
    assert [r.ways for r in of_text(["rx loss", "delay=1s", "tx corrupt rx duplicate"])] == [
        1, 3, 2, 1
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("los=10%", "did you mean loss?"),
        ("loss=0%", "loss=10% or loss=1/100"),
        ("loss=101%", "loss=10% or loss=1/100"),
        ("loss=1/0", "each 100th"),
        ("loss=-1%", "each 100th"),
        ("loss=1e1%", "each 100th"),
        ("loss=", "as loss=10%"),
        ("delay", "as delay=20ms"),
        ("delay=20", "a time up to 60s"),
        ("delay=61s", "a time up to 60s"),
        ("delay=0ms", "a time up to 60s"),
        ("delay=٣s", "a time up to 60s"),
        ("rate=10", "1kbit to 1000gbit"),
        ("rate=1bit", "1kbit to 1000gbit"),
        ("queue=5000+delay=1s", "use 1 to 4096"),
        ("rx", "does nothing"),
        ("rx+after=3", "does nothing"),
        ("loss+loss", "given twice"),
        ("loss+hold-irq=1ms", "two rules"),
        ("hold-irq=1ms+queue=3", "are for frames"),
        ("loss+burst=3", "rate=10mbit"),
        ("loss+keep=3", "give it too, as truncate=10%"),
        ("truncate+keep=65536", "use 0 to 65535"),
        ("reorder-used+keep=3", "are for frames"),
        ("reorder-used+loss", "two rules"),
        ("loss+from=2s+until=1s", "a later until="),
        ("+".join(["rx+loss"] * (RULES_MAX + 1)), f"at most {RULES_MAX}"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_line(words: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        of_option(words)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_rules_go_through_json() -> None:
    rules = of_words(["tx", "loss=1/3", "filter=tcp port 80", "rx", "extra-irq=50%"])
    back = of_wire(json.loads(json.dumps([rule.wire() for rule in rules])))
    assert [str(rule) for rule in back] == [str(rule) for rule in rules]
    assert str(back[0]) == "tx loss=1/3 filter='tcp port 80'"
    assert back[0].code == rules[0].code != b"" and back[0].ways == 2


@pytest.mark.parametrize(
    "item",
    [
        3,
        {},
        {"words": "loss"},
        {"words": [3]},
        {"words": ["loss", "rx"]},
        {"words": ["loss", "filter=arp"]},
        {"words": ["loss"], "filter": 3},
        {"words": ["loss"], "filter": [[1, 2]]},
        {"words": ["loss"], "filter": [[6, 0, 0, 1]], "expression": 4},
        {"words": ["loss" * 100]},
    ],
)
def test_what_is_no_rule_in_json_is_refused(item: object) -> None:
    with pytest.raises(UsageError):
        of_wire([item])


@pytest.mark.parametrize(
    "net",
    [
        "vhost-user,socket=/s",
        "vhost-vdpa,device=/dev/vhost-vdpa-0",
        "vhost-net,fd=9",
        "vhost-net,macvtap=eth0",
    ],
)
def test_a_card_whose_packets_pass_nothing_of_ours_is_refused(net: str) -> None:
    mode = net.partition(",")[0]
    with pytest.raises(UsageError, match=f"no faults on demand on {mode}"):
        Net.parse(f"{net},fault=loss")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("hold-irq=1ms", "hold-irq=1ms: kicks and interrupts do not come past pyvmm there"),
        ("rx+extra-irq", "extra-irq: kicks and interrupts do not come"),
        ("tx+hold-kick=1ms", "hold-kick=1ms: kicks and interrupts do not come"),
        ("tx+reorder-used", "reorder-used: the virtqueues are the kernel's there"),
        ("rx+truncate", "truncate: tc cuts no frames"),
        ("rx+loss=1/3", "loss=1/3: tc draws lots, and counts no frames; write loss=33.3%"),
        ("rx+loss+chance=5%", "chance=5%: tc has no chance for a whole rule"),
        ("rx+loss+after=3", "after=3: tc counts no frames"),
        ("rx+loss+count=3", "count=3: tc counts no frames"),
        ("rx+loss+until=3s", "until=3s: tc has no times"),
        ("rx+delay=1s+jitter=3s", "jitter=3s: tc takes 2s at most"),
        ("rx+delay=1s+reorder=5%", "reorder=5%: tc reorders by a delay, and there is delay="),
        ("rx+reorder", "reorder: all of them would keep their order"),
        ("rx+delay=499ns", "delay=499ns: tc counts microseconds; write 1us or more"),
        ("rx+delay=1ms+jitter=500ns", "jitter=500ns: tc counts microseconds"),
        ("rx+corrupt=0.00000001%", "corrupt=0.00000001%: tc takes 0.0000001% at least"),
        ("rx+rate=1mbit+burst=3000+loss", "burst=3000: tc's token bucket does nothing else"),
        ("rx+loss+both+delay=1s", "two rules for rx"),
        ("loss,fault-seed=3", "no seed on vhost-net: tc takes none"),
    ],
)
def test_what_tc_cannot_do_is_refused_in_one_line(words: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        Net.parse(f"vhost-net,fault={words}")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert Net.parse(f"vhost-user,fault={words}").fault, "our own back-end can do it"


@pytest.mark.parametrize("tap", ["tap0\nexec bpf", "-batch", "a b", "tap0\n", "", "a" * 16])
def test_a_tap_is_one_word_of_tc(tap: str) -> None:
    """The helper has rights that a confined machine has not."""
    with pytest.raises(HostError, match="no traffic control of"):
        control([tap, "look", ""])


def test_rules_in_the_words_of_tc() -> None:
    """Bursts by tbf, all else by netem; a frame that goes behind others is one that waits."""

    def words(text: str) -> dict[str, str]:
        found = shapes(of_text([text]), "x", 1500)
        for shape in found.values():
            again = Shape.of_word(shape.word())
            assert (again.numbers, again.code) == (shape.numbers, shape.code)
        return {way: " ".join(shape.qdisc()) for way, shape in found.items()}

    loss = "netem limit 4096 loss 25.0000000%"
    assert words("both loss=25%") == {"rx": loss, "tx": loss}
    assert words("tx delay=20ms jitter=5ms queue=7 duplicate=50%") == {
        "tx": "netem limit 7 delay 20000us 5000us duplicate 50.0000000%"
    }
    assert words("rx reorder=25%") == {
        "rx": "netem limit 4096 delay 10000us 0us reorder 75.0000000%"
    }
    assert words("rx rate=1mbit") == {"rx": "netem limit 4096 rate 1000000bit"}
    assert words("rx rate=1mbit burst=3000 queue=50") == {
        "rx": "tbf rate 1000000bit burst 3000 limit 3276800"
    }
    assert shapes(of_text(["tx loss filter='arp'"]), "x")["tx"].code
    with pytest.raises(UsageError, match=r"write burst=1522 or more"):
        shapes(of_text(["rx rate=1mbit burst=1521"]), "x", 1500)


def test_a_seed_needs_faults() -> None:
    with pytest.raises(UsageError, match="fault-seed= without fault="):
        Net.parse("emulated,fault-seed=3")
    assert Net.parse("emulated,fault=loss,fault-seed=3").fault_seed == 3
    with pytest.raises(UsageError, match="use 0 to"):
        Net.parse("emulated,fault=loss,fault-seed=-3")


# --- what workers do ------------------------------------------------------------------------------


@contextmanager
def faulty(*rules: str, seed: int = 1, acked: int = ALL, **options: Any) -> Iterator[Any]:
    """A worker with rules, and ``rig.point``."""
    point = ImpairPoint()
    with Rig(acked, impair=point, **options) as rig:
        rig.point = point  # type: ignore[attr-defined]
        point.set(of_text(rules), seed)
        yield rig.start()
    point.close()


def counts(rig: Any) -> dict[str, int]:
    return {name: n for name, n in rig.point.counters().items() if n}


def transmit(rig: Any, *frames: bytes, outside: list[bytes] | None = None) -> None:
    """The guest sends, and the worker has taken and given back all.

    :param outside: gets what arrives meanwhile; without, the worker may wait for room there.
    """
    before = rig.counter("tx_packets")

    def taken() -> bool:
        if outside is not None:
            take(rig, outside)
        return bool(rig.counter("tx_packets") >= before)

    for at in range(0, len(frames), 50):
        some = frames[at : at + 50]
        rig.driver.send(*some)
        before += len(some)
        assert wait_for(taken)
        assert wait_for(lambda: rig.driver.tx.outstanding == 0)


def take(rig: Any, outside: list[bytes]) -> int:
    """Add the guest's frames that are outside by now; returns how many there are."""
    with suppress(BlockingIOError):
        while True:
            outside.append(rig.cable.far.recv(1 << 17)[12:])
    return len(outside)


def came(rig: Any, count: int) -> list[bytes]:
    """So many frames of the guest's, as they arrive outside."""
    return [rig.cable.receive(PATIENCE)[12:] for _ in range(count)]


def nothing_more(rig: Any) -> bool:
    """Whether nothing is left outside; once what was to come has come."""
    try:
        rig.cable.far.recv(1 << 17)
    except BlockingIOError:
        return True
    return False


def test_each_third_frame_is_lost() -> None:
    frames = [frame(i) for i in range(100)]
    with faulty("tx loss=1/3") as rig:
        transmit(rig, *frames)
        left = [f for i, f in enumerate(frames, 1) if i % 3]
        assert came(rig, len(left)) == left
        assert nothing_more(rig)
        assert counts(rig) == {"tx_fault_frames": 100, "tx_fault_loss": 33}
        assert rig.counter("tx_packets") == 100  # the guest's view: they have been sent


def test_frames_for_the_guest_are_lost() -> None:
    with faulty("rx loss=1/2") as rig:
        for i in range(100):
            rig.cable.far.send(bytes(12) + frame(i))
        packets = rig.driver.wait_packets(50, PATIENCE)
        assert [p[12:] for p in packets] == [frame(i) for i in range(0, 100, 2)]
        assert wait_for(lambda: counts(rig) == {"rx_fault_frames": 100, "rx_fault_loss": 50})
        transmit(rig, frame(1))
        assert came(rig, 1) == [frame(1)]  # the other way goes on


def lost_of(seed: int, *rules: str) -> list[int]:
    with faulty(*rules, seed=seed) as rig:
        frames = [frame(i) for i in range(200)]
        transmit(rig, *frames)
        lost = counts(rig)["tx_fault_loss"]
        got = [struct.unpack_from("<I", f)[0] for f in came(rig, 200 - lost)]
        assert nothing_more(rig)
        return sorted(set(range(200)) - set(got))


def test_the_same_seed_has_the_same_deeds() -> None:
    first = lost_of(7, "tx loss=50%")
    assert 60 < len(first) < 140  # 5.6 standard deviations
    assert lost_of(7, "tx loss=50%") == first
    assert lost_of(8, "tx loss=50%") != first
    # Other rules of the other way, and other deeds of the same rule, change nothing.
    assert lost_of(7, "tx loss=50% delay=1ms", "rx loss=10%") == first


def test_a_chance_is_met() -> None:
    with faulty("tx loss=10%", seed=3) as rig:
        for i in range(40):
            transmit(rig, *(frame(i) for i in range(50)))
            while not nothing_more(rig):
                pass
        assert 130 < counts(rig)["tx_fault_loss"] < 270  # of 2000: 200, 5.2 standard deviations


def test_frames_are_repeated() -> None:
    with faulty("tx duplicate=1/2", "rx duplicate") as rig:
        transmit(rig, *(frame(i) for i in range(4)))
        assert came(rig, 6) == [frame(i) for i in (0, 1, 1, 2, 3, 3)]
        rig.cable.far.send(bytes(12) + frame(9))
        assert [p[12:] for p in rig.driver.wait_packets(2, PATIENCE)] == [frame(9)] * 2
        assert counts(rig)["tx_fault_duplicate"] == 2 and counts(rig)["rx_fault_duplicate"] == 1


def test_a_frame_goes_behind_the_next() -> None:
    """Unless the worker is kept from the next one for 10 ms, as on a busy machine."""
    for _ in range(50):
        with faulty("tx reorder=1/3") as rig:
            frames = [frame(i) for i in range(9)]
            rig.driver.tx.publish()
            for f in frames:
                rig.driver.queue(f)
            rig.driver.tx.publish()
            got = [frames.index(f) for f in came(rig, 9)]
            # The last one had nothing to wait for.
            assert counts(rig) == {"tx_fault_frames": 9, "tx_fault_reorder": 3}
        if got == [0, 1, 3, 2, 4, 6, 5, 7, 8]:
            return
        assert got[:2] == [0, 1] and got[4] == 4 and got[7:] == [7, 8]
        assert {*got[2:4]} == {2, 3} and {*got[5:7]} == {5, 6}
    pytest.fail("frames stay in order")


@pytest.mark.parametrize("way", ["tx", "rx"])
def test_one_bit_is_turned_over(way: str) -> None:
    with faulty(f"{way} corrupt") as rig:
        for i in range(50):
            f = frame(i, 60 + 61 * i)
            if way == "tx":
                transmit(rig, f)
                (got,) = came(rig, 1)
            else:
                rig.cable.far.send(bytes(12) + f)
                got = rig.driver.wait_packets(i + 1, PATIENCE)[-1][12:]
            assert got[:14] == f[:14] and len(got) == len(f)
            turned = [a ^ b for a, b in zip(got, f, strict=True) if a != b]
            assert len(turned) == 1 and turned[0].bit_count() == 1
        assert counts(rig)[f"{way}_fault_corrupt"] == 50


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("length", [100, 101, 3000, 9001])
def test_a_checksum_is_made_before_a_bit_is_turned_over(length: int) -> None:
    """Else nobody would notice: whoever makes it later makes it of what is wrong."""
    header = struct.pack("<BBHHHHH", 1, 0, 54, 0, 34, 16, 0)
    with faulty("tx corrupt", acked=ALL | CSUM) as rig:
        f = bytearray(frame(3, length))
        f[50:52] = b"\x12\x34"  # the sum of a pseudo header, say
        rig.driver.queue(bytes(f), header=header)
        rig.driver.tx.publish()
        got = rig.cable.receive(PATIENCE)
        assert got[0] == 0  # no NEEDS_CSUM any more
        data = bytearray(got[12:])
        wrong = [i for i in range(length) if data[i] != f[i] and i not in (50, 51)]
        assert len(wrong) <= 1
        pseudo = b"\x12\x34"  # as the receiver adds it
        if wrong and wrong[0] >= 34:
            assert checksum(pseudo + bytes(data[34:])) != 0xFFFF
            data[wrong[0]] = f[wrong[0]]
        if wrong:
            assert checksum(pseudo + bytes(data[34:])) == 0xFFFF  # right for what was right


def test_what_the_host_has_verified_is_verified_no_more() -> None:
    with faulty("rx corrupt", acked=ALL | CSUM) as rig:
        rig.cable.far.send(b"\2" + bytes(11) + frame(1))  # DATA_VALID
        (got,) = rig.driver.wait_packets(1, PATIENCE)
        assert got[0] == 0 and got[12:] != frame(1)


def test_a_frame_to_be_segmented_is_left_alone() -> None:
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)
    with faulty("tx corrupt", acked=ALL | GSO) as rig:
        rig.driver.queue(frame(1, 5000), header=header)
        rig.driver.tx.publish()
        assert rig.cable.receive(PATIENCE) == header + frame(1, 5000)
        assert counts(rig) == {"tx_fault_frames": 1, "tx_fault_corrupt_left": 1}


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_a_frame_for_the_guest_is_cut_short(keep: int) -> None:
    """The used length ends with it, and num_buffers is right for what is left."""
    with faulty(f"rx truncate=1/2 keep={keep}") as rig:
        for i in range(4):
            rig.cable.far.send(bytes(12) + frame(i, 3000))
        packets = rig.driver.wait_packets(4, PATIENCE)
        assert [p[12:] for p in packets] == [
            frame(i, 3000)[: keep if i % 2 else 3000] for i in range(4)
        ]
        assert [p[10] for p in packets] == [2, 1, 2, 1]
        assert counts(rig) == {"rx_fault_frames": 4, "rx_fault_truncate": 2}


def test_a_frame_of_the_guest_keeps_its_ethernet_header() -> None:
    with faulty("tx truncate keep=3 count=1", "tx truncate keep=100 after=1 count=2") as rig:
        transmit(rig, frame(1), frame(2, 200), frame(3, 100))
        assert came(rig, 3) == [frame(1)[:14], frame(2, 200)[:100], frame(3, 100)]
        assert counts(rig) == {
            "tx_fault_frames": 3, "tx_fault_truncate": 2, "tx_fault_truncate_left": 1
        }  # fmt: skip


def lengths_of(seed: int) -> list[int]:
    with faulty("rx truncate", seed=seed) as rig:
        for i in range(30):
            rig.cable.far.send(bytes(12) + frame(i))
        packets = [p[12:] for p in rig.driver.wait_packets(30, PATIENCE)]
        assert all(p == frame(i)[: len(p)] for i, p in enumerate(packets))
        return [len(p) for p in packets]


def test_where_a_frame_ends_follows_from_the_seed() -> None:
    first = lengths_of(7)
    assert len(set(first)) > 10 and max(first) < 60
    assert lengths_of(7) == first != lengths_of(8)


def test_a_rule_that_cuts_frames_draws_no_more_than_before() -> None:
    assert lost_of(7, "tx loss=50% truncate=1/1000") == lost_of(7, "tx loss=50%")


def test_nobody_vouches_for_what_is_left_of_a_frame() -> None:
    header = struct.pack("<BBHHHHH", 1, 0, 54, 0, 34, 16, 0)
    with faulty("both truncate keep=30", acked=ALL | CSUM | GSO) as rig:
        rig.driver.queue(frame(3, 100), header=header)
        rig.driver.queue(frame(4, 5000), header=header[:1] + b"\1" + header[2:])
        rig.driver.tx.publish()
        # Without hdr_len, which would be more than there is.
        assert rig.cable.receive(PATIENCE) == bytes(4) + header[4:] + frame(3, 100)[:30]
        assert len(rig.cable.receive(PATIENCE)) == 5012  # which is to be segmented
        rig.cable.far.send(b"\2" + bytes(11) + frame(1))  # DATA_VALID
        (got,) = rig.driver.wait_packets(1, PATIENCE)
        assert got[0] == 0 and got[12:] == frame(1)[:30]
        assert counts(rig)["tx_fault_truncate_left"] == 1


@pytest.mark.parametrize("keep", [0, 70])
def test_a_frame_is_cut_short_on_a_cable(keep: int) -> None:
    point, port = ImpairPoint(), loop_port(1)
    point.set(of_text([f"rx truncate keep={keep}"]), 1)
    with Rig(ALL, port=port, impair=point) as rig:
        rig.start()
        rig.driver.send(frame(1, 500), frame(2, 60))
        packets = [p[12:] for p in rig.driver.wait_packets(2, PATIENCE)]
        assert packets == [frame(1, 500)[:keep], frame(2, 60)[:keep]]
        rig.path.close()
    assert point.counters()["rx_fault_truncate"] == (1 if keep else 2)
    point.close()
    port.close()


def test_frames_wait_and_stay_in_order() -> None:
    with faulty("tx delay=200ms", "rx delay=200ms") as rig:
        begin = time.monotonic()
        transmit(rig, *(frame(i, 60 + 50 * i) for i in range(50)))
        for i in range(50):
            rig.cable.far.send(bytes(12) + frame(i, 60 + 50 * i))
        assert came(rig, 50) == [frame(i, 60 + 50 * i) for i in range(50)]
        assert time.monotonic() - begin >= 0.2
        packets = rig.driver.wait_packets(50, PATIENCE)
        assert [p[12:] for p in packets] == [frame(i, 60 + 50 * i) for i in range(50)]
        assert counts(rig)["tx_fault_delay"] == counts(rig)["rx_fault_delay"] == 50


def test_jitter_mixes_the_order_and_loses_nothing() -> None:
    with faulty("tx delay=20ms jitter=20ms", seed=5) as rig:
        transmit(rig, *(frame(i) for i in range(100)))
        got = came(rig, 100)
        assert sorted(got) == sorted(frame(i) for i in range(100))
        assert got != [frame(i) for i in range(100)]


def test_a_rate_is_kept() -> None:
    """100 frames of 1000 bytes, of which ten have their tokens, at 1 Mbyte/s."""
    with faulty("tx rate=8mbit burst=10000") as rig:
        begin = time.monotonic()
        transmit(rig, *(frame(i, 1000) for i in range(100)))
        assert came(rig, 100) == [frame(i, 1000) for i in range(100)]
        assert time.monotonic() - begin >= 0.088
        assert 1 <= counts(rig)["tx_fault_rate"] <= 90


def test_who_is_lost_takes_no_tokens() -> None:
    """Each of these frames would take 60 s of the rate."""
    with faulty("tx rate=8kbit", "tx loss count=50") as rig:
        transmit(rig, *(frame(i, 60000) for i in range(50)))
        assert counts(rig)["tx_fault_loss"] == 50
        transmit(rig, frame(7))
        assert came(rig, 1) == [frame(7)] and "tx_fault_rate" not in counts(rig)


def test_who_finds_no_room_takes_no_tokens() -> None:
    """The frames that fill the memory wait until all others have been sent, however slowly."""
    full = FRAMES_MAX // 30  # 60,012 bytes are 30 blocks
    for delay in (1, 4, 16, 60):
        rules = f"tx delay={delay}s count={full}", f"tx corrupt rate=8kbit after={full}"
        with faulty(*rules) as rig:
            got: list[bytes] = []
            transmit(rig, *(frame(i, 60000) for i in range(full)), outside=got)
            transmit(rig, *(frame(i, 60000) for i in range(50)), outside=got)
            if counts(rig).get("tx_fault_full") != 50:
                continue  # memory was free again before
            assert wait_for(lambda: take(rig, got) >= full, 3 * PATIENCE)  # noqa: B023
            assert got == [frame(i, 60000) for i in range(full)]
            transmit(rig, frame(7))
            assert len(came(rig, 1)[0]) == 60 and "tx_fault_rate" not in counts(rig)
            return
    pytest.fail("the machine is too slow to send 186 frames in a minute")


def test_a_queue_has_an_end() -> None:
    with faulty("tx rate=8kbit queue=5") as rig:
        transmit(rig, *(frame(i, 1000) for i in range(20)))
        # The first goes at once, and leaves 1 s to the next.
        assert came(rig, 1) == [frame(0, 1000)]
        assert counts(rig)["tx_fault_full"] >= 13
        assert rig.point.report()["waiting"]["tx"] <= 5


def test_memory_has_an_end() -> None:
    """A guest that sends without end fills the blocks of its card, and no more."""
    with faulty("tx delay=60s") as rig:
        for _ in range(2):
            transmit(rig, *(frame(i, 1500) for i in range(FRAMES_MAX // 2 + 50)))
        assert rig.point.report()["waiting"] == {"rx": 0, "tx": FRAMES_MAX}
        assert counts(rig)["tx_fault_full"] == 100
        assert counts(rig)["tx_fault_delay"] == FRAMES_MAX
    with faulty("tx delay=60s", acked=ALL) as rig:
        transmit(rig, *(frame(i, 60000) for i in range(200)))
        waiting = rig.point.report()["waiting"]["tx"]
        assert waiting == FRAMES_MAX // 30  # 60,012 bytes are 30 blocks
        assert counts(rig)["tx_fault_full"] == 200 - waiting


def test_blocks_are_used_again() -> None:
    """Frames of all lengths, for longer than the blocks last."""
    with faulty("both delay=1ms jitter=1ms", acked=ALL) as rig:
        for lap in range(30):
            frames = [frame(lap * 100 + i, 60 + (i * 2711) % 20000) for i in range(50)]
            transmit(rig, *frames)
            assert sorted(came(rig, 50)) == sorted(frames)
        assert "tx_fault_full" not in counts(rig)


def test_a_filter_chooses() -> None:
    def typed(kind: int, i: int) -> bytes:
        return bytes(12) + struct.pack(">H", kind) + frame(i)

    with faulty("tx loss filter='arp'", "rx loss filter='not arp'") as rig:
        transmit(rig, *(typed(0x0806 if i % 2 else 0x86DD, i) for i in range(10)))
        assert came(rig, 5) == [typed(0x86DD, i) for i in range(0, 10, 2)]
        for i in range(10):
            rig.cable.far.send(bytes(12) + typed(0x0806 if i % 2 else 0x86DD, i))
        packets = rig.driver.wait_packets(5, PATIENCE)
        assert [p[12:] for p in packets] == [typed(0x0806, i) for i in range(1, 10, 2)]


def test_a_rule_has_a_begin_and_an_end() -> None:
    with faulty("tx loss after=3 count=4") as rig:
        transmit(rig, *(frame(i) for i in range(10)))
        assert came(rig, 6) == [frame(i) for i in (0, 1, 2, 7, 8, 9)]
    with faulty("tx loss until=300ms") as rig:
        sent = 0
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            transmit(rig, frame(sent))
            sent += 1
        transmit(rig, frame(sent))  # which no machine is too slow for
        lost = counts(rig).get("tx_fault_loss", 0)
        assert came(rig, sent + 1 - lost) == [frame(i) for i in range(lost, sent + 1)]
    with faulty("tx loss from=60s") as rig:
        transmit(rig, frame(0))
        assert came(rig, 1) == [frame(0)] and not counts(rig)


def test_rules_may_be_newer_than_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker looks at the clock, and then at the rules."""
    later = SimpleNamespace(monotonic_ns=lambda: time.monotonic_ns() + 60 * 10**9)
    monkeypatch.setattr("pyvmm.datapath.impair.time", later)
    with faulty("tx loss from=1s", "tx duplicate until=1s") as rig:
        transmit(rig, frame(1))
        assert came(rig, 2) == [frame(1)] * 2
        assert counts(rig) == {"tx_fault_frames": 1, "tx_fault_duplicate": 1}


def test_rules_come_and_go_while_frames_wait() -> None:
    with faulty("tx delay=300ms") as rig:
        begin = time.monotonic()
        transmit(rig, frame(1))
        rig.point.set([], 0)
        assert not rig.point.active
        transmit(rig, frame(2))  # which does not wait for the first
        quick = time.monotonic() - begin < 0.3
        got = came(rig, 2)
        assert got == [frame(2), frame(1)] or (not quick and got == [frame(1), frame(2)])
        before = counts(rig)
        transmit(rig, frame(3))
        assert came(rig, 1) == [frame(3)] and counts(rig) == before
        rig.point.set(of_text(["tx loss"]), 1)
        transmit(rig, frame(4))
        assert nothing_more(rig) and counts(rig)["tx_fault_loss"] == 1


def test_rules_and_frames_outlive_a_worker() -> None:
    with faulty("both delay=100ms") as rig:
        transmit(rig, frame(1))
        rig.cable.far.send(bytes(12) + frame(2))
        assert wait_for(lambda: rig.point.report()["waiting"]["rx"] == 1)
        bases = rig.path.stop()
        rig.start(bases)
        assert came(rig, 1) == [frame(1)]
        assert [p[12:] for p in rig.driver.wait_packets(1, PATIENCE)] == [frame(2)]
        transmit(rig, frame(3))
        assert came(rig, 1) == [frame(3)] and counts(rig)["tx_fault_delay"] == 2


def test_frames_of_another_kind_do_not_come() -> None:
    """A driver that has not negotiated TSO is not given segments that waited for the one before."""
    with faulty("rx delay=100ms", acked=ALL | GSO) as rig:
        rig.cable.far.send(struct.pack("<BBHHHHH", 1, 1, 54, 100, 34, 16, 0) + frame(1, 1000))
        assert wait_for(lambda: rig.point.report()["waiting"]["rx"] == 1)
        bases = rig.path.stop()
        rig.acked &= ~GSO
        rig.start(bases)
        rig.cable.far.send(bytes(12) + frame(2))
        assert [p[12:] for p in rig.driver.wait_packets(1, PATIENCE)] == [frame(2)]
        assert counts(rig)["rx_fault_cleared"] == 1


def test_a_full_tap_loses_nothing_that_waits() -> None:
    with faulty("tx delay=1ms") as rig:
        count = 0
        while not rig.counter("tx_blocks") and count < 4000:
            rig.driver.send(*(frame(count + i, 1500) for i in range(50)))
            count += 50
            assert wait_for(lambda: not rig.driver.tx.outstanding or rig.counter("tx_blocks"))
        assert rig.counter("tx_blocks")
        assert came(rig, count) == [frame(i, 1500) for i in range(count)]
        assert "tx_fault_full" not in counts(rig)


def test_a_full_tap_has_each_frame_decided_about_once() -> None:
    """Also if the next worker sends it."""
    with faulty("tx loss=1/7") as rig:
        count, got = 0, 0
        for lap in range(1, 4):

            def full(lap: int = lap) -> bool:
                return bool(rig.counter("tx_blocks") >= lap)

            while not full() and count < lap * 4000:
                rig.driver.send(*(frame(count + i, 1500) for i in range(50)))
                count += 50
                assert wait_for(lambda: not rig.driver.tx.outstanding or full())
            assert full()
            rig.start(rig.path.stop())
            left = [frame(i, 1500) for i in range(count) if (i + 1) % 7]
            assert came(rig, len(left) - got) == left[got:]
            got = len(left)
            assert wait_for(lambda: not rig.driver.tx.outstanding)
        assert nothing_more(rig)
        assert counts(rig) == {"tx_fault_frames": count, "tx_fault_loss": count // 7}
        assert rig.counter("tx_packets") == count


def test_a_full_cable_has_each_frame_decided_about_once() -> None:
    point, ports = ImpairPoint(), joined_ports(1)
    point.set(of_text(["tx duplicate=1/2"]), 1)
    with Rig(ALL, port=ports[0], impair=point) as a, Rig(ALL, port=ports[1]) as b:
        a.start()
        count = 0
        while not a.counter("tx_blocks") and count < 20000:
            a.driver.send(*(frame(count + i, 1500) for i in range(50)))
            count += 50
            assert wait_for(lambda: not a.driver.tx.outstanding or a.counter("tx_blocks"))
        assert a.counter("tx_blocks")
        b.start()
        packets = b.driver.wait_packets(3 * count // 2, PATIENCE)
        wanted = [frame(i, 1500) for i in range(count) for _ in range(1 + i % 2)]
        assert [p[12:] for p in packets] == wanted
        assert wait_for(lambda: not a.driver.tx.outstanding)
        assert point.counters()["tx_fault_frames"] == a.counter("tx_packets") == count
        for rig in (a, b):
            rig.path.close()
    for one in (point, *ports):
        one.close()


def test_a_guest_without_buffers_gets_what_has_waited() -> None:
    with faulty("rx delay=1ms", fill=False, hold_ms=60_000) as rig:
        rig.driver.fill(1)
        for i in range(5):
            rig.cable.far.send(bytes(12) + frame(i))
        assert len(rig.driver.wait_packets(1, PATIENCE)) == 1
        rig.driver.fill(20)
        packets = rig.driver.wait_packets(5, PATIENCE)
        assert [p[12:] for p in packets] == [frame(i) for i in range(5)]


@pytest.mark.parametrize("poll_us", [0, 1000])
def test_frames_wait_on_a_cable(poll_us: int) -> None:
    point, port = ImpairPoint(), loop_port(1)
    point.set(of_text(["tx duplicate delay=20ms", "rx delay=20ms"]), 1)
    with Rig(ALL, port=port, impair=point, poll_us=poll_us) as rig:
        rig.start()
        begin = time.monotonic()
        rig.driver.send(*(frame(i, 60 + 100 * i) for i in range(20)))
        packets = [p[12:] for p in rig.driver.wait_packets(40, PATIENCE)]
        assert time.monotonic() - begin >= 0.04
        assert packets == [frame(i // 2, 60 + 100 * (i // 2)) for i in range(40)]
        rig.path.close()
    assert point.counters()["rx_fault_delay"] == 40
    point.close()
    port.close()


def test_frames_are_lost_on_a_cable() -> None:
    """One end's faults are the other end's frames."""
    near, far = ImpairPoint(), ImpairPoint()
    ports = joined_ports(1)
    near.set(of_text(["tx loss=1/2"]), 1)
    far.set(of_text(["rx loss=1/5", "rx corrupt=1/2"]), 1)
    with Rig(ALL, port=ports[0], impair=near) as a, Rig(ALL, port=ports[1], impair=far) as b:
        a.start()
        b.start()
        transmit(a, *(frame(i) for i in range(100)))
        assert len(b.driver.wait_packets(40, PATIENCE)) == 40
        assert near.counters()["tx_fault_loss"] == 50 and far.counters()["rx_fault_loss"] == 10
        assert far.counters()["rx_fault_corrupt"] == 20
        transmit(b, frame(7))  # the other way is untouched
        assert [p[12:] for p in a.driver.wait_packets(1, PATIENCE)] == [frame(7)]
        for rig in (a, b):
            rig.path.close()
    for one in (near, far, *ports):
        one.close()


def test_a_guest_on_a_cable_without_buffers_gets_all_in_time() -> None:
    point, ports = ImpairPoint(), joined_ports(1)
    point.set(of_text(["rx delay=1ms"]), 1)
    with (
        Rig(ALL, port=ports[0]) as a,
        Rig(ALL, port=ports[1], impair=point, fill=False, hold_ms=60_000) as b,
    ):
        a.start()
        b.start()
        b.driver.fill(1)
        transmit(a, *(frame(i) for i in range(5)))
        assert len(b.driver.wait_packets(1, PATIENCE)) == 1
        b.driver.fill(20)
        assert [p[12:] for p in b.driver.wait_packets(5, PATIENCE)] == [frame(i) for i in range(5)]
        for rig in (a, b):
            rig.path.close()
    for one in (point, *ports):
        one.close()


def test_rules_change_under_traffic() -> None:
    """Nothing is lost that no rule loses, and no worker is left with rules that are gone."""
    with faulty() as rig:
        stop = threading.Event()
        rules = [of_text([r]) for r in ("tx delay=1ms", "tx filter='arp' loss", "rx corrupt", "")]

        def change() -> None:
            at = 0
            while not stop.is_set():
                rig.point.set(rules[at % 4], at)
                at += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for lap in range(40):
                frames = [frame(lap * 50 + i) for i in range(50)]
                transmit(rig, *frames)
                assert sorted(came(rig, 50)) == sorted(frames)
        finally:
            stop.set()
            thread.join()


class Short:
    """The library, where a function fails for the second queue pair."""

    def __init__(self, names: dict[str, int]) -> None:
        self._errors, self._calls = names, 0

    def __getattr__(self, name: str) -> Any:
        if name not in self._errors:
            return getattr(lib, name)

        def call(*args: Any) -> int:
            self._calls += 1
            if self._calls == 2 and self._errors[name] == -errno.ENOMEM:
                return -errno.ENOMEM
            done = int(getattr(lib, name)(*args))
            return self._errors[name] if self._calls == 2 else done

        return call


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EBUSY])
def test_all_queue_pairs_have_the_same_rules(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    with faulty("tx loss") as one, Rig(impair=one.point) as two:
        # A second pair of the same card.
        two.path._impair = None
        two.start()
        one.point.enter(1, two.path._pairs[0].worker, None)
        names = ["pv_impair_prepare"] if error == errno.ENOMEM else ["pv_impair_commit"]
        short = Short(dict.fromkeys([*names, "pv_impair_set"], -error))
        monkeypatch.setattr("pyvmm.datapath.impair.lib", short)
        with pytest.raises(HostError, match="memory" if names[0][-1] == "e" else "stopped"):
            one.point.set(of_text(["tx duplicate"]), 5)
        changed = error == errno.EBUSY
        assert one.point.report()["rules"] == ["tx duplicate" if changed else "tx loss"]
        assert one.point.report()["seed"] == (5 if changed else 1)
        for rig in (one, two):
            transmit(rig, frame(1))
            assert came(rig, 2 if changed else 0) == [frame(1)] * (2 if changed else 0)
            assert nothing_more(rig)
        monkeypatch.undo()
        two.path.stop()
        one.point.leave(1)


def test_a_trace_has_the_deeds() -> None:
    recorder = Recorder(1 << 12)
    try:
        with faulty("tx loss=1/2", "tx corrupt", "rx duplicate", recorder=recorder) as rig:
            transmit(rig, *(frame(i) for i in range(4)))
            came(rig, 2)
            rig.cable.far.send(bytes(12) + frame(9))
            rig.driver.wait_packets(2, PATIENCE)
            rig.path.stop()
        events = [e for e in recorder.events("net0", "worker 0")[0] if e.kind == FAULT]
    finally:
        recorder.close()
    assert [(e.reg, e.value, deeds(e.count)) for e in events] == [
        (1, 72, ["corrupt"]),
        (1, 72, ["loss"]),
        (1, 72, ["corrupt"]),
        (1, 72, ["loss"]),
        (0, 72, ["duplicate"]),
    ]


def test_every_deed_has_its_word_and_its_counter() -> None:
    point = ImpairPoint()
    point.set(of_text(["loss"]), 1)
    with Rig(impair=point) as rig:
        rig.start()
        names = {name.removeprefix("rx_fault_") for name in point.counters()}
        for word in deeds(0xFFFF):
            assert word.replace("-", "_") in names
        assert len(deeds(0xFFFF)) == len(deeds(2**32 - 1)) == 13
        rig.path.close()
    point.close()
    assert point.counters()  # what was counted stays
    assert lib.PV_IMPAIR_RULES == RULES_MAX and lib.PV_IMPAIR_BLOCKS == FRAMES_MAX


# --- used entries ---------------------------------------------------------------------------------

FORMS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
SWAPPED = [1, 0, 3, 2, 5, 4, 7, 6, 8]


@contextmanager
def idle(
    packed: bool, *rules: str, acked: int = ALL, seed: int = 1, **options: Any
) -> Iterator[Any]:
    """As ``faulty``, but the worker does not run yet: what is there by then is done in one turn."""
    point = ImpairPoint()
    point.set(of_text(rules), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Form, "now", PACKED if packed else SPLIT)
        with Rig(acked, impair=point, **options) as rig:
            rig.point = point  # type: ignore[attr-defined]
            yield rig
    point.close()


def used_of(rig: Any, count: int, **options: Any) -> list[int]:
    """The guest sends so many frames at once: the places of the chains in the used ring."""
    heads = [rig.driver.queue(frame(i), **options) for i in range(count)]
    rig.driver.tx.publish()
    rig.start()
    assert came(rig, count) == [frame(i) for i in range(count)]  # they are sent in order
    assert wait_for(lambda: rig.driver.tx.outstanding == 0)
    return [heads.index(head) for head, _ in rig.driver.tx.take_used()]


@FORMS
@pytest.mark.parametrize("split", [None, [12, 20]], ids=["", "in pieces"])
def test_used_entries_of_transmits_come_in_another_order(
    packed: bool, split: list[int] | None
) -> None:
    with idle(packed, "tx reorder-used", acked=ALL & ~INDIRECT_DESC) as rig:
        assert used_of(rig, 9, split=split) == SWAPPED
        # The last one has waited for another in vain.
        assert counts(rig) == {"tx_fault_reorder_used": 4, "tx_fault_late_used": 1}
        # Several laps of the ring, as the driver comes to it.
        for lap in range(20):
            transmit(rig, *(frame(lap * 50 + i) for i in range(50)))
            assert came(rig, 50) == [frame(lap * 50 + i) for i in range(50)]
        bases = rig.path.stop()
        assert bases[1] == rig.driver.tx.position and not rig.faults
        done = counts(rig)
        # Each packet was the one that waited, or the one that another waited for, or neither.
        assert 2 * done["tx_fault_reorder_used"] + done["tx_fault_late_used"] == 1009


@FORMS
@pytest.mark.parametrize("length", [60, 3000], ids=["", "merged"])
def test_used_entries_of_receives_come_in_another_order(packed: bool, length: int) -> None:
    """Those of a packet that is spread over several buffers stay together (5.1.6.4.1)."""
    with idle(packed, "rx reorder-used") as rig:
        for i in range(9):
            rig.cable.far.send(bytes(12) + frame(i, length))
        rig.start()
        packets = rig.driver.wait_packets(9, PATIENCE)
        assert [p[12:] for p in packets] == [frame(i, length) for i in SWAPPED]
        assert all(p[10] == (2 if length > 2000 else 1) for p in packets)
        assert counts(rig) == {"rx_fault_reorder_used": 4, "rx_fault_late_used": 1}
        assert rig.path.stop()[0] == rig.driver.rx.position


def test_the_same_seed_has_the_same_order() -> None:
    def order(seed: int) -> list[int]:
        with idle(False, "tx reorder-used=50%", seed=seed) as rig:
            return used_of(rig, 60)

    first = order(7)
    assert first != list(range(60)) and sorted(first) == list(range(60))
    assert order(7) == first != order(8)


@FORMS
def test_with_in_order_the_order_is_kept(packed: bool) -> None:
    """2.7.9, 2.8.8: then the driver may rely on it."""
    with idle(packed, "both reorder-used", acked=ALL | bits("VIRTIO_F_IN_ORDER")) as rig:
        assert used_of(rig, 9) == [*range(9)]
        assert counts(rig) == {"tx_fault_reorder_used_left": 9}


@FORMS
def test_no_used_entry_is_lost_when_the_worker_stops(packed: bool) -> None:
    """One that waits is there before another data path goes on from the ring's position."""
    with idle(packed, "both reorder-used") as rig:

        def moved(packets: int) -> bool:
            return {rig.counter(f"{way}_packets") for way in ("tx", "rx")} == {packets}

        rig.start()
        got: list[bytes] = []
        held = sent = 0
        while held < 3 and sent < 3000:
            rig.driver.send(frame(sent))
            rig.cable.far.send(bytes(12) + frame(sent))
            sent += 1
            assert wait_for(partial(moved, sent))
            waited = rig.driver.tx.outstanding
            bases = rig.path.stop()
            held += waited and rig.driver.tx.outstanding == 0
            assert bases == [ring.position for ring in rig.driver.rings]
            assert rig.driver.tx.outstanding == 0
            rig.driver.tx.take_used()
            take(rig, got)
            rig.driver.poll()  # the buffers go back to the device
            rig.start(bases)
        assert held == 3, "no stop came while an entry waited"
        assert got == [frame(i) for i in range(sent)]
        assert [p[12:] for p in rig.driver.received] == [frame(i) for i in range(sent)]


def test_used_entries_on_a_cable() -> None:
    point, port = ImpairPoint(), loop_port(1)
    point.set(of_text(["both reorder-used"]), 1)
    with Rig(ALL, port=port, impair=point) as rig:
        rig.start()
        for lap in range(1, 11):
            rig.driver.send(*(frame(lap * 20 + i) for i in range(20)))
            packets = [p[12:] for p in rig.driver.wait_packets(20 * lap, PATIENCE)]
            assert sorted(packets[-20:]) == [frame(lap * 20 + i) for i in range(20)]
            assert wait_for(lambda: rig.driver.tx.outstanding == 0)
        rig.path.close()
    done = point.counters()
    for way in ("rx", "tx"):
        assert done[f"{way}_fault_reorder_used"] > 0
        assert 2 * done[f"{way}_fault_reorder_used"] + done[f"{way}_fault_late_used"] == 200
    point.close()
    port.close()


@FORMS
def test_a_trace_tells_where_used_entries_came(packed: bool) -> None:
    recorder = Recorder(1 << 12)
    try:
        with idle(packed, "tx reorder-used", recorder=recorder) as rig:
            assert used_of(rig, 3) == [1, 0, 2]
            rig.path.stop()
        events = [e for e in recorder.events("net0", "worker 0")[0] if e.kind in (PACKET, FAULT)]
    finally:
        recorder.close()
    at = [e.reason for e in events if e.kind == PACKET]
    assert [(e.kind, e.region, deeds(e.count) if e.kind == FAULT else []) for e in events] == [
        (PACKET, LATER, []),
        (PACKET, at[0], []),
        (FAULT, at[1], ["reorder-used"]),
        (PACKET, LATER, []),
        (FAULT, at[2], ["late-used"]),
    ]
    assert [e.size for e in events if e.kind == FAULT] == [events[0].size, events[3].size]


# --- kicks and interrupts -------------------------------------------------------------------------


@pytest.mark.parametrize("acked", [ALL, ALL & ~EVENT_IDX])
def test_an_interrupt_is_held(acked: int) -> None:
    with faulty("rx hold-irq=200ms", acked=acked) as rig:
        rig.driver.rx.enable_interrupts()
        begin = time.monotonic()
        rig.cable.far.send(bytes(12) + frame(1))
        assert wait_for(lambda: counts(rig).get("rx_fault_hold_irq") == 1)
        assert interrupted(rig.driver.rx)
        assert time.monotonic() - begin >= 0.2
        assert wait_for(lambda: rig.counter("rx_calls") == 1)  # counted a moment later


def test_no_held_interrupt_is_owed_when_the_worker_stops() -> None:
    with faulty("tx hold-irq=60s") as rig:
        rig.driver.tx.enable_interrupts()
        rig.driver.send(frame(1))
        assert wait_for(lambda: counts(rig).get("tx_fault_hold_irq"))
        rig.path.stop()
        assert interrupted(rig.driver.tx)


def test_an_interrupt_comes_that_nobody_has_asked_for() -> None:
    with faulty("tx extra-irq") as rig:
        rig.driver.tx.disable_interrupts()
        for i in range(3):  # of the first batch, the device cannot know
            transmit(rig, frame(i))
            came(rig, 1)
        assert wait_for(lambda: counts(rig).get("tx_fault_extra_irq"))
        assert interrupted(rig.driver.tx)


def test_a_kick_is_overlooked_for_a_while() -> None:
    with faulty("tx hold-kick=200ms") as rig:
        for i in range(100):
            assert wait_for(lambda: rig.driver.tx.asked)
            before = counts(rig).get("tx_fault_hold_kick", 0)
            begin = time.monotonic()
            rig.driver.send(frame(i))
            assert came(rig, 1) == [frame(i)]
            took = time.monotonic() - begin
            # The worker may have seen the frame before it slept, and so without the kick, which is
            # held all the same when it comes.
            if took >= 0.2 and counts(rig).get("tx_fault_hold_kick", 0) > before:
                return
        pytest.fail("no kick was held")


def test_a_worker_on_a_cable_sleeps_while_a_kick_is_held() -> None:
    """Also if it is told to look for work first: it may not take what it would find."""
    point, port = ImpairPoint(), loop_port(1)
    with Rig(ALL, port=port, impair=point, fill=False, poll_us=1000, hold_ms=LONG_MS) as rig:
        point.set(of_text(["rx hold-kick=60s"]), 1)
        rig.start()
        (worker,) = rig.path.workers()

        def sleeps() -> bool:
            stat = Path(f"/proc/self/task/{worker['tid']}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "S"

        rig.driver.send(frame(0))
        assert wait_for(lambda: rig.counter("rx_waits") > 0 and rig.driver.rx.asked)
        assert wait_for(sleeps)
        rig.driver.fill(1)
        assert wait_for(lambda: point.counters().get("rx_fault_hold_kick"))
        if rig.driver.rx.returned > 0:  # the worker was awake, and has seen the kick only now
            waits = rig.counter("rx_waits")
            rig.driver.send(frame(1))
            assert wait_for(lambda: rig.counter("rx_waits") > waits)
            rig.driver.fill(1, kick=False)
        returned = rig.driver.rx.returned
        assert wait_for(sleeps)
        assert rig.driver.rx.returned == returned
        rig.path.close()
    port.close()
    point.close()


# --- a card ---------------------------------------------------------------------------------------


def test_a_card_has_rules_by_words() -> None:
    with Card() as card:
        told = card.nic.fault("tx loss=1/2", seed=5)
        assert told["rules"] == ["tx loss=1/2"] and told["seed"] == 5
        net = card.guest.net
        net.send(*(frame(i) for i in range(10)))
        got = [card.cable.receive()[12:] for _ in range(5)]
        assert got == [frame(i) for i in range(0, 10, 2)]
        # The last frame is one that nobody gets.
        assert wait_for(lambda: card.nic.counters()["tx_fault_loss"] == 5)
        report = card.report()
        assert report["counters"]["tx_fault_loss"] == 5
        assert report["fault_rules"]["rules"] == ["tx loss=1/2"]
        assert card.nic.fault()["rules"] == [] and "fault_rules" not in card.report()
        assert "X_PYVMM_FAULTS" in card.events
        card.exchange()


def test_without_faults_nothing_is_counted() -> None:
    with Card() as card:
        card.exchange()
        assert not [name for name in card.nic.counters() if "fault_" in name]


def test_a_switch_keeps_the_faults_or_is_refused() -> None:
    with Card() as card:

        def lost() -> int:
            done = card.nic.faults()["counters"]
            assert isinstance(done, dict)
            return int(done.get("tx_fault_loss", 0))

        card.nic.fault("tx loss=1/2")
        with pytest.raises(UsageError, match="faults on demand, which vhost-user has elsewhere"):
            card.nic.switch("vhost-user")
        assert card.nic.switch("emulated,poll=50").outcome == "switched"
        card.guest.net.send(*(frame(i) for i in range(4)))
        assert [card.cable.receive()[12:] for _ in range(2)] == [frame(0), frame(2)]
        assert wait_for(lambda: lost() == 2)  # the last frame is one that nobody gets
        card.nic.fault()
        assert card.nic.switch("vhost-user").outcome == "switched"
        assert card.nic.fault("tx loss=1/2")["rules"] == ["tx loss=1/2"]
        with pytest.raises(UsageError, match="faults on demand, which emulated has elsewhere"):
            card.nic.switch("emulated")
        card.guest.net.send(*(frame(i) for i in range(4)))
        assert [card.cable.receive()[12:] for _ in range(2)] == [frame(0), frame(2)]
        assert wait_for(lambda: lost() == 4)  # the last frame is one that nobody gets
        card.nic.fault()
        assert card.nic.switch("emulated").outcome == "switched"
        counters = card.nic.counters()
        assert counters["tx_fault_loss"] == 4 and card.nic.faults()["rules"] == []


def test_switches_while_used_entries_wait() -> None:
    """The next data path goes on from the ring's position, and all chains come back."""
    with Card() as card:
        card.nic.fault("both reorder-used")
        net, sent, got = card.guest.net, 0, []
        for lap in range(20):
            for i in range(5):
                net.send(frame(sent + i))
                card.cable.far.send(bytes(12) + frame(sent + i))
            sent += 5
            # Between the two, some used entry waits more often than not.
            assert card.nic.switch("emulated" if lap % 2 else "emulated,poll=50").outcome
            got += [card.cable.receive(PATIENCE)[12:] for _ in range(5)]
        assert got == [frame(i) for i in range(sent)]
        packets = [p[12:] for p in net.wait_packets(sent, PATIENCE)]
        assert sorted(packets) == [frame(i) for i in range(sent)]
        assert wait_for(lambda: net.tx.outstanding == 0) and card.healthy
        assert card.nic.counters()["tx_fault_late_used"] > 0


def test_frames_do_not_wait_for_a_card_that_has_left() -> None:
    """They would come whenever the card is on an emulated data path again."""
    with Card() as card:
        card.nic.fault("both delay=60s")
        card.guest.net.send(frame(1), frame(2))
        card.cable.far.send(bytes(12) + frame(3))
        assert wait_for(lambda: card.nic.faults()["waiting"] == {"rx": 1, "tx": 2})
        card.nic.fault()
        assert card.nic.switch("emulated,poll=50").outcome == "switched"
        assert card.nic.faults()["waiting"] == {"rx": 1, "tx": 2}
        assert card.nic.switch("vhost-user").outcome == "switched"
        assert card.nic.faults()["waiting"] == {"rx": 0, "tx": 0}
        now = card.nic.counters()
        assert (now["rx_fault_cleared"], now["tx_fault_cleared"]) == (1, 2)


def test_a_driver_gets_no_frame_of_the_driver_before() -> None:
    with Card() as card:
        card.nic.fault("both delay=60s")
        card.guest.net.send(frame(1))
        card.cable.far.send(bytes(12) + frame(3))
        assert wait_for(lambda: card.nic.faults()["waiting"] == {"rx": 1, "tx": 1})
        card.guest.pci.reset()
        assert wait_for(lambda: not card.guest.pci.status)
        assert card.nic.faults()["waiting"] == {"rx": 0, "tx": 0}
        assert card.nic.counters()["rx_fault_cleared"] == 1
        assert card.nic.faults()["rules"] == ["both delay=60s"]  # for the next driver, too


def test_wrong_rules_change_nothing() -> None:
    with Card() as card:
        card.nic.fault("tx loss=1/2", seed=1)
        for wrong in ("tx los", "tx 'loss", "tx loss filter='tcp prt 80'"):
            with pytest.raises(UsageError):
                card.nic.fault("rx loss", wrong)
        assert card.nic.faults()["rules"] == ["tx loss=1/2"]


def test_acts_change_what_they_say_and_nothing_else() -> None:
    with Card() as card:
        vm = card.board.vm
        generation = card.guest.pci.get("config_generation")
        vm.delivered()
        card.nic.act("config-interrupt")
        assert (0xFEE00000, 0x30) in vm.delivered(PATIENCE)
        assert card.guest.pci.get("config_generation") == generation and card.healthy
        card.nic.act("interrupt")
        card.nic.act("kick")
        assert wait_for(lambda: {data for _, data in vm.delivered(1)} & {0x31, 0x32})
        card.exchange()
        with pytest.raises(UsageError, match="did you mean needs-reset"):
            card.nic.act("need-reset")
        card.nic.act("needs-reset")
        assert card.guest.pci.status & 64
        assert card.device.faults == ["DEVICE_NEEDS_RESET, on demand"]
        card.guest.pci.reset()
        assert not card.guest.pci.status
        with pytest.raises(UsageError, match="no driver has set up net0"):
            card.nic.act("interrupt")


def test_a_back_end_counts_its_faults() -> None:
    point = ImpairPoint()
    service = NetService(loop_port(1), impair=point)
    point.set(of_text(["rx loss"]), 1)
    assert "rx_fault_loss" not in service.counters()  # no worker yet
    service.close()
    point.close()
