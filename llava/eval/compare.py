"""Methods side by side on the same questions: the runs of `python -m llava.eval compare`.

Every method at every budget on every benchmark is a run on disk, as `answer` and `score` write it; a command that was
killed goes on where it was. The model is loaded once, and an image is encoded once for all methods.

    DIR/runs/TASK/SPEC.jsonl         answers, with SPEC.jsonl.run.json beside them
    DIR/runs/TASK/SPEC.scores.json   every number and verdict
    DIR/features/                    encoded images
    DIR/times.json                   what each method takes, measured once
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from llava.cli import LoadedModel, ModelSpec
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question
from llava.eval.features import FeatureCache, FeatureStore
from llava.eval.identity import identify_model
from llava.eval.predict import Settings, make_answers
from llava.eval.results import Result, ServerOnlyError, score_answers, write_result
from llava.files import FileError, read_json, write_json
from llava.generation import GreedyDecoder
from llava.mm_utils import tokenize_prompts
from llava.model.token_reduction import Need, Reduction, parse_reduction
from llava.prompt import DEFAULT_CONV_MODE, choose_conv_mode, wrap_prompt
from llava.sampling import Sampling

FULL, REFERENCE, RANDOM, POOL = "none", "TRIM", "Random", "Pool"
NUM_SEEDS = 5
TIMED_IMAGES, TIMED_PROMPTS, TIMED_TOKENS, TIMED_ROUNDS = 16, 8, 8, 3


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    Attributes:
        method: as it is called in tables, with its options; the full model is "none".
        budget: tokens of the setting; None for a spec with a budget of its own, and for the full model.
        spec: canonical spec string.
    """

    method: str
    budget: int | None
    spec: str

    @property
    def label(self) -> str:
        return self.method if self.budget is None else f"{self.method} @{self.budget}"

    @property
    def is_full(self) -> bool:
        return self.spec == FULL


@dataclass(frozen=True)
class Place:
    """Where a comparison lies, and what it asks.

    Attributes:
        folder: of everything that is written.
        spec: the model, without a reduction.
        limit: questions of each benchmark; None: all.
        conv_mode, batch_size: as for `answer`.
    """

    folder: Path
    spec: ModelSpec
    limit: int | None = None
    conv_mode: str = DEFAULT_CONV_MODE
    batch_size: int | None = None
    max_cache_bytes: int = 20 * 2**30

    def answers(self, task: Benchmark, entry: Entry) -> Path:
        return self.folder / "runs" / task.name / f"{re.sub(r'[^A-Za-z0-9.+,=-]', '_', entry.spec)}.jsonl"


@dataclass
class TaskRuns:
    """One benchmark: what every method scored.

    Attributes:
        task, root: the benchmark and its folder.
        results: by entry, in the order of the table.
        missing: why this benchmark has no scores, or None.
        left_out: why a method has no row, by its label.
    """

    task: Benchmark
    root: Path
    results: dict[Entry, Result] = field(default_factory=dict)
    missing: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- planning
def plan_entries(methods: Sequence[str], budgets: Sequence[int], num_patches: int) -> list[Entry]:
    """List what is run: the full model, each method at each budget, TRIM, Pool, and Random with several seeds.

    Args:
        methods: names, with options if need be (`HiPrune,object_layer=3`), or specs with a budget of their own.
        budgets: tokens of the settings.
        num_patches: of an image.

    Raises:
        InputError: an unknown method, a budget that no image has, or the same spec twice.
    """
    for budget in budgets:
        if not 1 < budget <= num_patches:
            raise InputError(f"--budgets {budget}: an image has {num_patches} patches; use 2 to {num_patches}")
    entries = [Entry(FULL, None, FULL)]
    named = [parse_reduction(method) for method in methods]
    known = {name_of(reduction) for method, reduction in zip(methods, named, strict=True) if ":" not in method}
    others = [name for name in (REFERENCE, POOL) if name not in known]
    for method, reduction in [*zip(methods, named, strict=True), *((name, parse_reduction(name)) for name in others)]:
        if ":" in method:
            entries.append(Entry(reduction.spec(), None, reduction.spec()))
        elif name_of(reduction) != RANDOM:  # it comes below
            entries += [Entry(name_of(reduction), budget, reduction.at_budget(budget).spec()) for budget in budgets]
    for budget in budgets:
        seeds = (f"{RANDOM}:{budget}" + f",seed={seed}" * (seed > 0) for seed in range(NUM_SEEDS))
        entries += [Entry(RANDOM, budget, parse_reduction(spec).spec()) for spec in seeds]
    if len({entry.spec for entry in entries}) < len(entries):
        raise InputError("--methods names the same method twice")
    return entries


