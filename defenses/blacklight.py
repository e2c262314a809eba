"""Blacklight: recognise the queries of an attack by how alike they are, and tell it nothing new.

Li et al., USENIX Security 2022.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.ranges import Few, Whole
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.logits import straight_through

RANGE = 255  # of values, to which a salt is added
NOTHING = torch.iinfo(torch.int64).min  # stands where an image has fewer hashes


@defenses("blacklight")
@dataclass(frozen=True, kw_only=True)
class Blacklight:
    """Keep fingerprints of all queries; one with over ``threshold`` hashes of an earlier one gets no answer of its own.

    A secret salt for each value of an image is added to it (0 to 255, modulo 255), and the sum is rounded to multiples
    of ``step``. Each run of ``window`` values, from each place on, is hashed, and the ``kept`` largest hashes are the
    fingerprint. The defaults are the authors' for images of CIFAR-10's size; for those of ImageNet's they take windows
    of 50.

    The service has one memory for everybody, as published, whoever asks from whatever account; so figures depend on
    the order of queries and on resuming. It is not emptied within a run.

    Where the authors refuse a query, this one repeats what the query was told that it is like, which an attacker knows
    already: the referee needs scores, and a refusal is no success. Like that query are those that are like it, and so
    on; hashes are counted against all of these together, so what is like one of them by the authors' count is here,
    too. Hashes are keyed by the seed and not one-way, as nobody sees them.

    Source:
        Li et al., USENIX Security 2022, arXiv:2006.14042; settings, salt and rounding as in the authors' released
        ``InputTracker``: window 20, step 50, 50 hashes, more than 25 in common.

    Raises:
        ConfigError: a window longer than an image, at its first query, or a threshold that no fingerprint exceeds.
    """

    step: Few = 50
    window: Few = 20
    kept: Few = 50
    threshold: Whole = 25

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = False
    outside: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Li et al., USENIX Security 2022, arXiv:2006.14042"

    def __post_init__(self) -> None:
        if self.threshold >= self.kept:
            raise ConfigError(f"threshold is {self.threshold} of {self.kept} hashes, which no two queries can exceed")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model, which remembers nobody yet."""
        return Remembering(model, self, seed).eval()


class Remembering(nn.Module):
    """``model`` with a memory of what it was asked."""

    def __init__(self, model: nn.Module, defense: Blacklight, seed: int) -> None:
        super().__init__()
        self.model, self.defense = model, defense
        self.seed = seed
        self.family_of: dict[int, int] = {}  # of each hash, the first query of those that are like each other
        self.told: list[Tensor] = []         # by family, the answer (K,)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W), whose queries come in this order."""
        logits: Tensor = self.model(x)
        secret = SampleRng.create(self.seed, torch.zeros(1, dtype=torch.int64, device=x.device), "blacklight")
        key, salt = secret.words(self.defense.window)[0], secret.fork("salt").uniform(*x.shape[1:])[0].to(x) * RANGE
        prints = fingerprints(x.detach(), salt, key, self.defense.step, self.defense.kept).tolist()
        families = [self._family(set(one) - {NOTHING}, logits[row].detach()) for row, one in enumerate(prints)]
        return straight_through(logits, torch.stack([self.told[family] for family in families])) if len(x) else logits

    def _family(self, fingerprint: set[int], logits: Tensor) -> int:
        """What the query is like, or a family of its own; it is remembered."""
        shared = Counter(family for one in fingerprint if (family := self.family_of.get(one)) is not None)
        family, count = shared.most_common(1)[0] if shared else (0, 0)
        if count <= self.defense.threshold:
            family = len(self.told)
            self.told.append(logits.clone())
        for one in fingerprint:
            self.family_of.setdefault(one, family)
        return family


def fingerprints(x: Tensor, salt: Tensor, key: Tensor, step: int, kept: int) -> Tensor:
    """The ``kept`` largest different hashes (B, kept) int64 of the windows of each image; fewer are padded.

    Args:
        x: images (B, C, H, W) in [0, 1]; values lie pixel by pixel, the channels of one beside each other.
        salt: (C, H, W) on the scale from 0 to 255, the same for all images.
        key: (window,) int64; a window is hashed to the sum of its values times these, and scattered.
    """
    values = (((x * RANGE + salt) % RANGE / step).round() * step).long().permute(0, 2, 3, 1).flatten(1)  # (B, N)
    places = values.shape[1] - len(key) + 1
    if places < 1:
        raise ConfigError(f"window is {len(key)}, longer than the {values.shape[1]} values of an image")
    hashes = sum((values[:, i : i + places] * (factor | 1) for i, factor in enumerate(key)), torch.zeros_like(key[:1]))
    hashes = hashes ^ (hashes >> 29)
    ranked = (hashes * (key[0] | 1)).sort(dim=1, descending=True).values
    repeated = torch.cat((torch.zeros_like(ranked[:, :1], dtype=torch.bool), ranked[:, 1:] == ranked[:, :-1]), dim=1)
    return ranked.masked_fill(repeated, NOTHING).topk(min(kept, places), dim=1).values
