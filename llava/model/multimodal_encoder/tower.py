"""What every vision tower offers, whatever library its weights come from.

`encode` depends on the picture alone; `project_to_joint` and `embed_text` give what text-guided reducers score with.
Apart, so that a picture met again under another question pays only for the second. Towers run in their own dtype
(float32 unless asked otherwise, as the published evaluation does); joint-space outputs are always float32.

Shape letters: `I` images (or crops), `N` patches, `D` vision width, `P` joint width, `S` texts, `L` layers.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import InputError


class VisionTower(nn.Module, ABC):
    """Base of the towers: empty until `load_model`, which loads a text tower too where `needs_text` says so.

    Attributes:
        name: folder, file or hub id, as resolved.
        select_layer: which hidden state is taken: 0 the embeddings, -1 the last layer, -2 (published) the one before.
        select_feature: "patch" (published), or "cls_patch" to pass the CLS row on as well.
        is_loaded: whether the weights are there.
        image_processor: turns PIL images into pixel values; set by `load_model`.
    """

    def __init__(self, name: str, *, select_layer: int = -2, select_feature: str = "patch", needs_text: bool = False):
        """Note the settings; nothing is read yet.

        Raises:
            InputError: for an unknown `select_feature`, or one that does not go with a text-guided reducer.
        """
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise InputError(f'mm_vision_select_feature "{select_feature}" is unknown: use patch or cls_patch')
        self.name = name
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.needs_text = needs_text
        self.is_loaded = False
        self.image_processor = None

    def num_layers_to_run(self, num_layers: int) -> int:
        """How many of a tower's L layers lead to the selected hidden state.

        Raises:
            InputError: when there is no such hidden state.
        """
        used = self.select_layer if self.select_layer >= 0 else num_layers + 1 + self.select_layer
        if not 0 <= used <= num_layers:
            raise InputError(
                f"mm_vision_select_layer {self.select_layer} does not exist: {self.name} has {num_layers} layers"
            )
        return used

    @abstractmethod
    def load_model(self, device: object = None, dtype: torch.dtype = torch.float32) -> None:
        """Read weights, image processor and, where `needs_text`, the text tower; freeze everything."""

    @abstractmethod
    def load_text_tower(self) -> None:
        """Read the text side, if it is not there yet.

        Raises:
            InputError: when the checkpoint has none.
        """

    @abstractmethod
    def hidden_state(self, pixels: Tensor) -> Tensor:
        """Run the tower up to the selected layer: `[I, 3, S, S]` to `[I, 1 + N, D]`, CLS first."""

    @abstractmethod
    def joint_head(self) -> tuple[nn.LayerNorm, Tensor]:
        """The tower's final layer norm and its projection `[P, D]` into the joint space."""

    @abstractmethod
    def text_features(self, texts: list[str]) -> Tensor:
        """Embed texts in the joint space, cut at the tower's context length: `[S, P]`, not normalised."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the pictures that the tower reads, in pixels."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            images: `[I, 3, S, S]` pixel values from the image processor, any float dtype, any device.

        Returns:
            `[I, N, D]` features of the selected layer, raster order, in the tower's dtype; with "cls_patch" the CLS
            row comes first and N is one more.

        Raises:
            InputError: when the pictures have another size than the tower reads.
        """
        if images.dim() != 4 or images.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(
                f"images of shape {tuple(images.shape)} do not fit the vision tower {self.name}: "
                f"it reads [images, 3, {self.image_size}, {self.image_size}]"
            )
        with self.own_precision():
            hidden = self.hidden_state(images.to(device=self.device, dtype=self.dtype))
        return hidden if self.select_feature == "cls_patch" else hidden[:, 1:]

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Encode a stack `[I, 3, S, S]`, or a list of pictures `[3, S, S]` (then a list of `[1, N, D]` comes back)."""
        if isinstance(images, list):
            return [self.encode(image[None]) for image in images]
        return self.encode(images)

    @torch.no_grad()
    def project_to_joint(self, patches: Tensor) -> Tensor:
        """Carry patch features into the joint text-image space, as the published code does for scoring.

        The tower's final layer norm belongs to the last layer's CLS output; TRIM applies it to the patches of the
        selected layer.

        Args:
            patches: `[I, N, D]`.

        Returns:
            `float32[I, N, P]`, computed in float32 whatever the tower's dtype.
        """
        norm, projection = self.joint_head()
        bias = None if norm.bias is None else norm.bias.float()
        with self.own_precision():
            normed = F.layer_norm(patches.float(), norm.normalized_shape, norm.weight.float(), bias, norm.eps)
            return normed @ projection.float().T

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """Embed queries in the joint space; texts beyond the tower's context length (77 tokens) are cut.

        Args:
            texts: S queries; "" is allowed.

        Returns:
            `float32[S, P]`, not normalised.
        """
        self.load_text_tower()
        with self.own_precision():
            return self.text_features(texts).float()

    def own_precision(self) -> torch.autocast:
        """Keep a training loop's autocast out: the towers run, and score, in their own dtype."""
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
    def num_patches(self) -> int:
        """N, without the CLS row."""
        return self.grid[0] * self.grid[1]

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the (square) picture."""
        return self.grid[0]
