"""A service behind an endpoint: a real server on the loopback address that drops, delays, repeats and lies."""

import base64
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bench.errors import ConfigError, ServiceError, StoreError
from bench.measure.pipeline import Pipeline
from bench.models import resolve
from bench.results.store import Store
from bench.run import runner
from bench.service import Desk, Journal, Spent
from bench.service.http import _wait
from bench.service.journal import Key
from tests.runs import Quiet
from tests.test_cli import bench
from tests.test_service import fired, plan

BUNCH = load_digits()
MEANS = np.stack([(BUNCH.images[BUNCH.target == label] / 16).mean(0).ravel() for label in range(10)])
X = torch.from_numpy(BUNCH.images[:4, None] / 16).float()


def probabilities(images):
    scores = 2 * (images.reshape(len(images), -1) / 255) @ MEANS.T - (MEANS**2).sum(1)
    powers = np.exp(scores)
    return powers / powers.sum(axis=1, keepdims=True)


class Handler(BaseHTTPRequestHandler):
    """Answers one request as the next of ``server.script`` says, and well when that has run out."""

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            how = server.script.pop(0) if server.script else "well"
            server.requests.append((self.headers["Idempotency-Key"], how, dict(self.headers), body))
        if callable(how):
            return self.say(200, how(body))
        if how == "drop":
            return self.connection.close()
        if how == "delay":
            time.sleep(0.3)
        if isinstance(how, int):
            return self.say(how, {"error": "no"}, {"Retry-After": "0.05", "Location": "http://elsewhere.example/"})
        answer = json.dumps(self.answer(body)).encode()
        if how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer) + 10))
            self.end_headers()
            return self.wfile.write(answer)
        for _ in range(2 if how == "twice" else 1):
            self.say(200, answer)
        return None

    def answer(self, body):
        if "inputs" in body:
            (tensor,) = body["inputs"]
            found = probabilities(np.array(tensor["data"]).reshape(tensor["shape"]))
            return {"id": body["id"], "outputs": [{"shape": found.shape, "data": found.ravel().tolist()}]}
        images = body["instances"]
        if isinstance(images[0], dict):
            images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64"])))) for image in images]
        found = probabilities(np.array(images))
        return {"predictions": self.server.form(found)}

    def say(self, status, content, more=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments):  # of a client that has gone
        pass


@pytest.fixture
def server():
    with serving() as made:
        yield made


@contextmanager
def serving():
    made = Server(("127.0.0.1", 0), Handler)
    made.lock, made.script, made.requests, made.form = threading.Lock(), [], [], lambda found: found.tolist()
    made.url = f"http://127.0.0.1:{made.server_port}/predict"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def spec(server, **more):
    told = {"url": server.url, "backoff": 0.01, "batch": 2, **more}
    return f"http({', '.join(f'{key}={value!r}' for key, value in told.items())})"


def desk(server, path=None, most=float("inf"), **more):
    journal = Journal(path)
    journal.refresh()
    return Desk(resolve(spec(server, **more)).line(), 10, journal, most)


def images_of(server):
    """How many images the server was really asked about, each call once however often it was sent."""
    return sum({name: len(body["instances"]) for name, _, _, body in server.requests}.values())


def outcome(tasks, folder, most=float("inf")):
    store = Store(folder).open()
    pipeline = Pipeline(folder / "networks", torch.device("cpu"), 256, max_cost=most)
    pipeline.try_services(tasks)
    runner.run(tasks, store, pipeline, 100, 256, Quiet())
    return [store.row(task.cell) for task in tasks], pipeline.journals[0]


