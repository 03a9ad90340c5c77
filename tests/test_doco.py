"""One DoCo step on a tiny random pipeline equals the formulas, written here again in float64."""
import copy

import pytest
import torch
from conftest import tiny_pipeline

from unlearn_wb.concepts import Erasure
from unlearn_wb.diffusion import Denoiser
from unlearn_wb.methods.doco import DoCo, DoCoConfig
from unlearn_wb.loop import Trainer


def make(prediction="epsilon", **changes):
    model = Denoiser(tiny_pipeline(prediction), "tiny")
    erasure = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet", "Picasso"))
    config = DoCoConfig(**{**dict(iterations=6, warmup=1, batch_size=4, num_images=4, prompts=4, lr=1e-3, disc_lr=1e-3, clip=0., weight_decay=0.), **changes})
    return DoCo(model, [erasure], config)


def in_double(method):
    "UNet, original UNet and discriminator as float64 copies."
    unet = copy.deepcopy(method.model.unet).double()
    original = copy.deepcopy(unet)
    with torch.no_grad():
        for k, p in original.named_parameters():
            if k in method.moved.start: p.copy_(method.moved.start[k])
    return unet, original, copy.deepcopy(method.D).double()


def prediction(unet, b, c, abar, kind):
    out = unet(b.x_t.double(), b.t, c.double()).sample
    a = abar[b.t].double().view(-1, 1, 1, 1)
    return out if kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * b.x_t.double()


