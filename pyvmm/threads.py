"""``Thread``: a thread whose name the system shows."""

from __future__ import annotations

import threading

NAME_MAX = 15  # TASK_COMM_LEN less the terminating null


class Thread(threading.Thread):
    """A thread that ``top -H`` shows by its own name, and that tools which pin threads can find.

    Python sets the system's name itself from 3.14 on. Before, a thread keeps the name of the thread
    that started it.
    """

    def run(self) -> None:
        try:
            with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
                comm.write(self.name[:NAME_MAX])
        except OSError:
            pass  # without /proc the thread runs without a name
        super().run()
