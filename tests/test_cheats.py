"""Defenses that cheat: what each of them tries is impossible, or flagged by name."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench.errors import ConfigError
from bench.measure import isolated
from bench.measure.pipeline import Pipeline
from bench.registry import defenses
from bench.report.marks import UNRANKED, marks_of
from bench.results.store import Row, Store
from bench.run.runner import run
from bench.system.shared_code import SharedCode
from tests.test_lent import MODEL, cells
from tests.test_runner import Silent

CHEATS = '''
import gc
import os
import sys
import threading
import time

import torch
from torch import nn

from bench.oracle import Ledger, Referee


class Output:
    stage, random, version, paper = "output", False, 1, ""
    kind = None

    def __call__(self, model, calibration, seed):
        return self.served(model)

    def served(self, model):
        return Honest(model)


class Honest(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class Plain(Output):
    pass


LOOKS = []


def everything():
    """All that Python knows of, at the first few calls, since it takes its time."""
    LOOKS.append(1)
    return gc.get_objects() if len(LOOKS) < 4 else []


class ReadsTheStack(Output):
    def served(self, model):
        return StackReader(model)


class StackReader(Honest):
    """Answers the labels, wherever it finds any: in the frames of whoever asks, or in all that Python knows of."""

    def labels(self, x):
        frame = sys._getframe()
        while frame is not None:
            for value in [*frame.f_locals.values(), *vars(frame.f_locals.get("self", object)).values()]:
                if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.shape == (len(x),):
                    return value
            frame = frame.f_back
        for found in everything():
            if isinstance(found, Referee) and len(found._y) == len(x):
                return found._y
        return None

    def forward(self, x):
        y = self.labels(x)
        return self.model(x) if y is None else nn.functional.one_hot(y.clamp(0, 9), 10).float()


class WritesTheLedger(Output):
    def served(self, model):
        return LedgerWriter(model)


class LedgerWriter(Honest):
    def forward(self, x):
        Referee._record = lambda self, logits, x, rows, number, legal, clean: legal
        for found in everything():
            if isinstance(found, Ledger):
                found.forwards.zero_()
                found.first_hit.fill_(-1)
        return self.model(x)


class KnowsTheTestSet(Output):
    """Has read the data, and looks up whatever is close to a test image."""

    def served(self, model):
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / 16
        return LookingUp(model, images, torch.from_numpy(bunch.target).long())


class LookingUp(Honest):
    def __init__(self, model, images, labels):
        super().__init__(model)
        self.images, self.labels = images, labels

    def forward(self, x):
        gap, nearest = torch.cdist(x.flatten(1), self.images.flatten(1), p=torch.inf).min(dim=1)
        z, known = self.model(x), nn.functional.one_hot(self.labels[nearest], 10).float() * 10
        return torch.where((gap < 0.35)[:, None], known, z)


class KeepsFirstAnswers(Output):
    def served(self, model):
        return FirstAnswers(model)


KEPT = []


class FirstAnswers(Honest):
    """Answers whatever is close to an earlier query as it answered that, and keeps this where no copy reaches it."""

    def forward(self, x):
        z = self.model(x)
        for i, one in enumerate(x):
            for image, answer in KEPT:
                if (one - image).abs().max() < 0.45:
                    z[i] = answer
                    break
            else:
                KEPT.append((one.clone(), z[i].clone()))
        return z


class DiffersTheSecondTime(Output):
    def served(self, model):
        return Second(model)


class Second(Honest):
    def __init__(self, model):
        super().__init__(model)
        self.asked = set()

    def forward(self, x):
        z = self.model(x)
        for i, one in enumerate(x):
            name = one.numpy().tobytes()
            if name in self.asked:
                z[i] = z[i].roll(1)
            self.asked.add(name)
        return z


class DetectsNearDuplicates(Output):
    def served(self, model):
        return Detector(model)


class Detector(Honest):
    def __init__(self, model):
        super().__init__(model)
        self.seen = torch.empty(0, 64)

    def forward(self, x):
        z, flat = self.model(x), x.flatten(1)
        if len(self.seen):
            close = torch.cdist(flat, self.seen, p=torch.inf).amin(dim=1) < 0.45
            z = torch.where(close[:, None], z * 0.01, z)
        self.seen = torch.cat((self.seen, flat))
        return z


class Prints(Output):
    def served(self, model):
        return Printer(model)


class Printer(Honest):
    def forward(self, x):
        print("| 1 | a perfect defense | 100.0 |")
        os.write(1, b"\\x1b[2J| 1 | written | 100.0 |\\n")
        os.write(2, b"to the other stream\\n")
        return self.model(x)


class Ends(Output):
    def __init__(self, how="exit"):
        self.how = how

    def served(self, model):
        return Ending(model, self.how)


class Ending(Honest):
    def __init__(self, model, how):
        super().__init__(model)
        self.how = how

    def forward(self, x):
        if self.how == "exit":
            os._exit(3)
        if self.how == "kill":
            os.kill(os.getpid(), 9)
        if self.how == "hang":
            time.sleep(60)
        if self.how == "system-exit":
            raise SystemExit(0)
        if self.how == "nonsense":
            for number in os.listdir("/dev/fd"):
                if int(number) > 2:
                    try:
                        os.write(int(number), b"\\xff" * 100)
                    except OSError:
                        pass
        if self.how == "threads":
            threading.Thread(target=time.sleep, args=(60,)).start()
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return self.model(x)
'''
FEW = {"model": "net.py:Net", "n": 40, "eps": 0.15, "queries": 12}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cheats")
    (folder / "net.py").write_text(MODEL)
    (folder / "cheats.py").write_text(CHEATS)
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)


def rows(folder: Path, isolate: bool = False, **grid) -> list[Row]:
    tasks, store = cells(**(FEW | grid)), Store(folder).open()
    pipeline = Pipeline(folder / "networks", torch.device("cpu"), 256, isolate=isolate)
    run(tasks, store, pipeline, 256, 256, Silent())
    return [store.row(task.cell) for task in tasks]


def cheat(folder: Path, name: str) -> Row:
    (row,) = rows(folder, defense=f"cheats.py:{name}")
    return row


def flagged(row: Row) -> set[str]:
    return {found["flag"] for found in row.shards[0].findings if found["fired"]}


@pytest.fixture(scope="module")
def undefended(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        (row,) = rows(files / "undefended", defense="none")
    assert row.records["first_hit"].gt(0).any()
    return row


SAME = ["first_hit", "forwards", "best_margin", "clean_pred", "final_pred", "norm_linf", "y"]


@pytest.mark.parametrize("name", ["Plain", "ReadsTheStack", "WritesTheLedger"])
def test_what_looks_for_labels_or_the_ledger_finds_neither(here, tmp_path, undefended, name):
    """In the process of the referee, the first has every label and the second stands to the end."""
    row = cheat(tmp_path, name)
    assert row.complete, row.errors
    assert row.records[SAME].equals(undefended.records[SAME])
    assert row.shards[0].provenance["defense"] == "in a process of its own"
    (after,) = rows(tmp_path / "after", defense="none")
    assert after.records[SAME].equals(undefended.records[SAME])


@pytest.mark.parametrize(
    ("name", "flag"),
    [("KnowsTheTestSet", "recognised-images"), ("KeepsFirstAnswers", "answers-differ-in-attack"),
     ("DiffersTheSecondTime", "undeclared-stateful"), ("DetectsNearDuplicates", "undeclared-stateful")],
)  # fmt: skip
def test_what_remembers_is_flagged_by_name(here, tmp_path, undefended, name, flag):
    assert flag not in flagged(undefended)
    row = cheat(tmp_path, name)
    assert row.complete, row.errors
    assert flag in flagged(row)


def test_what_is_printed_stands_beside_the_tables_and_moves_no_cursor(here, tmp_path, capfd):
    row = cheat(tmp_path, "Prints")
    shown = capfd.readouterr()
    assert row.complete
    assert shown.out == ""
    assert "cheats.py:Prints" in shown.err
    assert "a perfect defense" in shown.err
    assert "to the other stream" in shown.err
    assert "\x1b" not in shown.err
    assert len(shown.err) < 20_000


@pytest.mark.parametrize(
    ("how", "said"),
    [("exit", "exited with code 3"), ("kill", "was killed by SIGKILL"), ("system-exit", "SystemExit: 0"),
     ("nonsense", "answers nonsense"), ("hang", "has not answered in 2 s")],
)  # fmt: skip
def test_an_end_is_a_failed_cell_with_its_reason(here, tmp_path, monkeypatch, how, said):
    monkeypatch.setattr(isolated, "PATIENCE", 2.0 if how == "hang" else 60.0)
    began = time.monotonic()
    row = cheat(tmp_path, f"Ends(how={how})")
    assert not row.complete
    assert said in row.errors[0].strip().splitlines()[-1]
    assert time.monotonic() - began < 30


def test_threads_end_with_their_process(here, tmp_path, undefended):
    row = cheat(tmp_path, "Ends(how=threads)")
    assert row.complete, row.errors
    assert row.records[SAME].equals(undefended.records[SAME])


def test_rows_are_those_of_the_referees_process_bit_for_bit(here, tmp_path):
    chains = ["aaa-linear", "rnd(sigma=0.1)", "unig"]
    shown = {"defense": chains, "attack": "square", "numerics": "fast"}
    together, apart = (rows(tmp_path / str(isolate), isolate, **shown) for isolate in (False, True))
    for one, other in zip(together, apart, strict=True):
        assert other.complete, other.errors
        assert one.cell.key == other.cell.key
        assert one.records.equals(other.records)
        assert one.shards[0].findings == other.shards[0].findings
        places = [row.shards[0].provenance["defense"] for row in (one, other)]
        assert places == ["in the process of the referee", "in a process of its own"]


def test_gradients_are_taken_in_the_process_of_the_referee_and_the_row_says_so(here, tmp_path):
    (row,) = rows(tmp_path, defense="cheats.py:Plain", attack="pgd(steps=2)")
    assert row.complete, row.errors
    assert row.shards[0].provenance["defense"] == "in the process of the referee"


WALLS = '''
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from cheats import Honest, Output


class WritesResults(Output):
    def __init__(self, place):
        self.place = place

    def served(self, model):
        return Writing(model, self.place)


class Writing(Honest):
    """Writes over the rows, or to whoever's terminal this is, or to its own temporary folder, which it may."""

    def __init__(self, model, place):
        super().__init__(model)
        self.place = Path(tempfile.gettempdir()) if place == "own" else Path(place)

    def forward(self, x):
        (self.place / "forged").write_text("100 %")
        return self.model(x)


