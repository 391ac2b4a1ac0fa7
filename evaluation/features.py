"""Inception features as the ADM evaluator computes them: torch-fidelity's port of the 2015 network."""

from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from evaluation.dinov2 import DINOv2
from modeling.weights.tensors import describe, read_state_dict
from runtime.errors import InputError
from runtime.files import file_sha256
from runtime.processes import matmul_precision
from runtime.published import find_published

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # ends with the start of its SHA-256
SPATIAL_CHANNELS = 7


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
        # Checked here first, because the package itself would load any pickle.
        state = read_state_dict(path)
        if state.get("fc.weight", torch.empty(0)).shape != (1008, 2048):
            raise InputError(
                f"{path} is not the TF-2015 Inception of torch-fidelity but {describe(state)}; see "
                f"weights/README.md"
            )
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
                f"{path} is an incomplete or damaged TF-2015 Inception: fetch it again "
                f"(weights/README.md)"
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


FeatureNetwork = Inception | DINOv2
