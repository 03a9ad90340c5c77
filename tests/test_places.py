"""Where a run's things lie: a copy at an address, a tracker, a full disk, parts that are parked, models that cannot be had."""
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import parameters, tiny_pipeline

from unlearn_wb.diffusion import BadModel, Denoiser, default_precision, why_not_loaded
from unlearn_wb.stores import BadStore, DiskFull
from unlearn_wb.workbench import Experiment

QUICK = dict(iterations=6, warmup=0, num_images=8, batch_size=2, eval_images=2, log_with="")


def test_a_run_at_an_address_is_entered_from_another_machine(tmp_path):
    url = f"file://{tmp_path}/shelf/van-gogh"
    one = Experiment(parameters(run_dir=url, **QUICK), "doco", home=str(tmp_path / "here"))
    stages = one._stages(2)
    for _ in range(4): next(stages)  # left after step 4, with a checkpoint
    stages.close()
    there = tmp_path / "shelf/van-gogh"
    assert json.loads((there / "checkpoints/step-000004/manifest.json").read_text())["step"] == 4 and not (there / "cache").exists()

    with pytest.raises(ValueError, match="holds a run with another configuration"): Experiment(parameters(run_dir=url, **QUICK | dict(iterations=7)), "doco", home=str(tmp_path / "elsewhere"))
    two = Experiment(parameters(run_dir=url, resume=True, **QUICK), "doco", home=str(tmp_path / "elsewhere"))
    trace = two.train()
    two.examine()
    assert len(trace) == 6 and two.finish()["verdict"]
    assert (there / "model/changed.safetensors").exists() and (there / "report.html").exists()
    for at in (there, two.run.folder): assert [f.parent.name for f in at.rglob("manifest.json")] == ["step-000006"], "a finished run keeps one checkpoint"

    whole = Experiment(parameters(run_dir=str(tmp_path / "whole"), **QUICK), "doco")
    whole.train()
    a, b = whole.method.moved.weights(), two.method.moved.weights()
    assert all(torch.equal(a[k], b[k]) for k in a), "the run that moved ends where the one that stayed ends"

    from test_evaluation import EVALUATE
    from unlearn_wb.assessment import Assessment, find_runs, leaderboard
    a = Assessment({**EVALUATE, "run": url, "metrics": "ACC", "exact": False})
    assert a.targets == "van gogh" and len(a.measure()) and (a.out / "metrics.csv").exists() and not (there / "evaluation").exists()
    board = leaderboard(find_runs(url))
    assert board.concept.tolist() == ["Van Gogh"]
    with pytest.raises(BadStore, match="no address that fsspec knows"): Experiment(parameters(run_dir="nowhere://x", **QUICK), "doco")


def test_a_connection_that_breaks_costs_nothing(tmp_path, monkeypatch, capsys):
    from fsspec.implementations.local import LocalFileSystem
    url, real = f"file://{tmp_path}/shelf/run", LocalFileSystem.put_file
    p = parameters(run_dir=url, **QUICK)
    x = Experiment(p, "doco", home=str(tmp_path / "here"))
    def broken(*a, **kw): raise ConnectionError("no route")
    monkeypatch.setattr(LocalFileSystem, "put_file", broken)
    x.train(every=2)
    assert "does not answer (ConnectionError: no route)" in capsys.readouterr().out and not list((tmp_path / "shelf/run").rglob("manifest.json"))
    x.examine()
    with pytest.raises(BadStore, match="what was made lies in .*goes on"): x.finish()
    monkeypatch.setattr(LocalFileSystem, "put_file", real)
    again = Experiment(p | {"resume": True}, "doco", home=str(tmp_path / "here"))
    trace = again.train()
    assert "resuming after step 6 of 6" in capsys.readouterr().out, "nothing is trained twice"
    assert len(trace) == 6 and (tmp_path / "shelf/run/checkpoints/step-000006/manifest.json").exists(), "what was not sent was kept, and sent"


