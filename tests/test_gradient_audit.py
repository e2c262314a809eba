"""Gradients under audit: two kinds of defense that fool white-box attacks are flagged, an honest network is not."""

import pytest
import torch
from torch import Tensor, nn

from bench.dataset import Dataset
from bench.measure.gradients import gradient_findings
from bench.models import resolve
from bench.oracle.served import ServedModel
from bench.protocols import Job
from bench.registry import datasets, defenses
from bench.threat import Threat
from defenses.aaa import AAALinear
from tests.test_audit import NETWORK, X, Y

LINF = Threat("linf", 8 / 255, "gradients", 100)


class WinnersTakeAll(nn.Module):
    """k-winners-take-all in place of ReLU: the gradient belongs to winners that are others a small step away."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(300, 500), (500, 500), (500, 500), (500, 6)]
        self.weights = [torch.randn(*size, generator=generator) / size[0] ** 0.5 for size in sizes]

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.flatten(1) - 0.5
        for weight in self.weights[:-1]:
            hidden = hidden @ weight
            least = hidden.topk(50, dim=1).values[:, -1:]
            hidden = torch.where(hidden >= least, hidden, 0)
            hidden = hidden / hidden.square().mean(dim=1, keepdim=True).sqrt()
        return hidden @ self.weights[-1]


class Masked(nn.Module):
    """As a solver whose tolerance lets the gradient vanish: it is scaled down and turned, the answer is not."""

    def forward(self, x: Tensor) -> Tensor:
        logits = NETWORK(x)
        weak = 1e-4 * logits + 1e-3 * x.flatten(1)[:, : logits.shape[1]]
        return logits.detach() + weak - weak.detach()


class Around(nn.Module):
    """Grey levels are rounded to eight in the answer; the gradient goes around that."""

    def forward(self, x: Tensor) -> Tensor:
        return NETWORK(x + ((x * 7).round() / 7 - x).detach())


def look(model, twin=NETWORK, x=X, y=None, threat=LINF):
    y = model(x).argmax(1) if y is None else y
    return {finding.flag: finding for finding in gradient_findings(
        ServedModel(model), ServedModel(twin), x, y, threat, 0
    )}  # fmt: skip


def test_a_plain_network_fires_nothing_and_its_gradient_is_its_own():
    found = look(NETWORK, y=Y)
    assert [finding.fired for finding in found.values()] == [False, False]
    assert "of what answers, which points as the undefended network's does" in found["masked-gradients"].evidence


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_in_every_norm(norm):
    threat = Threat(norm, {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}[norm], "gradients", 100)
    assert not any(finding.fired for finding in look(NETWORK, threat=threat).values())
    assert look(Masked(), threat=threat)["masked-gradients"].fired


def test_winners_take_all_is_flagged():
    model = WinnersTakeAll()
    assert look(model, twin=model)["masked-gradients"].fired


def test_a_masked_gradient_is_flagged():
    found = look(Masked())
    assert found["masked-gradients"].fired
    assert "neither of what answers nor of the undefended network" in found["masked-gradients"].evidence
    assert not found["zero-gradients"].fired


def test_a_gradient_around_the_defense_is_named():
    found = look(Around(), twin=Around())
    assert found["masked-gradients"].fired
    assert "the undefended network's gradient, around the defense" in found["masked-gradients"].evidence


def test_no_gradient_is_zero_gradients():
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NETWORK(x).detach()

    assert look(Detached())["zero-gradients"].statistic == 1


def test_a_defense_that_differentiates_is_said_to_be_gone_through():
    nothing = type("Nothing", (), {})
    model = AAALinear()(NETWORK, nothing, 0)
    assert "attacks get" in look(model)["masked-gradients"].evidence


def test_a_model_that_fails_is_said_to():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    (found,) = gradient_findings(ServedModel(Fails()), ServedModel(NETWORK), X, Y, LINF, 0)
    assert found.flag == "failed-probes"
    assert "ValueError: no" in found.evidence


def test_an_adversarially_trained_network_is_not_flagged():
    digits = datasets.create("digits")(None)
    parts = {part: getattr(digits, part).subset(slice(0, 120)) for part in ("train", "calibration", "test")}
    small = Dataset("small digits", digits.classes, **parts)
    train = defenses.create("pgd-at(eps=0.1, epochs=2, steps=2)")
    model = train(lambda: resolve("cnn(width=4)")(10, (1, 8, 8), None), small, Job())
    found = look(model, model, small.test.pixels(), threat=Threat("linf", 0.1, "gradients", 100))
    assert [finding.fired for finding in found.values()] == [False, False]
