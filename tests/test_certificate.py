"""The certificate track: its records, figures, ranks, pictures and refusals, and the attack on what is proven."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from attacks.certifiers.smooth import Smooth
from bench.cli import app
from bench.entries.proof import unproven
from bench.entries.verify import Verdict, _compare
from bench.errors import ConfigError
from bench.measure.contradiction import PASSES, contradicted
from bench.plan.cell import Cell, Component
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.protocols import Certificates
from bench.report.compare import duels
from bench.report.figures import figures
from bench.report.flags import flags
from bench.report.leaderboard import render
from bench.report.portrait import overview, portrait
from bench.report.standings import tables
from bench.report.stats import paired_t, wilson
from bench.results.records import check_records
from bench.results.shards import Shard, Stored
from bench.results.store import Row, Store, contradictions
from bench.rng import SampleRng
from bench.threat import Threat
from bench.tracks import track_of
from tests.rows import defends, row

GRID = {"dataset": "digits", "n": 6, "model": ["cnn(width=2)"], "seed": [0]}
SMOOTH = "smooth(sigma=0.5, n=200)"
OTHER, TRAINED = (f"gaussian-training(sigma=0.25, epochs={epochs})" for epochs in (1, 2))
RUN = ("run", "--dataset", "digits", "--n", "6", "--model", "cnn(width=2)", "--attack", "smooth(sigma=0.25, n=200)")


def proven(radii: list[float], defense: str = "none", certifier: str = SMOOTH, wrong: int = 0, seed: int = 0,
           contradicted: int = 0) -> Row:
    """A row of images certified within ``radii``, -1 where it abstained; the first few for the ``wrong`` class."""
    n = len(radii)
    cell = Cell(
        dataset=Component("digits"), model=Component("cnn"),
        defense=() if defense == "none" else (defends(defense),), attack=Component(certifier),
        threat=Threat("l2", 0.0, "certificate"), ids=tuple(range(n)), seed=seed,
    )  # fmt: skip
    radius = np.array(radii)
    records = pd.DataFrame({
        "sample_id": range(n), "y": 0, "final_pred": [1] * wrong + [0] * (n - wrong), "radius": radius.clip(0),
        "radius_most": 1.2, "abstained": radius < 0, "votes": 150, "n0": 100, "n": 200, "alpha": 0.001,
        "invalid": False, "contradicted": [True] * contradicted + [False] * (n - contradicted),
    })  # fmt: skip
    return Row(cell, records, (Shard(cell, 0, n),))


class TestVerification:
    HELD = [0.1 * number for number in range(10)] * 2

    @pytest.mark.parametrize("same_network", [True, False])
    def test_radii_that_are_stated_too_large_do_not_agree(self, same_network):
        honest, grown = (proven([radius + more for radius in self.HELD]) for more in (0.0, 0.25))
        assert not Verdict([_compare(honest, honest, same_network)], []).problems
        (problem,) = Verdict([_compare(grown, honest, same_network)], []).problems
        assert ("samples end otherwise" if same_network else "by chance with p=") in problem


    def test_radii_are_those_that_the_votes_prove(self):
        certifier, shard = Smooth(sigma=0.5, n=200), proven([0.0] * 3).shards[0]
        votes = torch.tensor([200, 150, 90])
        radius, abstained = certifier.proven(votes)
        honest = {"votes": votes.numpy(), "n0": np.full(3, 100), "n": np.full(3, 200), "alpha": np.full(3, 0.001),
                  "radius": radius.numpy(), "abstained": abstained.numpy()}  # fmt: skip
        shard = replace(shard, cell=replace(shard.cell, attack=replace(shard.cell.attack, version=1)))
        assert not list(unproven(Stored(shard, honest)))
        for name, value in {"radius": honest["radius"] + 0.1, "abstained": ~honest["abstained"],
                            "n": np.full(3, 100_000)}.items():  # fmt: skip
            assert any(problem.startswith(name) for problem in unproven(Stored(shard, honest | {name: value})))


class TestTables:
    def test_columns_are_radii_and_figures_are_those_of_all_images(self):
        (table,) = tables([proven([0.3, 1.1, 0.6, -1, 0.0], wrong=1)])
        (line,) = table.lines
        assert table.title == "digits · cnn · certified l2"
        assert {name: share.value for name, share in line.shares.items()} == {
            "r=0": 0.6, "r=0.25": 0.4, "r=0.5": 0.4, "r=0.75": 0.2, "r=1": 0.2,
        }  # fmt: skip
        assert line.extra["ACR"] == pytest.approx((1.1 + 0.6) / 5)
        assert line.extra["abstained"] == 0.2
        assert "| 0.340 | 20.0        |" in render([table], "md")

    def test_a_defense_is_ranked_with_each_certifier_by_its_mean_radius(self):
        rng = np.random.default_rng(0)
        low, high = rng.uniform(0, 0.4, 50), rng.uniform(0.2, 0.9, 50)
        rows = [proven(list(low)), proven(list(high), "gaussian-training"),
                proven(list(low + 1e-3 * rng.normal(size=50).clip(0)), "gaussian-training", "smooth(sigma=1, n=200)")]
        (table,) = tables(rows)
        found = [(line.defense, line.attack, line.rank) for line in table.lines]
        assert found[0] == ("gaussian-training", SMOOTH, 1)
        assert {rank for _, _, rank in found[1:]} == {2, 3}

    def test_networks_of_several_seeds_are_one_line(self):
        (table,) = tables([proven([0.3, 0.6], "gaussian-training", seed=seed) for seed in range(2)])
        (line,) = table.lines
        assert line.attack == f"{SMOOTH} · 2 networks"
        assert line.shares["r=0.5"].value == 0.5

    def test_a_network_that_was_certified_on_more_images_later_counts_once_and_with_these(self):
        (table,) = tables([proven([0.3] * n, "gaussian-training") for n in (4, 8)])
        (line,) = table.lines
        assert (line.attack, line.n) == (SMOOTH, 8)
        (curve,) = overview(table.rows).graphs[0].curves
        assert curve.high[0] == 1
        assert curve.low[0] == wilson(8, 8)[0]

    def test_tries_with_other_draws_on_given_weights_are_lines_of_their_own(self):
        rows = [proven(radii, seed=seed) for seed, radii in enumerate([[0.3, 0.6, -1], [0.3, -1, 0.6]])]
        given = [replace(each, cell=replace(each.cell, weights_hash="ab" * 32)) for each in rows]
        (table,) = tables(given)
        assert {line.attack for line in table.lines} == {SMOOTH, f"{SMOOTH}, seed 1"}
        assert [line.shares["r=0"].value for line in table.lines] == [2 / 3] * 2
        assert {curve.name for curve in overview(given).graphs[0].curves} == {SMOOTH, f"{SMOOTH}, seed 1"}

    def test_who_has_met_less_is_not_ranked(self):
        whole, part = proven([0.3] * 4), proven([0.4] * 2, "gaussian-training")
        limited = replace(part, cell=replace(part.cell, limited=True))
        (table,) = tables([whole, limited])
        assert [line.rank for line in table.lines] == [1, None]
        assert table.lines[1].marks == {"short", "limited"}

    def test_attacks_and_certificates_are_tables_of_their_own(self):
        titles = [table.title for table in tables([row([1]), proven([0.2])])]
        assert titles == ["digits · cnn · linf 8/255", "digits · cnn · certified l2"]

    def test_means_are_told_apart_by_the_paired_t_test(self):
        differences = np.array([0.1, 0.2, -0.05, 0.3, 0.0])
        assert paired_t(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
        assert paired_t(np.zeros(5)) == 1.0
        assert paired_t(np.array([0.1])) == 1.0

    def test_few_images_that_differ_alike_prove_no_more_than_their_signs(self):
        """As where draws can prove no larger radius of any of them: then nothing spreads, and t is infinite."""
        assert paired_t(np.full(2, 0.3)) == 0.5
        assert paired_t(np.array([0.3, 0.3000001, 0.0])) == 0.5
        assert paired_t(np.full(10, 0.3)) == stats.binomtest(10, 10).pvalue
        rows = [proven([0.3] * 4), proven([0.9] * 4, "gaussian-training")]
        assert [line.rank for line in tables(rows)[0].lines] == [1, 1]


def test_what_certifies_leaves_nothing_to_be_seen_at_a_glance():
    rows = [proven([0.3, 1.1], defense, certifier) for defense in ("none", "gaussian-training")
            for certifier in ("smooth(sigma=0.25, n=200)", "smooth(sigma=0.5, n=200)")]  # fmt: skip
    assert "At a glance" not in render(tables(rows), "md")


def test_two_defenses_are_compared_at_each_radius():
    better = proven([0.6] * 30, "gaussian-training")
    (duel,) = duels([proven([0.3] * 30), better], "none", "gaussian-training")
    assert [(line.at, line.a.value, line.b.value) for line in duel.lines] == [
        ("r=0", 1, 1), ("r=0.25", 1, 1), ("r=0.5", 0, 1), ("r=0.75", 0, 0), ("r=1", 0, 0),
    ]  # fmt: skip
    assert duel.better == ["", "", "b", "", ""]


def test_its_curve_is_what_the_table_says_at_every_radius():
    rows = [proven([0.3, 1.1, 0.6, -1, 0.0], wrong=1), proven([0.1] * 5, "gaussian-training")]
    (table,) = tables(rows)
    (curve,) = portrait(rows[:1], table.lines[:1]).graphs[0].curves
    assert curve.share[0] == 0.6
    assert curve.share[np.searchsorted(curve.at, 0.7)] == 0.2
    assert list(curve.at[-2:]) == [1.1, 1.1]  # nothing is proven beyond
    assert list(curve.share[-2:]) == [0.2, 0]
    (graph,) = overview(rows).graphs
    assert [each.name for each in graph.curves] == [f"none, {SMOOTH}", f"gaussian-training, {SMOOTH}"]
    assert overview([row([1])]) is None


def test_two_folders_that_prove_other_radii_contradict_each_other():
    one, same, other = proven([0.3, -1]), proven([0.3, -1]), proven([0.9, -1])
    assert not contradictions({Path("a"): [one], Path("b"): [same]})
    (found,) = contradictions({Path("a"): [one], Path("b"): [other]})
    assert "1 samples differ" in str(found)


class TestContradiction:
    def test_one_certificate_that_an_attack_moves_is_a_flag(self):
        (found,) = flags([proven([0.3, 0.3, -1], contradicted=1)])
        assert (found.defense, found.flag) == ("none", "certificate-contradicted")
        assert "1 of 2 certificates do not hold" in found.evidence
        assert flags([proven([0.3])]) == []

    @pytest.mark.parametrize(("stretch", "falls"), [(1.0, False), (1.5, True)])
    def test_a_radius_beyond_the_boundary_is_found_out_and_a_true_one_is_not(self, stretch, falls):
        x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        x[:, 0, 0, 0] = torch.tensor([0.62, 0.7, 0.8, 0.9, 1.0])

        def network(images):
            first = 3 * (images.flatten(1)[:, 0] - 0.5)
            return torch.stack((-first, first), dim=1)

        rng, certifier = SampleRng.create(0, torch.arange(5), "test"), Smooth(sigma=0.25, n=4000)
        found = certifier(network, x, rng.fork("draws"), 4096)
        claimed = Certificates(**{**vars(found), "radius": stretch * found.radius})
        assert contradicted(certifier, network, x, claimed, rng.fork("attack"), 4096).tolist() == [falls] * 5


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"defense": ["rnd"]}, "a certifier proves something of a network alone, so rnd has no say"),
            ({"attack": ["smooth(sigma=1, alpha=2)"]}, "alpha is 2"),
        ],
    )
    def test_what_cannot_be_proven_is_refused_before_anything_runs(self, changes, said):
        with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
            expand(load_suite(None, {**GRID, "attack": [SMOOTH], **changes}), Loader(None, None))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"radius": [0.2, 1.0]}, "a radius where the certifier abstained"),
            ({"radius": [1.3, 0.0]}, "radii beyond what its draws can prove"),
            ({"votes": [150, 201]}, "more votes than draws"),
            ({"radius": [-0.1, 0.0]}, "has radius outside"),
        ],
    )
    def test_records_that_contradict_themselves_are_not_read(self, changes, said):
        good = proven([0.2, -1])
        check_records(good.columns, good.cell, (0, 1))
        wanted = {key: np.array(value) for key, value in changes.items()}
        with pytest.raises(ValueError, match=said):
            check_records({**good.columns, **wanted}, good.cell, (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small run of two defenses with a certifier."""
    out = tmp_path_factory.mktemp("certificates") / "results"
    both = ["--defense", OTHER, "--defense", TRAINED]
    result = CliRunner().invoke(app, [*RUN, *both, "--out", str(out), "--shard-size", "4"])
    assert result.exit_code == 0, result.output
    return out