def test_the_trace_goes_to_a_tracker(tmp_path, monkeypatch):
    x = Experiment(parameters(run_dir=str(tmp_path / "run"), **QUICK | dict(log_with="tensorboard")), "doco")
    x.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(tmp_path / "run/tensorboard"))
    log.Reload()
    told = {e.step: e.value for e in log.Scalars("loss_u")}
    assert told == pytest.approx(dict(zip(x.run.trace().step, x.run.trace().loss_u)))
    with pytest.raises(BadStore, match="unknown log_with 'tensorbord'"): Experiment(parameters(run_dir=str(tmp_path / "b"), **QUICK | dict(log_with="tensorbord")), "doco")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadStore, match="pip install mlflow"): Experiment(parameters(run_dir=str(tmp_path / "c"), **QUICK | dict(log_with="mlflow")), "doco")


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    import safetensors.torch
    p = parameters(run_dir=str(tmp_path / "run"), **QUICK)
    x, write = Experiment(p, "doco"), safetensors.torch.save_file
    def full(tensors, path, *a, **kw):
        if "step-4" in str(path) or "part-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(tensors, path, *a, **kw)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DiskFull, match="the disk of .* is full; .* -p resume True goes on"): x.train(every=2)
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-000002"]
    monkeypatch.setattr(safetensors.torch, "save_file", write)
    again = Experiment(p | {"resume": True}, "doco")
    assert len(again.train()) == 6 and not list((tmp_path / "run/checkpoints").glob(".part*"))


def test_parts_are_parked_and_come_back():
    model = Denoiser(tiny_pipeline(), "tiny")
    before, went = model.embed(["a cat"]), []
    class Part(SimpleNamespace):
        def to(self, where): went.append((self.name, str(where))); self.device = torch.device(where); return self
        def __call__(self, *a, **kw):
            assert self.device.type == "cpu" and went[-1] == (self.name, "cpu"), "asked while it was away"
            return self.real(*a, **kw)
    model.text_encoder = Part(name="text", real=model.text_encoder, device=torch.device("meta"))
    assert torch.equal(model.embed(["a cat"]), before)
    assert went == [("text", "cpu"), ("text", "meta")], "it comes for the question and goes back"
    model.vae = Part(name="vae", real=model.vae, device=torch.device("meta"))
    with model.parked(): assert model.text_encoder.device.type == model.vae.device.type == "cpu"
    assert model.text_encoder.device.type == model.vae.device.type == "meta"


@pytest.mark.parametrize("kind, words", [("GatedRepoError", "is gated; accept its licence on https://huggingface.co/them/model"), ("RepositoryNotFoundError", "not on the hub, or it is private"),
                                         ("LocalEntryNotFoundError", r"hf download them/model --local-dir model")])
def test_a_model_that_cannot_be_had_says_why(kind, words, monkeypatch):
    import diffusers
    import huggingface_hub.errors as errors
    cause = getattr(errors, kind).__new__(getattr(errors, kind))
    def refuse(*a, **kw): raise OSError("them/model does not appear to have a file named model_index.json.") from cause
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", refuse)
    with pytest.raises(BadModel, match=words): Denoiser.load("them/model")
    assert "does not appear" in why_not_loaded("them/model", OSError("does not appear\nmore")) and "more" not in why_not_loaded("x", OSError("does not appear\nmore"))


def test_precision_and_device_are_checked_first(monkeypatch):
    with pytest.raises(BadModel, match="device 'cuda:7' is not on this machine"): Experiment(parameters(device="cuda:7", **QUICK), "doco")
    with pytest.raises(BadModel, match="unknown precision 'bf17'; choose fp32, bf16, fp16"): Experiment(parameters(precision="bf17", **QUICK), "doco")
    from unlearn_wb import diffusion
    monkeypatch.setattr(diffusion.torch, "empty", lambda *a, **kw: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")
    with pytest.raises(BadModel, match="Tesla T4 does not compute in it; take fp16 or fp32"): diffusion.resolve_device("cuda", "bf16")
    assert diffusion.resolve_device("cuda", "fp16") == "cuda"


def test_bf16_is_the_default_where_it_is_faster(monkeypatch):
    def on(**cpu):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
        return default_precision("cpu")
    assert on(cpu_name="Intel Xeon", amx_bf16=True, avx512_bf16=True) == "bf16"
    assert on(cpu_name="AMD EPYC", avx512_bf16=True) == "bf16"
    assert on(cpu_name="Intel Xeon", avx512_bf16=True) == "fp32", "the instructions alone are slower there"
    assert on(cpu_name="AMD EPYC") == on() == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert default_precision("cuda") == "fp32", "emulated does not count"
