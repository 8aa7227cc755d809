"""Import this before torchvision (or timm): it makes them importable where torchvision's compiled ops do not load.

torchvision's ordinary wheel links against CUDA, so beside a CPU build of torch its library is skipped and
`import torchvision` fails on `torchvision::nms`, whose schema the library would have defined. Here nms and roi_align
get schemas and plain PyTorch implementations first; that is enough for ResNet, DeepLab and Mask R-CNN.
Does nothing where torchvision imports as it is.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Walk down the scores; a box is kept unless it overlaps too much with a kept one."""
    order = scores.argsort(descending=True, stable=True)
    boxes = dets[order]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    corner = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    overlap = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - corner).clamp(min=0).prod(2)
    too_close = (overlap > iou_threshold * (area[:, None] + area[None] - overlap)).cpu()
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if keep[i]:
            keep[i + 1 :] &= ~too_close[i, i + 1 :]
    return order[keep.to(order.device)]


def _interpolation(start: Tensor, size: Tensor, bins: int, sampling_ratio: int, length: int) -> Tensor:
    """Weights (K, bins, length) of the mean of bilinear samples that each of K intervals takes in each of its bins."""
    width = size / bins
    grid = torch.full_like(width, sampling_ratio) if sampling_ratio > 0 else width.ceil().clamp(min=1)
    sample = torch.arange(int(grid.max()) if len(grid) else 1, device=start.device)
    offset = torch.arange(bins, device=start.device)[:, None] + ((sample + 0.5) / grid[:, None])[:, None]
    position = start[:, None, None] + offset * width[:, None, None]
    used = (sample < grid[:, None])[:, None] & (position >= -1) & (position <= length)
    pixel = torch.arange(length, device=start.device)
    weight = (1 - (position.clamp(0, length - 1)[..., None] - pixel).abs()).clamp(min=0) * used[..., None]
    return weight.sum(2) / grid[:, None, None]


def _roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Bilinear sampling is separable: one matrix for rows, one for columns, image by image to save memory."""
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    size = corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1.0)
    columns = _interpolation(corners[:, 0], size[:, 0], pooled_width, sampling_ratio, input.shape[3])
    rows = _interpolation(corners[:, 1], size[:, 1], pooled_height, sampling_ratio, input.shape[2])
    if not len(input):
        return input.new_empty(0, input.shape[1], pooled_height, pooled_width)
    parts = [(rois[:, 0] == image).nonzero()[:, 0] for image in range(len(input))]
    pooled = [torch.einsum("kph,chw,kqw->kcpq", rows[k], x, columns[k]) for k, x in zip(parts, input, strict=True)]
    return torch.cat(pooled)[torch.cat(parts).argsort()]


def _register() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", _nms, "CompositeExplicitAutograd")
    library.impl("roi_align", _roi_align, "CompositeImplicitAutograd")
    return library


def _import() -> torch.library.Library | None:
    try:
        import torchvision

        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = _register()
    import torchvision.extension

    # nms and roi_align ask whether the compiled ops are there.
    torchvision.extension._assert_has_ops = torchvision.ops.boxes._assert_has_ops = lambda: None
    torchvision.ops.roi_align.__globals__["_has_ops"] = lambda: True
    torchvision.ops.roi_align.__globals__["_assert_has_ops"] = lambda: None
    return library


_library = _import()
