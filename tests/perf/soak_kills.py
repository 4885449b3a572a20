"""``make soak-kills KILLS=1000``: a Linux guest in the testbed sends numbered datagrams while its
vhost-user back-end is killed.

Says what came at the back-end's tap, and exits with 1 where a datagram is missing or came twice, or
where the guest's driver has reset its card. Takes about half a second a kill.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from pyvmm.testbed.testbed import Testbed
from tests.boot import seqnet
from tests.boot.guest import Host
from tests.boot.test_vhost_user import kill_under_traffic, one_guest, tap_backend, undisturbed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--packed", action="store_true", help="with packed virtqueues")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, Testbed() as bed:
        host = Host(bed)
        program = seqnet.build(Path(directory))
        with one_guest(host, program, packed=args.packed) as guest:
            patience = 60 + 10 * args.kills
            account = kill_under_traffic(
                host, guest, program, args.kills, seed=args.seed, patience=patience
            )
            undisturbed(guest)
            with tap_backend(host):
                guest.leave()
        nic = guest.report["nets"][0]
    account["resets"], account["counters"] = nic["resets"], nic["counters"]
    account["seconds"] = round(time.monotonic() - start)
    print(json.dumps(account, indent=2))
    good = (
        account["reviver"]["kills"] == args.kills
        and account["next"] == account["sent"] == account["received"]
        and not account["overflow"]
        and nic["resets"] <= 1
    )
    print("every datagram came once and in order" if good and not account["late"] else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
