"""Every method's losses and gradients on a tiny random pipeline equal its formulas, written here again in float64."""
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_pipeline
from torch.func import functional_call

from unlearn_wb.concepts import Cache, Erasure, token_spans
from unlearn_wb.diffusion import Denoiser
from unlearn_wb.loop import Trainer
from unlearn_wb.methods import advanchor, allbutone, amnesia, conabl, doco, esd, fmn, integrity, mace, receler, rg, salun, sdd, spm, uce
from unlearn_wb.registry import METHODS
from unlearn_wb.scopes import Adapters

SMALL = dict(iterations=4, batch_size=4, num_images=8, prompts=6, lr=1e-3, precision="fp32")
MAKE = {
    "conabl": (conabl.ConAbl, conabl.ConAblConfig), "esd": (esd.ESD, esd.ESDConfig), "sdd": (sdd.SDD, sdd.SDDConfig), "rg": (rg.RG, rg.RGConfig), "salun": (salun.SalUn, salun.SalUnConfig),
    "saddle": (integrity.Saddle, integrity.SaddleConfig), "ovw": (integrity.OVW, integrity.OVWConfig), "amnesia": (amnesia.Amnesia, amnesia.AmnesiaConfig),
    "advanchor": (advanchor.AdvAnchor, advanchor.AdvAnchorConfig), "spm": (spm.SPM, spm.SPMConfig), "fmn": (fmn.FMN, fmn.FMNConfig), "allbutone": (allbutone.AllButOne, allbutone.AllButOneConfig),
    "mace": (mace.MACE, mace.MACEConfig), "receler": (receler.Receler, receler.RecelerConfig), "doco": (doco.DoCo, doco.DoCoConfig)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return Cache(tmp_path_factory.mktemp("painted"))


def build(name, kind="epsilon", concept="Van Gogh", **changes):
    model = Denoiser(tiny_pipeline(kind), "tiny")
    erasure = Erasure.find(model, concept, kind="style" if concept == "Van Gogh" else "instance", retain=("Monet", "Picasso") if concept == "Van Gogh" else ("cat", "bear"))
    make, config = MAKE[name]
    small = {**SMALL, **({"images": "target"} if name in ("esd", "sdd", "spm", "receler") else {}), **changes}
    return make(model, [erasure], config(**small))


class Exact:
    "The moving and the original denoiser in float64, apart from the implementation."
    def __init__(self, method, kind="epsilon", move=.02):
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in method.params.values(): p.add_(move * torch.randn(p.shape, generator=g))
        self.method, self.kind, self.abar = method, kind, method.model.abar.double()
        self.unet = tiny_pipeline(kind).unet.double().requires_grad_(False).eval()
        self.unet.load_state_dict({k: v.double() for k, v in method.model.unet.state_dict().items()})
        self.leaves = {k: p.detach().double().requires_grad_(True) for k, p in method.params.items()}
        if isinstance(method.moved, Adapters):
            at = lambda k: dict(self.unet.named_parameters())[f"{k}.weight"]
            self.original = {f"{k}.weight": at(k) for k in method.moved.layers}
            self.moving = {f"{k}.weight": at(k) + self.leaves[f"{k}.up"] @ self.leaves[f"{k}.down"] for k in method.moved.layers}
        else: self.original, self.moving = {k: w.double() for k, w in method.moved.start.items()}, self.leaves

    def eps(self, b, c, weights=None):
        out = functional_call(self.unet, self.moving if weights is None else weights, (b.x_t.double(), b.t, c.double())).sample
        if self.kind == "epsilon": return out
        a = self.abar[b.t].view(-1, 1, 1, 1)
        return a.sqrt() * out + (1 - a).sqrt() * b.x_t.double()

    def eps0(self, b, c):
        with torch.no_grad(): return self.eps(b, c, self.original)

    def attention(self, b, c, weights=None):
        "Cross-attention probabilities from queries and keys, caught by hooks."
        caught, hooks, out = {}, [], {}
        for k, m in self.unet.named_modules():
            if k.endswith((".attn2.to_q", ".attn2.to_k")): hooks.append(m.register_forward_hook(lambda mod, args, y, k=k: caught.__setitem__(k, y)))
        self.eps(b, c, weights)
        for h in hooks: h.remove()
        for k in [k[:-5] for k in caught if k.endswith(".to_q")]:
            heads = self.unet.get_submodule(k).heads
            q, key = (caught[f"{k}.{x}"].reshape(len(b.t), -1, heads, caught[f"{k}.{x}"].shape[-1] // heads).permute(0, 2, 1, 3) for x in ("to_q", "to_k"))
            out[k] = torch.softmax(q @ key.mT / q.shape[-1] ** .5, -1)
        return out

    def agree(self, loss, want, batch, rel=1e-4):
        for p in self.method.params.values(): p.grad = None
        got = loss(batch)
        got.backward()
        assert got.item() == pytest.approx(want.item(), rel=rel, abs=1e-9)
        wanted = torch.autograd.grad(want, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        scale = max(float(g.abs().max()) for g in wanted if g is not None)
        assert scale > 0, "nothing to compare"
        for (k, p), g in zip(self.method.params.items(), wanted):
            g = torch.zeros_like(self.leaves[k]) if g is None else g * self.mask(k)
            assert float(((p.grad if p.grad is not None else 0 * p).double() - g).abs().max()) < 3e-3 * scale, k

    def mask(self, k): return self.method.mask[k].double() if hasattr(self.method, "mask") else 1.


mse = lambda a, b: (a - b).square().mean()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_conabl(kind):
    m = build("conabl", kind)
    x, batch = Exact(m, kind), m.batch(1)
    b, r = batch
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), x.eps(b, b.other).detach()), batch)
    x.agree(m.retaining_loss, mse(x.eps(r, r.c), r.eps.double()), batch)
    m = build("conabl", kind, loss="noise")
    x, batch = Exact(m, kind), m.batch(1)
    x.agree(m.unlearning_loss, mse(x.eps(batch[0], batch[0].c), batch[0].eps.double()), batch)


@pytest.mark.parametrize("scope", ["xattn", "noxattn", "full", "adapter"])
def test_esd(scope):
    m = build("esd", scope=scope, eta=1.7)
    x, (b, _) = Exact(m), m.batch(1)
    null = m.null.expand(4, -1, -1)
    plain, told = x.eps0(b, null), x.eps0(b, b.c)
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), plain - 1.7 * (told - plain)), (b, None))


