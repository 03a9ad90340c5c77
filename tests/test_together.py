"""Batches in pieces and runs on several processes: the same result as one process with the whole batch."""
import os

import pytest
import torch
from conftest import small_world, tiny_pipeline

from unlearn_wb.concepts import Cache, Erasure
from unlearn_wb.diffusion import Denoiser, sample
from unlearn_wb.loop import unlearn
from unlearn_wb.registry import METHODS

SMALL = dict(iterations=4, batch_size=8, num_images=8, prompts=6, lr=1e-3, precision="fp32", anchor_steps=2)
CUTTABLE = [n for n, m in METHODS.items() if hasattr(m.make, "couples") and not m.make.couples]


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return Cache(tmp_path_factory.mktemp("painted"))


def prepared(name, cache, **changes):
    from dataclasses import fields, replace
    model = Denoiser(tiny_pipeline(), "tiny")
    erasure = Erasure.find(model, "Van Gogh", kind="style", retain=("Monet", "Picasso"))
    config = METHODS[name].defaults(model, erasure)
    small = {**SMALL, "warmup": min(1, getattr(config, "warmup", 0)), **changes}
    method = METHODS[name].make(model, [erasure], replace(config, **{k: v for k, v in small.items() if k in {f.name for f in fields(config)}}), cache)
    if method.adversary:  # away from the concept: at it the similarity is 1 and its gradient nothing but rounding
        with torch.no_grad(): method.adversary.e.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    return unlearn(method)


def run(name, cache, **changes):
    trainer = prepared(name, cache, **changes)
    return [s.row() for s in trainer], {k: p.detach().clone() for k, p in trainer.method.params.items()}, trainer


def close(a, b):
    "The same weights, as far as Adam lets rounding show: its first steps have the size of lr whatever the gradient's."
    start = dict(tiny_pipeline().unet.named_parameters())
    far = sum(float((a[k] - b[k]).square().sum()) for k in a) ** .5
    went = sum(float((a[k] - (start[k] if k in start else 0)).square().sum()) for k in a) ** .5
    assert went > 0
    return far < 2e-3 * went


