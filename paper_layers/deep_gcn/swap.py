"""PyG's edge convolutions become ours."""

from __future__ import annotations

from torch import nn

from paper_layers._core.surgery import Filter, check_names, exactly, matching_modules


def graph_conv(model: nn.Module, *, filter_fn: Filter | None = None) -> nn.Module:
    """Turn every PyG `EdgeConv` and `DynamicEdgeConv` of a finished model into one that stores no edge.

    For the DGCNN of Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", 2019, and its kin; see
    `paper_layers.deep_gcn.EdgeConv` for the equation. The neighbours are exact and need neither pyg-lib nor
    torch-cluster. PyG builds its `DynamicEdgeConv` only where one of the two is installed: where neither is, build
    `paper_layers.deep_gcn.DynamicEdgeConv`, a subclass, in its place; models that were built elsewhere are swapped as
    they are. A network whose first layer is linear costs k times less there. With a maximum over a linear layer,
    at most one activation (ReLU, leaky or parametric) and at most one batch norm, no edge is stored; other layers run
    edge by edge, as in PyG. Of edges that are equal, the first takes the gradient, where PyG shares it out. Parameters,
    state-dict keys and hooks stay. Layers inside are called as before where they are more than plain layers (with
    hooks, subclasses, adapters, pruned, parametrised, quantised, sharded, off-loaded), and PyG's own path is taken
    where its hooks, an explainer, `decomposed_layers` or a method that is set on the convolution need it.

    Models that call PyG's `knn_graph` take `paper_layers.deep_gcn.knn_graph` in its place.

    Args:
        model: Any module; changed in place.
        filter_fn: ``filter_fn(module, name) -> bool``, which convolutions to swap; default all.

    Returns:
        `model`; unchanged if it already holds one of ours and `filter_fn` accepts no further convolution.

    Raises:
        ImportError: torch_geometric is not installed.
        TypeError: `model` is not a module.
        ValueError: Nothing to swap.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_geometric.nn import EdgeConv
        >>> from paper_layers import swap
        >>> from paper_layers.deep_gcn import knn_graph
        >>> model = swap.graph_conv(EdgeConv(nn.Sequential(nn.Linear(6, 64), nn.ReLU())))
        >>> x = torch.randn(100, 3)
        >>> model(x, knn_graph(x, k=8)).shape
        torch.Size([100, 64])
    """
    import torch_geometric.nn as host

    from paper_layers.deep_gcn import pyg

    ours = {host.EdgeConv: pyg.EdgeConv, host.DynamicEdgeConv: pyg.DynamicEdgeConv}
    wanted = "PyG EdgeConv or DynamicEdgeConv"
    convs = matching_modules(model, wanted, exactly(*ours), exactly(*ours.values()), filter_fn)
    for conv, name in convs.items():
        check_names(conv, name, ours[type(conv)])
    for conv in convs:
        conv.__class__ = ours[type(conv)]
    return model
