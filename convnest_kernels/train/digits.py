"""scikit-learn's handwritten digits: 1797 real scans of 8×8 pixels, which come with the package."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from convnest_kernels.train.config import DIGITS
from convnest_kernels.train.errors import need
from convnest_kernels.train.image_set import Batch, Data

VAL_FRACTION = 0.2


class TensorImages:
    """Images held in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> Batch:
        return self.images[indices], self.labels[indices]


def load(image_size: int) -> Data:
    """The digits, scaled up bilinearly; the same stratified fifth is held out for every seed."""
    datasets = need("sklearn.datasets", "scikit-learn", "the handwritten digits data set")
    selection = need("sklearn.model_selection", "scikit-learn", "the handwritten digits data set")
    digits = datasets.load_digits()
    scans = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(scans, size=image_size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target)
    held_in, held_out = selection.train_test_split(
        range(len(labels)), test_size=VAL_FRACTION, stratify=digits.target, random_state=0
    )
    return Data(
        name=DIGITS,
        classes=[str(name) for name in digits.target_names],
        channels=1,
        train=TensorImages(images[held_in], labels[held_in]),
        val=TensorImages(images[held_out], labels[held_out]),
        digest=hashlib.sha256(digits.images.tobytes()).hexdigest()[:16],
    )
