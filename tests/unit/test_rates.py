"""Rates between two answers of the control socket, and the table of ``pyvmm top``."""

from typing import Any

from pyvmm.cli.top import table
from pyvmm.exits.rates import rates


def answer(seconds: float, n: int, reboots: int = 0) -> dict[str, Any]:
    """What x-pyvmm-ledger says after ``n`` of everything."""
    return {
        "time-ns": int(seconds * 1e9),
        "name": "vm0",
        "status": "running",
        "reboots": reboots,
        "exits": {
            "kvm_run_returns": 11 * n,
            "by_name": {
                "serial0 LSR": 10 * n,
                "net0 common device_status": 7,
                **({"intr": n} if n else {}),
            },
        },
        "vcpus": [
            {"index": 0, "kvm-run-returns": 11 * n, "interrupts": 5 * n, "exits-in-kvm": 100 * n}
        ],
        "nets": [
            {
                "name": "net0",
                "mode": "emulated",
                "counters": {
                    "rx_packets": 3 * n,
                    "rx_bytes": 1000 * n,
                    "tx_packets": n,
                    "tx_kicks": n,
                },
                "workers": [{"name": "tap0-0", "tid": 7, "cpu_s": n / 100}],
            }
        ],
    }


def test_rates_are_differences_a_second() -> None:
    now = rates(answer(10, 100), answer(12, 200))
    assert now["seconds"] == 2.0 and now["exits"] == 550
    assert now["by_name"] == {"serial0 LSR": 500, "intr": 50}
    assert now["vcpus"] == [{"index": 0, "exits": 550, "kvm_exits": 5000, "interrupts": 250}]
    (net,) = now["nets"]
    assert (net["rx_packets"], net["rx_bytes"], net["tx_kicks"]) == (150, 50000, 50)
    assert net["rx_kicks"] is None, "nobody counts it"
    assert net["workers"] == [{"name": "tap0-0", "cpu_percent": 50.0}]


def test_causes_that_are_new_count_from_nothing() -> None:
    assert rates(answer(10, 0), answer(11, 10))["by_name"] == {"serial0 LSR": 100, "intr": 10}


def test_a_reset_starts_kvms_counters_over() -> None:
    now = rates(answer(10, 100), answer(11, 200, reboots=1))
    assert now["vcpus"][0]["kvm_exits"] is None and now["vcpus"][0]["interrupts"] is None
    assert now["exits"] == 1100


def test_cards_that_come_and_go() -> None:
    """A new card has no rates yet, be its name new or that of a card that has gone."""
    before, after = answer(10, 100), answer(11, 20)
    after["nets"].append({**after["nets"][0], "name": "net3"})
    nets = rates(before, after)["nets"]
    assert [(net["name"], net["rx_packets"]) for net in nets] == [("net0", 0), ("net3", 0)]
    assert [net["name"] for net in rates(after, before)["nets"]] == ["net0"]


def test_no_time_and_other_workers() -> None:
    now = rates(answer(10, 100), answer(10, 100))
    assert now["exits"] is None and now["by_name"] == {}
    after = answer(11, 200)
    after["nets"][0]["workers"][0]["tid"] = 8
    assert rates(answer(10, 100), after)["nets"][0]["workers"][0]["cpu_percent"] == 0


def test_the_table_fits() -> None:
    before, after = answer(10, 0), answer(11, 10)
    after["exits"]["by_name"] |= {f"net0 queue {i} notify": 1000 - i for i in range(100)}
    now = rates(before, after)
    for rows in (16, 24, 60, 500):
        lines = table(now, rows)
        assert len(lines) <= rows
        assert any("net0 queue 0 notify" in line for line in lines)
        assert any("other causes" in line for line in lines) == (rows < 120)
    text = "\n".join(table(now, 500))
    assert "vm0  running" in text and "emulated" in text and "10 % CPU  tap0-0" in text
    assert all(len(line) < 80 for line in table(now, 500))