@pytest.mark.parametrize("name", CUTTABLE)
def test_pieces_are_the_whole(name, cache):
    whole, w, _ = run(name, cache)
    pieces, p, trainer = run(name, cache, micro_batch=2)
    assert trainer.pieces == 4 and close(w, p), name
    assert pieces[-1]["loss_u"] == pytest.approx(whole[-1]["loss_u"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name, more", [("doco", {}), ("conabl", {"detach_start": True, "keep": "drift"}), ("saddle", {})])
def test_both_sides_in_one_pass_are_two_passes(name, more, cache, monkeypatch):
    two, w, _ = run(name, cache, **more)
    asked, forward = [], Denoiser.eps
    monkeypatch.setattr(Denoiser, "eps", lambda self, x_t, t, c: asked.append((len(x_t), torch.is_grad_enabled())) or forward(self, x_t, t, c))
    one, p, _ = run(name, cache, one_pass=True, **more)
    steps = sum(r["phase"] == "unlearn" for r in one)
    assert close(w, p) and asked.count((16, True)) == steps and (8, True) not in asked
    for a, b in zip(one, two): assert {k: a[k] for k in a if k.startswith(("loss", "norm"))} == pytest.approx({k: b[k] for k in a if k.startswith(("loss", "norm"))}, rel=1e-3, abs=1e-6, nan_ok=True)
    _, pieces, _ = run(name, cache, one_pass=True, micro_batch=2, **more)
    assert close(w, pieces)


def test_where_one_pass_gives_no_two_gradients_it_says_so(cache, monkeypatch):
    for wrong in (dict(keep="empty"), dict(scope="adapter")):
        with pytest.raises(ValueError, match="one_pass with keep"): prepared("conabl", cache, one_pass=True, **wrong)
    with pytest.raises(ValueError, match="which moves .* it needs linear layers alone"): prepared("conabl", cache, one_pass=True, scope="full")
    with pytest.raises(ValueError, match="SalUn masks the gradient"): prepared("salun", cache, one_pass=True, scope="xattn")
    with pytest.raises(ValueError, match="reads the attention of one side"): prepared("fmn", cache, one_pass=True, keep="images")
    with pytest.raises(ValueError, match="Finetune does not ask the moving denoiser once"): run("finetune", cache, one_pass=True, scope="xattn-kv")
    loss = METHODS["conabl"].make.unlearning_loss
    monkeypatch.setattr(METHODS["conabl"].make, "unlearning_loss", lambda self, batch: loss(self, batch) + self.eps(batch[0], batch[0].other).square().mean())
    with pytest.raises(ValueError, match="does not ask the moving denoiser once"): run("conabl", cache, one_pass=True)


@pytest.mark.parametrize("method, options", [("doco", "warmup=2, d_each=false"), ("saddle", "")])
def test_two_processes_are_one(method, options, tmp_path, monkeypatch):
    from unlearn_wb.workbench import COMMON, Experiment
    p = COMMON | dict(base_model=small_world(), concept="Van Gogh", iterations=5, num_images=8, batch_size=4, eval_images=2, precision="fp32", options=options)
    one = Experiment(p | dict(run_dir=str(tmp_path / "one")), method)
    one.train()
    two = Experiment(p | dict(run_dir=str(tmp_path / "two"), num_processes=2), method)
    trace = two.train()
    assert "5 steps in 2 processes" in (tmp_path / "two/launch.log").read_text()
    start = Denoiser.load(small_world()).unet.state_dict()
    a, b = one.method.moved.weights(), two.method.moved.weights()
    far, went = (sum(float((a[k] - x[k]).square().sum()) for k in a) ** .5 for x in (b, start))
    assert len(trace) == 5 and 0 < went and far < 2e-3 * went, (far, went)
    seen = []
    monkeypatch.setattr("unlearn_wb.evaluation.sample", lambda *a, **kw: seen.append(1) or sample(*a, **kw))
    two.examine()
    assert not seen, "the other processes painted the examination"
    assert two.finish()["verdict"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not say which cores a process may use")
def test_the_cores_one_may_use_are_counted():
    from unlearn_wb.launch import check_processes, devices
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert devices("cpu") == 1
        with pytest.raises(ValueError, match="num_processes = 2; take at most 1, one for each core here"): check_processes(2, "cpu")
    finally: os.sched_setaffinity(0, mine)


def test_what_several_processes_cannot_do_is_said_at_once(tmp_path):
    from unlearn_wb.workbench import COMMON, Experiment
    p = COMMON | dict(base_model=small_world(), concept="Van Gogh", iterations=5, num_images=8, batch_size=4, eval_images=2)
    with pytest.raises(ValueError, match="num_processes = 4096; take at most"): Experiment(p | dict(num_processes=4096, run_dir=str(tmp_path / "a")), "doco")
    with pytest.raises(ValueError, match="RG cannot cut a batch"): Experiment(p | dict(num_processes=2, run_dir=str(tmp_path / "b")), "rg").train()
    with pytest.raises(ValueError, match="does not come in 2 equal pieces"): Experiment(p | dict(num_processes=2, batch_size=5, run_dir=str(tmp_path / "c")), "conabl").train()


def test_checkpointed_activations_give_the_same_weights(cache):
    _, w, _ = run("doco", cache)
    _, p, _ = run("doco", cache, checkpointing=True)
    assert close(w, p)


@pytest.mark.parametrize("name, forms, more", [("doco", 2, {}), ("doco", 2, {"one_pass": True}), ("spm", 3, {}), ("mace", 2, {})])  # forms: with a graph and without; spm's sampled paths hold twice as many images; what is painted or examined in between is not translated
def test_a_compiled_denoiser_gives_the_same_weights_and_is_translated_once_a_form(name, forms, more, cache, monkeypatch):
    _, w, _ = run(name, cache)
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **kw: compiled.append(net) or compile(net, backend="eager", **kw))  # traced as always, not translated: that takes minutes
    began, begin = [], torch.compiler.cudagraph_mark_step_begin
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: began.append(1) or begin())
    torch._dynamo.utils.counters.clear()
    trainer = prepared(name, cache, compile=True, **more)
    for step in trainer:
        sample(trainer.method.model, ["a cat"], [0], steps=2)
        if hasattr(trainer.method, "examine"): trainer.method.examine(5)
    torch._dynamo.reset()
    assert compiled and close(w, trainer.method.params)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == forms
    assert len(began) == step.index, "CUDA graphs are told where a step begins, and nowhere else"


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if hasattr(m.make, "couples")])
def test_frozen_weights_kept_in_half_change_no_bit(name, cache, monkeypatch):
    from contextlib import nullcontext
    def trained():
        trainer = prepared(name, cache, precision="bf16")
        unet, kinds = trainer.method.model.unet, []
        before = {k: p.detach().clone() for k, p in unet.named_parameters() if not p.requires_grad}
        for step in trainer: kinds.append({p.dtype for p in unet.parameters() if not p.requires_grad})
        assert all(torch.equal(p, before[k]) for k, p in unet.named_parameters() if k in before), "a frozen weight came back otherwise"
        assert trainer.method.model.dtype == torch.float32
        return trainer.method, kinds
    halved, kinds = trained()
    some = halved.adversary is None and halved.config.scope != "full"  # an adversary computes in full precision in between; of a whole network nothing is frozen
    assert kinds and all((torch.bfloat16 in k) == some for k in kinds)
    monkeypatch.setattr(Denoiser, "halved", lambda self, precision: nullcontext())
    plain, _ = trained()
    assert all(torch.equal(w, plain.params[k]) for k, w in halved.params.items())


