"""Without the libraries that are extras the core works, and whatever needs one says how to get it."""

import sys

import pytest
import torch

import bench.data
import bench.models  # noqa: F401 registers them
from bench.errors import BenchError, WeightsError
from bench.models.zoo import _loading, _no_empty_folders
from bench.registry import attacks, datasets, models
from bench.report.plots import draw
from bench.report.portrait import Portrait
from bench.run.choice import choose
from bench.site.pages import write_site

RGB = (3, 32, 32)
EXTRAS = (
    "timm", "torchvision", "torchattacks", "robustbench", "pyautoattack", "plotly", "itables", "matplotlib", "openvino",
    "ray",
)  # fmt: skip


@pytest.fixture
def bare(monkeypatch):
    """None of the libraries can be imported."""
    for name in [*EXTRAS, *(module for module in sys.modules if module.partition(".")[0] in EXTRAS)]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [("timm:resnet18", "timm", "zoo"), ("torchvision:resnet18", "torchvision", "zoo"),
     ("robustbench:Standard", "pyautoattack", "foreign")],
)  # fmt: skip
@pytest.mark.usefixtures("bare")
def test_a_network_of_a_library_that_is_missing_says_what_to_install(spec, package, extra):
    with pytest.raises(BenchError, match=rf"{package} is not installed; pip install 'parry-bench\[{extra}\]'"):
        models.create(spec)(10, RGB, None)


@pytest.mark.usefixtures("bare")
def test_attacks_and_data_of_a_library_that_is_missing_say_what_to_install(tmp_path):
    with pytest.raises(BenchError, match=r"torchattacks is not installed; pip install 'parry-bench\[foreign\]'"):
        _ = attacks.create("torchattacks:PGD").norms
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(BenchError, match=r"torchvision is not installed; pip install 'parry-bench\[zoo\]'"):
        datasets.create("cifar10")(tmp_path)


@pytest.mark.usefixtures("bare")
def test_a_cluster_without_its_library_says_what_to_install():
    with pytest.raises(BenchError, match=r"ray is not installed; pip install 'parry-bench\[ray\]'"):
        choose("ray", [torch.device("cpu")], 2, None)


@pytest.mark.usefixtures("bare")
def test_the_core_needs_none_of_them():
    data = datasets.create("digits")(None)
    network = models.create("cnn")(10, data.test.shape, None)
    assert network(data.test.pixels(slice(0, 2))).shape == (2, 10)


def test_a_library_that_is_broken_says_what_is_wrong(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("from torch import no_such_name\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BenchError, match=r"timm does not import \(ImportError: .*no_such_name.*; pip install"):
        models.create("timm:resnet18")(10, RGB, None)


def test_a_download_that_fails_leaves_no_folders(tmp_path):
    folder = tmp_path / "models" / "cifar10" / "Linf"

    def fail():
        with _loading("a model", "a download"), _no_empty_folders(folder):
            folder.mkdir(parents=True)
            raise ConnectionError("no network")

    with pytest.raises(WeightsError, match="no network"):
        fail()
    assert list(tmp_path.iterdir()) == []

    with _no_empty_folders(folder):
        folder.mkdir(parents=True)
        torch.save({}, folder / "weights.pt")
    assert [path.name for path in folder.iterdir()] == ["weights.pt"]

    (tmp_path / "mine").mkdir()
    with _no_empty_folders(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir(), "what was there before stays"


@pytest.mark.usefixtures("bare")
def test_pages_and_pictures_say_what_to_install(tmp_path):
    with pytest.raises(BenchError, match=r"plotly is not installed; pip install 'parry-bench\[site\]'"):
        write_site([], tmp_path)
    with pytest.raises(BenchError, match=r"matplotlib is not installed; pip install 'parry-bench\[site\]'"):
        draw(Portrait([], [], []), "none", "accuracy", tmp_path / "x", ["svg"])