class TestTheLine:
    @pytest.mark.parametrize("schema", ["kserve-v1", "kserve-v1-png", "kserve-v2"])
    def test_speaks_each_schema(self, server, schema):
        found = desk(server, schema=schema).logits(X).softmax(dim=1)
        levels = (X * 255).round().permute(0, 2, 3, 1).numpy()
        assert np.allclose(found, probabilities(levels), atol=1e-6)

    @pytest.mark.parametrize("how", ["drop", "cut", "delay", 429, 500, 503])
    def test_sends_a_call_again_under_its_name(self, server, how):
        server.script = [how, how]
        asked = desk(server, batch=4, timeout=0.15 if how == "delay" else 30)
        right = desk(server, batch=4).logits(X)
        server.requests.clear()
        server.script = [how, how]
        assert torch.equal(asked.logits(X), right)
        assert len({name for name, *_ in server.requests}) == 1
        assert (asked.journal.questions, asked.journal.attempts) == (4, 3)

    def test_takes_no_answer_for_that_of_another_call(self, server):
        right = desk(server).logits(X)
        server.script = ["twice"] * 4
        assert torch.equal(desk(server).logits(X), right)

    def test_many_calls_at_once_keep_their_order(self, server):
        server.script = ["delay", 500, "well", "drop"]
        assert torch.equal(desk(server, batch=1, at_once=4).logits(X), desk(server).logits(X))

    def test_keeps_to_a_rate(self, server):
        began = time.monotonic()
        desk(server, batch=1, rate=40, at_once=4).logits(X)
        assert time.monotonic() - began >= 3 / 40

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            (lambda body: b"<html>", "no JSON: <html>"),
            (lambda body: {"predictions": [[0.1] * 10]}, "expected probabilities"),
            (lambda body: {"predictions": [[0.2] * 5] * 2}, "expected probabilities"),
            (lambda body: {"answers": []}, "another form than kserve-v1"),
            (lambda body: b'{"predictions": [[NaN,0,0,0,0,0,0,0,0,0],[1,0,0,0,0,0,0,0,0,0]]}', "NaN"),
            (lambda body: b"[" * 100_000, "no JSON"),
            (301, "redirects to http://elsewhere.example/, which is not followed"),
            (403, "status 403"),
            ("drop", "gives no answer .*, 2 times"),
        ],
    )
    def test_nonsense_is_an_error(self, server, how, said):
        server.script = [how] * 2
        with pytest.raises(ServiceError, match=said):
            desk(server, retries=1).logits(X[:2])

    def test_an_answer_without_end_is_an_error(self, server, monkeypatch):
        monkeypatch.setattr("bench.service.http.LARGEST", 100)
        with pytest.raises(ServiceError, match="more than"):
            desk(server).logits(X)

    def test_the_answer_to_another_call_is_an_error(self, server):
        server.script = [lambda body: {"id": "other", "outputs": []}]
        with pytest.raises(ServiceError, match="another call"):
            desk(server, schema="kserve-v2").logits(X[:2])

    def test_labels_and_the_best_classes(self, server):
        whole = desk(server).logits(X)
        server.form = lambda found: found.argmax(axis=1).tolist()
        assert desk(server, answers="labels").logits(X).argmax(dim=1).tolist() == whole.argmax(dim=1).tolist()
        server.form = lambda found: [
            [{"label": int(k), "score": float(row[k])} for k in np.argsort(-row)[:3]] for row in found
        ]
        best = desk(server, top=3).logits(X)
        assert torch.allclose(best.topk(3).values, whole.topk(3).values, atol=1e-6)

    def test_a_token_is_sent_and_never_kept(self, server, monkeypatch, tmp_path):
        monkeypatch.setenv("THE_TOKEN", "secret-words")
        desk(server, tmp_path / "journal", token="THE_TOKEN").logits(X)
        assert {headers["Authorization"] for _, _, headers, _ in server.requests} == {"Bearer secret-words"}
        assert "secret" not in (tmp_path / "journal").read_text()


