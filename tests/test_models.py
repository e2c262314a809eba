"""Networks: that they compute what they should, take only weights that fit, and never run code from them."""

import copy
import importlib
import importlib.util
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bench.data  # noqa: F401 registers them
from bench.ascent import pgd
from bench.dataset import Split
from bench.errors import ConfigError, WeightsError
from bench.models import check_logits, resolve
from bench.models.included import FILES
from bench.models.resnet import ZeroPadded
from bench.models.weights import load_weights, save_parts, state_fingerprint
from bench.models.zoo import _loading
from bench.numerics import fold_batch_norm, plain
from bench.registry import datasets, models
from bench.rng import SampleRng
from bench.threat import Threat

SHARED = Path(__file__).parents[2] / "shared"
RGB = (3, 32, 32)


def build(spec: str, classes: int = 10, shape: tuple[int, int, int] = RGB, model_dir: Path | None = None) -> nn.Module:
    return models.create(spec)(classes, shape, model_dir)


def need(package: str) -> None:
    """Skip where ``package`` is not installed; found and not imported, as robustbench does not import unmended."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    logits = torch.cat([model(split.pixels(slice(start, start + 100))) for start in range(0, len(split), 100)])
    return (logits.argmax(1) == split.labels).float().mean().item()


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """The first 300 real test images."""
    source = SHARED / "data" / "cifar10" / "test-00000-of-00001.parquet"
    if not source.is_file():
        pytest.skip("no ../shared/data/cifar10 beside the repository")
    folder = tmp_path_factory.mktemp("data") / "cifar10"
    folder.mkdir()
    rows = pq.read_table(source).slice(0, 300)
    pq.write_table(rows.slice(0, 1), folder / "train-00000-of-00001.parquet")
    pq.write_table(rows, folder / "test-00000-of-00001.parquet")
    return datasets.create("cifar10")(folder.parent).test


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cnn", (1, 8, 8)), ("cnn", (3, 64, 64)), ("resnet20", (1, 8, 8)), ("resnet20", (3, 33, 31)), ("resnet32", RGB),
     ("resnet44", RGB), ("resnet56", RGB), ("resnet18", (1, 8, 8)), ("vgg16", RGB), ("vgg16", (1, 70, 33)),
     ("small-vgg", RGB), ("small-vgg", (1, 16, 33)),
     ("densenet121", (1, 8, 8)), ("densenet121", (3, 33, 31)), ("senet18", (1, 8, 8)), ("senet18", (3, 33, 31)),
     ("googlenet", (1, 8, 8)), ("googlenet", (3, 33, 31)), ("preact-resnet18", (1, 8, 8)),
     ("preact-resnet18", (3, 33, 31)), ("wide-resnet28-10", (1, 8, 8))],
)  # fmt: skip
def test_untrained_networks_give_logits_for_any_small_image(name, shape):
    architecture = models.create(name)
    network = architecture(7, shape, None)
    assert not architecture.trained
    assert not network.training
    check_logits(network, 7, shape)


@pytest.mark.parametrize(
    ("name", "left"),
    [("cnn", 0), ("resnet20", 0), ("resnet18", 0), ("vgg16", 0), ("small-vgg", 0), ("googlenet", 0),
     ("senet18", 8), ("densenet121", 62), ("preact-resnet18", 9)],  # before an activation that follow a sum or a cat
)  # fmt: skip
def test_folding_keeps_what_a_network_says(name, left):
    network = build(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.rand(2, *RGB)
    folded = copy.deepcopy(network)
    fold_batch_norm(folded, x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left


@pytest.mark.parametrize(
    ("name", "millions"), [("vgg16", 14.7), ("densenet121", 6.96), ("senet18", 11.26), ("googlenet", 6.16)]
)
def test_sizes_are_those_that_are_published_for_small_images(name, millions):
    counted = sum(parameter.numel() for parameter in build(name).parameters()) / 1e6
    assert counted == pytest.approx(millions, abs=0.03)


@pytest.mark.parametrize(
    ("name", "count", "layers"),
    [("preact-resnet18", 11_172_170, ("bn.weight", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias", "linear.bias")),
     ("wide-resnet28-10", 36_479_194, ("bn1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.3.bn2.bias",
                                       "fc.bias"))],
)  # fmt: skip
def test_pre_activation_networks_are_the_public_ones(name, count, layers):
    network = build(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert set(layers) <= set(network.state_dict())


@pytest.mark.parametrize(("spec", "side"), [("vgg16", 31), ("small-vgg", 15), ("densenet121", 7)])
def test_images_that_pooling_would_leave_nothing_of_are_refused(spec, side):
    with pytest.raises(ConfigError, match=rf"images are 40x{side}; .* below {side + 1}x{side + 1}"):
        build(spec, shape=(3, side, 40))


def test_weights_in_parts_are_joined(tmp_path):
    source = build("resnet20")
    files = save_parts(source.state_dict(), tmp_path / "w.safetensors", most=300_000)
    assert [file.name for file in files] == [f"w-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert all(file.stat().st_size < 320_000 for file in files)
    spec = "resnet20(weights=w.safetensors)"
    assert state_fingerprint(build(spec, model_dir=tmp_path)) == state_fingerprint(source)
    files[2].unlink()
    with pytest.raises(WeightsError, match=r"is in parts, and w-00001-of-00004.* not all of one set; copy all of them"):
        build(spec, model_dir=tmp_path)


def test_weights_that_one_part_holds_are_one_file(tmp_path):
    files = save_parts({"a": torch.ones(3)}, tmp_path / "w.safetensors", most=300_000)
    assert files == [tmp_path / "w.safetensors"]


@pytest.mark.parametrize("spec", ["vgg16", "senet18"])
def test_any_registered_network_takes_weights(tmp_path, spec):
    source = build(spec)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = build(f"{spec}(weights=w.safetensors)", model_dir=tmp_path)
    assert state_fingerprint(loaded) == state_fingerprint(source)


@pytest.mark.parametrize(("name", "values"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_sizes_are_those_of_the_paper(name, values):
    counted = sum(parameter.numel() for parameter in build(name).parameters()) / 1e6
    assert counted == pytest.approx(values, abs=0.006)  # table 6 of He et al. gives two digits


def test_the_shortcut_without_parameters_keeps_pixels_and_adds_zeros():
    x = torch.rand(2, 16, 8, 8)
    out = ZeroPadded(16, 2)(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_the_small_network_learns_digits():
    data = datasets.create("digits")(None)
    torch.manual_seed(0)
    network = build("cnn(width=16)", 10, data.test.shape).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(4):
        for rows in torch.randperm(len(data.train)).split(50):
            loss = nn.functional.cross_entropy(network(data.train.pixels(rows)), data.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert accuracy(network.eval(), data.test) >= 0.95


def test_published_accuracy_of_resnet20(cifar):
    if not (SHARED / "models").is_dir():
        pytest.skip("no ../shared/models beside the repository")
    architecture = models.create("resnet20(weights=cifar10_resnet20.safetensors)")
    assert architecture.trained
    network = architecture(10, RGB, SHARED / "models")
    p, n = 0.8827, len(cifar)  # over all 10,000 test images
    assert accuracy(network, cifar) == pytest.approx(p, abs=3 * (p * (1 - p) / n) ** 0.5)


def test_the_robust_resnet18_classifies(cifar):
    need("pyautoattack")
    few = cifar.subset(slice(60))
    p, n = 0.84, len(few)  # 84.2 % of the first 500 JPEG-coded images
    measured = accuracy(build("robust-resnet18"), few)
    assert measured == pytest.approx(p, abs=3 * (p * (1 - p) / n) ** 0.5)


def test_the_robust_resnet18_refuses_other_data():
    need("pyautoattack")
    with pytest.raises(WeightsError, match=r"linear\.weight \(10, 512\) instead of \(100, 512\)"):
        build("robust-resnet18", classes=100)


@pytest.mark.parametrize(("name", "p"), [("resnet20-at", 0.6475), ("small-vgg-standard", 0.839)])  # of 10,000
def test_an_included_network_is_as_right_as_its_page_says(cifar, name, p):
    assert accuracy(build(name), cifar) == pytest.approx(p, abs=3 * (p * (1 - p) / len(cifar)) ** 0.5)


@pytest.mark.parametrize(("name", "robust"), [("resnet20-at", True), ("small-vgg-standard", False)])
def test_of_the_included_networks_an_adversary_leaves_something_of_the_robust_one_alone(cifar, name, robust):
    network = build(name)
    x, y = cifar.pixels(slice(32)), cifar.labels[:32]
    rng = SampleRng.create(0, torch.arange(32), "test")
    x_adv = pgd(plain(network), x, y, Threat("linf", 8 / 255, "gradients"), rng, 5, 0.5)
    assert ((network(x_adv).argmax(1) == y).float().mean() > 0.1) == robust


@pytest.mark.parametrize(("name", "features"), [("resnet20-at", 64), ("small-vgg-standard", 192)])
def test_an_included_network_refuses_other_data(name, features):
    wrong = rf"{name} with 100 classes .*linear\.weight \(10, {features}\) instead of"
    with pytest.raises(WeightsError, match=wrong):
        build(name, classes=100)


def test_included_weights_are_small_and_have_their_place_on_the_page():
    page = (FILES / "README.md").read_text()
    files = sorted(FILES.glob("*.safetensors"))
    assert [file.stem for file in files] == re.findall("^## `(.+)`$", page, re.MULTILINE)
    assert all(file.stat().st_size < 2_000_000 for file in files)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_as_they_were_saved(tmp_path, suffix):
    source = build("resnet20")
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pt")
    else:
        safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = build(f"resnet20(weights=w{suffix})", model_dir=tmp_path)
    assert state_fingerprint(loaded) == state_fingerprint(source)
    x = torch.rand(2, *RGB)
    with torch.no_grad():
        assert torch.equal(loaded(x), source(x))


def test_weights_that_do_not_exist_name_every_place(tmp_path):
    with pytest.raises(WeightsError, match=rf"no weights at w\.pt or {tmp_path}/w\.pt"):
        build("resnet20(weights=w.pt)", model_dir=tmp_path)


def test_weights_of_another_architecture_are_told_apart(tmp_path):
    safetensors.torch.save_file(build("resnet32").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit ResNet20 .*unexpected \(layer1\.3"):
        build("resnet20(weights=w.safetensors)", model_dir=tmp_path)
    with pytest.raises(WeightsError, match=r"missing \(layer1\.5"):
        build("resnet44(weights=w.safetensors)", model_dir=tmp_path)
    with pytest.raises(WeightsError, match=r"linear\.bias \(10,\) instead of \(100,\)"):
        build("resnet32(weights=w.safetensors)", classes=100, model_dir=tmp_path)


class Touch:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_code_in_weights_is_never_run(tmp_path, writer):
    trap = tmp_path / "executed"
    writer({"conv1.weight": Touch(trap)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt .*convert it to safetensors"):
        build("resnet20(weights=w.pt)", model_dir=tmp_path)
    assert not trap.exists()


def test_code_in_weights_of_foreign_libraries_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "executed"
    torch.save(Touch(trap), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no weights for them"), _loading("them", "a file"):
        torch.load(tmp_path / "w.pt", weights_only=False)
    assert not trap.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_weights_are_named(tmp_path, name, keep):
    if name == "w.pt":
        torch.save(build("cnn").state_dict(), tmp_path / name)
    else:
        safetensors.torch.save_file(build("cnn").state_dict(), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(WeightsError, match=name):
        load_weights(build("cnn"), name, tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(2), {"epoch": 3}, {1: torch.zeros(2)}])
def test_a_file_without_a_state_dict_is_told(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"holds a .*; save model\.state_dict\(\)"):
        load_weights(build("cnn"), tmp_path / "w.pt", None)


def test_the_fingerprint_sees_one_changed_bit_and_no_device_or_order():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = state_fingerprint(network)
    assert before == state_fingerprint(network)
    with torch.no_grad():
        network[0].bias[1] = network[0].bias[1].nextafter(torch.tensor(9.0, dtype=torch.bfloat16))
    assert state_fingerprint(network) != before


USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    trained = False

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)

def ready(width=4):
    return Net(width).train()

def fitted(classes, shape, model_dir, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes, bias=bias))

class Built:
    trained = False
    def __call__(self, classes, shape, model_dir):
        return fitted(classes, shape, model_dir)

def factory():
    return Built()

def number():
    return 3

def wrong(classes, shape, model_dir):
    return 3
"""