def test_esd_erases_an_attribute_from_a_concept():
    m = build("esd", erase_from="cat")
    x, (b, _) = Exact(m), m.batch(1)
    null, kept = m.null.expand(4, -1, -1), m.model.embed(["a painting of a cat"]).expand(4, -1, -1)
    x.agree(m.unlearning_loss, mse(x.eps(b, kept), x.eps0(b, kept) - 2 * (x.eps0(b, b.c) - x.eps0(b, null))), (b, None))


def test_sdd():
    m = build("sdd", ema=.9)
    x, (b, _) = Exact(m), m.batch(1)
    teacher = {k: .9 * m.moved.start[k].double() + .1 * w.detach() for k, w in x.leaves.items()}
    m.after((b, None))
    with torch.no_grad(): goal = x.eps(b, m.null.expand(4, -1, -1), teacher)
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), goal), (b, None))


@pytest.mark.parametrize("truncate, truncated", [(.01, "rescale"), (100., "rescale"), (100., "skip")])
def test_rg(truncate, truncated):
    m = build("rg", truncate=truncate, truncated=truncated)
    x, batch = Exact(m), m.batch(1)
    b, r = batch
    loss = mse(x.eps(b, b.c), b.eps.double())
    x.agree(m.unlearning_loss, -loss / loss.detach() if loss > truncate else -loss, batch)
    x.agree(m.retaining_loss, mse(x.eps(r, r.c), r.eps.double()), batch)
    m = build("rg", forget=False, combiner="sum")
    x, batch = Exact(m), m.batch(1)
    x.agree(m.unlearning_loss, mse(x.eps(batch[1], batch[1].c), batch[1].eps.double()), batch)
    assert m.retaining_loss(batch) is None and m.name == "Finetune"


