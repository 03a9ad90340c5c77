"""Each metric of a cell equals its definition, written out by hand over made-up scores."""
import math

import pytest
import torch
import torch.nn.functional as F

from unlearn_wb.metrics import METRICS, NUDE_PARTS, Cell, Protocol, SandboxJudge, Unmeasurable, Value, flagged

N = 120
g = torch.Generator().manual_seed(3)
unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g), dim=-1)
TEXTS = {t: unit(8) for t in ("van gogh", "monet", "painting", "", *(f"prompt {i}" for i in range(N)))}


class FakeClip:
    name = "a made-up CLIP"
    def texts(self, texts): return torch.stack([TEXTS[t] for t in texts])


class Named:
    def __init__(self, name): self.name = name


def rows(): return dict(classifier=torch.rand(N, 21, generator=g), clip=unit(N, 8), features=torch.randn(N, 6, generator=g), distance=torch.rand(N, 1, generator=g), nudity=torch.randint(0, 2, (N, 9), generator=g).float(), faces=unit(N, 5))


R, O = rows(), rows()
R["faces"][:7] = math.nan  # no face found
SCORERS = dict(classifier=SandboxJudge(None), clip=FakeClip(), **{k: Named(k) for k in ("features", "distance", "nudity", "faces")})


def cell(group="target", **kw): return Cell(group, "van gogh", [f"prompt {i}" for i in range(N)], R, O, SCORERS, "painting", **kw)


def test_acc_counts_scenes_whose_most_probable_style_or_subject_is_asked_and_no_subject_in_an_empty_place():
    k = SCORERS["classifier"].styles.index("van gogh")
    there, guest = ([float(R["classifier"][i, k]) > .5 for i in range(N)] for k in (19, 20))
    want = sum(there[i] and max(range(7), key=lambda j: float(R["classifier"][i, j])) == k for i in range(N))
    assert METRICS["ACC"](cell()).value == pytest.approx(100 * want / N)
    mixed = ["van gogh"] * 60 + ["snoopy"] * 60
    s = 7 + SCORERS["classifier"].subjects.index("snoopy")
    want = sum(there[i] and max(range(7), key=lambda j: float(R["classifier"][i, j])) == k for i in range(60)) + sum(there[i] and guest[i] and max(range(7, 19), key=lambda j: float(R["classifier"][i, j])) == s for i in range(60, N))
    assert METRICS["ACC"](cell(concepts=mixed)).value == pytest.approx(100 * want / N)
    whole = sum(a and b for a, b in zip(there, guest))
    assert METRICS["broken"](cell()).value == pytest.approx(100 * (N - whole) / N) and 20 < whole < sum(there) < 90


def test_a_classifier_of_transformers_names_whole_words(tmp_path):
    import json
    from transformers import ResNetConfig, ResNetForImageClassification
    from unlearn_wb.metrics import Classifier
    labels = ["tabby, tabby cat", "catamaran", "hot-air balloon"]
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(labels)))).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(image_processor_type="ConvNextImageProcessor", size=dict(shortest_edge=32), image_mean=[.5] * 3, image_std=[.5] * 3)))
    c, images = Classifier(str(tmp_path)), torch.rand(4, 3, 32, 32, generator=g)
    images[2, 0, 0, 0] = math.nan
    rows = c(images)
    assert rows.shape == (4, 3) and rows[[0, 1, 3]].sum(1).allclose(torch.ones(3)) and rows[2].isnan().all()
    sure = torch.eye(3)
    assert c.shows(sure, "Cat").tolist() == [True, False, False] and c.shows(sure, "catamaran").tolist() == [False, True, False] and c.shows(sure, "balloon").tolist() == [False, False, True]
    with pytest.raises(Unmeasurable, match="no label of .* names 'cata'"): c.shows(sure, "cata")


def dot(a, b): return sum(float(x) * float(y) for x, y in zip(a, b))


