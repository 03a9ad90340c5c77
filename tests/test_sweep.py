"""Many runs on Ray: a bad cell does not stop the others, a killed worker costs only what it did since its last checkpoint, and nothing is done twice."""
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import small_world

from unlearn_wb.sweep import folder_name, read_grid, sweep


@pytest.fixture(scope="module", autouse=True)
def engine():
    yield
    import ray
    ray.shutdown()


def workers():
    "Ray's worker processes that are executing a cell."
    out = []
    for p in Path("/proc").iterdir():
        try: said = (p / "cmdline").read_bytes().split(b"\0")[0]
        except OSError: continue
        if said.startswith(b"ray::run_cell"): out.append(int(p.name))
    return out


def test_failures_kills_and_starting_again(tmp_path):
    import nbformat
    cells = read_grid([dict(base_model=small_world(), notebook="train_baseline", method="uce", concept=["Van Gogh", "Snopy"], eval_images=2),
                       dict(base_model=small_world(), notebook="train_doco", concept="Snoopy", eval_images=2, options="iterations=150, warmup=20, num_images=8, batch_size=2")])
    long_one = tmp_path / folder_name(cells[2])
    killed = []
    def killer():
        for _ in range(2400):
            if list(long_one.glob("checkpoints/step-*/manifest.json")) and workers():
                for pid in workers(): os.kill(pid, signal.SIGKILL), killed.append(pid)
                return
            time.sleep(.1)
    hand = threading.Thread(target=killer)
    hand.start()
    seen = []
    table = sweep(cells, tmp_path, callback=lambda t: seen.append(t.state.tolist()))
    hand.join()
    assert table.state.tolist() == ["done", "failed", "done"], table.why.tolist()
    assert "did you mean 'snoopy'" in table.why[1]
    assert killed and len(seen) == 3
    told = "".join(o.get("text", "") for c in nbformat.read(long_one / "executed.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs)
    assert "resuming after step" in told
    failed = nbformat.read(Path(table.folder[1]) / "executed.ipynb", 4)
    assert any(o.output_type == "error" for c in failed.cells if c.cell_type == "code" for o in c.outputs), "the traceback stays in the executed notebook"

    before = {f: Path(f, "report.json").stat().st_mtime for f in table.folder[table.state == "done"]}
    again = sweep(cells, tmp_path)
    assert again.state.tolist() == ["done", "failed", "done"]
    assert {f: Path(f, "report.json").stat().st_mtime for f in before} == before, "what is done is not done again"


def test_what_no_machine_has_is_refused(tmp_path, monkeypatch):
    from unlearn_wb.sweep import BadCluster, connect
    cells = read_grid(dict(notebook="train_baseline", method="uce", eval_images=2))
    with pytest.raises(BadCluster, match="asks for 1 cores and 64"): sweep(cells, tmp_path, gpus=64)
    with pytest.raises(BadCluster, match="asks for 4096 cores"): sweep(cells, tmp_path, cpus=4096)
    small = dict(Alive=True, Resources={"CPU": 1.})
    monkeypatch.setattr(connect(), "nodes", lambda: [small, small, dict(Alive=False, Resources={"CPU": 64.})])
    with pytest.raises(BadCluster, match="asks for 2 cores and 0 GPUs of one machine, and there are machines with 1 and 0;"): sweep(cells, tmp_path, cpus=2)