def test_the_example_server_counts_what_the_journal_has(tmp_path):
    file = Path(__file__).parents[1] / "docs" / "digits_service.py"
    example: dict = {"__name__": "digits_service", "__file__": str(file)}
    exec(file.read_text(), example)
    with example["Service"](0, lambda x: x.flatten(1)[:, :10], trouble=0.5) as service:
        service.url = f"http://127.0.0.1:{service.server_port}/predict"
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        asked = desk(service, tmp_path / "journal", retries=20, backoff=0)
        shares = asked.logits(X).softmax(dim=1)
        service.shutdown()
        thread.join()
    assert torch.allclose(shares, X.flatten(1)[:, :10].softmax(dim=1), atol=1e-2)  # of 8-bit images
    assert service.counts() == {"calls": asked.journal.attempts, "images": 4}


class TestThePlan:
    @pytest.mark.parametrize(
        ("told", "said"),
        [
            ({"url": "ftp://host"}, "write https://"),
            ({"url": "https://me:word@host/"}, "holds a password"),
            ({"url": "http://host/", "token": "HOME"}, "for all to read"),
            ({"url": "https://host/", "token": "NOT_SET_ANYWHERE"}, "not set"),
            ({"url": "https://host/", "schema": "kserve-v1-png", "images": "float32"}, "8-bit"),
            ({"url": "https://host/", "answers": "labels", "top": 2}, "labels"),
            ({"url": "https://host/", "schema": "soap"}, "schema is 'soap'"),
        ],
    )
    def test_refuses_what_cannot_be_meant(self, told, said):
        with pytest.raises(ConfigError, match=said):
            resolve(f"http({', '.join(f'{key}={value!r}' for key, value in told.items())})")

    def test_how_it_is_asked_is_no_part_of_the_cell(self, server):
        keys = {plan(spec(server, **more), "square")[0].cell.key
                for more in ({}, {"batch": 5}, {"price": 1, "rate": 2.0}, {"retries": 0, "timeout": 1.0})}  # fmt: skip
        (other,) = plan(spec(server, release="2"), "square")
        assert len(keys) == 1
        assert other.cell.key not in keys
        assert other.cell.model.params["url"] == server.url
        assert server.requests == []

    def test_tries_it_before_slow_work(self, server, tmp_path):
        server.script = [lambda body: {"predictions": [3, 3]}]
        command = ["run", "--dataset", "digits", "--n", 4, "--model", spec(server), "--attack", "noise", "--quantise"]
        ended = bench(*map(str, command), "--out", tmp_path)
        assert ended.code == 2
        assert "expected probabilities" in ended.err
        assert len(ended.err.strip().splitlines()) == 1


class TestARun:
    def test_every_request_is_in_the_journal_and_the_ledger(self, server, tmp_path):
        server.script = ["well", 500, "drop", "well", "cut", 429]
        rows, journal = outcome(plan(spec(server), "square", n=6, queries=8), tmp_path)
        (row,) = rows
        assert row.complete, row.errors
        assert row.figures["asked"] == 6 + row.records["forwards"].sum() + 6
        assert images_of(server) == journal.questions == 2 + row.figures["asked"] + row.figures["probes"]
        assert len(server.requests) == journal.attempts
        assert fired(row) == set()

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the child uses none of our threads
    def test_a_run_that_is_killed_goes_on_without_asking_again(self, server, tmp_path):
        tasks = plan(spec(server, batch=1, random=True), "square", n=3, queries=4)
        whole, _ = outcome(plan(spec(server, batch=1), "square", n=3, queries=4), tmp_path / "whole")
        server.requests.clear()
        for seconds in (0.3, 0.5):
            if (child := os.fork()) == 0:
                outcome(tasks, tmp_path / "killed")
                os._exit(0)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        rows, journal = outcome(tasks, tmp_path / "killed")
        assert rows[0].records["first_hit"].tolist() == whole[0].records["first_hit"].tolist()
        sent = Counter(name for name, *_ in server.requests)
        assert sum(count > 1 for count in sent.values()) <= 2  # what was under way at a kill, under its name
        assert images_of(server) == journal.questions == 2 + rows[0].figures["asked"] + rows[0].figures["probes"]

    def test_it_ends_before_it_costs_more_than_it_may(self, server, tmp_path):
        tasks = plan(spec(server, price=0.1), "square", n=4, queries=4)
        with pytest.raises(Spent, match=r"of 1\.05 spent"):
            outcome(tasks, tmp_path, most=1.05)
        assert 9 <= images_of(server) <= 10
        rows, journal = outcome(tasks, tmp_path, most=1000)
        assert rows[0].complete
        assert images_of(server) == journal.questions
        assert journal.spent == pytest.approx(0.1 * images_of(server))
        outcome(tasks, tmp_path, most=0)  # all is done, which costs nothing
        assert images_of(server) == journal.questions

    def test_the_command_says_what_it_cost(self, server, tmp_path):
        command = ["run", "--dataset", "digits", "--n", 3, "--model", spec(server, price=0.5), "--attack", "noise",
                   "--quantise", "--queries", 2, "--out", tmp_path]  # fmt: skip
        stopped = bench(*map(str, command), "--max-cost", "20")
        assert stopped.code == 1
        assert "20 of 20 spent" in stopped.err
        assert "a larger --max-cost resumes" in stopped.err
        ended = bench(*map(str, command))
        assert ended.code == 0, ended.err
        assert f"{images_of(server):,} questions asked in all, {images_of(server) / 2:g} spent" in ended.out


