"""What every vision tower offers, whatever library its weights come from.

`extract` depends on the image alone; `project_to_joint` and `embed_text` give what text-guided reducers score with.
They are separate, so that an image met again under another question pays only for the second. Towers run in their own
dtype (float32 unless asked otherwise, as in the released evaluation); joint-space outputs are always float32.

Shape letters: `I` images (or crops), `C` crops of one image, `N` patches, `R` rows of a hidden state (CLS and N
patches, or N patches in a tower without CLS), `D` vision width, `P` joint width, `S` texts, `L` layers, `H` attention
heads, `d` width of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import InputError
from llava.model.multimodal_encoder.query_pooling import pool_embeddings, split_query
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader
from llava.model.token_reduction import LAYER_REDUCERS, TEXT, Need, methods_without_cls
from llava.protocols import ImageProcessor

JointMap = Callable[[Tensor], Tensor]
"""Normed patches `float32[I, N, D]` to `float32[I, N, P]`, in float32."""


@dataclass(frozen=True)
class ImageFeatures:
    """What a tower gives for the crops of an image, or for a batch of images: a function of the pixels alone.

    Caches, runners and clients pass it on as it is; what is in it is between the tower and the token reduction.

    Attributes:
        patches: `[I, N, D]` features of the selected layer, raster order, in the tower's dtype.
        intermediates: what was asked for besides, `[I, ...]` by need; see `Need` for the shapes.
    """

    patches: Tensor
    intermediates: Mapping[Need, Tensor] = field(default_factory=dict)

    @property
    def num_crops(self) -> int:
        return self.patches.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> "ImageFeatures":
        """Change every tensor in the same way."""
        return ImageFeatures(change(self.patches), {need: change(each) for need, each in self.intermediates.items()})

    def pin_memory(self) -> "ImageFeatures":
        """A copy in pinned memory, as a data loader asks for it."""
        return self.map(Tensor.pin_memory)

    def split(self, sizes: Sequence[int]) -> list["ImageFeatures"]:
        """Cut a batch into images of these numbers of crops."""
        columns = {need: values.split(sizes) for need, values in self.intermediates.items()}
        return [
            ImageFeatures(patches, {need: parts[index] for need, parts in columns.items()})
            for index, patches in enumerate(self.patches.split(sizes))
        ]

    @staticmethod
    def concatenate(images: Sequence["ImageFeatures"]) -> "ImageFeatures":
        """Put images together as one batch, with the intermediates that all of them have."""
        shared = [need for need in images[0].intermediates if all(need in image.intermediates for image in images)]
        return ImageFeatures(
            torch.cat([image.patches for image in images]),
            {need: torch.cat([image.intermediates[need] for image in images]) for need in shared},
        )


class VisionTower(nn.Module, ABC):
    """Base of the towers: empty until `load_model`, which loads what `needs` asks for and no more.

    Attributes:
        name: folder, file or hub id, as resolved.
        select_layer: which hidden state is taken: 0 the embeddings, -1 the last layer, -2 (LLaVA-1.5) the one before.
        select_feature: "patch" (LLaVA-1.5), or "cls_patch" to pass the CLS row on as well.
        needs: what token reductions may ask for besides the patches: a text tower, deeper layers.
        is_loaded: whether the weights are there.
        image_processor: turns PIL images into pixel values; set by `load_model`.
        has_cls: whether row 0 of a hidden state is CLS, as in CLIP; a SigLIP has patches alone.
        pools_queries: whether queries are embedded turn by turn and pooled, as config.json may say; see
            `llava.model.multimodal_encoder.query_pooling`.
    """

    has_cls = True
    pools_queries = False

    def __init__(
        self,
        name: str,
        *,
        select_layer: int = -2,
        select_feature: str = "patch",
        needs: Collection[Need] = frozenset(),
    ):
        """Store the settings; nothing is read yet.

        Raises:
            InputError: for an unknown `select_feature`, or one or a need that asks for a CLS which is not there.
        """
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise InputError(f'mm_vision_select_feature "{select_feature}" is unknown: use patch or cls_patch')
        if select_feature == "cls_patch" and not self.has_cls:
            raise InputError(f"mm_vision_select_feature cls_patch: {name} is a SigLIP, which has no CLS; use patch")
        self.name = name
        self.check_needs(needs)
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.needs = frozenset(needs)
        self.is_loaded = False
        self.image_processor = None

    # What a library's tower provides.
    @abstractmethod
    def load_model(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Read weights, image processor and, where `needs` has text, the text tower; freeze everything.

        Layers that neither the selected hidden state nor a need reads are dropped.
        """

    @abstractmethod
    def load_text_tower(self) -> None:
        """Read the text side, if it is not there yet.

        Raises:
            InputError: when the checkpoint has none.
        """

    @abstractmethod
    def load_vision_tower(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Read the vision side, with the layers that are used."""

    @abstractmethod
    def read_image_processor(self) -> ImageProcessor:
        """Read what turns images into pixel values; the weights are not needed for it.

        Raises:
            InputError: there is none, or it does not fit the tower.
        """

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """L, the layers of the checkpoint; fewer may be loaded."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The loaded layers."""

    @abstractmethod
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Make the input of the first layer, hidden state 0: `[I, 3, S, S]` to `[I, R, D]`, CLS first."""

    @abstractmethod
    def run_layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run one layer: `[I, R, D]` to the same shape."""

    @abstractmethod
    def queries_and_keys(self, layer: nn.Module, hidden: Tensor, num_queries: int) -> tuple[Tensor, Tensor, int]:
        """Project a layer's input as its attention does: layer norm, then the query and key matrices.

        Args:
            layer: one of `layers`.
            hidden: `[I, R, D]` its input.
            num_queries: rows for which queries are made, from the first on.

        Returns:
            `[I, num_queries, D]`, `[I, R, D]` and the number of heads.
        """

    @abstractmethod
    def joint_head(self) -> tuple[nn.LayerNorm, JointMap]:
        """The tower's final layer norm, and the map of normed patches into the joint space."""

    @abstractmethod
    def text_features(self, texts: list[str | TextIds]) -> Tensor:
        """Embed texts in the joint space, cut at the tower's context length: `[S, P]`, not normalised."""

    @abstractmethod
    def read_text_reader(self) -> TextReader:
        """Read the text half's tokenizer; its weights are not needed for it.

        Raises:
            InputError: there is none.
        """

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the images that the tower reads, in pixels."""

    # What all towers share.
    def provide(self, needs: Collection[Need]) -> None:
        """Get ready for a token reduction: from now on `extract` can give it what it needs.

        Args:
            needs: of the reduction; they add to those of earlier ones.

        Raises:
            InputError: the checkpoint has no text tower, no such layer, or no CLS.
        """
        self.check_needs(needs)
        before, self.needs = self.needs, self.needs | frozenset(needs)
        if not self.is_loaded:
            return
        try:
            if TEXT in needs:
                self.load_text_tower()
            if self.num_layers_to_run(self.needs) > len(self.layers):
                self.load_vision_tower(self.device, self.dtype)
        except InputError:
            self.needs = before
            raise

    def check_needs(self, needs: Collection[Need]) -> None:
        """Refuse what a tower without CLS does not have.

        Raises:
            InputError: a need reads the CLS row.
        """
        asked = [need for need in needs if need.reads_cls]
        if asked and not self.has_cls:
            raise InputError(
                f"token reduction asks for {min(map(str, asked))}, and vision tower {self.name} is a SigLIP, which has "
                f"no CLS: use {', '.join(methods_without_cls())}, or a method inside the language model "
                f"({', '.join(LAYER_REDUCERS)})"
            )

    def number_of_layer(self, need: Need) -> int:
        """Return which layer a need looks at, counted from 1.

        Raises:
            InputError: when there is no such layer.
        """
        number = need.layer if need.layer > 0 else self.num_layers + 1 + need.layer
        if not 1 <= number <= self.num_layers:
            way_out = f"; give {need.option}= of the token reduction one of them" if need.option else ""
            raise InputError(f"{need} does not exist: {self.name} has {self.num_layers} layers{way_out}")
        return number

    def number_of_selected_layer(self) -> int:
        """Return which layer's output is the selected hidden state, counted from 1; 0 for the embeddings.

        Raises:
            InputError: when there is no such layer.
        """
        number = self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer
        if not 0 <= number <= self.num_layers:
            raise InputError(
                f"mm_vision_select_layer {self.select_layer} does not exist: {self.name} has {self.num_layers} layers"
            )
        return number

    def num_layers_to_run(self, needs: Collection[Need]) -> int:
        """Count the layers that lead to the selected hidden state and to all that is needed."""
        looked_at = [self.number_of_layer(need) for need in needs if need.layer is not None]
        return max([self.number_of_selected_layer(), *looked_at])

    @torch.no_grad()
    def extract(self, images: Tensor, needs: Collection[Need] = frozenset()) -> ImageFeatures:
        """Encode images.

        Args:
            images: `[I, 3, S, S]` pixel values from the image processor, any float dtype, any device.
            needs: what to give besides the patches; nothing else is computed.

        Returns:
            The patches of the selected layer, and the needs that a tower answers. With "cls_patch" the CLS row comes
            first among the patches, and N is one more.

        Raises:
            InputError: when the images have another size than the tower reads, or a layer is not loaded (`provide`).
        """
        if images.dim() != 4 or images.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(
                f"images of shape {tuple(images.shape)} do not fit the vision tower {self.name}: "
                f"it reads [images, 3, {self.image_size}, {self.image_size}]"
            )
        # 1. Which layers: up to the selected hidden state, further only for a need.
        selected, last = self.number_of_selected_layer(), self.num_layers_to_run(needs)
        if last > len(self.layers):
            raise InputError(f"layer {last} of {self.name} is not loaded: switch with set_token_reduction")
        with self.own_precision():
            # 2. Hidden state 0.
            hidden = self.embed_pixels(images.to(device=self.device, dtype=self.dtype))  # [I, R, D]
            features, intermediates = hidden, {}
            # 3. Layer by layer. A layer that is looked at computes its queries and keys once more, from its input; the
            #    layer itself stays on the library's fast attention, which never makes a map.
            for number in range(1, last + 1):
                layer = self.layers[number - 1]
                wanted = [need for need in needs if need.layer is not None and self.number_of_layer(need) == number]
                inside = [need for need in wanted if need.kind != "cls"]
                if inside:
                    intermediates |= self.look_at(layer, hidden, inside)
                hidden = self.run_layer(layer, hidden)
                intermediates |= {need: hidden[:, 0] for need in wanted if need.kind == "cls"}
                if number == selected:
                    features = hidden
        # 4. The CLS row leaves, where there is one.
        patches = features[:, 1:] if self.has_cls and self.select_feature == "patch" else features
        return ImageFeatures(patches, intermediates)

    def look_at(self, layer: nn.Module, hidden: Tensor, needs: Collection[Need]) -> dict[Need, Tensor]:
        """Compute what is needed of one layer's attention, from its input `[I, R, D]`."""
        num_queries = min(max(need.num_queries(self.num_patches) for need in needs), hidden.shape[1])
        queries, keys, num_heads = self.queries_and_keys(layer, hidden, num_queries)
        queries, keys = (rows.unflatten(-1, (num_heads, -1)).transpose(1, 2) for rows in (queries, keys))
        scale = keys.shape[-1] ** -0.5
        products = queries.float() @ keys.float().transpose(-1, -2) * scale  # [I, H, num_queries, R]
        attention = products.softmax(dim=-1)
        found = {
            "keys": keys,
            "cls_query": queries[:, :, 0],
            "attention": attention,
            "cls_attention": attention[:, :, 0, 1:],
            "received": attention.mean(dim=(1, 2))[:, int(self.has_cls) :],
        }
        return {need: found[need.kind] for need in needs}

    def encode(self, images: Tensor) -> Tensor:
        """Encode images and return the patches alone, `[I, N, D]`; see `extract`."""
        return self.extract(images).patches

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Encode a stack `[I, 3, S, S]`, or a list of images `[3, S, S]` (which returns a list of `[1, N, D]`)."""
        if isinstance(images, list):
            return [self.encode(image[None]) for image in images]
        return self.encode(images)

    @torch.no_grad()
    def project_to_joint(self, patches: Tensor) -> Tensor:
        """Project patch features into the joint text-image space, in which TRIM scores them.

        The tower's final layer norm belongs to the last layer's output (CLIP: to its CLS row); TRIM applies it to the
        patches of the selected layer.

        Args:
            patches: `[I, N, D]`.

        Returns:
            `float32[I, N, P]`, computed in float32 whatever the tower's dtype.
        """
        norm, into_joint = self.joint_head()
        bias = None if norm.bias is None else norm.bias.float()
        with self.own_precision():
            normed = F.layer_norm(patches.float(), norm.normalized_shape, norm.weight.float(), bias, norm.eps)
            return into_joint(normed)

    @torch.no_grad()
    def embed_text(self, texts: list[str | TextIds]) -> Tensor:
        """Embed queries in the joint space.

        Texts beyond the tower's context length (CLIP: 77 tokens, SigLIP: 64) are cut, unless it pools queries.

        Args:
            texts: S queries, as they are or (unless it pools queries) as `text_reader` made them; "" is allowed.

        Returns:
            `float32[S, P]`, not normalised.
        """
        self.load_text_tower()
        with self.own_precision():
            if not self.pools_queries:
                return self.text_features(texts).float()
            pieces = [split_query(text, self.text_reader) for text in texts]
            embedded = self.text_features([piece for own in pieces for piece in own]).float()
        return pool_embeddings(embedded, [len(own) for own in pieces])

    @property
    def text_reader(self) -> TextReader:
        """What makes texts into ids for `embed_text`: the text half's, or read from its files while that is not loaded.

        Raises:
            InputError: as `read_text_reader`.
        """
        text_tower = self._modules.get("text_tower")
        return self._stored_reader if text_tower is None else text_tower.reader

    @cached_property
    def _stored_reader(self) -> TextReader:
        return self.read_text_reader()

    def own_precision(self) -> torch.autocast:
        """Switch a training loop's autocast off: the towers run, and score, in their own dtype."""
        return torch.autocast(self.device.type, enabled=False)

    def freeze(self) -> None:
        """Take the tower out of training for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in evaluation mode: the tower is frozen, also inside a model that trains."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the tower runs in."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device the tower runs on."""
        return next(self.parameters()).device

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; of an image that they do not fill, the right and lower rest is not seen."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def covered(self) -> float:
        """Share of the image's side that the patches cover: 1, but 378 / 384 for SigLIP at 384 pixels."""
        return self.grid[0] * self.patch_size / self.image_size

    @property
    def squeezes(self) -> bool:
        """Whether an image that is not padded is squeezed to a square, as for SigLIP, not cropped as for CLIP."""
        return not getattr(self.image_processor, "do_center_crop", True)

    @property
    def num_patches(self) -> int:
        """N, without the CLS row."""
        return self.grid[0] * self.grid[1]

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the (square) image."""
        return self.grid[0]
