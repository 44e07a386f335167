"""The figures of README.md show what the pocket checkpoint really keeps, and what was really measured."""

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from llava.errors import InputError
from scripts.draw_figures import KEPT, draw_method, draw_tokens, read_means

SVG = "{http://www.w3.org/2000/svg}"


def test_the_figure_of_the_method_outlines_the_kept_patches_and_shades_every_score():
    kept = np.zeros((8, 8), dtype=bool)
    kept[2, 3] = kept[4, 5] = kept[7, 0] = True
    scores = np.arange(64, dtype=float).reshape(8, 8)
    answer = SimpleNamespace(kept=(kept,), scores=(scores,), question="Is it <red> & round?", text="No")
    figure = ElementTree.fromstring(draw_method(answer, Image.new("RGB", (8, 8))))
    outlined = [rect for rect in figure.iter(f"{SVG}rect") if rect.get("stroke") == KEPT]
    side = float(outlined[0].get("width"))
    left = min(float(rect.get("x")) for rect in outlined)
    top = min(float(rect.get("y")) for rect in outlined)
    places = {(round((float(r.get("y")) - top) / side) + 2, round((float(r.get("x")) - left) / side)) for r in outlined}
    assert places == {(2, 3), (4, 5), (7, 0)}
    texts = [text.text for text in figure.iter(f"{SVG}text")]
    assert "outliers stay: 3 of 64" in texts and "“Is it <red> & round?”" in texts and "“No”" in texts
    shades = [rect.get("fill") for rect in figure.iter(f"{SVG}rect") if (rect.get("fill") or "").startswith("#")]
    assert shades.count("#1a7f37") == 1  # the highest score


def write_table(folder, cells):
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(json.dumps({"cells": cells}))


def cell(method, budget, tokens, retained):
    return {"method": method, "budget": budget, "mean_tokens": tokens, "retained": retained}


def test_scores_are_means_over_benchmarks_at_each_budget(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [
        *(cell("none", None, 64.0, 100.0), cell("TRIM", 8, 9.0, 80.0), cell("TRIM", 8, 11.0, 90.0)),
        *(cell("TRIM", 32, 33.0, 99.0), cell("TRIM:-1", None, 13.0, 95.0), cell("Random", 8, 8.0, 50.0)),
        *(cell("VisionZip", 8, 8.0, 70.0), cell("FastV", 8, 30.0, 70.0)),
    ]
    for name in ("plain", "finetuned"):
        write_table(tmp_path / name, cells)
    means = read_means(tmp_path / "plain")
    assert means["TRIM"] == [(10.0, 85.0), (33.0, 99.0)] and means["none"] == [(64.0, 100.0)]
    draw_tokens(tmp_path, tmp_path / "tokens.svg")
    assert "<svg" in (tmp_path / "tokens.svg").read_text()


@pytest.mark.parametrize("content", [None, "{}", "[1]", "nonsense", '{"cells": [{"method": "TRIM"}]}'])
def test_a_folder_without_a_comparison_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "table.json").write_text(content)
    with pytest.raises(InputError, match=r"table.json: no comparison of llava.eval compare"):
        read_means(tmp_path)
