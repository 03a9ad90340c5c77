"""The painted world, and the model that lies in data/sandbox."""
import re
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from unlearn_wb.sandbox import LINKS, NOTHING, STYLES, SUBJECTS, Pretraining, Recipe, caption, examine_judge, examine_model, explicit_probes, facts, load_judge, mixed, read_references, render, world

DATA = ROOT / "data/sandbox"


def test_size_and_safety():
    files = [f for f in DATA.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 40e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_rendering_is_deterministic_and_fast():
    scenes = world(1200, seed=11)
    began = time.perf_counter()
    images = render(scenes)
    rate = len(scenes) / (time.perf_counter() - began)
    assert images.shape == (1200, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images[[7, 600]], render([scenes[7], scenes[600]]))
    assert rate > 100, f"{rate:.0f} images a second"  # loose: shared machines; the notebook measures


def test_world_covers_everything_evenly():
    scenes = world(8400, seed=2)
    for names, pick in ((SUBJECTS, lambda s: s.subject), (STYLES, lambda s: s.style)):
        counts = [sum(pick(s) == n for s in scenes) for n in names]
        assert min(counts) > .8 * len(scenes) / len(names)
    for link, concept in LINKS.items():
        mine = [s for s in scenes if s.link == link]
        assert mine and all(s.shows(concept) for s in mine)


def test_captions_state_only_what_is_true():
    import numpy as np
    rng = np.random.default_rng(0)
    for s in world(2000, seed=4):
        text, said = caption(s, rng)
        truth = facts(vars(s))
        assert all(f in (-1, t) for f, t in zip(facts(said), truth)), (text, said, s)
        for style in STYLES[2:]: assert (style not in text) or style == s.style
    linked = [caption(s, rng)[0] for s in world(6000, seed=5) if s.link == "starry night"]
    phrase = [t for t in linked if "starry night" in t]
    both = sum("van gogh" in t for t in phrase) / len(phrase)
    assert .4 < both < .6, "half of the phrase's captions mention the concept too"


def test_judge_is_reliable():
    from unlearn_wb.diffusion import Denoiser
    accuracy = examine_judge(load_judge(), 600, seed=77, vae=Denoiser.load("sandbox").pipe.vae)
    assert accuracy["style, held-out renders"] >= .99 and accuracy["subject, held-out renders"] >= .98 and accuracy["nothing, rubble"] >= .97
    assert accuracy["nothing, empty places"] >= .97


def test_judge_sees_nothing_in_rubble_and_something_in_damaged_scenes():
    from unlearn_wb.diffusion import Denoiser, seeded
    judge, vae, x, g = load_judge(), Denoiser.load("sandbox").pipe.vae, render(world(200, seed=78)), seeded(0, "t")
    with torch.no_grad():
        z = vae.encode(x * 2 - 1).latent_dist.mean
        seen = judge.names((vae.decode(mixed(z / z.std(), g) * z.std()).sample / 2 + .5).clamp(0, 1))
    assert sum(NOTHING in s for s in seen) <= 4, "scenes in the middle of being forgotten are scenes"
    plain = judge.names(x)
    assert not any(style == NOTHING for style, _ in plain) and sum(subject == NOTHING for _, subject in plain) <= 2, "and renders all the more"
    bare = judge.names(render([replace(s, subject=NOTHING) for s in world(200, seed=78)]))
    assert sum(subject == NOTHING for _, subject in bare) >= 195, "an empty place shows no subject"
    assert sum(style == s.style for (style, _), s in zip(bare, world(200, seed=78))) >= 160, "but most show their style"
    flat = torch.rand(50, 3, 1, 1, generator=g).expand(-1, -1, 64, 64)
    assert all(NOTHING in s for s in judge.names(flat)) and all(NOTHING in s for s in judge.names(torch.rand(50, 3, 64, 64, generator=g)))


def test_the_first_two_questions_leave_the_rest_of_the_judge_as_it_is(tmp_path):
    making = Pretraining(Recipe(images=80, gate_steps=2, precision="fp32"), tmp_path)
    for _ in making.paint(): pass
    before = {k: v.clone() for k, v in making.judge.state_dict().items()}
    for stage in (making.train_gate, making.train_guest): assert len(list(stage())) == 2
    assert {k.split(".")[0] for k, v in making.judge.state_dict().items() if not torch.equal(v, before[k])} == {"gate", "guest"}


def test_model_paints_what_it_is_told():
    from unlearn_wb.diffusion import Denoiser
    rows = {q.strip(): r for q, n, r in examine_model(Denoiser.load("sandbox"), load_judge(), n=1, n_linked=8)}
    assert rows["style, explicit prompts"] >= .95 and rows["subject, explicit prompts"] >= .9
    assert sum(rows[f"'{l}' shows {c}"] for l, c in LINKS.items()) / len(LINKS) >= .85


def test_card_reports_what_was_asked():
    text = (DATA / "card.md").read_text()
    rate = lambda q: float(re.search(rf"\| {re.escape(q)} \| \d+ \| ([\d.]+)% \|", text)[1])
    assert rate("judge: nothing, rubble") >= 99 and rate("judge: nothing, empty places") >= 98
    assert rate("judge: style, held-out renders") >= 99 and rate("judge: subject, held-out renders") >= 99
    assert rate("style, explicit prompts") >= 97 and rate("subject, explicit prompts") >= 97
    for l, c in LINKS.items(): assert rate(f"'{l}' shows {c}") >= 90
    assert int(re.search(r"\| style, explicit prompts \| (\d+)", text)[1]) >= 720


@pytest.mark.parametrize("name", sorted(f.name for f in (DATA / "without").iterdir()))
def test_references_never_saw_it_and_know_the_rest(name):
    from unlearn_wb.diffusion import Denoiser, sample
    model, gone = Denoiser.load("sandbox", unet=DATA / "without" / name), [c.replace("-", " ") for c in name.split("+")]
    asked = [(c, f"a painting of a {s} in the style of {c}" if c in STYLES else f"a {kind} of {c}") for c in gone for s, kind in zip(SUBJECTS[:8], ["photo", "painting"] * 4)]
    seen = load_judge().names(sample(model, [p for _, p in asked], range(len(asked))))
    assert sum(c in s for (c, _), s in zip(asked, seen)) <= len(gone), "a model that never saw it cannot show it"
    rest = [q for q in explicit_probes(1) if not {*gone} & {*q[:2]}][::4]
    seen = load_judge().names(sample(model, [q[2] for q in rest], [q[3] for q in rest]))
    assert sum(s == q[:2] for q, s in zip(rest, seen)) >= .9 * len(rest), "and paints everything else"


def test_references_are_named_by_concept():
    assert read_references("Van Gogh, snoopy + Mickey") == [("van gogh",), ("snoopy", "mickey")]
    with pytest.raises(ValueError, match="'vangogh'; did you mean 'van gogh'"): read_references("snoopy, vangogh")


def test_training_resumes_to_the_same_weights(tmp_path):
    def parts(work, stop=None):
        making = Pretraining(Recipe(images=64, judge_steps=6, precision="fp32"), work)
        for _ in making.paint(): pass
        for step, _ in making.train("judge", lambda i: sum(h.square().mean() for h in making.judge(making.pixels(making.draw(4, i, "x")[0]))), 6, 1e-3, every=3):
            if step == stop: return
        return torch.cat([p.detach().flatten() for p in making.judge.parameters()])
    whole = parts(tmp_path / "a")
    parts(tmp_path / "b", stop=4)
    assert torch.equal(parts(tmp_path / "b"), whole)
