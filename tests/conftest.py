"""Shared pieces: tiny random pipelines, and short runs on the sandbox."""
import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = dict(iterations=12, warmup=4, num_images=8, eval_images=2, batch_size=4)
os.environ.pop("JPY_SESSION_NAME", None)  # nobody watches
torch.set_num_threads(1)  # bits depend on it,
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start as well


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the marks
def pytest_collection_modifyitems(items):
    "Tests that share something a module makes once stay in one process, so that it is made once; they begin, so that the others can fill the end."
    for item in items:
        scopes = [item._fixtureinfo.name2fixturedefs[n][-1].scope for n in item.fixturenames if n in item._fixtureinfo.name2fixturedefs]
        if "module" in scopes: item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish(session):
    "xdist knows a group by its name at the end of a test's; a pytest that does not let it write there makes everything twice, and says nothing."
    grouped = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group")]
    assert not getattr(session.config.option, "loadgroup", False) or all("@" in name for name in grouped), f"xdist does not see the groups: {grouped[0]}"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    "A Chromium for a module of browser tests; its driver holds an event loop, which the modules after it must not find."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"])
        yield b
        b.close()


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    "Every test stands in an empty folder, so that nothing depends on the project's root or litters it."
    monkeypatch.chdir(tmp_path)


@functools.cache
def small_world():
    "The sandbox with a denoiser of random weights, a tenth of the work: the base model of tests that do not ask what is painted. A diffusers directory, Van Gogh's reference beside it."
    if os.environ.get("SMALL_WORLD"): return os.environ["SMALL_WORLD"]  # another process has made it
    from diffusers import UNet2DConditionModel
    world = Path(tempfile.mkdtemp(prefix="small-world-"))
    atexit.register(shutil.rmtree, world, ignore_errors=True)
    shutil.copytree(ROOT / "data/sandbox/base", world / "base", ignore=shutil.ignore_patterns("unet"))
    config = UNet2DConditionModel.load_config(ROOT / "data/sandbox/base/unet") | dict(block_out_channels=(16, 32), norm_num_groups=8)
    for seed, folder in enumerate(("base/unet", "without/van-gogh")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            UNet2DConditionModel.from_config(config).save_pretrained(world / folder)
    return str(world / "base")


def parameters(**changes):
    from unlearn_wb.workbench import PARAMETERS
    return {**PARAMETERS, **SHORT, "base_model": small_world(), **changes}


@functools.cache
def tokenizer():
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(ROOT / "data/sandbox/base/tokenizer")


def tiny_clip(width, layers=3, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(hidden_size=width, **(dict(projection_dim=width) if projection else {}), intermediate_size=32, num_attention_heads=2, num_hidden_layers=layers, vocab_size=len(tokenizer()), max_position_embeddings=32,
                                                                                        bos_token_id=tokenizer().bos_token_id, eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().pad_token_id))


def tiny_vae(**more):
    from diffusers import AutoencoderKL
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16, **more)


FLOW_VAE = dict(shift_factor=.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


@functools.cache
def t5_tokenizer():
    "T5's kind of tokenizer: the sandbox's words whole, others letter by letter; no mark at the beginning."
    from transformers import T5Tokenizer
    spelled = {tokenizer().decode([k]).strip() for k in range(len(tokenizer()))}
    words = sorted(w for w in spelled if w.isalpha() and w.islower())
    return T5Tokenizer(vocab=[("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -9.), *(("▁" + w, -5.) for w in words), *((chr(c), -9.) for c in range(33, 127))], extra_ids=0, model_max_length=48)


def tiny_t5(width):
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"))


def tiny_pipeline(prediction_type="epsilon", seed=0):
    "A Stable Diffusion pipeline of a few thousand random weights."
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    torch.manual_seed(seed)
    text = tiny_clip(16, 2)
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = tiny_vae()
    scheduler = DPMSolverMultistepScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1)
    return StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer(), unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def tiny_xl_pipeline(seed=0):
    "An SDXL pipeline (two text encoders, pooled text and sizes as conditions) of a few thousand random weights."
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    torch.manual_seed(seed)
    one, two = tiny_clip(16), tiny_clip(24, projection=True)
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=40, attention_head_dim=2, transformer_layers_per_block=(1, 2),
                                addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 24, use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = tiny_vae()
    scheduler = EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    return StableDiffusionXLPipeline(vae=vae, text_encoder=one, text_encoder_2=two, tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False)


def tiny_flow_pipeline(t5=False, seed=0):
    "A Stable Diffusion 3 pipeline (transformer, flow matching, two CLIPs, with or without T5) of a few thousand random weights."
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    torch.manual_seed(seed)
    one, two = tiny_clip(16, projection=True), tiny_clip(24, projection=True)
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=40, pos_embed_max_size=8)
    vae = tiny_vae(**FLOW_VAE)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.), vae=vae, text_encoder=one, tokenizer=tokenizer(), text_encoder_2=two, tokenizer_2=tokenizer(), text_encoder_3=tiny_t5(48) if t5 else None, tokenizer_3=t5_tokenizer() if t5 else None)


def tiny_flux_pipeline(guidance_embeds=True, seed=0):
    "A FLUX.1 pipeline (transformer of two kinds of blocks, flow matching, CLIP's pooled text, T5's words) of a few thousand random weights."
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    torch.manual_seed(seed)
    text = tiny_clip(16, 2)
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4))
    vae = tiny_vae(**FLOW_VAE)
    return FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=guidance_embeds), vae=vae, text_encoder=text, tokenizer=tokenizer(), text_encoder_2=tiny_t5(32), tokenizer_2=t5_tokenizer())
