"""torch.jit.trace, the ONNX exporter built on it and the new one: the right model, or an error."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import paper_layers
from paper_layers import adv_prop, big_bigan, deep_gcn, lip, point_rend, soft_triple, swap

BOXES, LABELS = torch.tensor([[0.0, 4, 4, 40, 40], [0, 1, 2, 30, 50]]), torch.tensor([1, 2])
TABLE = torch.randint(20, (20, 4), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"hidden_features": 8, "subdivision_num_points": 20}
COARSE: dict[str, Any] = {"coarse_hidden_channels": 8, "coarse_hidden_features": 8, "init_resolution": 3}
Case = tuple[Callable[[], nn.Module], Callable[..., Any], tuple[tuple[int, ...] | Tensor, ...]]
CASES: dict[str, Case] = {
    "semantic": (lambda: point_rend.PointRendSemantic(8, 4, **SMALL), lambda m, c, f: m(f, c, size=(32, 32)),
                 ((2, 4, 8, 8), (2, 8, 16, 16))),
    "semantic, size of a map": (lambda: point_rend.PointRendSemantic(8, 4, **SMALL),
                                lambda m, c, f: m(f, c, size=f.shape[2:]), ((2, 4, 8, 8), (2, 8, 16, 16))),
    "semantic, nothing to refine": (lambda: point_rend.PointRendSemantic(8, 4, **SMALL),
                                    lambda m, c, f: m(f, c, size=(8, 8)) + f.mean(), ((2, 4, 8, 8), (2, 8, 16, 16))),
    "masks": (lambda: point_rend.PointRendMask(8, 3, **SMALL, **COARSE), lambda m, f: m(f, BOXES, LABELS, size=24),
              ((1, 8, 16, 16),)),
    "implicit masks": (lambda: point_rend.ImplicitPointRendMask(8, 3, **SMALL, parameter_hidden_channels=8,
                                                                parameter_hidden_features=8),
                       lambda m, f: m(f, BOXES, LABELS, size=24), ((1, 8, 16, 16),)),
    "point head": (lambda: point_rend.PointRendHead(8, 4, hidden_features=8), lambda m, *x: m(*x),
                   ((2, 8, 9), (2, 4, 9))),
    "coarse head": (lambda: point_rend.CoarseMaskHead(8, 4, hidden_channels=8, hidden_features=8), lambda m, x: m(x),
                    ((2, 8, 14, 14),)),
    "LIP": (lambda: paper_layers.LIPPool2d(4), lambda m, x: m(x), ((2, 4, 9, 9),)),
    "LIP of no logits": (lambda: paper_layers.LIPPool2d(4, logit="identity"), lambda m, x: m(x), ((2, 4, 9, 9),)),
    "LIP-ResNet": (lambda: lip.LIPResNet([1, 1, 1, 1]), lambda m, x: m(x), ((1, 3, 32, 32),)),
    "split norm": (lambda: paper_layers.SplitBatchNorm2d(4), lambda m, x: m(x), ((2, 4, 5, 5),)),
    "EdgeConv": (lambda: deep_gcn.EdgeConv(3, 8), lambda m, x: m(x, TABLE), ((20, 3),)),
    "MRConv": (lambda: deep_gcn.MRConv(3, 8), lambda m, x: m(x, TABLE), ((20, 3),)),
    "DeepGCN": (lambda: deep_gcn.DeepGCN(3, 4, channels=8, blocks=2, k=4), lambda m, x: m(x), ((20, 3),)),
    "SoftTriple": (lambda: soft_triple.SoftTripleLoss(5, 4, 2), lambda m, x: m.get_logits(x), ((3, 4),)),
    "SoftTriple's loss": (lambda: soft_triple.SoftTripleLoss(5, 4, 2), lambda m, x: m(x, torch.arange(3)), ((3, 4),)),
    "BigBiGAN's perceptron": (lambda: big_bigan.ResidualMLP(6, hidden_features=8), lambda m, x: m(x), ((3, 6),)),
    "BigBiGAN": (lambda: big_bigan.BigBiGANDiscriminator(nn.Conv2d(3, 6, 3), 6, 5, hidden_features=8, depth=2),
                 lambda m, x, z: m(x, z).xz, ((3, 3, 9, 9), (3, 5))),
    "latent head": (lambda: big_bigan.LatentHead(6, 5, hidden_features=8), lambda m, x: m(x).mean, ((3, 6),)),
    "GINConv": (lambda: deep_gcn.GINConv(3, 8), lambda m, x: m(x, TABLE), ((20, 3),)),
    "SAGEConv": (lambda: deep_gcn.SAGEConv(3, 8), lambda m, x: m(x, TABLE), ((20, 3),)),
    "LIP convolution": (lambda: swap.LIPConv2d(4, 6, 3, 2, 1), lambda m, x: m(x), ((2, 4, 9, 9),)),
    "synchronised norm": (lambda: adv_prop.SplitSyncBatchNorm(4), lambda m, x: m(x), ((2, 4, 5, 5),)),
    "swapped segmenter": (lambda: swap.point_rend(nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 5, 3, 2, 1),
                                                               nn.Upsample(scale_factor=8)), fine="0", coarse="1",
                                                 subdivision_num_points=20), lambda m, x: m(x), ((2, 3, 32, 32),)),
    "swapped critic": (lambda: swap.big_bigan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3)), 5,
                                                        hidden_features=8, depth=2), lambda m, x, z: m(x, z).xz,
                       ((2, 3, 8, 8), (2, 5))),
}  # fmt: skip

WRITTEN = ("semantic, nothing to refine", "coarse head", "split norm", "synchronised norm")
# Neighbours and classes' centers: the new exporter says that it doesn't know their ops.
UNKNOWN = ("EdgeConv", "MRConv", "GINConv", "SAGEConv", "DeepGCN", "SoftTriple", "SoftTriple's loss")


class Called(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.module, *inputs)


def prepared(case: str) -> tuple[Called, list[tuple[Tensor, ...]]]:
    """The module, and two inputs."""
    make, call, shapes = CASES[case]
    torch.manual_seed(0)
    module = Called(make(), call).eval().requires_grad_(False)
    return module, [tuple(torch.randn(shape) for shape in shapes) for _ in range(2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_onnx_is_right_or_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    module, (inputs, others) = prepared(case)
    names = [f"input{number}" for number in range(len(inputs))]
    file = io.BytesIO()
    try:
        torch.onnx.export(module, inputs, file, dynamo=False, input_names=names)
    except RuntimeError:  # So are all errors of the exporter.
        if case in WRITTEN:
            raise
        return
    finally:
        capfd.readouterr()
    check(onnx.load_from_string(file.getvalue()), module, names, others)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_new_exporter(case: str) -> None:
    module, (inputs, others) = prepared(case)
    names = [f"input{number}" for number in range(len(inputs))]
    if case in UNKNOWN:
        with pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function found for .*paper_layers"):
            torch.onnx.export(module, inputs, dynamo=True, verbose=False)
        return
    program = torch.onnx.export(module, inputs, dynamo=True, verbose=False, input_names=names)
    check(program.model_proto, module, names, others)


def check(model: onnx.ModelProto, module: nn.Module, names: list[str], inputs: tuple[Tensor, ...]) -> None:
    """The model computes what the module does."""
    assert [value.name for value in model.graph.input] == names
    (found,) = ReferenceEvaluator(model).run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), module(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_traces_are_right(case: str) -> None:
    module, (inputs, others) = prepared(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, inputs, check_trace=False)
    torch.testing.assert_close(traced(*others), module(*others))
