"""A strict stand-in for a GPU: tensors left on the wrong device fail, and waits of the host for the device are counted.

Host tensors are real. Tensors on "cuda" are fake: they have shapes, dtypes and a device, but no values. An operation
that mixes the two raises, as it does on a GPU; what the host fetches from the device is made up, and counted.
"""

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.generation import GreedyDecoder
from llava.model.builder import load_pretrained_model
from llava.model.feature_files import FeatureFiles
from llava.model.image_tokens import ImageTokens
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.model.token_reduction import REDUCERS

pytest.importorskip("datasets", reason="training records are read with it")
from llava.train.arguments import TrainingArguments
from llava.train.collator import Collator
from llava.train.dataset import Sample
from llava.train.feature_cache import FeatureCache
from llava.train.llava_trainer import LLaVATrainer

DEVICE = torch.device("cuda", 0)
FIRST_MADE_UP, NUM_MADE_UP = 3, 3
"""What the host fetches is 3, 4, 5, 3, 4, ...: small enough for a count of patches, and not the same in every row."""
MOVES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put_")  # take indices from the host as well
FETCHES = ("_local_scalar_dense", "equal")


class SecondDevice(TorchDispatchMode):
    """Dispatches operations to the host or to the fake device.

    Attributes:
        waits: where in llava (or else anywhere) the host waited for the device: `file.py:line` each.
        uploads: where the host sent values to the device.
        stalls: those of them for which the host waited, until the device had done all work before: copies of a GPU do
            so unless they are asked not to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.waits: list[str] = []
        self.uploads: list[str] = []
        self.stalls: list[str] = []

    def __enter__(self) -> "SecondDevice":
        # No driver is there, and none is needed; `torch.tensor(..., device="cuda")` is made on the host, then moved.
        self._before = torch.cuda._lazy_init, torch._C._only_lift_cpu_tensors()
        torch.cuda._lazy_init = lambda: None
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.cuda._lazy_init = self._before[0]
        torch._C._set_only_lift_cpu_tensors(self._before[1])

    def send(self, model: nn.Module) -> None:
        """Replace every parameter and buffer by a fake one. What is neither stays behind, as with `model.to`."""
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(self._imitate(value), value.requires_grad)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = self._imitate(value)

    def _imitate(self, value: Tensor) -> Tensor:
        with self.fake:
            return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        named = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        # 1. The host alone.
        if not any(map(is_fake, tensors)) and "cuda" not in named:
            return func(*args, **kwargs)
        # 2. From the device to the host: a wait.
        name = func.overloadpacket.__name__
        if name in FETCHES or (name in MOVES and is_fake(tensors[-1]) and ("cpu" in named or not is_fake(tensors[0]))):
            self.waits.append(place())
            args, kwargs = tree_map_only(FakeTensor, make_up, (args, kwargs))
            return func(*args, **kwargs)
        # 3. From the host to the device, and work there.
        self._note_uploads(
            name, tensors, leaves_at_once=kwargs.get("non_blocking") is True or (len(args) > 2 and args[2] is True)
        )
        args, kwargs = tree_map_only(Tensor, self._lift, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def _note_uploads(self, name: str, tensors: list[Tensor], leaves_at_once: bool) -> None:
        """Let pass what a GPU lets pass: moves, indices, and scalars, which travel as arguments."""
        for tensor in tensors:
            if is_fake(tensor):
                continue
            if name in MOVES or (name in INDEXING and is_fake(tensors[0])):
                self.uploads += [place()] * bool(tensor.numel())
                self.stalls += [place()] * bool(tensor.numel() and not leaves_at_once)
            elif tensor.dim() > 0 and any(map(is_fake, tensors)):
                raise RuntimeError(f"host tensor {list(tensor.shape)} {tensor.dtype} meets a device tensor in {name}")

    def _lift(self, tensor: Tensor) -> Tensor:
        return tensor if is_fake(tensor) else self.fake.from_tensor(tensor)


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def make_up(tensor: Tensor) -> Tensor:
    values = torch.arange(tensor.numel()).reshape(tensor.shape) % NUM_MADE_UP + FIRST_MADE_UP
    return values.to(tensor.dtype)


def place() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if "/llava/" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


OPTIONS = {"HiPrune": ",object_layer=2"}  # the tower has 4 layers
SPECS = [f"{name}:0.3{OPTIONS.get(name, '')}" for name in REDUCERS] + ["TRIM:-1", "PruMerge:-1", "Random:0.3,mean=true"]
LAYER_SPECS = ["FastV:0.3,layer=1", "PyramidDrop:0.5", "SparseVLM:0.3", "SparseVLM+:0.3", "TRIM:-1|DART:16,layer=1"]
COUNTED = ("TRIM", "TextSim", "HoloV", "Random", "PruMerge:-1")
"""How many tokens these keep, or which, the host does not know before."""
QUERIES = ["What color is the circle?", "Is there a dog?", "How many?"]
NEW_TOKENS = 4
Loaded = tuple[LlavaLlamaForCausalLM, PreTrainedTokenizerBase, SecondDevice]


@pytest.fixture(scope="module")
def loaded(golden: Path) -> Loaded:
    """A model on the device, with what every reducer needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        tokenizer, model, _, _ = load_pretrained_model("llava-v1.5-tiny84-TRIM", device="cpu", dtype="float32")
        for spec in SPECS:
            model.set_token_reduction(spec)
    device = SecondDevice()
    device.send(model)
    return model, tokenizer, device


