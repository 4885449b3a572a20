"""What commands with ``--jail`` do outside of the jail."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from pathlib import Path

from pyvmm.card.uplink import make_tap
from pyvmm.cli import guard
from pyvmm.errors import JailError, UsageError, VdpaError
from pyvmm.hostnet.links import follow
from pyvmm.jail import Cell
from pyvmm.macs import MAC_PREFIX, mac_text
from pyvmm.netopt import Net
from pyvmm.spec.ethernet import ETH_DATA_LEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import ExitStack

    from pyvmm.datapath.vdpa_device import Given
    from pyvmm.devopt import Device, User
    from pyvmm.jailopt import Jail

#: Directories in which many have files, besides those with the sticky bit.
SHARED = ("/", "/run", "/tmp", "/var", "/var/run", "/var/tmp", "/dev", "/dev/shm", "/etc", "/root")
#: Keys of ``--net`` that are about the host's side of a card, which is open in the jail.
OUTSIDE = ("tap", "bridge", "macvtap", "host")
#: What mount calls answer if this root may not mount, or the kernel or a sandbox has no such call.
FORBIDDEN = (errno.EPERM, errno.EACCES, errno.ENOSYS)
#: What is raised if a name leads elsewhere by now, or nowhere; without a number it says so itself.
REPLACED = (None, 0, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def run_in(
    want: Jail,
    body: Callable[[], int],
    *,
    files: Iterable[str],
    keep: Iterable[int],
    directories: Iterable[str] = (),
    mounts: Iterable[int] = (),
    timeout: float | None = None,
) -> int:
    """Run the rest of a command in a jail; returns its exit status. For the parameters see
    ``Cell.run``, but ``body`` may raise what a command may.
    """
    with Cell(want) as cell:
        status = cell.run(
            lambda: guard(body),
            files=files,
            keep=keep,
            directories=directories,
            mounts=mounts,
            timeout=timeout,
        )
    if status < 0:
        name = signal.Signals(-status).name
        print(f"pyvmm: the process in the jail was killed ({name})", file=sys.stderr)
        return 128 - status
    return status


def take_mounts(
    devices: Iterable[Device], user: User, stack: ExitStack, files: list[str]
) -> list[int]:
    """Open the files and directories of the host that back-ends of ours serve, as root may; what
    the back-end may do with them there depends on the jail's user.

    :param user: of the jail. :param stack: closes them.
    :param files: gets what else the back-ends need in the jail.
    :returns: descriptors of mounts. :raises JailError: there can be none.
    :raises PyvmmError: the user may not have what a back-end serves.
    """
    mounts: list[int] = []
    for device in devices:
        stack.callback(device.attached)
        try:
            mounts += device.detach(user)
            files += device.needs()
        except OSError as e:
            raise JailError(
                f"{device.socket} cannot be had in a jail: {e.strerror or e}",
                "it takes root of the host, or of a container that may mount"
                if e.errno in FORBIDDEN
                else "name it again: it may have been replaced"
                if e.errno in REPLACED
                else "",
            ) from e
    return mounts


def socket_place(path: str, uid: int) -> str:
    """The directory of a back-end's socket, which a jail of user ``uid`` has as a whole, because
    the back-end may replace its socket.

    :raises UsageError: others have files there.
    """
    place = str(Path(path).absolute().parent)
    try:
        info = Path(place).stat()
    except OSError:
        return place  # to connect will say what is wrong
    shared = {Path(p).resolve() for p in (*SHARED, ".")} | {Path("~").expanduser().resolve()}
    if (
        Path(place).resolve() in shared
        or info.st_mode & stat.S_ISVTX
        or info.st_uid not in (0, uid)
    ):
        raise UsageError(
            f"--jail: socket={path}: the jail would have all of {place}, where others have files",
            f"put the socket into a directory of its own, of root or of user {uid}",
        )
    return place


def take_vdpa(nets: Iterable[Net], stack: ExitStack) -> list[Given]:
    """Open the vDPA devices of the host that cards name, as root may, and let the jail lock the
    memory that they need.

    :param stack: closes the devices.
    :raises UsageError: a link on the way to a device is not root's alone (``links.walk``).
    :raises VdpaError: there is no such device, or it cannot be had.
    """
    names = [net.device for net in nets if net.device]
    if not names:
        return []
    from pyvmm.datapath.vdpa_device import Given, raise_memlock

    for name in names:
        if "/" not in name:
            continue
        try:
            found = Path(follow(name)).stat()
        except OSError:
            continue  # to open it will say what is wrong
        if not stat.S_ISCHR(found.st_mode):  # to open anything else may have an effect
            raise VdpaError(f"{name} is no character device", "is it a vhost-vdpa device?")
    raise_memlock()
    return [stack.enter_context(Given(name)) for name in names]


def take_taps(
    texts: Iterable[str], stack: ExitStack, made: Callable[[str, str], None]
) -> list[str]:
    """Open the taps of the host that cards ask for, as root may; returns the cards with descriptors
    in their place. The tap that pyvmm makes for a card by default is made in the jail.

    :param stack: closes the taps. :param made: is told card and name of a tap that did not exist.
    """
    found = []
    for text in texts:
        net = Net.parse(text)
        if not (net.tap or net.bridge or net.macvtap):
            found.append(text)
            continue
        mac = net.mac or MAC_PREFIX + os.urandom(3)
        tap, namespace = make_tap(net, net.host, mac)
        stack.callback((namespace or tap).close)
        if net.tap is not None and tap.created:
            made(f"net{len(found)}", net.tap)
        mode, *words = text.split(",")
        words = [word for word in words if word.partition("=")[0] not in OUTSIDE]
        words.append("fd=" + "+".join(str(fd.fileno()) for fd in tap.fds))
        if net.mtu is None and tap.mtu != ETH_DATA_LEN:
            words.append(f"mtu={tap.mtu}")
        if net.macvtap and net.mac is None:
            words.append(f"mac={mac_text(mac)}")
        found.append(",".join([mode, *words]))
    return found
