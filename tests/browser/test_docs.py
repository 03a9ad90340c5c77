"""The docs site in a browser: search without a network, a lesson, its figures by mouse and by keyboard, light and dark."""
import functools
import http.server
import threading

import pytest
from hands import ROOT, free_port, needs_browser, shot  # noqa: F401 (fixtures)

pytestmark = needs_browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from unlearn_wb.docs_site import build
    folder, port = build(ROOT / "nbs", tmp_path_factory.mktemp("docs"), report=lambda *_: None), free_port()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    server.shutdown()


@pytest.fixture
def page(browser):
    "A page that may not leave this machine; what it asks of others is kept."
    context = browser.new_context(viewport=dict(width=1300, height=1000))
    p = context.new_page()
    p.strangers, p.errors = [], []
    p.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1", "data:", "blob:")) else p.strangers.append(r.url))
    p.on("pageerror", lambda e: p.errors.append(str(e)))
    yield p
    assert p.strangers == [] and p.errors == []
    context.close()


def test_search_and_open_a_lesson(page, site, shot):
    page.goto(f"{site}/index.html")
    page.wait_for_selector("img[src*='before-after']")
    shot(page, "docs-1-front")
    page.goto(f"{site}/search.html?q=perturbation")
    page.wait_for_selector("ul.search li a", timeout=20_000)
    shot(page, "docs-2-search")
    page.locator("ul.search li a", has_text="AdvAnchor").first.click()
    page.wait_for_selector("h1:has-text('AdvAnchor')")
    assert page.locator("math").count() > 5 and page.locator("div.cell_output img").count() > 2
    page.emulate_media(color_scheme="dark")
    shot(page, "docs-3-lesson-dark")


def test_figures_move_without_a_kernel(page, site, shot):
    page.goto(f"{site}/lib/05_surgery.html")
    angle = page.locator(".uw td.a")
    angle.wait_for()
    before = angle.inner_text()
    tip = page.locator(".uw circle.tu")
    tip.focus()
    for _ in range(5): tip.press("ArrowLeft")
    by_key = angle.inner_text()
    assert by_key != before, "arrow keys move a focused tip"
    box = tip.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60, steps=5)
    page.mouse.up()
    assert angle.inner_text() != by_key, "the mouse drags it"
    page.locator(".uw select").select_option("restricted")
    tip.scroll_into_view_if_needed()
    shot(page, "docs-4-arrows")
    page.goto(f"{site}/lib/01_diffusion.html")
    slider = page.locator(".uw input[type=range]").first
    picture = page.locator(".uw img").first.get_attribute("src")
    slider.focus()
    slider.press("ArrowRight")
    assert page.locator(".uw img").first.get_attribute("src") != picture
    slider.scroll_into_view_if_needed()
    shot(page, "docs-5-frames")
