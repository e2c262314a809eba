"""Entries: what is submitted is what is validated, and whatever is altered is found, by whoever has not run it."""

import copy
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from bench.cli.submit import last_words
from bench.entries.boards import boards_in, standings
from bench.entries.folder import ENTRY, VERIFIED, contents, hashed
from bench.entries.pictures import Pictures
from bench.entries.plan import met, required
from bench.entries.statement import Entry, read_entry, sealed, statement
from bench.entries.validate import Report, differences, validate
from bench.oracle import NEVER
from bench.plan.tasks import Loader
from bench.release.contact_sheet import MARGIN, NAMES
from bench.report.standings import tables
from bench.results.examples import SUFFIX, read_examples, write_examples
from bench.results.shards import SHARDS, Stored, read_shard
from bench.results.store import Row, Store
from bench.site.boards import PNG, _png, boards
from bench.system.claims import claim
from tests.rows import learner, row
from tests.test_cli import MODEL, Ended, bench, complaint
from tests.test_docs import blocks

SUITE = """
dataset = "digits"
model = "MODEL"
n = 12
eps = 0.4
queries = 40
budgets = [5]
attack = ["square", "noise"]
defense = "none"
"""
ABOUT = 'name = "Rounded"\nauthors = ["A. Newcomer", "=cmd|x"]\nlink = "https://example.org"\n'
CPU = torch.device("cpu")
FLAG = {"setting": "x", "defense": "x", "flag": "x", "evidence": "x"}
LOADER = Loader(None, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A folder with a defense and the entry of it, ``entry``."""
    folder = tmp_path_factory.mktemp("submitted")
    (defense,) = blocks("docs/defense.md", "python")
    (folder / "my_defense.py").write_text(defense.replace('@defenses("rounded")\n', "") + MODEL)
    (folder / "tiny.toml").write_text(SUITE.replace("MODEL", f"{folder / 'my_defense.py'}:Means"))
    (folder / "about.toml").write_text(ABOUT)
    ended = bench("submit", f"{folder / 'my_defense.py'}:Rounded", "--track", "query", "--suite", folder / "tiny.toml",
                  "--no-check", "--about", folder / "about.toml", "--out", folder / "entry",
                  "--work", folder / "work")  # fmt: skip
    assert ended.code == 0, ended.err
    return folder, ended


@pytest.fixture
def entry(made: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of the entry, to be altered."""
    return Path(shutil.copytree(made[0] / "entry", tmp_path / "entry"))


def looked_at(folder: Path, code: Path | None = None, proof: bool = False) -> Report:
    return validate(folder, LOADER, code, CPU, proof)


def wrong(report: Report) -> str:
    return "\n".join(f"{check.what}: {check.said}" for check in report.checks if check.outcome == "WRONG")


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter what an entry says and seal it anew."""
    said = json.loads((folder / ENTRY).read_bytes())
    del said["sha256"]
    change(said)
    (folder / ENTRY).write_bytes(sealed(said))


def forge(folder: Path, change: Callable[[Stored, torch.Tensor], tuple[Stored, torch.Tensor]], figures: bool) -> None:
    """Alter the rows of an entry with all checksums made anew, and where ``figures``, all that follows from them."""
    shape = 1, 8, 8
    rows = folder / "rows"
    found = []
    for path in sorted(rows.rglob(SHARDS)):
        stored = read_shard(path)
        (proof,) = path.parent.glob(f"*{SUFFIX}")
        found.append(change(stored, read_examples(proof, stored.records["sample_id"].tolist(), shape)))
    shutil.rmtree(rows)
    for stored, examples in found:
        Store(rows).save(stored.shard, stored.records, examples)

    def again(said: dict[str, Any]) -> None:
        entry, _ = read_entry(folder / ENTRY)
        if figures:
            said |= statement(Store(rows).rows()[0], entry.about, entry.suite, entry.board, entry.budgets)
        sizes = contents(folder)
        said["files"] = {name: {"bytes": sizes[name], "sha256": it} for name, it in hashed(folder, sizes).items()}

    reseal(folder, again)


def with_code(stored: Stored, code: str) -> Stored:
    """``stored`` as if the file of its defense had the hash ``code``."""
    cell = stored.shard.cell
    chain = tuple(replace(part, version=f"1+{code}") for part in cell.defense)
    return stored._replace(shard=replace(stored.shard, cell=replace(cell, defense=chain)))


def is_defended(stored: Stored) -> bool:
    return bool(stored.shard.cell.defense)


class TestSubmit:
    def test_it_says_what_it_cost_and_what_to_do_next_and_names_no_place(self, made):
        folder, ended = made
        assert "are final examples" in ended.out
        assert "git add entries/entry" in ended.out
        assert "bench validate" in ended.out
        assert str(folder) not in (folder / "entry" / ENTRY).read_text()

    def test_two_at_once_write_one_entry_and_the_other_is_told(self, made, tmp_path):
        folder, _ = made
        asked = ["submit", f"{folder / 'my_defense.py'}:Rounded", "--track", "query", "--suite", folder / "tiny.toml",
                 "--no-check", "--about", folder / "about.toml", "--work", folder / "work"]  # fmt: skip
        theirs = tmp_path / ".x.tmp" / "half"
        theirs.mkdir(parents=True)
        with claim(tmp_path / ".x.lock"):
            ended = bench(*asked, "--out", tmp_path / "x")
        assert (ended.code, "another run is writing" in ended.err, "free some space" in ended.err) == (2, True, False)
        assert theirs.is_dir(), "what it has written so far is left alone"
        assert not (tmp_path / "x").exists()
        assert bench(*asked, "--out", tmp_path / "x").code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["x"], "and what a killed one has left is not"
        assert wrong(looked_at(tmp_path / "x")) == ""

    def test_the_entry_is_whole_and_valid_and_readable_as_rows(self, made):
        folder, _ = made
        code = folder / "my_defense.py"
        report = looked_at(folder / "entry", code, proof=True)
        assert wrong(report) == ""
        assert [check.what for check in report.checks if check.outcome == "note"] == ["standing"]
        ended = bench("leaderboard", folder / "entry")
        assert ended.code == 0
        assert "◦ entered, and nobody but its authors has run it" in ended.out
        assert "- Rounded by A. Newcomer, =cmd\\|x (my_defense.py:Rounded #" in ended.out

    def test_what_is_missing_is_told_before_anything_runs(self, made, tmp_path):
        folder, _ = made
        defense = f"{folder / 'my_defense.py'}:Rounded"
        told = complaint(bench("submit", defense, "--track", "query"))
        assert "name and authors are missing; write them into --about FILE, or add --name and --authors" in told
        assert "authors is missing" in complaint(bench("submit", defense, "--track", "query", "--name", "x"))
        said = ["--name", "x", "--authors", "y", "--out", tmp_path / "x"]
        assert "did you mean 'query'?" in complaint(bench("submit", defense, "--track", "qery", *said))
        suite = ["--suite", folder / "tiny.toml"]
        assert "change --suite or --track" in complaint(bench("submit", defense, "--track", "data", *suite, *said))
        broken = tmp_path / "broken.py"
        broken.write_text((folder / "my_defense.py").read_text().replace("return Rounding", "return Nothing"))
        asked = [f"{broken}:Rounded", "--track", "query", *suite, *said]
        told = complaint(bench("submit", *asked, "--model", "cmn"))
        assert "no model is named 'cmn'" in told, "before bench check, which takes half a minute, finds what is broken"
        assert "is there already" in complaint(
            bench("submit", defense, "--track", "query", *suite, *said[:4], "--out", folder / "entry")
        )
        (tmp_path / "about.toml").write_text("nam = 1")
        about = ["--about", tmp_path / "about.toml"]
        assert "did you mean 'name'?" in complaint(bench("submit", defense, "--track", "query", *about))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all single values, and of all lists and tables that are empty."""
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def altered(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 1e-6
    return f"{value}x" if isinstance(value, str) else [*value, "x"]


class TestBoards:
    def test_entries_of_two_versions_of_a_board_stand_in_no_table_together(self, entry, tmp_path):
        shutil.copytree(entry, tmp_path / "older")
        assert bench("leaderboard", tmp_path).code == 0
        reseal(tmp_path / "older", lambda said: said.update(board="tiny v7"))
        for command in (("leaderboard", tmp_path), ("site", tmp_path, "--out", tmp_path / "site")):
            ended = bench(*command)
            assert ended.code == 2
            assert "answers tiny and Rounded tiny v7; versions of a board never mix" in ended.err

    def test_an_entry_stands_with_the_rows_of_the_folder_called_as_its_board_and_with_no_others(self, entry, tmp_path):
        for name in ("tiny", "other"):
            shutil.copytree(entry / "rows", tmp_path / "all" / name)
        shutil.copytree(entry, tmp_path / "all" / "entries" / "mine")
        boards, damaged = boards_in([tmp_path / "all"])
        assert (damaged, [(board.name, len(board.entries)) for board in boards]) == ([], [("other", 0), ("tiny", 1)])
        assert len({len(board.rows) for board in boards}) == 1
        of = {table.board: frozenset().union(*(line.marks for line in table.lines)) for table in standings(boards)}
        assert {name: "self-reported" in marks for name, marks in of.items()} == {"other": False, "tiny": True}

    def test_authors_who_call_their_files_alike_both_stand_each_with_a_mark_of_their_own(self, made, entry, tmp_path):
        other = Path(shutil.copytree(entry, tmp_path / "other"))
        reseal(other, lambda said: said["about"].update(name="Other"))
        forge(other, lambda stored, examples: (with_code(stored, "f" * 32), examples), figures=True)
        ended = bench("verify", entry, "--code", f"{made[0] / 'my_defense.py'}:Rounded", "--by", "B", "--seed", 3)
        assert ended.code == 0, ended.out + ended.err
        boards, damaged = boards_in([tmp_path])
        assert damaged == []
        (table,) = standings(boards)
        whole, alone = ({line.defense: line for line in standings(boards_in([folder])[0])[0].lines}
                        for folder in (tmp_path, entry))  # fmt: skip
        (theirs,) = (name for name in whole if name.endswith("#ffffff"))
        (ours,) = (name for name in whole if name not in (theirs, "none"))
        marks = {ours: {"verified"}, theirs: {"self-reported"}}
        for name, mark in marks.items():
            found = [line for line in table.lines if line.defense == name]
            assert [line.attack for line in found] == ["worst of 2", "noise", "square"]
            assert all(line.marks & {"verified", "self-reported"} == mark for line in found)
        texts = [{head: share.text() for head, share in of[ours].shares.items()} for of in (whole, alone)]
        assert texts[0] == texts[1]
        assert table.notes == standings(boards_in([entry])[0])[0].notes, "nothing is left out"
        listed = bench("leaderboard", tmp_path).out
        assert f"- Other by A. Newcomer, =cmd|x ({theirs}): self-reported" in listed.replace("\\", "")

    def test_its_page_says_whose_it_is_and_others_pages_do_not(self, entry, tmp_path):
        about = {"summary": "One decimal.", "paper": "Rounding, 2026"}
        reseal(entry, lambda said: said["about"].update(**about))
        assert bench("site", entry, "--out", tmp_path / "site").code == 0
        (own,) = (tmp_path / "site" / "entry").glob("my-defense*.html")
        (none,) = (tmp_path / "site" / "entry").glob("none*.html")
        words = ("<b>Rounded</b> by A. Newcomer, =cmd|x, self-reported. <q>One decimal.</q>", "Rounding, 2026",
                 "https://example.org")  # fmt: skip
        for said in words:
            assert said in own.read_text()
            assert said not in none.read_text()

    def test_an_entry_of_another_version_than_todays_is_told_so(self, entry):
        reseal(entry, lambda said: said.update(suite="query-digits", board="query-digits v0"))
        assert "it answers query-digits v0, and the board is query-digits v1" in wrong(looked_at(entry))
        reseal(entry, lambda said: said.update(board="query-digits v1"))
        assert "the board is" not in wrong(looked_at(entry))


class TestTampering:
    def test_every_field_of_an_entry_but_its_authors_words_follows_from_the_rows(self, made):
        folder = made[0] / "entry"
        entry, said = read_entry(folder / ENTRY)
        files = said.pop("files")
        again = statement(Store(folder / "rows").rows()[0], entry.about, entry.suite, entry.board, entry.budgets)
        assert not list(differences(said, again))
        assert {field.alias or name for name, field in Entry.model_fields.items()} == {*said, "files", "sha256"}
        unseen = []
        for *path, last in leaves(said):
            changed = copy.deepcopy(said)
            place = changed
            for key in path:
                place = place[key]
            place[last] = altered(place[last])
            follows = again
            if path[:1] == ["about"] or last in ("suite", "board"):  # validate takes these from the entry
                continue
            if path[:1] == ["budgets"] or last == "budgets":
                rows, _ = Store(folder / "rows").rows()
                follows = statement(rows, entry.about, entry.suite, entry.board, changed["budgets"])
            if not list(differences(changed, follows)):
                unseen.append((*path, last))
        assert unseen == []
        assert len(files) == len(contents(folder))

    @pytest.mark.parametrize("name", [field.alias or name for name, field in Entry.model_fields.items()])
    def test_what_is_altered_without_a_new_seal_or_left_out_is_no_entry(self, entry, name):
        said = json.loads((entry / ENTRY).read_bytes())
        place, key = (said, name)
        while isinstance(place[key], dict | list) and place[key]:
            place, key = place[key], next(iter(place[key])) if isinstance(place[key], dict) else 0
        place[key] = altered(place[key])
        (entry / ENTRY).write_text(json.dumps(said, indent=1) + "\n")
        assert "schema: " in wrong(looked_at(entry))
        del said[name]
        (entry / ENTRY).write_text(json.dumps(said, indent=1) + "\n")
        assert "schema: " in wrong(looked_at(entry))

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda said: said["figures"][0].update({"@5": 1.0}), "figures[0].@5 is 1.0"),
            (lambda said: said["figures"][0].update(n=500), "figures[0].n is 500"),
            (lambda said: said["figures"].pop(), "figures is "),
            (lambda said: said["flags"].append(FLAG), "flags is ["),
            (lambda said: said.update(track="white-box"), "track is 'white-box'"),
            (lambda said: said.update(suite="query-digits"), "query-digits asks for"),
            (lambda said: said["data"][0].update(samples_hash="0" * 64), "samples_hash"),
            (lambda said: said["weights"].update({"my_defense.py:Means": "ab"}), "weights.my_defense.py:Means"),
            (lambda said: said["files"].popitem(), "is there and not listed"),
            (lambda said: said["files"].update(gone={"bytes": 1, "sha256": "0" * 64}), "gone is listed and not there"),
            (lambda said: next(iter(said["files"].values())).update(sha256="0" * 64), "is not the file"),
            (lambda said: said.update(dirty=not said["dirty"]), "dirty"),
            (lambda said: said.update(more=1), "more"),
            (lambda said: said["cost"].update(seconds="1"), "valid number"),
        ],
    )
    def test_one_that_is_sealed_anew_is_caught(self, entry, change, told):
        reseal(entry, change)
        assert told in wrong(looked_at(entry))

    def test_a_flipped_bit_of_a_sample_is_caught_whatever_checksums_are_made_anew(self, entry):
        def flip(stored, examples):
            stands = stored.records["first_hit"].where(stored.records["first_hit"] <= 0, NEVER)
            return stored._replace(columns=stored.records.assign(first_hit=stands)), examples

        forge(entry, flip, figures=False)
        assert "figures[0].@5 is " in wrong(looked_at(entry))

    def test_a_consistent_forgery_is_caught_by_asking_the_model_about_the_proof(self, made, entry):
        columns = ("final_pred", "clean_margin", "final_confidence", "norm_linf", "twin_pred", "final_nll", "y")

        def forged(stored, examples):
            records = stored.records.copy()
            for column in columns:
                values = records[column].to_numpy().copy()
                values[1] += 1 if values.dtype.kind == "i" else -0.1 if values[1] > 0.5 else 0.1
                records[column] = values
            hit = np.where(records["clean_pred"] != records["y"], 0, np.maximum(records["first_hit"], 1))
            return stored._replace(columns=records.assign(first_hit=hit)), examples  # which contradict nothing

        forge(entry, forged, figures=True)
        assert wrong(looked_at(entry)) == "", "what nobody else could know"
        said = wrong(validate(entry, LOADER, made[0] / "my_defense.py", CPU))
        assert [column for column in columns if f"{column} " not in said] == []

    def test_a_proof_outside_the_ball_or_of_no_numbers_is_caught_without_any_code(self, entry):
        def outside(stored, examples):
            examples = examples.clone()
            if is_defended(stored):
                examples[3, 0, 2, 2] = 1.2 if stored.shard.cell.attack.spec == "square" else float("nan")
            return stored, examples

        forge(entry, outside, figures=True)
        said = wrong(looked_at(entry, proof=True))
        assert "square | seed 0: 1 examples are outside the ball or the box" in said
        assert "noise | seed 0: an example has pixels that are no number" in said

    def test_a_renamed_cell_is_caught(self, entry):
        (folder,) = entry.glob("rows/*/none/square-*")
        folder.rename(folder.with_name("square-00000000"))
        assert "is listed and not there" in wrong(looked_at(entry))

    def test_an_attack_called_by_another_name_is_caught(self, made, entry):
        def renamed(stored, examples):
            cell, attack = stored.shard.cell, stored.shard.cell.attack
            if attack.spec == "noise":
                called = replace(cell, attack=replace(attack, spec="hop-skip-jump"))
                stored = stored._replace(shard=replace(stored.shard, cell=called))
            return stored, examples

        forge(entry, renamed, figures=True)
        said = wrong(looked_at(entry, made[0] / "my_defense.py", proof=True))
        assert "hop-skip-jump has other parameters here" in said

    def test_samples_of_the_authors_choice_are_caught(self, entry):
        def chosen(stored, examples):
            shard = stored.shard
            ids = (*shard.cell.ids[:-1], 499)
            records = stored.records.assign(sample_id=list(ids))
            return Stored(replace(shard, cell=replace(shard.cell, ids=ids)), records), examples

        forge(entry, chosen, figures=True)
        assert "samples are not the 12 that Parry takes" in wrong(looked_at(entry, proof=True))

    def test_source_that_is_not_what_ran_is_caught(self, entry):
        code = entry / "code" / "my_defense.py"
        code.write_text(code.read_text().replace("decimals: int = 1", "decimals: int = 9"))
        forge(entry, lambda *same: same, figures=False)
        assert "my_defense.py:Rounded has hash" in wrong(looked_at(entry))

    def test_cells_of_other_source_than_the_rest_are_caught_whichever_come_first(self, entry):
        for attack in ("square", "noise"):
            altered = Path(shutil.copytree(entry, entry.parent / attack))
            forge(altered, lambda stored, examples, of=attack: (
                with_code(stored, "f" * 32) if stored.shard.cell.attack.spec == of else stored, examples), figures=True)
            assert f"my_defense.py:Rounded has hash {'f' * 32}" in wrong(looked_at(altered))


