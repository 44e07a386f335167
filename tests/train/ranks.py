"""Run training scenarios on several CPU ranks: `python ranks.py SCENARIOS.json`; not a test itself.

torch and DeepSpeed are imported once and every scenario's ranks are forked from here, which is several times cheaper
than a launcher each. Each scenario leaves `<name>.json` (losses and log of rank 0, the share of the weights that it
holds, the scores of its images' patches; the error of a rank that failed) beside the scenarios' file, and
`<name>.<rank>.log`. `stop_at` in a scenario is the step after which rank 1 gets SIGTERM.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.token_reduction import ReducedTokens
from llava.train import stopping
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import train

with suppress(ModuleNotFoundError):
    import deepspeed  # noqa: F401 # imported once for all ranks

PATIENCE_SECONDS = 600  # for one scenario, which takes ten seconds where nothing else runs


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def held_share(model: torch.nn.Module) -> float:
    """The share of the weights that this rank holds, where FSDP2 shards them."""
    weights = list(model.parameters())
    held = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)
    return held / max(1, sum(weight.numel() for weight in weights))


def record_scores() -> list[list[float]]:
    """Return a list that gets the scores of each image's patches, and which are kept, whenever the model chooses."""
    recorded: list[list[float]] = []
    choose = LlavaMetaForCausalLM.choose_tokens

    def choose_and_record(*arguments: object, **options: object) -> list[ReducedTokens]:
        chosen = choose(*arguments, **options)
        recorded.extend([*image.scores.flatten().tolist(), *image.kept.flatten().tolist()] for image in chosen)
        return chosen

    LlavaMetaForCausalLM.choose_tokens = choose_and_record
    return recorded


def stop_at(step: int) -> None:
    """Send SIGTERM to this process when a step has been logged."""
    stopping.install()
    log = LLaVATrainer.log

    def log_and_stop(trainer: LLaVATrainer, logs: dict, *rest: object) -> None:
        log(trainer, logs, *rest)
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    LLaVATrainer.log = log_and_stop


def run_rank(rank: int, num_ranks: int, port: int, scenario: dict, folder: Path) -> None:
    log = os.open(folder / f"{scenario['name']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    code, scores = 0, record_scores()
    if rank == 1 and "stop_at" in scenario:
        stop_at(scenario["stop_at"])
    try:
        words = [word for key, value in scenario["flags"].items() for word in (f"--{key}", str(value))]
        trainer = train([word.replace("{rank}", str(rank)) for word in words])  # what lies elsewhere on each machine
        if rank == 0:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            result = {
                "losses": losses, "log": trainer.state.log_history, "held_share": held_share(trainer.model),
                "scores": scores,
            }  # fmt: skip
            (folder / f"{scenario['name']}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
    except BaseException as error:
        traceback.print_exc()
        (folder / f"{scenario['name']}.json").write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown, in which gloo's threads may abort


def run_scenario(scenario: dict, folder: Path) -> None:
    port, num_ranks = find_port(), scenario.get("ranks", 2)
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            run_rank(rank, num_ranks, port, scenario, folder)
        children.append(child)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while children and time.monotonic() < deadline:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                if status != 0:
                    deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.05)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    if children and not (folder / f"{scenario['name']}.json").exists():
        (folder / f"{scenario['name']}.json").write_text(json.dumps({"error": "the ranks did not end"}))


if __name__ == "__main__":
    file = Path(sys.argv[1])
    for entry in json.loads(file.read_text(encoding="utf-8")):
        run_scenario(entry, file.parent)
