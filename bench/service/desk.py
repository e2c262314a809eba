"""Where a service is asked: images in, logits out, every question counted, paid for and written down."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.errors import RefereeError, ServiceError
from bench.rng import SampleRng
from bench.service.answers import Rows, checked, logits
from bench.service.declared import Service
from bench.service.journal import Journal, Key
from bench.system.interrupt import Stopped


class Spent(Stopped):
    """The next questions cost more than the run may; what it has is kept."""

    def __init__(self, why: str) -> None:
        BaseException.__init__(self, why)

    @property
    def exit_code(self) -> int:
        """That of a run that has not done all."""
        return 1


class Reply(NamedTuple):
    """What a service answers to a call, unchecked, and how often that had to be sent."""

    answer: object
    attempts: int = 1


class Line(Protocol):
    """How a service is reached; ``at_once`` calls may be under way at the same time, each in a thread of its own."""

    @property
    def service(self) -> Service: ...
    @property
    def at_once(self) -> int: ...

    def ask(self, images: NDArray[Any], name: str) -> Reply:
        """The answer to ``images`` (B, H, W, C), which are the line's own; ``name`` is that of the call.

        Raises:
            ServiceError: there is none.
        """
        ...


class Called:
    """A function of one's own as a service."""

    at_once = 1

    def __init__(self, function: Callable[[NDArray[Any]], object], service: Service, name: str) -> None:
        self.service, self._function, self._name = service, function, name

    def ask(self, images: NDArray[Any], name: str) -> Reply:
        """See :meth:`Line.ask`."""
        try:
            return Reply(self._function(images))
        except RefereeError:
            raise
        except Exception as error:  # whatever the user's own code may raise
            raise ServiceError(f"{self._name} fails ({type(error).__name__}: {error}); mend its file") from error


class Desk:
    """Asks a service on behalf of a run, at most ``batch`` images in a call.

    A deterministic service is asked once about each image. Any other is asked each time, and so is everything where
    answers have to be fresh. What the journal has of an earlier run in the same scope, asked in the same order, is not
    asked again.

    Args:
        line: how it is reached.
        classes: how many the data have.
        journal: what was asked before, and where questions are written down.
        most: what all questions of the journal may cost together.
    """

    def __init__(self, line: Line, classes: int, journal: Journal | None = None, most: float = math.inf) -> None:
        self.line, self.classes, self.journal, self.most = line, classes, journal or Journal(), most
        self._scope, self._fresh = "", False
        self._numbers: Counter[str] = Counter()  # of the images that were asked about in this scope
        self._lock = threading.Lock()

    @property
    def service(self) -> Service:
        """What it declares."""
        return self.line.service

    @contextmanager
    def asking(self, scope: str, *, fresh: bool = False) -> Iterator[None]:
        """Count what is asked as part of ``scope``; ``fresh`` takes no answer from another scope."""
        before = self._scope, self._fresh, self._numbers
        self._scope, self._fresh, self._numbers = scope, fresh, Counter()
        try:
            yield
        finally:
            self._scope, self._fresh, self._numbers = before

    def asked(self, scope: str) -> int:
        """How many questions have really been asked in ``scope``, in earlier runs, too."""
        return self.journal.asked(scope)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) in [0, 1], float32.

        Raises:
            ServiceError: the service cannot be asked, or what it answers is no answer.
            Spent: this would cost more than it may.
        """
        if len(x) == 0:
            return torch.zeros(0, self.classes, device=x.device)
        found = logits(self.service, self._rows(self._images(x)), self.classes)
        return torch.from_numpy(found).to(x.device)

    def _images(self, x: Tensor) -> NDArray[Any]:
        images = x.detach().permute(0, 2, 3, 1).cpu().float().contiguous().numpy()
        if self.service.images == "uint8":
            return np.asarray(np.rint(images.clip(0, 1) * 255), dtype=np.uint8)
        return np.array(images, dtype=np.float32)

    def _rows(self, images: NDArray[Any]) -> Rows:
        keys = [self._key(image) for image in images]
        places = {key: place for place, key in enumerate(keys) if key not in self.journal.answers}
        new, size = list(places), self.service.batch
        parts = [new[first : first + size] for first in range(0, len(new), size)]
        self._ask_all([(part, images[[places[key] for key in part]]) for part in parts])
        return np.stack([self.journal.answers[key] for key in keys])

    def _key(self, image: NDArray[Any]) -> Key:
        digest = blake2b(image.tobytes(), digest_size=16).hexdigest()
        if self.service.deterministic and not self._fresh:
            return Key("", digest, 0)
        self._numbers[digest] += 1
        return Key(self._scope, digest, self._numbers[digest])

    def _ask_all(self, calls: Sequence[tuple[list[Key], NDArray[Any]]]) -> None:
        if len(calls) < 2 or self.line.at_once < 2:
            for call in calls:
                self._ask(*call)
            return
        with ThreadPoolExecutor(self.line.at_once) as pool:
            under_way = [pool.submit(self._ask, *call) for call in calls]
            try:
                for each in under_way:
                    each.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)  # what has been sent is paid for, so its answer is kept

    def _ask(self, keys: list[Key], images: NDArray[Any]) -> None:
        with self._lock:
            self._check_cost(keys)
            name = self.journal.sent(self._scope, keys, self.service.price)
        try:
            reply = self.line.ask(images, name)
            rows = checked(self.service, reply.answer, len(keys), self.classes)
        except ServiceError as error:
            with self._lock:
                self.journal.failed(name, error.attempts, str(error))
            raise
        with self._lock:
            self.journal.answered(name, rows, reply.attempts)

    def _check_cost(self, keys: list[Key]) -> None:
        spent, more = self.journal.spent, self.journal.price(keys, self.service.price)
        if more and spent + more > self.most * (1 + 1e-12):
            raise Spent(f"{spent:.6g} of {self.most:.6g} spent, and the next call costs {more:.6g}")


class Asked(nn.Module):
    """A service as a network without weights or gradients; a copy asks the same service."""

    def __init__(self, ask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ask = ask  # of a desk, which is no part of it: to ask changes no network
        self.eval()

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) in [0, 1]; a random service draws from where nobody can see."""
        return self.ask(x)

    def __deepcopy__(self, memo: object) -> "Asked":
        return Asked(self.ask)
