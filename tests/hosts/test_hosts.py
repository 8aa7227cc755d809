"""Every swap on every host: it trains, evaluates, copies, saves, loads and is traced as before the swap."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from paper_layers import swap
from paper_layers.soft_triple import SoftTripleLoss
from tests.hosts.models import HOSTS, QUICK, Host

# isort: off
import timm
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
# isort: on

LATENT = 3


@dataclass(frozen=True)
class Swap:
    """A swap in small, and what it says of a model that holds nothing for it.

    Attributes:
        call: Swaps a host's model.
        nothing: The error's text.
        same: Whether the model computes in evaluation what it did before.
        pickled: Whether the swapped model can be pickled.
        arguments: Makes what the swapped model takes beside the host's arguments.
        replaced: How names of parameters begin that the swap takes away, or whose outputs it does.
    """

    call: Callable[[Host, nn.Module], nn.Module]
    nothing: str
    same: bool = False
    pickled: bool = True
    arguments: Callable[[], tuple[Tensor, ...]] = tuple
    replaced: tuple[str, ...] = ()


def _point_rend(host: Host, model: nn.Module) -> nn.Module:
    return swap.point_rend(model, num_points=40, subdivision_num_points=40, **dict(host.point_rend))


SWAPS: dict[str, Swap] = {
    "pooling": Swap(
        lambda _, model: swap.pooling(model, hidden_channels=8), "at least one nn.MaxPool2d or nn.AvgPool2d to swap"
    ),
    "strided_conv": Swap(
        lambda _, model: swap.strided_conv(model, hidden_channels=8), "at least one strided nn.Conv2d to swap"
    ),
    "split_batch_norm": Swap(
        lambda _, model: swap.split_batch_norm(model), "at least one batch norm to swap", same=True
    ),
    "point_rend": Swap(_point_rend, "torchvision FCN", replaced=("roi_heads.mask_",)),
    "graph_conv": Swap(
        lambda _, model: swap.graph_conv(model), "at least one PyG EdgeConv or DynamicEdgeConv", same=True
    ),
    "big_bigan": Swap(
        lambda _, model: swap.big_bigan(model, LATENT, hidden_features=8, depth=2),
        "at least one nn.Linear or nn.Conv2d with one output",
        pickled=False,  # Torch refuses to pickle layers with a spectral norm.
        arguments=lambda: (torch.randn(4, LATENT),),
        replaced=("aux1.", "aux2.", "AuxLogits."),
    ),
}


def cases() -> list[Any]:
    return [
        pytest.param(name, kind, marks=() if name in QUICK else pytest.mark.hosts, id=f"{name}-{kind}")
        for name, host in HOSTS.items()
        for kind in host.swaps.split()
    ]


def write_in_place(model: nn.Module) -> nn.Module:
    """The model with every activation and dropout in place."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = True
    return model


def floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def learn(model: nn.Module, arguments: tuple[Any, ...]) -> set[str]:
    """Take one step of training; the names of the parameters that have got a gradient."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss = torch.stack([part.square().mean() for part in floats(model(*arguments)) if part.requires_grad]).sum()
    loss.backward()
    assert loss.isfinite()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    optimizer.step()
    return set(gradients)


@torch.no_grad()
def evaluate(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    return [part.clone() for part in floats(model.eval()(*arguments))]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to rounding, as a share of the largest number of each tensor."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()) if b.numel() else 0)


def works(call: Callable[..., Any], *arguments: Any) -> bool:
    try:
        call(*arguments)
    except Exception:
        return False
    return True


def extract(model: nn.Module) -> nn.Module:
    """Trace the model with torch.fx, from its input to its last node."""
    train, evaluation = get_graph_node_names(model)
    return create_feature_extractor(model, train_return_nodes=train[-1:], eval_return_nodes=evaluation[-1:])


@pytest.mark.parametrize(("name", "kind"), cases())
def test_swap(name: str, kind: str) -> None:
    host, surgery = HOSTS[name], SWAPS[kind]
    torch.manual_seed(0)
    training, images = host.inputs(True), host.inputs(False)
    model = host.build()
    in_place = works(learn, write_in_place(copy.deepcopy(model)), training)
    if in_place:
        write_in_place(model)
    plain = copy.deepcopy(model)
    trained = copy.deepcopy(model)
    learnt = learn(trained, training)
    before = dict(model.named_parameters())

    assert surgery.call(host, model) is model
    after = dict(model.named_parameters())
    assert all(after[key] is before[key] for key in before if not key.startswith(surgery.replaced))
    parameters = [list(inspect.signature(m.forward).parameters) for m in (plain, model)]
    assert [parameter for parameter in parameters[1] if parameter not in ("target", "latents")] == parameters[0]
    if surgery.same:
        agree(evaluate(model, images), evaluate(plain, images))

    more = surgery.arguments()
    # Layers that the host leaves idle leave what is added to them idle.
    owners = [{f"{key.rpartition('.')[0]}." for key in keys} for keys in (before.keys() - learnt, learnt)]
    idle = tuple(owners[0] - owners[1] - {"."})
    expected = {key for key in after if key not in before and not key.startswith(idle)}
    expected |= {key for key in learnt if not key.startswith(surgery.replaced)}
    assert expected <= learn(model, (*training, *more))
    arguments = (*images, *more)
    output = evaluate(model, arguments)
    agree(evaluate(model, arguments), output, tolerance=0)
    agree(evaluate(copy.deepcopy(model), arguments), output)
    loaded = surgery.call(host, write_in_place(host.build()) if in_place else host.build())
    loaded.load_state_dict(model.state_dict())
    agree(evaluate(loaded, arguments), output)
    if surgery.pickled and works(pickle.dumps, trained):
        agree(evaluate(pickle.loads(pickle.dumps(model)), arguments), output)
    if works(extract, plain):
        agree(evaluate(extract(model), arguments), output)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.hosts) for n in HOSTS])
def test_nothing_to_swap(name: str) -> None:
    host = HOSTS[name]
    model = host.build()
    kinds = [type(module) for module in model.modules()]
    for kind, surgery in SWAPS.items():
        # FCOS has a convolution with one output, which will do.
        if kind not in host.swaps.split() and (name, kind) != ("torchvision fcos_resnet50_fpn", "big_bigan"):
            with pytest.raises(ValueError, match=surgery.nothing):
                surgery.call(host, model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("kind", ["pooling", "strided_conv", "split_batch_norm"])
def test_metric_learning(kind: str) -> None:
    """pytorch-metric-learning's trainer on a swapped trunk; its last batch has an even number of images."""
    torch.manual_seed(0)
    host = HOSTS["timm test_resnet"]
    trunk = SWAPS[kind].call(host, timm.create_model("test_resnet", num_classes=8))
    loss = SoftTripleLoss(4, 8, 2)
    before = copy.deepcopy((trunk.state_dict(), loss.state_dict()))
    trainer = MetricLossOnly(
        {"trunk": trunk},
        {
            "trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=1e-3),
            "metric_loss_optimizer": torch.optim.SGD(loss.parameters(), lr=1e-3),
        },
        batch_size=4,
        loss_funcs={"metric_loss": loss},
        dataset=TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 4),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    trainer.train(num_epochs=1)
    for old, new in zip(before, (trunk.state_dict(), loss.state_dict()), strict=True):
        assert any(not torch.equal(old[key], new[key]) for key in old)
        assert all(value.isfinite().all() for value in new.values())