@pytest.fixture
def device(loaded: Loaded) -> Iterator[SecondDevice]:
    device = loaded[2]
    device.waits, device.uploads, device.stalls = [], [], []
    with device, torch.no_grad():
        yield device


@pytest.fixture
def model(loaded: Loaded, device: SecondDevice) -> LlavaLlamaForCausalLM:
    loaded[0].set_token_reduction("TRIM:-1")
    return loaded[0]


def draw_prompts(model: LlavaLlamaForCausalLM) -> list[Tensor]:
    """Three prompts of different lengths with the same beginning, one image each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (3, 16), generator=generator)
    ids[:, :4] = ids[0, :4].clone()
    ids[:, 4] = IMAGE_TOKEN_INDEX
    return [row[: 10 + 2 * index] for index, row in enumerate(ids)]


def encode(model: LlavaLlamaForCausalLM) -> list[ImageTokens]:
    return model.encode_images(torch.randn(3, 3, 84, 84), QUERIES)


def test_the_stand_in_is_strict(device):
    there = torch.zeros(2, 3, device=DEVICE)
    assert (there + 1).device == DEVICE and not device.waits
    with pytest.raises(RuntimeError, match="meets a device tensor"):
        there + torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="meets a device tensor"):
        torch.nn.functional.linear(torch.zeros(2, 3), there)
    for number, wait in enumerate(
        (
            lambda: there.cpu(),
            lambda: there.to("cpu", torch.float64),
            lambda: there.sum().item(),
            lambda: bool(there.any()),
            lambda: int(there[0, 0]),
            lambda: torch.equal(there, there),
            lambda: torch.zeros(2, 3).copy_(there),
        ),
        start=1,
    ):
        wait()
        assert len(device.waits) == number
    moved = torch.zeros(3).to(DEVICE, non_blocking=True), torch.zeros(2, 3).to(DEVICE)
    assert moved[0].device == moved[1].device == DEVICE
    assert (len(device.uploads), len(device.stalls)) == (2, 1)
    device.uploads.clear()
    with pytest.raises(DynamicOutputShapeException):
        there.nonzero()  # waits as well: nothing may ask for it
    assert not device.uploads
    assert torch.tensor([1.0, 2.0], device=DEVICE).device == DEVICE
    assert len(device.uploads) == 1


@pytest.mark.parametrize("spec", [None, *SPECS])
def test_a_reduction_waits_at_most_once_and_all_it_makes_is_on_the_device(model, device, spec):
    model.set_token_reduction(spec)
    patches = model.encode_patches(torch.randn(3, 3, 84, 84))
    embeds = model.embed_queries(QUERIES)
    assert not device.waits

    device.uploads.clear()
    reduced = model.choose_tokens(patches, QUERIES, embeds)
    is_free = spec is None or not spec.startswith(COUNTED)
    assert len(device.waits) == (0 if is_free else 1), device.waits
    # What is drawn by chance is drawn on the host, so that every device draws the same.
    assert len(device.uploads) == (spec or "").startswith("Random"), device.uploads

    tokens = model.project_chosen(reduced)
    assert {image.features.device for image in tokens} == {DEVICE}
    assert len(device.waits) == (0 if is_free else 1), device.waits


@pytest.mark.parametrize("spec", ["FasterVLM:avg=9.5", "DivPrune:avg=9.5", "Pool:avg=12.5", "VisionZip:avg=9.5"])
def test_a_mean_budget_waits_once_for_the_fingerprints_of_all_images(model, device, spec):
    model.set_token_reduction(spec)
    generator = torch.Generator().manual_seed(0)
    patches = model.encode_patches(torch.randn(12, 3, 84, 84, generator=generator))
    reduced = model.choose_tokens(patches, QUERIES * 4)
    assert len(device.waits) == 1, device.waits
    assert len({int(image.lengths[0]) for image in reduced}) == 2
    tokens = model.project_chosen(reduced)
    assert {image.features.device for image in tokens} == {DEVICE}
    assert len(device.waits) == 1, device.waits


def test_splicing_and_a_pass_over_the_prompts_do_not_wait(model, device):
    tokens = encode(model)
    device.waits.clear()
    ids, mask = torch.full((3, 14), 0), torch.zeros(3, 14, dtype=torch.bool)
    for index, prompt in enumerate(draw_prompts(model)):
        ids[index, : len(prompt)], mask[index, : len(prompt)] = prompt, True
    batch = model.embed_prompts(ids, attention_mask=mask, image_tokens=tokens, padding_side="left")
    assert {batch.embeds.device, batch.attention_mask.device, batch.position_ids.device} == {DEVICE}
    output = model(
        inputs_embeds=batch.embeds,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    assert output.logits.shape == (3, 1, model.config.vocab_size) and output.logits.device == DEVICE
    assert not device.waits


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ends", [{2}, {FIRST_MADE_UP}], ids=["all go on", "one answer ends at each step"])
def test_greedy_decoding_waits_once_per_token(model, device, shared, ends):
    prompts, tokens = draw_prompts(model), encode(model)
    own = [(tokens[0],)] * 3 if shared else [(image,) for image in tokens]
    device.waits.clear()
    decoder = GreedyDecoder(model, ends)
    # Without `inference_mode`, in which fake tensors lack a decomposition.
    answers = GreedyDecoder.decode.__wrapped__(decoder, prompts, own, NEW_TOKENS)
    num_steps = NEW_TOKENS if 2 in ends else 3
    assert max(map(len, answers)) == min(num_steps, NEW_TOKENS) - (2 not in ends)
    assert len(device.waits) == num_steps, device.waits


@pytest.mark.parametrize("spec", ["TRIM:-1", *LAYER_SPECS])
def test_generate_finds_everything_on_the_device(model, device, spec):
    model.set_token_reduction(spec)
    ids = torch.stack([prompt[:10] for prompt in draw_prompts(model)])
    answer = model.generate(ids, images=torch.randn(3, 3, 84, 84), texts=QUERIES, max_new_tokens=2, do_sample=False)
    assert answer.device == DEVICE


@pytest.fixture
def trainer(loaded: Loaded, model, device, tmp_path, monkeypatch) -> LLaVATrainer:
    """The trainer, in a process that computes on the device; two samples with an image, one without."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for row, query in zip(draw_prompts(model), QUERIES, strict=True):
        labels = torch.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, row)
        samples.append(Sample(row, labels, [torch.randn(3, 84, 84, generator=generator)], [(84, 84)], query))
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, report_to=[], use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "device", DEVICE)
    monkeypatch.setattr(TrainingArguments, "place_model_on_device", False)  # it is there
    trainer = LLaVATrainer(model=model, args=args, train_dataset=samples, data_collator=Collator(0, 2048))
    monkeypatch.setattr(trainer.accelerator.state, "device", DEVICE)
    return trainer


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("spec", [None, "TRIM:-1"])
def test_a_training_step_waits_for_the_counts_of_the_reduction_alone(trainer, model, device, spec, packing):
    model.set_token_reduction(spec)
    trainer.args.packing = packing
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.enable_grad():
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    assert loss.device == DEVICE and loss.requires_grad
    assert len(device.waits) == (spec is not None), device.waits
    assert not device.stalls


def test_labels_and_features_of_a_training_step_reach_the_device_without_a_wait(trainer, model, device):
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    features = [ImageFeatures(torch.randn(1, 36, 64).half()) for _ in batch["images"]]
    trainer.feature_cache = FeatureCache(FeatureFiles(Path("nowhere"), "", ()), model.get_vision_tower())
    with torch.enable_grad():
        prepared = trainer._prepare_inputs(batch | {"images": features, "image_keys": [""] * len(features)})
        assert not device.waits
        loss = trainer.compute_loss(model, prepared)
    assert loss.device == DEVICE
    assert len(device.waits) == 1 and not device.stalls  # the counts
