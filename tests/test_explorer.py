"""The explorer without a browser: the same widgets, moved by hand in an event loop."""
import asyncio

import pandas as pd
import pytest
import torch
from conftest import ROOT, small_world

from unlearn_wb import explorer

SMALL = "iterations=14, warmup=4, num_images=8, batch_size=4"


@pytest.fixture
def live(monkeypatch):
    "An explorer as a page would have it."
    monkeypatch.setattr(explorer, "someone_watches", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda *_: None)
    def make(concept="Van Gogh", method="doco", runs="runs", options=SMALL, **more):
        x = explorer.Explorer(concept, method, runs=runs, options=options, eval_images=2, base_model=small_world(), **more)
        x.choose(), x.watch()
        return x
    return make


async def until(true, seconds=120):
    for _ in range(int(seconds / .02)):
        if true(): return
        await asyncio.sleep(.02)
    raise TimeoutError


def test_pause_step_turn_resume_and_stop(live):
    x = live(options=SMALL.replace("iterations=14", "iterations=400"))
    async def person():
        x.start.click()
        await until(lambda: hasattr(x, "watching") and len(x.watching.rows) >= 6)
        x.watching.pause.click()
        await asyncio.sleep(.3)
        held = len(x.watching.rows)
        await asyncio.sleep(1)
        assert len(x.watching.rows) == held, "paused"
        x.watching.step.click()
        await until(lambda: len(x.watching.rows) == held + 1)
        await asyncio.sleep(.5)
        assert len(x.watching.rows) == held + 1, "one step and no more"
        x.watching.turners["lr"].value = 2e-4
        x.watching.by_layer.click()
        x.watching.pause.click()
        await until(lambda: len(x.watching.rows) >= held + 6)
        x.watching.by_layer.click()
        assert bytes(x.watching.heat.value).startswith(b"\x89PNG") and bytes(x.watching.picture.value).startswith(b"\x89PNG")
        x.watching.stop.click()
        await x.task
        return held
    held = asyncio.run(person())
    trace = x.experiment.run.trace()
    assert held + 6 <= len(trace) < 400 and trace.event.dropna().tolist() == ["lr = 0.0002"]
    assert trace[trace.event.notna()].index[0] == held + 1, "from the next step on"
    assert "stopped" in x.watching.note.value and "trained" in x.state.value


def test_two_explorers_take_turns_and_do_not_disturb_each_other(live, tmp_path):
    async def both(*them):
        for x in them: x.start.click()
        await asyncio.gather(*(x.task for x in them))
    alone = live(runs=str(tmp_path / "alone"))
    asyncio.run(both(alone))
    one, two = live(runs=str(tmp_path / "one")), live("Snoopy", "esd", runs=str(tmp_path / "two"), options="iterations=14, num_images=8, batch_size=4")
    asyncio.run(both(one, two))
    assert "trained" in two.state.value, two.state.value
    for k, w in alone.experiment.method.moved.weights().items(): assert torch.equal(w, one.experiment.method.moved.weights()[k]), k


def test_errors_are_said_in_the_sentence_that_they_have_everywhere(live):
    x = live()
    x.concept.value = "Snopy"
    assert "did you mean &#x27;snoopy&#x27;" in x.said.value
    x.concept.value = "Van Gogh"
    assert x.said.value == ""
    async def run():
        x.start.click()
        await x.task
    x.panel.controls["warmup"].value = 14
    asyncio.run(run())
    assert "leaves nothing of iterations = 14" in x.state.value and not x.start.disabled
    x.panel.controls["warmup"].value, x.panel.controls["lr"].max, x.panel.controls["lr"].value = 2, 40, 1e30
    asyncio.run(run())
    assert "lower lr" in x.state.value, x.state.value


def test_what_is_given_stands_in_the_panel_and_is_what_runs(live):
    x = live(anchor="monet", preset="paper", iterations=60, seed=3, options="lr=5, combiner=sum")
    shown = {k: c.value for k, c in x.panel.controls.items()}
    assert x.said.value == "" and x.words.value == "monet" and x.preset.value == "paper"
    assert (shown["iterations"], shown["combiner"], shown["seed"]) == (60, "sum", 3) and abs(shown["lr"] - 5) < 1e-9, "no slider's range cuts it"
    asked = x._asked()
    assert (asked["anchor"], asked["preset"], asked["iterations"], asked["seed"]) == ("monet", "paper", 0, 3) and {"iterations=60", "combiner=sum"} <= set(asked["options"].split(", "))
    x.method.value = "esd"
    assert x._asked()["options"] == "" and x._asked()["iterations"] == 0, "another method's panel has its own defaults, and they are what runs"
    x.method.value = "uce"
    assert x._asked()["iterations"] == 0, "a method without iterations is not asked for them"
    x.concept.value = "Snoopy"
    assert x._asked()["anchor"] == "", "the anchor was Van Gogh's"
    for options, part in (("combiner=surgry", "did you mean &#x27;surgery&#x27;"), ("lr=0", "lr = 0.0; a number above 0 is needed")):
        assert part in live(options=options).said.value
    assert "combiner=UPGrad" in live(options="combiner=UPGrad")._asked()["options"], "torchjd's are not in the menu until one is asked for"


def test_look_and_compare_show_a_run(live, tmp_path):
    x = live(method="advanchor", options="iterations=4, num_images=8, batch_size=4, anchor_steps=2")
    async def run():
        x.start.click()
        await x.task
        x.judge.click()
        await x.task
    asyncio.run(run())
    assert "Report:" in x.state.value, x.state.value
    assert (x.experiment.run.folder / "report.html").exists()
    assert explorer.way_of_anchor(x.experiment.method) is not None and explorer.seen_by_discriminator(x.experiment.method) is None
    x.live = False
    assert isinstance(x.compare(), pd.DataFrame)


def test_a_new_method_has_its_panel_for_free(monkeypatch):
    from dataclasses import dataclass
    from unlearn_wb.methods.anchored import Anchored, MethodConfig
    @dataclass(frozen=True)
    class MineConfig(MethodConfig):
        "Mine."
        depth: int = 3  # how deep
        mood: str = "calm"  # calm or wild
    class Mine(Anchored):
        choices = Anchored.choices | {"mood": {"calm": 0, "wild": 1}}
    panel = explorer.Panel(MineConfig(), Mine.choices)
    assert panel.controls["mood"].options == ("calm", "wild") and panel.controls["depth"].tooltip == "how deep"
    panel.controls["mood"].value = "wild"
    assert panel.changed() == "mood=wild"


def test_papermill_leaves_pictures_where_a_page_would_have_widgets(tmp_path):
    import papermill
    nb = papermill.execute_notebook(ROOT / "nbs/explore.ipynb", tmp_path / "out.ipynb", dict(base_model=small_world(), options=SMALL, eval_images=2, runs=str(tmp_path / "mine")), progress_bar=False)
    pictures = {c.source: sum("image/png" in o.get("data", {}) for o in c.outputs) for c in nb.cells if c.cell_type == "code"}
    assert pictures["bench.choose()"] == 2 and pictures["bench.watch()"] >= 6 and pictures['bench.look(p["prompt"], p["seed"])'] >= 3 and pictures["bench.compare()"] == 1
    assert not any("widget-view" in k for c in nb.cells if c.cell_type == "code" for o in c.outputs for k in o.get("data", {}))
