"""A user's function as the victim: what it declares, what is asked of it, and what is left blank."""

import numpy as np
import pytest
import torch

from bench.check import check
from bench.check.problem import digits
from bench.errors import ConfigError, ServiceError
from bench.measure.pipeline import Pipeline
from bench.models import resolve
from bench.plan.suite import Grid, Suite
from bench.plan.tasks import Loader, expand
from bench.report.standings import tables
from bench.results.store import Store
from bench.run import runner
from bench.service import Called, Desk, Service
from bench.service.answers import checked, logits
from tests.runs import Quiet

LOADER = Loader(None, None)
VICTIM = """
import numpy as np
from sklearn.datasets import load_digits
from bench.service import Service, service

BUNCH = load_digits()
MEANS = np.stack([(BUNCH.images[BUNCH.target == label] / 16).mean(0).ravel() for label in range(10)])
CALLS = []

def logits(images):
    assert images.dtype == np.uint8
    CALLS.append(len(images))
    return 2 * (images.reshape(len(images), -1) / 255) @ MEANS.T - (MEANS**2).sum(1)

def softmax(scores):
    powers = np.exp(scores)
    return powers / powers.sum(axis=1, keepdims=True)

@service(answers="probabilities", batch=7)
def score(images):
    return softmax(logits(images))

@service(answers="probabilities", deterministic=True)
def kept(images):
    return softmax(logits(images))

@service(answers="labels")
def label(images):
    return logits(images).argmax(axis=1)

@service(answers="probabilities", top=3)
def top(images):
    scores = softmax(logits(images))
    best = np.argsort(-scores, axis=1)[:, :3]
    return best, np.take_along_axis(scores, best, axis=1)

@service(answers="logits", random=True)
def declared_random(images):
    return logits(images) + 0.01 * np.random.default_rng().normal(size=(len(images), 10))

@service(answers="logits")
def undeclared_random(images):
    return logits(images) + 0.01 * np.random.default_rng().normal(size=(len(images), 10))

@service(answers="logits", deterministic=True)
def falsely_deterministic(images):
    return logits(images) + 0.01 * np.random.default_rng().normal(size=(len(images), 10))

@service(answers="logits")
def coupled(images):
    return logits(images) - logits(images).mean(axis=0)

@service(answers="logits", batch_dependent=True)
def declared_coupled(images):
    return coupled(images)

@service(answers="logits", decimals=1)
def rounded(images):
    return logits(images).round(1)

@service(answers="logits")
def nan(images):
    return logits(images) * np.nan

class Scaled:
    service = Service(answers="logits")

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, images):
        return self.scale * logits(images)

def undeclared(images):
    return logits(images)
"""


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    file = tmp_path_factory.mktemp("service") / "victim.py"
    file.write_text(VICTIM)
    return file


def plan(model, *attacks, defense="none", n=8, queries=12, **more):
    grid = Grid(dataset="digits", n=n, model=[str(model)], defense=[defense], attack=list(attacks), eps=0.2,
                queries=queries, **{"quantise": True, **more})  # fmt: skip
    return expand(Suite(name="services", grid=[grid]), LOADER)


def measured(tasks, folder):
    store = Store(folder).open()
    pipeline = Pipeline(folder / "networks", torch.device("cpu"), 256)
    runner.run(tasks, store, pipeline, 100, 256, Quiet())
    return [store.row(task.cell) for task in tasks]


@pytest.fixture(scope="module")
def served(victim, tmp_path_factory):
    (row,) = measured(plan(f"{victim}:score", "square", n=20), tmp_path_factory.mktemp("served"))
    return row


def calls_of(task):
    return task.architecture.line()._function.__globals__["CALLS"]


def fired(row):
    return {finding["flag"] for shard in row.shards for finding in shard.findings if finding["fired"]}


