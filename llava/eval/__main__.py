"""`python -m llava.eval {list,download,check,run,answer,score,wrong,export,report,compare}`: the commands."""

# ruff: noqa: T201 (a command prints)
import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llava.cli import (
    ENGINES,
    EngineSpec,
    ModelSpec,
    add_bring_options,
    add_engine_options,
    add_model_options,
    add_prompt_options,
    choose_run_template,
    natural,
    positive,
    positive_or_auto,
    print_now,
    user_path,
)
from llava.download.store import bring
from llava.errors import InputError, run_command
from llava.eval.benchmark import Benchmark, Judge, Question, index_questions
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.data import check_task, choose_tasks, plan_data
from llava.eval.endpoint import check_address
from llava.eval.report import format_latex, format_markdown, format_table, format_terminal, make_report, write_plot
from llava.eval.results import (
    ServerOnlyError,
    describe_budget,
    describe_unscored,
    export_answers,
    format_line,
    read_result,
    score_answers,
    write_line,
    write_result,
)
from llava.eval.run import EXIT_INCOMPLETE, EXIT_SERVER_ONLY, EXIT_UNANSWERED, find_data_root, run_benchmark
from llava.eval.wrong import (
    check_options,
    choose_run,
    draw_listing,
    drawing_folder,
    format_listing,
    list_flips,
    list_wrong,
    name_runs,
    read_run,
)
from llava.files import make_folder, write_json, write_text
from llava.prompt import DEFAULT_CONV_MODE, check_conv_mode
from llava.sampling import Sampling
from llava.signals import ending_on_signals
from llava.terminal import find_width

if TYPE_CHECKING:
    from llava.eval.predict import Outcome

Item = TypeVar("Item")

DEFAULT_REQUESTS = 16
"""Requests under way at a time, where a server is asked."""


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        run_benchmark(sys.argv[2:])  # its arguments are those of the scripts, options after --
        return
    arguments = make_parser().parse_args()
    with ending_on_signals():
        arguments.command(arguments)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval", description="Benchmarks of LLaVA with TRIM.")
    commands = parser.add_subparsers(required=True, metavar="{list,download,check,run,answer,...}")
    commands.add_parser("list", help="name the benchmarks").set_defaults(command=list_tasks)
    describe_download(commands.add_parser("download", help="fetch what benchmarks are made of; only what is missing"))
    describe_check(commands.add_parser("check", help="say what is there of the benchmarks' data, and what is missing"))
    commands.add_parser("run", help="answer and score a benchmark with a worker per GPU: run TASK --help")
    describe_answer(
        commands.add_parser("answer", help="let a model answer a benchmark's questions; resumes after a kill")
    )
    describe_score(commands.add_parser("score", help="score an answers file by the official rules"))
    describe_wrong(
        commands.add_parser("wrong", help="list what was answered wrong, or what flipped between two runs; draw it")
    )
    describe_export(
        commands.add_parser("export", help="write the files that a benchmark's server or official script reads")
    )
    describe_report(commands.add_parser("report", help="put several results side by side"))
    describe_compare(commands.add_parser("compare", help="run methods side by side and say what the differences are"))
    return parser


def describe_download(download: argparse.ArgumentParser) -> None:
    """Describe `download`."""
    download.add_argument("tasks", nargs="+", metavar="TASK", help="names of `list`, or all")
    add_data_options(download)
    add_bring_options(download)
    download.set_defaults(command=download_tasks)


