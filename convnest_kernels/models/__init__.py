"""The ConvNeSt models: seven hierarchical and seven isotropic ones, from one table."""

from .convnest import ConvNeSt
from .features import FeatureInfo
from .parameter_groups import parameter_groups
from .variants import (
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
