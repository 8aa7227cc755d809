"""Ideas from papers as drop-in PyTorch modules with fused kernels."""

__version__ = "0.1.0"

from paper_layers.ops._library import show_config
from paper_layers.ops.lip_pool2d import lip_pool2d

__all__ = ["lip_pool2d", "show_config"]
