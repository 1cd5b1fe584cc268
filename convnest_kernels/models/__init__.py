"""The ConvNeSt models: seven hierarchical and seven isotropic ones, from one table."""

from convnest_kernels.models.convnest import ConvNeSt
from convnest_kernels.models.features import FeatureInfo
from convnest_kernels.models.parameter_groups import parameter_groups
from convnest_kernels.models.variants import (
    EXPANSION_ABLATION,
    VARIANTS,
    create_model,
    list_models,
)

__all__ = [
    "EXPANSION_ABLATION",
    "VARIANTS",
    "ConvNeSt",
    "FeatureInfo",
    "create_model",
    "list_models",
    "parameter_groups",
]
