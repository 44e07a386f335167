"""The rules of the house, read from the source: one-way imports, no heavy import where none is due, no CUDA calls."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own floor and from lower ones only. First match wins; docs/architecture.md draws it.
LAYERS = [
    # The ground: no torch.
    ("llava.constants", 0),
    ("llava.errors", 0),
    ("llava.gone", 0),
    ("llava.protocols", 0),
    ("llava.signals", 0),
    ("llava.terminal", 0),
    ("llava.files", 1),
    ("llava.clock", 1),
    ("llava.sampling", 1),
    ("llava.conversation", 1),
    ("llava.chat_template", 1),
    ("llava.image", 2),
    ("llava.download", 2),
    ("llava.picture", 3),
    ("llava.prompt", 2),
    # The model.
    ("llava.model.token_reduction", 1),
    ("llava.model.config_rules", 3),
    ("llava.model.stored_weights", 2),
    ("llava.model.hf_layout", 3),
    ("llava.mm_utils", 3),
    ("llava.model.splice", 3),
    ("llava.model.crops", 3),
    ("llava.model.multimodal_encoder", 3),
    ("llava.model.multimodal_projector", 3),
    ("llava.model.image_tokens", 4),
    ("llava.model.packing", 4),
    ("llava.model.checkpoint_folder", 4),
    ("llava.model.identity", 4),
    ("llava.model.feature_files", 5),
    ("llava.model.llava_arch", 5),
    ("llava.model.language_model", 6),
    ("llava.model.tokenizer", 4),
    ("llava.model.adapter", 7),
    ("llava.model.builder", 7),
    ("llava.efficiency.shapes", 1),
    ("llava.efficiency.cost", 2),
    ("llava.efficiency.estimate", 3),
    ("llava.efficiency.targets", 4),
    ("llava.answer_cost", 4),
    ("llava.budgets", 7),
    ("llava.cli", 8),
    ("llava.model.consolidate", 9),
    ("llava.model", 0),
    # What uses a model.
    ("llava.generation", 8),
    ("llava.chat", 9),
    ("llava.hf", 8),
    ("llava.fence", 9),
    ("llava.calibrate", 9),
    ("llava.check", 9),
    ("llava.doctor", 10),
    ("llava.drawing", 3),
    ("llava.looks", 8),
    ("llava.what_if", 9),
    ("llava.convert", 9),
    ("llava.visualize", 10),
    ("llava.contact_sheet", 10),
    ("llava.answer", 10),
    ("llava.assistant", 10),
    ("llava.processor", 9),
    ("llava.serve", 10),
    ("llava.efficiency", 10),
    ("llava.lmms", 10),
    ("llava.train", 10),
    # Evaluation, room by room.
    ("llava.eval.metrics", 1),
    ("llava.eval.hub", 2),
    ("llava.eval.benchmark", 3),
    ("llava.eval.benchmarks", 4),
    ("llava.eval.m4c_evaluator", 4),
    ("llava.eval.predictions", 4),
    ("llava.eval.identity", 8),
    ("llava.eval.endpoint", 4),
    ("llava.eval.judge", 5),
    ("llava.eval.protocol", 5),
    ("llava.eval.results", 6),
    ("llava.eval.run", 9),
    ("llava.eval.report", 7),
    ("llava.eval.samples", 4),
    ("llava.eval.features", 8),
    ("llava.eval.predict", 9),
    ("llava.eval.data", 9),
    ("llava.eval.remote", 10),
    ("llava.eval.engine", 10),
    ("llava.eval.wrong", 10),
    ("llava.eval.comparison_page", 10),
    ("llava.eval.comparison", 10),
    ("llava.eval.compare", 10),
    ("llava.eval.__main__", 11),
    ("llava.eval.run_llava", 10),
    ("llava.eval.summarize_gpt_review", 9),
    ("llava.eval.eval_", 10),
    ("llava.eval.model_vqa", 12),
    ("llava.eval", 0),
    ("llava", 0),
]
# Packages that know only torch, the standard library and the bottom layer.
PURE = ("llava.model.token_reduction", "llava.model.splice", "llava.model.crops", "llava.eval.metrics")
FACES = ("llava.train", "llava.eval", "llava.serve", "llava.efficiency")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from llava.eval import runner` imports llava.eval.runner.
            for alias in node.names:
                candidate = f"{node.module}.{alias.name}"
                is_module = (ROOT / (candidate.replace(".", "/") + ".py")).is_file()
                found.add(candidate if is_module else node.module)
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> int:
    # A prefix that ends in "_" (and `model_vqa`) stands for a family of command modules.
    families = ("llava.eval.eval_", "llava.eval.model_vqa")
    return next(
        layer for prefix, layer in LAYERS if is_in(name, prefix) or (prefix in families and name.startswith(prefix))
    )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path):
    name = module_name(path)
    upward = {
        imported for imported in imports_of(path) if is_in(imported, "llava") and layer_of(imported) > layer_of(name)
    }
    assert not upward


def test_no_import_circle_anywhere():
    """Imports for type checking and imports inside functions count as well."""
    names = {module_name(path) for path in MODULES}
    imports = {module_name(path): imports_of(path) & names for path in MODULES}
    # A module in a circle is reachable from itself.
    for name in names:
        reached, front = set(), set(imports[name])
        while front:
            reached |= front
            front = set().union(*(imports[each] for each in front)) - reached
        assert name not in reached, f"{name} imports itself by way of {sorted(reached)}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_train_eval_and_serve_never_import_each_other(path):
    name = module_name(path)
    own = next((face for face in FACES if is_in(name, face)), None)
    others = {imported for imported in imports_of(path) for face in FACES if face != own and is_in(imported, face)}
    assert own is None or not others


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_its_user_imports_the_reduction_in_transformers(path):
    name = module_name(path)
    assert is_in(name, "llava.hf") or not any(is_in(imported, "llava.hf") for imported in imports_of(path))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_room_of_its_models_imports_lmms_eval(path):
    name = module_name(path)
    assert is_in(name, "llava.lmms") or not any(is_in(imported, "lmms_eval") for imported in imports_of(path))


@pytest.mark.parametrize("path", [path for path in MODULES if module_name(path).startswith(PURE)], ids=module_name)
def test_pure_packages_know_only_torch_and_the_standard_library(path):
    outside = set()
    for imported in imports_of(path):
        top = imported.split(".")[0]
        allowed = top in sys.stdlib_module_names or top == "torch" or imported in ("llava.errors", "llava.constants")
        if not allowed and not any(is_in(imported, package) for package in PURE):
            outside.add(imported)
    assert not outside


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_but_the_one_that_looks_for_it_calls_cuda_directly(path):
    if path == PACKAGE / "doctor.py":
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "cuda"
    ]
    assert not calls


@pytest.mark.parametrize(
    "module",
    [
        "llava",
        "llava.model",
        "llava.utils",
        "llava.files",
        "llava.prompt",
        "llava.sampling",
        "llava.cli",
        "llava.eval.__main__",
        "llava.eval.run",
        "llava.eval.benchmarks.pope",
        "llava.train.flags",
        "llava.train.download",
        "llava.download.store",
        "llava.efficiency.cost",
        "llava.serve.api",
        "llava.serve.demo",
    ],
)
def test_light_modules_load_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_module_says_what_it_is():
    silent = [
        module_name(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_no_machine_path_or_unfinished_mark_in_the_sources():
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X ", "/ro" + "ot/", "/wo" + "rk/")
    files = [*MODULES, *(ROOT / "scripts").rglob("*.sh"), *(ROOT / "playground").rglob("*.py")]
    found = [f"{path}: {mark}" for path in files for mark in marks if mark in path.read_text(encoding="utf-8")]
    assert not found
