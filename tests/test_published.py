"""The published figures that come with the repository, and the files that hold them."""

from pathlib import Path

import pytest

from bench.errors import ConfigError
from bench.registry import attacks, defenses, load_plugins, models
from bench.report.beside_published import match
from bench.report.published import LEADERBOARDS, MEASURES, Figure, load_published
from bench.results.store import Store
from bench.spec import parse_chain

PUBLISHED = load_published()


def figures(**settings: object) -> list[Figure]:
    return [
        figure
        for figure in PUBLISHED.figures
        if all(getattr(figure, key) == value for key, value in settings.items())
    ]


class TestCommittedFigures:
    def test_every_value_is_in_the_range_of_its_metric(self):
        assert len(PUBLISHED.figures) > 600
        for figure in PUBLISHED.figures:
            measure = MEASURES[figure.metric]
            assert measure.low <= figure.value <= measure.high
            assert figure.unit == measure.unit

    def test_no_setting_has_two_values_of_one_metric(self):
        settings = [figure.model_dump_json(exclude={"value"}) for figure in PUBLISHED.figures]
        assert len(set(settings)) == len(settings)

    def test_robust_accuracy_is_below_clean_accuracy_and_falls_with_the_budget(self):
        def setting(figure: Figure) -> tuple[object, ...]:
            return figure.source, figure.place, figure.dataset, figure.model, figure.defense, figure.norm, figure.eps

        clean = {setting(figure): figure.value for figure in figures(metric="clean accuracy")}
        curves: dict[object, dict[int, float]] = {}
        for figure in figures(metric="robust accuracy"):
            assert figure.value < clean.get(setting(figure), 100.1)
            if figure.queries:
                curves.setdefault((setting(figure), figure.attack), {})[figure.queries] = figure.value
        assert sum(len(curve) > 1 for curve in curves.values()) >= 8
        for curve in curves.values():
            values = [curve[queries] for queries in sorted(curve)]
            assert values == sorted(values, reverse=True)

    def test_certified_accuracy_falls_with_the_radius(self):
        curves: dict[object, list[tuple[float, float]]] = {}
        for figure in figures(metric="certified accuracy"):
            assert figure.eps is not None
            curves.setdefault((figure.dataset, figure.defense), []).append((figure.eps, figure.value))
        for curve in curves.values():
            values = [value for _, value in sorted(curve)]
            assert values == sorted(values, reverse=True)

    @pytest.mark.parametrize(
        ("settings", "value"),
        [
            ({"defense": "AAA", "dataset": "cifar10", "queries": 2500, "eps": 8 / 255}, 80.59),
            ({"defense": "UniG", "queries": 2500, "metric": "robust accuracy", "dataset": "cifar10"}, 77.80),
            ({"defense": "DENT", "queries": 100, "metric": "robust accuracy"}, 81.78),
            ({"model": "Rice2020Overfitting", "attack": "AutoAttack", "norm": "linf"}, 53.42),
            ({"model": "Salman2020Do_R50", "attack": "AutoAttack"}, 34.96),
            ({"defense": "TRADES", "attack": "RayS", "metric": "robust accuracy"}, 57.3),
            ({"defense": "EM", "attack": "JPEG", "metric": "test accuracy"}, 80.72),
            ({"defense": "EM", "attack": "JPEG-10", "metric": "test accuracy"}, 81.50),
            ({"attack": "Square", "model": "ResNet-50", "norm": "l2", "queries": 1000}, 82.3),
            ({"attack": "QueryNet", "norm": "l2", "eps": 2.0, "metric": "mean queries"}, 26.8),
            ({"attack": "HopSkipJump", "dataset": "imagenet", "norm": "l2", "metric": "median queries"}, 2550),
            ({"defense": "SOME-Gaussian, sigma 0.5", "eps": 0.75}, 42.6),
        ],
    )
    def test_a_value_stands_where_it_belongs(self, settings, value):
        (figure,) = figures(**settings)
        assert figure.value == value

    def test_components_that_are_named_can_be_made(self):
        load_plugins()
        for spec in {figure.spec for figure in PUBLISHED.figures}:
            if spec.attack:
                attacks.create(spec.attack)
            for part in parse_chain(spec.defense or "none"):
                defenses.create(part)
            if spec.model:
                models.create(spec.model)

    def test_the_headline_of_aaa_was_attacked_with_smaller_windows_than_ours_and_at_temperature_1(self):
        """AAA's code takes p_init 0.05 for its base network on CIFAR-10 and 0.3 for all others."""
        (headline,) = figures(defense="AAA", value=80.59)
        rows, _ = Store(LEADERBOARDS / "query-cifar10").rows()
        ours = [row for row in rows if row.cell.attack.spec == "square(preset=aaa)" and row.cell.defense]
        released = [row for row in ours if row.cell.defense[0].params.get("solver") == "as-released"]
        (pair, *_) = match(PUBLISHED._replace(figures=[headline]), released).found
        named = {str(difference) for difference in pair.differences}
        assert {"preset aaa-standard ≠ aaa", "p_init 0.05 ≠ 0.3", "temperature 1 ≠ tuned"} <= named

    def test_our_copy_of_cifar10_is_named(self):
        rows, _ = Store(LEADERBOARDS / "query-cifar10").rows()
        assert {PUBLISHED.copies.get(row.cell.data_hash) for row in rows} == {"JPEG-coded copy"}