@pytest.mark.parametrize(
    ("name", "trained"),
    [("Net", False), ("Net(width=2)", False), ("fitted", True), ("fitted(bias=false)", True), ("Built", False),
     ("factory", False)],
)  # fmt: skip
def test_a_users_file_may_give_a_network_in_any_form(tmp_path, name, trained):
    (tmp_path / "mine.py").write_text(USER_FILE)
    architecture = resolve(f"{tmp_path}/mine.py:{name}")
    first, second = (architecture(10, (3, 4, 4), None) for _ in range(2))
    assert architecture.trained == trained
    assert not first.training
    check_logits(first, 10, (3, 4, 4))
    assert first is not second  # a training defense must find it as new


@pytest.mark.parametrize(("name", "message"), [("number", "is a int"), ("Nett", "has no 'Nett'")])
def test_a_users_file_that_gives_no_network_is_told(tmp_path, name, message):
    (tmp_path / "mine.py").write_text(USER_FILE)
    with pytest.raises(ConfigError, match=message):
        resolve(f"{tmp_path}/mine.py:{name}")


def test_a_users_builder_that_builds_no_network_is_told(tmp_path):
    (tmp_path / "mine.py").write_text(USER_FILE)
    with pytest.raises(ConfigError, match="gave a int"):
        resolve(f"{tmp_path}/mine.py:wrong")(10, (3, 4, 4), None)


