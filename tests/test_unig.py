"""UniG: autograd agrees with its closed form, its controls are the identity, and it says what it depends on."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import numerics
from bench.dataset import Split
from bench.errors import ConfigError
from bench.models.resnet import ResNet20
from bench.plan.pin import pin
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.features import last_linear
from defenses.unig import Head, Unified, UniG, _from_neighbours

NOTHING = Split(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
CALIBRATION = Split(torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(20) % 6)
D, CLASSES = 7, 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, D), nn.ReLU(), nn.Linear(D, CLASSES)).double().eval()


def fast(model: nn.Module) -> nn.Module:
    return numerics.fast(model, CALIBRATION.images).module


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def streams(count: int, number: int = 0) -> SampleRng:
    return SampleRng.create(0, torch.arange(count), "test").fork(number)


def serve(spec: str, model: nn.Module | None = None) -> Unified:
    model = network() if model is None else model
    dtype = next(model.parameters()).dtype
    split = Split(CALIBRATION.images.to(dtype), CALIBRATION.labels)
    return defenses.create(spec)(model, split, 0)


def problem(rows: int) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head, features, scales and classes."""
    rng = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    head = Head(normal(CLASSES, D), normal(CLASSES))
    return head, normal(rows, D), 1 + normal(rows, D) / 2, torch.randint(CLASSES, (rows,), generator=rng)


