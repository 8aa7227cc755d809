"""Points where logits are uncertain: the pixels of a map, and random points between them."""

from paper_layers.ops.uncertain_points.pixels import uncertain_points
from paper_layers.ops.uncertain_points.samples import sample_uncertain_points

__all__ = ["sample_uncertain_points", "uncertain_points"]
