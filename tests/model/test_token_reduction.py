"""The reducers: one contract for all of them, the mathematics of TRIM, and the parser of spec strings."""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from llava.errors import InputError
from llava.model.token_reduction import (
    LAYER_REDUCERS,
    REDUCERS,
    TEXT,
    Budget,
    Need,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    parse_reducer,
    parse_reduction,
    read_target,
)
from llava.model.token_reduction.base import gather_kept, select_top
from llava.model.token_reduction.trim import count_upper_outliers

ROOT = Path(__file__).parents[2]
BUDGETS = ["0.25", "7", "1.0", "0.001", "9999"]
MEANS = ["avg=7.4", "avg=1.5", "avg=35.9", "avg=9999"]
# Options of single methods; every method of the registry is tested with every budget anyway.
EXTRA_SPECS = [
    "TRIM:-1,similarity=direct",
    "TRIM:-1,metric=cosine,fence=0.5",
    "TRIM:-1,min_keep=3,max_keep=5",
    "TextSim:-1,fence=99",
    "TextSim:0.001,min_keep=0",
    "FasterVLM:9,layer=-1",
    "Random:9,seed=3,mean=true",
    "VisionZip:9,contextual=0",
    "VisionZip:20,contextual=30",
    "VisPruner:9,important_ratio=0.0",
    "VisPruner:10,important_ratio=1.0",
    "VisPruner:11,important_ratio=0.3",
    "SCOPE:9,alpha=0.0",
    "SCOPE:9,alpha=2.0,combine=add",
    "HiPrune:9,alpha=1.0,object_layer=1,layer=-1",
    "HiPrune:9,alpha=0.0",
    "HoloV:9,crops=5",
    "HoloV:30,crops=40,faithful=false",
    "PruMerge:3",
]


def specs_of(name: str, reducer: type) -> list[str]:
    budgets = BUDGETS + ["-1"] * reducer.has_automatic_budget + MEANS * reducer.takes_average
    return [name, *(f"{name}:{budget}" for budget in budgets)]


SPECS = [spec for name, reducer in REDUCERS.items() for spec in specs_of(name, reducer)] + EXTRA_SPECS


def make_tokens(
    spec: str = "TRIM", num_images: int = 5, side: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32
) -> VisualTokens:
    """Random tokens with what a reducer needs and nothing else."""
    needs = parse_reducer(spec).needs
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(num_images, side * side, 16, generator=generator)
    joint = torch.randn(num_images, side * side, 8, generator=generator) * 1.5
    text = torch.randn(num_images, 8, generator=generator)
    intermediates = {
        need: torch.randn(num_images, *shape_of(need, side * side), generator=generator).softmax(dim=-1)
        for need in needs - {TEXT}
    }
    if TEXT not in needs:
        joint = text = None
    return VisualTokens(patches.to(dtype), (side, side), joint, text, intermediates)


def shape_of(need: Need, num_patches: int) -> tuple[int, ...]:
    """With three heads; the CLS row is as wide as the patches, which are 16 wide."""
    return need.shape(num_patches, heads=3, width=16 if need.kind == "cls" else 4)


def map_tokens(tokens: VisualTokens, change: Callable[[torch.Tensor], torch.Tensor]) -> VisualTokens:
    intermediates = {need: change(values) for need, values in tokens.intermediates.items()}
    joint, text = (None if field is None else change(field) for field in (tokens.joint, tokens.text))
    return VisualTokens(change(tokens.patches), tokens.grid, joint, text, intermediates)


def rows_of(tokens: VisualTokens, rows: list[int]) -> VisualTokens:
    return map_tokens(tokens, lambda values: values[rows])


def fields_of(tokens: VisualTokens) -> list[torch.Tensor]:
    present = [field for field in (tokens.joint, tokens.text) if field is not None]
    return [tokens.patches, *present, *tokens.intermediates.values()]


