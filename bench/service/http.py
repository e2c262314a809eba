"""A service behind a JSON endpoint: one POST for each call, sent again until there is an answer.

TLS is verified, and no redirect is followed. Every call has a connection of its own, so that an answer that comes
twice, or late, is never taken for that of another call.
"""

import json
import os
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from numpy.typing import NDArray

from bench.errors import ConfigError, ServiceError
from bench.service.declared import Service
from bench.service.desk import Reply
from bench.service.schemas import SCHEMAS

LARGEST = 64 << 20  # bytes of an answer
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # what may be otherwise a little later
PATIENCE = 600.0    # seconds that a service may ask us to wait
SAID = 200          # characters of an error page that are shown


class _Response(NamedTuple):
    status: int
    wait: float      # seconds, which it asks for before it is asked again
    location: str
    content: bytes


class _Failed(Exception):
    """No answer this time; ``wait`` seconds at least before the next."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass
class Endpoint:
    """A :class:`bench.service.desk.Line` to ``url``, whose JSON has the form ``schema``.

    Args:
        token: the environment variable that holds what is sent as ``Authorization: Bearer``.
        timeout: seconds in which a whole answer has to come.
        retries: how often a call is sent again that was not answered.
        backoff: seconds before the first of these, doubled each time.
        rate: calls in a second, those that are sent again among them; 0 for no limit.
        at_once: calls that are under way at the same time.
    """

    url: str
    schema: str
    service: Service
    token: str = ""
    timeout: float = 30.0
    retries: int = 5
    backoff: float = 0.5
    rate: float = 0.0
    at_once: int = 1
    _next: float = 0.0  # when the next call may be sent
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, images: NDArray[Any], name: str) -> Reply:
        """See :meth:`bench.service.desk.Line.ask`; ``name`` is sent as ``Idempotency-Key``, each time the same."""
        schema = SCHEMAS[self.schema]
        body = json.dumps(schema.encode(images, name)).encode()
        for attempt in range(1, self.retries + 2):
            try:
                content = self._once(body, name)
            except _Failed as failed:
                if attempt > self.retries or failed.wait > PATIENCE:
                    raise ServiceError(f"{self.url} {failed}, {attempt} times", attempts=attempt) from None
                time.sleep(max(failed.wait, self.backoff * 2 ** (attempt - 1)))
            except ServiceError as error:
                error.attempts = attempt
                raise
            else:
                return Reply(self._answer(content, len(images), name, attempt), attempt)
        raise AssertionError("the last attempt has raised or returned")

    def _answer(self, content: bytes, n: int, name: str, attempts: int) -> object:
        try:
            told = json.loads(content)
        except (ValueError, RecursionError):
            said = _printable(content)
            raise ServiceError(f"{self.url} answers with what is no JSON: {said}", attempts=attempts) from None
        try:
            return SCHEMAS[self.schema].decode(told, self.service, n, name)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ServiceError(
                f"{self.url} answers with JSON of another form than {self.schema} ({type(error).__name__}: {error})",
                attempts=attempts,
            ) from None

    def _once(self, body: bytes, name: str) -> bytes:
        """What it answers with the status 200."""
        self._take_turn()
        response = self._send(body, name)
        if response.status == 200:
            return response.content
        if response.status in AGAIN:
            raise _Failed(f"answers with the status {response.status}", response.wait)
        if 300 <= response.status < 400:
            where = _printable(response.location.encode())
            raise ServiceError(f"{self.url} redirects to {where}, which is not followed; name that url if you trust it")
        said = _printable(response.content)
        raise ServiceError(f"{self.url} answers with the status {response.status}: {said}")

    def _take_turn(self) -> None:
        if self.rate:
            with self._lock:
                now = time.monotonic()
                self._next = max(self._next, now) + 1 / self.rate
                wait = self._next - 1 / self.rate - now
            time.sleep(max(wait, 0.0))

    def _send(self, body: bytes, name: str) -> _Response:
        parts = urlsplit(self.url)
        headers = {
            "Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity",
            "Connection": "close", "Idempotency-Key": name, "User-Agent": "parry",
        }  # fmt: skip
        if self.token:
            headers["Authorization"] = f"Bearer {os.environ[self.token]}"
        connection = self._connection(parts.scheme, parts.hostname or "", parts.port)
        late = threading.Event()
        try:
            connection.connect()
            timer = threading.Timer(self.timeout, _cut, (connection.sock, late))
            timer.daemon = True
            timer.start()
            try:
                target = f"{parts.path or '/'}?{parts.query}".rstrip("?")
                connection.request("POST", target, body, headers)
                return _read(connection.getresponse())
            finally:
                timer.cancel()
        except ssl.SSLCertVerificationError as error:
            raise ServiceError(f"{self.url} has a certificate that is not trusted ({error.verify_message})") from None
        except (OSError, HTTPException) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            cut = f"gives no answer ({type(error).__name__}: {error})"
            raise _Failed(f"has not answered in {self.timeout:g} s" if slow else " ".join(cut.split())) from None
        finally:
            connection.close()

    def _connection(self, scheme: str, host: str, port: int | None) -> HTTPConnection:
        if scheme == "https":
            return HTTPSConnection(host, port, timeout=self.timeout, context=ssl.create_default_context())
        return HTTPConnection(host, port, timeout=self.timeout)


def check_url(url: str, token: str) -> None:
    """Whether ``url`` can be asked, and what the environment variable ``token`` holds sent there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"url is {url!r} ({error}); write https://host/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isascii() or " " in url:
        raise ConfigError(f"url is {url!r}; write https://host/path")
    if parts.username or parts.password:
        raise ConfigError("the url holds a password, which every row would show; put it in an environment variable and "
                          "name that, token=MY_TOKEN")  # fmt: skip
    if token and parts.scheme == "http" and not _is_here(parts.hostname):
        raise ConfigError(f"the token would be sent to {parts.hostname} for all to read; write https://")
    if token and not os.environ.get(token):
        raise ConfigError(f"token names the environment variable {token!r}, which is not set; export it")


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _cut(sock: Any, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):
        sock.shutdown(2)


def _read(response: HTTPResponse) -> _Response:
    """All of ``response``, which is of a size that can be meant.

    Raises:
        ServiceError: it is larger.
        OSError: it ends too soon.
    """
    content = response.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ServiceError(f"the service answers with more than {LARGEST >> 20} MiB")
    if response.length:
        raise ConnectionError(f"{response.length} bytes of the answer are missing")
    return _Response(
        response.status, _wait(response.getheader("Retry-After")), response.getheader("Location") or "nowhere", content
    )


def _wait(text: str | None) -> float:
    """The seconds that a ``Retry-After`` asks for; 0 where it says nothing that can be read."""
    try:
        return max(float(text or 0), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(text or "") - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _printable(content: bytes) -> str:
    text = content[: 4 * SAID].decode(errors="replace")
    return "".join(char if char.isprintable() else " " for char in text)[:SAID].strip() or "nothing"
