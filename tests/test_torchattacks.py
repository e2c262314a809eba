"""Every class of torchattacks: right about whose image is asked, as strong as on the plain network, or refused."""

import pytest
import torch
from torch import nn

from attacks.torchattacks import KINDS, REFUSED, TorchAttack
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.registry import attacks
from tests.problems import attack_with, images, referee

torchattacks = pytest.importorskip("torchattacks")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

EPS = {"linf": 0.05, "l2": 0.4, "l1": 2.0, "l0": 2.0}
BRIEF = {  # settings that cost little, but not so little that nothing happens
    "CW": {"steps": 20, "c": 5}, "EADEN": {"max_iterations": 10, "binary_search_steps": 2, "initial_const": 1.0},
    "EADL1": {"max_iterations": 10, "binary_search_steps": 2, "initial_const": 1.0}, "DeepFool": {"steps": 5},
    "SparseFool": {"steps": 3}, "OnePixel": {"steps": 2}, "Pixle": {"restarts": 2, "max_iterations": 5},
    "Square": {"n_queries": 30}, "FAB": {"steps": 3}, "SPSA": {"nb_sample": 8, "max_batch_size": 4, "nb_iter": 2},
    "PGDRS": {"steps": 5}, "DIFGSM": {"diversity_prob": 0.9},
}  # fmt: skip
SHAPE = (3, 8, 8)