TABLE = """
source = "Someone, 2020"
dataset = "digits"
norm = "linf"
spec = { attack = "square", defense = "none" }

[[table]]
place = "table 1"
model = "cnn"
attack = "Square"
eps = "8/255"
columns = [
  { metric = "clean accuracy" },
  { metric = "robust accuracy", queries = 100, spec.attack = "square(p_init=0.3)" },
]
rows = [
  { values = [99, 50.5] },
  { defense = "RND", eps = 0.1, spec.defense = "rnd", values = ["-", 60] },
]
"""


def written(folder: Path, text: str) -> Path:
    (folder / "someone.toml").write_text(text)
    return folder


class TestFiles:
    def test_file_table_row_and_column_add_up(self, tmp_path):
        loaded = load_published(written(tmp_path, TABLE)).figures
        assert [(figure.metric, figure.value) for figure in loaded] == [
            ("clean accuracy", 99),
            ("robust accuracy", 50.5),
            ("robust accuracy", 60),
        ]
        clean, undefended, defended = loaded
        assert (clean.queries, undefended.queries) == (None, 100)
        assert (undefended.eps, defended.eps) == (8 / 255, 0.1)
        assert (undefended.spec.defense, defended.spec.defense) == ("none", "rnd")
        assert (clean.spec.attack, undefended.spec.attack) == ("square", "square(p_init=0.3)")

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            ("50.5", "150", "table 1, row 1: robust accuracy is 150, not in 0 to 100 (%); check the source"),
            ("[99, 50.5]", "[99]", 'table 1, row 1 has 1 values for 2 columns; write "-" where nothing is printed'),
            ("50.5", '"?"', 'table 1 rows 1 values 2'),
            ('"clean accuracy"', '"accuracy"', "metric is 'accuracy'"),
            ("queries =", "querys =", "querys: unknown key; did you mean 'queries'?"),
            ('place = "table 1"\n', "", "place is missing; add it to the row, the column, the table or the file"),
            ("8/255", "eight", "eps is 'eight'; write a number or a fraction"),
            ('norm = "linf"\n', "", "eps is 0.0313725 in no norm; add norm = one of"),
            ('norm = "linf"', 'norm = "l7"', "norm is 'l7'"),
            ("square(p_init=0.3)", "square(0.3)", "cannot read '0.3' in 'square(0.3)'; write key=value"),
            ('spec = { attack = "square", defense = "none" }', 'spec = "square"', "spec is 'square'"),
            ("[[table]]", "[[tabel]]", "did you mean 'table'?"),
            ("rows = [", "rows = [[", "is not TOML"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_named_with_its_file_and_its_remedy(self, old, new, complaint, tmp_path):
        assert old in TABLE
        with pytest.raises(ConfigError) as caught:
            load_published(written(tmp_path, TABLE.replace(old, new)))
        assert "someone.toml" in str(caught.value)
        assert complaint in str(caught.value)

    def test_no_figures_are_an_error_with_a_way_out(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no published figures in .*name their folder with --figures"):
            load_published(tmp_path / "nowhere")
