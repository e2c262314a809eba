"""Messages between two processes of ours: each with its length before it."""

import socket
import struct


def send(channel: socket.socket, *parts: "bytes | bytearray | memoryview") -> None:
    """Send ``parts``: the length of the first, then all of them, whose lengths the first has to tell."""
    for part in (struct.pack("<Q", len(parts[0])), *parts):
        channel.sendall(part)


def receive(channel: socket.socket, most: int | None = None) -> bytearray:
    """The first part of what was sent.

    Raises:
        EOFError: the other side has hung up.
        ValueError: it is longer than ``most`` bytes.
    """
    (length,) = struct.unpack("<Q", exactly(channel, 8))
    if most is not None and length > most:
        raise ValueError("its header is too long")
    return exactly(channel, length)


def exactly(channel: socket.socket, size: int) -> bytearray:
    """So many bytes of the other parts."""
    buffer = bytearray(size)
    fill(channel, memoryview(buffer))
    return buffer


def fill(channel: socket.socket, view: memoryview) -> None:
    """Read bytes until ``view`` is full."""
    while view:
        count = channel.recv_into(view)
        if not count:
            raise EOFError("the other side has hung up")
        view = view[count:]
