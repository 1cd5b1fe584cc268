"""LayerNorm over the channels of [N, C, H, W]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W], free of copies for channels_last.

    The result is channels_last, whatever the format of the input. Parameters are those of
    nn.LayerNorm: `weight` and `bias`, both [C].
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
