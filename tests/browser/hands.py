"""JupyterLab on loopback and a real Chromium. Screenshots go to tests/browser/screenshots, which git ignores."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import CHROMIUM

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(__file__).parent / "screenshots"


needs_browser = pytest.mark.skipif(not CHROMIUM and not os.environ.get("UNLEARN_WB_NEEDS_BROWSER"), reason="no Chromium on this machine; install the package chromium to run the browser tests")  # a machine that promised one does not skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url, seconds=60):
    for _ in range(seconds * 4):
        try: return urllib.request.urlopen(url, timeout=2)
        except OSError: time.sleep(.25)
    raise TimeoutError(f"{url} did not answer in {seconds} s")


def with_parameters(name, folder, **parameters):
    "A copy of a notebook in a folder, its parameters changed."
    nb = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())
    cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]) + "\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    nb["metadata"]["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / f"{name}.ipynb").write_text(json.dumps(nb))


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab in a folder of its own, with notebooks whose parameters are changed: lab(name, concept='Snoopy') -> its address."
    port, home = free_port(), tmp_path / "home"
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "OMP_NUM_THREADS": "1"}
    work = tmp_path / "work"
    work.mkdir()
    log = open(tmp_path / "lab.log", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=secret", "--allow-root", "--expose-app-in-browser", f"--ServerApp.root_dir={work}"], env=env, stdout=log, stderr=subprocess.STDOUT)

    def open_notebook(name, **parameters):
        with_parameters(name, work, **parameters)
        wait_for(f"http://127.0.0.1:{port}/api?token=secret")
        return f"http://127.0.0.1:{port}/lab/tree/{name}.ipynb?token=secret&reset"
    open_notebook.folder = work
    yield open_notebook
    server.terminate()
    server.wait(20)
    log.close()


@pytest.fixture
def shot():
    SHOTS.mkdir(exist_ok=True)
    return lambda page, name: page.screenshot(path=SHOTS / f"{name}.png")


def run_all(page, address):
    "Open a notebook in JupyterLab and run all its cells, without waiting for them to end."
    page.goto(address, timeout=60_000)
    page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_function("document.querySelector('.jp-NotebookPanel-toolbar') && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext && window.jupyterapp.shell.currentWidget.sessionContext.session && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=60_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
