"""The referee counts, refuses and remembers; no attack can do otherwise."""

import math

import pytest
import torch

from bench.errors import AccessError, RefereeError, ThreatViolation
from bench.losses import margin
from bench.oracle import NEVER
from bench.oracle.referee import REFRESH
from tests.problems import Linear, Noisy, Scripted, images, referee


def scripted(wrong_at, n=3, **settings):
    x, y = images(n), torch.zeros(n, dtype=torch.int64)
    return referee(Scripted(wrong_at), x, y, **settings), x


@pytest.mark.parametrize("wrong_at", [1, 4, 9, 10])
def test_first_hit_is_the_number_of_the_first_misclassified_query(wrong_at):
    oracle, x = scripted(wrong_at, budget=9)
    for _ in range(20):
        oracle.scores(x)
    expected = wrong_at if wrong_at <= 9 else NEVER
    assert oracle.ledger.first_hit.tolist() == [expected] * 3
    assert oracle.ledger.forwards.tolist() == [min(wrong_at, 9)] * 3  # never a query more
    assert len(oracle.active()) == 0


@pytest.mark.parametrize(("probes", "looks"), [(1, 16), (5, 4), (16, 1), (40, 1)])
def test_looking_again_waits_for_queries_not_for_calls(probes, looks):
    """As on a GPU, where a look at who is still alive waits for the device."""
    oracle, x = scripted(1, budget=99)
    oracle._refresh = REFRESH
    rows = oracle.active()
    for call in range(1, looks + 1):
        oracle.scores(x[:, None].expand(-1, probes, -1, -1, -1))  # the first of all queries beats every sample
        assert (oracle.active() is rows) == (call < looks)
    assert len(oracle.active()) == 0


def test_the_beaten_and_the_spent_get_no_answers():
    oracle, x = scripted(2, budget=5)
    assert oracle.scores(x).isfinite().all()
    assert oracle.scores(x).isfinite().all()  # the hit itself is answered
    assert oracle.scores(x).isnan().all()
    assert (oracle.labels(x) == -1).all()


def test_several_queries_in_one_call_count_in_order():
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    model = Linear()
    y = model(x).argmax(1)
    far = x.clone()
    far[0] = x[0] - 0.2 * (model.weight[y[0]] - model.weight[1 - y[0]]).sign().view(3, 8, 8)  # beaten for sure
    oracle = referee(model, x, y, eps=0.2, budget=3)
    probes = torch.stack((x, far, x, x), dim=1)  # (2, 4, C, H, W)
    scores = oracle.scores(probes)
    assert oracle.ledger.first_hit.tolist() == [2, NEVER]
    assert oracle.ledger.forwards.tolist() == [2, 3]
    assert scores[0, 2:].isnan().all()
    assert scores[1, 3:].isnan().all()
    assert torch.equal(oracle.finish(x)[0], far[0])  # the query that beat it is its final example


def test_only_those_asked_about_are_charged():
    oracle, x = scripted(99)
    rows = torch.tensor([2, 0])
    oracle.scores(x[rows], rows)
    assert oracle.ledger.forwards.tolist() == [1, 0, 1]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5)])
@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_the_ball_is_enforced_at_its_surface(norm, eps, factor):
    oracle, x = scripted(99, norm=norm, eps=eps)
    step = eps if norm == "linf" else eps / (3 * 8 * 8) ** 0.5
    query = x + factor * step
    if factor < 1:
        assert oracle.scores(query).isfinite().all()
        return
    with pytest.raises(ThreatViolation, match=rf"blind left the {norm} .* on 3 of 3 samples"):
        referee(Scripted(99), x, torch.zeros(3, dtype=torch.int64), norm=norm, eps=eps, attack="blind").scores(query)


def test_the_box_and_nan_are_refused():
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    for bad in (x - 0.01, x.clone().fill_(torch.nan)):
        with pytest.raises(ThreatViolation):
            referee(Scripted(99), x, y).scores(bad)