def name_of(reduction: Reduction) -> str:
    """Name a reduction as it is called in tables, without budgets: `TRIM`, `HiPrune,object_layer=3`, `TRIM|FastV`."""
    parts = [part for part in (reduction.before, reduction.inside) if part is not None]
    return "|".join(part.spec().replace(f":{part.budget}", "", 1) for part in parts)


def match_budget(result: Result) -> int:
    """Turn a run's mean tokens into a budget for the methods that keep a fixed number."""
    if result.tokens is None:
        raise InputError(f"{result.row}: no question has an image, so there is no number of tokens to match")
    return max(2, round(result.tokens.mean_tokens))


# -------------------------------------------------------------------------------------------------------------- running
class Runner:
    """The model, loaded once, and what is kept between runs."""

    def __init__(
        self,
        place: Place,
        methods: Sequence[str],
        budgets: Sequence[int],
        others: Iterable[str],
        notify: Callable[[str], None],
    ):
        """Load the model, ready for every method at any budget.

        Args:
            place: where the comparison lies.
            methods, budgets: as for `plan_entries`.
            others: further specs that will be run.
            notify: is given, in one line each, what a person should know while it goes on.

        Raises:
            InputError: the model cannot be loaded, or cannot serve a method.
        """
        self.place = place
        self.notify = notify
        self.loaded: LoadedModel = place.spec.load()
        self.needs: set[Need] = set()
        num_patches = self.loaded.model.get_vision_tower().num_patches
        for entry in plan_entries(methods, budgets or [2], num_patches):
            self.add(entry)
        for spec in others:
            self.add(Entry(spec, None, spec))
        identity = str(sorted(identify_model(place.spec).items()))
        folder, model = place.folder / "features", self.loaded.model
        self.store = FeatureStore(folder, model, self.needs, identity, place.max_cache_bytes)

    def add(self, entry: Entry) -> None:
        """Get the model ready for an entry.

        Raises:
            InputError: it cannot serve the method; names the spec.
        """
        try:
            self.loaded.model.set_token_reduction(entry.spec)
        except InputError as error:
            raise InputError(f"--methods {entry.spec}: {error}") from None
        reducer = self.loaded.model.token_reducer
        self.needs |= reducer.needs if reducer else set()

    def run(self, task: Benchmark, root: Path, entry: Entry, judge: Judge | None) -> Result:
        """Answer and score one benchmark with one method, as far as that is not done.

        Raises:
            InputError: questions cannot be answered, or cannot be scored.
        """
        questions = task.load(root)
        file = self.place.answers(task, entry)
        self.loaded.model.set_token_reduction(entry.spec)
        outcome = make_answers(
            replace(self.place.spec, reduce=entry.spec),
            questions,
            file,
            self.settings(task, entry),
            task.key_fields,
            limit=self.place.limit,
            notify=lambda line: None,
            load=lambda: self.loaded,
            store=self.store,
        )
        if outcome.faults:
            fault = outcome.faults[0]
            raise InputError(f"{task.name}: {entry.spec}: question {fault.question.id}: {fault.reason}")
        result = score_answers(task, file, root, allow_partial=self.place.limit is not None, judge=judge)
        write_result(file.with_suffix(".scores.json"), result)
        return result

    def settings(self, task: Benchmark, entry: Entry) -> Settings:
        sampling = Sampling(temperature=0.0, top_p=None, num_beams=1, max_new_tokens=task.max_new_tokens)
        model_id = f"{self.place.spec.name} {entry.spec}"
        return Settings(model_id, sampling, self.place.conv_mode, self.place.batch_size)

    def time(self, entries: Sequence[Entry], questions: Sequence[Question]) -> dict[str, dict[str, float]]:
        """Measure, once, what each method takes: seconds by spec and stage.

        Returns:
            `selection`: per image, of a batch of up to 16; `answer`: per question, reading a prompt and making 8
            tokens, of a batch of up to 8. What `times.json` has is not measured again.
        """
        file = self.place.folder / "times.json"
        try:
            times = read_json(file) if file.exists() else {}
        except FileError:
            times = {}
        absent = [entry for entry in entries if entry.spec not in times]
        asked = [question for question in questions if question.images and not question.fault][:TIMED_IMAGES]
        if absent and asked:
            self.notify(f"measuring {len(absent)} methods")
            times |= {entry.spec: self._time_one(entry, asked) for entry in absent}
            write_json(file, times)
        return times

    @torch.inference_mode()
    def _time_one(self, entry: Entry, questions: Sequence[Question]) -> dict[str, float]:
        tokenizer, model, processor = self.loaded
        model.set_token_reduction(entry.spec)
        cache = FeatureCache(model, processor, len(questions), self.store)
        encoded, _ = cache.encode(question.images[0] for question in questions)
        cache.close()
        images = [encoded[question.images[0]].features for question in questions if question.images[0] in encoded]
        queries = [question.query for question in questions if question.images[0] in encoded]
        embeds = model.embed_queries(queries)
        decoder = GreedyDecoder(model, ends=())  # all answers have the same length
        mode = choose_conv_mode(self.place.conv_mode, self.place.spec.name)
        prompts = [wrap_prompt(question.prompt, 1, mode, False, tokenizer) for question in questions[:TIMED_PROMPTS]]
        ids = list(map(torch.tensor, tokenize_prompts(prompts, tokenizer)))
        tokens = [(each,) for each in model.make_image_tokens(images, queries)[: len(ids)]]
        return {
            "selection": measure(lambda: model.choose_tokens(images, queries, embeds), model.device) / len(images),
            "answer": measure(lambda: decoder.decode(ids, tokens, TIMED_TOKENS), model.device) / len(ids),
        }


