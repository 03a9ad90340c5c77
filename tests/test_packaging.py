"""What `pip install` brings into an environment that has no clone of the project."""
import os
import shutil
import subprocess
import sys

from conftest import ROOT

USE = """
from pathlib import Path
import unlearn_wb
from unlearn_wb.comeback import comebacks
from unlearn_wb.diffusion import Denoiser, sample
from unlearn_wb.metrics import judge_for
from unlearn_wb.reference import reference_for
from unlearn_wb.sweep import find_notebook
model = Denoiser.load("sandbox")
image = sample(model, ["a cat in the style of van gogh"], [0], 4)
at = Path(unlearn_wb.__path__[0])
assert judge_for(model) and image.shape == (1, 3, 64, 64) and len(comebacks())
for lies in (model.folder, reference_for(model, ["Van Gogh"]), find_notebook("train_doco")): print(Path(lies).resolve().relative_to(at))
"""


def test_a_wheel_made_from_the_source_archive_brings_sandbox_and_notebooks(tmp_path):
    src, run = tmp_path / "src", lambda cwd, *line, **kw: subprocess.run([sys.executable, *line], cwd=cwd, check=True, capture_output=True, text=True, **kw).stdout
    hidden = shutil.ignore_patterns(".*", "__pycache__", "runs", "_docs", "_proc", "build", "dist", "*.egg-info", "tests")
    shutil.copytree(ROOT, src, ignore=hidden)
    (src / "data/.left-behind").write_text("no part of it")
    archive = run(src, "-c", f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))").split()[-1]
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(tmp_path, *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "made", archive)
    run(tmp_path, *pip, "install", "--no-deps", "--no-compile", "--target", "there", *map(str, (tmp_path / "made").glob("*.whl")))
    lies = run(tmp_path, "-c", USE, env={**os.environ, "PYTHONPATH": str(tmp_path / "there")}).split()
    assert lies[-3:] == ["data/sandbox/base", "data/sandbox/without/van-gogh", "nbs/train_doco.ipynb"]
    library = tmp_path / "there/unlearn_wb"
    assert not list(library.rglob(".left-behind")) and not [f for f in library.rglob("*") if f.suffix in (".pkl", ".bin", ".pt", ".lock")]
    assert {f.relative_to(library) for f in library.rglob("*.py")} == {f.relative_to(ROOT / "unlearn_wb") for f in (ROOT / "unlearn_wb").rglob("*.py")}
