"""The one door: the same answers as diffusers' own pipeline, whatever the network predicts."""
import pytest
import torch
from conftest import ROOT, tiny_pipeline

from unlearn_wb.diffusion import Denoiser, eps_from_v, sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sampler_paints_what_diffusers_paints(kind):
    pipe = tiny_pipeline(kind)
    model = Denoiser(pipe, "tiny")
    prompts, seeds = ["a cat", "a dog by monet"], [5, 6]
    ours = sample(model, prompts, seeds, steps=6, guidance=3.)
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompts, latents=latents, num_inference_steps=6, guidance_scale=3., output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_velocity_becomes_noise():
    eps_model, v_model = Denoiser(tiny_pipeline("epsilon"), "e"), Denoiser(tiny_pipeline("v_prediction"), "v")
    x, t, c = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 990]), eps_model.embed(["a", "b", "c"])
    raw = eps_model.eps(x, t, c)  # the same weights: here the output is noise, there it is velocity
    torch.testing.assert_close(v_model.eps(x, t, c), eps_from_v(x, raw, v_model.abar[t]))
    torch.testing.assert_close(v_model.eps(x, torch.tensor(500), c)[1], v_model.eps(x, t, c)[1])


def test_an_image_does_not_depend_on_the_batch():
    model = Denoiser.load("sandbox")
    prompts, seeds = ["a photo of a cat", "a boat by monet", "guernica with a house", "snoopy", "a husky"], [1, 2, 3, 4, 5]
    together, apart = sample(model, prompts, seeds, steps=5), torch.cat([sample(model, [p], [s], steps=5) for p, s in zip(prompts, seeds)])
    in_twos = sample(model, prompts, seeds, steps=5, batch=2)
    assert (together - apart).abs().max() < 2e-3 and (together - in_twos).abs().max() < 2e-3


def test_fingerprint_notices_one_weight():
    model = Denoiser(tiny_pipeline(), "tiny")
    before = model.fingerprint()
    assert before == Denoiser(tiny_pipeline(), "tiny").fingerprint()
    next(model.unet.parameters()).data.view(-1)[0] += 1e-3
    assert model.fingerprint() != before


def test_library_imports_neither_nbdev_nor_fastcore():
    import subprocess, sys
    code = "import sys, unlearn_wb.workbench, unlearn_wb.sandbox; bad = [m for m in sys.modules if m.split('.')[0] in ('nbdev', 'fastcore', 'execnb', 'torchvision')]; assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_library_without_its_project_says_where_the_sandbox_is(tmp_path, monkeypatch):
    monkeypatch.setattr("unlearn_wb.diffusion.DATA", tmp_path / "data")
    from unlearn_wb.diffusion import BadModel
    with pytest.raises(BadModel, match="the sandbox is not at .*; install that one, with pip install -e"): Denoiser.load()