def test_a_compiled_denoisers_convolutions_lie_channels_last_while_it_trains_in_half():
    model = Denoiser(tiny_pipeline(), "tiny")
    w = model.unet.conv_in.weight
    before, last = w.data, lambda: w.is_contiguous(memory_format=torch.channels_last)
    with model.halved("bf16"): assert w.dtype == torch.bfloat16 and not last()
    model.compiled = True
    with model.halved("fp32"): assert w.data_ptr() == before.data_ptr()
    with model.halved("bf16"): assert w.dtype == torch.bfloat16 and last() and torch.equal(w, before.bfloat16())
    assert w.data_ptr() == before.data_ptr() and w.dtype == torch.float32 and not last()


def test_original_and_moving_weights_are_not_mixed_up_in_one_autocast(cache):
    "Autocast keeps the rounded copy of a weight that takes a gradient until its block ends."
    trainer = prepared("conabl", cache)
    for step in trainer: pass
    m = trainer.method
    (b, _), seen = m.batch(0), lambda: m.model.eps(b.x_t, b.t, b.c)
    def original():
        with m.moved.original(): return seen()
    with m.model.autocast("bf16"): mine = seen()
    with m.model.autocast("bf16"): theirs = original()
    with m.model.autocast("bf16"): assert torch.equal(seen(), mine) and torch.equal(original(), theirs) and torch.equal(seen(), mine)
    assert not torch.equal(mine, theirs)


def test_a_run_left_in_the_middle_has_its_frozen_weights_back(cache):
    trainer = prepared("conabl", cache, precision="bf16")
    for step in trainer: break
    assert {p.dtype for p in trainer.method.model.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["doco", "conabl", "rg", "esd", "sdd", "fmn", "mace", "salun"])
