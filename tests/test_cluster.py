"""Whether a Ray cluster is where the user says is seen within seconds, by whatever answers there; without Ray."""

import socket
import threading
import time

import pytest

from bench.errors import BenchError, ConfigError
from bench.run.cluster import HELLO, _is_here, knock, parts


@pytest.fixture
def answering():
    """A function that lets something listen here which answers every greeting so; its address."""
    lines = []

    def listen(answer):
        line = socket.create_server(("127.0.0.1", 0))
        lines.append(line)

        def serve():
            with line.accept()[0] as ours:
                heard = b""
                while len(heard) < len(HELLO):
                    heard += ours.recv(100)
                ours.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{line.getsockname()[1]}"

    yield listen
    for line in lines:
        line.close()


@pytest.mark.parametrize(
    ("address", "read"),
    [("head:6379", ("head", 6379)), ("[fd00::2]:6379", ("fd00::2", 6379)), ("ray://a.b:10001", ("a.b", 10001))],
)
def test_an_address_is_a_host_and_a_port(address, read):
    assert parts(address) == read


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:ray", "head:0", "head:65536", "ray://head"])
def test_what_is_no_address_is_told(address):
    with pytest.raises(ConfigError, match=f"--address {address} is no host:port"):
        parts(address)


def test_what_greets_as_ray_does_may_be_one(answering):
    knock(answering(bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + b"\0\4\0\0\377\377"))


@pytest.mark.parametrize("answer", [b"HTTP/1.0 505 HTTP Version Not Supported\r\n", b"SSH-2.0-OpenSSH\r\n", b""])
def test_what_greets_otherwise_is_none(answering, answer):
    with pytest.raises(BenchError, match=r"is no Ray cluster|no Ray cluster answers"):
        knock(answering(answer))


def test_where_nobody_listens_there_is_none():
    with socket.create_server(("127.0.0.1", 0)) as line:
        address = f"127.0.0.1:{line.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(BenchError, match=rf"no Ray cluster answers at {address} \(.*ray start --head"):
        knock(address)
    assert time.monotonic() - began < 5


def test_who_listens_and_is_silent_is_not_waited_for():
    with (
        socket.create_server(("127.0.0.1", 0)) as line,
        pytest.raises(BenchError, match=r"no Ray cluster answers at .*timed out"),
    ):
        knock(f"127.0.0.1:{line.getsockname()[1]}", patience=0.2)


def test_a_kept_token_goes_to_this_machine_alone():
    assert _is_here("127.0.0.1")
    assert _is_here(socket.gethostbyname("localhost"))
    assert not _is_here("192.0.2.77")  # of nobody, RFC 5737
