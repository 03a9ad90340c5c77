"""The explorer in JupyterLab, by a person's hands: choose, start, watch, pause, turn, resume, stop, come back."""
import re
import time
import warnings

import pandas as pd
import pytest
from conftest import small_world
from hands import SHOTS, lab, needs_browser, run_all, shot  # noqa: F401 (fixtures)

pytestmark = needs_browser

QUICK = dict(options="iterations=9000, warmup=10, num_images=8", eval_images=2)  # more than anyone waits for


def field(name): return f".jupyter-widgets:has(> label:text-is('{name}')) input"


def step_of(page):
    found = re.search(r"step (\d+) of", page.inner_text(".jp-Notebook"))
    return int(found[1]) if found else 0


def soon(true, seconds):
    for _ in range(int(seconds * 5)):
        if true(): return True
        time.sleep(.2)
    return False


def until(true, seconds, what):
    if not soon(true, seconds): pytest.fail(f"not in {seconds} s: {what() if callable(what) else what}")


def test_choose_start_watch_pause_turn_resume_stop_and_come_back(browser, lab, shot):
    page = browser.new_page(viewport=dict(width=1400, height=4200))
    address = lab("explore", base_model=small_world(), **QUICK)
    run_all(page, address)
    page.wait_for_selector("button:has-text('Start')", timeout=120_000)
    page.wait_for_selector("button:has-text('Open report')", timeout=120_000)
    shot(page, "1-choose")
    assert page.locator(".widget-dropdown").count() >= 6, "menus for anchor, method and the words of the configuration"
    assert page.locator(field("iterations")).input_value() == "9000", "what the notebook's parameters ask for stands in the panel"

    # another method has another panel, and an error is said in its own sentence
    concept = page.locator(field("concept"))
    concept.fill("Snopy"); concept.press("Enter")
    page.wait_for_selector("text=did you mean 'snoopy'", timeout=30_000)
    concept.fill("Van Gogh"); concept.press("Enter")
    page.wait_for_selector("text=did you mean 'snoopy'", state="detached", timeout=30_000)

    page.click("button:has-text('Start')")
    until(lambda: step_of(page) > 20, 180, "step 20")
    angles = "() => { const g = [...document.querySelectorAll('.js-plotly-plot')].find(g => g.data && g.data.length == 8); return g ? (g.data[6].x || []).length + (g.data[7].x || []).length : -1 }"
    before = page.evaluate(angles)
    picture = lambda: page.evaluate("() => [...document.querySelectorAll('img.widget-image')].map(i => i.src).join()")
    painted = picture()
    until(lambda: page.evaluate(angles) > max(before, 20), 60, "a longer histogram")
    until(lambda: picture() != painted, 180, "another before/after grid")
    shot(page, "2-training")
    plot, grid = page.locator(".js-plotly-plot:visible").first.bounding_box(), page.locator("img.widget-image:visible").last.bounding_box()
    page.screenshot(path=SHOTS / "readme.png", clip=dict(x=plot["x"], y=plot["y"] - 105, width=plot["width"], height=grid["y"] + grid["height"] - plot["y"] + 105))

    page.click("button:has-text('Pause')")
    time.sleep(2)
    held = step_of(page)
    time.sleep(3)
    assert step_of(page) == held > 0
    page.click("button:has-text('Step')")
    time.sleep(2)
    handle = page.locator(".widget-slider:has-text('lr') .noUi-handle").last
    handle.focus()
    for _ in range(6): handle.press("ArrowLeft")
    shot(page, "3-paused")
    page.click("button:has-text('Resume')")
    until(lambda: step_of(page) > held + 10, 60, "going on")

    # the page closes, the run goes on, and the page shows it again
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    time.sleep(2)
    left = step_of(page)
    page.close()
    time.sleep(8)
    page = browser.new_page(viewport=dict(width=1400, height=4200))
    page.goto(address.replace("&reset", ""), timeout=60_000)
    until(lambda: step_of(page) > left, 60, "the panel on the reopened page")
    shot(page, "4-reopened")

    share = lambda word: re.search(rf"drawing {word} (\d+)% of the training time", page.inner_text(".jp-Notebook"))
    for _ in range(5):
        until(lambda: (said := share("costs")) and int(said[1]) <= 10, 60, "at most a tenth of the training time for figures and pictures: after one that other programs made longer, nothing is drawn until then")
        page.click("button:has-text('Pause')")  # nothing is drawn from here on; one that was under way may have been such a one
        time.sleep(2)
        if int(share("costs")[1]) <= 10: break
        page.click("button:has-text('Resume')")
    page.click("button:has-text('Stop')")
    until(lambda: "trained" in page.inner_text(".jp-Notebook"), 60, "the end of the run")
    assert (said := share("cost")) and int(said[1]) <= 10, "figures and pictures cost at most a tenth of the training time"
    trace = pd.read_parquet(next(lab.folder.glob("runs/*/trace.parquet")))
    assert len(trace) < 9000 and trace.event.dropna().str.startswith("lr = ").any(), "the turned learning rate is in the trace"

    page.locator("button:has-text('Paint')").click()
    page.wait_for_selector(".uw input[type=range]", timeout=60_000)
    shot(page, "5-look")

    page.click("button:has-text('Examine')")
    page.wait_for_selector("text=Report:", timeout=240_000)
    page.click("button:has-text('Refresh')")
    page.locator("select[multiple] option").first.wait_for(state="attached", timeout=20_000)
    page.locator("select[multiple]").select_option(index=0)
    blue = """async () => { const i = [...document.querySelectorAll('img.widget-image')].at(-1)
        if (!(i && i.offsetWidth && i.complete && i.naturalWidth)) return 0
        const c = new OffscreenCanvas(i.naturalWidth, i.naturalHeight).getContext('2d'); c.drawImage(i, 0, 0)
        return [...c.getImageData(i.naturalWidth / 2, 0, i.naturalWidth / 2, i.naturalHeight).data].filter((v, k, all) => k % 4 == 2 && v - all[k - 2] > 100).length }"""
    seen = """() => ({pictures: [...document.querySelectorAll('img.widget-image')].map(i => [i.offsetWidth, i.complete, i.naturalWidth, i.naturalHeight]), selected: [...document.querySelector('select[multiple]').selectedOptions].map(o => o.text)})"""
    told = lambda: f"the trace's blue in the right half of the last picture, where axes and text are black: {page.evaluate(blue)} of 200 points, {page.evaluate(seen)}, {page.inner_text('.jp-Notebook')[-400:]!r}"
    if not soon(lambda: page.evaluate(blue) > 200, 20):  # seen twice at the end of a whole suite, never alone: what a person would do, and what there was to see
        shot(page, "6-first-selection")
        warnings.warn(f"a second selection was needed; at the first, not in 20 s: {told()}")
        page.locator("select[multiple]").select_option([])
        page.locator("select[multiple]").select_option(index=0)
        until(lambda: page.evaluate(blue) > 200, 60, told)
    page.click("button:has-text('Open report')")
    page.frame_locator("iframe[title=report]").locator("h1").wait_for(timeout=20_000)
    shot(page, "6-examined-and-compared")
    page.close()


def test_the_same_notebook_is_an_app_without_code(browser, tmp_path, shot):
    import os, subprocess, sys
    from hands import free_port, wait_for, with_parameters
    with_parameters("explore", tmp_path, base_model=small_world())
    port = free_port()
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "voila", "explore.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/voila/static/voila.js")
        page = browser.new_page(viewport=dict(width=1300, height=2000))
        page.goto(f"http://127.0.0.1:{port}/", timeout=180_000)
        page.wait_for_selector("button:has-text('Start')", timeout=120_000)
        page.wait_for_selector("button:has-text('Open report')", timeout=60_000)
        assert page.locator("text=read_parameters").count() == 0, "no code is shown"
        shot(page, "7-app")
        page.close()
    finally:
        server.terminate()
        server.wait(20)