def test_registered_names_resolve_to_themselves():
    assert resolve("cnn(width=8)") == models.create("cnn(width=8)")


class Answers(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Answers(torch.zeros(2, 9)), r"Answers returns \(2, 9\) for 2 images; expected logits \(2, 10\)"),
        (Answers(torch.zeros(2)), r"returns \(2,\)"),
        (Answers((torch.zeros(2, 10),)), "returns a tuple"),
        (Answers(torch.full((2, 10), torch.nan)), "NaN"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 10)), r"fails on images \(3, 32, 32\)"),
        (nn.Conv2d(1, 3, 3), r"fails on images \(3, 32, 32\)"),
    ],
)
def test_an_answer_that_is_no_logits_is_told_before_the_run(module, message):
    with pytest.raises(ConfigError, match=message):
        check_logits(module, 10, RGB)


def test_torchvision_networks_come_untrained_and_are_checked_before_a_download():
    pytest.importorskip("torchvision")
    architecture = models.create("torchvision:squeezenet1_1(pretrained=false)")
    assert not architecture.trained
    check_logits(architecture(10, (3, 64, 64), None), 10, (3, 64, 64))
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        build("torchvision:resnet81")
    with pytest.raises(ConfigError, match="has 1000 classes, the data set 10"):
        build("torchvision:resnet18")
    with pytest.raises(ConfigError, match="takes 3 channels, the images have 1"):
        build("torchvision:resnet18", shape=(1, 32, 32))
    with pytest.raises(ConfigError, match="no entry is named 'IMAGENET'"):
        build("torchvision:resnet18(entry=IMAGENET)", classes=1000)