def test_a_step_does_not_wait_for_single_numbers(name, cache, monkeypatch):
    "Each number read from a GPU stops the processor until all work is done: a step reads its two tables and nothing else."
    import traceback
    from torch.utils._python_dispatch import TorchDispatchMode
    read = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                where = next(f for f in reversed(traceback.extract_stack()) if "unlearn_wb" in f.filename)
                if "generator=g" not in where.line: read.append(f"{where.name}: {where.line}")  # those are drawn on the processor
            return func(*args, **(kwargs or {}))
    trainer = prepared(name, cache)
    steps = iter(trainer)
    next(steps)
    for o in (trainer.optimizer, getattr(trainer.method, "d_optimizer", None)):
        if o: monkeypatch.setattr(o, "step", lambda: None)  # reads its own counters, which lie in the CPU's memory
    with Watch(): step = next(steps)
    assert step.phase == "unlearn" and not read, read
    assert all(isinstance(v, (int, float)) for v in step.values.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_walk_through_the_denoiser_for_its_device(precision, cache, monkeypatch):
    "diffusers' own `device` and `dtype` look at each of a U-Net's modules, 2 ms at a time."
    trainer, walked = prepared("doco", cache, precision=precision), []
    steps, unet = iter(trainer), type(trainer.method.model.unet)
    next(steps)
    for name in ("device", "dtype"):
        monkeypatch.setattr(unet, name, property(lambda self, name=name: walked.append(name) or getattr(next(self.parameters()), name)))
    assert next(steps).phase == "unlearn" and not walked, walked


def test_out_of_memory_halves_the_pieces_and_goes_on(cache, monkeypatch, capsys):
    _, w, _ = run("conabl", cache)
    make, plain = METHODS["conabl"].make, METHODS["conabl"].make.unlearning_loss
    def tight(self, batch):
        if len(batch[0].t) > 2: raise torch.OutOfMemoryError("full")
        return plain(self, batch)
    monkeypatch.setattr(make, "unlearning_loss", tight)
    _, p, trainer = run("conabl", cache)
    assert trainer.pieces == 4 and close(w, p)
    assert "in 4 pieces" in capsys.readouterr().out
    def hopeless(self, batch): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(make, "unlearning_loss", hopeless)
    with pytest.raises(torch.OutOfMemoryError): run("conabl", cache)


def test_an_adversarys_turn_is_taken_back_when_the_step_runs_out_of_memory(cache, monkeypatch):
    rows, w, _ = run("advanchor", cache, anchor_lr=.3)
    make, plain = METHODS["advanchor"].make, METHODS["advanchor"].make.unlearning_loss
    def tight(self, batch):  # the turn is over by now
        if len(batch[0].t) > 4: raise torch.OutOfMemoryError("full")
        return plain(self, batch)
    monkeypatch.setattr(make, "unlearning_loss", tight)
    again, p, trainer = run("advanchor", cache, anchor_lr=.3)
    assert trainer.pieces == 2 and close(w, p)
    for k in ("anchor_norm", "similarity"): assert again[0][k] == pytest.approx(rows[0][k], rel=1e-4), k


def one_of_two(rank, folder):
    "A process of a run whose second process alone has too little memory."
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cache, make = Cache(f"{folder}/{rank}"), METHODS["advanchor"].make
    plain = make.retaining_loss
    def tight(self, batch):
        if rank == 1 and len(batch[0].t) > 2: raise torch.OutOfMemoryError("full")
        return plain(self, batch)
    make.retaining_loss = tight
    _, w, trainer = run("advanchor", cache)
    from safetensors.torch import save_file
    save_file({**{k: v.contiguous() for k, v in w.items()}, "pieces": torch.tensor(trainer.pieces)}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_out_of_memory_in_one_process_halves_the_pieces_of_all(cache, tmp_path):
    from safetensors.torch import load_file
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    _, w, _ = run("advanchor", cache)
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert int(found.pop("pieces")) == 2 and close(w, found)


def test_fp16_skips_what_overflows_and_learns(cache):
    trainer = prepared("conabl", cache, precision="fp16", iterations=12)
    before = {k: v.detach().clone() for k, v in trainer.method.params.items()}
    trainer.scale = 2. ** 40  # no gradient fits into fp16 with it
    steps = iter(trainer)
    first = next(steps).row()
    assert first["overflow"] == 2. ** 39 and "angle" not in first and all(torch.equal(v, before[k]) for k, v in trainer.method.params.items())
    trainer.scale = 2. ** 12
    rows = [s.row() for s in steps]
    assert "overflow" not in rows[-1] and all(v.isfinite().all() for v in trainer.method.params.values())
    assert any(not torch.equal(v, before[k]) for k, v in trainer.method.params.items())
    trainer.scale, trainer.step = 2. ** 40, 0
    resumed = unlearn(trainer.method, trainer.state())
    assert resumed.scale == 2. ** 40


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(cache, monkeypatch):
    trainer = prepared("conabl", cache, precision="fp16", iterations=50)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.zeros(1, dtype=torch.bool))
    with pytest.raises(FloatingPointError, match="use precision bf16 or fp32"): list(trainer)


def test_what_cannot_be_cut_says_why(cache):
    for name, part in (("rg", "truncation looks at the loss of the whole batch"), ("receler", "soft tokens"), ("spm", "random texts"), ("ovw", "held against other images")):
        with pytest.raises(ValueError, match=part): run(name, cache, micro_batch=2)
    with pytest.raises(ValueError, match="micro_batch = 3 does not divide batch_size = 8"): run("conabl", cache, micro_batch=3)
    with pytest.raises(ValueError, match="d_norm = batch"): run("doco", cache, micro_batch=2, d_norm="batch")
