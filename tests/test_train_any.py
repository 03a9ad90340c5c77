"""The other training notebooks, end to end under papermill, and several concepts at once and in turn."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, parameters, small_world

from unlearn_wb.diffusion import Denoiser
from unlearn_wb.registry import METHODS
from unlearn_wb.workbench import COMMON, Experiment

SHORT = dict(iterations=4, num_images=8, eval_images=2, batch_size=4)


def papermill(notebook, cwd, **values):
    flags = [x for k, v in {"base_model": small_world(), **values}.items() for x in ("-p", k, str(v))]
    return subprocess.run([sys.executable, "-m", "papermill", str(ROOT / f"nbs/{notebook}.ipynb"), "out.ipynb", "--no-progress-bar", *flags], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("notebook,values", [
    ("train_advanchor", dict(SHORT, options="anchor_steps=2")),
    ("train_baseline", dict(method="uce", eval_images=2)), ("train_baseline", dict(SHORT, method="spm", concept="Snoopy+Mickey", mode="sequential"))])
def test_runs_under_papermill_and_leaves_a_plain_model(notebook, values, tmp_path):
    p = papermill(notebook, tmp_path, **values)
    assert p.returncode == 0, p.stderr[-3000:]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.ipynb", "runs"]
    run, = (tmp_path / "runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    assert report["method"] in METHODS and report["target_unlearned"]["images"] >= 2
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file
    saved, base, changed = UNet2DConditionModel.from_pretrained(run / "model/unet").state_dict(), Denoiser.load(small_world()).unet.state_dict(), load_file(run / "model/changed.safetensors")
    different = {k for k in base if not torch.equal(saved[k], base[k])}
    assert different and different <= set(changed) and all(torch.equal(saved[k], w) for k, w in changed.items())
    assert set(saved) == set(base), "a plain pipeline knows no adapters"


def experiment(method, **changes): return Experiment({k: v for k, v in parameters(**SHORT | changes).items() if k in COMMON}, method)


def test_concepts_in_turn_start_from_each_others_result_and_resume(tmp_path, monkeypatch):
    p = dict(concept="Snoopy+Mickey", mode="sequential")
    whole = experiment("conabl", run_dir=str(tmp_path / "whole"), **p)
    trace = whole.train()
    assert trace.stage.tolist() == [1] * 4 + [2] * 4 and trace.step.tolist() == list(range(1, 9))
    first = experiment("conabl", run_dir=str(tmp_path / "left"), **p)
    enter = first._enter
    def leave(k):
        if k == 1: raise KeyboardInterrupt
        enter(k)
    first._enter = leave
    with pytest.raises(KeyboardInterrupt): first.train()
    again = experiment("conabl", run_dir=str(tmp_path / "left"), resume=True, **p)
    again.train()
    a, b = (e.method.moved.weights() for e in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    from safetensors.torch import load_file
    done = load_file(tmp_path / "whole/stages/1-snoopy/done.safetensors")
    assert all(torch.equal(whole.method.moved.start[k], w) for k, w in done.items())


@pytest.mark.parametrize("changes,sentence", [
    (dict(mode="both"), "unknown mode 'both'"), (dict(options="eta"), "option 'eta' is not of the form name=value"), (dict(options="etta=2"), "unknown option 'etta'; did you mean 'eta'"), (dict(options="eta=much"), "option eta = 'much' is not a float"),
    (dict(combiner="UPGrad"), "combiner UPGrad weighs two gradients, and keep = none gives one")])
def test_refused_with_a_sentence(changes, sentence, tmp_path):
    with pytest.raises(ValueError) as e: experiment("esd", run_dir=str(tmp_path / "r"), **({"preset": "paper"} if "combiner" in changes else {}), **changes)
    assert sentence in str(e.value)


def test_a_closed_form_has_no_iterations(tmp_path):
    with pytest.raises(ValueError, match="method uce has no iterations; leave it at its default"): experiment("uce", run_dir=str(tmp_path / "r"))


def test_concepts_that_contain_each_other(tmp_path):
    with pytest.raises(ValueError, match="'dog' is part of 'a dog'"): experiment("conabl", concept="dog+a dog", run_dir=str(tmp_path / "r"))
