"""LLaVA-1.5's training data by command: `python -m llava.train.download pretrain|finetune|all [--check]`.

The captions of stage 1 go to `LLaVA-Pretrain`, the conversations of stage 2 beside it, and the images that these are
about to `coco`, `gqa`, `ocr_vqa`, `textvqa` and `vg`, as LLaVA's instructions and the training scripts have it. What
can be learned from the records says the trainer itself (`--preflight_only True`).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.check import Finding
from llava.cli import add_bring_options, print_now, user_path
from llava.download.inventory import DELETE, find_missing, find_unreadable
from llava.download.store import DataSet, bring
from llava.download.table import Download, Place
from llava.errors import InputError, run_command
from llava.files import find_repository, read_json

LLAVA_PAGE = "https://github.com/haotian-liu/LLaVA#visual-instruction-tuning"
PRETRAIN_PAGE = "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain"
INSTRUCT_PAGE = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"

PRETRAIN_FOLDER, PRETRAIN_FILE, PRETRAIN_RECORDS = "LLaVA-Pretrain", "blip_laion_cc_sbu_558k.json", 558_128
FINETUNE_FILE, FINETUNE_RECORDS = "llava_v1_5_mix665k.json", 665_298

NUM_DECODED = 50
"""Images of a stage that a check decodes."""
EXIT_INCOMPLETE = 1
"""Exit code when data are missing."""


@dataclass(frozen=True)
class Stage:
    """The data of a stage of training.

    Attributes:
        records: the JSON file of its records, below the data root.
        num_records: in the published file.
        images: the folder that the names of images in the records are relative to.
        downloads: what all of it is fetched from; places are below the data root.
    """

    records: str
    num_records: int
    images: str
    downloads: tuple[Download, ...]


STAGES = {
    "pretrain": Stage(
        f"{PRETRAIN_FOLDER}/{PRETRAIN_FILE}",
        PRETRAIN_RECORDS,
        f"{PRETRAIN_FOLDER}/images",
        (
            Download(
                (Place(f"{PRETRAIN_FOLDER}/{PRETRAIN_FILE}", PRETRAIN_RECORDS),),
                PRETRAIN_PAGE,
                f"{PRETRAIN_PAGE}/resolve/main/{PRETRAIN_FILE}",
                size=181_000_000,
            ),
            Download(
                (Place(f"{PRETRAIN_FOLDER}/images/"),),
                PRETRAIN_PAGE,
                f"{PRETRAIN_PAGE}/resolve/main/images.zip",
                unpack_in=f"{PRETRAIN_FOLDER}/images",
            ),
        ),
    ),
    "finetune": Stage(
        FINETUNE_FILE,
        FINETUNE_RECORDS,
        "",
        (
            Download(
                (Place(FINETUNE_FILE, FINETUNE_RECORDS),),
                INSTRUCT_PAGE,
                f"{INSTRUCT_PAGE}/resolve/main/{FINETUNE_FILE}",
            ),
            Download(
                (Place("coco/train2017/", 118_287),),
                "https://cocodataset.org/#download",
                "http://images.cocodataset.org/zips/train2017.zip",
                unpack_in="coco",
                size=19_336_861_798,
            ),
            Download(
                (Place("gqa/images/", 148_854),),
                "https://cs.stanford.edu/people/dorarad/gqa/download.html",
                "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
                unpack_in="gqa",
                size=20_300_000_000,
            ),
            Download(
                (Place("textvqa/train_images/", 25_119),),
                "https://textvqa.org/dataset/",
                "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
                unpack_in="textvqa",
                size=7_072_297_970,
            ),
            Download(
                (Place("vg/VG_100K/", 64_346),),
                LLAVA_PAGE,
                "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
                unpack_in="vg",
                size=9_731_705_982,
            ),
            Download(
                (Place("vg/VG_100K_2/", 43_903),),
                LLAVA_PAGE,
                "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
                unpack_in="vg",
                size=5_471_658_058,
            ),
            Download(
                (Place("ocr_vqa/images/"),),
                LLAVA_PAGE,
                by_hand="a script on Google Drive, which fetches image by image; all are named .jpg",
            ),
        ),
    ),
}
"""Of each stage, by name. Numbers of files are those that LLaVA's users count in the published archives."""


