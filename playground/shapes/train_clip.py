"""Train the pocket CLIP: 1.2 M parameters, contrastive loss only, on images of the embedded world.

TRIM keeps the patches that are LEAST similar to the query. Whether these are the patches of the object depends on the
trained tower and changes during training. It is therefore measured on held-out images every few steps, with the
functions of `python -m llava.calibrate`, and logged to `sign_log.jsonl`. The latest checkpoint that meets `AIM` is
kept, also when training is interrupted. If none meets it, the command fails with a message and writes none.

Run: `python -m playground.shapes.train_clip --out playground/shapes/checkpoints/shapes-clip`
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run, saved as `recipe.json` in the checkpoint."""

    pictures: int = 20000
    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    attention_start: str = "mimetic"
    measure_every: int = 50
    seed: int = 0
    threads: int = 2


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line: every setting of the recipe is an option."""
    parser = argparse.ArgumentParser(description="Train the pocket CLIP on the embedded world.")
    parser.add_argument("--out", type=Path, required=True, help="output checkpoint; replaced whenever the aim is met")
    for name, value in asdict(Recipe()).items():
        choices = ("random", "mimetic") if name == "attention_start" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices)
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from llava.calibrate import OPTIONS, Figures, choose_option, cover_cells, measure_option
from llava.errors import InputError, run_command
from llava.model.token_reduction import VisualTokens
from playground.shapes import sentence
from playground.shapes.clip_data import ImageSet, choose_texts, draw_images, mark_features, match_pairs
from playground.shapes.tokenizer import CLIP_CONTEXT_LENGTH, train_clip_tokenizer, write_json
from playground.shapes.world import PICTURE_SIZE

PATCH_SIZE = 14
GRID = (PICTURE_SIZE // PATCH_SIZE, PICTURE_SIZE // PATCH_SIZE)
JOINT_WIDTH = 64
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER = -2  # the hidden state that LLaVA reads
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
BETAS = (0.9, 0.98)
WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0
MIMETIC_SIZE = 0.4  # scale of the negative identity and of its noise
MAX_LOGIT_SCALE = 100.0  # as in OpenAI's training
HELD_OUT_IMAGES = 300
NEGATED = OPTIONS[0]


@dataclass(frozen=True)
class Aim:
    """What TRIM's negated sign must reach on held-out images."""

    max_kept_ratio: float = 0.22
    min_recall: float = 0.70

    def is_met(self, figures: list[Figures]) -> bool:
        """Whether the negated sign fits best, keeps few patches and finds most of the object."""
        best = choose_option(figures)
        return (
            best is not None
            and best.option == NEGATED
            and best.kept_ratio <= self.max_kept_ratio
            and best.recall >= self.min_recall
        )


AIM = Aim()


def build_model(vocabulary_size: int, attention_start: str) -> CLIPModel:
    """Build the untrained model.

    Args:
        vocabulary_size: number of the tokenizer's ids; the end token is the largest.
        attention_start: `random` (Hugging Face's initialisation) or `mimetic` (see `start_mimetic`).
    """
    config = CLIPConfig(
        text_config={
            **TEXT, "vocab_size": vocabulary_size, "max_position_embeddings": CLIP_CONTEXT_LENGTH,
            "hidden_act": "quick_gelu", "projection_dim": JOINT_WIDTH, "bos_token_id": vocabulary_size - 2,
            "eos_token_id": 2,  # OpenAI's value; it makes transformers pool at the largest id
        },
        vision_config={**VISION, "image_size": PICTURE_SIZE, "patch_size": PATCH_SIZE, "hidden_act": "quick_gelu",
                       "projection_dim": JOINT_WIDTH},
        projection_dim=JOINT_WIDTH,
    )  # fmt: skip
    model = CLIPModel(config)
    if attention_start == "mimetic":
        start_mimetic(model)
    return model


