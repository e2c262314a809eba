"""Every attack by gradients on linear models, where the distance to the nearest boundary is known."""

import pytest
import torch

from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.registry import attacks
from tests.problems import Linear, asks_for, attack_with, images, referee

DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}
ATTACKS = [
    "fgsm", "r-fgsm", "pgd(steps=20)", "pgd(steps=20, loss=margin)", "pgd(steps=20, loss=dlr)", "apgd(steps=40)",
    "apgd(steps=40, loss=dlr)", "apgd(steps=40, wide_start=true)", "apgd-t(steps=40, targets=2)", "fab(steps=10)",
    "fab-t(steps=10, targets=2)", "pma(steps=20)", "fmn(steps=60)", "mi-fgsm", "ni-fgsm", "vmi-fgsm(neighbours=2)",
    "si-fgsm", "di-fgsm(steps=30)", "ti-fgsm",
]  # fmt: skip
LONG = ["pma-plus", "autoattack", "autoattack(preset=rand)"]
CASES = [(name, norm) for name in ATTACKS for norm in sorted(attacks.create(name).norms)]
CASES += [
    pytest.param(name, norm, marks=pytest.mark.slow) for name in LONG for norm in sorted(attacks.create(name).norms)
]


def weakness(name, norm):
    """By how much more than the distance an attack needs: half of R+FGSM's way is random, and APGD's steps in l1 move
    a share of the values, of which the one with the largest weight would do. DI sees a smaller image half of the time
    and TI smooths, so some values with small weights go the wrong way."""
    if name == "r-fgsm":
        return 2.5
    if name.startswith(("di-fgsm", "ti-fgsm")):
        return 1.2
    return 1.6 if norm == "l1" and name.startswith("apgd") else 1.0


class Rivals(Linear):
    """Five classes of which two are in question, so that every loss looks for the plane between these."""

    def __init__(self):
        super().__init__((1, 6, 6), classes=5)
        self.weight[2:] /= 20
        self.bias = torch.tensor([0, 0, -3, -3, -3], dtype=torch.float64)

    def forward(self, x):
        return super().forward(x) + self.bias


def problem(n=1):
    """Images near the middle of the box, and their classes."""
    model = Rivals()
    x = 0.5 + (images(n, (1, 6, 6)) - 0.5) / 20
    return model, x, model(x).argmax(1)


def distance(model, x, y, norm):
    """To the nearest of the planes between the class and each other one, for one image."""
    planes = model.weight[y] - model.weight                                              # (K, d)
    logits = model(x)[0]
    return ((logits[y] - logits) / planes.norm(p=DUAL[norm], dim=1)).nan_to_num(torch.inf).min().item()


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_boundary_is_reached_and_never_beaten(name, norm, factor):
    model, x, y = problem()
    attack = attacks.create(name)
    eps = distance(model, x, y, norm) * factor * (weakness(name, norm) if factor > 1 else 1)
    oracle = referee(model, x, y, norm=norm, eps=eps, budget=20_000, **asks_for(attack, model))
    final = attack_with(attack, oracle, x, y)
    assert (oracle.ledger.first_hit != NEVER).item() == (factor > 1)
    assert lp_norm(final - x, norm).item() <= eps + 1e-9
    assert oracle.ledger.forwards.item() <= attack.most_queries


def test_several_losses_of_one_forward_pass():
    """All differences of logits: one forward and a backward pass each, and the planes of a linear model."""
    model, x, y = problem(3)
    oracle = referee(model, x, y, access="gradients")
    logits, gradients = oracle.gradients(x, lambda z, y: z - z.gather(1, y[:, None]))
    assert torch.allclose(logits, model(x))
    assert torch.allclose(gradients.flatten(2), model.weight - model.weight[y][:, None])
    assert oracle.ledger.forwards.tolist() == [1] * 3
    assert oracle.ledger.backwards.tolist() == [5] * 3


def test_several_queries_of_each_sample():
    model, x, y = problem(3)
    many = torch.stack((x, x + 0.01), dim=1)
    oracle = referee(model, x, y, access="gradients")
    logits, gradients = oracle.gradients(many, lambda z, y: z.gather(1, y[:, None]).squeeze(1))
    assert torch.allclose(logits, torch.stack((model(x), model(x + 0.01)), dim=1))
    assert torch.allclose(gradients.flatten(2), model.weight[y][:, None].expand(-1, 2, -1))
    assert oracle.ledger.forwards.tolist() == oracle.ledger.backwards.tolist() == [2] * 3
