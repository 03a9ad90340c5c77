"""The user's own line, end to end: papermill, the run folder, the saved model in plain diffusers."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT, SHORT, parameters, small_world

FLAGS = [x for k, v in SHORT.items() for x in ("-p", k, str(v))]


def papermill(cwd, *extra, notebook="train_doco", **kw):
    return subprocess.run([sys.executable, "-m", "papermill", str(ROOT / f"nbs/{notebook}.ipynb"), "out.ipynb", "--no-progress-bar", *extra], cwd=cwd, capture_output=True, text=True, **kw)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("user")
    p = papermill(cwd, "-p", "concept", "Van Gogh", *FLAGS)
    assert p.returncode == 0, p.stderr[-3000:]
    return cwd


def test_writes_only_the_run_folder_and_the_output(done):
    assert sorted(p.name for p in done.iterdir()) == ["out.ipynb", "runs"]
    assert [p.name for p in (done / "runs").iterdir()] == ["van-gogh-doco"]


def test_run_folder_is_complete(done):
    run = done / "runs/van-gogh-doco"
    assert {"config.json", "trace.parquet", "images", "checkpoints", "model", "report.json", "report.html", "examination.parquet"} <= {p.name for p in run.iterdir()}
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")], "a pickle in the run folder"
    assert (run / "model/README.md").read_text().startswith("---\nbase_model: sandbox\n")
    trace = pd.read_parquet(run / "trace.parquet")
    assert trace.step.tolist() == list(range(1, 13)) and (trace.phase == "warm-up").sum() == 4
    assert {"loss_u", "loss_r", "loss_d", "d_acc", "angle", "norm_u", "norm_r", "removed", "conflict", "lr", "seconds"} <= set(trace)
    config = json.loads((run / "config.json").read_text())
    assert config["iterations"] == 12 and config["erasures"][0]["anchor"] == "painting" and config["base_model_hash"] and config["versions"]["torch"]
    report = json.loads((run / "report.json").read_text())
    assert "van gogh" in report["verdict"] and report["target_unlearned"]["images"] == 2 and "target_reference (never saw it)" in report


def test_notebook_shows_static_pictures(done):
    nb = json.loads((done / "out.ipynb").read_text())
    pictures = [o for c in nb["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 9
    assert "application/vnd.jupyter.widget-state+json" not in json.dumps(nb["metadata"])
    page = (done / "runs/van-gogh-doco/report.html").read_text()
    assert page.count("data:image/png;base64") >= 9 and not re.search(r'(src|href)="https?:', page)


def test_plain_diffusers_paints_what_the_run_painted(done):
    script = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
image = pipe("a photo of a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
assert image.size == (64, 64)
assert not any(m.startswith("unlearn_wb") for m in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(done / "runs/van-gogh-doco/model")], check=True)


def test_changed_weights_alone_rebuild_the_model(done):
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file
    from unlearn_wb.diffusion import Denoiser
    from unlearn_wb.scopes import load_changed
    model = done / "runs/van-gogh-doco/model"
    rebuilt = load_changed(Denoiser.load("sandbox").unet, model / "changed.safetensors").state_dict()
    saved = UNet2DConditionModel.from_pretrained(model / "unet").state_dict()
    base = Denoiser.load("sandbox").unet.state_dict()
    assert all(torch.equal(rebuilt[k], saved[k]) for k in saved)
    changed = load_file(model / "changed.safetensors")
    assert {k for k in saved if not torch.equal(saved[k], base[k])} == set(changed) and all(".attn2." in k for k in changed)


def test_again_takes_a_new_folder_and_loses_nothing(done):
    before = (done / "runs/van-gogh-doco/report.json").read_text()
    from unlearn_wb.workbench import Experiment
    os.chdir(done)
    second = Experiment(parameters(concept="Van Gogh", base_model="sandbox"))
    assert second.run.folder.name == "van-gogh-doco-2" and (done / "runs/van-gogh-doco/report.json").read_text() == before


def test_an_unmodified_model_saved_and_loaded_paints_the_same_bits(tmp_path):
    from diffusers import StableDiffusionPipeline
    base = StableDiffusionPipeline.from_pretrained(ROOT / "data/sandbox/base", use_safetensors=True)
    from unlearn_wb.diffusion import Denoiser
    from unlearn_wb.runs import Run
    Run(tmp_path).save_model(Denoiser.load("sandbox"), {}, "unchanged")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    paint = lambda pipe: pipe("a cat in the style of van gogh", num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(3)).images
    assert (paint(base) == paint(again)).all()


def train(folder, resume=False):
    from unlearn_wb.workbench import Experiment
    Experiment(parameters(concept="Van Gogh", run_dir=str(folder), resume=resume)).train(every=3)


def start(folder):
    "The same in a process of its own, to be killed."
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_train_doco import train; train({str(folder)!r})"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "SMALL_WORLD": small_world()}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def final(folder):
    from safetensors.torch import load_file
    return load_file(folder / "checkpoints/step-000012/state.safetensors")


def wait_for(path, process, seconds=120):
    for _ in range(seconds * 100):
        if path.exists(): return
        assert process.poll() is None, process.stdout.read()
        time.sleep(.01)
    raise TimeoutError(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return final(folder)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def kill_at(folder, step):
    "Train until a checkpoint is there, then SIGKILL."
    p = start(folder)
    wait_for(folder / f"checkpoints/step-{step:06d}", p)
    p.send_signal(signal.SIGKILL)
    p.wait()


@pytest.fixture
def resumed(capsys):
    "Resume in this process, to the end; what it said."
    def go(folder):
        train(folder, resume=True)
        return capsys.readouterr().out
    return go


@pytest.mark.parametrize("step", [3, 6])
def test_killed_and_resumed_is_bit_identical(tmp_path, whole, resumed, step):
    folder = tmp_path / "run"
    kill_at(folder, step)
    assert not (folder / "checkpoints/step-000012").exists()
    assert "resuming after step" in resumed(folder) and same(final(folder), whole)


def test_damaged_newest_checkpoint_is_reported_and_skipped(tmp_path, whole, resumed):
    folder = tmp_path / "run"
    kill_at(folder, 9)
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1] / "state.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 4
    newest.write_bytes(raw)
    assert "is damaged" in resumed(folder) and same(final(folder), whole)


def test_sigterm_finishes_the_step_saves_and_leaves(tmp_path, whole, resumed):
    folder = tmp_path / "run"
    p = start(folder)
    wait_for(folder / "checkpoints/step-000003", p)
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 1
    said = p.stdout.read()
    assert "everything is saved" in said
    step = int(re.search(r"asked to leave at step (\d+)", said)[1])
    assert step < 12 and (folder / f"checkpoints/step-{step:06d}/manifest.json").exists()
    assert "resuming after step" in resumed(folder) and same(final(folder), whole)


def test_checkpoints_that_take_too_long_are_written_less_often(tmp_path, whole, monkeypatch):
    from unlearn_wb import workbench
    from unlearn_wb.runs import Run
    steps, save = [], Run.save_checkpoint
    def slow(self, step, *more):
        steps.append(step)
        time.sleep(.2)
        save(self, step, *more)
    monkeypatch.setattr(Run, "save_checkpoint", slow)
    monkeypatch.setattr(workbench, "SPARE", (.1, 0.))
    train(tmp_path / "run")
    assert steps == [3, 12] and same(final(tmp_path / "run"), whole)  # what was spent at step 3 is more than all that may be


def test_papermill_says_what_is_wrong_with_a_parameter(tmp_path):
    p = papermill(tmp_path, "-p", "conecpt", "Van Gogh")
    assert p.returncode == 1 and "did you mean 'concept'" in p.stderr
    assert not (tmp_path / "runs").exists()