@pytest.mark.parametrize("spec", SPECS)
class TestContract:
    def test_spec_string_parses_back_to_the_same_reducer(self, spec):
        reducer = parse_reducer(spec)
        assert parse_reducer(reducer.spec()) == reducer

    def test_shapes_lengths_and_dtype_hold(self, spec):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tokens = make_tokens(spec, dtype=dtype)
            reduced = parse_reducer(spec)(tokens)
            assert reduced.features.dtype == dtype
            assert reduced.features.shape[0] == reduced.lengths.shape[0] == 5
            assert reduced.features.shape[1] == int(reduced.lengths.max())
            assert reduced.lengths.dtype == torch.int64
            assert reduced.kept is None or (reduced.kept.dtype, reduced.kept.shape) == (torch.bool, (5, 36))
            assert reduced.centres is None or (reduced.centres.dtype, reduced.centres.shape) == (torch.bool, (5, 36))
            assert reduced.scores is None or (reduced.scores.dtype, reduced.scores.shape) == (torch.float32, (5, 36))

    def test_a_fixed_budget_is_kept_to(self, spec):
        tokens, reducer = make_tokens(spec), parse_reducer(spec)
        if reducer.budget.is_automatic:
            return
        reduced = reducer(tokens)
        parts = reducer.parts(tokens.grid)
        allowed = {count for part in parts for count in (part.budget.count(36), part.count_kept(36))}
        most_tokens = max(part.most_tokens(36) for part in parts)
        num_kept = [0] * 5 if reduced.kept is None else reduced.kept.sum(dim=1).tolist()
        for kept, length in zip(num_kept, reduced.lengths.tolist(), strict=True):
            assert length <= most_tokens
            selects = kept in allowed and length - kept <= 1  # at most one synthesised token on top
            merges = kept < length
            assert selects or merges

    def test_the_reading_order_is_a_permutation_of_the_tokens(self, spec):
        reduced = parse_reducer(spec)(make_tokens(spec))
        if reduced.order is None:
            return
        for order, length in zip(reduced.order, reduced.lengths.tolist(), strict=True):
            assert sorted(order[:length].tolist()) == list(range(length))

    def test_what_is_not_declared_is_not_read(self, spec):
        tokens, reducer = make_tokens(spec), parse_reducer(spec)
        generator = torch.Generator().manual_seed(1)
        others = {Need(kind, layer) for kind in Need.KINDS_OF_A_LAYER for layer in (-1, -2)}
        intermediates = {
            need: torch.rand(5, *shape_of(need, 36), generator=generator) for need in others | {Need("projected")}
        }
        joint = torch.randn(5, 36, 8, generator=generator) if tokens.joint is None else tokens.joint
        text = torch.randn(5, 8, generator=generator) if tokens.text is None else tokens.text
        richer = VisualTokens(tokens.patches, tokens.grid, joint, text, intermediates | dict(tokens.intermediates))
        assert torch.equal(reducer(richer).features, reducer(tokens).features)

    def test_every_image_keeps_a_token(self, spec):
        tokens, reducer = make_tokens(spec), parse_reducer(spec)
        assert (reducer(tokens).lengths >= 1).all()
        uniform = map_tokens(tokens, torch.ones_like)
        assert (reducer(uniform).lengths >= 1).all()

    def test_an_automatic_budget_has_a_rule_or_is_refused(self, spec):
        name = spec.partition(":")[0]
        if REDUCERS[name].has_automatic_budget:
            assert parse_reducer(f"{name}:-1").budget.is_automatic
        else:
            with pytest.raises(InputError, match="no automatic budget"):
                parse_reducer(f"{name}:-1")

    def test_rows_are_zero_behind_their_length(self, spec):
        reduced = parse_reducer(spec)(make_tokens(spec))
        for features, length in zip(reduced.features, reduced.lengths, strict=True):
            assert not features[length:].any()

    def test_kept_patches_are_bit_equal_and_in_raster_order(self, spec):
        tokens = make_tokens(spec)
        reduced = parse_reducer(spec)(tokens)
        if reduced.kept is None:
            return  # all tokens are synthesised
        for patches, kept, features in zip(tokens.patches, reduced.kept, reduced.features, strict=True):
            assert torch.equal(features[: int(kept.sum())], patches[kept])

    def test_inputs_stay_unchanged(self, spec):
        tokens = make_tokens(spec)
        before = [field.clone() for field in fields_of(tokens)]
        parse_reducer(spec)(tokens)
        for old, new in zip(before, fields_of(tokens), strict=True):
            assert torch.equal(old, new)

    def test_an_image_does_not_depend_on_its_batch(self, spec):
        tokens, reducer = make_tokens(spec, num_images=7), parse_reducer(spec)
        together = reducer(tokens)
        for row in range(7):
            alone = reducer(rows_of(tokens, [row]))
            length = int(alone.lengths[0])
            assert length == int(together.lengths[row])
            # Sums may round in another order in another batch; choices may not change at all.
            assert torch.allclose(alone.features[0, :length], together.features[row, :length], atol=1e-6)
            assert (alone.kept is None) or torch.equal(alone.kept[0], together.kept[row])

    def test_order_of_images_does_not_matter(self, spec):
        tokens, reducer = make_tokens(spec, num_images=4), parse_reducer(spec)
        order = [2, 0, 3, 1]
        lengths = reducer(tokens).lengths
        assert torch.equal(reducer(rows_of(tokens, order)).lengths, lengths[order])


