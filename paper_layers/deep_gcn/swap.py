"""Replace PyG's edge convolutions by ours."""

from __future__ import annotations

from paper_layers._core.surgery import Filter, M, check_names, exactly, matching_modules


def graph_conv(model: M, *, filter_fn: Filter | None = None) -> M:
    """Turn every PyG `EdgeConv` and `DynamicEdgeConv` of a finished model into one that stores no edge.

    For DGCNN (Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", 2019) and similar models; see
    `paper_layers.deep_gcn.EdgeConv` for the equation. The search for neighbours is exact and needs neither pyg-lib nor
    torch-cluster. PyG can't build its `DynamicEdgeConv` without one of the two: there, build the subclass
    `paper_layers.deep_gcn.DynamicEdgeConv`, and in place of PyG's `knn_graph` call `paper_layers.deep_gcn.knn_graph`.

    If the network's first layer is linear, this layer costs k times less. For the maximum over a linear layer, at most
    one activation (ReLU, leaky or parametric) and at most one batch norm, no edge is stored; other layers run on each
    edge, as in PyG. The first of several equal edges takes the gradient; PyG divides it among them. Parameters,
    state-dict keys and hooks stay. A layer with hooks, a subclass, or a layer that is adapted, pruned, parametrised,
    quantised, sharded or off-loaded is called as before. PyG's own path is taken where its hooks, an explainer,
    `decomposed_layers` or a method that is set on the convolution need it.

    Args:
        model: Any module; changed in place.
        filter_fn: ``filter_fn(module, name) -> bool`` selects the convolutions; default all.

    Returns:
        `model`; unchanged if it already holds one of ours and `filter_fn` accepts no further convolution.

    Raises:
        ImportError: torch_geometric is not installed.
        TypeError: `model` is not a module.
        ValueError: No convolution to swap.

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