@pytest.mark.parametrize("share", [.1, .5])
def test_salun(share):
    m = build("salun", share=share)
    kept = sum(float(v.sum()) for v in m.mask.values()) / sum(v.numel() for v in m.mask.values())
    assert kept == pytest.approx(share, abs=1e-4)
    x, batch = Exact(m), m.batch(1)
    b, _ = batch
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), x.eps(b, b.other).detach()), batch)
    m = build("salun", share=share, lr=1e-2)
    for _ in Trainer(m): pass
    for k, p in m.params.items(): assert torch.equal(p[m.mask[k] == 0], m.moved.start[k][m.mask[k] == 0])
    # the mask keeps the weights with the largest gradient of the forgetting loss
    fresh = build("salun", share=share)
    params = list(fresh.params.values())
    forget = lambda b: torch.autograd.grad(-F.mse_loss(fresh.eps(b), b.eps), params)
    total = [sum(g) for g in zip(*[forget(fresh.batch(-1 - k)[0]) for k in range(8)])]
    inside, outside = (torch.cat([t.abs()[fresh.mask[k] == v] for k, t in zip(fresh.params, total)]) for v in (1, 0))
    assert inside.min() >= outside.max()


def test_saddle():
    m = build("saddle", price=3., budget=.01, dual_lr=7.)
    x, batch = Exact(m), m.batch(1)
    b, r = batch
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), x.eps0(b, b.other)), batch)
    drift = mse(x.eps(r, r.c), x.eps0(r, r.c))
    x.agree(m.retaining_loss, 3 * drift, batch)
    assert m.after(batch)["mu"] == pytest.approx(max(0, 3 + 7 * (drift.item() - .01)), rel=1e-4)


def test_ovw():
    m = build("ovw", tau=.1, negatives=1)
    x, batch = Exact(m), m.batch(1)
    b, r = batch
    far = torch.stack([(x.eps(b, b.c) - x.eps0(b, c)).square().mean((1, 2, 3)) for c in (b.other, b.c, r.c)])
    want = -torch.log(torch.exp(-far[0] / .1) / torch.exp(-far / .1).sum(0)).mean()
    x.agree(m.unlearning_loss, want, batch)


def test_amnesia():
    m = build("amnesia", ewc=.3)
    x, batch = Exact(m), m.batch(1)
    b, r = batch
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), b.eps.double()), batch)
    springs = sum((m.fisher[k].double() * (w - m.moved.start[k].double()).square()).sum() for k, w in x.leaves.items())
    x.agree(m.retaining_loss, mse(x.eps(r, r.c), r.eps.double()) + .15 * springs, batch)


@pytest.mark.parametrize("norm", [False, True])
def test_advanchor(norm):
    m = build("advanchor", norm=norm)
    x, (b, _) = Exact(m), m.batch(1)
    with torch.no_grad(): m.adversary.e.normal_(generator=torch.Generator().manual_seed(0))
    anchor, prompts = b.c.clone(), [m.banks[0].target[i] for i in b.which]
    for k, prompt in enumerate(prompts):
        for span in token_spans(m.model, prompt, "Van Gogh"): anchor[k, span] += m.adversary.e.detach()
    assert torch.allclose(m.adversary.anchor(b), anchor)
    b.other = anchor
    null = m.null.expand(4, -1, -1)
    far = lambda a, c: (a - c).flatten(1).norm(dim=1).mean() if norm else mse(a, c)
    x.agree(m.unlearning_loss, far(x.eps(b, b.c), x.eps0(b, anchor)), (b, None))
    x.agree(m.retaining_loss, far(x.eps(b, null), x.eps0(b, null)), (b, None))


@pytest.mark.parametrize("loss", ["adv1", "adv2"])
def test_adversarys_turn_is_the_formula(loss):
    m = build("advanchor", anchor_loss=loss, anchor_steps=1)
    x, (b, _) = Exact(m), m.batch(1)
    with torch.no_grad(): m.adversary.e.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    e = m.adversary.e.detach().double().requires_grad_(True)
    slot = m.adversary.slots[b.which]
    anchor = b.c.double() + torch.where((slot >= 0)[..., None], e[slot.clamp(min=0)], 0.)
    null = x.eps0(b, m.null.expand(4, -1, -1)) if loss == "adv2" else 0.
    near, own = (x.eps(b, anchor, x.original) - null).flatten(1), (x.eps0(b, b.c) - null).flatten(1)
    want = ((near * own).sum(1) / near.norm(dim=1) / own.norm(dim=1)).mean()
    before = m.adversary.e.detach().clone()
    found = m.adversary.turn(b)
    assert found["similarity"] == pytest.approx(want.item(), rel=1e-4)
    grad, = torch.autograd.grad(want, e)
    assert float((m.adversary.rows[0].grad.double() - grad).abs().max()) < 1e-2 * float(grad.abs().max())
    step = m.adversary.e.detach() - before  # Adam's first step: lr against the gradient's sign
    clear = grad.abs() > 1e-3 * grad.abs().max()
    assert torch.equal(step[clear].sign(), -grad[clear].sign().float())
    assert all(p.requires_grad for p in m.params.values()) and torch.equal(b.other, m.adversary.anchor(b).detach())