class TestPictures:
    def test_examples_are_shown_beside_the_images_of_the_data_set_here(self, entry):
        stored = next(stored for path in entry.rglob(SHARDS) if is_defended(stored := read_shard(path)))
        row = Row(stored.shard.cell, stored.records, (stored.shard,))
        shown = PIL.Image.open(io.BytesIO(Pictures([entry], lambda: LOADER).of(row)))
        assert shown.format == "PNG"
        left, top = MARGIN + NAMES, MARGIN + 36 + 2 * 22 + 34  # below the title, two lines and the heads
        tile = np.asarray(shown.convert("L").crop((left, top, left + 128, top + 128)))
        records = stored.records
        fell = np.flatnonzero((records["final_pred"] != records["y"]) & (records["clean_pred"] == records["y"]))
        first = records["sample_id"].iloc[fell[0] if len(fell) else 0]
        _, data = LOADER.dataset("digits")
        assert (tile[8::16, 8::16] == data.test.images[first][0].numpy()).all()

    def test_without_examples_or_data_there_are_none_and_the_reason_is_told(self, entry):
        stored = read_shard(next(entry.rglob(SHARDS)))
        row = Row(stored.shard.cell, stored.records, (stored.shard,))
        assert Pictures([entry / "code"], lambda: LOADER).of(row) is None
        other = replace(row.cell, dataset=replace(row.cell.dataset, spec="npz(path=/etc/passwd)", title=""))
        pictures = Pictures([entry], lambda: LOADER)
        pictures._examples = {other.key[:8]: list(entry.rglob(f"*{SUFFIX}"))}
        assert pictures.of(replace(row, cell=other)) is None
        assert "names a path" in pictures.missing["npz(path=/etc/passwd)"]

    def test_a_site_of_rows_without_examples_takes_no_torch(self):
        code = "import sys, bench.cli.site; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_a_file_that_is_no_proof_of_these_samples_shows_nothing(self, entry, tmp_path):
        path = next(entry.rglob(SHARDS))
        stored = read_shard(path)
        row = Row(stored.shard.cell, stored.records, (stored.shard,))
        (proof,) = path.parent.glob(f"*{SUFFIX}")
        proof.write_bytes(write_examples(stored.shard.ids, torch.zeros(12, 1, 9, 9)))
        assert Pictures([entry], lambda: LOADER).of(row) is None
        (tmp_path / "elsewhere").write_bytes(write_examples(stored.shard.ids, torch.zeros(12, 1, 8, 8)))
        proof.unlink()
        proof.symlink_to(tmp_path / "elsewhere")
        assert Pictures([entry], lambda: LOADER).of(row) is None

    def test_entries_of_every_track_have_theirs(self):
        rows = [learner(wrong, 60, defense) for defense, wrong in (("none", 6), ("ops", 40))]
        for found in (rows, [row([-1, 5, 9], "rnd"), row([-1, -1, 9], "unig")]):
            (board,) = boards(tables(found), pictured=lambda row: PNG)
            assert [[picture.content for picture in entry.pictures] for entry in board.entries] == [[PNG]] * 2

    def test_a_sheet_that_is_a_link_or_no_picture_is_not_copied_into_a_site(self, tmp_path):
        (tmp_path / "secret").write_bytes(PNG + b"secret")
        (tmp_path / "link.png").symlink_to(tmp_path / "secret")
        (tmp_path / "page.png").write_text("<script>")
        (tmp_path / "real.png").write_bytes(PNG)
        assert [_png(tmp_path / f"{name}.png") for name in ("link", "page", "real", "gone")] == [None, None, PNG, None]


