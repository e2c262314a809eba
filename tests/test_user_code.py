"""Users' own files: what they import, what tells two versions apart, and what a cell keeps of them."""

import shutil
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.errors import ConfigError
from bench.plan.cell import Cell
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.system.user_code import load, local_hash, named_file

NET = """
import torch
from torch import nn
from pathlib import Path
import numpy as np

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.from_numpy(np.load(Path(__file__).parent / "table.npy"))  # in no state dict

    def forward(self, x):
        return x.flatten(1) @ self.table

def drawn():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def cell(model: str = "net.py:Net", **grid) -> Cell:
    settings = {"dataset": "digits", "model": model, "attack": "noise", "n": 10, **grid}
    return expand(load_suite(None, settings), Loader(None, None))[0].cell


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_name_says_its_file():
    assert named_file("a b/c(1):2/mine.py:Net") == (Path("a b/c(1):2/mine.py"), "Net")
    assert named_file("mine.py") == (Path("mine.py"), "")
    assert named_file("torchattacks:PGD") is None


def test_two_folders_never_mix_their_modules(tmp_path):
    for name in ("a", "b"):
        written(
            tmp_path / name,
            mine="import helper, pack.deep as deep\nfrom pack import first\n"
                 "def later():\n import late\n return late.NAME",
            helper=f"NAME = '{name}'", late=f"NAME = '{name} late'",
            **{"pack/deep": "from .first import NAME", "pack/second": "",
               "pack/first": f"from . import second\nNAME = second.NAME = '{name} pack'"},
        )  # fmt: skip
    for name in ("a", "b"):
        module = load(tmp_path / name / "mine.py")
        assert name == module.helper.NAME
        assert module.deep.NAME == module.first.NAME == f"{name} pack"
        assert module.later() == f"{name} late"
        assert load(tmp_path / name / "mine.py") is module
    assert not {"helper", "late", "pack", "mine"} & set(sys.modules)
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_benchmark_is_imported_from_where_it_is():
    file = Path(__file__).parent / "problems.py"
    assert load(file).SampleRng is sys.modules["bench.rng"].SampleRng
    assert local_hash(file) == sha256(file.read_bytes()).hexdigest()[:12]


def test_every_file_that_an_import_can_reach_decides_the_hash(tmp_path):
    files = {
        "mine": "import a\ndef f():\n    from pack.b import g\n", "a": "", "pack/b": "from .. import nothing",
        "pack/__init__": "from .c import *\nimport torch", "pack/c": "", "other": "",
    }  # fmt: skip
    mine = written(tmp_path, **files) / "mine.py"
    found = {}
    for name in files:
        before = local_hash(mine)
        written(tmp_path, **{name: f"{files[name]}\nEDITED = 1"})
        found[name] = local_hash(mine) != before
    assert found == {name: name != "other" for name in files}
    again = shutil.copytree(tmp_path, tmp_path.parent / "elsewhere") / "mine.py"
    assert local_hash(again) == local_hash(mine)


def test_a_file_that_does_not_import_says_why_and_leaves_nothing(tmp_path):
    written(tmp_path, mine="import helper", helper="import not_there")
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"mine.py does not import: ModuleNotFoundError: No module named 'not_there'"):
        load(tmp_path / "mine.py")
    assert set(sys.modules) == before
    written(tmp_path, helper="NAME = 1")
    assert load(tmp_path / "mine.py").helper.NAME == 1


def test_equal_files_beside_other_weights_are_other_cells(tmp_path):
    keys = []
    for folder, content in (("a", 0.0), ("b", 1.0), ("copy", 0.0)):
        written(tmp_path / folder, net=NET)
        np.save(tmp_path / folder / "table.npy", np.full((64, 10), content, np.float32))
        keys.append(cell(f"{tmp_path / folder / 'net.py'}:Net"))
    assert keys[0].model.spec == "net.py:Net"
    assert keys[0].key != keys[1].key
    assert keys[0].key == keys[2].key  # the same by another path
    assert [part.model.label for part in keys[:2]] == [f"net.py:Net #{local_hash(tmp_path / 'a' / 'net.py')[:6]}"] * 2


@pytest.mark.parametrize(
    "code",
    ["class Net(nn.Module):\n    table = {load}\n    def forward(self, x): return x.flatten(1) @ self.table",
     "TABLE = {load}\nclass Net(nn.Module):\n    def forward(self, x): return x.flatten(1) @ TABLE"],
    ids=["class", "module"],
)  # fmt: skip
def test_a_table_that_is_loaded_where_it_is_defined_decides_the_cell(tmp_path, code):
    head = "from pathlib import Path\nimport numpy as np, torch\nfrom torch import nn\n"
    load = "torch.from_numpy(np.load(Path(__file__).parent / 'table.npy'))"
    keys = []
    for folder, content in (("a", 0.0), ("b", 1.0), ("copy", 0.0)):
        written(tmp_path / folder, net=head + code.format(load=load))
        np.save(tmp_path / folder / "table.npy", np.full((64, 10), content, np.float32))
        keys.append(cell(f"{tmp_path / folder / 'net.py'}:Net").key)
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_a_network_that_draws_without_a_seed_is_one_network(tmp_path):
    file = written(tmp_path, net=NET) / "net.py"
    torch.manual_seed(1)
    first = cell(f"{file}:drawn")
    torch.manual_seed(2)
    assert cell(f"{file}:drawn").key == first.key


def test_an_edited_import_is_another_version(tmp_path):
    defense = "from helper import SHIFT\nclass D:\n    stage, random, version, paper = 'output', False, 3, ''\n"
    file = written(tmp_path, mine=defense + "    def __call__(self, model, calibration, seed): ...", helper="SHIFT = 1")
    before = cell("cnn(width=4)", defense=f"{file / 'mine.py'}:D")
    written(tmp_path, helper="SHIFT = 2")
    after = cell("cnn(width=4)", defense=f"{file / 'mine.py'}:D")
    assert before.key != after.key
    assert before.defense[0].version.startswith("3+")
    assert before.defense_name == after.defense_name == "mine.py:D"
    assert before.defense_label != after.defense_label


def test_a_users_file_in_an_argument_counts_by_its_code(tmp_path):
    keys = []
    for folder, width in (("a", 2), ("b", 3), ("copy", 2)):
        text = f"from torch import nn\nclass Net(nn.Sequential):\n    trained = False\n    width = {width}\n"
        file = written(tmp_path / folder, net=text) / "net.py"
        keys.append(cell("cnn(width=4)", defense=f"tap(network='{file}:Net')", attack="standard"))
    assert keys[0].defense[0].spec == "tap(network='net.py:Net')"
    assert keys[0].key != keys[1].key
    assert keys[0].key == keys[2].key
    assert "tmp" not in str(keys[0].as_json())


def test_a_file_that_a_users_code_is_given_counts_by_its_content(tmp_path):
    text = "class D:\n    stage, random, version, paper = 'output', False, 1, ''\n    def __init__(self, path): ...\n"
    file = written(tmp_path, mine=f"{text}    def __call__(self, model, calibration, seed): ...") / "mine.py"
    keys = []
    for content in ("1", "2"):
        (tmp_path / "table.txt").write_text(content)
        keys.append(cell("cnn(width=4)", defense=f"{file}:D(path='{tmp_path}/table.txt')"))
    assert keys[0].defense_name == "mine.py:D(path=table.txt)"
    assert keys[0].key != keys[1].key


def test_the_same_arrays_by_another_path_are_the_same_data(tmp_path):
    keys = []
    for folder, shift in (("a", 0), ("b", 1), ("copy", 0)):
        (tmp_path / folder).mkdir()
        y = (np.arange(20) + shift) % 10
        x = np.repeat(y.astype(np.uint8), 64).reshape(20, 1, 8, 8)
        np.savez(tmp_path / folder / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        keys.append(cell("cnn(width=4)", dataset=f"npz(path='{tmp_path / folder}/x.npz')"))
    assert keys[0].dataset.spec == "npz(path=x.npz)"
    assert keys[0].key == keys[2].key != keys[1].key