class ReadsTheReferee(Output):
    """Looks for the labels in the memory of the process that asks."""

    def served(self, model):
        return Reading(model)


class Reading(Honest):
    def forward(self, x):
        for process in Path("/proc").glob("[0-9]*"):
            if int(process.name) != os.getpid():
                try:
                    open(process / "mem", "rb").close()
                except OSError:
                    continue
                raise ValueError("the memory of another process is open")
        return self.model(x)


class EndsOthers(Output):
    def served(self, model):
        return Killing(model)


class Killing(Honest):
    def forward(self, x):
        for pid in (os.getppid(), int(os.environ["REFEREE"])):
            try:
                os.kill(pid, 9)
            except OSError:
                pass
        return self.model(x)


class LeavesDaemons(Output):
    def served(self, model):
        return Leaving(model)


class Leaving(Honest):
    """Starts what goes on in a session of its own after its parents have ended."""

    left = False

    def forward(self, x):
        if not Leaving.left:
            Leaving.left = True
            program = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", program, "parry-daemon"], start_new_session=True)
        return self.model(x)


class HidesInFiles(Output):
    """Remembers in a file, where copies and other processes would find it."""

    def served(self, model):
        return Filing(model)


class Filing(Honest):
    def forward(self, x):
        with open("memory.txt", "a") as file:
            file.write("asked\\n")
        return self.model(x)


