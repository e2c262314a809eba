"""A service behind a JSON endpoint, as a model: ``http(url=https://..., schema=kserve-v1)``."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from bench.errors import ConfigError
from bench.ranges import Count, Few, NonNegative, Positive, Whole
from bench.registry import conduct, models
from bench.service import Asked, Desk, Service
from bench.service.declared import Answers, Images
from bench.service.http import Endpoint, check_url
from bench.service.schemas import SCHEMAS


@models("http")
@dataclass(frozen=True, kw_only=True)
class Http:
    """A service that is asked by POST; how it goes about that, from ``batch`` on, is no part of a result.

    Args:
        url: of the endpoint.
        schema: ``kserve-v1`` asks ``{"instances": [image, ...]}`` with images as lists (H, W, C) and is answered
            ``{"predictions": [...]}``, as TensorFlow Serving and Vertex AI do, with the scores or the label of each, or
            of the ``top`` classes ``[{"label": 3, "score": 0.9}, ...]``. ``kserve-v1-png`` sends PNG files instead, as
            ``{"b64": "..."}``. ``kserve-v2`` is the Open Inference Protocol, as Triton speaks it.
        answers: ``logits``, ``probabilities`` or ``labels``.
        images: ``uint8`` in 0 to 255, or ``float32`` in [0, 1].
        top: it tells only of the so many best classes; 0 for all.
        decimals: to how many its scores are rounded, if they are.
        release: what its owner calls the model behind it; another one is another cell.
        deterministic: it answers an image always alike, so each is asked once and its answer kept.
        random: it answers one image differently each time.
        stateful: its answers depend on what it was asked before.
        batch_dependent: they depend on the other images of the call.
        batch: images in one call.
        price: of one image, in the currency of ``--max-cost``.
        rate: calls in a second; 0 for no limit.
        at_once: calls under way at the same time.
        timeout: seconds in which an answer has to come.
        retries: how often a call is sent again that was not answered, under the same ``Idempotency-Key``.
        backoff: seconds before the first of these, doubled each time.
        token: the environment variable that holds what is sent as ``Authorization: Bearer``.
    """

    url: str
    schema: Literal["kserve-v1", "kserve-v1-png", "kserve-v2"] = "kserve-v1"
    answers: Answers = "probabilities"
    images: Images = "uint8"
    top: Whole = 0
    decimals: Whole | None = None
    release: str = ""
    deterministic: bool = False
    random: bool = False
    stateful: bool = False
    batch_dependent: bool = False
    batch: Count = conduct(16)
    price: NonNegative = conduct(0.0)
    rate: NonNegative = conduct(0.0)
    at_once: Few = conduct(1)
    timeout: Positive = conduct(30.0)
    retries: Whole = conduct(5)
    backoff: NonNegative = conduct(0.5)
    token: str = conduct("")

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "KServe, https://kserve.github.io/website"
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_url(self.url, self.token)
        if SCHEMAS[self.schema].bytes_only and self.images != "uint8":
            raise ConfigError(f"{self.schema} sends 8-bit images; write images=uint8, or another schema")
        _ = self.service  # complains about declarations that make no sense

    @property
    def service(self) -> Service:
        return Service(
            answers=self.answers, images=self.images, top=self.top, decimals=self.decimals,
            deterministic=self.deterministic, random=self.random, stateful=self.stateful,
            batch_dependent=self.batch_dependent, release=self.release, batch=self.batch, price=self.price,
        )  # fmt: skip

    def line(self) -> Endpoint:
        """See :meth:`bench.protocols.ServiceModel.line`."""
        return Endpoint(
            self.url, self.schema, self.service, token=self.token, timeout=self.timeout, retries=self.retries,
            backoff=self.backoff, rate=self.rate, at_once=self.at_once,
        )  # fmt: skip

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """What asks it; see ``Architecture``."""
        return Asked(Desk(self.line(), classes).logits)
