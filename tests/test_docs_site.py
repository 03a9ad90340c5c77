"""The site is built from the notebooks as they are, without a warning, and nothing in it leads nowhere."""
import re

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from unlearn_wb.docs_site import build
    return build(ROOT / "nbs", tmp_path_factory.mktemp("docs"), report=lambda *_: None)


def test_no_broken_link_no_mute_picture_nothing_from_elsewhere(site):
    from unlearn_wb.docs_site import faults
    assert faults(site) == []


def test_lessons_show_formulas_pictures_signatures_and_links(site):
    doco = (site / "methods/doco.html").read_text()
    assert "<math" in doco and "_images/" in doco
    assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", doco), "a formula was left as LaTeX"
    assert "id='methods.doco.DoCo'" in doco and "<summary>fields</summary>" in doco and "steps at the beginning in which only D learns" in doco
    assert "<a href='../lib/13_registry.html#registry.METHODS'><code>METHODS</code></a>" in (site / "howto/add_a_method.html").read_text(), "a name in prose is no link"
    assert "<td>" in (site / "lib/01_diffusion.html").read_text() and "images at a time" in (site / "lib/01_diffusion.html").read_text()
    assert "id='diffusion.sample'" in (site / "lib/01_diffusion.html").read_text()
    front = (site / "index.html").read_text()
    assert "its linked phrases" in front and "read_csv" not in front, "the table, without the cell that makes it"
    assert "make demo" in front and "before-after" in front


def test_search_knows_the_words(site):
    index = (site / "searchindex.js").read_text()
    assert "anchor" in index and "methods/advanchor" in index