def describe_check(check: argparse.ArgumentParser) -> None:
    """Describe `check`."""
    check.add_argument("tasks", nargs="*", metavar="TASK", help="names of `list` (default: all)")
    add_data_options(check)
    check.set_defaults(command=check_tasks)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which data, common to `download` and `check`."""
    parser.add_argument(
        "--root", type=user_path, metavar="DIR", help="holds the benchmarks' folders (default: LLAVA_EVAL_ROOT)"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="another split than the one that is scored here (vqav2, seed, ...)"
    )


def describe_answer(answer: argparse.ArgumentParser) -> None:
    """Describe `answer`."""
    add_task_options(answer, answers_help="where the answers go (JSON lines)")
    answer.add_argument("--max-new-tokens", type=positive, help="default: the benchmark's own limit")
    answer.add_argument("--limit", type=positive, metavar="N", help="answer only the first N questions")
    answer.add_argument("--workers", type=positive, default=1, metavar="N", help="number of workers that share FILE")
    answer.add_argument("--worker", type=natural, default=0, metavar="K", help="which of them this is, from 0")
    answer.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask an OpenAI-compatible server, such as http://localhost:8000/v1, for the model that it calls CKPT; "
        f"with --reduce one of llava.serve; --batch-size requests at a time ({DEFAULT_REQUESTS})",
    )
    add_answer_options(answer, conv_mode=DEFAULT_CONV_MODE, temperature=0.0, batch_size=None)
    add_engine_options(answer)
    answer.set_defaults(command=answer_task)


def describe_score(score: argparse.ArgumentParser) -> None:
    """Describe `score`."""
    add_task_options(score, answers_help="written by `answer`")
    score.add_argument("--json", type=user_path, metavar="OUT", help="write every number here")
    score.add_argument(
        "--results", type=user_path, metavar="FILE", help="write the line `name<TAB>value` here, in place of this run's"
    )
    score.add_argument("--allow-partial", action="store_true", help="score although answers are missing")
    add_judge_options(score)
    score.set_defaults(command=score_task)


def describe_wrong(wrong: argparse.ArgumentParser) -> None:
    """Describe `wrong`."""
    add_task_options(wrong, answers_help="written by `answer`")
    wrong.add_argument("--against", type=user_path, metavar="OTHER", help="another answers file: list what flipped")
    wrong.add_argument("--limit", type=positive, metavar="N", help="list only the first N (of each way)")
    wrong.add_argument(
        "--draw",
        type=drawing_folder,
        metavar="DIR",
        help="draw each listed question: DIR/index.html; takes the place of an earlier drawing there",
    )
    wrong.add_argument("--model-path", metavar="CKPT", help="draw with this model (default: the one that answered)")
    wrong.add_argument("--model-base", metavar="CKPT", help="base model of a LoRA or projector-only checkpoint")
    wrong.add_argument("--reduce", metavar="SPEC", help="draw with this token reduction (default: the run's)")
    add_judge_options(wrong)
    wrong.set_defaults(command=wrong_task)


def describe_export(export: argparse.ArgumentParser) -> None:
    """Describe `export`."""
    add_task_options(export, answers_help="written by `answer`")
    export.add_argument("--out", required=True, type=user_path, metavar="DIR", help="folder for the files")
    export.add_argument("--allow-partial", action="store_true", help="export although answers are missing")
    export.set_defaults(command=export_task)


def describe_report(report: argparse.ArgumentParser) -> None:
    """Describe `report`."""
    report.add_argument("results", nargs="+", metavar="[NAME=]FILE.json", help="written by `score --json`")
    layout = report.add_mutually_exclusive_group()
    layout.add_argument(
        "--overview",
        action="store_true",
        default=None,
        help="a row per benchmark, a column per NAME (default for several benchmarks)",
    )
    layout.add_argument(
        "--by-benchmark", action="store_false", dest="overview", help="a table per benchmark, a row per NAME"
    )
    report.add_argument("--json", type=user_path, metavar="OUT", help="write every number as JSON, too")
    report.add_argument("--markdown", type=user_path, metavar="OUT", help="write every number as Markdown, too")
    report.add_argument("--latex", type=user_path, metavar="OUT", help="write every number as LaTeX (booktabs), too")
    report.add_argument("--png", type=user_path, metavar="OUT", help="plot the scores, too")
    report.set_defaults(command=report_results)


def describe_compare(compare: argparse.ArgumentParser) -> None:
    """Describe `compare`."""
    add_model_options(compare)
    compare.add_argument(
        "--methods", nargs="+", required=True, metavar="SPEC",
        help="names (FasterVLM), with options if need be (HiPrune,object_layer=3), or specs with a budget (TRIM:-1)",
    )  # fmt: skip
    compare.add_argument(
        "--budgets", nargs="+", type=positive, default=[192, 128, 64, 32], metavar="N", help="tokens (192 128 64 32)"
    )
    compare.add_argument("--matched-to", metavar="SPEC", help="take this run's mean tokens as budget, per benchmark")
    compare.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of `list`, or all")
    compare.add_argument("--out", required=True, type=user_path, metavar="DIR", help="runs, tables, plots, report.html")
    compare.add_argument("--limit", type=positive, metavar="N", help="ask only the first N questions of each benchmark")
    add_prompt_options(compare, conv_mode=DEFAULT_CONV_MODE, temperature=0.0)
    compare.add_argument("--batch-size", type=positive_or_auto, metavar="N", help="questions at once (auto)")
    compare.add_argument(
        "--cache-gib", type=positive, default=20, metavar="N", help="room for encoded images under DIR (20 GiB)"
    )
    add_judge_options(compare)
    compare.set_defaults(command=compare_task)


def add_task_options(parser: argparse.ArgumentParser, *, answers_help: str) -> None:
    """Add the options that say which questions, common to `answer`, `score` and `export`."""
    parser.add_argument("task", metavar="TASK", help="a name of `list`, or a .py file that defines a benchmark")
    parser.add_argument(
        "--root", type=user_path, metavar="DIR", help="the benchmark's folder (default: its folder in LLAVA_EVAL_ROOT)"
    )
    parser.add_argument("--answers", required=True, type=user_path, metavar="FILE", help=answers_help)
    parser.add_argument("--split", metavar="NAME", help="another split than the benchmark's own (vqav2, vizwiz, ...)")
    parser.add_argument(
        "--source",
        choices=["local", "hub"],
        default="local",
        help="hub: write the public dataset into --root first, in the published layout, unless it is there",
    )
    parser.add_argument(
        "--hub-dataset", metavar="NAME_OR_DIR", help="another dataset of the same columns, or a folder of its parquet"
    )


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the judge, common to `score` and `wrong`."""
    parser.add_argument(
        "--judge", metavar="NAME", help="the judge, where a benchmark needs one; exact: offline stand-in"
    )
    parser.add_argument("--judge-model", metavar="MODEL", help="language model that judges (default: the benchmark's)")
    parser.add_argument("--judge-runs", type=positive, default=1, metavar="N", help="average N judgements (1)")
    parser.add_argument(
        "--judge-cache", type=user_path, metavar="FILE", help="the judge's replies (default: beside the answers)"
    )