def test_each_concepts_adversary_stops_at_its_own_zero(monkeypatch):
    one, two = build("advanchor", anchor_steps=3), build("advanchor", concept="Snoopy")
    m = advanchor.AdvAnchor(one.model, one.erasures + two.erasures, one.config)
    a, (b, _) = m.adversary, m.batch(1)
    whose = a.owner[b.which]
    assert set(whose.tolist()) == {0, 1}
    grown = lambda b: 1e-3 * (a.anchor(b) - b.c).flatten(1).sum(1)
    monkeypatch.setattr(a, "similarity", lambda b, concept=None: torch.where(whose == 0, -.5, .9) + grown(b))
    before = [r.clone() for r in a.rows]
    found = a.turn(b)
    assert torch.equal(a.rows[0], before[0]) and not torch.equal(a.rows[1], before[1])
    assert found["anchor_steps"] == 3 and found["similarity"] == pytest.approx(.2, abs=.01)
    assert torch.equal(a.e, torch.cat(a.rows))


def test_adversary_stands_on_the_concepts_own_tokens_anywhere_and_twice():
    m = build("advanchor")
    prompt = "Van Gogh and a cat by Van Gogh"
    spans = token_spans(m.model, prompt, "Van Gogh")
    assert len(spans) == 2 and all(len(s) == len(spans[0]) > 1 for s in spans)
    bank = m.banks[0]
    m.banks = [type(bank)((prompt,), ("a cat",), ())]
    a = advanchor.Adversary(m)
    assert [i for i, s in enumerate(a.slots[0].tolist()) if s >= 0] == sorted(i for s in spans for i in s)
    assert a.slots[0][spans[0]].tolist() == a.slots[0][spans[1]].tolist() == list(range(len(spans[0])))


def test_allbutone():
    m = build("allbutone", guide=1.5, stretch=.3)
    x, (b, _) = Exact(m), m.batch(1)
    states = m.model.embed(list(m.banks[0].target))
    high, low = states.max(0).values, states.min(0).values
    end = torch.where(high - b.c > b.c - low, high.expand_as(b.c), low.expand_as(b.c))
    c, null = b.other + .3 * (end - b.other), m.null.expand(4, -1, -1)
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), x.eps0(b, null) + 1.5 * (x.eps0(b, c) - x.eps0(b, null))), (b, None))


def test_spm():
    m = build("spm", eta=.7, anchor_texts=3)
    x, batch = Exact(m), m.batch(1)
    b, _ = batch
    target, anchor = x.eps0(b, b.c), x.eps0(b, b.other)
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), anchor - .7 * (target - anchor)), batch)
    c = torch.stack([b.z[i % 3] for i in range(4)])
    x.agree(m.retaining_loss, mse(x.eps(b, c), x.eps0(b, c)), batch)
    plain = tiny_pipeline().unet(b.x_t, b.t, b.c).sample
    with m.moved.scaled(0.), torch.no_grad(): assert torch.equal(m.model.unet(b.x_t, b.t, b.c).sample, Denoiser(tiny_pipeline(), "t").unet(b.x_t, b.t, b.c).sample)
    assert not torch.allclose(m.eps(b), plain, atol=1e-6)
    assert not torch.equal(m.random_texts(1, 3), m.random_texts(2, 3)) and torch.equal(m.random_texts(1, 3), m.random_texts(1, 3))


def test_spm_results_add_up():
    base, a, b = {"w": torch.zeros(2)}, {"w": torch.tensor([1., 0.])}, {"w": torch.tensor([0., 2.])}
    assert spm.compose(base, [a, b])["w"].tolist() == [1, 2] and spm.compose(base, [a, b], [2., .5])["w"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="which the base model does not have"): spm.compose(base, [{"v": torch.zeros(2)}])


