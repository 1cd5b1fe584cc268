"""The normalized knowledge distillation loss.

Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023 (arXiv 2303.13005). With student and teacher
probabilities S and T, target class t, temperature λ, and S', T' the distributions over the other
classes alone (each normalized to 1, of logits divided by λ):

    NKD = - T_t log S_t - γ λ² Σ_{i≠t} T'_i log S'_i

It is added to the cross-entropy with the labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """The mean NKD loss of logits [N, K] of student and teacher, for target classes [N].

    The teacher gets no gradient. Computed in float32, or float64 for float64 logits. Defaults are
    the paper's for ImageNet.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"student and teacher must both be [N, K], got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels must be [{len(student)}], got {list(labels.shape)}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    target = labels[:, None]
    log_s = F.log_softmax(student, 1).gather(1, target)
    t = F.softmax(teacher, 1).gather(1, target)

    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, target, False)
    log_s_others = F.log_softmax(_keep(student, others) / temperature, 1)
    t_others = F.softmax(_keep(teacher, others) / temperature, 1)
    among_others = (t_others * log_s_others).sum(1).mean()
    return -(t * log_s).mean() - gamma * temperature**2 * among_others


def _keep(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask].view(len(logits), -1)