@torch.no_grad()
def start_mimetic(model: CLIPModel) -> None:
    """Initialise the vision layers' value and output projections as in large pretrained vision transformers.

    Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (ICML 2023, arXiv 2305.09828): there, the
    product of the two is close to a negative identity plus noise, and transformers initialised like this train faster
    on little data. Each patch then passes on its own content with the opposite sign. From a random initialisation the
    sign is random for every colour. (The paper's other half, query times key close to the identity, is left out: in
    this small model it makes patches attend only to themselves, and the sign of their content alternates by layer.)
    """
    width = VISION["hidden_size"]
    for layer in model.vision_model.encoder.layers:
        noise = torch.randn(width, width) / math.sqrt(width)
        left, values, right = torch.linalg.svd(MIMETIC_SIZE * (noise - torch.eye(width)))
        layer.self_attn.out_proj.weight.copy_(left * values.sqrt())
        layer.self_attn.v_proj.weight.copy_(values.sqrt()[:, None] * right)


def normalise(pixels: np.ndarray) -> Tensor:
    """Convert `uint8[I, H, W, 3]` to `float32[I, 3, H, W]`, as CLIP's image processor does with images of this size."""
    values = torch.from_numpy(pixels).float().div_(255)
    return ((values - torch.tensor(OPENAI_MEAN)) / torch.tensor(OPENAI_STD)).permute(0, 3, 1, 2).contiguous()


