"""Ideas from papers as drop-in PyTorch modules with fused kernels."""

__version__ = "0.1.0"

from paper_layers import lip, swap
from paper_layers.lip import LazyLIPPool2d, LIPPool2d
from paper_layers.ops._library import show_config
from paper_layers.ops.lip_pool2d import lip_pool2d

__all__ = ["LIPPool2d", "LazyLIPPool2d", "lip", "lip_pool2d", "show_config", "swap"]