class TestHostile:
    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (b"", "no entry"), (b"[" * 100_000, "no entry"), (b'{"schema": NaN}', "no entry"), (b"\xff", "no entry"),
            (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "no entry"), (b"9" * 5000, "no entry"),
        ],
    )  # fmt: skip
    def test_what_is_no_entry_is_one_line(self, entry, text, told):
        (entry / ENTRY).write_bytes(text)
        ended = bench("validate", entry)
        assert ended.code == 1
        assert told in ended.out
        assert ended.err == ""

    def test_a_folder_without_one_says_what_to_name(self, tmp_path):
        told = f"{tmp_path} holds no {ENTRY}; name a folder that bench submit has written"
        assert told in wrong(looked_at(tmp_path))

    def test_a_key_that_is_there_twice_is_no_entry(self, entry):
        text = (entry / ENTRY).read_text().replace('"track": "query"', '"track": "data",\n "track": "query"')
        (entry / ENTRY).write_text(text)
        assert "not written as Parry writes it" in wrong(looked_at(entry))

    def test_links_and_strange_files_are_refused(self, entry, tmp_path):
        (entry / "code" / "link").symlink_to("/etc")
        assert "code/link is a link" in wrong(looked_at(entry))
        (entry / "code" / "link").unlink()
        (entry / ENTRY).rename(tmp_path / "elsewhere")
        (entry / ENTRY).symlink_to(tmp_path / "elsewhere")
        assert "is a link" in wrong(looked_at(entry))
        (entry / ENTRY).unlink()
        (tmp_path / "elsewhere").rename(entry / ENTRY)
        (entry / "setup.py").write_text("")
        assert "setup.py has no place in an entry" in wrong(looked_at(entry))

    def test_nothing_in_it_moves_the_cursor_or_is_a_formula(self, entry):
        reseal(entry, lambda said: said["about"].update(name="\x1b[2J<script>|"))
        ended = bench("leaderboard", entry)
        assert "\x1b" not in ended.out
        assert "\\<script>" in ended.out