def encode_text(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Embed texts in the joint space: `[T, JOINT_WIDTH]`, not normalised."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return model.text_projection(model.text_model(**tokens).pooler_output)


def contrast(image: Tensor, text: Tensor, pairs: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute CLIP's symmetric loss where a text may be true of several images.

    Args:
        image: `[I, P]` image embeddings, not normalised.
        text: `[T, P]` text embeddings, not normalised.
        pairs: `float32[T, I]`, 1 where the text is true of the image; the true pairs of a row or column share its
            target evenly. Every image has a true text; texts that are true of no image are negatives only.
        logit_scale: logarithm of the inverse temperature.

    Returns:
        A scalar.
    """
    image, text = (nn.functional.normalize(each.float(), dim=-1) for each in (image, text))
    logits = logit_scale.exp() * text @ image.T
    has_image = pairs.sum(1) > 0
    losses = [-(truth / truth.sum(1, keepdim=True) * scores.log_softmax(1)).sum(1).mean()
              for scores, truth in ((logits[has_image], pairs[has_image]), (logits.T, pairs.T))]  # fmt: skip
    return (losses[0] + losses[1]) / 2


class SignProbe:
    """Held-out images with one question each, on which both signs are measured."""

    def __init__(self, count: int, seed: int) -> None:
        """Draw `count` images and one question per image about a present object."""
        self.pictures = draw_images("calibrate", count, seed)
        chooser = random.Random(seed)
        questions = [sentence.ask_present(scene, chooser) for scene in self.pictures.scenes]
        self.queries = [question.text + sentence.SUFFIX for question in questions]
        size = (PICTURE_SIZE, PICTURE_SIZE)
        self.inside = torch.stack([cover_cells([question.about.box], size, GRID) for question in questions])

    @torch.no_grad()
    def measure(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> list[Figures]:
        """Measure the model in float32; it is left in training mode."""
        model.eval()
        hidden = [
            model.vision_model(pixel_values=normalise(part), output_hidden_states=True).hidden_states[LAYER][:, 1:]
            for part in np.array_split(self.pictures.pixels, max(1, len(self.queries) // 100))
        ]
        patches = torch.cat(hidden)
        joint = model.visual_projection(model.vision_model.post_layernorm(patches))
        tokens = VisualTokens(patches, GRID, joint, encode_text(model, tokenizer, self.queries))
        model.train()
        return [measure_option(option, tokens, self.inside) for option in OPTIONS]


def iterate_batches(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield shuffled batches of indices for ever; each epoch drops its incomplete last batch."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield np.sort(order[start : start + batch_size])


def make_optimizer(model: CLIPModel, recipe: Recipe) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Make AdamW, with weight decay on matrices only, and a one-cycle schedule."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS)
    schedule = OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=WARMUP_SHARE)
    return optimizer, schedule


def compute_loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: ImageSet, batch: np.ndarray, chooser: random.Random
) -> Tensor:
    """Compute the loss of a batch, with a text and a hard negative per image; towers in bfloat16, loss in float32."""
    fitting, exchanged = zip(*(choose_texts(images.scenes[index], chooser) for index in batch), strict=True)
    chosen = [*fitting, *exchanged]
    needs = torch.stack([mark_features(names) for _, names in chosen])
    with torch.autocast("cpu", torch.bfloat16):
        vision = model.vision_model(pixel_values=normalise(images.pixels[batch]))
        image = model.visual_projection(vision.pooler_output)
        text = encode_text(model, tokenizer, [text for text, _ in chosen])
    return contrast(image, text, match_pairs(needs, images.features[torch.from_numpy(batch)]), model.logit_scale)


def train(recipe: Recipe, folder: Path) -> bool:
    """Train, measure, and keep the latest checkpoint that meets the aim.

    Args:
        recipe: the settings.
        folder: output checkpoint; the log of the sign is written beside it, as `<folder>.sign_log.jsonl`.

    Returns:
        Whether a checkpoint met the aim.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    log = folder.with_name(folder.name + ".sign_log.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        train_clip_tokenizer(Path(tokenizer_folder))
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
        model = build_model(len(tokenizer), recipe.attention_start).train()
        probe, found = SignProbe(HELD_OUT_IMAGES, recipe.seed), False
        for row in iterate_training(model, tokenizer, recipe):
            figures = probe.measure(model, tokenizer)
            row |= {"meets_aim": AIM.is_met(figures), "signs": [asdict(figure) for figure in figures]}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            report(row)
            if row["meets_aim"]:
                found = True
                save(model, Path(tokenizer_folder), folder, recipe)
            if found:
                shutil.copyfile(log, folder / "sign_log.jsonl")
    return found


def iterate_training(model: CLIPModel, tokenizer: CLIPTokenizer, recipe: Recipe) -> Iterator[dict[str, object]]:
    """Train the model in place; yield step, seconds and mean loss whenever the sign is due for measurement."""
    images = draw_images("train", recipe.pictures)
    optimizer, schedule = make_optimizer(model, recipe)
    chooser, batches = random.Random(recipe.seed), iterate_batches(recipe.pictures, recipe.batch_size, recipe.seed)
    started, losses = time.monotonic(), []
    for step in range(1, recipe.steps + 1):
        loss = compute_loss(model, tokenizer, images, next(batches), chooser)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        losses.append(loss.item())
        if step % recipe.measure_every == 0 or step == recipe.steps:
            yield {"step": step, "seconds": round(time.monotonic() - started), "loss": sum(losses) / len(losses)}
            losses.clear()


def save(model: CLIPModel, tokenizer_folder: Path, folder: Path, recipe: Recipe) -> None:
    """Write a checkpoint in Hugging Face's layout, then replace the old one."""
    partial = folder.with_name(folder.name + ".part")
    if partial.exists():  # left by an interrupted run
        shutil.rmtree(partial)
    shutil.copytree(tokenizer_folder, partial)
    model.save_pretrained(partial)
    write_json(partial / "preprocessor_config.json", {
        "crop_size": PICTURE_SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
        "feature_extractor_type": "CLIPFeatureExtractor", "size": PICTURE_SIZE,
        "image_mean": list(OPENAI_MEAN), "image_std": list(OPENAI_STD),
    })  # fmt: skip
    write_json(partial / "recipe.json", asdict(recipe))
    if (folder / "README.md").exists():  # the model card is written by hand
        shutil.copyfile(folder / "README.md", partial / "README.md")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def report(row: dict[str, object]) -> None:
    signs = "  ".join(f"{sign['option']}: kept {sign['kept_ratio']:.3f}, recall {sign['recall']:.3f}, "
                      f"auc {sign['auc']:.3f}" for sign in row["signs"])  # fmt: skip
    saved = "  saved" if row["meets_aim"] else ""
    print(f"step {row['step']}  {row['seconds']} s  loss {row['loss']:.3f}  {signs}{saved}", flush=True)  # noqa: T201


def main() -> None:
    arguments = vars(make_parser().parse_args())
    folder = arguments.pop("out")
    recipe = Recipe(**arguments)
    if recipe.batch_size > recipe.pictures:
        raise InputError(f"--batch-size {recipe.batch_size} is more than --pictures {recipe.pictures}")
    if not train(recipe, folder):
        raise InputError(f"no checkpoint met the aim ({AIM}) in {recipe.steps} steps: see {folder}.sign_log.jsonl")


if __name__ == "__main__":
    run_command(main)