def add_answer_options(
    parser: argparse.ArgumentParser, *, conv_mode: str, temperature: float, batch_size: int | None
) -> None:
    """Add the options of the model and of asking it, common to `answer` and LLaVA's commands."""
    add_model_options(parser)
    add_prompt_options(parser, conv_mode=conv_mode, temperature=temperature)
    parser.add_argument(
        "--batch-size",
        type=positive_or_auto,
        default=batch_size,
        metavar="N",
        help=f"questions at once; auto: as many as memory allows (default: {batch_size or 'auto'})",
    )
    parser.add_argument("--num-chunks", type=positive, default=1, metavar="N", help="cut the questions into N slices")
    parser.add_argument("--chunk-idx", type=natural, default=0, metavar="K", help="and answer slice K, from 0")


def list_tasks(arguments: argparse.Namespace) -> None:
    """Print the benchmarks."""
    rows = [
        {"Name": task.name, "Row in the results": task.row, "New tokens": task.max_new_tokens}
        for task in BENCHMARKS.values()
    ]
    print(format_table(rows, width=find_width()))


def download_tasks(arguments: argparse.Namespace) -> None:
    """Fetch benchmarks' data; leave with code 1 if something is still missing."""
    root = arguments.root or find_data_root()
    data_sets, others = plan_data(choose_tasks(arguments.tasks, arguments.split), root)
    for line in others:
        print(line)
    if data_sets and not bring(root, data_sets, print_now, arguments.dry_run, arguments.keep_archives):
        raise SystemExit(EXIT_INCOMPLETE)


def check_tasks(arguments: argparse.Namespace) -> None:
    """Print what is there of benchmarks' data; leave with code 1 if something is missing or wrong."""
    root = arguments.root or find_data_root()
    tasks = choose_tasks(arguments.tasks, arguments.split)
    num_complete = 0
    for task in tasks:
        findings = []
        for finding in check_task(task, root):
            findings.append(finding)
            print_now(str(finding))
        num_complete += not any(finding.is_fault for finding in findings)
    print(f"{num_complete} of {len(tasks)} benchmarks are complete")
    if num_complete < len(tasks):
        raise SystemExit(EXIT_INCOMPLETE)


