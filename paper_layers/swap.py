"""One-line surgery on finished models.

Every function here changes `model` in place and returns it. A chosen module becomes another one where it stands: the
same object with a new class, as in torch's lazy modules and parametrizations. So it stays wherever it is registered,
under one name or several or as the root, and keeps its training mode, its hooks and your attributes (and a convolution
its parameters). New parameters take device and dtype from the nearest ones of the model, and are trainable: give them
to the optimizer. A model that DDP or FSDP wraps, or that is scripted, is refused: swap first. A compiled model is
compiled again. When an error is raised, nothing has been changed.
"""

from paper_layers.adv_prop.swap import plain_batch_norm, split_batch_norm
from paper_layers.big_bigan.swap import big_bigan
from paper_layers.deep_gcn.swap import graph_conv
from paper_layers.lip import LIPConv2d
from paper_layers.lip.swap import pooling, strided_conv
from paper_layers.point_rend.swap import point_rend

__all__ = [
    "LIPConv2d",
    "big_bigan",
    "graph_conv",
    "plain_batch_norm",
    "point_rend",
    "pooling",
    "split_batch_norm",
    "strided_conv",
]
