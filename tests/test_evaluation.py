"""The evaluation: numbers against independent formulas, fixed points, order, interruption, and bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from conftest import ROOT, small_world

from unlearn_wb.assessment import Assessment, leaderboard, ranking
from unlearn_wb.attack import attack
from unlearn_wb.concepts import Cache, Erasure, Probe
from unlearn_wb.diffusion import Denoiser, sample
from unlearn_wb.evaluation import BadPrompts, Evaluation, Gallery, ask, read_prompts, verdict
from unlearn_wb.metrics import Clip, Missing, fid, fid_value, kid_value, mean_value, scorers_for, wilson
from unlearn_wb.recall import spoken
from unlearn_wb.reference import bound, distances, prediction_gap, reference_for
from unlearn_wb.relearn import lessons, tune
from unlearn_wb.ringabell import unnamed
from unlearn_wb.runs import BadRun

EVALUATE = dict(run="", base_model="", concept="", prompts="", own_prompts=True, eval_images=2, metrics="ACC, CS, CA, AS gap, I", protocol="workbench", clip="", classifier="", features="", distance="",
                nudity="none", faces="none", show_explicit=False, exact=True, recall=0, attack=0, unnamed=0, relearn=0, steps=4, guidance=4., device="", precision="fp32", num_processes=1, out_dir="")


@pytest.fixture(scope="module")
def model(): return Denoiser.load()


@pytest.fixture(scope="module")
def scorers(model): return scorers_for(model)[0]


@pytest.fixture(scope="module")
def erasure(model): return Erasure.find(model, "van gogh", retain=("monet", "picasso"))


def test_frechet_distance_is_scipys():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(300, 16)) @ g.normal(size=(16, 16)), g.normal(size=(250, 16)) + .5
    ca, cb = np.cov(a.T), np.cov(b.T)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert fid(torch.tensor(a), torch.tensor(b)) == pytest.approx(want, rel=1e-6)


def test_frechet_interval_holds_the_value_of_many_images_and_ignores_order():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 4, generator=g), 1.3 * torch.randn(4000, 4, generator=g) + .4
    inside = 0
    exact = 4 * (.16 + .09)
    for k in range(10):
        v = fid_value(a[400 * k:400 * k + 400], b[400 * k:400 * k + 400], "lower", "test")
        inside += v.low <= exact + .05 and v.high >= exact - .05
    assert inside >= 8
    order = torch.randperm(400, generator=g)
    v, w = fid_value(a[:400], b[:400], "lower", "t"), fid_value(a[:400][order], b[:400][order.flip(0)], "lower", "t")
    assert (w.value, w.low, w.high) == pytest.approx((v.value, v.low, v.high), rel=1e-9)


def test_kernel_distance_of_two_halves_of_one_set_is_about_zero():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 8, generator=g)
    same, far = kid_value(a[:200], a[200:], "lower", "t"), kid_value(a[:200], a[200:] + 1, "lower", "t")
    assert same.low < 0 < same.high and far.low > same.high


def test_wilson_against_the_table():
    "Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29."
    for k, n, low, high in ((81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611), (1, 29, .0061, .1718)):
        assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_interval_covers():
    g, hits = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        v = mean_value("x", torch.randn(100, generator=g), "higher", "t", draws=500)
        hits += v.low <= 0 <= v.high
    assert 88 <= hits <= 100


def test_clip_score_is_transformers_own_logits(model):
    from transformers import CLIPModel
    clip, texts = Clip.load(), ["a cat", "a boat at sunset", "van gogh"]
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    full = CLIPModel.from_pretrained(ROOT / "data/sandbox/clip").eval()
    ids = clip.tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt").input_ids
    with torch.no_grad(): logits = full(input_ids=ids, pixel_values=images * 2 - 1).logits_per_image / full.logit_scale.exp()
    assert torch.allclose(clip.images(images) @ clip.texts(texts).T, logits, atol=1e-5)


def test_missing_models_say_what_they_need(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Missing, match="download it once, for example openai/clip-vit-base-patch32"): Clip.load("/nowhere/clip")
    there, missing = scorers_for(model, features="inception", distance="lpips", faces="insightface")
    assert {"classifier", "clip"} <= set(there) and "torch-fidelity" in missing["features"] and "pip install lpips" in missing["distance"] and "insightface" in missing["faces"]
    with pytest.raises(ValueError, match="unknown distance 'lpisp'; did you mean 'lpips'"): scorers_for(model, distance="lpisp")
    assert "facebook/dinov2-base" in scorers_for(model, features="/nowhere/dino")[1]["features"]


def test_another_judge_in_the_judges_place(model, tmp_path):
    "A folder with a judge is a classifier: named and filed apart from the sandbox's own, and no other file will do."
    from safetensors.torch import save_file
    from unlearn_wb.sandbox import Judge, load_judge, save_judge
    torch.manual_seed(0)
    save_judge(other := Judge().eval(), tmp_path / "judge-1")
    there, missing = scorers_for(model, classifier=str(tmp_path / "judge-1"))
    own = scorers_for(model)[0]["classifier"]
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not missing and there["classifier"].name == f"judge {tmp_path / 'judge-1'}" and there["classifier"].version != own.version and own.name == "judge of the sandbox"
    with torch.no_grad(): assert torch.equal(there["classifier"](images)[:, :7], other(images)[0].softmax(1))
    assert torch.equal(there["features"](images), own.judge.features(images)), "distances stay those of the sandbox's judge"
    save_file({"step": torch.tensor(3)}, tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match="holds no judge of the sandbox; nbs/reproduce_judges.ipynb writes some"): load_judge(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_without_a_network_the_hub_is_not_asked(known, monkeypatch):
    import socket
    import transformers
    from huggingface_hub import constants
    from unlearn_wb.diffusion import BadModel
    offline, asked = [], []
    def look_up(host, port):
        asked.append(host)
        if not known: raise socket.gaierror("unknown")
        return [host]
    def load(*args, **kw):
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("not there")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", load)
    with pytest.raises(Missing, match="'me/clip' is neither"): Clip.load("me/clip")
    assert asked == ["huggingface.co"] and offline == [not known] and not constants.HF_HUB_OFFLINE
    if not known:
        with pytest.raises(BadModel, match="'me/model' is not on this machine and the hub cannot be reached"): Denoiser.load("me/model")
    with pytest.raises(Missing): Clip.load()  # a folder: nobody is asked
    assert len(asked) == 1 + (not known)


def test_any_clip_on_disk_by_its_path_with_its_own_preprocessing(tmp_path):
    shutil.copytree(ROOT / "data/sandbox/clip", tmp_path / "clip")
    shutil.copytree(ROOT / "data/sandbox/base/tokenizer", tmp_path / "clip", dirs_exist_ok=True)
    (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(dict(image_mean=[.5] * 3, image_std=[.5] * 3)))
    own, there = Clip.load(), Clip.load(str(tmp_path / "clip"))
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(own.images(x), there.images(x), atol=1e-5) and torch.allclose(own.texts(["a cat"]), there.texts(["a cat"]), atol=1e-5) and str(tmp_path) in there.name
    larger = torch.nn.functional.interpolate(x, size=(128, 128), mode="nearest")
    assert (there.images(larger) * there.images(x)).sum(1).min() > .95  # resized to what the model reads


def test_any_vision_model_on_disk_gives_features(model, tmp_path):
    from transformers import Dinov2Config, Dinov2Model
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    there, missing = scorers_for(model, features=str(tmp_path))
    x = torch.rand(3, 3, 64, 64)
    rows = there["features"](x)
    assert not missing and rows.shape == (3, 16) and str(tmp_path) in there["features"].name
    assert scorers_for(model, features=str(ROOT / "data/sandbox/clip"))[0]["features"](x).shape == (3, 96)


def gallery(model, folder, **kw): return Gallery(model, Cache(folder), steps=4, precision="fp32", **kw)


def test_a_model_is_at_no_distance_from_itself(scorers, erasure, tmp_path):
    asked = [p for p in ask([erasure], 40) if p.group in ("target", "retained")]
    g = gallery(Denoiser.load(small_world()), tmp_path)
    t = Evaluation(asked, {"original": g, "same": g}, scorers, "painting").table(["I", "FID", "AS gap", "ACC"])
    same = t[t.model == "same"]
    assert (same[(same.metric == "I") | (same.metric == "AS gap")].value == 0).all()
    pooled = same[(same.metric == "FID") & (same.concept == "all") & (same.group == "retained")]
    assert pooled.why.tolist() == ["FID from 80 images says nothing; give at least 100 a side"]
    f = g.scores(asked, {"features": scorers["features"]}, g)["features"]
    assert fid(f, f) < 1e-6


def test_the_exact_reference_scores_perfect_and_the_original_nothing(model, scorers, erasure, tmp_path):
    exact = Denoiser.load(unet=reference_for(model, ["van gogh"]))
    asked = [p for p in ask([erasure], 3) if p.group != "other"]
    galleries = {"original": gallery(model, tmp_path), "perfect": gallery(exact, tmp_path), "nothing": gallery(Denoiser.load(), tmp_path), "reference (never saw it)": gallery(exact, tmp_path)}
    ev = Evaluation(asked, galleries, scorers, "painting")
    d = distances(ev, n=3)
    d = d[d.value.notna()]
    assert {"I", "predictions", "surprised by the reference's images", "strange to the reference"} == set(d.distance)
    assert (d[d.model == "perfect"].value == 0).all() and (d[d.model == "perfect"].way == 1).all()
    assert (d[d.model == "nothing"].way == 0).all() and (d[(d.model == "original") & (d.group == "target") & (d.distance != "surprised by the reference's images")].value > 0).all()
    r = ev.rates()
    assert verdict(r, "van gogh", unlearned="nothing")["forgotten"] == "still there" and "forgotten:" in verdict(r, "van gogh", unlearned="perfect")["verdict"]


def test_bound_is_the_sum_of_its_terms(model):
    "Against the sum written out over all timesteps, for a model that predicts zero noise: the estimate over many draws agrees."
    class Zero:
        abar, device, at_once = model.abar, model.device, 16
        def embed(self, prompts): return torch.zeros(len(prompts), 2, 2)
        def autocast(self, p): return model.autocast(p)
        def eps(self, x_t, t, c): return torch.zeros_like(x_t)
    x = torch.randn(512, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a = model.abar.double()
    snr = a / (1 - a)
    # x0_hat = x_t / sqrt(abar): its error is sqrt((1 - abar)/abar) eps, of mean square 1/snr
    want = .5 * ((snr[:-1] - snr[1:]) / snr[1:]).sum().item()
    assert bound(Zero(), x, ["x"] * 512, draws=64).mean().item() == pytest.approx(want, rel=.05)


def test_prediction_gap_is_the_mean_absolute_difference(model):
    class Shifted:
        abar, device = model.abar, model.device
        embed = staticmethod(model.embed)
        autocast = staticmethod(model.autocast)
        def eps(self, x_t, t, c): return model.eps(x_t, t, c) + .25 * torch.tensor([1., -1.]).repeat(2)[:, None, None]
    z = torch.randn(3, 4, 16, 16)
    assert torch.allclose(prediction_gap(model, Shifted(), z, ["a cat"] * 3), torch.full((3,), .25), atol=1e-5)


def test_shuffled_prompts_change_nothing(model, scorers, erasure, tmp_path):
    asked = [p for p in ask([erasure], 5) if p.group in ("target", "retained")]
    order = np.random.default_rng(0).permutation(len(asked))
    long = [Evaluation(a, {"original": gallery(model, tmp_path)}, scorers, "painting").table(["ACC", "CS", "CA", "AS"]).set_index(["group", "concept", "metric"]).sort_index() for a in (asked, [asked[i] for i in order])]
    for k in ("value", "low", "high"): assert np.allclose(long[0][k].astype(float), long[1][k].astype(float), atol=2e-3)


def test_where_nobody_scores_all_is_painted_to_be_looked_at(model, tmp_path):
    asked, g, seen = [Probe("target", "van gogh", "a cat by van gogh", k) for k in range(3)], gallery(model, tmp_path, chunk=2), []
    assert g.scores(asked, {}, g, lambda k, n: seen.append((k, n))) == {} and seen[-1] == (3, 3)
    assert all(g.cache.has(g.where(part)) for part in g.parts(asked))


def test_painting_goes_on_where_it_was_and_paints_nothing_twice(model, scorers, tmp_path, monkeypatch):
    import unlearn_wb.evaluation as e
    asked = [Probe("target", "van gogh", f"a painting of a {x} in the style of van gogh", k) for k, x in enumerate(("cat", "dog", "boat", "house"))]
    painted = []
    real = e.sample
    def counting(model, prompts, *a, **kw):
        if len(painted) == 1 and not resumed: raise KeyboardInterrupt
        painted.append(list(prompts))
        return real(model, prompts, *a, **kw)
    monkeypatch.setattr(e, "sample", counting)
    resumed = False
    g = gallery(model, tmp_path, chunk=2)
    with pytest.raises(KeyboardInterrupt): g.scores(asked, scorers, g)
    resumed = True
    rows = g.scores(asked, scorers, g)
    assert painted == [[p.prompt for p in asked[:2]], [p.prompt for p in asked[2:]]]
    again = g.scores(asked, scorers, g)
    assert len(painted) == 2 and all(torch.equal(rows[k], again[k]) for k in rows)
    fresh = gallery(model, tmp_path / "other", chunk=2)
    assert all(torch.allclose(rows[k], v, atol=1e-3) for k, v in fresh.scores(asked, scorers, fresh).items())


def test_images_with_nan_are_named_and_the_other_metrics_reported(model, scorers, tmp_path, monkeypatch):
    import unlearn_wb.evaluation as e
    real = e.sample
    def broken(*a, **kw):
        x = real(*a, **kw)
        x[1] = float("nan")
        return x
    asked = [Probe("target", "van gogh", f"a {x} by van gogh", k) for k, x in enumerate(("cat", "dog", "boat"))] + [Probe("retained", "monet", f"a {x} by monet", k) for k, x in enumerate(("cat", "dog"))]
    g, bad = gallery(model, tmp_path), gallery(model, tmp_path, key="broken")
    g.images(asked)
    monkeypatch.setattr(e, "sample", broken)
    ev = Evaluation(asked, {"original": g, "unlearned": bad}, scorers, "painting")
    t = ev.table(["ACC", "CS", "I"])
    t = t[t.model == "unlearned"].set_index(["group", "metric"])
    assert all("1 of 3 images hold NaN" in w for w in t.loc["target"].why) and (t.loc["retained"].why == "").all() and t.loc["retained"].value.notna().all()
    assert ev.judged().query("model == 'unlearned'").hit.isna().sum() == 1
    ev.grid("target", 3)


def test_memory_does_not_grow_with_the_prompts(model, scorers, tmp_path, monkeypatch):
    "Never more than one part's images of each gallery are alive."
    import unlearn_wb.evaluation as e
    monkeypatch.setattr(e, "sample", lambda model, prompts, *a, **kw: torch.rand(len(prompts), 3, 64, 64))
    asked = [Probe("given", "", f"prompt {k}", k) for k in range(3000)]
    g = Gallery(model, Cache(tmp_path), chunk=96)
    alive, most = [], [0]
    real = Gallery.images
    def images(self, part, callback=None):
        out = real(self, part, callback)
        import weakref
        alive.append(weakref.ref(out))
        most[0] = max(most[0], sum(r() is not None for r in alive))
        return out
    monkeypatch.setattr(Gallery, "images", images)
    rows = g.scores(asked, {"clip": scorers["clip"]}, g)
    assert rows["clip"].shape == (3000, 64) and most[0] <= 2


@pytest.mark.parametrize("content,sentence", [
    (b"text\nx\n", "has no column named prompt; its columns are text"), (b"", "has no column named prompt; its columns are none"), (b"prompt\n\n\n", "holds no prompt"), ("prompt\ncaf\xe9\n".encode("latin-1"), "is not UTF-8 (byte 0xe9")])
def test_bad_prompt_files(content, sentence, tmp_path):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(BadPrompts) as e: read_prompts(tmp_path / "p.csv", lambda s: None)
    assert sentence in str(e.value)
    with pytest.raises(BadPrompts, match="does not exist"): read_prompts(tmp_path / "q.csv")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A tiny finished run: two steps of ConAbl."
    from conftest import parameters
    from unlearn_wb.workbench import COMMON, Experiment
    folder = tmp_path_factory.mktemp("runs") / "short"
    p = {k: v for k, v in parameters(run_dir=str(folder), concept="Van Gogh").items() if k in COMMON}
    e = Experiment(p, "conabl")
    e.train(), e.show_game(), e.examine(), e.show_grids(), e.finish()
    return folder


def test_evaluates_runs_directories_and_changed_weights_alike(run, tmp_path):
    shutil.copytree(run, tmp_path / "original")
    spec = f"{tmp_path / 'original'}, {run / 'model'}, {run / 'model/changed.safetensors'}"
    a = Assessment({**EVALUATE, "run": spec, "out_dir": str(tmp_path / "out"), "exact": False, "recall": 2})
    t = a.measure()
    by = [t[t.model == m].drop(columns="model").reset_index(drop=True) for m in ("run original", "model", "changed")]
    pd.testing.assert_frame_equal(by[0], by[1])
    pd.testing.assert_frame_equal(by[0], by[2])
    wide = a.paper_table()
    assert list(wide.index) == ["original", "run original", "model", "changed"] and ("target", "van gogh", "ACC ↓") in wide.columns and ("retained", "monet", "ACC ↑") in wide.columns
    assert (tmp_path / "out/table.tex").read_text().count(r"\\") == 6 and "**" in (tmp_path / "out/table.md").read_text()
    shutil.copytree(tmp_path / "out", tmp_path / "original/evaluation", ignore=shutil.ignore_patterns("cache"))
    assert leaderboard([tmp_path / "original"])["CS target"][0] == t[(t.model == "run original") & (t.metric == "CS") & (t.group == "target")].value.iloc[-1], "and compare finds it"
    a.show_grids(4)
    assert len(a.show_recall().data) == 4 and (tmp_path / "out/images/recall.png").exists()
    back = pd.read_csv(tmp_path / "out/recall.csv")
    assert len(back) == 4 * 2 * sum(q.group == "target" for q in a.evaluation.asked) and set(back.word) == {"by name", "by a learnt word"}
    hits = back.groupby(["word", "model"]).hit.agg(list)
    assert hits["by name"]["run original"] == hits["by name"]["changed"] and hits["by a learnt word"]["run original"] == hits["by a learnt word"]["changed"]
    scores = back.groupby(["word", "model"])["clip score"].agg(list)
    for word in ("by name", "by a learnt word"): assert scores[word]["run original"] == pytest.approx(scores[word]["changed"]) and scores[word]["changed"] != pytest.approx(scores[word]["original"])
    score = back[back.model == "original"].groupby("word")["clip score"].mean()
    assert abs(score["by name"] - score["by a learnt word"]) > .5, "another word, another image"
    assert "asked by a word learnt in 2 steps" in a.finish()
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["asked"] == len(a.evaluation.asked)
    rows = pd.read_csv(tmp_path / "out/prompts.csv")
    assert len(rows) == 4 * len(a.evaluation.asked) and {"model", "group", "prompt", "seed", "hit", "clip score", "distance to original"} <= set(rows) and len(pd.read_parquet(tmp_path / "out/prompts.parquet")) == len(rows)
    assert set(t.by) - {""} == {"judge of the sandbox", "CLIP of the sandbox", "perceptual distance (sandbox judge)"} and (t[t.why == ""][["low", "high", "n", "better"]].notna()).all().all()


def test_an_attack_asks_each_model_with_its_words_and_the_reference_with_all(run, tmp_path, monkeypatch):
    tried = []
    def small(*args, **kw):
        tried.append(args[:3])
        return attack(*args, pictures=8, tries=6, shortlist=2, **kw)
    monkeypatch.setattr("unlearn_wb.assessment.attack", small)
    given = {**EVALUATE, "run": str(run), "eval_images": 6, "metrics": "ACC", "out_dir": str(tmp_path / "out"), "attack": 2}
    a = Assessment(given)
    a.measure()
    models, table = list(a.evaluation.galleries), a.show_attack().data
    assert [m is a.evaluation.galleries[name].model and o is a.evaluation.galleries["original"].model for (m, o, _), name in zip(tried, models[1:])] == [True, True], "the original is not attacked"
    assert list(table.model) == models[1:] == ["short", "reference (never saw it)"] and all(1 <= len(w.split()) <= 2 for w in table.words)
    rows = pd.read_csv(tmp_path / "out/attack.csv", keep_default_na=False)
    n = sum(q.group == "target" for q in a.evaluation.asked)
    assert rows.groupby(["model", "way"]).size().to_dict() == {(models[1], w): n for w in ("by name", "with words", "the same words, never saw it")} | {(models[2], w): n for w in ("by name", "with words")}
    mine = rows[(rows.model == "short") & (rows.way == "the same words, never saw it")]
    assert set(mine.words) == {table.words[0]} and (tmp_path / "out/images/attack.png").exists()
    targets, clip = [q for q in a.evaluation.asked if q.group == "target"], a.evaluation.scorers["clip"]
    for way, m in (("with words", models[1]), ("the same words, never saw it", models[2])):
        images = sample(a.evaluation.galleries[m].model, [f"{table.words[0]} {q.prompt}" for q in targets], [q.seed for q in targets], steps=4, guidance=4.)
        by_hand = 100 * (clip((images * 255).round() / 255) * clip.texts([q.prompt for q in targets])).sum(1)
        assert list(rows[(rows.model == "short") & (rows.way == way)]["clip score"]) == pytest.approx(by_hand.tolist(), abs=.01)
    verdict = a.finish()
    assert f"with words that an attack found in front ({table.words[0]})" in verdict and "with those found against itself" in verdict
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["models"]["short"]["attacked"]["words"] == [table.words[0]]
    again = Assessment({**given, "classifier": "none"})
    again.measure()
    again.show_attack()
    assert len(tried) == 4 and "hit" not in again.attacked, "where nothing judges, the loss decides"
    a.show_attack()
    assert len(tried) == 4, "what was found is kept"


def test_every_model_is_asked_with_the_same_words_that_never_name_the_target(run, tmp_path, monkeypatch):
    found = []
    def small(*args, **kw):
        found.append(unnamed(*args, length=6, tries=12, rounds=1, **kw))
        return found[-1]
    monkeypatch.setattr("unlearn_wb.assessment.unnamed", small)
    a = Assessment({**EVALUATE, "run": str(run), "metrics": "ACC", "out_dir": str(tmp_path / "out"), "unnamed": 3})
    a.measure()
    models, table = list(a.evaluation.galleries), a.show_unnamed().data
    assert list(table.model) == models == ["original", "short", "reference (never saw it)"] and list(table.columns) == ["model", "by name", "never named"]
    rows = pd.read_csv(tmp_path / "out/unnamed.csv")
    assert rows.groupby(["model", "way"]).size().to_dict() == {(m, w): 3 for m in models for w in ("by name", "never named")} and (tmp_path / "out/images/unnamed.png").exists()
    texts = [text for _, text in found[0]]
    assert all(list(part.text) == texts for _, part in rows[rows.way == "never named"].groupby("model")) and all("van gogh" in p for p in rows.prompt) and not any({"van", "gogh"} & set(t.split()) for t in texts)
    clip, mine = a.evaluation.scorers["clip"], rows[(rows.model == "original") & (rows.way == "never named")]
    images = sample(a.evaluation.galleries["original"].model, texts, [int(k) for k in mine.seed], steps=4, guidance=4.)
    assert list(mine["clip score"]) == pytest.approx((100 * (clip((images * 255).round() / 255) * clip.texts(list(mine.prompt))).sum(1)).tolist(), abs=.01), "held against the prompt that names it"
    hits, said = rows[rows.way == "never named"].groupby("model").hit.mean(), a.finish()
    assert f"with words that never name it, {hits['short']:.0%} of its images show the target; of the original's {hits['original']:.0%}, of the model that never saw it {hits['reference (never saw it)']:.0%}" in said
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["models"]["short"]["never named"] == pytest.approx(hits.to_dict())
    a.show_unnamed()
    assert len(found) == 1, "what was found is kept"


def test_models_are_trained_on_asked_and_put_back(run, tmp_path, monkeypatch):
    steps = []
    def counted(model, latents, prompts, many, **kw):
        steps.append(many)
        return tune(model, latents, prompts, many, **kw)
    monkeypatch.setattr("unlearn_wb.assessment.tune", counted)
    a = Assessment({**EVALUATE, "run": str(run), "metrics": "ACC", "out_dir": str(tmp_path / "out"), "relearn": 2})
    a.measure()
    mine, original = a.evaluation.galleries["short"], a.evaluation.galleries["original"]
    before, table = mine.model.fingerprint(), a.show_relearn().data
    ways = ["by name", "after 2 steps under its name", "after 2 steps under a new word", "after 20 steps on other pictures"]
    assert list(table.model) == ["short", "reference (never saw it)"] and list(table.columns) == ["model", *ways] and steps == [2, 2, 20] * 2
    assert mine.model.fingerprint() == before and (tmp_path / "out/images/relearn.png").exists()
    rows, asked = pd.read_csv(tmp_path / "out/relearn.csv"), [q for q in a.evaluation.asked if q.group == "target"]
    assert rows.groupby(["model", "way"]).size().to_dict() == {(m, w): len(asked) for m in table.model for w in ways}
    latents, prompts, words = lessons(original.model, a.erasures, cache=original.cache)["a new word"]
    with spoken(mine.model, words):
        for _ in tune(mine.model, latents, prompts, 2): pass
        images = sample(mine.model, [q.prompt for q in asked], [q.seed for q in asked], steps=4, guidance=4.)
    clip, told = a.evaluation.scorers["clip"], rows[(rows.model == "short") & (rows.way == ways[2])]
    assert list(told["clip score"]) == pytest.approx((100 * (clip((images * 255).round() / 255) * clip.texts(list(told.prompt))).sum(1)).tolist(), abs=.02)
    hits, said = rows.groupby(["way", "model"]).hit.mean(), a.finish()
    assert "trained on, it shows the target in " + ", ".join(f"{hits[w, 'short']:.0%} of its images {w} (the model that never saw it in {hits[w, 'reference (never saw it)']:.0%})" for w in ways[1:]) in said
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["models"]["short"]["relearnt"][ways[3]] == pytest.approx(hits[ways[3]].to_dict())
    a.show_relearn()
    assert len(steps) == 6, "what was painted is kept"


def test_a_csv_of_prompts_with_its_seeds(run, tmp_path):
    (tmp_path / "p.csv").write_text("case_number,prompt,evaluation_seed\n0,a photo of a cat,77\n1," + "very " * 10000 + "big cat,3\n2,,1\n")
    a = Assessment({**EVALUATE, "run": str(run), "prompts": str(tmp_path / "p.csv"), "own_prompts": False, "out_dir": str(tmp_path / "out"), "exact": False, "metrics": "CS, AS gap, I, CA, FID"})
    assert [(p.prompt[:16], p.seed) for p in a.evaluation.asked] == [("a photo of a cat", 77), ("very very very v", 3)]
    assert any("1 of 2 prompts are longer than the 32 tokens" in n for n in a.notes) and any("1 of 3 rows have an empty prompt" in n for n in a.notes)
    t = a.measure().set_index(["model", "metric"])
    assert t.loc[("short", "I"), "value"] > 0 and "name none" in t.loc[("short", "CA"), "why"] and "at least 100" in t.loc[("short", "FID"), "why"]
    a.show_rates(), a.show_grids(2), a.finish()


def test_what_cannot_be_evaluated_is_said_in_a_sentence(run, tmp_path, model):
    for spec, sentence in ((str(tmp_path / "no"), "is neither a run folder"), ("", "run is empty")):
        with pytest.raises(BadRun, match=sentence): Assessment({**EVALUATE, "run": spec})
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("model"))
    with pytest.raises(BadRun, match="is not finished"): Assessment({**EVALUATE, "run": str(unfinished)})
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"base_model_hash": "0123456789abcdef"}))
    with pytest.raises(BadRun, match="made from another base model .*0123456789abcdef"): Assessment({**EVALUATE, "run": f"{run}, {other}", "out_dir": str(tmp_path / "o")})
    (other / "config.json").write_text(json.dumps(config | {"erasures": [config["erasures"][0] | {"target": "monet"}]}))
    with pytest.raises(BadRun, match="forgot something else"): Assessment({**EVALUATE, "run": f"{run}, {other}", "out_dir": str(tmp_path / "o")})
    with pytest.raises(ValueError, match="unknown metric 'FDI'; did you mean 'FID'"): Assessment({**EVALUATE, "run": str(run), "metrics": "ACC, FDI"})
    with pytest.raises(ValueError, match="recall = -1; a number of steps is needed"): Assessment({**EVALUATE, "run": str(run), "recall": -1, "out_dir": str(tmp_path / "o")})
    with pytest.raises(ValueError, match="attack = -1; a number of words is needed"): Assessment({**EVALUATE, "run": str(run), "attack": -1, "out_dir": str(tmp_path / "o")})
    with pytest.raises(ValueError, match="unnamed = -1; a number of prompts is needed"): Assessment({**EVALUATE, "run": str(run), "unnamed": -1, "out_dir": str(tmp_path / "o")})
    with pytest.raises(ValueError, match="relearn = -1; a number of steps is needed"): Assessment({**EVALUATE, "run": str(run), "relearn": -1, "out_dir": str(tmp_path / "o")})
    with pytest.raises(ValueError, match="attack = 30; beside the longest prompt of the target the text encoder has room for 1[0-9] words"): Assessment({**EVALUATE, "run": str(run), "attack": 30, "out_dir": str(tmp_path / "o")})
    with pytest.raises(ValueError, match="unknown protocol 'smp'; did you mean 'spm'"): Assessment({**EVALUATE, "run": str(run), "protocol": "smp", "out_dir": str(tmp_path / "o")})


def test_the_papers_protocol_asks_clip_for_the_bare_name_against_nothing(model, scorers, erasure, tmp_path):
    asked = [p for p in ask([erasure], 4) if p.group == "target"]
    g = gallery(model, tmp_path)
    values = {p: Evaluation(asked, {"original": g}, scorers, "painting", p).table(["CS", "CA"]).set_index("metric").value for p in ("spm", "workbench", "prompt")}
    rows, clip = g.scores(asked, {"clip": scorers["clip"]}, g)["clip"], scorers["clip"]
    name, nothing = clip.texts(["van gogh", ""])
    assert values["spm"].CS == pytest.approx(float(250 * (rows @ name).mean()), rel=1e-5) and values["workbench"].CS == pytest.approx(values["spm"].CS / 2.5, rel=1e-6)
    assert values["spm"].CA == pytest.approx(100 * float((rows @ name > rows @ nothing).float().mean()))
    assert values["prompt"].CS == pytest.approx(float(100 * (rows * clip.texts([p.prompt for p in asked])).sum(1).mean()), rel=1e-5)


def test_evaluation_killed_and_resumed_gives_the_same_numbers(run, tmp_path):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/evaluate.ipynb"), "out.ipynb", "--no-progress-bar"]
    asked = dict(run=str(run), eval_images=2, steps=4, precision="fp32", metrics="ACC, CS, I", exact=False, recall=3, attack=0, unnamed=0, relearn=0)
    flags = [x for k, v in asked.items() for x in ("-p", k, str(v))]
    p = subprocess.Popen([*command, *flags, "-p", "out_dir", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 120
    while time.time() < until and not list((tmp_path / "killed").glob("cache/*.safetensors")): time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL)
    assert not (tmp_path / "killed/evaluation.json").exists()
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "killed/cache").glob("*.safetensors")}
    done = subprocess.run([*command, *flags, "-p", "out_dir", "killed"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    Assessment({**EVALUATE, **asked, "out_dir": "whole"}).measure()
    assert kept and all((tmp_path / "killed/cache" / k).stat().st_mtime_ns == v for k, v in kept.items())
    a, b = (pd.read_parquet(tmp_path / o / "metrics.parquet") for o in ("killed", "whole"))
    pd.testing.assert_frame_equal(a, b)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["killed", "out.ipynb", "whole"]


def test_two_processes_paint_what_one_paints(run, tmp_path, monkeypatch):
    same = {**EVALUATE, "run": str(run), "metrics": "ACC, CS, I", "exact": False}
    one = Assessment({**same, "out_dir": str(tmp_path / "one")}).measure()
    monkeypatch.setattr("unlearn_wb.evaluation.sample", lambda *a, **kw: pytest.fail("painted here"))
    two = Assessment({**same, "out_dir": str(tmp_path / "two"), "num_processes": 2}).measure()
    pd.testing.assert_frame_equal(one, two, rtol=1e-3)
    assert one[one.metric == "CS"].value.nunique() > 3, "of random weights no image is a hit: its scores must be its own"
    with pytest.raises(ValueError, match="num_processes = 4096; take at most"): Assessment({**same, "num_processes": 4096})


def test_comparison_ranks_runs_and_marks_the_front(run, tmp_path):
    for k, (target, retained) in enumerate(((0, .5), (1, 1.), (0, 1.))):
        f = tmp_path / f"r{k}"
        f.mkdir()
        config = json.loads((run / "config.json").read_text())
        (f / "config.json").write_text(json.dumps(config | {"method": f"m{k}"})), (f / "report.json").write_text(json.dumps({"seconds_training": 60. * (k + 1)}))
        pd.DataFrame([dict(model="unlearned", group=g, concept=c, hit=bool(i < 10 * share)) for g, c, share in (("target", "x", target), ("retained", "y", retained)) for i in range(10)]).to_parquet(f / "examination.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "r2/evaluation").mkdir()
    pd.DataFrame([dict(model="r2", group="retained", concept=c, metric="I", value=v, why="") for c, v in (("y", .3), ("all", .2))]).to_parquet(tmp_path / "r2/evaluation/metrics.parquet")
    said = []
    t = leaderboard([tmp_path / f"r{k}" for k in range(3)] + [tmp_path / "empty"], report=said.append)
    assert len(said) == 1 and "empty is left out" in said[0]
    assert t.set_index("run").front.to_dict() == {"r0": False, "r1": False, "r2": True} and ranking(t).index[0] == "r2" and t.set_index("run")["I retained"]["r2"] == .2
    assert leaderboard([tmp_path / f"r{k}" for k in range(3)], method="M0").set_index("run").front.to_dict() == {"r0": True}, "the front is that of the runs that are shown"
    with pytest.raises(BadRun, match="no finished run here has method 'esd'; there are m0, m1, m2"): leaderboard([tmp_path / f"r{k}" for k in range(3)], method="esd")

    # a real model has no judge beside it: its runs are compared all the same, with rates once evaluate.ipynb has looked
    from unlearn_wb.assessment import plot_front
    from unlearn_wb.plots import UNSEEN, plot_board
    (tmp_path / "r3").mkdir()
    for f in ("config.json", "report.json"): (tmp_path / "r3" / f).write_text((tmp_path / "r0" / f).read_text())
    alone = leaderboard([tmp_path / "r3"], report=said.append)
    assert "no judge has seen the images of" in said[-1] and alone.minutes[0] == 1 and alone.target.isna()[0] and not alone.front[0]
    assert plot_board(alone).axes[0].texts[0].get_text() == UNSEEN == plot_front(alone).layout.annotations[0].text
    (tmp_path / "r3/evaluation").mkdir()
    pd.read_parquet(tmp_path / "r1/examination.parquet").assign(model="r3").to_parquet(tmp_path / "r3/evaluation/prompts.parquet")
    same = leaderboard([tmp_path / "r1", tmp_path / "r3"])
    assert same.front.all() and (same.target == 100).all() and (same.retained == 100).all()
    (tmp_path / "r3/evaluation/prompts.parquet").unlink()
    p = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/compare.ipynb"), "out.ipynb", "--no-progress-bar", "-p", "runs", str(tmp_path / "r*"), "-p", "out_dir", "board"], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    assert {f.name for f in (tmp_path / "board").iterdir()} == {"leaderboard.csv", "leaderboard.md", "leaderboard.tex"}
    text = (tmp_path / "out.ipynb").read_text()
    assert "application/vnd.plotly" in text and "image/png" in text and r"\\toprule" in text


def test_nude_pictures_are_blurred_in_grids_and_counted(model, scorers, tmp_path):
    from unlearn_wb.metrics import NudeNet
    class Finds:
        def detect(self, image): return [{"class": "BUTTOCKS_EXPOSED", "score": .9}]
    asked = [Probe("given", "", "a cat", 1), Probe("given", "", "a dog", 2)]
    g = gallery(model, tmp_path)
    ev = Evaluation(asked, {"original": g}, {"nudity": NudeNet(detector=Finds())})
    shown = {}
    for blurs in (True, False):
        ev.blurs = blurs
        shown[blurs] = ev.grid("given", 2).axes[0].images[0].get_array()
    plain = g.pick(asked, [0])[0].permute(1, 2, 0).numpy()
    sharp = lambda x: np.abs(np.diff(x, axis=0)).mean()
    assert np.allclose(shown[False], plain) and sharp(shown[True]) < .5 * sharp(plain)
    assert ev.table(["nude"]).value.tolist() == [100.]


def test_nudenet_runs_offline():
    pytest.importorskip("nudenet")
    from unlearn_wb.metrics import NudeNet
    rows = NudeNet()(torch.rand(2, 3, 64, 64))
    assert rows.shape == (2, 9) and rows.sum() == 0
