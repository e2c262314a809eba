"""Results as a site, driven in a real browser: it works from files, asks nobody, and runs nothing of others' texts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.oracle import NEVER
from bench.plan.cell import Cell, Component
from bench.report.portrait import curve
from bench.report.sequence import confidence_sequence
from bench.report.standings import Table, tables
from bench.report.stats import holm, mcnemar, mcnemar_of, paired_bootstrap, wilson
from bench.results.shards import Shard
from bench.results.store import Row, Store
from bench.site.boards import Name, boards, told_apart
from bench.site.pages import write_site
from bench.threat import Threat
from bench.tracks import track_of
from tests.rows import defends, learner
from tests.rows import row as plain
from tests.test_cli import bench

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
N, BUDGET = 60, 200
EVIL = "\"'><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>&lt;b&gt;"


def attacked(defense: str, attack: str, strength: int, evil: str = "", **fields: object) -> Row:
    """A row in which ``strength`` of the samples fall, one after every other query; ``evil`` is in all of its texts."""
    hits = [2 * place + 1 if place < strength else NEVER for place in range(N)]
    row = plain(hits, defense, attack, budget=BUDGET, **fields)
    rng = np.random.default_rng(strength)
    records = row.records.assign(
        clean_pred=0, twin_pred=0, clean_confidence=rng.uniform(0.3, 1, N), final_confidence=rng.uniform(0.3, 1, N),
        clean_brier=0.1, final_brier=0.5, clean_nll=0.2, final_nll=1.0,
    )  # fmt: skip
    finding = {"flag": f"repeated-margins{evil}", "fired": True, "evidence": f"12 of 60 margins{evil}"}
    provenance = {
        "hardware": f"CPU{evil}", "device": f"cpu{evil}", "parry": evil or "0.1.0", "commit": evil or "abc",
        "libraries": {"torch": f"2{evil}"}, "finished": "2026-01-02T03:04:05",
    }  # fmt: skip
    epochs = [{"clean_accuracy": 0.5, "step_accuracy": 0.4, "pgd_accuracy": 0.1 * each} for each in range(3)]
    shard = Shard(row.cell, 0, N, findings=(finding,) * (defense != "none"), provenance=provenance,
                  training=epochs if evil or defense.startswith("pgd-at") else ())  # fmt: skip
    return replace(row, columns=records, shards=(shard,))


def hostile() -> list[Row]:
    """Rows of a setting of their own in which every text is ``EVIL``."""
    base = attacked(f"evil{EVIL}", f"attack{EVIL}", 30, EVIL)
    name = Component(f"data{EVIL}", version=f"1+{EVIL}", params={EVIL: EVIL}, title=EVIL)
    cell = replace(base.cell, dataset=name, model=replace(name, spec=f"model{EVIL}"), data_hash=EVIL, weights_hash=EVIL,
                   defense=(replace(name, spec=f"evil{EVIL}", stage="output"),))  # fmt: skip
    other = replace(cell, attack=Component(f"other{EVIL}", title=EVIL))
    undefended = replace(cell, defense=())
    return [replace(base, cell=each, shards=tuple(replace(shard, cell=each) for shard in base.shards))
            for each in (cell, other, undefended)]  # fmt: skip


def rows() -> list[Row]:
    served = [
        attacked(defense, attack, least + extra)
        for defense, least in (("none", 50), ("rnd(sigma=0.02)", 30), ("rnd(sigma=0.05)", 10))
        for attack, extra in (("square", 0), ("rays", 5))
    ]
    crowd = [attacked(f"aaa-linear(step={number})", "square", 20) for number in range(1, 30)]
    learned = [learner(wrong, 60, defense) for defense, wrong in (("none", 6), ("ops", 40))]
    return [*served, *crowd, *learned, *hostile()]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    write_site(boards(map(entered, tables(rows(), (100,)))), out)
    return out


def entered(table: Table) -> Table:
    """``table`` as if its hostile defenses were entered by somebody whose words are ``EVIL``, too."""
    said = dict.fromkeys(("entered as", "by", "standing", "summary", "paper", "link"), EVIL)
    return replace(table, words={line.defense: [said] for line in table.lines if "window.hurt" in line.defense})


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'parry-bench[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium; install it from the distribution (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page; after the test there must have been no error, no message and no request to anywhere but files."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)  # of machines that have much else to do
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    hurt = page.evaluate("window.hurt")
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert hurt is None


def at(site: Path, name: str) -> str:
    return (site / name).as_uri()


def entry(site: Path, start: str) -> str:
    return at(site, f"entry/{next((site / 'entry').glob(f'{start}*.html')).name}")


def names(page) -> list[str]:
    return served(page).locator("td.name a > span").all_inner_texts()


def served(page):
    return page.locator(".board", has=page.get_by_role("heading", name="digits · cnn · linf 8/255"))


def compared(page, a: str, b: str) -> list[list[str]]:
    """The cells of the table that sets two entries side by side."""
    page.locator("#board").select_option(label="query · digits · cnn · linf 8/255")
    page.locator("#a").select_option(label=a)
    page.locator("#b").select_option(label=b)
    page.locator("#said").filter(has_text=f"A = {a}, B = {b}:").wait_for()  # a function needs eval, which pages forbid
    return [row.split("\t") for row in page.locator("#pairs tbody").inner_text().splitlines()]


class TestInABrowser:
    def test_a_board_sorts_filters_hides_columns_and_turns_pages(self, page, site):
        page.goto(at(site, "index.html"))
        board = served(page)
        assert names(page)[:1] == ["rnd"]
        assert len(names(page)) == 25, "32 entries, 25 on a page"
        board.locator("th.share [tabindex='0'], th.share[tabindex='0']").first.focus()
        page.keyboard.press("Enter")
        first = board.locator("tbody tr:first-child td.name")
        first.get_by_text("none", exact=True).wait_for()  # the least first, by keyboard
        board.get_by_placeholder("Filter").fill("sigma=0.02")
        assert names(page) == ["rnd"]
        assert board.get_by_role("columnheader", name="rays").count() == 0
        board.get_by_role("button", name="Columns").click()
        page.get_by_role("button", name="rays", exact=True).click()
        assert board.get_by_role("columnheader", name="rays").is_visible()

    def test_an_entry_opens_and_its_curve_tells_figures(self, page, site):
        page.goto(at(site, "index.html"))
        served(page).locator("td.name a").first.click()
        assert page.locator("h1").inner_text().startswith("rnd")
        assert page.locator("#flags").inner_text().count("12 of 60 margins") == 1
        plot = page.locator('[data-figure="queries"]')
        plot.scroll_into_view_if_needed()
        box = plot.locator(".nsewdrag").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] * 0.25)
        page.wait_for_selector(".hovertext")
        assert "200 queries: 75.0 %" in page.locator(".hovertext").first.text_content()
        assert page.locator(".plot .main-svg").count() >= 3

    def test_two_are_compared_as_bench_compare_does(self, page, site):
        page.goto(at(site, "compare.html"))
        cells = compared(page, "rnd(sigma=0.05)", "none")
        worst = next(row for row in cells if row[:2] == ["worst of 2", "@200"])
        a, b = (np.array([place >= strength for place in range(N)]) for strength in (15, 55))
        low, high = (100 * end for end in wilson(45, N))
        assert worst[2] == f"75.0 [{low:.0f}, {high:.0f}]"
        low, high = (100 * end for end in paired_bootstrap(a, b))
        difference, ends = worst[4].replace("−", "-").split(" ", 1)
        assert float(difference) == pytest.approx(100 * 40 / 60, abs=0.05)
        assert json.loads(ends.replace("+", "")) == pytest.approx([low, high], abs=100 / N)
        assert worst[5:7] == ["40", "0"]
        p = holm(np.array([mcnemar(a, b)] * len(cells)))[0]
        assert p < 1e-4
        assert worst[7] == "<0.0001"
        assert page.locator("#curves .main-svg").count() >= 1

    def test_p_values_are_exact(self, page, site):
        page.goto(at(site, "compare.html"))
        cells = compared(page, "aaa-linear(step=1)", "rnd(sigma=0.02)")
        a, b = (np.array([place >= strength for place in range(N)]) for strength in (20, 30))
        lines = [mcnemar(a, b) if row[1] == "@200" else 1.0 for row in cells]
        one = next(place for place, row in enumerate(cells) if row[1] == "@200")
        least = sum(row[5:7] == ["10", "0"] for row in cells)  # lines with the same p, of which Holm knows no order
        assert float(cells[one][7]) == pytest.approx(min(1, len(lines) * mcnemar(a, b)), abs=1e-4), least

    def test_its_statistics_are_those_of_python_on_random_tables(self, page, site):
        rng, tables = np.random.default_rng(0), []
        for n in [1, 2, *rng.integers(3, 1500, 40).tolist()]:
            tables.append(rng.multinomial(n, rng.dirichlet(np.ones(4))).tolist())  # both, A alone, B alone, neither
        ps = [(rng.random(size) ** 3).round(2).tolist() for size in (1, 2, 40)]
        page.goto(at(site, "compare.html"))
        found = page.evaluate(
            """([tables, ps]) => {
              const { wilson, sequence, mcnemar, paired, holm } = parry.statistics;
              const of = ([both, a, b, neither]) => {
                const n = both + a + b + neither;
                const differences = [...Array(both + neither).fill(0), ...Array(a).fill(1), ...Array(b).fill(-1)];
                return [wilson(a, n), sequence(a, n), mcnemar(a, b), paired(differences)];
              };
              return [tables.map(of), ps.map(holm)];
            }""",
            [tables, ps],
        )
        for (both, a, b, neither), (share, stopped, p, ends) in zip(tables, found[0], strict=True):
            n = both + a + b + neither
            assert share == pytest.approx(wilson(a, n), abs=1e-9)
            assert stopped == pytest.approx(confidence_sequence(a, n), abs=1e-9)
            assert p == pytest.approx(float(mcnemar_of(np.array(a), np.array(b))), abs=1e-9)
            sides = (np.repeat([1, 1, 0, 0], [both, a, b, neither]), np.repeat([1, 0, 1, 0], [both, a, b, neither]))
            assert ends == pytest.approx(paired_bootstrap(*sides), abs=2.01 / n), "exact here, of 10,000 draws there"
        for given, adjusted in zip(ps, found[1], strict=True):
            assert adjusted == pytest.approx(holm(np.array(given)).tolist(), abs=1e-12)

    def test_boards_with_two_entries_alone_are_compared(self, page, tmp_path):
        alone, two = [attacked("none", "rays", 30)], [attacked(each, "simba", 30) for each in ("none", "rnd")]
        alone = [replace(row, cell=replace(row.cell, threat=replace(row.cell.threat, eps=0.1))) for row in alone]
        write_site(boards(tables([*alone, *two])), tmp_path / "both")
        page.goto(at(tmp_path / "both", "compare.html"))
        assert page.locator("#board option").all_inner_texts() == ["query · digits · cnn · linf 8/255"]
        page.locator("#said").filter(has_text="A = ").wait_for()
        write_site(boards(tables(alone)), tmp_path / "alone")
        page.goto(at(tmp_path / "alone", "compare.html"))
        assert page.locator("#said").inner_text() == "No board here has two entries."

    def test_no_worst_case_is_shown_without_an_attack_that_has_met_a_part(self, page, tmp_path):
        whole = [attacked(each, name, 30) for each in ("none", "rnd") for name in ("rays", "simba")]
        part = attacked("rnd", "square", 20)
        few = {name: values[:9] for name, values in part.columns.items()}
        shards = (replace(part.shards[0], stop=9, chosen=tuple(range(9))),)
        write_site(boards(tables([*whole, attacked("none", "square", 50), Row(part.cell, {}, shards, few)])), tmp_path)
        page.goto(at(tmp_path, "compare.html"))
        cells = compared(page, "rnd", "none")
        assert {row[0] for row in cells} == {"rays", "simba"}
        assert "No worst case: square has not met all of its images." in page.locator("#said").inner_text()
        assert not page.locator("#curves").is_visible()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_phone_shows_every_page_without_scrolling_sideways(self, page, site, scheme):
        page.set_viewport_size({"width": 390, "height": 844})
        page.emulate_media(color_scheme=scheme)
        for url in (at(site, "index.html"), entry(site, "rnd-sigma-0-02"), at(site, "compare.html")):
            page.goto(url)
            page.wait_for_load_state("load")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, url
            assert page.evaluate("document.documentElement.classList.contains('dark')") == (scheme == "dark")

    def test_hostile_texts_are_shown_and_nothing_of_them_runs(self, page, site):
        page.goto(at(site, "index.html"))
        assert page.locator(".board", has_text="<script>window.hurt").count() == 1
        for button in page.get_by_role("button", name="Columns").all():
            button.click()
            page.keyboard.press("Escape")
        page.goto(entry(site, "script-window"))
        page.wait_for_selector(".plot .main-svg")
        text = page.locator("main").inner_text()
        assert text.count("<script>window.hurt = 1</script>") > 10
        assert page.locator(".who").inner_text().count("<script>window.hurt = 1</script>") == 4
        assert "onerror" in "".join(page.locator("svg text").all_text_contents()) + text
        page.locator("a", has_text="Compare with another").click()
        page.wait_for_selector("#pairs tbody tr")
        assert "<script>" in page.locator("#found").inner_text()
        assert page.locator("main img, main script:not([type='application/json'])").count() == 0


def test_no_text_of_others_ends_a_script_or_begins_markup(site):
    for file in [*site.rglob("*.html"), *(site / "data").iterdir()]:
        text = file.read_text(encoding="utf-8")
        assert "<script>window" not in text, file
        assert "<img src=x" not in text, file


def test_every_link_leads_somewhere(site):
    for file in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#]+)[^"]*"', file.read_text(encoding="utf-8")):
            assert link.startswith("data:") or (file.parent / link).exists(), (file, link)


def test_a_curve_is_what_the_track_says_at_every_budget():
    members = [attacked("rnd", "square", 30), attacked("rnd", "rays", 40)]
    members[1] = replace(members[1], columns=members[1].records.iloc[::-1])
    drawn = curve("worst", members)
    shares = track_of(members[0].cell).shares(members, drawn.at.tolist())
    assert drawn.share.tolist() == pytest.approx([shares[f"@{queries}"].value for queries in drawn.at])
    assert drawn.low.tolist() == pytest.approx([shares[f"@{queries}"].interval[0] for queries in drawn.at])


@pytest.mark.parametrize(
    ("text", "short", "arguments"),
    [("rnd(sigma=0.02)", "rnd", "sigma=0.02"), ("a(x=f(1)) + b", "a + b", "x=f(1)"), ("none", "none", ""),
     ("my.py:D(a=1) #ab12cd", "my.py:D", "a=1 #ab12cd"), ("((", "", "(")],
)  # fmt: skip
def test_names_are_cut_into_components_and_arguments(text, short, arguments):
    assert Name.of(text) == Name(short, arguments)


def test_entries_are_told_apart_by_what_differs():
    (board,) = boards(tables([attacked(each, "square", 5) for each in ("rnd(a=1, b=2)", "rnd(b=2)", "unig(c=3)")]))
    assert {label: str(name.arguments) for label, name in board.short_names.items()} == {
        "rnd(a=1, b=2)": "a=1", "rnd(b=2)": "", "unig(c=3)": "",
    }  # fmt: skip


def test_boards_of_one_model_with_other_arguments_have_other_names():
    names = [Name.of(f"digits · cnn(width=8{more}) · certified l2", " · ") for more in ("", ", heads=3")]
    assert [name.arguments for name in told_apart(names)] == ["", "heads=3"]


def test_the_command_writes_a_site_of_a_folder_and_says_where(tmp_path):
    store = Store(tmp_path / "rows").open()
    cell = Cell(Component("digits"), Component("cnn"), (defends("rnd"),), Component("square"),
                Threat("linf", 0.1, "scores", 10), ids=tuple(range(4)), seed=0)  # fmt: skip
    columns = {"sample_id": cell.ids, "y": 0, "first_hit": [3, -1, 0, 5], "final_pred": [1, 0, 1, 1], "invalid": False}
    store.save(Shard(cell, 0, 4), pd.DataFrame(columns))
    ended = bench("site", tmp_path / "rows", "--out", tmp_path / "site")
    assert ended.code == 0, ended.err
    assert "index.html" in ended.out
    assert (tmp_path / "site" / "index.html").exists()
    assert "could not be read" not in (tmp_path / "site" / "index.html").read_text()
    other = replace(cell, seed=1)
    store.save(Shard(other, 0, 4), pd.DataFrame(columns))
    (table,) = [path for path in store.root.rglob("*.parquet") if path.parent.name.endswith(other.key[:8])]
    table.write_bytes(b"")
    ended = bench("site", tmp_path / "rows", "--out", tmp_path / "site")
    assert ended.code == 2
    pages = [path.read_text() for path in (tmp_path / "site").rglob("*.html")]
    assert all("Results that could not be read are missing here: 1." in page for page in pages)
    assert f"{table.name} was altered or cut short" in (tmp_path / "site" / "index.html").read_text()
    (tmp_path / "empty").mkdir()
    ended = bench("site", tmp_path / "empty", "--out", tmp_path / "site")
    assert (ended.code, "holds no rows" in ended.err) == (2, True)
    (tmp_path / "taken").write_text("")
    ended = bench("site", tmp_path / "rows", "--out", tmp_path / "taken")
    assert (ended.code, "cannot write" in ended.err) == (2, True)