@pytest.mark.parametrize("tokens", ["concept", "tail"])
def test_fmn(tokens):
    m = build("fmn", tokens=tokens)
    x, (b, _) = Exact(m), m.batch(1)
    maps, where = x.attention(b, b.c), torch.zeros(4, m.model.max_tokens, dtype=torch.float64)
    for k, i in enumerate(b.which):
        span = token_spans(m.model, m.banks[0].target[i], "Van Gogh")[-1]
        where[k, span if tokens == "concept" else list(range(span[0], m.model.max_tokens))] = 1
    want = torch.stack([(a.square() * where[:, None, None]).sum(-1).mean() for a in maps.values()]).mean()
    x.agree(m.unlearning_loss, want, (b, None))


def test_mace():
    m = build("mace", mask=1.2)
    x, (b, _) = Exact(m, move=.1), m.batch(1)
    own = m.mine[b.which].double()[:, None, None]
    with torch.no_grad(): look = {k: (a * own).sum(-1) for k, a in x.attention(b, b.c, x.original).items()}
    maps = x.attention(b, b.c)
    want = torch.stack([(a.square() * own * (look[k] > 1.2 * look[k].mean(-1, keepdim=True))[..., None]).sum(-1).mean() for k, a in maps.items()]).mean()
    x.agree(m.unlearning_loss, want, (b, None), rel=1e-3)


def test_receler():
    m = build("receler", local=0., soft_tokens=0)
    x, (b, _) = Exact(m, move=.1), m.batch(1)
    null = m.null.expand(4, -1, -1)
    plain, told = x.eps0(b, null), x.eps0(b, b.c)
    x.agree(m.unlearning_loss, mse(x.eps(b, b.c), plain - (told - plain)), (b, None))
    m = build("receler", soft_tokens=2, soft_steps=3)
    b = m.batch(1)[0]
    before = m.soft.clone()
    m.attack(b)
    assert not torch.equal(before, m.soft) and all(p.grad is None for p in m.params.values()), "the attack moves the soft tokens alone"


def test_uce_solves_its_normal_equations():
    model = Denoiser(tiny_pipeline(), "tiny")
    e = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet", "Picasso"))
    m = uce.UCE(model, [e], uce.UCEConfig(ridge=.3))
    m.solve()
    for k, w in m.params.items():
        w, w0 = w.detach().double(), m.moved.start[k].double()
        c, a, p = m.c_e.double(), m.c_a.double(), m.c_p.double()
        left = w0 @ a.T @ c + w0 @ p.T @ p + .3 * w0
        right = c.T @ c + p.T @ p + .3 * torch.eye(c.shape[1], dtype=torch.float64)
        assert float((w @ right - left).abs().max()) < 1e-5 * float(left.abs().max())
    assert len(m.c_e) == 1  # the concept's last token


GRADIENT = [n for n in METHODS if n != "uce"]


@pytest.mark.parametrize("scope", ["xattn-kv", "xattn", "adapter"])
@pytest.mark.parametrize("combiner", ["sum", "surgery", "restricted", "UPGrad"])
def test_methods_combiners_and_scopes_compose(combiner, scope, cache):
    "All methods with all combiners and scopes for two steps; those that do not fit say why."
    from dataclasses import replace
    refused = {}
    for name in GRADIENT:
        model = Denoiser(tiny_pipeline(), "tiny")
        e = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet",))
        try:
            config = replace(METHODS[name].defaults(model, e), **{**SMALL, "iterations": 2, "batch_size": 2, "num_images": 4, "combiner": combiner, "scope": scope, "anchor_steps": 1, **({"warmup": 1} if name == "doco" else {})})
            method = METHODS[name].make(model, [e], config, cache)
        except ValueError as why: refused[name] = str(why); continue
        before = {k: p.detach().clone() for k, p in method.params.items()}
        rows = [s.row() for s in Trainer(method)]
        assert len(rows) == 2 and any(not torch.equal(before[k], p) for k, p in method.params.items()), name
    want = {"mace", "receler"}
    if scope != "adapter": want |= {"spm"}
    if combiner != "sum": want |= {"saddle"}
    if combiner == "UPGrad": want |= {"esd", "sdd", "spm", "fmn", "allbutone"}
    assert set(refused) == want, refused
    assert all("\n" not in s and ";" in s for s in refused.values())


