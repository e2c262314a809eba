"""What a training shows epoch by epoch: kept with the row, printed, drawn, and read with suspicion."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from torch import nn

from bench.cli import main
from bench.errors import StoreError
from bench.measure.channels import channel_inequality, gini, weight_gradient_norms
from bench.measure.diagnostics import Watch, diagnose
from bench.protocols import Job
from bench.registry import datasets
from bench.report.collapse import collapse
from bench.report.curves import Training, plot, render_curves, trainings
from bench.results.shards import Shard, read_shard
from bench.results.store import Store
from bench.rng import SampleRng
from bench.scratch import Scratch
from defenses.fast_at import FastAdversarialTraining
from defenses.sub_at import SubspaceAdversarialTraining
from tests.rows import row


def epochs(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """An epoch for each (single step, PGD)."""
    return [{"clean_accuracy": 0.9, "step_accuracy": step, "pgd_accuracy": robust, "alignment": 0.5,
             "gradient_norm": 0.1} for step, robust in pairs]  # fmt: skip


def single_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The norm of each sample's gradient in all weights, one after the other."""
    found = []
    for image, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    return torch.stack(found)


class Turned(nn.Module):
    """Nothing, whose gradient has the wrong sign."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.detach() - x


COLLAPSED = epochs((0.4, 0.3), (0.45, 0.4), (0.8, 0.05), (0.9, 0.0))


class TestDiagnose:
    def test_on_a_linear_model_all_is_known(self):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 0.4 + 0.2 * torch.rand(50, 1, 8, 8)
        weight = (model[1].weight[1] - model[1].weight[0]).detach()
        with torch.no_grad():
            logits = model(x)
            y = logits.argmax(1)
        margin = (logits[:, 0] - logits[:, 1]).abs()
        seen = diagnose(model, x, y, 0.005, SampleRng.create(0, torch.arange(50), "test"))
        exact = float((margin > 0.005 * weight.abs().sum()).float().mean())
        assert seen["pgd_accuracy"] == pytest.approx(exact)
        assert seen["clean_accuracy"] == 1 >= seen["step_accuracy"] >= seen["pgd_accuracy"] > 0
        assert seen["alignment"] == pytest.approx(1, abs=1e-5)
        wrong = logits.softmax(1)[torch.arange(50), 1 - y]
        assert seen["gradient_norm"] == pytest.approx(float(wrong.mean() * weight.norm()), rel=1e-4)

        sizes = single_gradients(model, x[:5], y[:5])
        assert torch.allclose(weight_gradient_norms(model, x[:5], y[:5]), sizes)
        closed = (logits[:5].softmax(1) - nn.functional.one_hot(y[:5], 2)).norm(dim=1)
        assert torch.allclose(sizes, closed * (x[:5].flatten(1).square().sum(1) + 1).sqrt(), rtol=1e-4)
        assert math.isnan(channel_inequality(model, x))
        assert "channel_inequality" not in seen  # it has no convolutions

    def test_perturbations_that_say_their_label_are_read_in_other_images(self):
        """Where the gradient has the wrong sign, as where a training fits itself, the step writes the label down."""
        torch.manual_seed(0)
        honest, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 0.45 + 0.1 * torch.rand(50, 1, 8, 8)
        with torch.no_grad():
            honest[1].bias -= honest(x).mean(0)  # so that both classes are there
            y = honest(x).argmax(1)
        rng = SampleRng.create(0, torch.arange(50), "test")
        assert diagnose(honest, x, y, 0.3, rng)["self_information"] == 0
        assert diagnose(nn.Sequential(Turned(), honest), x, y, 0.3, rng)["self_information"] == 1
        assert "self_information" not in diagnose(honest, x, torch.zeros_like(y), 0.3, rng)

    def test_each_sample_has_the_weight_gradient_that_it_has_alone(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)
        ).eval()
        x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # as a watched network comes
        found = weight_gradient_norms(model, x, y)
        assert torch.allclose(found, single_gradients(model.requires_grad_(True), x, y), rtol=1e-4)

    def test_channels_are_equal_or_one_has_all(self):
        assert gini(torch.full((4,), 3.0)).item() == pytest.approx(0)
        assert gini(torch.tensor([0.0, 5.0, 0.0, 0.0])).item() == pytest.approx(3 / 4)
        assert gini(torch.tensor([1.0, 3.0])).item() == pytest.approx(1 / 4)
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1))
            model[0].bias.zero_()
        assert channel_inequality(model, torch.rand(2, 1, 4, 4)) == pytest.approx((1 / 4 + 0) / 2)
        assert not model[0]._forward_hooks

    def test_what_a_training_says_once_stands_beside_every_epoch(self):
        digits = datasets.create("digits")(None)
        few = replace(digits, train=digits.train.subset(slice(64)))
        watch = Watch(few, 0.1, Job())
        job = Job(watch=watch, note=watch.note)
        SubspaceAdversarialTraining(eps=0.1, epochs=2, subspace_epochs=1, dimensions=1, early_stopping=False)(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), few, job
        )
        columns = watch.columns()
        assert len(columns["explained_variance"]) == len(columns["pgd_accuracy"]) == 3
        assert 0.3 < columns["explained_variance"][0] < 1
        one = Training("d", "m", "sub-at", 0, [{name: float(v[0]) for name, v in columns.items()}])
        shown = render_curves([one], "md")
        assert "variance" in shown.splitlines()[0]
        assert "variance" not in render_curves([replace(one, epochs=COLLAPSED)], "md").splitlines()[0]

    def test_watching_leaves_the_training_as_it_was_and_goes_on_after_a_kill(self, tmp_path):
        digits = datasets.create("digits")(None)
        few = replace(digits, train=digits.train.subset(slice(64)))

        def build() -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        job = Job(scratch=Scratch(tmp_path))
        watch = Watch(few, 0.1, job)
        defense = FastAdversarialTraining(eps=0.1, epochs=2)
        watched, plain = defense(build, few, replace(job, watch=watch)), defense(build, few, Job())
        assert torch.equal(watched[1].weight, plain[1].weight)
        assert len(watch.epochs) == 2
        assert len(watch.x) == 32
        later = Watch(few, 0.1, job)
        assert later.epochs == watch.epochs
        later(plain, 1)
        assert later.epochs == watch.epochs


@pytest.mark.parametrize(
    ("seen", "epoch"),
    [
        (COLLAPSED, 3),
        (epochs((0.5, 0.4), (0.5, 0.15)), 2),  # a fall within an epoch
        (epochs((0.5, 0.4), (0.45, 0.25), (0.4, 0.15)), None),  # slow
        (epochs((0.1, 0.0), (0.3, 0.25)), None),  # not yet trained
        (epochs((0.6, 0.5), (0.2, 0.1)), None),  # both fall: that is no overfitting to the step
        ([], None),
    ],
)
def test_a_collapse_is_a_fall_under_pgd_alone(seen, epoch):
    found = collapse(seen)
    assert (found.epoch if found else None) == epoch


def trained(defense: str, seen: list[dict[str, float]], seed: int = 0):
    plain = row([3, 5], defense, "pgd", seed=seed)
    return replace(plain, shards=(replace(plain.shards[0], training=tuple(seen)),))


def test_a_network_is_shown_once_whatever_attacks_have_met_it():
    one, other = trained("fast-at", COLLAPSED), trained("fast-at", COLLAPSED, seed=1)
    again = replace(one, cell=replace(one.cell, attack=replace(one.cell.attack, spec="square")))
    assert [found.seed for found in trainings([one, again, other, row([3, 5])])] == [0, 1]


def test_the_table_says_what_was_left_and_where_it_collapsed():
    shown = render_curves(trainings([trained("fast-at", COLLAPSED), trained("sub-at", epochs((0.5, 0.4)))]), "md")
    collapsed, sound = shown.splitlines()[2:4]
    assert "epoch 3: PGD 5.0, single step 80.0" in collapsed
    assert "40.0 (2)" in collapsed
    assert "| none" in sound
    records = json.loads(render_curves(trainings([trained("fast-at", COLLAPSED)]), "json"))
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert records[2]["pgd_accuracy"] == 0.05


def test_the_plot_is_an_svg_whatever_names_it_shows():
    one = Training("d", "<script>m</script>", "fast-at & co", 0, COLLAPSED)
    root = ElementTree.fromstring(plot([one, replace(one, epochs=COLLAPSED[:1]), one]))
    assert len(root.findall(".//{*}polyline")) == 12
    assert "<script>" not in plot([one])


def test_rows_keep_what_was_seen_and_tables_and_plots_are_made_of_it(tmp_path, capsys, monkeypatch):
    suite = tmp_path / "s.toml"
    suite.write_text(
        'title = "t"\ndataset = "digits"\nmodel = "cnn(width=4)"\nn = 4\n[[grid]]\n'
        'defense = "fast-at(eps=0.1, epochs=2)"\nattack = "pgd(steps=1)"\neps = 0.1\nqueries = 2\n'
    )
    out = tmp_path / "out"
    for expected in ("1 cells run", "0 cells run"):
        monkeypatch.setattr("sys.argv", ["bench", "run", str(suite), "--out", str(out), "--device", "cpu"])
        main()
        assert expected in capsys.readouterr().out
    rows, _ = Store(out).rows()
    assert [len(one.training) for one in rows] == [2]
    monkeypatch.setattr("sys.argv", ["bench", "curves", str(out), "--plot", str(tmp_path / "plot.svg")])
    main()
    shown = capsys.readouterr().out
    assert "fast-at(" in shown
    assert "none" in shown  # it has not collapsed
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("broken", [{"pgd_accuracy": 2.0}, {"pgd_accuracy": None}, {"gradient_norm": -1.0}])
def test_curves_that_cannot_be_are_refused(broken, tmp_path):
    plain = row([3, 5], "fast-at", "pgd")
    store = Store(tmp_path)
    store.save(Shard(plain.cell, 0, len(plain.records), training=epochs((0.5, 0.4))), plain.records)
    (path,) = tmp_path.rglob("[0-9]*-[0-9]*.json")
    assert list(read_shard(path).shard.training) == epochs((0.5, 0.4))
    content = json.loads(path.read_text())
    del content["sha256"]
    content["training"][0].update(broken)
    digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}))
    with pytest.raises(StoreError, match="is no shard"):
        read_shard(path)
