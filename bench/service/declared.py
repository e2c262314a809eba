"""What a service says of itself: what it takes, what it answers, and what a question costs."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal, TypeVar

from bench.errors import ConfigError

Answers = Literal["logits", "probabilities", "labels"]
Images = Literal["uint8", "float32"]
Asked = TypeVar("Asked", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the owner of a service declares.

    A question is one image. What is asked at once are NumPy images (B, H, W, C), at most ``batch`` of them.

    Args:
        answers: ``logits`` or ``probabilities`` (B, K), or ``labels``, integers (B,).
        images: ``uint8`` in 0 to 255, or ``float32`` in [0, 1].
        top: it tells only of the so many best classes, as a pair of arrays (B, k): labels, best first, and scores.
            0 where it tells of all.
        decimals: to how many its scores are rounded, if they are.
        deterministic: it answers an image always alike, so each is asked once and its answer kept.
        random: it answers one image differently each time; it is judged by a majority.
        stateful: its answers depend on what it was asked before.
        batch_dependent: they depend on the other images of the call.
        release: what its owner calls the model behind it; another one is another cell.
        batch: images in one call.
        price: of one question, in whatever currency ``--max-cost`` counts.
    """

    answers: Answers
    images: Images = "uint8"
    top: int = 0
    decimals: int | None = None
    deterministic: bool = False
    random: bool = False
    stateful: bool = False
    batch_dependent: bool = False
    release: str = ""
    batch: int = 64
    price: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("answers", Answers), ("images", Images)):
            if getattr(self, name) not in known.__args__:  # type: ignore[attr-defined]
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(known.__args__)}")  # type: ignore[attr-defined]
        if self.deterministic and (self.random or self.stateful or self.batch_dependent):
            raise ConfigError(
                "a service that is random, stateful or batch_dependent is not deterministic; declare one of them"
            )
        if self.top and self.answers == "labels":
            raise ConfigError(f"top is {self.top}, but the answers are labels; say logits or probabilities")
        if self.top < 0 or self.batch < 1 or not self.price >= 0 or (self.decimals or 0) < 0:
            raise ConfigError("top, decimals and price are zero or more, batch is one or more")
        if not isinstance(self.release, str):
            raise ConfigError(f"release is {self.release!r}; write it as text")

    @property
    def identity(self) -> str:
        """64 hexadecimal digits of all that it declares and that decides results: in place of weights, which it hides.

        The price does not; how many are asked in a call does where answers depend on that.
        """
        told = asdict(self)
        for name in ("price", *(() if self.batch_dependent else ("batch",))):
            del told[name]
        return sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def tells_scores(self) -> bool:
        """Whether it tells the margin of an image that it gets right; one class and its score do not."""
        return self.answers != "labels" and self.top != 1

    @property
    def tells_all(self) -> bool:
        """Whether it tells the score of every class."""
        return self.answers != "labels" and self.top == 0


def declared_by(component: object) -> Service | None:
    """What ``component``, a user's function or a model, declares; nothing where it is no service."""
    said = getattr(component, "service", None)
    return said if isinstance(said, Service) else None


def service(**declared: Any) -> Callable[[Asked], Asked]:
    """Declare a function of NumPy images (B, H, W, C) a service: ``@service(answers="probabilities")``.

    The function stays what it is; its attribute ``service`` says what it answers. A class whose instances are called
    says the same with ``service = Service(...)``.

    Raises:
        ConfigError: the declarations make no sense.
    """
    try:
        made = Service(**declared)
    except TypeError as error:
        raise ConfigError(f"a service cannot be declared so: {error}") from None

    def declare(function: Asked) -> Asked:
        function.service = made  # type: ignore[attr-defined]
        return function

    return declare
