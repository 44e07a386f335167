"""The screen of a run: a row per logging step under a heading; held-out losses, scores and the end in words."""

import sys
from collections.abc import Callable, Mapping

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from llava.train.arguments import TrainingArguments
from llava.train.figures import DATA, LANGUAGE_MODEL, OPTIMIZER, PARTS, PAUSE, TOWER

ROWS_PER_HEADING = 20
STEP_WIDTH = 15
ABSENT = "-"

Record = Mapping[str, float]


def format_loss(value: float) -> str:
    """Four decimals, as long as they fit."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1e}"


def format_count(value: float) -> str:
    """At most five characters: 12.3, 870, 2.1k, 3.4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}" if value < 100 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def format_seconds(value: float) -> str:
    """Hours, minutes and seconds, 3:12:44."""
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _format_kept(record: Record) -> str:
    return f"{record['kept_tokens_mean']:.0f}±{record['kept_tokens_std']:.0f}"


def _share_of(part: str) -> Callable[[Record], str]:
    def fill(record: Record) -> str:
        busy = sum(record[f"seconds_{name}"] for name in PARTS if name != PAUSE)
        return f"{record[f'seconds_{part}'] / busy:.0%}" if busy else ABSENT

    return fill


# Heading, width with the space before it, and how a record fills it. With the step that is 118 columns.
COLUMNS: tuple[tuple[str, int, Callable[[Record], str]], ...] = (
    ("loss", 8, lambda record: format_loss(record["loss"])),
    ("image", 8, lambda record: format_loss(record["loss_image"])),
    ("text", 8, lambda record: format_loss(record["loss_text"])),
    ("lr", 8, lambda record: f"{record['learning_rate']:.1e}"),
    ("kept", 9, _format_kept),
    ("vis/s", 6, lambda record: format_count(record["visual_tokens_per_second"])),
    ("txt/s", 6, lambda record: format_count(record["text_tokens_per_second"])),
    ("smp/s", 6, lambda record: format_count(record["samples_per_second"])),
    ("pad", 5, lambda record: f"{record['padding_share']:.0%}"),
    ("GiB", 6, lambda record: f"{record['memory_gib']:.1f}"),
    ("data", 5, _share_of(DATA)),
    ("tower", 6, _share_of(TOWER)),
    ("lm", 5, _share_of(LANGUAGE_MODEL)),
    ("opt", 5, _share_of(OPTIMIZER)),
    ("eta", 12, lambda record: format_seconds(record["eta_seconds"])),
)
HEADING = "step".rjust(STEP_WIDTH) + "".join(heading.rjust(width) for heading, width, _ in COLUMNS)


def format_step(record: Record, step: int, max_steps: int) -> str:
    """Write the row of a logging step.

    Args:
        record: its figures; a column whose figure is not there has a dash.
        step: its number.
        max_steps: of the run; left out where it does not fit.
    """
    place = f"{step}/{max_steps}"
    cells = [(place if len(place) <= STEP_WIDTH else str(step)).rjust(STEP_WIDTH)]
    for _, width, fill in COLUMNS:
        try:
            text = fill(record)
        except KeyError:
            text = ABSENT
        cells.append(text.rjust(width))
    return "".join(cells)


def format_held_out(record: Record, step: int) -> str:
    """Write the line of a held-out loss."""
    names = (("image", "eval_loss_image"), ("text", "eval_loss_text"))
    parts = ", ".join(f"{name} {format_loss(record[key])}" for name, key in names if key in record)
    how = f"{record['eval_samples']:.0f} samples in {format_seconds(record['eval_runtime'])}"
    return f"held out at step {step}: loss {format_loss(record['eval_loss'])} ({parts}; {how})"


def format_scores(record: Record, step: int) -> str:
    """Write the line of what `--eval_command` gave."""
    scores = ", ".join(f"{key.removeprefix('score_')} {value:g}" for key, value in record.items() if is_score(key))
    return f"scored at step {step}: {scores}"


def is_score(key: str) -> bool:
    """Whether a figure comes from `--eval_command`."""
    return key.startswith("score_")


class Console(TrainerCallback):
    """Prints the log of a run, on the first rank."""

    def __init__(self) -> None:
        self.num_rows = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Record | None = None,
        **rest: object,
    ) -> None:
        """Print one record."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            heading = f"{HEADING}\n" if self.num_rows % ROWS_PER_HEADING == 0 else ""
            self.num_rows += 1
            line = heading + format_step(logs, state.global_step, state.max_steps)
        elif "eval_loss" in logs:
            line = format_held_out(logs, state.global_step)
        elif any(map(is_score, logs)):
            line = format_scores(logs, state.global_step)
        elif "train_runtime" in logs:
            took, mean = format_seconds(logs["train_runtime"]), format_loss(logs["train_loss"])
            line = f"step {state.global_step} of {state.max_steps} after {took}, mean loss {mean}"
        else:
            return
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
