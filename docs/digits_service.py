"""A service to try Parry on: a network for handwritten digits behind an endpoint, KServe v1.

    python docs/digits_service.py --port 8000
    python docs/digits_service.py --port 8000 --trouble 0.1

POST /predict takes ``{"instances": [image, ...]}``, images as lists (8, 8, 1) of levels 0 to 255, and answers
``{"predictions": [...]}`` with the ten probabilities of each. GET / tells how many calls and images it was asked about,
what came twice under one ``Idempotency-Key`` counted once. With ``--trouble``, so many of all calls are dropped, cut
off in the middle or answered with the status 503.
"""

import argparse
import json
import random
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor, nn

from bench.protocols import Job
from bench.registry import attacks, datasets, load_plugins, models

LARGEST = 16 << 20  # bytes of a question


def trained() -> nn.Module:
    """The network ``cnn``, trained on digits, which takes a few seconds."""
    load_plugins()
    data, architecture = datasets.create("digits")(None), models.create("cnn")
    torch.manual_seed(0)
    learner: Any = attacks.create("standard")
    network: nn.Module = learner(lambda: architecture(len(data.classes), data.test.shape, None), data, Job())
    return network.eval()


class Service(ThreadingHTTPServer):
    """Answers with the probabilities of ``network``; ``trouble`` is the share of calls that go wrong."""

    daemon_threads = True

    def __init__(self, port: int, network: Callable[[Tensor], Tensor], trouble: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.network, self.trouble = network, trouble
        self.lock, self.calls, self.images = threading.Lock(), 0, dict[str, int]()

    def answer(self, body: bytes, name: str) -> Any:
        """What a call of this ``name`` is answered."""
        x = torch.tensor(json.loads(body)["instances"], dtype=torch.float32).permute(0, 3, 1, 2) / 255
        with self.lock, torch.no_grad():
            self.calls += 1
            self.images[name or f"call {self.calls}"] = len(x)
            return {"predictions": self.network(x).softmax(dim=1).tolist()}

    def counts(self) -> dict[str, int]:
        """What it was asked so far."""
        with self.lock:
            return {"calls": self.calls, "images": sum(self.images.values())}


class Handler(BaseHTTPRequestHandler):
    """One call."""

    server: Service

    def do_POST(self) -> None:
        """Answer what is in the images."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST:
            return self._say(413, {"error": "too large"})
        try:
            answer = self.server.answer(self.rfile.read(length), self.headers.get("Idempotency-Key") or "")
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            return self._say(400, {"error": str(error)})
        trouble = random.choice(("drop", "cut", "busy")) if random.random() < self.server.trouble else ""
        if trouble == "drop":
            return self.connection.close()
        if trouble == "busy":
            return self._say(503, {"error": "busy"}, {"Retry-After": "0.1"})
        return self._say(200, answer, cut=trouble == "cut")

    def do_GET(self) -> None:
        """Tell the counts."""
        self._say(200, self.server.counts())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing; a run asks thousands of times."""

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        told = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)


def main() -> None:
    """Serve until Ctrl-C."""
    options = argparse.ArgumentParser(description="A network for digits behind an endpoint.")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--trouble", type=float, default=0.0, help="share of calls that go wrong")
    given = options.parse_args()
    with Service(given.port, trained(), given.trouble) as service:
        print(f"http://127.0.0.1:{service.server_port}/predict", flush=True)
        try:
            service.serve_forever()
        except KeyboardInterrupt:
            print(service.counts())


if __name__ == "__main__":
    main()