def make_patches(num_images: int) -> VisualTokens:
    """Many random images of which nothing but patches is known."""
    return VisualTokens(torch.randn(num_images, 36, 4, generator=torch.Generator().manual_seed(3)), (6, 6))


@pytest.mark.parametrize("mean", [1.25, 7.0, 7.4, 12.9, 35.5])
@pytest.mark.parametrize("name", ["Random", "Pool"])
def test_the_mean_over_images_is_what_a_mean_budget_says(name, mean):
    lengths = parse_reducer(f"{name}:avg={mean}")(make_patches(20_000)).lengths.double()
    # Within four standard errors; a whole number that the method can keep is kept of every image.
    assert abs(float(lengths.mean()) - mean) <= 4 * float(lengths.std()) / math.sqrt(20_000) + 1e-9
    if name == "Random":
        assert set(lengths.tolist()) == {math.floor(mean), math.ceil(mean)}


@pytest.mark.parametrize("name", [name for name, reducer in REDUCERS.items() if reducer.takes_average])
def test_each_image_of_a_mean_budget_is_reduced_as_by_the_fixed_budget_it_was_given(name):
    tokens, reducer = make_tokens(name, num_images=12), parse_reducer(f"{name}:avg=9.5")
    mixed, fixed = reducer(tokens), [part(tokens) for part in reducer.parts(tokens.grid)]
    assert len(fixed) == 2
    chosen = [0, 0]
    for row in range(12):
        length = int(mixed.lengths[row])
        same = [
            number
            for number, part in enumerate(fixed)
            if int(part.lengths[row]) == length
            and torch.allclose(part.features[row, :length], mixed.features[row, :length], atol=1e-6)
        ]
        chosen[same[0]] += 1
        for field in ("kept", "scores", "centres", "order", "num_blank"):
            ours, theirs = (getattr(each, field) for each in (mixed, fixed[same[0]]))
            assert (ours is None) == (theirs is None)
            if ours is not None:
                width = theirs[row].shape[0] if theirs.dim() > 1 else None
                assert torch.equal(ours[row][:width] if width else ours[row], theirs[row])
    assert all(chosen)


def test_an_image_keeps_the_same_number_alone_in_any_batch_and_under_any_question():
    tokens, reducer = make_patches(64), parse_reducer("Random:avg=7.4")
    lengths = reducer(tokens).lengths
    for size in (1, 2, 8):
        parts = [list(range(start, start + size)) for start in range(0, 64, size)]
        assert torch.cat([reducer(rows_of(tokens, rows)).lengths for rows in parts]).equal(lengths)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    assert reducer(rows_of(tokens, order)).lengths.equal(lengths[order])
    assert reducer(rows_of(tokens, [5] * 9)).lengths.unique().numel() == 1
    other = VisualTokens(tokens.patches, tokens.grid, torch.randn(64, 36, 8), torch.randn(64, 8))
    assert reducer(other).lengths.equal(lengths)


def test_all_methods_keep_more_of_the_same_images():
    tokens = make_tokens("FasterVLM", num_images=30)
    counts = [parse_reducer(f"{name}:avg=7.4")(tokens).lengths for name in ("FasterVLM", "Random")]
    assert counts[0].equal(counts[1])


def test_what_only_one_part_of_a_mixture_returns_is_filled_in_for_the_other():
    # HoloV returns an order and blank rows only where it drops something.
    tokens, reducer = make_tokens("HoloV", num_images=20), parse_reducer("HoloV:avg=35.5")
    reduced = reducer(tokens)
    assert set(reduced.lengths.tolist()) == {35, 36}
    for row, length in enumerate(reduced.lengths.tolist()):
        alone = reducer(rows_of(tokens, [row]))
        order = torch.arange(length)[None] if alone.order is None else alone.order
        assert reduced.order[row, :length].tolist() == order[0, :length].tolist()