def test_who_submits_a_trial_is_told_that_it_is_never_ranked():
    trial, whole = (last_words(Path("entries/mine"), trial) for trial in (True, False))
    assert ("never ranked" in trial, "git push" in trial) == (True, False)
    assert ("never ranked" in whole, "git push" in whole) == (False, True)
    assert all("bench validate entries/mine" in words for words in (trial, whole))


class TestVerify:
    def again(self, made: tuple[Path, Ended], folder: Path) -> Ended:
        code = ["--code", f"{made[0] / 'my_defense.py'}:Rounded", "--work", made[0] / "again"]
        return bench("verify", folder, "--fraction", 0.1, *code, "--by", "B. Referee", "--seed", 3)

    def test_an_entry_that_agrees_is_verified_until_it_is_altered(self, made, entry):
        ended = self.again(made, entry)
        assert ended.code == 0, ended.out + ended.err
        assert "0 of 40 samples in 4 cells ended otherwise" in ended.out
        assert "standing  verified by B. Referee" in bench("validate", entry).out
        assert "✓ entered, and a part of it run again" in bench("leaderboard", entry).out
        reseal(entry, lambda said: said["about"].update(summary="more"))
        assert f"of another {ENTRY}" in wrong(looked_at(entry))
        ended = bench("leaderboard", entry)
        assert ended.code == 2
        assert ": self-reported" in ended.out

    def test_a_consistent_forgery_that_no_proof_shows_does_not_agree(self, made, entry):
        def later(stored, examples):
            hits = stored.records["first_hit"]
            hits = hits.where((hits <= 0) | (not is_defended(stored)), np.minimum(hits + 2, 40))
            return stored._replace(columns=stored.records.assign(first_hit=hits, forwards=40)), examples

        forge(entry, later, figures=True)
        assert wrong(looked_at(entry, made[0] / "my_defense.py", proof=True)) == ""
        ended = self.again(made, entry)
        assert ended.code == 1
        assert "samples end otherwise, rounding allows 1" in ended.out
        assert not (entry / VERIFIED).exists()

    def test_without_the_code_it_says_what_to_name(self, entry):
        ended = bench("verify", entry)
        assert "name your own copy of it with --code" in ended.err
        assert (ended.code, ended.out) == (2, ""), "before anything is looked at"

    def test_other_code_than_that_of_the_entry_is_no_verification(self, entry, tmp_path, made):
        other = tmp_path / "my_defense.py"
        other.write_text((made[0] / "my_defense.py").read_text() + "# changed\n")
        ended = bench("validate", entry, "--code", other)
        assert ended.code == 1
        assert "the file that you named" in ended.out


def test_what_a_suite_of_ours_asks_for_is_what_its_cells_have_met():
    from bench.entries.plan import entry_suite
    from bench.plan.tasks import expand

    suite = entry_suite("query-digits", "rounding", ["cnn(width=2)"])
    there = {met(task.cell) for task in expand(suite, Loader(None, None))}
    assert there == required("query-digits", "rounding", ["cnn(width=2)"])
    assert len(there) == 26
