"""``Thread``: one whose name the system knows, too."""

from __future__ import annotations

import threading

NAME_MAX = 15  # TASK_COMM_LEN less the terminating null


class Thread(threading.Thread):
    """Shows under its name in top -H, and is found by who pins threads. Python itself does so from
    3.14 on; until then a thread has the name of the one that started it.
    """

    def run(self) -> None:
        try:
            with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
                comm.write(self.name[:NAME_MAX])
        except OSError:
            pass  # no /proc: a name is not worth more
        super().run()