def find_data_root() -> Path:
    """Return `playground/data` of the repository that this package lies in; for an installed package the user's."""
    return (find_repository() or Path.cwd()) / "playground" / "data"


def check_stage(name: str, root: Path) -> Iterator[Finding]:
    """Find out whether the records of a stage, and all the images that they name, are there.

    Yields:
        One finding if all is well, else one for each folder in which images are missing, and for each other fault.
    """
    stage, remedy = STAGES[name], f"python -m llava.train.download {name}"
    try:
        records = read_json(root / stage.records, remedy)
    except InputError as error:
        yield Finding(name, str(error), is_fault=True)
        return
    if not isinstance(records, list):
        yield Finding(name, f"{root / stage.records} is no list of records{DELETE} {remedy}", is_fault=True)
        return
    names = dict.fromkeys(name for record in records for name in list_images(record))
    images = [root / stage.images / each for each in names]
    faults = []
    if len(records) != stage.num_records:
        faults.append(f"{stage.records} has {len(records):,} records instead of {stage.num_records:,}{DELETE}")
    missing = find_missing(images)
    faults += describe_missing(missing, images, root / stage.images)
    absent = set(missing)
    unreadable = find_unreadable([image for image in images if image not in absent], NUM_DECODED)
    faults += [f"{fault}{DELETE}" for fault in unreadable.values()]
    for fault in faults:
        yield Finding(name, f"{fault} {remedy}", is_fault=True)
    if not faults:
        yield Finding(name, f"{len(records):,} records, {len(images):,} images, in {root}")


def list_images(record: object) -> list[str]:
    """List the image files that a record names; what else may be wrong with it is the trainer's."""
    named = record.get("image") if isinstance(record, dict) else None
    return [
        each for each in (named if isinstance(named, list) else [named]) if isinstance(each, str) and "://" not in each
    ]


def describe_missing(missing: Sequence[Path], images: Sequence[Path], root: Path) -> list[str]:
    """Say in a line for each data set, the first folder of the names, how many of its images are missing."""

    def group(paths: Sequence[Path]) -> dict[str, list[Path]]:
        groups: dict[str, list[Path]] = {}
        for path in paths:
            parts = path.relative_to(root).parts
            groups.setdefault(parts[0] if len(parts) > 2 else "", []).append(path)
        return groups

    numbers = {name: len(paths) for name, paths in group(images).items()}
    return [
        f"{len(paths):,} of {numbers[name]:,} images {f'in {name} ' if name else ''}are missing, such as {paths[0]};"
        for name, paths in group(missing).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.download", description="Fetch LLaVA-1.5's training data; only what is missing."
    )
    parser.add_argument(
        "stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE", help="pretrain, finetune or all"
    )
    parser.add_argument("--root", type=user_path, metavar="DIR", help="where they go (default: playground/data)")
    parser.add_argument("--check", action="store_true", help="fetch nothing: say what is there, and what is missing")
    add_bring_options(parser)
    arguments = parser.parse_args()
    root = arguments.root or find_data_root()
    names = list(STAGES if "all" in arguments.stages else dict.fromkeys(arguments.stages))
    if arguments.check:
        findings = [finding for name in names for finding in check_stage(name, root)]
        print_now("\n".join(map(str, findings)))
        complete = not any(finding.is_fault for finding in findings)
    else:
        data_sets = [DataSet(name, root, STAGES[name].downloads) for name in names]
        complete = bring(root, data_sets, print_now, arguments.dry_run, arguments.keep_archives)
    if not complete:
        raise SystemExit(EXIT_INCOMPLETE)


if __name__ == "__main__":
    run_command(main)