class TestAFunctionAsTheVictim:
    def test_every_question_is_counted(self, victim, tmp_path):
        tasks = plan(f"{victim}:score", "square", "nes(q=4)", "rays")
        calls = calls_of(tasks[0])
        calls.clear()
        rows = measured(tasks, tmp_path)
        for row in rows:
            assert row.complete, row.errors
            assert row.figures["asked"] == 8 + row.records["forwards"].sum() + 8
        assert max(calls) == 7
        assert sum(calls) == sum(row.figures["asked"] for row in rows) + rows[0].figures["probes"]

    def test_what_is_kept_is_asked_once(self, victim, tmp_path):
        tasks = plan(f"{victim}:kept", "square", "square")
        calls = calls_of(tasks[0])
        calls.clear()
        (row,) = measured(tasks, tmp_path)
        assert row.complete, row.errors
        assert row.figures["asked"] <= 8 + row.records["forwards"].sum()
        assert sum(calls) == row.figures["asked"] + row.figures["probes"]
        assert fired(row) == set()

    def test_it_falls_as_the_network_does_that_it_serves(self, served, tmp_path):
        means = tmp_path / "means.py"
        means.write_text(
            "import torch\nfrom sklearn.datasets import load_digits\n"
            "class Means(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        bunch = load_digits()\n"
            "        images, labels = torch.tensor(bunch.images / 16).flatten(1), torch.tensor(bunch.target)\n"
            "        self.means = torch.nn.Parameter(torch.stack([images[labels == k].mean(0) for k in range(10)]))\n"
            "    def forward(self, x):\n"
            "        x = x.double().flatten(1)\n"
            "        return (2 * x @ self.means.T - self.means.square().sum(1)).float()\n"
        )
        (network,) = measured(plan(f"{means}:Means", "square", n=20), tmp_path / "network")
        for name in ("first_hit", "clean_pred", "final_pred", "forwards"):
            assert served.records[name].tolist() == network.records[name].tolist()
        assert np.allclose(served.records["clean_confidence"], network.records["clean_confidence"], atol=1e-5)

    def test_what_needs_weights_or_scores_is_blank(self, victim, tmp_path):
        (row,) = measured(plan(f"{victim}:label", "rays"), tmp_path)
        assert row.complete, row.errors
        assert {"twin_pred", "logit_change", "clean_margin", "best_margin", "final_nll"}.isdisjoint(row.records)
        assert "cost" not in row.figures
        (table,) = tables([row])
        assert all("service" in line.marks for line in table.lines)
        assert all({"ece", "brier", "cost", "changed_predictions"}.isdisjoint(line.figures) for line in table.lines)

    def test_seeds_are_tries_on_one_service(self, victim, tmp_path):
        rows = measured(plan(f"{victim}:label", "noise", seed=[0, 1]), tmp_path)
        (table,) = tables(rows)
        assert "networks" not in " ".join(line.attack for line in table.lines)

    def test_the_best_classes_are_enough_for_a_margin(self, victim, served, tmp_path):
        (best,) = measured(plan(f"{victim}:top", "square", n=20), tmp_path)
        assert best.records["first_hit"].tolist() == served.records["first_hit"].tolist()

    def test_an_output_defense_stands_around_it(self, victim, tmp_path):
        (row,) = measured(plan(f"{victim}:score", "square", defense="aaa-linear"), tmp_path)
        assert row.complete, row.errors
        assert (row.records["twin_pred"] == row.records["clean_pred"]).all()
        assert row.records["logit_change"].mean() > 0

    def test_a_class_may_take_arguments(self, victim):
        (one,), (other,) = (plan(f"{victim}:Scaled{args}", "square") for args in ("", "(scale=2.0)"))
        assert one.cell.key != other.cell.key
        assert one.service is not None


class TestACell:
    """Is pinned by all that is declared, whatever the code has computed that from."""

    def test_what_stands_behind_one_code_is_told_by_its_release(self, tmp_path):
        keys = set()
        for place in ("one", "other"):
            file = tmp_path / place / "victim.py"
            file.parent.mkdir()
            file.write_text(
                "from pathlib import Path\nfrom bench.service import service\n"
                "RELEASE = Path(__file__).with_name('weights').read_text()\n"
                "@service(answers='labels', release=RELEASE)\n"
                "def label(images):\n    return [0] * len(images)\n"
            )
            file.with_name("weights").write_text(place)
            keys |= {task.cell.key for task in plan(f"{file}:label", "noise")}
        assert len(keys) == 2

    def test_the_price_and_the_size_of_calls_count_where_answers_depend_on_them(self):
        def identity(**more):
            return Service(answers="labels", **more).identity

        assert identity() == identity(price=1.0) == identity(batch=3)
        assert len({identity(), identity(release="2"), identity(images="float32"), identity(random=True),
                    identity(batch_dependent=True), identity(batch_dependent=True, batch=3)}) == 6  # fmt: skip