def choose_task(arguments: argparse.Namespace) -> Benchmark:
    """Return the benchmark of `add_task_options`; set its folder, and fetch its data there if they are the hub's."""
    task = find_benchmark(arguments.task)
    if arguments.split is not None:
        task = task.with_split(arguments.split)
    if arguments.root is None:
        arguments.root = task.find_root(find_data_root())
    if arguments.source == "hub":
        # The one place that needs the `datasets` library.
        from llava.eval.hub import fetch

        split, form = task.find_hub_form()
        fetch(form, split, arguments.root, arguments.hub_dataset)
    elif arguments.hub_dataset is not None:
        raise InputError("--hub-dataset goes with --source hub")
    return task


def answer_task(arguments: argparse.Namespace) -> None:
    """Answer a benchmark's questions; leave with code 3 if some stayed without an answer."""
    task = choose_task(arguments)
    max_new_tokens = arguments.max_new_tokens or task.max_new_tokens
    answer_and_exit(arguments, task.load(arguments.root), arguments.answers, max_new_tokens, task.key_fields)


def split_list(lst: Sequence[Item], n: int) -> list[list[Item]]:
    """Cut a list into at most `n` consecutive slices of ceil(length / n) items; the last may be shorter."""
    size = -(-len(lst) // n) or 1
    return [list(lst[start : start + size]) for start in range(0, len(lst), size)]


def get_chunk(lst: Sequence[Item], n: int, k: int) -> list[Item]:
    """Return slice `k` of `split_list`; an empty one where there are fewer."""
    chunks = split_list(lst, n)
    return chunks[k] if k < len(chunks) else []


def answer_and_exit(
    arguments: argparse.Namespace,
    questions: list[Question],
    answers_file: Path,
    max_new_tokens: int,
    key_fields: tuple[str, ...],
) -> None:
    """Answer a chunk of questions with the model of `add_answer_options`, and print how it went.

    Args:
        arguments: with the values of `add_answer_options`; optionally `limit`, `workers`, `worker`, `top_p`,
            `num_beams`, `endpoint`, and the values of `add_engine_options`.
        questions: all questions, from which the chunk is taken.
        answers_file: where the answers go.
        max_new_tokens: length limit of an answer.
        key_fields: columns that together name a question.

    Raises:
        SystemExit: with code 3 if questions stayed without an answer.
    """
    # 1. What needs no library: options out of range, unknown templates.
    worker, num_workers = read_share(arguments)
    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=getattr(arguments, "top_p", None),
        num_beams=getattr(arguments, "num_beams", 1),
        max_new_tokens=max_new_tokens,
    )
    spec = ModelSpec.from_options(arguments)
    if arguments.conv_mode:
        check_conv_mode(arguments.conv_mode)
    if getattr(arguments, "endpoint", None) is not None:
        check_endpoint(arguments)
    engine = EngineSpec.from_options(arguments)
    chunk = get_chunk(questions, arguments.num_chunks, arguments.chunk_idx)
    # 2. Only this command needs torch; the others answer at once.
    with ending_on_signals():
        answer = choose_answerer(arguments, spec, engine, sampling, num_workers)
        outcome = answer(
            chunk, answers_file, key_fields, limit=getattr(arguments, "limit", None), worker=worker, notify=_tell
        )
    # 3. How it went.
    for line in outcome.describe(answers_file):
        _tell(line)
    if not outcome.complete:
        raise SystemExit(EXIT_UNANSWERED)


