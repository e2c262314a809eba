"""Components with one planted fault each: the rule that it breaks says so, and the others' words stay out of it."""

import time
from pathlib import Path

import pytest

from bench.check import MORE, RULES, check, elsewhere, output, subject
from bench.check.common import says_what_it_is
from bench.check.verdict import Verdict, judge
from bench.cli.new import _text
from bench.errors import ConfigError
from bench.registry import attacks, defenses, models
from bench.spec import Spec
from tests.registered import BY_STAGE
from tests.test_cli import bench

NOISE = ("logits = self.model(x) ", "import torch; logits = self.model(x) + torch.randn(len(x), 1) ")
PLANTED = [
    # template, what is changed in it, the rule that says so, and what it says
    ("output", NOISE, "random as declared", "two answers under one seed"),
    ("output", ("random: ClassVar = False", "random: ClassVar = True", "(self, x):", "(self, x, rng):"),
     "random as declared", "the same under every seed"),
    ("output", ("return rounded", "return rounded - logits.mean(0)"), "no view of the batch", "scores differ"),
    ("output", ("+ (logits - logits.detach())", ""), "gradients", "no gradient"),
    ("output", ("+ (", "+ 0 * ("), "gradients", "is zero"),
    ("output", ("return rounded", "return rounded / 0"), "logits", "NaN"),
    ("output", (".eval()", ".train()"), "logits", "training mode"),
    ("output", ("return rounded", "return rounded.double()"), "logits", "float64"),
    ("output", ("self.model(x) ", "self.model(x)[0] "), "logits", "expected (B, K)"),
    ("output", ("return rounded", "import sys; sys.exit(3); return rounded"), "logits", "SystemExit: 3"),
    ("output", ("self.model, self.decimals =", "self.key = lambda: 0; self.model, self.decimals ="),
     "copies", "pickle"),
    ("output", ("self.model, self.decimals =", "self.asked = 0; self.model, self.decimals =",
                "return rounded", "self.asked += 1; return self.asked % 2 * rounded"), "probes", "undeclared-stateful"),
    ("output", ("logits = self.model(x) ", "x.mul_(0.5); logits = self.model(x) "), "probes", "written-inputs"),
    ("output", ('"ours"', '""'), "declarations", "paper"),
    ("output", ("version: ClassVar = 1 ", "version: ClassVar = 0 "), "declarations", "version is 0"),
    ("output", ('"""Tell an attacker one decimal of each logit."""', ""), "declarations", "no docstring"),
    ("output", ('"ours"', '"ours"; knows = ("sqare",)'), "known", "did you mean 'square'?"),
    ("output", ('"ours"', '"ours"; knows = ("standard",)'), "known", "trains on data and asks nothing"),
    ("data", ("levels + 1, *", "levels + 9, *"), "ball, order and labels", "outside its linf ball"),
    ("data", ("data.train.labels)", "data.train.labels.flip(0))"), "ball, order and labels", "changed labels"),
    ("data", ("images + noise", "images + 0 * noise"), "ball, order and labels", "as they were"),
    ("data", ("noise).clamp(0, 255).to(torch.uint8)", "noise) / 255"), "ball, order and labels", "uint8"),
    ("data", ("return Split(", "images += 1; return Split("), "ball, order and labels", "writes into"),
    ("data", ("- levels\n", "- levels; noise = noise * (torch.rand(noise.shape) < 0.5)\n"),
     "one seed, one result", "two"),
    ("training", ("return self.train(build, data, job, perturb=self.perturb)",
                  "return self.train(build, data, job, perturb=self.perturb).train()"), "network", "training mode"),
    ("training", ("return self.train", "from torch.nn import Sequential as S; return S(self.train",
                  "perturb)", "perturb)).eval()"), "network", "another network"),
    ("training", ("rng.normal(*x.shape[1:])", "x.new_tensor(__import__('random').random())"),
     "one seed, one result", "two networks"),
    ("training", ("return self.train(build, data, job,", "job = type(job)(); return self.train(build, data, job,"),
     "one seed, one result", "two seeds give one"),
    ("training", ("return self.train", "data.train.images.zero_(); return self.train"), "network", "into the data"),
    ("attack", ("candidate, rows", "2 * candidate, rows"), "ball, box and budget", "left the"),
    ("attack", ("return best", "return best[:1]"), "ball, box and budget", "expected x_adv like x"),
    ("attack", ("oracle.scores(candidate, rows)", "oracle.gradients(candidate, rows)[0]"),
     "ball, box and budget", "asked for gradients"),
    ("attack", ("high[rows], low[rows])", "x[rows], x[rows])"), "finds something", "no image of 12 falls"),
    ("attack", ("best, lowest = x.clone()", "best, lowest = x"), "inputs untouched", "writes into the images"),
    ("attack", ("rng[rows].fork(step).coins(*x.shape[1:])", "torch.rand_like(x[rows]) < 0.5"),
     "one seed, one result", "two results"),
    ("attack", ("for step", "torch.rand(1)\n        for step"), "one seed, one result", "global generator"),
    ("attack", ("return best", "return (best + 0.01).clamp(0, 1)"), "no radius, no change", "left the"),
    ("attack", ("signs = rng[rows]", "signs = rng[0 * rows]"), "no view of the batch", "alone than in a batch"),
    ("model", ("(x - 0.5) / 0.25", "x / 1e6 + 3"), "range of pixels", "of their size"),
    ("model", ("return self.layers((x - 0.5) / 0.25)", "return self.layers(x).sum()"), "logits", "it takes none of"),
    ("model", ("nn.Flatten(),", "nn.Flatten(), _Drop(),",
               "class MineNetwork", "class _Drop(nn.Module):\n    def forward(self, x):\n        return "
               "nn.functional.dropout(x)\n\n\nclass MineNetwork"), "one question, one answer", "two answers"),
    ("model", ("(x - 0.5)", "(x - x.mean())"), "no view of the batch", "logits differ"),
    ("model", ("(x - 0.5)", "(x.detach() - 0.5)"), "gradients", "no gradient reaches"),
    ("model", ("return self.layers", "x.mul_(0.5); return self.layers"), "inputs untouched", "forward writes"),
    ("model", ("return self.layers", "self.last = x; return self.layers"), "inputs untouched", "changes last"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_registries():
    """What templates register is theirs for a test alone."""
    registries = (attacks, defenses, models)
    before = [registry.snapshot() for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        registry.restore(names)


def planted(folder: Path, template: str, edits: tuple[str, ...] = ()) -> str:
    """The template with ``edits``, each a text and what takes its place, as a file; its specification."""
    text = _text(template, "mine", "mine", "Mine")
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:Mine"


def asked(spec: str, label: str) -> Verdict:
    found = subject(spec)
    rules = {"declarations": says_what_it_is, **RULES[found.kind], **MORE.get(found.kind, {})}
    return judge(label, rules[label], found, found.file)


@pytest.mark.parametrize(("template", "edits", "rule", "words"), PLANTED)
def test_a_planted_fault_breaks_its_rule(template, edits, rule, words, tmp_path):
    found = asked(planted(tmp_path, template, edits), rule)
    assert found.failed
    assert words in f"{found.saw}; {found.fix}"
    assert found.fix


@pytest.mark.parametrize("template", ["data", "attack", "model"])
def test_templates_keep_every_rule(template, tmp_path):
    assert [verdict for verdict in check(planted(tmp_path, template), processes=False) if verdict.failed] == []


@pytest.mark.parametrize("label", ["declarations", *RULES["output defense"], *MORE["output defense"]])
def test_the_output_template_keeps_every_rule(label, tmp_path):
    assert not asked(planted(tmp_path, "output"), label).failed


def test_declared_traits_are_excused(tmp_path):
    coupled = ("return rounded", "return rounded - logits.mean(0)",
               "random: ClassVar", "batch_dependent: ClassVar = True\n    random: ClassVar")  # fmt: skip
    found = asked(planted(tmp_path, "output", coupled), "no view of the batch")
    assert found.outcome == "note"


def test_slow_queries_are_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SLOW", 0.0)
    assert "ms an image" in asked(planted(tmp_path, "output"), "time of a query").saw


def test_what_never_ends_is_ended_even_where_it_catches_all():
    def stubborn(_):
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    started = time.process_time()
    assert judge("any", stubborn, None, seconds=0.05).saw.startswith("took more than 0.05 s")
    assert time.process_time() - started < 2


def test_an_error_names_the_line_of_the_user(tmp_path):
    spec = planted(tmp_path, "output", ("return rounded", "raise ValueError('why')\n        return rounded"))
    found = asked(spec, "logits")
    assert found.saw == "ValueError: why"
    line = (tmp_path / "mine.py").read_text().split("raise Value")[0].count("\n") + 1
    assert f"line {line} of {tmp_path}/mine.py" in found.fix


def test_a_declaration_that_is_missing_is_a_verdict(tmp_path):
    spec = planted(tmp_path, "output", ("random: ClassVar = False", "# nothing"))
    (verdict,) = check(spec)
    assert verdict.failed
    assert "does not declare random" in verdict.saw
    assert "random = False" in verdict.fix


@pytest.mark.parametrize("spec", ["nobody", "nowhere.py:Name", "rnd(sgma=1)", "a b"])
def test_a_mistake_in_the_name_is_an_error(spec):
    with pytest.raises(ConfigError):
        check(spec)


def test_the_command_tells_what_was_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "rule", lambda trial: lambda subject: "elsewhere")
    good = bench("check", planted(tmp_path, "data"))
    assert good.code == 0
    assert "5 passed, 0 noted, 0 failed" in good.out


def test_the_command_ends_with_1_where_a_rule_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "rule", lambda trial: lambda subject: "elsewhere")
    bad = bench("check", planted(tmp_path, "data", ("levels + 1, *", "levels + 9, *")))
    assert bad.code == 1
    assert "FAIL" in bad.out
    assert "release what is declared" in " ".join(bad.out.split())
    assert bench("check", "nobody").code == 2


def test_texts_of_components_move_no_cursor(tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "rule", lambda trial: lambda subject: "elsewhere")
    ended = bench("check", planted(tmp_path, "data", ('"ours"', '"ours\\x1b[2J[red]"')))
    assert "\x1b[2J" not in ended.out
    assert "[red]" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize(("edits", "words"), [
    ((), ""),
    (("return rounded", "return hash('a') % 1000 + rounded"), "gives another result"),
    (("return rounded", "import multiprocessing, os; "
      "multiprocessing.parent_process() is None or os._exit(1); return rounded"), "ends the process"),
])  # fmt: skip
def test_another_process(edits, words, tmp_path):
    found = subject(Spec.parse(planted(tmp_path, "output", edits)))
    verdict = judge("elsewhere", elsewhere.rule(output.trial), found, found.file, elsewhere.SECONDS)
    assert verdict.failed == bool(words)
    assert words in verdict.saw


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_STAGE["output"])
def test_registered_output_defenses_stand_the_probes(name):
    assert [verdict for verdict in check(name) if verdict.failed] == []
