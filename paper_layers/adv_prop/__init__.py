"""AdvProp: adversarial examples improve image recognition (Xie, Tan, Gong, Wang, Yuille, Le, CVPR 2020)."""

from paper_layers.adv_prop.attack import pgd

__all__ = ["pgd"]
