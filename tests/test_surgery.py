"""Combiners against float64 references written here, independently of the implementation."""
import math

import numpy as np
import pytest
import torch

from unlearn_wb.surgery import Combiner

SHAPES = ((7, 3), (5,), (2, 2, 2))


def gradients(seed, conflict, scale=1.0):
    g = np.random.default_rng(seed)
    u, r = ([g.standard_normal(s) * scale for s in SHAPES] for _ in range(2))
    dot = sum((a * b).sum() for a, b in zip(u, r))
    if (dot < 0) != conflict: u = [-a for a in u]
    return u, r


def flat(xs): return np.concatenate([np.asarray(x, dtype=np.float64).ravel() for x in xs])


def reference(rule, u, r, lam, w):
    d, uu, rr = u @ r, u @ u, r @ r
    if rule == "sum": return u + w * r
    if rule == "surgery": return u - lam * min(d, 0) / rr * r
    if rule == "restricted": return u + w * r if d >= 0 else (u - d / rr * r) + w * (r - d / uu * u)
    if rule == "official":
        cu = u * min(1, 1 / (math.sqrt(uu) + 1e-6))
        return cu if d >= 0 else cu - lam * d / math.sqrt(uu * rr) * r / math.sqrt(rr)


@pytest.mark.parametrize("rule", ["sum", "surgery", "restricted", "official"])
@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("scale", [1e-6, 0.03, 1.0, 1e4])
def test_rules_agree_with_float64(rule, conflict, scale):
    for seed in range(5):
        u, r = gradients(seed, conflict, scale)
        want = reference(rule, flat(u), flat(r), lam=0.7, w=1.3)
        tu, tr = ([torch.tensor(x, dtype=torch.float32) for x in side] for side in (u, r))
        stats = Combiner(rule, lam=0.7, weight=1.3)(tu, tr)
        got = flat([x.numpy() for x in tu])
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
        assert stats.conflict == conflict
        assert stats.angle == pytest.approx(math.degrees(math.acos(flat(u) @ flat(r) / np.linalg.norm(flat(u)) / np.linalg.norm(flat(r)))), abs=1e-3)


@pytest.mark.parametrize("rule", ["surgery", "restricted"])
def test_per_tensor_is_the_rule_on_each_tensor(rule):
    for seed in range(5):
        u, r = gradients(seed, True)
        want = [reference(rule, a.ravel(), b.ravel(), 1.0, 1.0) for a, b in zip(u, r)]
        tu, tr = ([torch.tensor(x) for x in side] for side in (u, r))
        Combiner(rule, "tensor")(tu, tr)
        for a, b in zip(tu, want): np.testing.assert_allclose(a.numpy().ravel(), b, rtol=1e-9, atol=1e-12)


def test_scaling_both_scales_the_step():
    for rule in ("sum", "surgery", "restricted"):
        out = []
        for scale in (1.0, 1024.0):
            u, r = gradients(3, True)
            tu, tr = ([torch.tensor(x) * scale for x in side] for side in (u, r))
            Combiner(rule)(tu, tr)
            out.append(flat([x.numpy() for x in tu]) / scale)
        np.testing.assert_allclose(*out, rtol=1e-12)


def test_retained_gradient_is_left_alone_and_the_result_is_in_place():
    u, r = gradients(0, True)
    tu, tr = ([torch.tensor(x) for x in side] for side in (u, r))
    where = [x.data_ptr() for x in tu]
    Combiner("surgery")(tu, tr)
    assert [x.data_ptr() for x in tu] == where
    assert all((a.numpy() == b).all() for a, b in zip(tr, r))


def test_sum_of_many_numbers_is_exact_enough():
    n = 4_000_000
    g = torch.Generator().manual_seed(0)
    u = [torch.rand(n // 8, generator=g) for _ in range(8)]
    r = [torch.rand(n // 8, generator=g) for _ in range(8)]
    exact = math.sqrt(sum(float((x.double() ** 2).sum()) for x in u))
    assert Combiner("surgery")(u, r).norm_u == pytest.approx(exact, rel=2e-5)


def test_zero_retaining_gradient_changes_nothing():
    u = [torch.ones(3)]
    stats = Combiner("surgery")(u, [torch.zeros(3)])
    assert torch.equal(u[0], torch.ones(3)) and math.isnan(stats.angle) and not stats.conflict


def test_torchjd_aggregators_by_name():
    from torchjd.aggregation import MGDA
    u, r = ([torch.tensor(x, dtype=torch.float32) for x in side] for side in gradients(1, True))
    want = MGDA()(torch.stack([torch.cat([x.flatten() for x in side]) for side in (u, r)]))
    Combiner("MGDA")(u, r)
    torch.testing.assert_close(torch.cat([x.flatten() for x in u]), want)


def test_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="not finite"):
        Combiner("surgery")([torch.tensor([float("nan")])], [torch.ones(1)])