class TestTheJournal:
    def test_mends_a_line_that_a_kill_has_cut(self, server, tmp_path):
        file = tmp_path / "journal"
        right = desk(server, file).logits(X)
        asked = len(server.requests)
        with file.open("ab") as torn:
            torn.write(b'{"sent":"ab')
        assert torch.equal(desk(server, file).logits(X), right)
        assert len(server.requests) == asked

    def test_a_line_that_the_disk_took_in_part_is_taken_back(self, tmp_path, monkeypatch):
        journal = Journal(tmp_path / "journal")
        journal.refresh()
        keys = [Key("scope", "digest", number) for number in (1, 2)]
        name = journal.sent("scope", keys[:1], 1.0)

        def full(file, content):
            file.write(content[:9])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("bench.service.journal._all", full)
            with pytest.raises(StoreError, match="No space left"):
                journal.sent("scope", keys[1:], 1.0)
        journal.answered(name, np.ones((1, 3), dtype=np.float32), 1)  # of a call that was under way meanwhile
        again = Journal(journal.path)
        again.refresh()
        assert (list(again.answers), again.spent) == (keys[:1], 1.0)

    def test_one_that_a_kill_has_left_empty_has_a_name_of_its_own(self, tmp_path):
        file = tmp_path / "journal"
        file.write_bytes(b'{"journal":1,"ru')
        names = []
        for _ in range(2):
            journal = Journal(file)
            journal.refresh()
            names.append(journal.name([Key("scope", "digest", 1)]))
        assert names[0] == names[1]

    def test_damage_is_named(self, server, tmp_path):
        file = tmp_path / "journal"
        desk(server, file).logits(X)
        file.write_bytes(file.read_bytes().replace(b'"answered"', b'"forgotten"', 1))
        with pytest.raises(StoreError, match=r"journal is damaged .*, and all is asked anew"):
            desk(server, file)

    def test_a_failed_call_is_asked_again_and_paid_once(self, server, tmp_path):
        file = tmp_path / "journal"
        server.script = ["drop"]
        with pytest.raises(ServiceError):
            desk(server, file, retries=0, price=1, batch=4).logits(X)
        again = desk(server, file, most=4, price=1, batch=4)
        again.logits(X)
        assert (again.journal.spent, again.journal.questions, again.journal.attempts) == (4, 4, 2)


def test_a_service_says_when_to_come_again():
    assert (_wait("1.5"), _wait(None), _wait("soon"), _wait("-3")) == (1.5, 0, 0, 0)
    assert _wait("Wed, 01 Jan 2200 00:00:00 GMT") > 1e9
