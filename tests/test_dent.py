"""DENT: rows adapted by plain networks of their own agree, no steps change nothing, and it says what it depends on."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bench import numerics
from bench.dataset import Split
from bench.errors import ConfigError
from bench.models.resnet import ResNet20
from bench.plan.pin import pin
from bench.registry import defenses, describe
from defenses.dent import Adapted, entropy

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))
VARIANTS = ["per-sample", "as-released", "online"]


class Network(nn.Module):
    """Batch-norms over images and over vectors, one that serves twice, one without scales, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5)
        self.again, self.plain = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5, affine=False)
        self.hidden, self.vector, self.head = nn.Linear(45, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.auxiliary = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x)).relu()
        z = self.plain(self.norm(self.again(z))).relu()
        return self.head(self.vector(self.hidden(z.flatten(1))).relu())


def network() -> Network:
    torch.manual_seed(0)
    model = Network().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return model.eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def serve(spec: str, model: nn.Module | None = None) -> Adapted:
    return defenses.create(spec)(network() if model is None else model, NOTHING, 0)


def plain_entropy(logits: Tensor) -> Tensor:
    p = logits.exp() / logits.exp().sum()
    return -sum(one * one.log() for one in p)


# --- the adaptation


def test_the_papers_preset_is_dents_own_configuration():
    """AdaMod by its book, on the mean entropy less that of the mean prediction, for a network of copies."""
    x, model, rows = images(6), network(), torch.arange(6)
    names = ("norm.weight", "norm.bias", "vector.weight", "vector.bias")
    values = [[model.get_parameter(name).detach().clone() for name in names] for _ in rows]
    state = [[[torch.zeros_like(value) for _ in range(3)] for value in row] for row in values]

    def answer(values: list[list[Tensor]]) -> Tensor:
        return torch.cat([
            torch.func.functional_call(model, dict(zip(names, values[row], strict=True)), (x[row : row + 1],))
            for row in rows
        ])  # fmt: skip

    for step in range(1, 7):
        for row in values:
            for value in row:
                value.requires_grad_(True)
        p = answer(values).softmax(1)
        mean = p.mean(0)
        loss = -(p * (p + 1e-5).log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
        slopes = iter(torch.autograd.grad(loss, [value for row in values for value in row]))
        for row in rows:
            for place, (m, v, s) in enumerate(state[row]):
                g = next(slopes)
                m.copy_(0.99 * m + 0.01 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                size = 6e-3 * (1 - 0.999**step) ** 0.5 / (1 - 0.99**step) / (v.sqrt() + 1e-8)
                s.copy_(0.6 * s + 0.4 * size)
                values[row][place] = values[row][place].detach() - torch.minimum(size, s) * m
    torch.testing.assert_close(serve("dent(preset=paper)")(x), answer(values), rtol=1e-7, atol=1e-9)
    defense = defenses.create("dent(preset=paper)")
    assert (defense.variant, defense.lr, defense.batch_dependent) == ("as-released", 6e-3, True)



@pytest.mark.parametrize("variant", ["per-sample", "as-released"])
def test_each_row_is_adapted_like_a_network_of_its_own(variant):
    x, steps, lr, expected = images(6), 4, 0.05, []
    for row in x:
        model = network()
        norms = [model.norm.weight, model.norm.bias, model.vector.weight, model.vector.bias]
        optimizer = torch.optim.Adam(norms, lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = plain_entropy(model(row[None])[0])
            (loss if variant == "per-sample" else loss / len(x)).backward()
            optimizer.step()
        expected.append(model(row[None])[0])
    found = serve(f"dent(variant={variant}, steps={steps}, lr={lr})")(x)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)


class RowNorm(nn.Module):
    """A batch-norm over the batch at hand, in plain sums, with a scale and a shift for each row."""

    def __init__(self, norm: nn.Module, rows: int) -> None:
        super().__init__()
        self.eps = norm.eps
        if norm.affine:
            self.scale = nn.Parameter(norm.weight.detach().repeat(rows, 1))
            self.shift = nn.Parameter(norm.bias.detach().repeat(rows, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
        mean = flat.mean(dim=(0, 2), keepdim=True)
        z = (flat - mean) / ((flat - mean).square().mean(dim=(0, 2), keepdim=True) + self.eps).sqrt()
        if hasattr(self, "scale"):
            z = z * self.scale[:, :, None] + self.shift[:, :, None]
        return z.view(x.shape)


@pytest.mark.parametrize("steps", [0, 4])
def test_online_is_a_network_with_the_statistics_of_the_batch(steps):
    x, model = images(6), network()
    for name in ("norm", "plain", "vector"):
        setattr(model, name, RowNorm(getattr(model, name), len(x)))
    parameters = [part for name in ("norm", "vector") for part in getattr(model, name).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(plain_entropy(logits) for logits in model(x)) / len(x)).backward()
        optimizer.step()
    found = serve(f"dent(variant=online, steps={steps}, lr=0.05)")(x)
    torch.testing.assert_close(found, model(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adaptation_makes_the_network_surer(variant):
    x = images(30)
    before, after = (entropy(serve(f"dent(variant={variant}, steps={steps})")(x)) for steps in (0, 6))
    assert after.mean() < before.mean()
    if variant != "online":  # where rows share statistics, one may pay for the others
        assert (after < before).all()


# --- what stays as it was


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("variant", ["per-sample", "as-released"])
def test_without_steps_it_is_the_network_bit_for_bit(variant, fast):
    torch.manual_seed(0)
    for model, x in ((network().float(), images(9).float()), (ResNet20()(10, (3, 8, 8), None), images(3).float())):
        served = numerics.fast(model, x, fold=False).module if fast else model
        assert torch.equal(serve(f"dent(variant={variant}, steps=0)", served)(x), served(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_call_starts_anew_and_the_network_is_left_as_it_was(variant):
    model, x = network(), images(5)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    served = serve(f"dent(variant={variant}, lr=0.1)", model)
    first = served(x)
    served(images(5, seed=2))
    assert torch.equal(served(x), first)
    assert not torch.allclose(first, before)
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_adapts_without_gradients_too():
    served, x = serve("dent(lr=0.1)"), images(3)
    expected = served(x)
    with torch.no_grad():
        assert torch.equal(served(x), expected)


def test_gradients_are_those_of_the_adapted_network():
    model, x = network(), images(1).requires_grad_(True)
    served = serve("dent(lr=0.1)", model)
    (found,) = torch.autograd.grad(served(x)[0, 0], x)
    affine = served._adapt(x.detach())
    with torch.no_grad():
        for part, values in zip((*model.norm.parameters(), *model.vector.parameters()), affine[:4], strict=True):
            part.copy_(values[0])
    (expected,) = torch.autograd.grad(model(x)[0, 0], x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- what an answer depends on


def test_rows_of_their_own_do_not_know_their_batch():
    served, x = serve("dent(lr=0.1)"), images(12)
    for rows in torch.arange(12).split(5):
        torch.testing.assert_close(served(x[rows]), served(x)[rows], rtol=1e-9, atol=1e-9)


def test_released_rows_know_how_many_they_are_but_not_who():
    model = network()
    with torch.no_grad():
        model.head.weight *= 8  # sure rows, whose gradients come near Adam's 1e-8
    served, x = serve("dent(variant=as-released)", model), images(40)
    crowd = served(x)
    other = torch.cat((x[:20], images(20, seed=3)))
    torch.testing.assert_close(served(other)[:20], crowd[:20], rtol=1e-12, atol=1e-12)
    assert (served(x[:1]) - crowd[:1]).abs().max() > 1e-9
    assert (torch.cat([served(row[None]) for row in x]) - crowd).abs().max() > 1e-4


def test_online_rows_know_who_they_are_with():
    served, x = serve("dent(variant=online)"), images(8)
    assert not torch.allclose(served(torch.cat((x[:4], images(4, seed=3))))[:4], served(x)[:4], atol=1e-3)
    assert served(x[:1]).isfinite().all()  # vectors of one row have no spread


def test_the_variants_declare_it():
    for variant, traits in zip(VARIANTS, ((), ("batch-dependent",), ("batch-dependent",)), strict=True):
        spec = f"dent(variant={variant})"
        assert pin(spec, defenses.create(spec)).traits == traits


# --- which networks it takes


def test_batch_norms_of_timm_with_an_activation_inside_are_adapted():
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Conv2d(3, 6, 3), layers.BatchNormAct2d(6), nn.Flatten(), nn.Linear(216, 4)).eval()
    apart = nn.Sequential(fused[0], nn.BatchNorm2d(6), nn.ReLU(), *fused[2:]).eval()
    x = images(4).float()
    torch.testing.assert_close(serve("dent(lr=0.1)", fused)(x), serve("dent(lr=0.1)", apart)(x))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)])
def test_networks_without_anything_to_adapt_are_refused(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 8), norm, nn.Flatten())
    with pytest.raises(ConfigError, match="BatchNorm layers, and this network has none"):
        serve("dent", model)


def test_the_papers_preset_has_nothing_to_say_about_one_row():
    x = images(1)
    torch.testing.assert_close(serve("dent(preset=paper)")(x), network()(x))
    with pytest.raises(ConfigError, match="batch of one"):
        defenses.create("dent(preset=paper, variant=per-sample)")


def test_the_settings_of_a_stored_row_still_name_it():
    assert describe(defenses.create("dent")) == {"variant": "per-sample", "steps": 6, "lr": 1e-3}


def test_settings_that_cannot_be_meant_are_refused():
    for text in ("steps=-1", "lr=-1", "lr=inf", "variant=new"):
        with pytest.raises(ConfigError):
            defenses.create(f"dent({text})")
