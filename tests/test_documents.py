"""What the documents show to Python users runs as it is written, on the pocket checkpoint of the clone."""

import ast
import json
import re
from pathlib import Path

import pytest

from llava import Answer

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
NEEDS_MORE = ("transformers.md", "serving.md", "vllm.md")
"""Models of the hub (`tests/hf` runs the same calls on small ones); a server (`tests/serve` runs it with one); vLLM
(`tests/engines`)."""
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(path.read_text(encoding="utf-8"))
]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The clone's folders as seen from a working directory that may be written to."""
    pytest.importorskip("matplotlib")
    for name in ("docs", "playground"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_begins_with_the_object(clone):
    first = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    answer = names["answer"]
    assert isinstance(answer, Answer) and "white" in answer.text and 0 < answer.num_tokens < answer.num_patches
    assert (clone / "kept.png").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_python_of_a_document_runs_from_top_to_bottom(document, clone):
    names = {"__name__": document.stem}
    for block in BLOCK.findall(document.read_text(encoding="utf-8")):
        code = compile(block, document.name, "exec")
        if document.name not in NEEDS_MORE:
            exec(code, names)


def test_the_notebook_runs_and_shows_kept_patches():
    pytest.importorskip("matplotlib")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names, shown = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOK.parent)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                shown.append(run_cell("".join(cell["source"]), names))
    pictures = [each._repr_html_() for each in shown if isinstance(each, Answer)]
    assert len(pictures) == 2 and all("data:image/png;base64," in each for each in pictures)


def run_cell(source, names):
    """Run a cell as a notebook does; returns the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_is_stored_without_outputs_in_the_format_of_jupyter():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        kind = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (kind | {"outputs", "execution_count"} if cell["cell_type"] == "code" else kind)
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


def test_links_between_documents_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "playground" / "shapes" / "README.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