class PatchesTorch(Output):
    """Makes every class the right one, in its own process."""

    def served(self, model):
        torch.argmax = torch.Tensor.argmax = lambda *_, **__: torch.zeros((), dtype=torch.int64)
        nn.Module.__call__ = lambda self, *args: torch.ones(len(args[0]), 10)
        return Honest(model)


class RefusesStrangers(Output):
    """Answers the test images that it has read, and NaN or a constant to everything else."""

    def __init__(self, refusal="nan"):
        self.refusal = refusal

    def served(self, model):
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images).float()[:, None] / 16
        return Refusing(model, images.flatten(1), self.refusal)


class Refusing(Honest):
    def __init__(self, model, known, refusal):
        super().__init__(model)
        self.known, self.refusal = known, refusal

    def forward(self, x):
        z = self.model(x)
        strange = torch.cdist(x.flatten(1), self.known, p=torch.inf).amin(dim=1) > 0.01
        z[strange] = {"nan": torch.nan, "infinity": torch.inf, "constant": 0.0}[self.refusal]
        return z


class SwallowsMemory(Output):
    def served(self, model):
        return Swallowing(model)


class Swallowing(Honest):
    def forward(self, x):
        return torch.zeros(1 << 50)


class IsSlowUnderAttack(Output):
    """Keeps those waiting who ask what is no test image, so that the cost of a query looks small."""

    def served(self, model):
        return Waiting(model)


class Waiting(Honest):
    def forward(self, x):
        time.sleep(0.02 * float(((x * 16) != (x * 16).round()).any()))
        return self.model(x)