class TestMinimumNorm:
    """Queries may leave the ball, never the box; only what is misclassified inside the ball beats a sample."""

    def probes(self, radii):
        """Two samples at distance 0.08 from the boundary in linf, asked at ``radii`` along the shortest way."""
        model = Linear()
        x = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
        w = (model.weight[0] - model.weight[1]).view(3, 8, 8)
        x += 0.08 * w.sign() * torch.tensor([1, -1]).view(2, 1, 1, 1)  # at 0.5 the classes tie
        y = torch.tensor([0, 1])
        way = -w.sign() * torch.tensor([1, -1]).view(2, 1, 1, 1)
        return model, x, y, [x + radius * way for radius in radii]

    @pytest.mark.parametrize("together", [False, True])
    @pytest.mark.parametrize(("eps", "first_hit", "forwards"), [(0.05, NEVER, 5), (0.082, 5, 5), (0.09, 4, 4)])
    def test_only_a_misclassified_query_inside_the_ball_is_a_hit(self, eps, first_hit, forwards, together):
        model, x, y, queries = self.probes([0.3, 0.07, 0.2, 0.085, 0.081])
        oracle = referee(model, x, y, eps=eps, access="labels", minimal=True)
        labels = oracle.labels(torch.stack(queries, 1)) if together else torch.stack([*map(oracle.labels, queries)], 1)
        wrong = torch.tensor([True, False, True, True, True])[:forwards]
        assert torch.equal(labels[:, :forwards] != y[:, None], wrong.expand(2, -1))
        assert (labels[:, forwards:] == -1).all()
        assert oracle.ledger.first_hit.tolist() == [first_hit] * 2
        assert oracle.ledger.forwards.tolist() == [forwards] * 2
        nearest = 0.085 if first_hit == 4 else 0.081
        assert oracle.ledger.best_distance.tolist() == pytest.approx([nearest] * 2)
        final = oracle.finish(x)
        assert torch.equal(final, x if first_hit == NEVER else queries[first_hit - 1])

    def test_who_roams_falls_inside_alone_too_and_has_no_distance(self):
        model, x, y, (far, near) = self.probes([0.3, 0.085])
        oracle = referee(model, x, y, eps=0.09, roams=True)
        assert (oracle.scores(far).argmax(1) != y).all()
        assert oracle.ledger.first_hit.tolist() == [NEVER] * 2
        oracle.scores(near)
        assert oracle.ledger.first_hit.tolist() == [2] * 2
        assert oracle.ledger.best_distance.isinf().all()

    def test_the_best_margin_is_one_of_the_ball(self):
        model, x, y, (far, near) = self.probes([0.3, 0.07])
        oracle = referee(model, x, y, eps=0.07, minimal=True)
        oracle.scores(far)
        oracle.scores(near)
        assert torch.equal(oracle.ledger.best_margin, margin(model(near), y))

    def test_distances_are_those_of_what_was_asked(self):
        model, x, y, (query,) = self.probes([0.1])
        x, query = (x * 255).round() / 255, (query * 255).round() / 255 + 0.4 / 255
        oracle = referee(model, x, y, eps=0.01, minimal=True, quantise=True)
        oracle.scores(query)
        levels = oracle.ledger.best_distance * 255
        assert torch.allclose(levels, levels.round(), atol=1e-9)

    def test_the_box_and_the_returned_example_are_held_as_ever(self):
        model, x, y, (far,) = self.probes([0.3])
        with pytest.raises(ThreatViolation, match=r"by up to 0\.25;"):
            referee(model, x, y, minimal=True).scores(x * 0 - 0.25)
        with pytest.raises(ThreatViolation):
            referee(model, x, y, minimal=True).scores(far * torch.nan)
        with pytest.raises(ThreatViolation):
            referee(model, x, y, eps=0.05, minimal=True).finish(far)


class Told(torch.nn.Module):
    """Answers with the margins it was told, call after call, one list of draws for each sample."""

    def __init__(self, *calls):
        super().__init__()
        self.calls = list(calls)

    def forward(self, x):
        values = torch.tensor(self.calls.pop(0)).double().flatten()
        return torch.stack((values, torch.zeros_like(values)), dim=1)