def choose_answerer(
    arguments: argparse.Namespace, spec: ModelSpec, engine: EngineSpec, sampling: Sampling, num_workers: int
) -> "Callable[..., Outcome]":
    """Return what answers: the server of `--endpoint`, the engine of `--engine`, or the model itself.

    Returns:
        Takes questions, the answers file and the key fields, and by name `limit`, `worker` and `notify`.
    """
    if getattr(arguments, "endpoint", None) is not None:
        from llava.eval.remote import RemoteModel, ask_server

        model = RemoteModel(arguments.endpoint, arguments.model_path, arguments.reduce)
        batch_size = arguments.batch_size or DEFAULT_REQUESTS
        return lambda chunk, file, keys, **where: ask_server(
            model, chunk, file, sampling, keys, batch_size=batch_size, num_workers=num_workers, **where
        )
    from llava.eval.predict import Settings, make_answers

    settings = Settings(
        model_id=spec.name,
        sampling=sampling,
        conv_mode=choose_run_template(arguments),
        batch_size=arguments.batch_size,
        num_workers=num_workers,
    )
    if engine.name == ENGINES[0]:
        return lambda chunk, file, keys, **where: make_answers(spec, chunk, file, settings, keys, **where)
    from llava.eval.engine import ask_engine

    return lambda chunk, file, keys, **where: ask_engine(spec, engine, chunk, file, settings, keys, **where)


