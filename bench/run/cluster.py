"""Ray: started on this machine for a run, or reached where it runs already.

Since Ray 2.52 a cluster may ask for a token, and since 2.59 `ray start` makes it ask wherever it finds one, which the
first Ray that was started by a program has left in the home folder. Yet a program that is told an address sends none by
itself. So it is sent from here, where the address is of this machine or a token was named for the purpose.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.errors import BenchError, ConfigError
from bench.system.extras import library
from bench.system.interrupt import deferred

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # nothing is told to anybody
PATIENCE = 5.0  # seconds in which whatever listens at an address has to answer
TRIES = "3"     # to connect once it does, a second each; Ray would make 20
AUTO = "auto"   # the address of what runs on this machine, in Ray's words
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, 3.4: and empty SETTINGS
SETTINGS = 4    # RFC 9113, 6.5: the kind of frame with which a server of HTTP/2 begins
KEPT = Path(".ray", "auth_token")  # in the home folder


def ray_library(address: str | None) -> Any:
    """The library, which reads its environment when it is imported: prepared for a cluster at ``address``.

    Raises:
        ConfigError: Ray is not installed, or this is no address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if address:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", TRIES)
    if address and address != AUTO:
        host, _ = parts(address)
        if "RAY_AUTH_MODE" not in os.environ and (_named() or (_kept() and _is_here(host))):
            os.environ["RAY_AUTH_MODE"] = "token"
    return library("ray", "ray")


@contextmanager
def connected(address: str | None, processors: int | None) -> Iterator[Any]:
    """Ray at ``address``, as this process is connected already, or started here with so many ``processors``.

    Raises:
        BenchError: there is none, or it refuses us.
    """
    ray = ray_library(address)
    if ray.is_initialized():
        yield ray
        return
    more: dict[str, Any] = {"address": address}
    if not address:  # it listens to nobody else
        more = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        more |= {"num_cpus": processors} if processors else {}
    elif address != AUTO:
        knock(address)
    try:
        with deferred():  # Ray takes signals for itself
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **more)
    except Exception as error:  # of many kinds
        ray.shutdown()
        reasons = list(_reasons(error))
        if address and any("AuthenticationError" in reason for reason in reasons):
            raise BenchError(f"the Ray cluster at {address} asks for its token, {_what_came()}") from error
        why = reasons[-1]
        raise BenchError(
            f"no connection to the Ray cluster at {address} ({why}); start the run on a machine of the cluster, with "
            "the same Ray and Python as there" if address else f"Ray does not start ({why})"
        ) from error  # fmt: skip
    try:
        yield ray
    finally:
        with deferred():
            ray.shutdown()


def parts(address: str) -> tuple[str, int]:
    """The host and the port of ``address``.

    Raises:
        ConfigError: it has none.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--address {address} is no host:port, such as head:6379, which `ray start --head` prints")
    return host.removeprefix("[").removesuffix("]"), int(port)


def knock(address: str, patience: float = PATIENCE) -> None:
    """See that something like Ray answers at ``address``, for which Ray itself would wait many minutes.

    Raises:
        BenchError: nothing does.
    """
    fix = "give the address that `ray start --head` has printed, or start it"
    try:
        with socket.create_connection(parts(address), patience) as line, line.makefile("rb") as heard:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # which this does not speak
            line.sendall(HELLO)
            frame = heard.read(9)
    except OSError as error:
        raise BenchError(f"no Ray cluster answers at {address} ({error}); {fix}") from error
    if len(frame) < 9 or frame[3] != SETTINGS:
        raise BenchError(f"what answers at {address} is no Ray cluster (it said {frame!r}); {fix}")


def _reasons(error: BaseException | None) -> Iterator[str]:
    """Why it failed, and why that did: of a traceback in a message, its last line."""
    while error is not None:
        said = str(error).strip()
        yield f"{type(error).__name__}: {' '.join(said.split())}" if "Traceback" not in said else said.splitlines()[-1]
        error = error.__cause__ or error.__context__


def _what_came() -> str:
    """The end of a sentence: which token was sent, or why there was none, and what to do."""
    fix = "put what `ray get-auth-token` prints at its head into RAY_AUTH_TOKEN or ~/.ray/auth_token here"
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")).lower() != "token":
        return f"and RAY_AUTH_MODE={mode} sends none; set it to token"
    if source := _named():
        return f"and that of {source} is another; {fix}"
    if not _kept():
        return f"and there is none here; {fix}"
    if "RAY_AUTH_MODE" in os.environ:
        return f"and that of ~/.ray/auth_token is another; {fix}"
    return "and that of ~/.ray/auth_token goes to another machine only if you say so; set RAY_AUTH_MODE=token"


def _named() -> str:
    """The variable that names a token, if one does."""
    return next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "")


def _kept() -> bool:
    return Path(os.path.expanduser("~"), KEPT).is_file()  # noqa: PTH111, Path.home() raises where there is none


def _is_here(host: str) -> bool:
    """Whether ``host`` is this machine: nobody can listen at the address of another."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as ours:
                ours.bind(place)
            return True
        except OSError:
            continue
    return False
