"""One graph as a table, as edges with PyG on a CPU, and as edges with torch-scatter, PyG's choice on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paper_layers.deep_gcn import convs, to_edge_index
from tests.deep_gcn.test_convs import CONVS
from tests.ops.test_neighbor_reduce import features, table


@pytest.mark.parametrize("name", CONVS)
def test_all_three_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_scatter = pytest.importorskip("torch_scatter")
    conv = CONVS[name](6, 5).double()
    x, index = features(200, 6).double().requires_grad_(), table(200, 9, rows=200)
    index[:3] = -1

    def run(**graph: Tensor) -> list[Tensor]:
        output = conv(x, **graph)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *conv.parameters()])]

    results = [run(index=index), run(edge_index=to_edge_index(index))]
    monkeypatch.setattr(
        convs,
        "_scatter",
        lambda values, target, nodes, reduce: torch_scatter.scatter(values, target, 0, None, nodes, reduce),
    )
    results.append(run(edge_index=to_edge_index(index)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)
