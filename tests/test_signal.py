"""A scheduler's SIGTERM to papermill itself: the step is finished, the state saved, the same command resumes."""
import signal
import subprocess
import sys
import time

from conftest import ROOT, small_world
from test_train_doco import FLAGS, wait_for


def test_sigterm_to_papermill_leaves_a_checkpoint(tmp_path):
    flags = [*FLAGS, "-p", "iterations", "4000", "-p", "run_dir", "run", "-p", "base_model", small_world()]
    p = subprocess.Popen([sys.executable, "-m", "papermill", str(ROOT / "nbs/train_doco.ipynb"), "out.ipynb", "--no-progress-bar", *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "run/checkpoints/step-000050", p)
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) != 0
    time.sleep(2)  # papermill is gone; its kernel follows
    from unlearn_wb.runs import Run
    state, rows = Run(tmp_path / "run").load_checkpoint()
    assert len(rows) == int(state["step"]) >= 50 and [r["step"] for r in rows] == list(range(1, len(rows) + 1))
