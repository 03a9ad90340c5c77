"""Stable Diffusion 1.x (noise), 2.x (velocity), SDXL, 3 and FLUX.1 (flow) through the one door: diffusers' own numbers, every method, plain diffusers directories."""
import pytest
import torch
from conftest import tiny_flow_pipeline, tiny_flux_pipeline, tiny_pipeline, tiny_xl_pipeline

from unlearn_wb.attack import find_words, readable
from unlearn_wb.concepts import Cache, Erasure
from unlearn_wb.diffusion import BadModel, Denoiser, add_noise, sample, seeded
from unlearn_wb.loop import unlearn
from unlearn_wb.recall import learn_word
from unlearn_wb.registry import METHODS
from unlearn_wb.relearn import restored, tune
from unlearn_wb.ringabell import concept_vector, prompt_pairs, ring

FAMILIES = {"sd1": lambda: tiny_pipeline("epsilon"), "sd2": lambda: tiny_pipeline("v_prediction"), "sdxl": tiny_xl_pipeline, "sd3": tiny_flow_pipeline, "flux": tiny_flux_pipeline}
WITH_T5 = FAMILIES | {"sd3-t5": lambda: tiny_flow_pipeline(t5=True)}
JOINT = ("uce", "mace", "fmn", "receler")  # need cross-attention


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return Cache(tmp_path_factory.mktemp("painted"))


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_T5)
def test_a_forward_pass_is_diffusers_own_bit_for_bit(family):
    pipe = WITH_T5[family]()
    model, prompts = Denoiser.of(pipe, family), ["a cat by monet", "a dog"]
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    if family == "sdxl":
        states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), dtype=torch.float32, text_encoder_projection_dim=24).expand(2, -1)
        theirs = pipe.unet(x, t, encoder_hidden_states=states, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    elif family in ("sd3", "sd3-t5"):
        states, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, device="cpu", do_classifier_free_guidance=False)
        sigma = model.sigma[t]
        y = x * ((1 - sigma) ** 2 + sigma ** 2).sqrt()  # on the straight path
        theirs = y + (1 - sigma) * pipe.transformer(y, timestep=(1000 * sigma).expand(2), encoder_hidden_states=states, pooled_projections=pooled).sample
    elif family == "flux":
        states, pooled, nowhere = pipe.encode_prompt(prompts, prompts, device="cpu", max_sequence_length=48)
        sigma = model.sigma[t]
        y = x * ((1 - sigma) ** 2 + sigma ** 2).sqrt()
        v = pipe.transformer(hidden_states=pipe._pack_latents(y, 2, 4, 8, 8), timestep=sigma.expand(2), guidance=torch.ones(2), pooled_projections=pooled, encoder_hidden_states=states, txt_ids=nowhere, img_ids=pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)).sample
        theirs = y + (1 - sigma) * pipe._unpack_latents(v, 16, 16, 2)
    else: theirs = pipe.unet(x, t, encoder_hidden_states=pipe.encode_prompt(prompts, "cpu", 1, False)[0]).sample
    ours = model.eps(x, t, model.embed(prompts))
    if family == "sd2": theirs = model.abar[t].sqrt() * theirs + (1 - model.abar[t]).sqrt() * x
    assert torch.equal(ours, theirs) if family in ("sd1", "sdxl") else torch.allclose(ours, theirs, atol=1e-6)  # the others turn the network's answer into noise


