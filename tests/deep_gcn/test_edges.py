from __future__ import annotations

import pytest
import torch

from paper_layers import knn
from paper_layers.deep_gcn import from_edge_index, to_edge_index

FLOWS = ("source_to_target", "target_to_source")


@pytest.mark.parametrize("flow", FLOWS)
def test_there_and_back(flow: str) -> None:
    ptr = torch.tensor([0, 20, 24, 50])
    index, _ = knn(torch.randn(50, 3), k=6, ptr=ptr)
    edges = to_edge_index(index, flow)
    assert torch.equal(from_edge_index(edges, 50, 6, flow), index)
    # The order of the edges of different centres does not matter.
    shuffled = edges[:, edges[int(flow == FLOWS[0])].argsort(descending=True, stable=True)]
    assert torch.equal(from_edge_index(shuffled, 50, flow=flow), index)


def test_rows_are_neighbors_and_centers() -> None:
    edges = to_edge_index(torch.tensor([[2], [2], [-1]]))
    assert edges.tolist() == [[2, 2], [0, 1]]
    assert to_edge_index(torch.tensor([[2], [2], [-1]]), FLOWS[1]).tolist() == [[0, 1], [2, 2]]


def test_clouds_of_a_batch_count_on() -> None:
    x = torch.randn(3, 10, 4)
    edges = to_edge_index(knn(x, k=4)[0])
    flat = to_edge_index(knn(x.flatten(0, 1), k=4, ptr=torch.tensor([0, 10, 20, 30]))[0])
    assert torch.equal(edges, flat)


def test_no_edges() -> None:
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert from_edge_index(empty, 3).shape == (3, 0)
    assert from_edge_index(empty, 3, 2).tolist() == [[-1, -1]] * 3
    assert to_edge_index(torch.full((3, 2), -1)).shape == (2, 0)


def test_int32() -> None:
    edges, table = torch.tensor([[1, 2, 0], [0, 0, 1]]), torch.tensor([[1, 2], [0, -1], [-1, -1]])
    for ours, expected in ((from_edge_index(edges.int(), 3), table), (to_edge_index(table.int()), edges)):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected)


def test_bad_input() -> None:
    edges = torch.tensor([[0, 1, 2], [3, 3, 3]])
    with pytest.raises(ValueError, match="k: expected at least 3, the most neighbours of a node, got 2"):
        from_edge_index(edges, 4, 2)
    with pytest.raises(ValueError, match="edge_index: expected nodes from 0 to 2, got 0 to 3"):
        from_edge_index(edges, 3)
    with pytest.raises(ValueError, match=r"edge_index: expected shape \(2, E\), got \(3, 2\)"):
        from_edge_index(edges.mT, 4)
    with pytest.raises(TypeError, match=r"index: expected an int64 Tensor, got torch.float32"):
        to_edge_index(edges.float())
    with pytest.raises(ValueError, match="flow: expected one of source_to_target, target_to_source, got 'up'"):
        to_edge_index(edges, "up")
    with pytest.raises(ValueError, match=r"index: expected shape \(N, k\) or \(B, N, k\), got \(2,\)"):
        to_edge_index(torch.tensor([1, 2]))


def test_negative_numbers_but_minus_one_are_refused() -> None:
    with pytest.raises(ValueError, match="index: expected nodes from 0, got -2 to 1"):
        to_edge_index(torch.tensor([[1, -1], [-2, 0]]))
