"""What an attack, or a model, writes into changes nothing of what is counted and judged."""

import copy
import pickle

import pytest
import torch

from bench.errors import AccessError, RefereeError, ThreatViolation
from bench.losses import margin
from bench.oracle import NEVER, Oracle
from tests.problems import Linear, Recorded, images, referee


def problem(**settings):
    model, x = Linear(), images(4)
    y = model(x).argmax(1)
    return referee(model, x, y, **settings), model, x, y


@pytest.mark.parametrize("name", ["ledger", "query_budget", "scores", "surrogate", "anything", "_x", "_threat"])
def test_an_attack_can_write_to_nothing(name):
    handle = problem()[0].oracle
    assert type(handle) is Oracle
    with pytest.raises(AttributeError):
        setattr(handle, name, 10**9)
    assert handle.query_budget == 50


@pytest.mark.parametrize("name", ["ledger", "finish", "live", "_x", "_y", "_model", "_rng", "_referee", "__dict__"])
def test_an_attack_reaches_neither_ledger_nor_model(name):
    with pytest.raises(AttributeError):
        getattr(problem()[0].oracle, name)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_queries_to_a_copy_cannot_be_had(duplicate):
    with pytest.raises(AccessError, match="copy"):
        duplicate(problem()[0].oracle)


def test_writing_into_the_images_moves_no_ball():
    oracle, model, x, y = problem(eps=0.05)
    kept = x.clone()
    x += 0.5
    y += 1
    with pytest.raises(ThreatViolation):
        oracle.scores(x)
    oracle = referee(model, kept.clone(), model(kept).argmax(1), eps=0.05)
    assert torch.equal(oracle.finish(kept), kept)
    assert (oracle.ledger.first_hit == NEVER).all()


@pytest.mark.parametrize("spelling", ["in place", "data", "numpy"])
def test_a_model_that_writes_into_its_input_is_answered_and_judged_as_if_it_did_not(spelling):
    class Writes(Linear):
        def forward(self, x):
            logits = super().forward(x)
            if spelling == "in place":
                x.sub_(0.4)
            elif spelling == "data":
                x.data.sub_(0.4)
            else:
                x.detach().numpy()[...] -= 0.4
            return logits

    model, x = Linear(), images(4)
    y = 1 - model(x).argmax(1)  # every query beats
    for access in ("scores", "gradients"):
        query = x + 0.01
        oracle = referee(Writes(), x, y, access=access)
        scores = oracle.scores(query) if access == "scores" else oracle.gradients(query, margin)[0]
        assert torch.equal(scores, model(query))
        assert torch.equal(query, x + 0.01)
        assert torch.equal(oracle.finish(x), x + 0.01)


def test_what_was_asked_stays_the_hit_whatever_becomes_of_the_tensor():
    model, x = Linear(), images(4)
    oracle = referee(model, x, 1 - model(x).argmax(1))
    query = x + 0.01
    oracle.scores(query)
    query.zero_()
    assert torch.equal(oracle.finish(x), x + 0.01)


def test_answers_are_the_attack_s_own():
    buffer = torch.zeros(4, 2, dtype=torch.float64)

    class Same(Linear):
        def forward(self, x):
            return buffer.copy_(super().forward(x))

    _, model, x, y = problem()
    oracle = referee(Same(), x, y)
    first = oracle.scores(x)
    oracle.scores(x + 0.01)
    assert torch.equal(first, model(x))


def test_the_labels_that_a_loss_is_given_are_its_own():
    oracle, _, x, _ = problem(access="gradients")

    def loss(logits, labels):
        value = margin(logits, labels.clone())
        labels.fill_(0)
        return value

    assert torch.equal(oracle.gradients(x, loss)[1], oracle.gradients(x, margin)[1])
    assert torch.equal(oracle.gradients(x, loss, oracle.active())[1], oracle.gradients(x, margin)[1])


def test_writing_into_the_rows_is_an_error():
    oracle, _, x, _ = problem()
    oracle.active().copy_(torch.tensor([1, 0, 2, 3]))
    with pytest.raises(RefereeError, match="rows"):
        oracle.scores(x, oracle.active())
    with pytest.raises(RefereeError, match="rows"):
        oracle.finish(x)


@pytest.mark.parametrize("rows", [torch.tensor([True, False, True, False]), torch.tensor([0.0, 1.0])])
def test_rows_are_positions(rows):
    oracle, _, x, _ = problem()
    with pytest.raises(ThreatViolation, match="positions"):
        oracle.scores(x[:2], rows)


def test_a_query_for_each_row():
    oracle, _, x, _ = problem()
    for queries, rows in [(x[:1], None), (x[:1], torch.tensor([0, 1])), (x[:, :1], None), (x[:3], oracle.active())]:
        with pytest.raises(ThreatViolation, match="asked about images"):
            oracle.scores(queries, rows)


def test_the_ball_stands_while_samples_drop_out():
    model, x = Linear(), images(4)
    y = model(x).argmax(1)
    y[0] = 1 - y[0]
    recorded = Recorded(model)
    oracle = referee(recorded, x, y, eps=0.05)
    oracle.scores(x, oracle.active())
    rows = oracle.active()
    assert rows.tolist() == [1, 2, 3]
    assert oracle.scores(x[rows] + 0.049, rows).isfinite().all()
    with pytest.raises(ThreatViolation):
        oracle.scores(x[rows.flip(0)], rows)
