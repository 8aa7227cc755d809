"""Turn segmentation models into PointRend models."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from paper_layers._core.graft import OutputTap, graft
from paper_layers._core.surgery import Filter, M, check_names, device_and_dtype, matching_modules
from paper_layers._core.trial import dry_run
from paper_layers.point_rend._hosts import MaskHost, SemanticHost, SequentialHost, logits_of
from paper_layers.point_rend.mask import PointRendMask
from paper_layers.point_rend.semantic import PointRendSemantic

_WANTED = "torchvision FCN, DeepLabV3, LRASPP or Mask R-CNN (fine and coarse name the modules of another model)"
_STRIDE = 4  # The stride of the paper's fine features.


def point_rend(
    model: M,
    *,
    fine: str | Sequence[str] | None = None,
    coarse: str | None = None,
    example_input: Any = None,
    filter_fn: Filter | None = None,
    **options: Any,
) -> M:
    """Turn a finished segmentation model into its PointRend version, which renders object borders sharply.

    For Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020; see `PointRendSemantic` and
    `PointRendMask`. The host keeps its parameters and its output's format, and gets a child `point_rend`.

    A semantic model (torchvision's FCN, DeepLabV3 or LRASPP; any other model with `fine` and `coarse`) must return a
    map of logits larger than the coarse logits, or a dict with the map as "out"; other entries stay as they are.

    - In evaluation the map is refined at its uncertain points, at its own size.
    - In training P points are drawn, most of them where the coarse logits are uncertain, and moved to the centres of
      the map's pixels. The map has the point head's logits at these pixels and the host's logits elsewhere. The
      gradient of the point head's logits is multiplied by H * W / P, once for each point on the pixel. So a loss that
      is a mean over all pixels trains the point head and its inputs with the paper's mean over points, and the host's
      training loop need not change. The host's logits at these pixels do not get a loss. Where labels are ignored,
      the points' loss is divided by the share of counted pixels, not of counted points.
    - With ``model(images, target=labels)`` the output is a dict with the map as "out" and the paper's loss at the
      points as "loss_point". In training "out" is the host's own map; add "loss_point" to its loss.

    A torchvision Mask R-CNN loses its mask branch; PointRend reads the first feature map of that branch. In training
    "loss_mask" is the loss of the coarse masks, and "loss_mask_point" is added. In inference masks of 224 x 224 of each
    box's own class are pasted into the images as before.

    Args:
        model: Any module, changed in place. Without `coarse`, all torchvision models in it are swapped.
        fine: Name or names of the modules whose outputs are the fine features. Default for torchvision: the last part
            of the backbone with stride 4.
        coarse: Name of the module whose output is the coarse logits; then `model` itself is the host. Default for
            torchvision: "classifier".
        example_input: A tensor, or a tuple of the host's arguments (its backbone's for Mask R-CNN) for a trial run
            that finds the channels, as in `pooling`. Default: two images of 224 x 224 with the channels of the first
            `nn.Conv2d`.
        filter_fn: ``filter_fn(module, name) -> bool`` chooses torchvision's models to swap; default all.
        **options: Keyword arguments of `PointRendSemantic` or `PointRendMask`.

    Returns:
        `model`; unchanged if all hosts that `filter_fn` accepts are PointRend versions already.

    Raises:
        TypeError: `model` is not a module, names are not strings, or an option is unknown.
        ValueError: Nothing to swap; a name without a module; an output that is not a map or has a wrong size; a failed
            trial run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> encoder, head = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 5, 3, stride=4, padding=1)
        >>> model = nn.Sequential(encoder, head, nn.Upsample(scale_factor=8, mode="bilinear"))
        >>> model = swap.point_rend(model, fine="0", coarse="1", num_points=100)
        >>> images, labels = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
        >>> nn.functional.cross_entropy(model(images), labels).backward()
        >>> list(model(images, target=labels))
        ['out', 'loss_point']
        >>> model.eval()(images).shape
        torch.Size([2, 5, 64, 64])
    """
    root = getattr(model, "_orig_mod", model)  # A compiled model's original module.

    def fits(module: nn.Module) -> bool:
        return not _done(module) and (_of_torchvision(module) if coarse is None else module is root)

    changes = []
    for host, name in matching_modules(model, _WANTED, fits, _done, filter_fn).items():
        build = _masks if _has_masks(host) else _semantic
        changes.append(build(host, name, fine, coarse, example_input, options, device_and_dtype(model, name)))
    for change in changes:
        change()
    return model


def _done(module: nn.Module) -> bool:
    return isinstance(module, SemanticHost | MaskHost)


def _of_torchvision(module: nn.Module) -> bool:
    return _inherits(module, "_SimpleSegmentationModel", "LRASPP") or _has_masks(module)


def _has_masks(module: Any) -> bool:
    return (
        _inherits(module, "GeneralizedRCNN") and _inherits(module.roi_heads, "RoIHeads") and module.roi_heads.has_mask()
    )


def _inherits(module: nn.Module, *names: str) -> bool:
    """Return whether the module is of one of these torchvision classes, without importing torchvision."""
    kinds = type(module).__mro__
    return any(kind.__module__.startswith("torchvision.models.") and kind.__name__ in names for kind in kinds)


def _semantic(
    host: Any, name: str, fine: Any, coarse: Any, example_input: Any, options: dict[str, Any], place: dict[str, Any]
) -> Callable[[], None]:
    """Return a function that turns a semantic model into its PointRend version."""
    head = _module(host, "coarse", "classifier" if coarse is None else coarse)
    guess = fine is None and _of_torchvision(host)
    if guess:
        parts = list(host.backbone.children())
    else:
        parts = [_module(host, "fine", name) for name in ([fine] if isinstance(fine, str) else fine or ())]
    if not parts:
        raise ValueError(f"fine: expected names of modules in {type(host).__name__}, got {fine!r}")
    output, calls = _run(host, [head, *parts], example_input)
    logits = _map(f"the output of {type(host).__name__}", logits_of(output))
    low = _map("coarse", calls[head][1])
    if low.shape[1] != logits.shape[1]:
        raise ValueError(f"coarse: expected {logits.shape[1]} channels, as the model's output has, got {low.shape[1]}")
    if low.shape[2] >= logits.shape[2] and low.shape[3] >= logits.shape[3]:
        raise ValueError(
            f"coarse: expected a map smaller than the model's output, {tuple(logits.shape[2:])}, "
            f"got {tuple(low.shape[2:])}"
        )
    if guess:
        heights = {part: calls[part][1].shape[2] for part in parts if _is_map(calls[part][1])}
        parts = [part for part, height in heights.items() if round(logits.shape[2] / height) == _STRIDE][-1:]
    if not parts:
        raise ValueError(
            f"fine: expected names of modules where the backbone has nothing of stride {_STRIDE}, got None"
        )
    channels = sum(_map("fine", calls[part][1]).shape[1] for part in parts)
    refine = PointRendSemantic(channels, low.shape[1], **options, **place)
    ours = SequentialHost if isinstance(host, nn.Sequential) else SemanticHost
    check_names(host, name, ours, ["point_rend", "_point_rend_taps"])

    def change() -> None:
        host.__class__ = graft(ours, host.__class__)
        host.point_rend = refine.train(host.training)
        host._point_rend_taps = [OutputTap(module) for module in (head, *parts)]

    return change


def _masks(
    host: Any, name: str, fine: Any, coarse: Any, example_input: Any, options: dict[str, Any], place: dict[str, Any]
) -> Callable[[], None]:
    """Return a function that turns a Mask R-CNN into its PointRend version."""
    if fine is not None or coarse is not None:
        raise ValueError(f"fine, coarse: expected None for {type(host).__name__}, got {fine!r}, {coarse!r}")
    heads = host.roi_heads
    check_names(heads, f"{name}.roi_heads".strip("."), MaskHost, ["point_rend", "_point_rend_level"])
    for method in ("forward", "check_targets", "select_training_samples"):
        if method in vars(heads):
            raise ValueError(f"roi_heads: expected the {method} of its class, got one set on the object")
    level = heads.mask_roi_pool.featmap_names[0]
    convs = [layer for layer in heads.mask_predictor.modules() if isinstance(layer, nn.Conv2d)]
    if not convs:
        raise ValueError("model: expected an nn.Conv2d that tells the classes in roi_heads.mask_predictor, got none")
    maps, calls = _run(host.backbone, [host.backbone], example_input)
    features = _map(f"the backbone's {level!r}", maps[level] if isinstance(maps, Mapping) else maps)
    # Rounded to a power of two, as in torchvision, because of padding.
    scale = 2.0 ** round(math.log2(features.shape[2] / calls[host.backbone][0][0].shape[2]))
    new = PointRendMask(features.shape[1], convs[-1].out_channels, spatial_scale=scale, **options, **place)

    def change() -> None:
        heads.__class__ = graft(MaskHost, heads.__class__)
        heads.point_rend = new.train(heads.training)
        heads._point_rend_level = level
        heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None

    return change


def _run(host: nn.Module, modules: Sequence[nn.Module], example_input: Any) -> tuple[Any, dict[nn.Module, Any]]:
    """Run the host on trial; return its output, and the arguments and output of some of its modules."""
    calls: dict[nn.Module, Any] = dict.fromkeys(modules, ((), None))

    def watch(module: nn.Module, copied: nn.Module) -> None:
        copied.register_forward_hook(lambda _, args, output: calls.update({module: (args, output)}))

    output, failure = dry_run(host, modules, example_input, watch)
    if failure is not None:
        raise ValueError(
            f"example_input: expected an input that runs through {type(host).__name__} on the meta device, "
            f"got {type(failure).__name__}: {failure}"
        ) from failure
    return output, calls


def _module(host: nn.Module, argument: str, name: Any) -> nn.Module:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected the name of a module, got {name!r}")
    found = dict(host.named_modules(remove_duplicate=False)).get(name) if name else None
    if found is None:
        children = ", ".join(child for child, _ in host.named_children())
        names = [known for known, _ in host.named_modules() if known]
        close = difflib.get_close_matches(name, names, n=4) or [known for known in names if known.endswith(f".{name}")]
        raise ValueError(
            f"{argument}: expected the name of a module in {type(host).__name__} (it has {children}), got {name!r}"
            f"{'; close to it are ' + ', '.join(close[:4]) if close else ''}"
        )
    return found


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _map(name: str, value: Any) -> Tensor:
    if not _is_map(value):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a map (N, C, H, W) of floating numbers, got {got}")
    return value