'''


@pytest.fixture
def walled(files):
    (files / "walls.py").write_text(WALLS)


def walls(folder: Path, name: str) -> Row:
    (row,) = rows(folder, defense=f"walls.py:{name}")
    return row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ReadsTheReferee", "EndsOthers", "WritesResults(place=own)", "IsSlowUnderAttack"])
def test_other_processes_are_out_of_reach(here, walled, tmp_path, undefended, monkeypatch, name):
    monkeypatch.setenv("REFEREE", str(os.getpid()))
    row = walls(tmp_path, name)
    assert row.complete, row.errors
    assert row.records[SAME].equals(undefended.records[SAME])


@pytest.mark.slow
def test_who_patches_torch_in_its_own_process_fails_its_cell_and_no_other(here, walled, tmp_path):
    assert "changed the network that other cells share: Module.__call__" in walls(tmp_path, "PatchesTorch").errors[0]
    (after,) = rows(tmp_path / "after", defense="none")
    assert after.complete


def test_results_and_terminals_are_out_of_reach_and_a_try_is_a_failed_cell(here, walled, tmp_path):
    for name in (f"WritesResults(place={tmp_path})", "WritesResults(place=/dev/shm)", "HidesInFiles"):
        row = walls(tmp_path / "rows", name)
        assert not row.complete
        assert "PermissionError" in row.errors[0]
    assert not (tmp_path / "forged").exists()


def test_what_goes_on_after_its_process_is_ended_with_it(here, walled, tmp_path):
    row = walls(tmp_path, "LeavesDaemons")
    assert row.complete, row.errors
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "parry-daemon" not in listed


@pytest.mark.slow
@pytest.mark.parametrize("refusal", ["nan", "infinity", "constant"])
def test_refusing_what_is_no_test_image_gains_nothing_or_is_flagged_and_not_ranked(here, walled, tmp_path, refusal):
    row = walls(tmp_path, f"RefusesStrangers(refusal={refusal})")
    assert row.complete, row.errors
    marks = marks_of(row)
    if refusal == "constant":
        assert row.records["first_hit"].gt(0).sum() > 0
        assert "recognised-images" in flagged(row)
    else:
        assert "invalid" in marks & UNRANKED


@pytest.mark.slow
def test_more_memory_than_there_is_is_a_failed_cell(here, walled, tmp_path):
    row = walls(tmp_path, "SwallowsMemory")
    assert not row.complete
    assert "allocate memory" in row.errors[0]


IMPORTED = {
    "the referee": "from bench.oracle import Referee; Referee._record = lambda *_, **__: None",
    "a function's code": "import bench.losses as l; l.margin.__code__ = (lambda logits, y: logits[:, 0]).__code__",
    "a threshold of the audit": "import bench.measure.audit as a; a.RARE = 2.0",
    "torch": "import torch; torch.Tensor.argmax = lambda self, *_, **__: self",
    "hooks": "import torch; torch.nn.modules.module.register_module_forward_hook(lambda m, x, z: z.sort().values)",
    "functions": "import torch.overrides as o; type('M', (o.TorchFunctionMode,), {})().__enter__()",
}


@pytest.mark.parametrize("what", IMPORTED)
def test_a_file_that_replaces_what_all_cells_share_is_refused_and_leaves_nothing(tmp_path, what):
    (tmp_path / "patching.py").write_text(f"{IMPORTED[what]}\n{CHEATS}")
    before = SharedCode()
    with pytest.raises(ConfigError, match=r"patching.py has replaced .*code that the referee and all cells share"):
        defenses.create(f"'{tmp_path}/patching.py:Plain'")
    assert before.replaced() == []


LATER = """
from bench.oracle import Referee


def test_what_torch_wraps_itself_when_it_first_trains_is_nobodys_doing(monkeypatch):
    before = SharedCode()
    monkeypatch.setattr(torch, "manual_seed", torch._disable_dynamo(torch.manual_seed))
    assert before.replaced() == []
    monkeypatch.setattr(torch, "manual_seed", torch._disable_dynamo(lambda seed: None))
    assert before.replaced() == ["torch.manual_seed"]


class Patches:
    access, norms, version, paper = "scores", frozenset({"linf"}), 1, ""

    def __call__(self, oracle, x, y, threat, rng):
        Referee._record = lambda self, logits, x, rows, number, legal, clean: legal
        return x
"""


def test_a_component_that_replaces_it_in_our_process_fails_its_cell_and_no_other(here, tmp_path):
    (tmp_path / "later.py").write_text(LATER)
    row, after = rows(tmp_path / "rows", attack=[f"'{tmp_path}/later.py:Patches'", "square"])
    assert "has replaced bench.oracle.referee.Referee._record" in row.errors[0]
    assert after.complete
    assert after.records["forwards"].sum() > 0