@pytest.mark.parametrize("anchors", ["nothing", "adversarial"])
def test_anchors_are_an_argument_of_every_method_that_has_one(anchors, cache):
    from dataclasses import replace
    takes, refuses = [], []
    for name in GRADIENT:
        model = Denoiser(tiny_pipeline(), "tiny")
        e = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet",))
        try:
            method = METHODS[name].make(model, [e], replace(METHODS[name].defaults(model, e), **{**SMALL, "iterations": 2, "batch_size": 2, "num_images": 4, "anchors": anchors, "anchor_steps": 1, **({"images": "target"} if name == "spm" else {}), **({"warmup": 1} if name == "doco" else {})}), cache)
            for _ in Trainer(method): pass
            takes.append(name)
        except ValueError as why:
            assert "pulls to no anchor" in str(why) or "finds its own anchor" in str(why)
            refuses.append(name)
    assert set(refuses) - {"advanchor", "advanchor-adv2"} == {"esd", "sdd", "rg", "rgd", "graddiff", "finetune", "fmn", "mace", "receler"} and {"doco", "conabl", "spm", "salun", "ovw", "saddle"} <= set(takes) and ("advanchor" in takes) == (anchors == "adversarial")


@pytest.mark.parametrize("name", GRADIENT)
def test_resume_is_exact(name, cache):
    "Left after two of four steps and entered again, every method ends with the same bits."
    from dataclasses import replace
    def make():
        model = Denoiser(tiny_pipeline(), "tiny")
        e = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet",))
        return METHODS[name].make(model, [e], replace(METHODS[name].defaults(model, e), **{**SMALL, "batch_size": 2, "num_images": 4, "anchor_steps": 1, **({"warmup": 1} if name == "doco" else {}), **({"soft_every": 1} if name == "receler" else {})}), cache)
    whole, first, second = make(), make(), make()
    for _ in Trainer(whole): pass
    for step in (t := Trainer(first)):
        if step.index == 2: break
    saved = {k: v.clone() for k, v in t.state().items()}
    again = Trainer(second)
    again.load_state(saved)
    for _ in again: pass
    for k, p in whole.params.items(): assert torch.equal(p, second.params[k]), k


def test_rg_as_released_skips_the_ascent_above_the_truncation():
    m = build("rg", truncate=.01, truncated="skip")
    loss = m.unlearning_loss(m.batch(1))
    assert loss.item() == -1 and not any(g.any() for g in torch.autograd.grad(loss, list(m.params.values()))), "l / l is 1, whatever the weights"


def test_a_preset_of_a_method_under_another_name_keeps_what_makes_it_that():
    model = Denoiser(tiny_pipeline(), "tiny")
    e = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet",))
    of = lambda name, preset="default": METHODS[name].defaults(model, e, preset)
    assert of("rgd").diverse and of("rgd", "paper").diverse and not of("rg", "paper").diverse
    assert of("rgd", "released").diverse and of("rgd", "released").truncated == "skip"
    assert of("advanchor-adv2", "paper").anchor_loss == "adv2" and of("advanchor-adv2", "paper").norm and of("advanchor", "paper").anchor_loss == "adv1"
    deep = lambda: (of("conabl-deep") == of("conabl", "deep"), of("conabl-deep").scope, of("conabl").lr / of("conabl-deep").lr)
    assert deep() == (True, "full", pytest.approx(5))
    with pytest.raises(ValueError, match="unknown preset 'papr'; did you mean 'paper'"): of("rgd", "papr")
    model = Denoiser.load()
    e = Erasure.find(model, "Van Gogh")
    assert of("advanchor-adv2") == of("advanchor", "adv2") and of("advanchor-adv2").anchor_lr == pytest.approx(10 * of("advanchor").anchor_lr), "adv2 stops by itself"
    assert of("advanchor-adv2", "paper").anchor_lr == of("advanchor", "paper").anchor_lr, "but the paper's has one learning rate"
    assert deep() == (True, "full", pytest.approx(5)) and of("conabl-deep").lr > 1e-5, "on the sandbox the learning rate is the one tuned for it"