def measure(work: Callable[[], object], device: torch.device) -> float:
    """Time some work: the median of several rounds, in seconds, after one that does not count."""
    seconds = []
    for _ in range(TIMED_ROUNDS + 1):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def run_all(
    runner: Runner,
    tasks: Sequence[tuple[Benchmark, Path]],
    methods: Sequence[str],
    budgets: Sequence[int],
    matched_to: str | None,
    find_judge: Callable[[Benchmark], Judge | None],
) -> list[TaskRuns]:
    """Run every method on every benchmark.

    A benchmark that has no data, or that nothing here can score, is named and left out; the others go on.
    """
    num_patches = runner.loaded.model.get_vision_tower().num_patches
    runs = []
    for task, root in tasks:
        own = TaskRuns(task, root)
        runs.append(own)
        try:
            judge = find_judge(task)
            entries = plan_entries(methods, budgets, num_patches)
            if matched_to is not None:
                spec = parse_reduction(matched_to).spec()
                first = Entry(spec, None, spec)
                runner.add(first)
                result = runner.run(task, root, first, judge)
                budget = match_budget(result)
                own.results[replace(first, budget=budget)] = result
                entries = plan_entries(methods, [budget], num_patches)
            for number, entry in enumerate(entries, start=1):
                runner.notify(f"{task.name}: {entry.label} ({number} of {len(entries)})")
                own.results |= run_entry(runner, own, entry, judge)
        except ServerOnlyError as error:
            own.missing = str(error)
        except InputError as error:
            own.missing = str(error)
        if own.missing:
            runner.notify(f"{task.name}: left out: {own.missing}")
    return runs


def run_entry(runner: Runner, runs: TaskRuns, entry: Entry, judge: Judge | None) -> dict[Entry, Result]:
    """Run one method; empty where it cannot serve its budget on this model, which is noted.

    Raises:
        InputError: the full model cannot be run: there is nothing to compare with.
    """
    try:
        runner.add(entry)
        return {entry: runner.run(runs.task, runs.root, entry, judge)}
    except ServerOnlyError:
        raise
    except InputError as error:
        if entry.is_full:
            raise
        runs.left_out[entry.label] = str(error)
        runner.notify(f"{runs.task.name}: {entry.label}: left out: {error}")
        return {}
