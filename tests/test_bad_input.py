"""Bad input gets one sentence that names the value and what would be right."""
import json
import math
import shutil
from dataclasses import fields, replace

import pytest
from conftest import ROOT, parameters, tiny_pipeline

from unlearn_wb.concepts import Erasure
from unlearn_wb.diffusion import BadModel, Denoiser
from unlearn_wb.loop import unlearn
from unlearn_wb.registry import METHODS
from unlearn_wb.workbench import Experiment

CASES = {
    "scope": (dict(scope="xatn"), "unknown scope 'xatn'; did you mean 'xattn'"),
    "combiner": (dict(combiner="surgry"), "unknown combiner 'surgry'; did you mean 'surgery'"),
    "granularity": (dict(granularity="layer"), "unknown granularity 'layer'; choose one of global, tensor"),
    "sees": (dict(sees="x0"), "unknown sees 'x0'"),
    "preset": (dict(preset="papr"), "unknown preset 'papr'; did you mean 'paper'"),
    "empty": (dict(concept="  "), "the concept is empty"),
    "half empty": (dict(concept="Snoopy+"), "the concept before or after a + in 'Snoopy+' is empty"),
    "nothing but a plus": (dict(concept="+"), "the concept before or after a + in '+' is empty"),
    "retain twice": (dict(retain="Monet+monet"), "'Monet' is named twice to retain"),
    "endless anchor": (dict(anchor="small white dog with black ears " * 20), "is cut off; put it nearer to the front, or say it in fewer words"),
    "repository": (dict(push_to_hub="me/my model"), "push_to_hub = 'me/my model' cannot be a repository's name; give user/name"),
    "unknown": (dict(concept="van gog"), "unknown concept 'van gog'; did you mean 'van gogh'"),
    "listed": (dict(concept="Van Gogh, Picasso"), "'Van Gogh, Picasso' names several concepts; join them by +: 'van gogh + picasso'"),
    "listed in words": (dict(concept="snoopy and Mickey"), "join them by +: 'snoopy + mickey'"),
    "retain listed": (dict(retain="Monet; Picasso"), "join them by +: 'monet + picasso'"),
    "linked": (dict(concept="Starry Night"), "unknown concept 'Starry Night'; it is a phrase linked to 'van gogh': name that"),
    "itself": (dict(concept="Snoopy", anchor="snoopy"), "the anchor 'snoopy' is the concept itself"),
    "anchor forgotten": (dict(concept="Van Gogh + Monet", anchor="monet"), "the anchor 'monet' is to be forgotten in the same run"),
    "anchor": (dict(anchor="zeppelin"), "unknown anchor 'zeppelin'"),
    "twice": (dict(concept="Snoopy+snoopy"), "names a concept twice"),
    "both": (dict(concept="Snoopy", retain="Snoopy"), "both to be forgotten and to be retained"),
    "retain": (dict(retain="Snopy"), "unknown concept 'Snopy' to retain"),
    "type": (dict(concept_type="artist"), "unknown concept_type 'artist'; choose style or instance"),
    "model": (dict(base_model="/nowhere"), "base model '/nowhere' does not exist"),
    "no model": (dict(base_model=""), "the base model is empty; give 'sandbox'"),
    "misspelt model": (dict(base_model="sandbx"), "base model 'sandbx' does not exist; give 'sandbox'"),
    "warm-up": (dict(warmup=12), "warmup = 12 leaves nothing of iterations = 12"),
    "iterations": (dict(iterations=-5, warmup=0), "iterations = -5; a number of at least 1 is needed"),
    "batch size": (dict(batch_size=-8), "batch_size = -8; a number of at least 1"),
    "learning rate": (dict(lr=-1e-3), "lr = -0.001; a number of at least 0"),
    "no number": (dict(lr=float("nan")), "lr = nan; a number of at least 0"),
    "weight": (dict(weight=-2.), "weight = -2.0; a number of at least 0"),
    "option": (dict(options="weight_decay=-1"), "weight_decay = -1.0; a number of at least 0"),
    "none": (dict(options="prompts=0"), "prompts = 0; a number of at least 1"),
    "timesteps": (dict(options="t_min=500, t_max=200"), "t_min = 500 with t_max = 200; t_min must be smaller"),
    "too late": (dict(options="t_max=1001"), "t_max = 1001; the model has 1000 timesteps"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_sentence(case, tmp_path):
    change, sentence = CASES[case]
    with pytest.raises(ValueError) as e: Experiment(parameters(run_dir=str(tmp_path / "run"), **change))
    assert sentence in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("name", METHODS)
def test_numbers_of_every_method(name):
    sandbox = Denoiser.load()
    config = METHODS[name].defaults(sandbox, Erasure.find(sandbox, "Snoopy"))
    numbers = [f.name for f in fields(config) if type(getattr(config, f.name)) in (int, float)]
    assert len(numbers) > 3
    for n in numbers:
        for wrong in (-1, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"^{n} = {wrong}; a number of at least"): replace(config, **{n: wrong})


def test_method(tmp_path):
    with pytest.raises(ValueError, match="unknown method 'dooco'; did you mean 'doco'"): Experiment(parameters(run_dir=str(tmp_path)), "dooco")


@pytest.fixture
def copied(tmp_path): return shutil.copytree(ROOT / "data/sandbox/base", tmp_path / "model")


def test_pickled_weights_are_refused(copied):
    weights = copied / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadModel, match="only pickled weights in unet/"): Denoiser.load(str(copied))


def test_incomplete_directory(copied):
    shutil.rmtree(copied / "vae")
    with pytest.raises(BadModel, match="incomplete: vae/"): Denoiser.load(str(copied))
    (copied / "model_index.json").unlink()
    with pytest.raises(BadModel, match="no model_index.json"): Denoiser.load(str(copied))


def test_damaged_weights(copied):
    weights = copied / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadModel, match="cannot be loaded"): Denoiser.load(str(copied))


def test_unknown_prediction_type():
    with pytest.raises(BadModel, match="predicts 'sample'"): Denoiser(tiny_pipeline("sample"), "tiny")


def test_run_dir_of_another_configuration(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"concept": "Monet", "method": "doco"}))
    with pytest.raises(ValueError, match="holds a run with another configuration.*concept is"): Experiment(parameters(run_dir=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"concept": "Monet", "method": "doco"}


def test_run_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run' cannot be written to .Not a directory.; give a folder that can"): Experiment(parameters(run_dir=str(tmp_path / "file/run")))


def test_spaces_in_a_concept_do_not_matter(tmp_path):
    assert Experiment(parameters(run_dir=str(tmp_path / "run"), concept=" Van   Gogh ")).targets == "van gogh"


def test_not_finite_stops_before_the_weights_are_touched(tmp_path):
    import torch
    e = Experiment(parameters(run_dir=str(tmp_path / "run"), warmup=1))
    stream = iter(unlearn(e.method))
    next(stream)
    e.method.data.latents.fill_(float("inf"))
    next(stream)  # its batch was drawn before
    before = {k: v.clone() for k, v in e.method.params.items()}
    with pytest.raises(FloatingPointError, match="not finite"): next(stream)
    assert all(torch.equal(before[k], v) for k, v in e.method.params.items())
