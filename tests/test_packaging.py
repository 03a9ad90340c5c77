"""What `make` installs, and what `pip install` brings into an environment that has no clone of the project."""
import os
import shutil
import subprocess
import sys

import pytest
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


STANDS_IN = """#!/bin/sh
case "$0 $*" in
  *"-m venv .venv") mkdir .venv ;;
  *"pip config list") exec {python} -m pip config list ;;
  *"pip install"*) echo "$(basename $0) $*|$UV_DEFAULT_INDEX|$UV_INDEX|$UV_FIND_LINKS" >> said; for word in $FAILS; do case "$(basename $0) $*" in *"$word"*) exit 1 ;; esac; done ;;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not here")
@pytest.mark.parametrize("fails, tried", [("", "pu"), ("--index-strategy", "pup"), ("constraints.txt", "ppp"), ("install", "ppp")])
def test_make_tells_uv_what_pip_was_told_and_takes_pip_where_uv_cannot(fails, tried, tmp_path):
    for name in ("settings.ini", "setup.py", "constraints.txt"): (tmp_path / name).touch()
    for name in ("python", "uv"):
        (tmp_path / name).write_text(STANDS_IN.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://z/simple\nextra-index-url =\n  https://b/simple\n  https://c/simple\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))} | dict(FAILS=fails, PIP_CONFIG_FILE=str(tmp_path / "pip.conf"), PIP_INDEX_URL="https://a/simple", PIP_FIND_LINKS="/x /y")
    run = subprocess.run(["make", "-s", "-f", str(ROOT / "Makefile"), f"PYTHON={tmp_path}/python", f"BIN={tmp_path}", ".venv/.ready"], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line.split("|") for line in (tmp_path / "said").read_text().splitlines()]
    assert "".join(line[0][0] for line in lines) == tried and ("constraints.txt" in lines[-1][0]) == (tried != "ppp")
    assert (run.returncode == 0) == (tmp_path / ".venv/.ready").exists() == (fails != "install")
    if not fails: assert [part.split() for part in lines[-1][1:]] == [["https://a/simple"], ["https://b/simple", "https://c/simple"], ["/x,/y"]]
    assert ("pip takes longer" in run.stdout) == bool(fails) and ("nobody has tested together" in run.stdout) == (tried == "ppp")
