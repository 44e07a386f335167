"""lmms-eval's own clients of OpenAI's protocol ask our server: answers and scores are those of `python -m llava.eval`.

They send images as PNG, and nothing that says what the CLIP text tower shall read.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: bash scripts/test_clients.sh FOLDER")

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.results import score_answers
from tests.clients.conftest import NAMES, PREFIX, TRIMMED, Answers, Run, run_lmms_eval
from tests.serve.acceptance import Server

CLIENTS = {"openai": "num_concurrent=16", "async_openai": "num_cpus=16"}
METRICS = {"pope": "pope_accuracy,none", "gqa": "exact_match,none"}


@pytest.fixture(scope="module")
def client_runs(world: Path, bare_checkpoint: Callable[[str], Path]) -> dict[str, Run]:
    """What both clients get of one server, whose checkpoint says TRIM:-1."""
    with Server(checkpoint=bare_checkpoint(TRIMMED)) as server:
        where = f"model=pocket,base_url={server.url},api_key=none,timeout=120"
        models = {
            name: {"model": name, "model_args": f"{where},{options}", "batch_size": "1"}
            for name, options in CLIENTS.items()
        }
        runs = run_lmms_eval(world, models)
        assert server.end()[0] == 0
    return runs


@pytest.mark.parametrize("client", CLIENTS)
def test_lmms_evals_client_gets_the_answers_and_scores_of_our_runner(
    client: str,
    client_runs: dict[str, Run],
    our_answers: dict[tuple[str, str], Answers],
    our_files: dict[tuple[str, str, str], Path],
    world: Path,
) -> None:
    run = client_runs[client]
    assert sum(map(len, run.answers.values())) == 312
    assert run.answers == our_answers[TRIMMED, "TRIM:-1"]
    for name in NAMES:
        task = BENCHMARKS[name]
        ours = score_answers(task, our_files[TRIMMED, "TRIM:-1", name], task.find_root(world / "eval"))
        accuracy = sum(verdict.points for verdict in ours.verdicts) / len(ours.verdicts)
        assert run.results["results"][PREFIX + name][METRICS[name]] == pytest.approx(accuracy)
