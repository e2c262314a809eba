"""Where a service is asked: images in, logits out, every question counted."""

from collections import Counter
from collections.abc import Callable, Iterator
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


class Reply(NamedTuple):
    """What a service answers to a call, unchecked, and how often it had to be asked."""

    answer: object
    attempts: int = 1


class Line(Protocol):
    """How a service is reached."""

    @property
    def service(self) -> Service: ...

    def ask(self, images: NDArray[Any]) -> Reply:
        """The answer to ``images`` (B, H, W, C), which are the line's own.

        Raises:
            ServiceError: there is none.
        """
        ...


class Called:
    """A function of one's own as a service."""

    def __init__(self, function: Callable[[NDArray[Any]], object], service: Service, name: str) -> None:
        self.service, self._function, self._name = service, function, name

    def ask(self, images: NDArray[Any]) -> Reply:
        """See :meth:`Line.ask`."""
        try:
            return Reply(self._function(images))
        except RefereeError:
            raise
        except Exception as error:  # whatever the user's own code may raise
            raise ServiceError(f"{self._name} fails ({type(error).__name__}: {error}); mend its file") from error


class Key(NamedTuple):
    """A question: the ``number``-th time that an image, by its ``digest``, is asked about in a ``scope``."""

    scope: str
    digest: str
    number: int


class Desk:
    """Asks a service on behalf of a run, at most ``batch`` images at once.

    A deterministic service is asked once about each image. Any other is asked each time, and so is everything where
    answers have to be fresh.
    """

    def __init__(self, line: Line, classes: int) -> None:
        self.line, self.classes = line, classes
        self._answers: dict[Key, Rows] = {}
        self._counts: Counter[str] = Counter()
        self._scope, self._fresh = "", False
        self._numbers: Counter[str] = Counter()

    @property
    def service(self) -> Service:
        """What it declares."""
        return self.line.service

    @contextmanager
    def asking(self, scope: str, *, fresh: bool = False) -> Iterator[None]:
        """Count what is asked as part of ``scope``; ``fresh`` takes no answer from another place or time."""
        before = self._scope, self._fresh, self._numbers
        self._scope, self._fresh, self._numbers = scope, fresh, Counter()
        try:
            yield
        finally:
            self._scope, self._fresh, self._numbers = before

    def asked(self, scope: str) -> int:
        """How many questions have really been asked in ``scope``."""
        return self._counts[scope]

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) in [0, 1], float32.

        Raises:
            ServiceError: the service cannot be asked, or what it answers is no answer.
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
        places = {key: place for place, key in reversed([*enumerate(keys)]) if key not in self._answers}
        new = sorted(places, key=places.__getitem__)
        for first in range(0, len(new), self.service.batch):
            part = new[first : first + self.service.batch]
            self._ask(part, images[[places[key] for key in part]])
        return np.stack([self._answers[key] for key in keys])

    def _key(self, image: NDArray[Any]) -> Key:
        digest = blake2b(image.tobytes(), digest_size=16).hexdigest()
        if self.service.deterministic and not self._fresh:
            return Key("", digest, 0)
        self._numbers[digest] += 1
        return Key(self._scope, digest, self._numbers[digest])

    def _ask(self, keys: list[Key], images: NDArray[Any]) -> None:
        self._counts[self._scope] += len(keys)
        reply = self.line.ask(images)
        self._answers.update(zip(keys, checked(self.service, reply.answer, len(keys), self.classes), strict=True))


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
