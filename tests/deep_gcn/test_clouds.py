"""Every layer accepts clouds as `batch` or as `ptr`, and refuses values that are neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper_layers import deep_gcn
from tests.ops.test_neighbor_reduce import features, table

NET: dict[str, Any] = {"channels": 4, "blocks": 2, "k": 3, "norm": "instance", "dropout": 0.0, "stochastic": False}
X, TABLE = features(12, 3), torch.cat([table(5, 3, rows=5), table(7, 3, rows=7) + 5])
EDGES = torch.stack([(TABLE.clamp(min=0)).flatten(), torch.arange(12).repeat_interleave(3)])
PTR, BATCH = torch.tensor([0, 5, 5, 12]), torch.tensor([0] * 5 + [2] * 7)
Call = Callable[..., Tensor]
LAYERS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    **{
        f"{kind.__name__} of {norm}": (lambda k=kind, n=norm: k(3, 4, norm=n), lambda m, **c: m(X, TABLE, **c))
        for kind in (deep_gcn.EdgeConv, deep_gcn.MRConv, deep_gcn.GINConv, deep_gcn.SAGEConv)
        for norm in ("batch", "instance")
    },
    "edges": (lambda: deep_gcn.EdgeConv(3, 4, norm="instance"), lambda m, **c: m(X, edge_index=EDGES, **c)),
    "dropout": (lambda: deep_gcn.Perceptron(3, 4, dropout=0.5), lambda m, **c: m(X, **c)),
    "neighbors": (lambda: deep_gcn.DilatedKNN(3), lambda m, **c: m(X, **c)),
    "block": (lambda: deep_gcn.ResGCNBlock(3, k=3, norm="instance"), lambda m, **c: m(X, **c)),
    "static block": (lambda: deep_gcn.ResGCNBlock(3, norm="instance"), lambda m, **c: m(X, TABLE, **c)),
    "net": (lambda: deep_gcn.DeepGCN(3, 4, **NET), lambda m, **c: m(X, **c)),
    "classifier": (lambda: deep_gcn.DeepGCNClassifier(3, 4, embedding_dim=4, **NET), lambda m, **c: m(X, **c)),
    "segmenter": (lambda: deep_gcn.DeepGCNPartSegmenter(3, 4, embedding_dim=4, **NET), lambda m, **c: m(X, **c)),
}
INTEGERS = "expected an int64 Tensor of one dimension, got"
WRONG_PTR: dict[str, tuple[Any, str]] = {
    "not from 0": (torch.tensor([1, 5, 12]), "expected numbers from 0 to 12, got 1 to 12"),
    "short": (torch.tensor([0, 5, 11]), "expected numbers from 0 to 12, got 0 to 11"),
    "long": (torch.tensor([0, 13]), "expected numbers from 0 to 12, got 0 to 13"),
    "descending": (torch.tensor([0, 7, 5, 12]), "expected numbers that never descend, got 5 at position 2"),
    "empty": (torch.tensor([], dtype=torch.int64), r"expected shape \(B \+ 1,\), got \(0,\)"),
    "floating": (PTR.float(), f"{INTEGERS} torch.float32"),
    "of two dimensions": (PTR[None], rf"{INTEGERS} torch.int64 of shape \(1, 4\)"),
    "elsewhere": (PTR.to("meta"), "expected the device of .*, cpu, got meta"),
    "a list": ([0, 5, 12], f"{INTEGERS} list"),
}
WRONG_BATCH: dict[str, tuple[Any, str]] = {
    "unsorted": (BATCH.flip(0), "expected numbers from 0 in ascending order, got 0 at position 7"),
    "negative": (BATCH - 1, "expected numbers from 0 in ascending order, got -1 at position 0"),
    "short": (BATCH[1:], r"expected shape \(12,\), got \(11,\)"),
    "floating": (BATCH.float(), f"{INTEGERS} torch.float32"),
    "of two dimensions": (BATCH[:, None], rf"{INTEGERS} torch.int64 of shape \(12, 1\)"),
    "elsewhere": (BATCH.to("meta"), "expected the device of .*, cpu, got meta"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_clouds_are_refused(name: str, subtests: Any) -> None:
    build, call = LAYERS[name]
    layer = build()
    for form, wrong in (("ptr", WRONG_PTR), ("batch", WRONG_BATCH)):
        for what, (value, message) in wrong.items():
            errors = (TypeError, ValueError, RuntimeError)
            with subtests.test(f"{form} {what}"), pytest.raises(errors, match=f"{form}: {message}"):
                call(layer, **{form: value})


@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_are_the_same_clouds(name: str) -> None:
    build, call = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    torch.manual_seed(0)  # For dropout.
    expected = call(layer, ptr=PTR)
    for same in ({"ptr": PTR.int()}, {"batch": BATCH}, {"batch": BATCH.int()}):
        torch.manual_seed(0)
        torch.testing.assert_close(call(layer, **same), expected)
    with pytest.raises(ValueError, match="ptr: expected either batch or ptr, got both"):
        call(layer, ptr=PTR, batch=BATCH)


def test_clouds_of_one_size_take_neither() -> None:
    x, index = X.view(2, 6, 3), TABLE.view(2, 6, 3) % 6
    for call in (
        lambda: deep_gcn.EdgeConv(3, 4)(x, index, ptr=PTR),
        lambda: deep_gcn.ResGCNBlock(3)(x, index, ptr=PTR),
        lambda: deep_gcn.Perceptron(3, 4)(x, ptr=PTR),
    ):
        with pytest.raises(ValueError, match=r"ptr: expected None for x of shape \(B, N, C\), got a Tensor"):
            call()
