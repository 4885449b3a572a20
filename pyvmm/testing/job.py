"""The process of one machine, of several that a command runs apart (``apart``): what the process
sends of itself (``answer``), and the verdict that the command makes of the process's end.

Whoever runs in the machine may have taken the process over by the time it sends: so its end can be
anything, which is a verdict, too, and changes nothing for the other machines.
"""

from __future__ import annotations

import signal

from pyvmm.apart import Scarce
from pyvmm.errors import HostError, PyvmmError, ThreadStopped
from pyvmm.testing import answer
from pyvmm.testing.answer import Answer, BadAnswer
from pyvmm.testing.verdict import Verdict, last_lines, of_error
from pyvmm.threads import NoThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.apart import Ended, Send

#: In messages.
OURS = "pyvmm's process for it"
REPORT_IT = "report it: the kernel may have been in control of the process"
#: How the handler of a stopped thread begins its line (``cext/confine.c``).
OF_US, STOPPED = "pyvmm: ", "pyvmm: a thread of pyvmm's was stopped: "


def work(send: Send, body: Callable[[Callable[[], None]], Answer]) -> None:
    """Send the answer of ``body``, in the process of a job.

    :param body: calls its argument once its machine is made and confined: errors before that may
        be about this host, and about all machines.
    :raises Scarce: the host has no room for the machine's threads; an answer has been sent.
    """
    made = False

    def tell() -> None:
        nonlocal made
        send(answer.MADE)
        made = True

    try:
        found = body(tell)
    except PyvmmError as e:
        if type(e).__name__ in answer.FATAL and not made:
            send(answer.encode_error(e))
            return
        found = Answer(of_error(e))
    except NoThread as e:
        why = HostError("there can be no thread for this kernel", "raise the limit: ulimit -u")
        send(Answer(of_error(why)).encode())
        raise Scarce from e
    send(found.encode())


def read(ended: Ended, timeout: float) -> Answer:
    """The answer of a job whose process has ended; one of ours if the process has not ended by
    itself and in order, or has sent something else. Nothing in it is to be trusted.

    :param timeout: seconds that the machine had, for the message.
    :raises PyvmmError: of ``answer.FATAL``: this host cannot make any machine.
    """
    said = [answer.line(text) for text in last_lines(ended.said)]
    verdict = death(ended, said, f"the kernel did not end in {timeout:g} s")
    found = Answer(verdict) if verdict is not None else None
    if found is None:
        try:
            found = answer.decode(ended.data)
        except BadAnswer as e:
            found = bad(e)
    found.verdict.details += said
    return found


def bad(why: BadAnswer) -> Answer:
    """In the place of what is no answer."""
    what = f"{OURS} has sent {why} in the place of a result"
    return Answer(Verdict("host-problem", f"{what}; {REPORT_IT}"))


def death(ended: Ended, said: list[str], over: str) -> Verdict | None:
    """The verdict if the process of a job has not ended by itself and in order; else None.

    :param said: the end of what it has written to standard error; the line about a thread that was
        stopped is taken away. :param over: what is said if its time was over.
    """
    if ended.problem:
        return Verdict("host-problem", f"there can be no process for this kernel: {ended.problem}")
    if ended.late:
        return Verdict("timeout", f"{over}, and {OURS} had to be killed")
    if ended.flood:
        most = answer.ANSWER_MAX >> 20
        return Verdict("host-problem", f"{OURS} has sent more than {most} MiB; {REPORT_IT}")
    if ended.status in (ThreadStopped.exit_code, -signal.SIGSYS):
        told = [text for text in said if text.startswith(STOPPED)]
        if told:
            said.remove(told[-1])
            return Verdict("thread-stopped", told[-1].removeprefix(OF_US))
        return Verdict("thread-stopped", "a thread of pyvmm's was stopped, and its process killed")
    if ended.status < 0:
        try:
            name = signal.Signals(-ended.status).name
        except ValueError:  # of real time
            name = f"signal {-ended.status}"
        hint = "; the host's memory may have run out" if name == "SIGKILL" else ""
        return Verdict("host-problem", f"{OURS} was killed ({name}){hint}")
    if ended.status and not ended.scarce:
        return Verdict("host-problem", f"{OURS} has failed, with status {ended.status}")
    return None