def test_sdxl_samples_what_its_pipeline_samples():
    from diffusers import DPMSolverMultistepScheduler
    pipe = tiny_xl_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config({**pipe.scheduler.config, "timestep_spacing": "linspace"}, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    model, prompts, seeds = Denoiser(pipe, "xl"), ["a cat", "a dog by monet"], [5, 6]
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    theirs = pipe(prompts, latents=latents, num_inference_steps=6, guidance_scale=3., output_type="pt").images
    torch.testing.assert_close(sample(model, prompts, seeds, steps=6, guidance=3.), theirs, atol=2e-4, rtol=0)


@torch.no_grad()
def test_sd3_arrives_where_its_own_flow_leads():
    "Euler steps of the velocity on the straight path, many of them, from the same noise; our sampler in the other scale."
    pipe = tiny_flow_pipeline()
    model, prompts, seeds = Denoiser.of(pipe, "flow"), ["a cat", "a dog by monet"], [5, 6]
    y = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    states, nothing, pooled, no_pooled = pipe.encode_prompt(prompts, prompts, prompts, device="cpu", do_classifier_free_guidance=True)
    sigmas = torch.linspace(1, 0, 401)
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        v = lambda c, q: pipe.transformer(y, timestep=(1000 * a).expand(2), encoder_hidden_states=c, pooled_projections=q).sample
        plain, told = v(nothing, no_pooled), v(states, pooled)
        y = y + (b - a) * (plain + 3 * (told - plain))
    ours = sample(model, prompts, seeds, steps=60, guidance=3., decode=False)
    start = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    assert (ours - y).norm() < .02 * (y - start).norm(), float((ours - y).norm() / (y - start).norm())
    pipe.vae.eval()
    theirs = (pipe.vae.decode(ours / 1.5 + .06).sample / 2 + .5).clamp(0, 1)
    torch.testing.assert_close(model.decode(ours), theirs)
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(model.encode(image), (pipe.vae.encode(image * 2 - 1).latent_dist.mean - .06) * 1.5)


@torch.no_grad()
@pytest.mark.parametrize("distilled", [True, False], ids=["dev", "schnell"])
def test_flux_arrives_where_its_pipeline_leads(distilled):
    "Its own pipeline with many Euler steps; where guidance is an input, it is the scale asked for, and the places of noise are the scheduler's own for that size."
    pipe = tiny_flux_pipeline(guidance_embeds=distilled)
    pipe.set_progress_bar_config(disable=True)
    model, prompts, seeds = Denoiser.of(pipe, "flux"), ["a cat", "a dog by monet"], [5, 6]
    start = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    asked = dict(latents=pipe._pack_latents(start, 2, 4, 8, 8), height=16, width=16, max_sequence_length=48, output_type="latent")
    theirs = {w: pipe._unpack_latents(pipe(prompts, guidance_scale=w, num_inference_steps=300, **asked).images, 16, 16, 2) for w in (1., 3.)}
    for w in theirs:
        ours = sample(model, prompts, seeds, steps=60, guidance=w, decode=False)
        assert (ours - theirs[w]).norm() < .02 * (theirs[w] - start).norm(), (w, float((ours - theirs[w]).norm() / (theirs[w] - start).norm()))
    assert torch.equal(theirs[1.], theirs[3.]) == (not distilled)
    places = (torch.arange(1000) + .5) / 1000
    pipe.scheduler.set_timesteps(sigmas=places.flip(0).tolist(), **(dict(mu=.5 - .65 * (256 - 16) / (4096 - 256)) if distilled else {}))
    torch.testing.assert_close(model.sigma, pipe.scheduler.sigmas[:-1].flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step_on_every_family(family, name, cache):
    model = Denoiser.of(FAMILIES[family](), family)
    erasure = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet", "Picasso"))
    from dataclasses import fields, replace
    config = METHODS[name].defaults(model, erasure)
    small = dict(iterations=3, warmup=min(1, getattr(config, "warmup", 0)), batch_size=4, num_images=8, prompts=6, lr=1e-3, anchor_steps=2)
    config = replace(config, **{k: v for k, v in small.items() if k in {f.name for f in fields(config)}})
    if family in ("sd3", "flux") and name in JOINT:
        with pytest.raises(ValueError, match=f"works on cross-attention, and '{family}' attends to words and places together"): METHODS[name].make(model, [erasure], config, cache)
        return
    method = METHODS[name].make(model, [erasure], config, cache)
    before = {k: w.clone() for k, w in method.moved.weights().items()}
    if hasattr(method, "solve"): method.solve()
    else: assert all(torch.isfinite(torch.tensor(s.values.get("loss_u", 0.))) for s in unlearn(method))
    after = method.moved.weights()
    assert any(not torch.equal(before[k], after[k]) for k in before) and all(w.isfinite().all() for w in after.values())


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3", "flux"])
def test_saved_and_loaded_by_plain_diffusers(family, tmp_path):
    from diffusers import DiffusionPipeline
    FAMILIES[family]().save_pretrained(tmp_path / "m", safe_serialization=True)
    left_out = dict(text_encoder_3=None, tokenizer_3=None) if family == "sd3" else {}
    ours, theirs = Denoiser.load(str(tmp_path / "m")), DiffusionPipeline.from_pretrained(tmp_path / "m", use_safetensors=True, **left_out)
    for k, v in getattr(theirs, ours.part).state_dict().items(): assert torch.equal(v, ours.unet.state_dict()[k])
    assert ours.fingerprint() == Denoiser.of(FAMILIES[family]()).fingerprint()
    again = Denoiser.load(str(tmp_path / "m"), unet=tmp_path / "m" / ours.part)  # an exact reference is loaded so
    assert again.fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_whole_run_from_directory_to_directory(family, tmp_path):
    from conftest import parameters
    from safetensors.torch import load_file
    from unlearn_wb.assessment import Candidate
    from unlearn_wb.workbench import Experiment
    FAMILIES[family]().save_pretrained(tmp_path / "m", safe_serialization=True)
    x = Experiment(parameters(base_model=str(tmp_path / "m"), concept_type="style", retain="Monet", run_dir=str(tmp_path / "run"), lora=1., log_with="", lr=1e-2), "doco")
    x.train(), x.examine()
    assert "look at the grids" in x.finish()["verdict"]
    lora = load_file(tmp_path / "run/model/lora.safetensors")
    assert all(k.startswith(f"{x.model.part}.") for k in lora) and (tmp_path / "run/model/lora-kohya.safetensors").exists() == (family == "sdxl")
    base, asked = Denoiser.load(str(tmp_path / "m")), (torch.randn(2, 4, 8, 8, generator=seeded(2)), torch.tensor(500), x.model.embed(["van gogh", "a cat"]))
    with torch.no_grad():
        before, after = base.eps(*asked), x.model.eps(*asked)
        base.pipe.load_lora_weights(str(tmp_path / "run/model"), weight_name="lora.safetensors")
        assert (base.eps(*asked) - after).abs().max() < 1e-3 * (before - after).abs().max()
    model = Candidate.open(str(tmp_path / "run")).model
    assert model.fingerprint() == x.model.fingerprint() == Denoiser.load(str(tmp_path / "run/model")).fingerprint() != Denoiser.load(str(tmp_path / "m")).fingerprint()


@pytest.mark.parametrize("family", WITH_T5)
def test_a_word_is_learnt_as_if_it_stood_in_the_encoders_table(family):
    "Concept inversion's first step against textual inversion as it is usually written: the table's rows move, everything else is frozen."
    model, concept, prompts = Denoiser.of(WITH_T5[family](), family), "van gogh", ["a cat by van gogh", "van gogh, a dog", "a van gogh and a van gogh"]
    latents, before, asked = torch.randn(3, 4, 8, 8, generator=seeded(1)), model.fingerprint(), model.embed(prompts)
    learnt = list(learn_word(model, concept, latents, prompts, steps=3, batch=4, pace=.5))
    assert model.fingerprint() == before and torch.equal(model.embed(prompts), asked) and len({loss for _, loss, _ in learnt}) == 3
    encoders = [(t, e) for t, e in ((model.tokenizer, model.text_encoder), (model.tokenizer_2, model.text_encoder_2), (model.tokenizer_3, model.text_encoder_3)) if e is not None]
    assert len(learnt[0][2]) == len(encoders) == {"sdxl": 2, "sd3": 2, "sd3-t5": 3, "flux": 2}.get(family, 1)
    tables, g, start = [e.get_input_embeddings().weight for _, e in encoders], seeded(0, "word", concept), []
    places, saved = [torch.tensor(t(concept, add_special_tokens=False).input_ids) for t, _ in encoders], [t.detach().clone() for t in tables]
    for table, place in zip(tables, places):
        start.append(table.mean(0) + .5 * table.std() * torch.randn(len(place), table.shape[1], generator=g))
        with torch.no_grad(): table[place] = start[-1]
        table.requires_grad_(True)
    g = seeded(0, 0, "recall")
    i, t, eps = torch.randint(3, (4,), generator=g), torch.randint(1, 1000, (4,), generator=g), torch.randn(4, 4, 8, 8, generator=g)
    loss = (model.eps(add_noise(latents[i], eps, model.abar[t]), t, model.embed([prompts[k] for k in i])) - eps).square().mean()
    loss.backward()
    assert abs(loss.item() - learnt[0][1]) < 1e-5 * loss.item()
    for table, place, was, first, word in zip(tables, places, saved, start, learnt[0][2]):
        g = table.grad[place]
        clear = g.abs() > 1e-6 * g.abs().max()
        torch.testing.assert_close((word - first)[clear], (-.5 * was.std() * g / (g.abs() + 1e-8))[clear], rtol=1e-2, atol=1e-5)  # Adam's first step


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_trained_on_by_the_plain_loss_and_put_back(family):
    "The first step against AdamW's on the loss as it is usually written: all weights, each by the sign of its gradient."
    model, prompts = Denoiser.of(FAMILIES[family](), family), ["a cat by van gogh", "a dog", "a house"]
    latents, before = torch.randn(3, 4, 8, 8, generator=seeded(1)), model.fingerprint()
    old = {k: w.detach().clone() for k, w in model.unet.named_parameters()}
    g = seeded(0, 0, "relearn")
    i, t, eps = torch.randint(3, (4,), generator=g), torch.randint(1, 1000, (4,), generator=g), torch.randn(4, 4, 8, 8, generator=g)
    model.unet.requires_grad_(True)
    loss = (model.eps(add_noise(latents[i], eps, model.abar[t]), t, model.embed([prompts[k] for k in i])) - eps).square().mean()
    grads = dict(zip(old, torch.autograd.grad(loss, list(model.unet.parameters()), allow_unused=True)))
    model.unet.requires_grad_(False)
    for lr, given in ((1e-3, {"lr": 1e-3}), (1e-5, {})):  # without one a tenth of the sandbox's
        with restored(model):
            (step, first), *_ = tune(model, latents, prompts, steps=1, batch=4, **given)
            assert step == 1 and abs(first - loss.item()) < 1e-5 * first
            moved = 0
            for k, w in model.unet.named_parameters():
                if grads[k] is None: continue
                clear = grads[k].abs() > 1e-3 * max(1e-3, grads[k].abs().max())
                moved += int(clear.sum())
                torch.testing.assert_close((w - old[k] * (1 - lr * 1e-2))[clear], -lr * grads[k].sign()[clear], rtol=2e-2, atol=1e-7)
            assert moved > 1000 and not any(w.requires_grad for w in model.unet.parameters())
        assert model.fingerprint() == before


@torch.no_grad()
@pytest.mark.parametrize("goal", ["original", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_words_found_are_those_of_the_lowest_loss(family, goal):
    "The attack's search against trying every word by hand, and a beam of one against the same, word by word."
    model, original, prompts = Denoiser.of(FAMILIES[family](), family), Denoiser.of(FAMILIES[family](), family), ["a cat by van gogh", "van gogh, a dog", "a boat by van gogh"]
    for p in model.unet.parameters(): p.add_(.1 * torch.randn(p.shape, generator=seeded(int(p.numel())))).requires_grad_(True)  # one that was trained
    latents, before = torch.randn(3, 4, 8, 8, generator=seeded(1)), model.fingerprint()
    words = [model.tokenizer.decode([k]).strip() for k in readable(model)]
    every = find_words(model, original, latents, prompts, words=1, goal=goal, tries=10**6)
    short = find_words(model, original, latents, prompts, words=2, goal=goal, beam=1, tries=40)
    assert model.fingerprint() == before and all(p.grad is None for p in model.unet.parameters())
    g = seeded(0, "attack")
    t = ((torch.arange(3) + torch.rand(3, generator=g)) / 3 * 999).long()[torch.randperm(3, generator=g)]
    eps = torch.randn(3, 4, 8, 8, generator=g)
    x_t = add_noise(latents, eps, model.abar[t])
    goal = original.eps(x_t, t, original.embed(prompts)) if goal == "original" else eps
    losses = lambda many: (model.eps(x_t.repeat(len(many), 1, 1, 1), t.repeat(len(many)), model.embed([f"{w} {p}" for w in many for p in prompts])) - goal.repeat(len(many), 1, 1, 1)).square().unflatten(0, (-1, 3)).mean((1, 2, 3, 4)).tolist()
    by_hand = dict(zip(words, losses(words)))
    assert len(every) == len(words) and [w for w, _ in every][0] == min(by_hand, key=by_hand.get)
    assert all(abs(l - by_hand[w]) < 1e-4 * l for w, l in every)
    one, two = ([x for x in short if len(x[0].split()) == n] for n in (1, 2))
    assert len(one) == len(two) == 40 and all(w.startswith(one[0][0] + " ") and abs(l - mine) < 1e-4 * l for (w, l), mine in zip(two, losses([w for w, _ in two])))
    rest = [l for w, l in by_hand.items() if w not in dict(one)]
    assert sum(l for _, l in one) / 40 < sum(rest) / len(rest), "the gradient's forty are better than the others"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_never_name_a_concept_are_those_that_bring_the_text_nearest(family):
    "The search against trying every token at every place by hand, from the same start in the same order."
    model = Denoiser.of(FAMILIES[family](), family)
    e = Erasure.find(model, "van gogh", kind="style", retain=("monet",))
    pairs = prompt_pairs(e, 5)
    vector = concept_vector(model, e, pairs=5)
    torch.testing.assert_close(vector, sum(model.embed([named])[0] - model.embed([plain])[0] for named, plain in pairs) / 5)
    (found, loss), = ring(model, e, ["a cat"], vector, 1.5, length=4, tries=10**6, rounds=1)
    assert all(p.grad is None for p in model.text_encoder.parameters())
    words = [w for w in (model.tokenizer.decode([k]).strip() for k in readable(model)) if w not in ("van", "gogh")]
    distances = lambda texts: (model.embed(texts) - model.embed(["a cat"]) - 1.5 * vector).square().mean((1, 2)).tolist()
    g = seeded(0, "ring", "a cat")
    text = ["a", "cat", *(words[k] for k in torch.randint(len(words), (2,), generator=g))]
    for place in torch.randperm(4, generator=g).tolist():
        others = [text[:place] + [w] + text[place + 1:] for w in [text[place], *words]]
        near = distances([" ".join(t) for t in others])
        text = others[near.index(min(near))]
    assert found == " ".join(text) and abs(loss - distances([found])[0]) < 1e-4 * loss
    few, all_of_them = (sum(ring(model, e, ["a cat"], vector, 1.5, length=4, tries=tries, rounds=1, seed=s)[0][1] for s in range(4)) for tries in (10, 10**6))
    assert few < 1.08 * all_of_them, "the gradient's ten are nearly as good as all"


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_weights_that_are_there_in_16_bits_alone_are_found(family, tmp_path):
    "`save_pretrained(variant='fp16')`, as most large models are passed on; in one file, and in several."
    pipe = FAMILIES[family]()
    whole = Denoiser.of(pipe, family).fingerprint()
    pipe.save_pretrained(tmp_path / "one", variant="fp16")
    pipe.save_pretrained(tmp_path / "several", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "several" / Denoiser.door(pipe).part).glob("diffusion_pytorch_model.fp16-*-of-*.safetensors"))) > 1
    assert Denoiser.load(str(tmp_path / "one")).fingerprint() == Denoiser.load(str(tmp_path / "several")).fingerprint() == whole


def test_a_scheduler_without_timesteps_of_its_own_is_named():
    from diffusers import EDMDPMSolverMultistepScheduler
    pipe = tiny_xl_pipeline()
    pipe.scheduler = EDMDPMSolverMultistepScheduler()
    with pytest.raises(BadModel, match="model 'edm' has a EDMDPMSolverMultistepScheduler, which says no share of signal"): Denoiser.of(pipe, "edm")


def test_another_kind_of_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(BadModel, match="is a KandinskyPipeline; StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline and FluxPipeline are known"): Denoiser.load(str(tmp_path))


def test_a_runs_lora_loads_with_plain_diffusers_and_is_the_run(tmp_path):
    from conftest import parameters, small_world
    from diffusers import StableDiffusionPipeline
    from unlearn_wb.workbench import Experiment
    x = Experiment(parameters(concept="Van Gogh", run_dir=str(tmp_path / "run"), lora=1., precision="fp32"))
    x.train(), x.examine(), x.finish()
    model = tmp_path / "run/model"
    card = (model / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {small_world()}\n") and "| target | van gogh |" in card and '"method": "doco"' in card
    pipe = StableDiffusionPipeline.from_pretrained(small_world(), use_safetensors=True, safety_checker=None, requires_safety_checker=False)
    base = pipe.unet(torch.ones(1, 4, 16, 16), 500, x.model.embed(["van gogh"])).sample
    pipe.load_lora_weights(str(model), weight_name="lora.safetensors")
    with torch.no_grad(): theirs, ours = pipe.unet(torch.ones(1, 4, 16, 16), 500, x.model.embed(["van gogh"])).sample, x.model.unet(torch.ones(1, 4, 16, 16), torch.tensor(500), x.model.embed(["van gogh"])).sample
    assert (theirs - ours).abs().max() < 1e-3 * (base - ours).abs().max()
    from safetensors.torch import load_file
    kohya = load_file(model / "lora-kohya.safetensors")
    k = next(k.removesuffix(".alpha") for k in kohya if k.endswith(".alpha"))
    assert kohya[f"{k}.lora_down.weight"].shape[0] == kohya[f"{k}.alpha"] == kohya[f"{k}.lora_up.weight"].shape[1]


def test_nothing_is_uploaded_without_a_hub(tmp_path, monkeypatch):
    from unlearn_wb.export import push
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="was not uploaded to 'me/x'"): push(tmp_path, "me/x")
