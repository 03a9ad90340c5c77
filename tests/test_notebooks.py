"""The notebooks are the source: library, README and metadata follow from them."""
import filecmp
import json
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

TRAINING = ["train_doco", "train_baseline", "train_advanchor", "train_rgd", "train_integrity"]
RUNNABLE = [*TRAINING, "pretrain_sandbox", "bench_train", "bench_sample", "bench_gpu", "sweep", "explore", "reproduce_linked", "reproduce_sandbox", "reproduce_anchors", "reproduce_recall", "reproduce_attack", "reproduce_ringabell", "reproduce_relearn", "reproduce_layers", "reproduce_deep", "reproduce_judges", "reproduce_models", "reproduce_concepts", "evaluate", "compare"]


def tool(name): return str(shutil.which(name, path=str(ROOT / ".venv/bin")) or shutil.which(name))


def test_library_is_what_the_notebooks_write(tmp_path):
    for name in ("nbs", "unlearn_wb"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    shutil.rmtree(tmp_path / "unlearn_wb")
    (tmp_path / "unlearn_wb").mkdir()
    subprocess.run([tool("nbdev_export")], cwd=tmp_path, check=True)
    ours = sorted(p.relative_to(ROOT) for p in (ROOT / "unlearn_wb").rglob("*.py"))
    written = sorted(p.relative_to(tmp_path) for p in (tmp_path / "unlearn_wb").rglob("*.py"))
    assert ours == written
    different = [str(p) for p in ours if not filecmp.cmp(ROOT / p, tmp_path / p, shallow=False)]
    assert not different, f"run nbdev_export: {different}"


def test_notebooks_are_clean(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([tool("nbdev_clean")], cwd=tmp_path, check=True)
    dirty = [str(p.relative_to(tmp_path)) for p in (tmp_path / "nbs").rglob("*.ipynb") if not filecmp.cmp(p, ROOT / p.relative_to(tmp_path), shallow=False)]
    assert not dirty, f"run nbdev_clean: {dirty}"


@pytest.mark.parametrize("name", RUNNABLE)
def test_parameters_are_tagged_and_readable(name):
    from papermill import inspect_notebook
    found = inspect_notebook(str(ROOT / f"nbs/{name}.ipynb"))
    assert found, "the parameters cell has lost its tag, or has more than one assignment a line"
    assert all(v["help"] for v in found.values()), f"without a comment: {[k for k, v in found.items() if not v['help']]}"


def test_train_doco_documents_exactly_what_the_library_reads():
    from papermill import inspect_notebook
    from unlearn_wb.workbench import PARAMETERS
    assert list(inspect_notebook(str(ROOT / "nbs/train_doco.ipynb"))) and set(inspect_notebook(str(ROOT / "nbs/train_doco.ipynb"))) == set(PARAMETERS)


@pytest.mark.parametrize("name", RUNNABLE)
def test_this_library_is_imported_before_torch(name):
    "So that its threads wait as `lib/00_threads` says."
    lines = [l for c in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code" for l in "".join(c["source"]).split("\n") if l.startswith(("import ", "from "))]
    first = {p: next((i for i, l in enumerate(lines) if p in l), len(lines)) for p in ("unlearn_wb", "torch", "diffusers", "transformers", "accelerate")}
    assert min(first, key=first.get) == "unlearn_wb", lines


def test_training_notebooks_share_one_path():
    "The same calls in the same order: what differs is which method, and words."
    def calls(name):
        cells = [c for c in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        return ["".join(c["source"]) for c in cells[3:]]
    assert all(calls(n) == calls("train_doco") for n in TRAINING)
    assert all(sum(map(len, calls(n))) < 400 for n in TRAINING), "logic belongs to the library"


@pytest.mark.parametrize("name", TRAINING[1:])
def test_training_notebooks_document_what_the_library_reads(name):
    from papermill import inspect_notebook
    from unlearn_wb.workbench import COMMON
    assert set(inspect_notebook(str(ROOT / f"nbs/{name}.ipynb"))) == {"method", *COMMON}


def test_readme_is_the_index(tmp_path):
    line = next(l for l in (ROOT / "Makefile").read_text().split("\n") if "--output README" in l)
    subprocess.run([sys.executable, "-m", *line.split("/jupyter ")[1].replace("--output-dir .", f"--output-dir {tmp_path}").split()], cwd=ROOT, check=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run make readme"
    here = {}
    for cell in (c for c in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"] if c["cell_type"] == "code"):
        body, _, last = "".join(cell["source"]).rpartition("\n")
        exec(body, here)
        assert eval(last, here).data == "".join(cell["outputs"][0]["data"]["text/markdown"]), "the results have changed: run make readme"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_valid(path):
    nbformat.validate(json.loads(path.read_text()))


def test_no_widget_state_is_committed():
    for p in (ROOT / "nbs").rglob("*.ipynb"):
        assert "widgets" not in json.loads(p.read_text())["metadata"], p


def test_table_of_methods_is_filled_under_papermill(tmp_path):
    import pandas as pd
    line = [sys.executable, "-m", "papermill", str(ROOT / "nbs/reproduce_sandbox.ipynb"), "out.ipynb", "--no-progress-bar"]
    values = dict(run="uce; exact reference", concepts="Van Gogh", eval_images="2", out_file="mine/table.csv", cache_dir="cache", device="cpu")
    p = subprocess.run([*line, *(x for k, v in values.items() for x in ("-p", k, v))], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    table = pd.read_csv(tmp_path / "mine/table.csv")
    assert list(table.variant.unique()) == ["uce", "exact reference"] and (table[table.group == "target"].hits == 0).all()
    assert sorted(f.name for f in (tmp_path / "mine/table").iterdir()) == [f"van-gogh.{k}.webp" for k in ("exact-reference", "original", "uce")]
    shown = "".join("".join(o["data"].get("text/html", "")) for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in c.get("outputs", []) if "data" in o)
    assert "<output>Van Gogh</output>" in shown and "exact reference" in shown, "the slider of strips, the tables"
    assert not list(tmp_path.rglob("*.part"))
    p = subprocess.run([*line, "-p", "run", "uec"], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode and "did you mean 'uce'" in p.stderr


def test_an_anchor_is_measured_before_it_is_used(tmp_path):
    "The anchor study's own measure: to a style, another style is nearer than a dog."
    here = {}
    for cell in (c for c in json.loads((ROOT / "nbs/reproduce_anchors.ipynb").read_text())["cells"] if c["cell_type"] == "code"):
        if cell["id"] == "c003": here |= dict(eval_images=1, cache_dir=str(tmp_path / "cache"), device="cpu")
        exec("".join(cell["source"]), here)
        if cell["id"] == "c003": break
    one = lambda anchor: here["one"](f"conabl: anchor={anchor}, iterations=1, num_images=2, batch_size=2, prompts=2", "Van Gogh", 0)
    near, far = one("picasso"), one("dog")
    assert {"target", "retained"} <= set(near.group) and 0 < near.gap.iloc[0] < far.gap.iloc[0]


def test_judges_vote_and_part(tmp_path, monkeypatch):
    "The study of judges: a vote an image, for what that one was asked for; who parts from whom, in the order of the table."
    import pandas as pd
    from unlearn_wb.metrics import SandboxJudge
    from unlearn_wb.sandbox import load_judge, render, world
    from unlearn_wb.study import REFERENCE
    monkeypatch.chdir(ROOT)
    here = {}
    for cell in (c for c in json.loads((ROOT / "nbs/reproduce_judges.ipynb").read_text())["cells"] if c["cell_type"] == "code"):
        exec("".join(cell["source"]), here)
        if "def read_votes" in "".join(cell["source"]): break
    scenes = [s for s in world(400, 5) if s.style in ("van gogh", "picasso")][:12]
    told = here["votes"](SandboxJudge(load_judge()), render(scenes), ["van gogh"] * 6 + [s.style for s in scenes[6:]])
    assert told == "".join(str(int(s.style == "van gogh")) for s in scenes[:6]) + "1" * 6 and "0" in told[:6]
    own, other = here["OWN"], here["OTHER"]
    table = pd.DataFrame([("target", "110", "010", "010"), ("retained", "1", "0", "0"), ("again", "01", "10", "00")], columns=["group", own, "1", other])
    assert here["parted"](table, "1", "0") == [(0, 0), (2, 1)] and here["parted"](table, "0", "1") == []
    assert here["spread"]([*range(11)], 3) == [0, 5, 10] and here["spread"]([1, 2], 3) == [1, 2]
    there = here["read_votes"]()
    assert set(here["others"](there)) == {"1", "2", "3", other} and all((there[j].str.len() == there[own].str.len()).all() for j in here["others"](there))
    learnt = pd.read_csv(ROOT / "data/results/concepts/recall.csv").query("group == '200 steps' and concept == 'Picasso'").set_index(["variant", "seed"]).hits
    asked = there[(there.concept == "Picasso") & (there.group == "a learnt word")]
    assert len(asked) == 15 and all(row[own].count("1") == learnt[row.model, int(row.seed)] for _, row in asked.iterrows()), "the very images that the study of concepts counted"
    assert [there.model[i] for i in here["of_third"](there)] == [REFERENCE, "conabl", "conabl-deep", "salun", "esd"], "in the order of their pictures"
    here["p"] |= dict(run=True, controls=str(tmp_path / "base"), work_dir=str(tmp_path / "work"))
    with pytest.raises(ValueError, match="no Picasso control beside it; .*reproduce_concepts.ipynb"): exec("".join(cell["source"]), here)
    assert not (tmp_path / "work").exists(), "said before anything is trained"


def test_another_model_with_its_controls(tmp_path, monkeypatch):
    "The study of models: another one lies with its vocabulary, the sandbox's judge and a control for each concept, and is trained once; two runs' distance is by seed or by model. The study of concepts: a finished sandbox's own model with further controls beside it."
    import numpy as np
    from functools import partial
    from unlearn_wb.concepts import Vocabulary
    from unlearn_wb.diffusion import Denoiser
    from unlearn_wb.metrics import SandboxJudge, judge_for
    from unlearn_wb.reference import reference_for
    from unlearn_wb.sandbox import Recipe, load_judge
    from unlearn_wb.study import settings
    monkeypatch.chdir(ROOT)
    def defined(name, last="", **own):
        "What a study's cells define (as far as `last`), with a tiny recipe."
        here = {}
        for cell in (c for c in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"):
            source = "".join(cell["source"])
            if "def " in source or cell["id"] in ("c001", "c002", "c003"): exec(source, here)
            if cell["id"] == "c003": here |= dict(there=[], work=tmp_path, Recipe=partial(Recipe, images=300, vae_steps=1, clip_steps=1, unet_steps=1, precision="fp32")) | own
            if last and f"def {last}" in source: break
        return here
    here = defined("reproduce_models")
    base = here["another_model"](3)
    model, plain = Denoiser.load(base), Denoiser.load()
    assert Vocabulary.of(model).closed and model.base_hash != plain.base_hash and settings("uce", base)["judge"] == settings("uce")["judge"] == SandboxJudge(load_judge()).version
    controls = [Denoiser.load(base, unet=reference_for(model, [c])) for c in ("van gogh", "snoopy")]
    assert len({model.base_hash, *(m.base_hash for m in controls)}) == 3 and judge_for(model) is not None
    monkeypatch.setitem(here, "run_stage", None)  # nothing is trained again
    assert here["another_model"](3) == base
    (tmp_path / "sandbox-3").rename(tmp_path / "sandbox")  # a finished one
    more = defined("reproduce_concepts", "with_controls", work=tmp_path / "more", DATA=tmp_path, every=["Picasso"])
    more["Recipe"] = partial(more["Recipe"], seed=3)
    base = more["with_controls"]()
    assert Denoiser.load(base).base_hash == model.base_hash and settings("uce", base)["original"] == model.base_hash and reference_for(Denoiser.load(base), ["snoopy"]) is None
    assert Denoiser.load(base, unet=reference_for(Denoiser.load(base), ["Picasso"])).base_hash not in {model.base_hash, *(m.base_hash for m in controls)}
    more["run_stage"] = None
    assert more["with_controls"]() == base
    cells = [("asked", v, "x", np.array(a, float), np.array(b, float)) for v, a, b in (("m", [0, 10, 20], [40]), ("n", [50, 50, 50], [50]))]
    told = here["apart"](cells)
    assert told["another seed"].startswith("6.7 [0.0, 13.3]") and told["another model"].startswith("15.0 [") and told["further by"].startswith("+8.3 [") and told["the other's minus the sandbox's"].startswith("+15.0 [")
    assert here["order_kept"](cells + [("asked", "o", "x", np.array([90., 80, 70]), np.array([30.]))])["another model"] == "-0.50"
