"""LIP: Local Importance-based Pooling (Gao, Wang, Wu, ICCV 2019)."""

from paper_layers.lip.checkpoints import load_official
from paper_layers.lip.conv import LIPConv2d
from paper_layers.lip.densenet import LIPDenseNet, LIPTransition, lip_densenet121
from paper_layers.lip.lazy import LazyLIPPool2d
from paper_layers.lip.logit import BottleneckLogit, BottleneckStem, LogitHead
from paper_layers.lip.pool import LIPPool2d
from paper_layers.lip.resnet import Bottleneck, LIPBottleneck, LIPResNet, lip_resnet50, lip_resnet101

__all__ = [
    "Bottleneck",
    "BottleneckLogit",
    "BottleneckStem",
    "LIPBottleneck",
    "LIPConv2d",
    "LIPDenseNet",
    "LIPPool2d",
    "LIPResNet",
    "LIPTransition",
    "LazyLIPPool2d",
    "LogitHead",
    "lip_densenet121",
    "lip_resnet50",
    "lip_resnet101",
    "load_official",
]