BAD = {
    "share": (salun.SalUn, salun.SalUnConfig, dict(share=1.5), "saliency share = 1.5; a number between 0 and 1"),
    "erase_from": (esd.ESD, esd.ESDConfig, dict(erase_from="zeppelin"), "'zeppelin', from which 'Van Gogh' is to be erased, occurs in none of its prompts"),
    "ema": (sdd.SDD, sdd.SDDConfig, dict(ema=2.), "ema = 2.0; a decay between 0 and 1"),
    "warm-up": (conabl.ConAbl, conabl.ConAblConfig, dict(warmup=2), "no discriminator and so no warm-up"),
    "schedule": (advanchor.AdvAnchor, advanchor.AdvAnchorConfig, dict(schedule="sequential"), "construct = 0 with schedule sequential"),
    "rank": (spm.SPM, spm.SPMConfig, dict(rank=0), "rank = 0; an adapter needs at least rank 1"),
    "budget": (integrity.Saddle, integrity.SaddleConfig, dict(budget=0.), "budget = 0.0; a positive drift"),
    "truncate": (rg.RG, rg.RGConfig, dict(truncate=0.), "truncate = 0.0; a positive loss"),
    "truncated": (rg.RG, rg.RGConfig, dict(truncated="skipp"), "unknown truncated 'skipp'; did you mean 'skip'"),
    "frame": (rg.RG, rg.RGConfig, dict(diverse=True, frame="word"), "frame = word; diverse prompts"),
    "images": (rg.RG, rg.RGConfig, dict(images="anchor"), "ascent needs images of the target")}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_a_sentence(case):
    make, config, change, sentence = BAD[case]
    model = Denoiser(tiny_pipeline(), "tiny")
    e = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet",))
    with pytest.raises(ValueError) as why: make(model, [e], config(**{**SMALL, **change}))
    assert sentence in str(why.value)


def test_an_adapted_model_is_not_adapted_again():
    m = build("spm")
    e = m.erasures[0]
    with pytest.raises(ValueError, match="is adapted already; fold the first adapter"): spm.SPM(m.model, [e], m.config)
    m.moved.merge()
    spm.SPM(m.model, [e], m.config)


def test_few_images_reach_every_concept(cache):
    "With fewer images than prompts each of several concepts still has its share, of every kind of image."
    from unlearn_wb.methods.conabl import ConAbl, ConAblConfig
    model = Denoiser(tiny_pipeline(), "tiny")
    erasures = Erasure.find_all(model, "Snoopy + Mickey + Pikachu", kind="instance")
    m = ConAbl(model, erasures, ConAblConfig(iterations=1, num_images=12, prompts=90, images="both", keep="images"), cache)
    for data, side in ((m.data, "anchor"), (m.target_data, "target"), (m.retained, "retain")):
        ends = torch.tensor([len(getattr(b, side)) for b in m.banks]).cumsum(0)
        assert torch.bucketize(data.which, ends, right=True).bincount().tolist() == [4, 4, 4], side


def test_training_images_painted_before_an_interruption_are_kept(tmp_path, monkeypatch):
    from unlearn_wb.methods import anchored
    painted, seen = [], []
    def counting(model, prompts, seeds, callback=None, **kw):
        if len(painted) == 1 and not resumed: raise KeyboardInterrupt
        painted.append(list(seeds))
        callback(len(seeds), len(seeds))
        return torch.tensor(list(seeds), dtype=torch.float)[:, None, None, None].expand(-1, 4, 2, 2)
    monkeypatch.setattr(anchored, "sample", counting)
    model, ask = Denoiser.load("sandbox"), lambda: anchored.paint_bank(model, [["a cat", "a dog"], ["a boat"]], 200, 5, Cache(tmp_path), lambda k, n: seen.append((k, n)))
    resumed = False
    with pytest.raises(KeyboardInterrupt): ask()
    resumed = True
    latents, which = ask()
    assert [len(p) for p in painted] == [96, 96, 8] and sum(painted, []) == list(range(5, 205)) and seen == [(96, 200), (192, 200), (200, 200)]
    assert latents[:, 0, 0, 0].tolist() == list(range(5, 205)) and which[:4].tolist() == [0, 2, 1, 2]
    ask()
    assert len(painted) == 3
