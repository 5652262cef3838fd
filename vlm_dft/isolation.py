"""``python -m vlm_dft.isolation COMMAND...``: become that command, without a network. Torch-free.

On Linux the process enters a network namespace of its own (and for that, unless it is root, a user namespace), with a
loopback that only it and its children share; that holds for native code too. Where the kernel or a container's seccomp
profile refuses that, NO_NETWORK says so, and ``block_sockets`` makes Python refuse to connect to other machines.

Not covered by the second way: native code that connects by itself. Not covered by either: files, which keep their
permissions, and unix sockets.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final

NO_NETWORK: Final = "VLM_DFT_NO_NETWORK"
"""In the environment of a process that must not connect: "namespace" or "python", by what holds it."""
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40


def isolate() -> str:
    """Leave the network; returns what holds this process back from now on: namespace or python."""
    held = "namespace" if _enter_namespace() else "python"
    os.environ[NO_NETWORK] = held
    # gloo and NCCL look for an interface with an address; ours has only this one.
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if held == "namespace" else {})
    return held


def block_sockets() -> None:
    """In a process whose NO_NETWORK says python: refuse to connect to, or look up, other machines. Else nothing."""
    if os.environ.get(NO_NETWORK) == "python":
        sys.addaudithook(_refuse)


def _enter_namespace() -> bool:
    """Whether it could be entered. Root needs no user namespace, in which it could not open other users' files."""
    if sys.platform != "linux":
        return False
    user, group = os.getuid(), os.getgid()
    kinds = _CLONE_NEWNET if user == 0 else _CLONE_NEWUSER | _CLONE_NEWNET
    if ctypes.CDLL(None, use_errno=True).unshare(kinds) != 0:
        return False
    if user != 0:
        process = Path("/proc/self")
        (process / "setgroups").write_text("deny")
        (process / "uid_map").write_text(f"{user} {user} 1")
        (process / "gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # ranks of one host meet on the loopback
        request = struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
    return True


def _refuse(name: str, arguments: tuple[Any, ...]) -> None:
    if name in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    elif name in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    text = host.decode() if isinstance(host, bytes) else host
    if text and not _is_here(text):
        raise PermissionError(f"this process has no network: it may not reach {text!r}")


def _is_here(host: str) -> bool:
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def main() -> None:
    """Never returns."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m vlm_dft.isolation COMMAND...")
    isolate()
    try:
        os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - the caller's own command, no shell
    except OSError as error:
        raise SystemExit(f"{sys.argv[1]} could not be started: {error.strerror}") from None


if __name__ == "__main__":
    main()