class Small(nn.Module):
    """A fixed smooth network of five classes in float32."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(192, 16, generator=generator) / 8, requires_grad=False)
        self.second = nn.Parameter(torch.randn(16, 5, generator=generator), requires_grad=False)

    def forward(self, x):
        return torch.tanh((x.flatten(1) - 0.5) @ self.first) @ self.second


def problem(n=6, shape=SHAPE):
    model = Small()
    x = (images(n, shape) * 255).round().float() / 255
    return model, x, model(x).argmax(1)


def through(name, norm, x, y, model, eps=None, budget=200, **params):
    attack = TorchAttack(name, {**BRIEF.get(name, {}), **params})
    oracle = referee(
        model, x, y, norm=norm, eps=EPS[norm] if eps is None else eps, access=attack.access, budget=budget, classes=5,
        attack=name, rules=attack.rules,
    )  # fmt: skip
    final = attack_with(attack, oracle, x, y)
    return oracle, final


EVERY = [(name, norm) for name in sorted(KINDS) for norm in sorted(KINDS[name].norms)]


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_every_class_runs_inside_its_threat(name, norm):
    model, x, y = problem(3)
    oracle, final = through(name, norm, x, y, model, budget=60)
    assert (lp_norm(final - x, norm) <= EPS[norm] * (1 + 1e-5)).all()
    assert final.min() >= 0
    assert final.max() <= 1
    assert (oracle.ledger.forwards > 0).all()
    assert (oracle.ledger.forwards <= 60).all()
    fallen = oracle.ledger.first_hit != NEVER
    assert (model(final).argmax(1) != y)[fallen].float().mean() >= 0.8 if fallen.any() else True


PLAIN = [  # without randomness, or with the library's own seed
    ("FGSM", "linf", {}), ("BIM", "linf", {}), ("MIFGSM", "linf", {}), ("NIFGSM", "linf", {}), ("SINIFGSM", "linf", {}),
    ("UPGD", "linf", {}), ("PGD", "linf", {"random_start": False}), ("PGDL2", "l2", {"random_start": False}),
    ("APGD", "linf", {"seed": 0}), ("APGDT", "linf", {"seed": 0}), ("PIFGSM", "linf", {}), ("PIFGSMPP", "linf", {}),
    ("Square", "linf", {"seed": 0}), ("TIFGSM", "linf", {"diversity_prob": 0.0}), ("JSMA", "l0", {}),
    ("DIFGSM", "linf", {"diversity_prob": 0.0}), ("DeepFool", "l2", {}), ("CW", "l2", {}), ("FAB", "linf", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "norm", "params"), PLAIN)
def test_what_falls_is_what_the_library_beats_on_the_plain_network(name, norm, params):
    model, x, y = problem(8)
    eps = {"linf": 0.03, "l2": 0.3, "l0": 6.0}[norm]
    kind, params = KINDS[name], {**BRIEF.get(name, {}), **params}
    oracle, _ = through(name, norm, x, y, model, eps=eps, **params)
    theirs = {**params, kind.radius: eps} if not kind.minimal or name == "FAB" else dict(params)
    if name in ("APGDT", "FAB"):
        theirs["n_classes"] = 5
    attack = getattr(torchattacks, name)(model, **theirs)
    if name == "JSMA":
        attack.set_mode_targeted_by_function(lambda _, labels: (labels + 1) % 5, quiet=True)
    apart = kind.order is None
    parts = zip(x.split(1), y.split(1), strict=True) if apart else [(x, y)]
    x_adv = torch.cat([attack(*part).detach() for part in parts])
    beaten = (model(x_adv).argmax(1) != y) & (lp_norm(x_adv - x, norm) <= eps + 1e-5)
    fallen = oracle.ledger.first_hit != NEVER
    assert (fallen | ~beaten).all()  # what the library leaves behind is asked about, too, so more may fall
    assert fallen.sum() - beaten.sum() <= (8 if name == "JSMA" else 1)  # it goes on until its target is reached


@pytest.mark.parametrize("name", ["FGSM", "BIM", "APGD", "Square", "NIFGSM"])
@pytest.mark.parametrize("eps", [0.02, 0.6])
def test_equal_images_are_told_apart(name, eps):
    """Two samples of one image and different labels: for one of them the clean image is a hit, for the other not."""
    model, x, y = problem(4)
    x, y = x[[0, 0, 0, 1]], y[[0, 0, 0, 1]].clone()
    y[1] = (y[1] + 1) % 5
    oracle, _ = through(name, "linf", x, y, model, eps=eps)
    alone = [through(name, "linf", x[[i]], y[[i]], model, eps=eps)[0].ledger.forwards.item() for i in range(4)]
    assert oracle.ledger.first_hit[1] == 1
    assert oracle.ledger.forwards[1] == 1
    assert oracle.ledger.forwards[0] > 1 or alone[0] == 1
    if KINDS[name].order == "batch":  # no randomness
        assert oracle.ledger.forwards.tolist() == alone


def test_spsa_spends_no_more_than_its_budget():
    model, x, y = problem()
    oracle, _ = through("SPSA", "linf", x, y, model, eps=1e-6, budget=20, nb_sample=64, max_batch_size=64)
    assert oracle.ledger.forwards.tolist() == [20] * 6


def test_an_attack_ends_when_its_budget_does():
    _, x, y = problem()
    asked = []

    class Counts(Small):
        def forward(self, images):
            asked.append(len(images))
            return super().forward(images)

    through("PGD", "linf", x, y, Counts(), eps=1e-6, budget=5, steps=1000)
    assert sum(asked) <= 6 * 6


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_what_to_use(name):
    with pytest.raises(ConfigError, match=rf"torchattacks' {name} cannot be used: .*;"):
        attacks.create(f"torchattacks:{name}")


def test_the_list_knows_every_class_of_the_library():
    assert set(torchattacks.__all__) == {*KINDS, *REFUSED}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.colour])
def test_filters_of_three_channels_are_refused_on_grey_images(name):
    with pytest.raises(ConfigError, match="three channels"):
        TorchAttack(name).check(10, (1, 8, 8))


def test_targets_that_the_data_do_not_have_are_refused():
    TorchAttack("APGDT").check(4, SHAPE)
    with pytest.raises(ConfigError, match="4 classes"):
        TorchAttack("APGDT").check(3, SHAPE)
    with pytest.raises(ConfigError, match="3 classes"):
        TorchAttack("APGD", {"loss": "dlr"}).check(2, SHAPE)


def test_gradients_in_another_order_of_memory_are_no_hindrance():
    """Fast numbers keep channels last, and the library calls view() on gradients."""

    class ChannelsLast(Small):
        def forward(self, images):
            return super().forward(images.to(memory_format=torch.channels_last).contiguous())

    _, x, y = problem()
    through("PGDL2", "l2", x, y, ChannelsLast())
