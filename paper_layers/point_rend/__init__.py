"""PointRend: segmentation as rendering (Kirillov, Wu, He, Girshick, CVPR 2020)."""

from paper_layers.point_rend._subdivision import RefinementStep
from paper_layers.point_rend.checkpoints import load_official
from paper_layers.point_rend.coarse import BoxHead, CoarseMaskHead
from paper_layers.point_rend.head import PointRendHead
from paper_layers.point_rend.implicit import ImplicitPointHead, ImplicitPointRendMask
from paper_layers.point_rend.mask import PointRendMask
from paper_layers.point_rend.pictures import draw_steps
from paper_layers.point_rend.semantic import PointRendSemantic

__all__ = [
    "BoxHead",
    "CoarseMaskHead",
    "ImplicitPointHead",
    "ImplicitPointRendMask",
    "PointRendHead",
    "PointRendMask",
    "PointRendSemantic",
    "RefinementStep",
    "draw_steps",
    "load_official",
]