class TestRandomness:
    def test_declared(self, victim, tmp_path):
        (row,) = measured(plan(f"{victim}:declared_random", "noise"), tmp_path)
        assert row.complete, row.errors
        assert "undeclared-random" not in fired(row)
        assert row.figures["asked"] == 16 * 8 * 2 + row.records["forwards"].sum()  # majorities before and after
        (table,) = tables([row])
        assert {"random", "service"} <= table.lines[0].marks

    @pytest.mark.parametrize("name", ["undeclared_random", "falsely_deterministic"])
    def test_undeclared(self, victim, tmp_path, name):
        (row,) = measured(plan(f"{victim}:{name}", "noise", queries=1), tmp_path)
        assert "undeclared-random" in fired(row)


def test_answers_that_depend_on_the_call_are_declared_or_a_flag(victim, tmp_path):
    said, unsaid = (measured(plan(f"{victim}:{name}", "noise", queries=1), tmp_path / name)[0]
                    for name in ("declared_coupled", "coupled"))  # fmt: skip
    assert "undeclared-batch-dependent" in fired(unsaid)
    assert "undeclared-batch-dependent" not in fired(said)
    assert "batch-dependent" in tables([said])[0].lines[0].marks


class TestThePlanRefuses:
    @pytest.mark.parametrize(
        ("name", "attack", "more", "said"),
        [
            ("score", "pgd", {}, "shows no gradients"),
            ("score", "transfer", {}, "shows none"),
            ("label", "square", {}, "only labels"),
            ("top", "square(loss=dlr)", {}, "top_scores"),
            ("rounded", "nes", {}, "rounds to 1 decimals"),
            ("score", "square", {"quantise": False}, "add --quantise"),
            ("label", "rays", {"defense": "aaa-linear"}, "use none"),
            ("score", "rays", {"defense": "pgd-at"}, "comes with its weights"),
            ("undeclared", "square", {}, "@service"),
            ("score(scale=2)", "square", {}, "takes no arguments"),
        ],
    )
    def test_what_the_service_does_not_tell(self, victim, name, attack, more, said):
        with pytest.raises(ConfigError, match=said):
            plan(f"{victim}:{name}", attack, **more)

    def test_a_service_as_a_source(self, victim):
        with pytest.raises(ConfigError, match="is a service"):
            plan("cnn", f"transfer(from='{victim}:score')")

    def test_and_asks_nothing(self, victim):
        architecture = resolve(f"{victim}:score")
        calls = architecture.line()._function.__globals__["CALLS"]
        calls.clear()
        plan(f"{victim}:score", "square", "rays")
        assert calls == []