def feature_gradients(head: Head, features: Tensor, scale: Tensor, classes: Tensor) -> Tensor:
    """The gradients of the summed cross-entropy by the features, with a graph to the scale."""
    features = features.detach().requires_grad_(True)
    loss = F.cross_entropy(head.logits(scale * features), classes, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    return gradient


def neighbour_loss(g: Tensor, low: Tensor, width: Tensor) -> Tensor:
    scaled = (g - low) / width
    return (scaled[:-1] - scaled[1:]).norm(dim=1).sum()


# --- the closed form


def test_the_gradient_by_the_features_is_autograds():
    head, features, scale, classes = problem(9)
    closed = scale * head.gradient(features, scale, classes).u
    torch.testing.assert_close(closed, feature_gradients(head, features, scale, classes), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["stateless", "as-released"])
def test_the_derivative_by_the_scale_is_autograds(variant):
    head, features, scale, classes = problem(9)
    scale.requires_grad_(True)
    g = feature_gradients(head, features, scale, classes)
    reference = None if variant == "as-released" else torch.randn(4, D, dtype=torch.float64)
    module = Unified(network(), nn.Linear(D, CLASSES), UniG(), reference=reference)
    with torch.no_grad():
        v, width = (_from_neighbours if reference is None else module._from_reference)(g)
        closed = head.pull(features, scale, head.gradient(features, scale, classes), v) / width
    if reference is None:
        loss = neighbour_loss(g, g.detach().min(), g.detach().max() - g.detach().min())  # what low is cancels
    else:
        loss = ((g[:, None] - reference).norm(dim=2).sum(dim=1, keepdim=True) / width).sum()
    (derivative,) = torch.autograd.grad(loss, scale)
    torch.testing.assert_close(closed, derivative, rtol=1e-9, atol=1e-10)


def test_the_released_variant_follows_torchs_optimiser_from_query_to_query():
    steps, rows = 3, (8, 5, 8)  # the state of rows 5 to 7 waits while they are away
    model = network()
    served = serve(f"unig(variant=as-released, steps={steps}, lr=0.3)", model)
    head = Head(model[3].weight.detach(), model[3].bias.detach())
    parameter = nn.Parameter(torch.ones(8, D, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.9, weight_decay=5e-4)
    for number, count in enumerate(rows):
        x, rng = images(count, seed=number), streams(count, number)
        features = model[:3](x).detach()
        classes = head.logits(features).argmax(1)
        parameter.data[:count] = 1 + 0.5 * rng.normal(D).double()
        for step in range(steps):
            parameter.data[count:] = 1.0
            g = feature_gradients(head, features, parameter[:count], classes) / count  # of the mean
            if step == 0:
                low, width = g.detach().min(), g.detach().max() - g.detach().min()
            optimizer.zero_grad()
            neighbour_loss(g, low, width).backward()
            optimizer.step()
            parameter.data[:count].clamp_(0.5, 1.5)
        expected = head.logits(parameter.detach()[:count] * features)
        torch.testing.assert_close(served(x, rng), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_of_one_follows_the_released_code_query_by_query(steps):
    """Torch's optimiser on the chain of one query and the stored images, with their own random P and true classes."""
    model, samples = network(), 3
    served = serve(f"unig(steps={steps}, lr=0.3, anchors=4)", model)
    head = Head(model[3].weight.detach(), model[3].bias.detach())
    stored = model[:3](CALIBRATION.images.double()).detach()
    chains = [nn.Parameter(torch.ones(5, D, dtype=torch.float64)) for _ in range(samples)]
    optimizers = [torch.optim.SGD([chain], lr=0.3, momentum=0.9, weight_decay=5e-4) for chain in chains]
    for number in range(3):
        x, rng = images(samples, seed=number), streams(samples, number)
        features = model[:3](x).detach()
        starts = rng.fork("stored").integers(20 - 4 + 1)
        answers = served(x, rng)
        for row, (chain, optimizer) in enumerate(zip(chains, optimizers, strict=True)):
            stretch = torch.arange(4) + starts[row]
            f = torch.cat((features[row : row + 1], stored[stretch]))
            targets = torch.cat((head.logits(f[:1]).argmax(1), CALIBRATION.labels[stretch]))
            chain.data = 1 + 0.5 * rng.normal(5, D)[row].double()
            for step in range(steps):
                g = feature_gradients(head, f, chain, targets) / 5  # of the mean
                if step == 0:
                    low, width = g.detach().min(), g.detach().max() - g.detach().min()
                optimizer.zero_grad()
                neighbour_loss(g, low, width).backward()
                optimizer.step()
                chain.data.clamp_(0.5, 1.5)
            expected = head.logits(chain.detach()[:1] * f[:1])[0]
            torch.testing.assert_close(answers[row], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variant", ["stateless", "as-released"])
def test_a_small_step_brings_gradients_closer(variant):
    """Against the same start without a step; both ends judged with the same range."""
    model, x, rng = network(), images(30), streams(30)
    features = model[:3](x).detach()
    head = Head(model[3].weight.detach(), model[3].bias.detach())
    classes = head.logits(features).argmax(1)

    def distance(lr: float) -> Tensor:
        served = serve(f"unig(variant={variant}, lr={lr}, sigma=0.1)", model)
        g = feature_gradients(head, features, served.scale(features, rng), classes)
        if served.reference is None:
            return (g[:-1] - g[1:]).norm(dim=1).sum()
        return (g[:, None] - served.reference).norm(dim=2).sum()

    assert distance(1e-3) < distance(0.0)


# --- the controls


@pytest.mark.parametrize("variant", ["batch-of-one", "stateless", "as-released"])
@pytest.mark.parametrize("control", ["delta=0", "lr=0, sigma=0", "steps=0, sigma=0"])
@pytest.mark.parametrize("numbers", [numerics.plain, fast])
def test_controls_are_the_network_bit_for_bit(variant, control, numbers):
    torch.manual_seed(0)
    model = numbers(ResNet20()(10, (3, 8, 8), None))
    served = serve(f"unig(variant={variant}, {control})", model)
    x = images(6).float()
    for number in range(2):
        assert torch.equal(served(x, streams(6, number)), model(x))


def test_without_steps_of_any_size_it_is_noise_on_each_sample_alone():
    served, x = serve("unig(variant=as-released, lr=0)"), images(10)
    other = torch.cat((x[:1], images(9, seed=3)))
    assert torch.allclose(served(x, streams(10))[0], served(other, streams(10))[0], atol=1e-12)


@pytest.mark.parametrize("variant", ["batch-of-one", "stateless", "as-released"])
def test_the_scale_stays_in_its_bounds_and_mostly_at_them(variant):
    served, x = serve(f"unig(variant={variant}, delta=0.3, steps=3)"), images(30)
    scale = served.scale(network()[:3](x).detach(), streams(30))
    assert ((scale >= 0.7) & (scale <= 1.3)).all()
    assert ((scale == 0.7) | (scale == 1.3)).double().mean() > 0.5


# --- what an answer depends on


def test_stateless_rows_know_neither_their_batch_nor_the_past():
    served, x = serve("unig(variant=stateless)"), images(12)
    first = served(x, streams(12))
    assert torch.equal(served(x, streams(12)), first)
    assert not torch.equal(served(x, streams(12, 1)), first)
    for rows in torch.arange(12).split(5):
        torch.testing.assert_close(served(x[rows], streams(12)[rows]), first[rows], rtol=1e-9, atol=1e-9)


def test_released_rows_know_both():
    spec, x = "unig(variant=as-released, lr=0.1)", images(12)
    served = serve(spec)
    first = served(x, streams(12))
    assert not torch.allclose(serve(spec)(x[:6], streams(12)[torch.arange(6)]), first[:6])
    assert not torch.allclose(served(x, streams(12)), first)
    assert torch.equal(serve(spec)(x, streams(12)), first)


def test_a_batch_of_one_knows_the_past_of_its_sample_and_nobody_else():
    x = images(12)
    whole, apart = serve("unig"), serve("unig")
    for number in range(3):
        answers = whole(x, streams(12, number))
        for rows in torch.arange(12).flip(0).split(5):
            torch.testing.assert_close(apart(x[rows], streams(12, number)[rows]), answers[rows], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(serve("unig")(x, streams(12, 2)), answers)


def test_queries_of_a_sample_in_one_call_follow_each_other():
    x, rows = images(3), torch.tensor([0, 1, 0, 2, 0, 1])
    number = torch.tensor([1, 1, 2, 1, 3, 2])
    together, apart = serve("unig"), serve("unig")
    answers = together(x[rows], SampleRng.create(0, torch.arange(3), "test")[rows].fork(number))
    for query in (1, 2, 3):
        at = (number == query).nonzero().squeeze(1)
        alone = apart(x[rows[at]], streams(3, query)[rows[at]])
        torch.testing.assert_close(alone, answers[at], rtol=1e-9, atol=1e-9)


def test_the_variants_declare_it():
    assert pin("unig", defenses.create("unig")).traits == ("random", "stateful")
    assert pin("unig", defenses.create("unig(variant=stateless)")).traits == ("random",)
    released = "unig(variant=as-released)"
    assert pin(released, defenses.create(released)).traits == ("random", "batch-dependent", "stateful")


@pytest.mark.parametrize("variant", ["batch-of-one", "stateless", "as-released"])
@pytest.mark.parametrize("x", [images(1), torch.zeros(4, 3, 8, 8, dtype=torch.float64)])
def test_one_row_and_equal_rows_are_answered(variant, x):
    assert serve(f"unig(variant={variant})")(x, streams(len(x))).isfinite().all()


# --- where it splits a network


class Auxiliary(nn.Module):
    """Defines its classifier first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(D, CLASSES), nn.Linear(192, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).relu())


@pytest.mark.parametrize("numbers", [numerics.plain, fast])
def test_the_last_layer_is_the_one_that_gives_the_logits(numbers):
    x = images(2).float()
    model = numbers(Auxiliary())
    assert last_linear(model, x).in_features == D
    residual = numbers(ResNet20()(10, (3, 8, 8), None))
    assert last_linear(residual, x).in_features == 64
    assert last_linear(residual, x[:0]).in_features == 64


def test_networks_of_torchvision_can_be_split():
    zoo = pytest.importorskip("torchvision").models
    x = torch.rand(1, 3, 32, 32)
    torch.manual_seed(0)
    assert last_linear(zoo.resnet18().eval(), x).in_features == 512
    vit = zoo.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=10).eval()
    nn.init.normal_(vit.heads.head.weight)
    assert last_linear(vit, x) is vit.heads.head


SHARED = nn.Linear(192, 192)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten()), "it has none"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Softmax(dim=1)), "the last one, '1', gives something else"),
        (nn.Sequential(nn.Linear(8, 8), nn.Flatten()), "the last one, '0', gives something else"),
        (nn.Sequential(nn.Flatten(), SHARED, SHARED), "the last one, '1', runs more than once"),
    ],
)
def test_networks_that_end_in_something_else_are_refused(model, why):
    with pytest.raises(ConfigError, match=f"cannot be split there: {why}.*use a network that ends in"):
        serve("unig", model.eval())


def test_the_network_is_left_as_it_was():
    model, x = network(), images(4)
    before = model(x)
    serve("unig", model)(x, streams(4))
    assert torch.equal(model(x), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_settings_that_cannot_be_meant_are_refused():
    for text in ("delta=-0.1", "delta=1.1", "sigma=-1", "lr=-1", "steps=-1", "lr=inf", "anchors=0", "variant=new"):
        with pytest.raises(ConfigError):
            defenses.create(f"unig({text})")
    with pytest.raises(ConfigError, match="there are 0 calibration images"):
        UniG()(network(), NOTHING, 0)
    with pytest.raises(ValueError, match="no random streams for 2 images"):
        serve("unig")(images(2))