@pytest.mark.parametrize(
    "spec", ["TRIM:avg=64", "TextSim:avg=6.5,metric=cosine", "TRIM:flops=0.35,similarity=direct", "FastV:ms=40,layer=3"]
)
def test_a_target_reads_back_from_its_own_spelling(spec):
    target = read_target(spec)
    assert str(target) == spec and read_target(str(target)) == target


@pytest.mark.parametrize("spec", [None, "none", "TRIM:-1", "FasterVLM:avg=9.5", "FastV:0.5", "TRIM:-1|FastV:0.5"])
def test_a_budget_that_can_be_run_is_no_target(spec):
    assert read_target(spec) is None


@pytest.mark.parametrize("name", [name for name in REDUCERS if name not in ("Pool", "PruMerge", "PruMerge+")])
def test_methods_that_select_patches_report_them(name):
    assert parse_reducer(name)(make_tokens(name)).kept.shape == (5, 36)


def test_a_method_without_what_it_looks_at_says_so_in_one_line():
    with pytest.raises(InputError, match=r"hold no cls_attention\[-2\].*set_token_reduction"):
        parse_reducer("FasterVLM:9")(make_tokens())


def read_example() -> str:
    """The reducer in the document that says how to add one, as a file."""
    return re.search(r"```python\n(.*?)```", (ROOT / "docs/adding_a_reducer.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("command", [["check"], ["format", "--diff"]], ids=["check", "format"])
def test_the_documented_example_passes_the_lint_of_this_repository(command):
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "llava/model/token_reduction/first.py", "-"]
    done = subprocess.run(ruff, input=read_example(), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


CLAIMS = [name for name in dir(TestContract) if name.startswith("test_")]


def broken_claims(reducer: type[TokenReducer], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The claims of the contract that a reducer breaks with one spec or more."""
    monkeypatch.setitem(REDUCERS, reducer.spec_name, reducer)
    broken = set()
    for spec in specs_of(reducer.spec_name, reducer):
        for claim in CLAIMS:
            try:
                getattr(TestContract(), claim)(spec)
            except Exception:
                broken.add(claim)
    return broken


def test_the_documented_example_fulfils_the_contract(monkeypatch):
    module = ModuleType("first")
    exec(compile(read_example(), "adding_a_reducer.md", "exec"), vars(module))
    reducer = module.FirstPatches
    assert len(CLAIMS) >= 11
    assert broken_claims(reducer, monkeypatch) == set()
    assert parse_reducer("First:3")(make_tokens()).kept[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert dataclasses.is_dataclass(reducer) and reducer.__dataclass_params__.frozen


@dataclasses.dataclass(frozen=True)
class Wrong(TokenReducer):
    """The first patches in raster order; subclasses break one claim of the contract each."""

    spec_name: ClassVar[str] = "Wrong"

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        num_images, num_patches, _ = tokens.patches.shape
        num_kept = self.num_kept(tokens)
        kept = (torch.arange(num_patches) < num_kept).expand(num_images, -1)
        features, lengths = gather_kept(tokens.patches, kept)
        return ReducedTokens(features, lengths, self.kept(kept), self.scores(tokens))

    def num_kept(self, tokens: VisualTokens) -> int:
        return self.count_kept(tokens.patches.shape[1])

    def kept(self, kept: torch.Tensor) -> torch.Tensor | None:
        return kept

    def scores(self, tokens: VisualTokens) -> torch.Tensor | None:
        return None


class KeepsAll(Wrong):
    def num_kept(self, tokens):
        return tokens.patches.shape[1]


class ReturnsAllAsMerged(KeepsAll):
    def kept(self, kept):
        return None


class KeepsTooFew(Wrong):
    def num_kept(self, tokens):
        return max(1, self.count_kept(tokens.patches.shape[1]) - 1)


class ScoresPerHead(Wrong):
    def scores(self, tokens):
        return torch.zeros(tokens.patches.shape[0], 3, tokens.patches.shape[1])


class ScoresInDtypeOfPatches(Wrong):
    def scores(self, tokens):
        return tokens.patches.mean(dim=2)


class ReadsText(Wrong):
    def num_kept(self, tokens):
        tokens.require_text()
        return super().num_kept(tokens)


class ReadsAttention(Wrong):
    def num_kept(self, tokens):
        tokens.require(Need("cls_attention", -2))
        return super().num_kept(tokens)


class ReadsTextWhereGiven(Wrong):
    def num_kept(self, tokens):
        return super().num_kept(tokens) if tokens.text is None else 1


@pytest.mark.parametrize(
    ("reducer", "broken"),
    [
        (Wrong, None),
        (KeepsAll, "test_a_fixed_budget_is_kept_to"),
        (ReturnsAllAsMerged, "test_a_fixed_budget_is_kept_to"),
        (KeepsTooFew, "test_a_fixed_budget_is_kept_to"),
        (ScoresPerHead, "test_shapes_lengths_and_dtype_hold"),
        (ScoresInDtypeOfPatches, "test_shapes_lengths_and_dtype_hold"),
        (ReadsText, "test_every_image_keeps_a_token"),
        (ReadsAttention, "test_every_image_keeps_a_token"),
        (ReadsTextWhereGiven, "test_what_is_not_declared_is_not_read"),
    ],
)
def test_the_contract_fails_a_wrong_reducer(reducer, broken, monkeypatch):
    found = broken_claims(reducer, monkeypatch)
    assert broken in found if broken else not found


def test_an_option_that_a_spec_cannot_write_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Layers(Wrong):
        layers: tuple[int, ...] = (1, 2)

    with pytest.raises(TypeError, match=r"Layers\.layers: an option is an int, a float, a bool or a str"):
        Layers()


def test_every_reducer_is_a_frozen_dataclass():
    for reducer in REDUCERS.values():
        assert dataclasses.is_dataclass(reducer)
        assert reducer.__dataclass_params__.frozen


def test_trim_keeps_the_outliers_of_the_negated_dot_product_and_appends_the_mean_of_the_others():
    tokens = make_tokens(num_images=20)
    reduced = parse_reducer("TRIM:-1")(tokens)
    counts = {fence: [] for fence in (1.25, 1.5, 1.75, 2)}
    for row in range(20):
        probability = torch.softmax(-(tokens.joint[row] @ tokens.text[row]).double(), 0)
        first, third = torch.quantile(probability, torch.tensor([0.25, 0.75], dtype=torch.float64))
        for fence, found in counts.items():
            found.append(int((probability > third + fence * (third - first)).sum()))
        outliers = probability > third + 1.5 * (third - first)
        assert torch.equal(reduced.kept[row], outliers)
        mean_token = reduced.features[row, int(outliers.sum())]
        assert torch.allclose(mean_token, tokens.patches[row][~outliers].mean(dim=0), atol=1e-6)
    # The images tell a fence of 1.5 from its neighbours.
    assert all(found != counts[1.5] for fence, found in counts.items() if fence != 1.5)
    assert max(counts[1.5]) > 0


@pytest.mark.parametrize("num_patches", [1, 2, 3, 4, 5, 6, 7, 8, 9, 36, 49, 575, 576, 577])
def test_at_most_a_quarter_of_the_patches_rounded_up_are_outliers(num_patches):
    ramp = torch.arange(1, num_patches + 1, dtype=torch.float32)[None]  # distinct values reach the bound
    random = torch.rand(50, num_patches, generator=torch.Generator().manual_seed(0))
    bound = math.ceil((num_patches - 1) / 4)
    assert int(count_upper_outliers(ramp, fence=0)) == bound
    assert int(count_upper_outliers(random, fence=0).max()) <= bound


def test_trim_with_zero_outliers_gives_the_mean_alone():
    tokens = make_tokens(num_images=2)
    flat = VisualTokens(tokens.patches, tokens.grid, torch.ones_like(tokens.joint), tokens.text)
    reduced = parse_reducer("TRIM:-1")(flat)
    assert reduced.lengths.tolist() == [1, 1]
    assert torch.allclose(reduced.features[:, 0], tokens.patches.mean(dim=1), atol=1e-6)


def test_textsim_with_zero_outliers_keeps_one_patch():
    tokens = make_tokens(num_images=2)
    flat = VisualTokens(tokens.patches, tokens.grid, torch.ones_like(tokens.joint), tokens.text)
    assert parse_reducer("TextSim:-1")(flat).lengths.tolist() == [1, 1]


def test_keeping_everything_adds_no_mean_token():
    tokens = make_tokens()
    reduced = parse_reducer("TRIM:1.0")(tokens)
    assert torch.equal(reduced.features, tokens.patches)


def test_the_opposite_sign_keeps_other_patches():
    tokens = make_tokens(num_images=1)
    negated = parse_reducer("TRIM:9")(tokens).kept
    direct = parse_reducer("TRIM:9,similarity=direct")(tokens).kept
    assert not (negated & direct).any()


def test_min_and_max_keep_bound_the_automatic_count():
    kept = parse_reducer("TRIM:-1,min_keep=3,max_keep=5")(make_tokens(num_images=20)).kept.sum(dim=1)
    assert kept.min() >= 3
    assert kept.max() <= 5


def test_equal_scores_are_kept_from_the_first_patch_on():
    kept = select_top(torch.zeros(1, 6), torch.tensor([2]))
    assert kept[0].tolist() == [True, True, False, False, False, False]


def test_random_draws_differ_between_images_and_seeds():
    tokens = make_tokens(num_images=2)
    first, second = parse_reducer("Random:9")(tokens).kept, parse_reducer("Random:9,seed=1")(tokens).kept
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_pool_averages_equal_cells():
    tokens = make_tokens(num_images=1)
    pooled = parse_reducer("Pool:0.25")(tokens).features[0]
    corner = tokens.patches[0].view(6, 6, 16)[:2, :2].mean(dim=(0, 1))
    assert pooled.shape == (9, 16)
    assert torch.allclose(pooled[0], corner, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "num_patches", "count"),
    [
        (0.25, 576, 144),
        (0.21, 576, 120),
        (1.0, 576, 576),
        (144, 576, 144),
        (9999, 576, 576),
        (0.29, 100, 29),
        (0.001, 36, 0),
    ],
)
def test_budget_counts_patches(value, num_patches, count):
    assert Budget(value).count(num_patches) == count


def test_an_automatic_budget_has_no_count():
    with pytest.raises(InputError, match="automatic"):
        Budget(-1).count(36)


@pytest.mark.parametrize(
    ("spec", "num_kept", "num_tokens"),
    [("Random:0.001", 1, 1), ("TextSim:0.001", 1, 1), ("TRIM:0.001", 0, 1), ("TextSim+:0.001", 0, 1)],
)
def test_a_tiny_fraction_leaves_one_patch_or_the_mean_token(spec, num_kept, num_tokens):
    reduced = parse_reducer(spec)(make_tokens(side=8))
    assert reduced.kept.sum(dim=1).tolist() == [num_kept] * 5
    assert reduced.lengths.tolist() == [num_tokens] * 5


def test_trim_and_textsim_plus_are_names_of_one_rule():
    for budget in ("-1", "0.3"):
        trim, plus = (parse_reducer(f"{name}:{budget}")(make_tokens()) for name in ("TRIM", "TextSim+"))
        assert torch.equal(trim.features, plus.features) and torch.equal(trim.kept, plus.kept)


@pytest.mark.parametrize("num_patches", [36, 49, 196, 576, 729])
def test_a_fraction_of_whole_patches_loses_none_to_float_rounding(num_patches):
    assert all(Budget(k / num_patches).count(num_patches) == k for k in range(2, num_patches + 1))


@pytest.mark.parametrize("spec", [None, "", "  ", "none", "None"])
def test_no_spec_means_no_reduction(spec):
    assert parse_reducer(spec) is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("TRIMM:-1", 'did you mean "TRIM"?'),
        ("trim:-1", 'did you mean "TRIM"?'),
        ("PRUNE:0.5", f"known: {', '.join([*REDUCERS, *LAYER_REDUCERS])}"),
        ("TRIM:abc", '"abc" is not a budget'),
        ("TRIM:25%", '"25%" is not a budget'),
        ("TRIM:", '"" is not a budget'),
        ("TRIM:0", "out of range"),
        ("TRIM:-0.5", "out of range"),
        ("TRIM:1.5", "out of range"),
        ("FasterVLM:avg=0.5", "token budget avg=0.5 is out of range"),
        ("FasterVLM:avg=-1", "out of range"),
        ("FasterVLM:avg=nan", "out of range"),
        ("FasterVLM:avg=inf", "out of range"),
        ("FasterVLM:avg=", '"" is not a budget'),
        ("FasterVLM:avg", '"avg" is not a budget'),
        ("FasterVLM:mean=9", '"mean=9" is not a budget'),
        ("FastV:avg=9", "FastV takes no mean number of patches"),
        ("TRIM:avg=64", "python -m llava.calibrate --model-path CKPT --task NAME --reduce TRIM:-1 --average 64"),
        ("TextSim:avg=6.5,metric=cosine", "--reduce TextSim:-1,metric=cosine --average 6.5 --json FILE"),
        ("TRIM:avg=0", "out of range"),
        ("TRIM:flops=0.35", "python -m llava.efficiency --model-path CKPT --reduce TRIM:flops=0.35 --count-only"),
        ("TRIM:flops=1.5", 'flops= is followed by a share of FLOPs in (0, 1], not "1.5"'),
        ("TRIM:flops=x", 'a share of FLOPs in (0, 1], not "x"'),
        ("DivPrune:ms=40", "python -m llava.efficiency --model-path CKPT --reduce DivPrune:ms=40"),
        ("DivPrune:ms=-1", 'milliseconds above 0, not "-1"'),
        ("TRIM:-1|FastV:flops=0.3", "flops= is for one method alone"),
        ("TRIM:nan", "out of range"),
        ("TRIM:inf", "out of range"),
        ("TRIM:-1,foo=2", "known: position_ids, similarity, metric, fence, min_keep, max_keep"),
        ("TRIM:-1,similarty=direct", 'did you mean "similarity"?'),
        ("TRIM:-1,similarity=both", "use negated or direct"),
        ("TRIM:-1,metric=l2", "use dot or cosine"),
        ("TRIM:-1,fence=x", "fence must be a number"),
        ("TRIM:-1,fence=-1", "fence=-1.0 must be"),
        ("TRIM:-1,min_keep=1.5", "min_keep must be a whole number"),
        ("TRIM:-1,min_keep=5,max_keep=3", "min_keep <= max_keep"),
        ("TRIM:-1,fence=1,fence=2", "is given twice"),
        ("Random:-1", "no automatic budget"),
        ("Random:0.5,mean=perhaps", "mean must be true or false"),
        ("Pool:-1", "no automatic budget"),
        ("FasterVLM:-1", "no automatic budget"),
        ("VisionZip:54,contextual=-1", "contextual=-1 must be 0 or more"),
        ("VisPruner:64,important_ratio=2", "important_ratio=2 must be between 0 and 1"),
        ("SCOPE:64,combine=max", "combine=max is unknown: use multi or add"),
        ("SCOPE:64,alpha=-1", "alpha=-1 must be 0 or more"),
        ("SCOPE:64,alpha=nan", "alpha=nan must be 0 or more"),
        ("HiPrune:64,alpha=1.5", "alpha=1.5 must be between 0 and 1"),
        ("HoloV:64,crops=0", "crops=0 must be 1 or more"),
        ("TRIM:-1|VisionZip:54", "at most one method before the language model"),
        ("FastV:0.5|TRIM:-1", "at most one method before the language model"),
        ("FastV:0.5|DART:64", "at most one inside it"),
        ("TRIM:-1|", 'unknown token reducer ""'),
        ("FastV:-1", "no automatic budget"),
        ("FastV:0.5,position_ids=new", "position_ids=new is unknown: use original or packed"),
        ("PyramidDrop:0.5,stages=8-16", "rising layer numbers with slashes between"),
        ("PyramidDrop:0.5,stages=16/8", "rising layer numbers with slashes between"),
        ("SparseVLM:64,position_ids=original", "merged tokens have no position of their own"),
        ("DART:64,pivot_image=0", "use >= 1 and >= 0"),
        ("FasterVLM:64,layer=0", "cls_attention[0]: hidden state 0 is the embeddings"),
        ("FasterVLM:64,layer=x", "layer must be a whole number"),
        (0.25, "is not a string"),
    ],
)
def test_wrong_spec_ends_in_one_line_that_says_what_is_right(spec, says):
    with pytest.raises(InputError) as caught:
        parse_reduction(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "mm_vision_token_reduce_func" in str(caught.value)