class TestAnswers:
    """They are not trusted: each is what was declared, or none."""

    @pytest.mark.parametrize(
        ("declared", "answer", "said"),
        [
            ({"answers": "logits"}, np.zeros((2, 3)), "expected logits"),
            ({"answers": "logits"}, np.zeros((1, 4)), "expected logits"),
            ({"answers": "logits"}, np.full((2, 4), np.nan), "NaN"),
            ({"answers": "logits"}, np.full((2, 4), np.inf), "infinity"),
            ({"answers": "logits"}, "oops", "expected logits"),
            ({"answers": "logits"}, [[0, 1, 2, 3], [0, 1]], "no numbers"),
            ({"answers": "logits"}, [["0", "1", "2", "3"]] * 2, "expected logits"),
            ({"answers": "logits"}, None, "answers with"),
            ({"answers": "probabilities"}, np.full((2, 4), 0.5), "add up to 2"),
            ({"answers": "probabilities"}, np.array([[2, -1, 0, 0]] * 2), "probability -1"),
            ({"answers": "labels"}, np.array([0, 4]), "label 4"),
            ({"answers": "labels"}, np.array([0, -1]), "label -1"),
            ({"answers": "labels"}, np.array([0, 0.5]), "label 0.5"),
            ({"answers": "labels"}, np.array([0]), "expected labels"),
            ({"answers": "labels"}, np.array([True, False]), "bool"),
            ({"answers": "logits", "top": 2}, np.zeros((2, 2)), "labels and scores"),
            ({"answers": "logits", "top": 2}, ([[0, 0]] * 2, [[2, 1]] * 2), "twice"),
            ({"answers": "logits", "top": 2}, ([[0, 1]] * 2, [[1, 2]] * 2), "best class first"),
            ({"answers": "probabilities", "top": 2}, ([[0, 1]] * 2, [[0.9, 0.8]] * 2), "add up"),
        ],
    )
    def test_what_is_none(self, declared, answer, said):
        with pytest.raises(ServiceError, match=said):
            checked(Service(**declared), answer, 2, 4)

    def test_probabilities_become_logits(self):
        shares = np.array([[0.7, 0.2, 0.1, 0.0]])
        found = torch.tensor(logits(Service(answers="probabilities"), shares, 4))
        assert torch.allclose(found.softmax(dim=1), torch.tensor(shares, dtype=torch.float32), atol=1e-6)

    def test_the_best_classes_keep_their_margin_and_their_rank(self):
        service = Service(answers="probabilities", top=2)
        rows = checked(service, ([[3, 1]], [[0.6, 0.3]]), 1, 4)
        found = torch.tensor(logits(service, rows, 4)).softmax(dim=1)
        assert torch.allclose(found, torch.tensor([[0.05, 0.3, 0.05, 0.6]]), atol=1e-6)

    @pytest.mark.parametrize("answers", ["logits", "probabilities"])
    def test_the_best_class_is_the_one_that_is_told_first_also_where_scores_are_equal(self, answers):
        service = Service(answers=answers, top=2, decimals=1)
        found = torch.tensor(logits(service, checked(service, ([[7, 3], [2, 5]], [[0.4, 0.4], [0, 0]]), 2, 10), 10))
        assert found.argmax(dim=1).tolist() == [7, 2]
        assert (found.topk(2).values.diff(dim=1).abs() < 1e-5).all()

    def test_rounding_explains_what_a_sum_misses(self):
        thirds = np.full((1, 3), 0.3)
        checked(Service(answers="probabilities", decimals=1), thirds, 1, 3)
        with pytest.raises(ServiceError, match="add up"):
            checked(Service(answers="probabilities"), thirds, 1, 3)

    def test_nonsense_is_a_failed_shard(self, victim, tmp_path):
        (row,) = measured(plan(f"{victim}:nan", "square"), tmp_path)
        assert "NaN" in row.errors[0]
        assert len(row.records) == 0

    def test_a_declaration_that_makes_no_sense(self):
        for wrong in ({"answers": "scores"}, {"answers": "labels", "top": 2}, {"answers": "logits", "price": -1},
                      {"answers": "logits", "random": True, "deterministic": True}):  # fmt: skip
            with pytest.raises(ConfigError):
                Service(**wrong)


class TestTheCheck:
    @pytest.mark.parametrize("name", ["score", "label", "top", "declared_random", "Scaled"])
    def test_passes_what_is_as_it_declares(self, victim, name):
        assert not any(verdict.failed for verdict in check(f"{victim}:{name}", processes=False))

    @pytest.mark.parametrize(
        ("name", "rule"), [("undeclared_random", "one question, one answer"), ("nan", "answers")]
    )
    def test_fails_what_is_not(self, victim, name, rule):
        verdicts = {verdict.rule: verdict for verdict in check(f"{victim}:{name}", processes=False)}
        assert verdicts[rule].failed


def test_images_are_sent_as_declared():
    seen = []
    x = digits().test.pixels(slice(3))
    for dtype in ("uint8", "float32"):
        service = Service(answers="labels", images=dtype)
        Desk(Called(lambda images: seen.append(images) or np.zeros(len(images)), service, "it"), 10).logits(x)
    assert [images.dtype.name for images in seen] == ["uint8", "float32"]
    assert all(images.shape == (3, 8, 8, 1) for images in seen)
    assert (seen[0] == digits().test.images[:3].permute(0, 2, 3, 1).numpy()).all()