class TestARun:
    def test_it_says_what_is_proven(self, folder):
        rows, damaged = Store(folder).rows()
        assert (len(rows), damaged) == (2, [])
        for each in rows:
            assert each.complete
            assert set(figures(each)) == {"ACR", "abstained"}
            assert (each.records["n"] == 200).all()
            assert not each.records["contradicted"].any()

    def test_a_certificate_is_the_same_in_shards_of_any_size(self, folder, tmp_path):
        otherwise = ["--out", str(tmp_path / "again"), "--shard-size", "5", "--batch-size", "33"]
        assert CliRunner().invoke(app, [*RUN, "--defense", TRAINED, *otherwise]).exit_code == 0
        (again,), _ = Store(tmp_path / "again").rows()
        (before,) = (each for each in Store(folder).rows()[0] if each.cell.key == again.cell.key)
        assert again.records.equals(before.records)

    @pytest.mark.parametrize("style", ["md", "csv", "latex", "json"])
    def test_every_format_has_it(self, folder, style):
        result = CliRunner().invoke(app, ["leaderboard", str(folder), "--format", style])
        assert result.exit_code == 0
        assert "r=0.25" in result.output.replace("$", "")
        assert "ACR" in result.output
        if style == "json":
            assert {line["attack"] for line in json.loads(result.output)} == {"smooth(sigma=0.25, n=200)"}

    @pytest.mark.parametrize("suite", ["certified-digits", "paper-smoothing"])
    def test_its_suites_can_be_planned(self, suite):
        plan = load_suite(suite, {"dataset": "digits"})
        assert {track_of(task.cell).name for task in expand(plan, Loader(None, None), 1)} == {"certificate"}

    def test_its_board_can_be_run_and_entered(self, tmp_path):
        command = ["run", "certified-digits", "--limit", "1", "--defense", "none", "--model", "cnn(width=8)"]
        result = CliRunner().invoke(app, [*command, "--dry-run", "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output

    def test_a_plan_tells_its_draws(self, tmp_path):
        result = CliRunner().invoke(app, [*RUN, "--out", str(tmp_path), "--dry-run"])
        assert result.exit_code == 0
        assert f"{6 * (300 + PASSES):,}" in result.output
