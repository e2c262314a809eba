"""What a process of a stranger's code may not do: write files, reach into other processes, end them.

By Landlock, which Linux has had since 5.13 and which takes no rights to use. What a kernel does not know is left out,
and elsewhere nothing happens: this adds to what keeps such code away from us, and nothing relies on it alone. Reading
and the network stay open, and so does what was open before.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # numbers of the calls, the same on every architecture
VERSION, BENEATH = 1, 1                                  # a flag of the first, a kind of rule
NO_NEW_PRIVILEGES, SUBREAPER = 38, 36                    # of prctl

# What is written, by the version of Landlock that knows it first: files written, removed and made; links across
# folders; files cut short.
WRITING = ((1, sum(1 << bit for bit in (1, *range(4, 13)))), (2, 1 << 13), (3, 1 << 14))
ON_FILES = 1 << 1 | 1 << 14  # those of them that a single file can have
DEVICES = ("null", "zero", "full", "nvidia*", "dri", "kfd")
SIGNALS_AND_SOCKETS = 0b11  # abstract sockets and signals across the wall, from version 6 on

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def confine(*writable: Path) -> bool:
    """From now on this process and all that it starts write to devices and below ``writable`` alone; whether so.

    Nor can they look into processes that are not theirs, or, with Landlock 6, signal them. Nothing takes it back.
    """
    version = _call(CREATE_RULESET, None, 0, VERSION) if _libc else -1
    if version < 1:
        return False
    writing = sum(bits for since, bits in WRITING if since <= version)
    scoped = SIGNALS_AND_SOCKETS if version >= 6 else 0
    ruleset = struct.pack("<QQQ", writing, 0, scoped)[: 24 if version >= 6 else 8]
    rules = _call(CREATE_RULESET, ruleset, len(ruleset), 0)
    try:
        for place in writable:
            _allow(rules, place, writing)
        for device in (found for pattern in DEVICES for found in Path("/dev").glob(pattern)):
            _allow(rules, device, writing if device.is_dir() else writing & ON_FILES)
        return _prctl(NO_NEW_PRIVILEGES) and _call(RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)


def _allow(rules: int, place: Path, rights: int) -> None:
    number = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(ADD_RULE, rules, BENEATH, struct.pack("<Qi", rights, number), 0)
    finally:
        os.close(number)


def adopt_orphans() -> bool:
    """Be the parent of every process below this one whose own has ended; whether that holds."""
    return _prctl(SUBREAPER)


def children() -> list[int]:
    """The processes that have this one as their parent, as far as the system tells."""
    try:
        lists = [file.read_text().split() for file in Path("/proc/self/task").glob("*/children")]
    except OSError:
        return []
    return [int(number) for each in lists for number in each]


def _call(number: int, *arguments: object) -> int:
    assert _libc is not None
    return int(_libc.syscall(number, *arguments))


def _prctl(option: int) -> bool:
    return _libc is not None and _libc.prctl(option, 1, 0, 0, 0) == 0
