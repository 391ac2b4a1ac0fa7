"""Networks whose features the metrics compare: Inception, as the ADM evaluator computes its features, and DINOv2.

Inception is torch-fidelity's port of the 2015 network. DINOv2 is the space of FD-DINOv2 (Stein et al. 2023), computed
as EDM2's metrics do: ViT-L/14 without registers (Oquab et al. 2023) through timm, with the authors' weights. The
feature of an image is the normalised class token.
"""

import math
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.weights.tensors import describe, load_tensors, read_state_dict
from runtime.errors import InputError
from runtime.files import file_sha256
from runtime.processes import matmul_precision
from runtime.published import find_published

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # ends with the start of its SHA-256
SPATIAL_CHANNELS = 7

DINOV2_FILE = "dinov2_vitl14_pretrain.pth"
ARCHITECTURE = "vit_large_patch14_dinov2"  # timm's name
SIZE = 224  # pixels: 16x16 patches of 14
WIDTH = 1024
OFFSET = 0.1  # of DINOv2's position embedding, see `resample_positions`
PRETRAINED = 37  # patches per side, of 518 pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Inception:
    """uint8 images -> pool_3, spatial features and logits without bias, all float32.

    `weights` is the folder of the published file (`find_published`). Raises InputError if it is missing
    or holds another network.
    """

    # The feature space as --features has it, the file of the weights, the package that holds the network.
    name, file, package = "inception", INCEPTION_FILE, "torch-fidelity"
    resize = "TensorFlow's bilinear to 299x299, not antialiased, within the network"
    # Pooled features, spatial features and logits: names, and widths (0: none).
    features = "pool_3", "first 7 channels of mixed_6/conv", "logits without bias"
    widths = 2048, 17 * 17 * SPATIAL_CHANNELS, 1008

    def __init__(self, device: torch.device | str, weights: Path):
        path = find_published(INCEPTION_FILE, weights)
        state = read_state_dict(path)  # the package itself would load any pickle
        digest = file_sha256(path)
        # Of network and weights; and whether these are the published ones, None if that is unknown.
        self.identity = f"inception-v3-compat {digest[:16]}"
        self.published: Optional[bool] = digest.startswith("6726825d")
        self.device = torch.device(device)
        # Takes half a second, so imported on use.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(path)
            )
        except RuntimeError as e:  # names or shapes of tensors
            raise InputError(
                f"{path} is not the whole TF-2015 Inception of torch-fidelity but {describe(state)}: "
                f"fetch it again (weights/README.md)"
            ) from e
        self.network = network.to(self.device)
        # TensorFlow's mixed_6/conv is the first branch of the third block of four at 17x17.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), uint8 -> (B, 2048), (B, 2023) in TensorFlow's order, (B, 1008)."""
        # With TF32, features would have only three correct digits.
        with matmul_precision("fp32"), torch.autocast(self.device.type, enabled=False):
            pool, logits = self.network(images.to(self.device, non_blocking=True))
        return pool, self.spatial.permute(0, 2, 3, 1).flatten(1), logits


class DINOv2:
    """uint8 images -> normalised class tokens, float32; neither spatial features nor logits.

    `weights` is the folder of the authors' file (`find_published`). Raises InputError if it is
    missing or holds another network.
    """

    name, file, package = "dinov2", DINOV2_FILE, "timm"
    resize = "bicubic to 224x224 in float32, antialiased, not rounded"
    features = "normalised class token", "", ""
    widths = WIDTH, 0, 0
    published: Optional[bool] = None  # unknown: the authors publish no checksum

    def __init__(self, device: torch.device | str, weights: Path):
        path = find_published(DINOV2_FILE, weights)
        state = read_state_dict(path)
        # `load_tensors` compares all other names and shapes.
        wrong = state.get("pos_embed", torch.empty(0)).shape != (1, 1 + PRETRAINED**2, WIDTH)
        if wrong or "register_tokens" in state:
            raise InputError(
                f"{path} is not DINOv2's ViT-L/14 without registers but {describe(state)}: fetch "
                f"{DINOV2_FILE} (weights/README.md)"
            )
        self.device = torch.device(device)
        self.network = build_dinov2(state, path).to(self.device)
        # ImageNet's mean and standard deviation of each channel.
        self.colours = torch.tensor([MEAN, STD], device=self.device).view(2, 3, 1, 1)
        self.identity = f"dinov2-vitl14 {file_sha256(path)[:16]}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), uint8, of any size -> (B, 1024), (B, 0), (B, 0)."""
        with matmul_precision("fp32"), torch.autocast(self.device.type, enabled=False):
            tokens = self.network(prepare(images.to(self.device, non_blocking=True), self.colours))
        return tokens, tokens[:, :0], tokens[:, :0]


def prepare(images: Tensor, colours: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8, and mean and deviation of the colours (2, 3, 1, 1) -> the network's input
    (B, 3, 224, 224), float32.

    The resize is EDM2's: bicubic with antialiasing, in float32 without rounding, so slightly unlike
    Pillow's resize of uint8 pixels. It ignores the aspect ratio.
    """
    resized = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    mean, std = colours
    return (resized / 255 - mean) / std


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, 1 + n², D) of an n x n grid of patches -> (1, 1 + grid², D).

    As DINOv2's code does for inputs of another size than in pretraining: bicubic without antialiasing, by
    the scale (grid + 0.1) / n instead of grid / n. timm's resampling differs by more than a quarter of the
    embedding's norm. The class token keeps its entry.
    """
    side = math.isqrt(positions.shape[1] - 1)
    square = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + OFFSET) / side
    square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), square.flatten(2).transpose(1, 2)], 1)


def build_dinov2(state: dict[str, Tensor], path: Path) -> nn.Module:
    """The network with the weights `state`, for 224 pixels, in eval mode on the CPU."""
    import timm  # takes a second, so imported on use

    with torch.device("meta"):  # skips the random initialisation
        network = timm.create_model(ARCHITECTURE, pretrained=False, img_size=SIZE, num_classes=0)
    state = {**state, "pos_embed": resample_positions(state["pos_embed"], SIZE // 14)}
    network.to_empty(device="cpu")
    load_tensors(network, state, str(path), ignore=("mask_token",))
    return network.eval().requires_grad_(False)


FeatureNetwork = Inception | DINOv2
