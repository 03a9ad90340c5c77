"""The one door: the same answers as diffusers' own pipeline, whatever the network predicts."""
import pytest
import torch
from conftest import ROOT, tiny_pipeline

from unlearn_wb.diffusion import Denoiser, eps_from_v, sample, x0_hat


def test_a_schedule_that_ends_in_pure_noise_breaks_nothing():
    "Its own scheduler says that no signal is left at the last timestep, and x_0 cannot be asked of noise alone."
    from diffusers import DDIMScheduler
    pipe = zero_snr(tiny_pipeline("v_prediction"))
    painted = sample(Denoiser(pipe, "tiny"), ["a cat"], [1], steps=5)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    model, x, t = Denoiser(pipe, "tiny"), torch.randn(2, 4, 8, 8), torch.tensor(999)
    torch.testing.assert_close(sample(model, ["a cat"], [1], steps=5), painted)
    assert x0_hat(x, model.eps(x, t, model.embed(["a cat", "a dog"])), model.abar[t[None]]).isfinite().all()


def zero_snr(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return pipe


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "v_prediction, zero SNR"])
def test_sampler_paints_what_diffusers_paints(kind):
    pipe = tiny_pipeline(kind.split(",")[0])
    if "zero" in kind: zero_snr(pipe)
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


def test_large_images_are_painted_and_decoded_a_few_at_a_time(monkeypatch):
    "48 pictures of 512 pixels at once would take 34 GB in the VAE alone, at the 0.7 GB for each that it takes on a CPU."
    pipe, asked, decoded = tiny_pipeline(), [], []
    pipe.unet.register_to_config(sample_size=64)
    model = Denoiser.of(pipe, "large")  # images of 128 pixels from latents of 64
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"} != {type(p).__name__ for p in Denoiser.of(tiny_pipeline(), "small").unet.attn_processors.values()}  # plain products would hold a score for each two of its 4,096 places
    ask, decode = model.eps, pipe.vae.decode
    monkeypatch.setattr(model, "eps", lambda x, t, c: asked.append(len(x)) or ask(x, t, c))
    monkeypatch.setattr(pipe.vae, "decode", lambda z: decoded.append(len(z)) or decode(z))
    images = sample(model, ["a cat"] * 20, range(20), steps=1, guidance=1)
    assert asked == [16, 4] and images.shape == (20, 3, 128, 128)
    assert decoded == [4] * 5 and model.encode(images).shape == (20, 4, 64, 64)


def test_painting_goes_on_with_fewer_images_when_memory_runs_out(monkeypatch, capsys):
    model, done = Denoiser.of(tiny_pipeline(), "tiny"), []
    paint = lambda: sample(model, [f"{k} cats" for k in range(7)], range(7), steps=2, callback=lambda k, n: done.append((k, n)))
    whole = paint()
    ask = model.eps
    def tight(x, t, c):
        if len(x) > 6: raise torch.OutOfMemoryError("full")  # three images, each asked with and without its prompt
        return ask(x, t, c)
    monkeypatch.setattr(model, "eps", tight)
    done.clear()
    assert torch.allclose(paint(), whole, atol=1e-5) and done == [(3, 7), (6, 7), (7, 7)]
    assert "painting goes on with 3 at a time" in capsys.readouterr().out
    def hopeless(x, t, c): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(model, "eps", hopeless)
    with pytest.raises(torch.OutOfMemoryError): paint()


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
    with pytest.raises(BadModel, match="the sandbox is not at .*; install the project, with pip install"): Denoiser.load()
