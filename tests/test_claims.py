"""Who is at what work, and what is swept once nobody is."""

import os
import threading
import time

import pytest

from bench.errors import StoreError
from bench.scratch import Scratch, sweep
from bench.system.claims import CLAIMS, Held, claim, present


def test_a_claim_is_exclusive_and_leaves_nothing(tmp_path):
    file = tmp_path / "claims" / "work.lock"
    with claim(file), pytest.raises(Held), claim(file):
        pass
    with claim(file):
        pass
    assert not file.parent.exists()


def test_claims_beside_each_other_do_not_mind_that_their_folder_comes_and_goes(tmp_path):
    errors, taken = [], []

    def work(number):
        for _ in range(100):
            try:
                with claim(tmp_path / "claims" / f"{number}.lock"):
                    taken.append(number)
            except Held:
                pass
            except StoreError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(taken) == {0, 1, 2, 3}


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "nowhere"):
        with pytest.raises(StoreError, match="cannot lock"), claim(tmp_path / name / "work.lock"):
            pass


def test_what_killed_runs_left_is_swept_by_one_that_is_alone(tmp_path):
    half = tmp_path / "cell" / ".000000-000100.json.0123abcd.tmp"
    opening = tmp_path / ".writable.0123abcd.tmp"  # of a run that is just coming in
    for file in (half, opening, tmp_path / CLAIMS / "run-00.lock", tmp_path / CLAIMS / "shard.lock"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    swept = []
    with present(tmp_path, lambda: swept.append(1)):
        assert not half.exists()
        assert opening.exists()
        half.touch()  # ours now
        with present(tmp_path, lambda: swept.append(2)):
            assert half.exists()
    assert swept == [1]
    assert not (tmp_path / CLAIMS).exists()
    os.utime(opening, (time.time() - 7200,) * 2)
    with present(tmp_path, lambda: None):
        assert not opening.exists()


def test_unfinished_work_is_kept_for_as_long_as_it_can_be_gone_on_with(tmp_path):
    for name, code in {"useful": "now", "finished": "now", "stale": "before"}.items():
        Scratch(tmp_path / name, code).save("piece", 1)
    (tmp_path / "useful.lock").touch()
    sweep(tmp_path, "now", lambda name: name == "finished")
    assert [path.name for path in tmp_path.iterdir()] == ["useful"]
    sweep(tmp_path, "later", lambda name: False)
    assert not tmp_path.exists()