def view(sees, b, eps, abar):
    a = abar[b.t].double().view(-1, 1, 1, 1)
    x0 = (b.x_t.double() - (1 - a).sqrt() * eps) / a.sqrt()
    if sees == "x0_hat": return x0
    prev = torch.tensor([float(abar[t - 1]) if t > 0 else 1. for t in b.t.tolist()], dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, beta = a / prev, 1 - a / prev
    return prev.sqrt() * beta / (1 - a) * x0 + alpha.sqrt() * (1 - prev) / (1 - a) * b.x_t.double()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sees,adversarial", [("x0_hat", "non-saturating"), ("x_prev", "saturating")])
def test_losses_and_gradients_are_the_formulas(kind, sees, adversarial):
    method = make(kind, sees=sees, adversarial=adversarial)
    unet, original, D = in_double(method)
    abar, (b, r) = method.model.abar, method.batch(3)
    fake = D(view(sees, b, prediction(unet, b, b.c, abar, kind), abar))
    want_u = -torch.log(torch.sigmoid(fake)).mean() if adversarial == "non-saturating" else torch.log(1 - torch.sigmoid(fake)).mean()
    want_r = (r.eps.double() - prediction(unet, r, r.c, abar, kind)).square().mean()
    moving = [dict(unet.named_parameters())[k] for k in method.params]
    for loss, want in ((method.unlearning_loss, want_u), (method.retaining_loss, want_r)):
        for p in method.params.values(): p.grad = None
        got = loss((b, r))
        got.backward()
        assert got.item() == pytest.approx(want.item(), rel=1e-4)
        reference = torch.autograd.grad(want, moving, retain_graph=True)
        scale = max(float(g.abs().max()) for g in reference)
        for p, g in zip(method.params.values(), reference): assert float((p.grad.double() - g).abs().max()) < 2e-3 * scale
    assert all(p.grad is None for p in method.D.parameters()), "the generator's pass leaks into D"


def test_discriminators_turn_is_the_formula():
    method = make()
    unet, original, D = in_double(method)
    abar, (b, r) = method.model.abar, method.batch(0)
    with torch.no_grad():
        target, anchor = (view("x0_hat", b, prediction(u, b, c, abar, "epsilon"), abar) for u, c in ((unet, b.c), (original, b.other)))
    want = -torch.log(torch.sigmoid(D(anchor))).mean() - torch.log(1 - torch.sigmoid(D(target))).mean()
    assert method.warm_up((b, r))["loss_d"] == pytest.approx(want.item(), rel=1e-4)


def test_the_anchor_side_is_the_frozen_original_also_after_steps():
    method = make()
    for _ in Trainer(method): pass
    assert any(not torch.equal(p, method.moved.start[k]) for k, p in method.params.items())
    _, original, _ = in_double(method)
    b, _ = method.batch(99)
    want = view("x0_hat", b, prediction(original, b, b.other, method.model.abar, "epsilon"), method.model.abar)
    torch.testing.assert_close(method.anchor_view(b).double(), want, rtol=1e-3, atol=1e-3)


def test_a_frozen_anchor_is_looked_at_before_the_step_and_a_moving_one_after_it(monkeypatch):
    "On a GPU the first look fills the time in which the step's numbers are read; it changes nothing."
    def steps(side, early=True):
        order, method = [], make(iterations=3, warmup=0, anchor_side=side)
        if not early: method.meanwhile = lambda *parts: None
        look = method.anchor_view
        monkeypatch.setattr(method, "anchor_view", lambda b: order.append("look") or look(b))
        trainer = Trainer(method)
        update = trainer.optimizer.step
        monkeypatch.setattr(trainer.optimizer, "step", lambda: order.append("step") or update())
        rows = [s.values for s in trainer]
        return order, [{k: v for k, v in r.items() if k != "seconds"} for r in rows], [p.detach() for p in (*method.params.values(), *method.D.parameters())]
    order, rows, weights = steps("frozen")
    assert order == ["look", "step"] * 3 and steps("moving")[0] == ["step", "look"] * 3
    late, same, equal = steps("frozen", early=False)
    assert late == ["step", "look"] * 3 and rows == same and all(torch.equal(a, b) for a, b in zip(weights, equal))


def test_warm_up_moves_only_the_discriminator():
    method = make(iterations=4, warmup=3)
    trainer = Trainer(method)
    d = [p.clone() for p in method.D.parameters()]
    for step in trainer:
        if step.index == 3: break
    assert all(torch.equal(p, method.moved.start[k]) for k, p in method.params.items())
    assert any(not torch.equal(a, b) for a, b in zip(d, method.D.parameters()))


def test_same_seed_same_result_other_seed_another():
    results = []
    for seed in (0, 0, 1):
        method = make(seed=seed)
        for _ in Trainer(method): pass
        results.append(torch.cat([p.detach().flatten() for p in method.params.values()]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("preset", ["paper", "released", "default"])
def test_presets_run(preset):
    from unlearn_wb.methods.doco import PRESETS
    method = make(**{k: v for k, v in PRESETS[preset].items() if k != "lr"})
    steps = list(Trainer(method))
    assert len(steps) == 6 and all(s.values["loss_d"] > 0 for s in steps)
    if preset == "released": # no gradient through the start token's keys and values: a prompt's first state does not matter to the gradient
        kv = [m for n, m in method.model.unet.named_modules() if n.endswith("attn2.to_k")][0]
        x = torch.randn(1, 5, 16, requires_grad=True)
        kv(x).sum().backward()
        assert (x.grad[:, 0] == 0).all() and (x.grad[:, 1:] != 0).any()


def test_each_concept_can_have_its_own_discriminator():
    model = Denoiser(tiny_pipeline(), "tiny")
    erasures = [Erasure.find(model, c, kind="style", retain=("Monet",)) for c in ("Van Gogh", "Picasso")]
    method = DoCo(model, erasures, DoCoConfig(iterations=4, warmup=2, batch_size=6, num_images=8, prompts=8, d_each=True))
    b, _ = method.batch(0)
    who, z = method.owner[b.which], torch.randn(6, 4, 8, 8)
    assert set(who.tolist()) == {0, 1}
    one_by_one = torch.cat([method.D.each[k](z[i:i + 1]) for i, k in enumerate(who.tolist())])
    assert torch.allclose(method.score(z, b), one_by_one, atol=1e-5)
    before = [copy.deepcopy(D.state_dict()) for D in method.D.each]
    for _ in Trainer(method): pass
    assert all(any(not torch.equal(v, D.state_dict()[k]) for k, v in old.items()) for D, old in zip(method.D.each, before))