def read_share(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return the number of this worker, and how many there are.

    Raises:
        InputError: a worker or a chunk beyond their number.
    """
    worker, num_workers = getattr(arguments, "worker", 0), getattr(arguments, "workers", 1)
    if worker >= num_workers:
        raise InputError(f"--worker {worker}: with --workers {num_workers} it counts from 0")
    if arguments.chunk_idx >= arguments.num_chunks:
        raise InputError(
            f"--chunk-idx {arguments.chunk_idx}: with --num-chunks {arguments.num_chunks} it counts from 0"
        )
    return worker, num_workers


def check_endpoint(arguments: argparse.Namespace) -> None:
    """Refuse an address that is none, and options of a model that is loaded here."""
    check_address(arguments.endpoint, "--endpoint")
    for name in ("model_base", "calibrated", "device", "dtype", "tower_dtype", "attn_implementation"):
        if getattr(arguments, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is for a model that is loaded here: leave it out with --endpoint"
            )
    if getattr(arguments, "engine", ENGINES[0]) != ENGINES[0]:
        raise InputError("--engine: with --endpoint the server has one; leave it out")
    if arguments.conv_mode is not None:
        raise InputError("--conv-mode: with --endpoint the server has the template; leave it out")


def score_task(arguments: argparse.Namespace) -> None:
    """Score answers, print the headline, write what was asked for; leave with code 4 if only a server can score."""
    task = choose_task(arguments)
    try:
        judge = find_judge(arguments, task, arguments.answers)
    except InputError:
        if arguments.json and task.uses_judge == "always":
            # Its row in the tables says so. Answers that are wrong as well are named once there is a judge.
            with suppress(InputError):
                write_result(arguments.json, describe_unscored(task, arguments.answers, arguments.root, "no judge"))
        raise
    try:
        result = score_answers(task, arguments.answers, arguments.root, arguments.allow_partial, judge)
    except ServerOnlyError as reason:
        _tell(str(reason))
        raise SystemExit(EXIT_SERVER_ONLY) from None
    if arguments.json:
        write_result(arguments.json, result)
        _tell(f"written to {arguments.json}")
    if arguments.results:
        write_line(arguments.results, result)
        _tell(f"written to {arguments.results}")
    if told := describe_budget(result):
        _tell(told)
    print(format_line(result))


def find_judge(arguments: argparse.Namespace, task: Benchmark, answers: Path) -> Judge | None:
    """Return the judge that `add_judge_options` names; None for a benchmark that is scored by rules."""
    if task.uses_judge == "never":
        return None
    # The other benchmarks need none of the judge's libraries.
    from llava.eval.judge import make_judge

    cache = arguments.judge_cache or answers.with_name(f"{answers.stem}.judge.jsonl")
    return make_judge(arguments.judge, arguments.judge_model, cache, task, num_runs=arguments.judge_runs)


def wrong_task(arguments: argparse.Namespace) -> None:
    """List what was answered wrong or what flipped, of the answers that are there; draw it if asked to."""
    options = {name: getattr(arguments, name) for name in ("model_path", "model_base", "reduce")}
    check_options(arguments.draw, **options)
    task = choose_task(arguments)
    files = [file for file in (arguments.answers, arguments.against) if file is not None]
    names = name_runs(*files) if len(files) == 2 else ()
    results = [
        score_answers(task, file, arguments.root, allow_partial=True, judge=find_judge(arguments, task, file))
        for file in files
    ]
    questions = index_questions(task.load(arguments.root), task.key_fields)
    if arguments.against:
        listing = list_flips((results[0], results[1]), names, questions, arguments.limit)
    else:
        listing = list_wrong(results[0], questions, arguments.limit)
    print(format_listing(listing))
    if arguments.draw:
        runs = [choose_run(arguments.answers, **options)]
        runs += [read_run(file) for file in files[1:]]
        if None in runs:
            _tell(f"no {arguments.against}.run.json: what that run kept is not drawn")
        page = draw_listing(listing, runs, f"{task.row}: {arguments.answers}", arguments.draw)
        _tell(f"drawn: {page}")


def export_task(arguments: argparse.Namespace) -> None:
    """Write a benchmark's upload files and print their paths."""
    task = choose_task(arguments)
    files = export_answers(task, arguments.answers, arguments.root, arguments.out, arguments.allow_partial)
    print("\n".join(map(str, files)))
    if task.server:
        _tell(f"send it to {task.server}")


def report_results(arguments: argparse.Namespace) -> None:
    """Print results, a row per benchmark or a table per benchmark; write what was asked for, with every number."""
    runs = []
    for argument in arguments.results:
        name, _, file = argument.rpartition("=")
        result = read_result(user_path(file))
        runs.append((name or result.model_id or Path(file).stem, result))
    report = make_report(runs, arguments.overview)
    if arguments.json:
        write_json(arguments.json, report.to_json())
    if arguments.markdown:
        write_text(arguments.markdown, f"{format_markdown(report)}\n")
    if arguments.latex:
        write_text(arguments.latex, format_latex(report))
    if arguments.png:
        write_plot(arguments.png, report)
    print(format_terminal(report))
    for file in (arguments.json, arguments.markdown, arguments.latex, arguments.png):
        if file is not None:
            _tell(f"written to {file}")


def compare_task(arguments: argparse.Namespace) -> None:
    """Run methods side by side; write tables, plots and the report, and print the tables."""
    if arguments.reduce is not None:
        raise InputError("--reduce: name what is compared with --methods")
    if arguments.temperature:
        raise InputError("--temperature: methods are compared on the likeliest answers; leave it out")
    names = list(BENCHMARKS) if arguments.tasks == ["all"] else arguments.tasks
    tasks = [(task, task.find_root(find_data_root())) for task in map(find_benchmark, names)]
    spec = ModelSpec.from_options(arguments)
    if arguments.conv_mode:
        check_conv_mode(arguments.conv_mode)
    # What needs torch: only `answer` and this.
    from llava.eval.compare import Place, Runner, run_all
    from llava.eval.comparison import make_cells, write_plots, write_tables
    from llava.eval.comparison_page import write_page

    place_options = {
        "limit": arguments.limit,
        "conv_mode": choose_run_template(arguments),
        "batch_size": arguments.batch_size,
    }
    place = Place(make_folder(arguments.out), spec, max_cache_bytes=arguments.cache_gib * 2**30, **place_options)
    matched = [arguments.matched_to] if arguments.matched_to else []
    budgets = [] if matched else arguments.budgets
    runner = Runner(place, arguments.methods, budgets, matched, _tell)
    runs = run_all(
        runner, tasks, arguments.methods, budgets, arguments.matched_to,
        lambda task: find_judge(arguments, task, place.folder / "runs" / task.name / "judge.jsonl"),
    )  # fmt: skip
    num_layers = runner.loaded.model.config.num_hidden_layers
    _tell("intervals, differences and p-values")
    cells = [cell for own in runs for cell in make_cells(own, num_layers)]
    if not cells:
        raise InputError(
            "no benchmark could be scored: " + "; ".join(f"{own.task.name}: {own.missing}" for own in runs)
        )
    first = next(own for own in runs if not own.missing)
    times = runner.time(list(first.results), first.task.load(first.root))
    text = write_tables(place.folder, runs, cells, times)
    write_plots(place.folder, cells)
    page = write_page(place.folder, runner, runs, cells, times)
    print(text)
    _tell(f"written: {page}, and table.md, .tex, .csv, .json and pareto.svg, .pdf, .png beside it")


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    run_command(main)