@pytest.mark.parametrize("scale", [1., 2.5])
def test_cs(scale):
    want = sum(100 * scale * dot(R["clip"][i], TEXTS["van gogh"]) for i in range(N)) / N
    assert METRICS["CS"](cell(protocol=Protocol(scale=scale))).value == pytest.approx(want, abs=1e-4)
    want = sum(100 * scale * dot(R["clip"][i], TEXTS[f"prompt {i}"]) for i in range(N)) / N
    assert METRICS["CS"](cell(protocol=Protocol(scale=scale, text="prompt"))).value == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("against,text", [("anchor", "painting"), ("nothing", "")])
def test_ca(against, text):
    want = sum(dot(R["clip"][i], TEXTS["van gogh"]) > dot(R["clip"][i], TEXTS[text]) for i in range(N))
    assert METRICS["CA"](cell(protocol=Protocol(against=against))).value == pytest.approx(100 * want / N)


def test_as_and_its_gap():
    mine, before = (sum(100 * dot(x["clip"][i], TEXTS[f"prompt {i}"]) for i in range(N)) / N for x in (R, O))
    assert METRICS["AS"](cell()).value == pytest.approx(mine, abs=1e-4) and METRICS["AS gap"](cell()).value == pytest.approx(mine - before, abs=1e-4)


def test_fid_of_a_cell_is_against_the_original():
    from scipy.linalg import sqrtm
    import numpy as np
    a, b = R["features"].double().numpy(), O["features"].double().numpy()
    ca, cb = np.cov(a.T), np.cov(b.T)
    assert METRICS["FID"](cell()).value == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real), rel=1e-5)


def test_kid_of_a_cell_is_the_unbiased_polynomial_mmd():
    a, b = R["features"].double(), O["features"].double() + .5
    k = lambda x, y: (x @ y.T / 6 + 1) ** 3
    off = lambda m: (m.sum() - m.diag().sum()) / (N * (N - 1))
    want = 1000 * float(off(k(a, a)) + off(k(b, b)) - 2 * k(a, b).mean())
    c = cell()
    c.original = O | {"features": O["features"] + .5}
    v = METRICS["KID"](c)
    assert v.low < want < v.high and v.value == pytest.approx(want, rel=.25)


def test_i_ism_and_nude():
    assert METRICS["I"](cell()).value == pytest.approx(float(sum(R["distance"][:, 0]) / N), rel=1e-5)
    want = sum(dot(R["faces"][i], O["faces"][i]) for i in range(7, N)) / (N - 7)
    v = METRICS["ISM"](cell())
    assert v.value == pytest.approx(want, abs=1e-5) and v.n == N - 7
    assert METRICS["nude"](cell()).value == pytest.approx(100 * float(R["nudity"].sum()) / N)
    feet = torch.zeros(1, 9)
    feet[0, NUDE_PARTS.index("FEET_EXPOSED")] = 1
    assert not flagged(feet).any() and flagged(torch.ones(1, 9)).all()


UP = {"ACC": "higher", "CS": "higher", "CA": "higher", "AS": "higher", "AS gap": "higher", "FID": "lower", "KID": "lower", "I": "lower", "ISM": "higher"}


@pytest.mark.parametrize("name", UP)
def test_directions_turn_for_the_target_and_a_number_never_comes_alone(name):
    turned = {"higher": "lower", "lower": "higher"}
    for group in ("retained", "other", "given", "target", "linked"):
        v = METRICS[name](cell(group))
        assert v.better == (turned[UP[name]] if group in ("target", "linked") else UP[name])
        assert isinstance(v, Value) and v.low <= v.value <= v.high and v.n and v.by and v.arrow in str(v) and v.by in str(v) and str(v.n) in str(v)
    assert METRICS["nude"](cell("target")).better == METRICS["broken"](cell("target")).better == "lower"


@pytest.mark.parametrize("name", [*UP, "nude", "broken"])
def test_without_its_scorer_a_metric_says_so(name):
    c = cell()
    c.rows, c.original = {}, {}
    with pytest.raises(Unmeasurable, match="no .* scorer was given"): METRICS[name](c)
