"""Defenses that reach into a network find their way in those of other libraries; random weights, no downloads."""

import pytest
import torch
from torch import nn

from bench import numerics
from bench.dataset import Split
from bench.errors import ConfigError
from bench.models import resolve
from bench.models.zoo import import_robustbench
from bench.registry import defenses
from bench.rng import SampleRng

SHAPE = (3, 32, 32)
CALIBRATION = Split(torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(5))
STREAMS = SampleRng.create(0, torch.arange(3), "test")
SPLIT = [
    "torchvision:shufflenet_v2_x0_5",
    "timm:mobilenetv3_small_050",  # ends in timm's own kind of nn.Linear
    "robustbench:Gowal2021Improving_R18_ddpm_100m",
]


def build(name: str) -> nn.Module:
    """The network ``name`` for ten classes, and statistics as a little training would leave them."""
    library, _, entry = name.partition(":")
    torch.manual_seed(0)
    if library == "robustbench":
        try:
            import_robustbench()
        except ConfigError as error:
            pytest.skip(str(error))
        from robustbench.model_zoo.cifar10 import linf

        network: nn.Module = linf[entry]["model"]()
    else:
        pytest.importorskip(library)
        network = resolve(f"{name}(pretrained=false)")(10, SHAPE, None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1)))
    return network.eval()


@pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated")  # robustbench's own activation
@pytest.mark.parametrize("name", SPLIT)
def test_both_defenses_enter_and_their_neutral_settings_change_nothing(name):
    network, x = build(name), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    for model in (numerics.plain(network), numerics.fast(network, x).module):
        logits = model(x)
        neutral = defenses.create("unig(sigma=0, lr=0)")(model, CALIBRATION, 0)
        assert torch.equal(neutral(x, STREAMS), logits)
        scaled = defenses.create("unig")(model, CALIBRATION, 0)
        assert not torch.equal(scaled(x, STREAMS), logits)

    model = numerics.fast(network, x, fold=False).module
    still = defenses.create("dent(steps=1, lr=0)")(model, CALIBRATION, 0)
    torch.testing.assert_close(still(x), model(x), rtol=1e-3, atol=1e-3)
    adapted = defenses.create("dent(steps=1, lr=0.01)")(model, CALIBRATION, 0)
    assert not torch.allclose(adapted(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torchvision:squeezenet1_1", "it has none"),  # its classifier is a convolution
        ("timm:deit_tiny_distilled_patch16_224", r"the last one, '1\.head_dist', gives something else"),  # two heads
    ],
)
def test_unig_says_why_it_cannot_split_a_network(name, why):
    with pytest.raises(ConfigError, match=f"cannot be split there: {why}"):
        defenses.create("unig")(build(name), CALIBRATION, 0)