class TestAveraging:
    """The queries of a call are draws of one image, paid for one by one and judged by their mean."""

    def ask(self, *calls, **settings):
        n, k = torch.tensor(calls[0]).shape
        x = images(n)
        oracle = referee(Told(*calls), x, torch.zeros(n, dtype=torch.int64), averages=True, **settings)
        scores = [oracle.scores((x + 0.01 * call)[:, None].expand(-1, k, -1, -1, -1)) for call in range(len(calls))]
        return oracle, scores, x

    def test_the_mean_decides_and_all_draws_are_paid_for(self):
        oracle, scores, x = self.ask([[-2, 1, 2, 3], [2, 1, 2, -6]], [[4, -1, -1, -3], [-9, -9, -9, -9]])
        assert oracle.ledger.first_hit.tolist() == [8, 4]  # one lucky draw is none, nor is one unlucky draw a rescue
        assert oracle.ledger.forwards.tolist() == [8, 4]
        assert oracle.ledger.best_margin.tolist() == [-0.25, -0.25]
        assert scores[0][0, :, 0].tolist() == [-2, 1, 2, 3]  # the attack sees every draw
        assert scores[1][1].isnan().all()
        assert torch.equal(oracle.finish(x), torch.stack((x[0] + 0.01, x[1])))

    @pytest.mark.parametrize(("second", "first_hit"), [([-3, 1, 9], 5), ([1, -0.5, -9], NEVER), ([-1, -1, 9], 5)])
    def test_a_call_cut_short_is_judged_by_the_draws_that_were_answered(self, second, first_hit):
        oracle, scores, _ = self.ask([[1, 1, 1]], [second], budget=5)
        assert oracle.ledger.first_hit.tolist() == [first_hit]
        assert oracle.ledger.forwards.tolist() == [5]
        assert scores[1][0, :, 0].isnan().tolist() == [False, False, True]

    def test_one_draw_is_one_query(self):
        model, x = Linear(), images(20)
        y = model(x).argmax(1)
        plain, averaged = (referee(model, x, y, eps=0.1, averages=averages) for averages in (False, True))
        for step in (0.002, -0.005, 0.01):
            query = x + step * model.weight[0].sign().view(3, 8, 8)
            assert torch.equal(plain.scores(query).nan_to_num(), averaged.scores(query[:, None])[:, 0].nan_to_num())
        assert torch.equal(plain.ledger.first_hit, averaged.ledger.first_hit)
        assert 0 < (plain.ledger.first_hit == NEVER).sum() < 20

    def test_other_images_cannot_hide_among_the_draws(self):
        model, x = Linear(), images(1)
        y = model(x).argmax(1)
        far = x - 0.2 * (model.weight[y] - model.weight[1 - y]).sign().view_as(x)  # beaten for sure
        oracle = referee(model, x, y, eps=0.2, averages=True)
        scores = oracle.scores(torch.stack((x, far, far), dim=1))
        assert torch.allclose(scores, model(x)[:, None])
        assert oracle.ledger.first_hit.tolist() == [NEVER]

    def test_one_invalid_draw_spoils_the_mean(self):
        oracle, _, _ = self.ask([[-1, math.nan, -1]])
        assert oracle.ledger.invalid.all()
        assert oracle.ledger.first_hit.tolist() == [NEVER]
        assert oracle.ledger.forwards.tolist() == [3]


def test_an_example_returned_from_outside_is_refused():
    oracle, x = scripted(99)
    with pytest.raises(ThreatViolation):
        oracle.finish(x + 0.1)
    with pytest.raises(ThreatViolation, match="expected x_adv like x"):
        oracle.finish(x.float())


@pytest.mark.parametrize("returned", [None, 3.0, [1]])
def test_an_attack_that_returns_no_tensor_is_told_what_to_return(returned):
    oracle, _ = scripted(99)
    with pytest.raises(RefereeError, match="return x_adv, a tensor like x"):
        oracle.finish(returned)


@pytest.mark.parametrize(("access", "denied"), [("labels", ["scores", "gradients"]), ("scores", ["gradients"])])
def test_access_is_what_the_threat_grants(access, denied):
    oracle, x = scripted(99, access=access)
    calls = {"scores": lambda: oracle.scores(x), "gradients": lambda: oracle.gradients(x, margin)}
    for call in denied:
        with pytest.raises(AccessError, match=f"grants {access}"):
            calls[call]()
    assert (oracle.labels(x) == 0).all()