@pytest.mark.slow  # their imports take many seconds
def test_timm_and_robustbench_are_checked_before_a_download():
    need("robustbench")
    need("timm")
    for shape in ((1, 32, 32), (3, 64, 64)):
        check_logits(build("timm:resnet18(pretrained=false)", 5, shape), 5, shape)
    assert importlib.import_module("timm.models._hub").has_hf_hub(necessary=True), "published weights can be loaded"
    with pytest.raises(ConfigError, match="no model of timm is named 'resnet81'"):
        build("timm:resnet81")
    with pytest.raises(ConfigError, match="did you mean 'Carmon2019Unlabeled'"):
        build("robustbench:Carmon2019Unlabelled")
    with pytest.raises(ConfigError, match="has 10 classes, the data set 100"):
        build("robustbench:Standard", classes=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.complex64), "mistyped .* complex64 instead of float32"),
        (lambda value: value.to(torch.int64), "mistyped .* int64 instead of float32"),
        (lambda value: value.to_sparse(), r"no plain numbers under .*sparse"),
        (lambda value: value.to("meta"), r"no plain numbers under .*meta"),
        (lambda value: torch.full_like(value, float("nan")), "NaN"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, change, message):
    state = build("cnn").state_dict()
    name = next(iter(state))
    torch.save({**state, name: change(state[name])}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=rf"w\.pt .*{message}"):
        load_weights(build("cnn"), "w.pt", tmp_path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"hello, these are weights\n", b"{}", bytes(64), b"\x80\x02."])
def test_text_as_weights_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name) as caught:
        load_weights(build("cnn"), name, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no weights at"):
        load_weights(build("cnn"), "x" * 5000, tmp_path)