def test_scores_carry_no_graph():
    model = Linear()
    x = images(2)
    oracle = referee(model, x, model(x).argmax(1))
    assert not oracle.scores(x.clone().requires_grad_(True)).requires_grad


def test_gradients_are_those_of_each_sample_and_cost_a_backward_pass():
    model = Linear()
    x = images(4)
    y = model(x).argmax(1)
    oracle = referee(model, x, y, access="gradients", budget=2)
    logits, gradient = oracle.gradients(x, margin)
    true = (model.weight[y] - model.weight[1 - y]).view_as(x)
    assert torch.allclose(gradient, true)
    assert torch.equal(logits, model(x))
    assert oracle.ledger.backwards.tolist() == [1] * 4
    oracle.scores(x)
    assert oracle.gradients(x, margin)[1].abs().max() == 0  # spent
    assert oracle.ledger.backwards.tolist() == [1] * 4


def test_invalid_outputs_count_as_queries_and_never_as_success():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), torch.nan, dtype=x.dtype)

    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    oracle = referee(Broken(), x, y)
    oracle.scores(x)
    assert oracle.ledger.invalid.all()
    assert oracle.ledger.forwards.tolist() == [1, 1]
    assert (oracle.ledger.first_hit == NEVER).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_quantised_queries_are_whole_levels_inside_the_ball(norm):
    seen = []

    class Recorder(Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    x = (images(4) * 255).round() / 255
    model = Recorder()
    oracle = referee(model, x, model(x).argmax(1), norm=norm, eps=0.1, quantise=True)
    delta = images(4, seed=2) - 0.5
    scale = delta.abs().amax() if norm == "linf" else delta.flatten(1).norm(dim=1).amax()
    oracle.scores(x + 0.1 * delta / scale)
    levels = seen[-1] * 255
    assert torch.allclose(levels, levels.round(), atol=1e-9)
    change = seen[-1] - x
    size = change.abs().amax() if norm == "linf" else change.flatten(1).norm(dim=1).amax()
    assert size <= 0.1  # 25.5 levels: in linf, rounding alone would step over the surface
    if norm == "linf":
        assert size * 255 == pytest.approx(25)


def test_noise_depends_on_sample_and_query_number_alone():
    model = Noisy(Linear())
    x = images(6)
    y = Linear()(x).argmax(1)
    whole = referee(model, x, y, random=True, eps=0.1)
    first, second = whole.scores(x), whole.scores(x)
    assert not torch.equal(first, second)
    alone = referee(model, x[4:5], y[4:5], random=True, eps=0.1, ids=torch.tensor([4]))
    assert torch.allclose(alone.scores(x[4:5])[0], first[4], equal_nan=True)
    assert torch.allclose(alone.scores(x[4:5])[0], second[4], equal_nan=True)


class TestForeignView:
    def test_rows_are_recognised_in_any_order_and_number(self):
        model = Linear()
        x = images(5)
        oracle = referee(model, x, model(x).argmax(1), access="gradients")
        view = oracle.as_module()
        rows = torch.tensor([3, 0, 4])
        assert torch.equal(view(x[rows] + 0.01), model(x[rows] + 0.01))
        assert oracle.ledger.forwards.tolist() == [1, 0, 0, 1, 1]

    def test_backward_passes_are_counted(self):
        model = Linear()
        x = images(3)
        oracle = referee(model, x, model(x).argmax(1), access="gradients")
        query = x.clone().requires_grad_(True)
        oracle.as_module()(query).sum().backward()
        assert oracle.ledger.backwards.tolist() == [1, 1, 1]
        assert torch.allclose(query.grad, model.weight.sum(dim=0).view(1, 3, 8, 8).expand_as(x))

    def test_the_spent_hear_their_last_answer_again(self):
        oracle, x = scripted(99, budget=1)
        view = oracle.as_module()
        assert torch.equal(view(x), view(x))
        assert oracle.ledger.forwards.tolist() == [1, 1, 1]

    def test_scores_access_gives_no_graph(self):
        oracle, x = scripted(99)
        assert not oracle.as_module()(x.requires_grad_(True)).requires_grad
