"""Images sampled at points: the op, its backward, and the function that users call."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.layout import memory_format
from paper_layers._core.library import define, library
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import folded

MODES = ("bilinear", "nearest")
PADDINGS = ("zeros", "border")

# Points of row r lie in the image whose number is image[r], or r. A pixel's coordinate is the point's times
# spatial_scale, or times the map's size, less a half.
_ARGUMENTS = "Tensor points, Tensor? image, Tensor[] maps, float[]? spatial_scale, str mode, str padding"


def _axis(coordinate: Tensor, size: int, scale: float, mode: str, padding: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each point's pixels along one axis, whether they exist, and their weights."""
    x = coordinate * scale - 0.5
    if padding == "border":
        x = x.where(~(x <= 0), 0.0).where(~(x >= size - 1), float(size - 1))  # no gradient outside; NaN stays
    x = x.where((x > -1) & (x < size), -2.0)  # outside, as NaN is, wherever that was
    low = (x.round() if mode == "nearest" else x.floor()).detach()
    taps = [(low, torch.ones_like(x))] if mode == "nearest" else [(low, 1 - (x - low)), (low + 1, x - low)]
    inside = [(pixel >= 0) & (pixel <= size - 1) for pixel, _ in taps]
    return [(pixel.where(there, 0).long(), there, weight) for (pixel, weight), there in zip(taps, inside, strict=True)]


def _scales(maps: Sequence[Tensor], spatial_scale: list[float] | None) -> Iterator[tuple[float, float]]:
    for level, map in enumerate(maps):
        yield (spatial_scale[level],) * 2 if spatial_scale is not None else (map.shape[3], map.shape[2])


def _sample(
    points: Tensor,
    image: Tensor | None,
    maps: Sequence[Tensor],
    spatial_scale: list[float] | None,
    mode: str,
    padding: str,
) -> Tensor:
    """The formula, differentiable to any order: (R, P, channels of all maps)."""
    dtype = dtypes.accumulation(maps[0])
    if image is None:
        image = torch.arange(points.shape[0], device=points.device)
    levels = []
    for map, (scale_x, scale_y) in zip(maps, _scales(maps, spatial_scale), strict=True):
        columns = _axis(points[..., 0], map.shape[3], scale_x, mode, padding)
        rows = _axis(points[..., 1], map.shape[2], scale_y, mode, padding)
        pixels, values = map.flatten(2), []
        for row, row_there, row_weight in rows:
            for column, column_there, column_weight in columns:
                value = pixels[image[:, None], :, row * map.shape[3] + column].to(dtype)
                value = value.where((row_there & column_there)[..., None], 0)
                values.append(value * (row_weight * column_weight).to(dtype)[..., None])
        levels.append(functools.reduce(torch.add, values))
    return torch.cat(levels, 2).to(maps[0].dtype)


def _reference(points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any) -> Tensor:
    _check_images(image, maps[0].shape[0])
    output = _sample(points, image, maps, *options).contiguous().mT
    # No view: torch forbids writes in place to views that a custom Function returns.
    last = memory_format(maps[0]) == torch.channels_last
    return output.clone(memory_format=torch.preserve_format if last else torch.contiguous_format)


def _decomposition(points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any) -> Tensor:
    output = _sample(points, image, maps, *options).mT
    return output if memory_format(maps[0]) == torch.channels_last else output.contiguous()


def _check_images(image: Tensor | None, images: int) -> None:
    """Refuse image numbers out of range, as the kernels do; reads the data."""
    if image is not None:
        wrong = (image < 0) | (image >= images)
        if wrong.any():
            raise RuntimeError(f"boxes: expected numbers of {images} images, got {int(image[wrong][0])}")


def _fake(points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any) -> Tensor:
    rows, count, channels = points.shape[0], points.shape[1], sum(map.shape[1] for map in maps)
    if memory_format(maps[0]) == torch.channels_last:
        return maps[0].new_empty(rows, count, channels).mT
    return maps[0].new_empty(rows, channels, count)


def _pullback(
    grad: Tensor, points: Tensor, image: Tensor | None, maps: Sequence[Tensor], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Return the gradients of the points and of the maps, differentiable."""
    return torch.func.vjp(lambda points, *maps: _sample(points, image, maps, *options), points, *maps)[1](grad.mT)


def _backward_maps_reference(
    grad: Tensor, points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any
) -> list[Tensor]:
    _check_images(image, maps[0].shape[0])
    grads = _pullback(grad, points, image, maps, options)[1:]
    return [g.contiguous(memory_format=memory_format(maps[0])) for g in grads]


def _backward_maps_fake(grad: Tensor, points: Tensor, image: Any, maps: list[Tensor], *options: Any) -> list[Tensor]:
    return [torch.empty_like(map, memory_format=memory_format(maps[0])) for map in maps]


def _backward_points_reference(
    grad: Tensor, points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any
) -> Tensor:
    _check_images(image, maps[0].shape[0])
    return _pullback(grad, points, image, maps, options)[0].contiguous()


def _backward_points_fake(grad: Tensor, points: Tensor, *_: Any) -> Tensor:
    return points.new_empty(points.shape)


_forward_op = define(f"point_sample({_ARGUMENTS}) -> Tensor", _reference, _fake, decompose=_decomposition)
_backward_maps_op = define(
    f"point_sample_backward_maps(Tensor grad, {_ARGUMENTS}) -> Tensor[]", _backward_maps_reference, _backward_maps_fake
)
_backward_points_op = define(
    f"point_sample_backward_points(Tensor grad, {_ARGUMENTS}) -> Tensor",
    _backward_points_reference,
    _backward_points_fake,
)
# The Functions take the points, any number of maps, and the image numbers.


def _forward(points: Tensor, *others: Any) -> Tensor:
    *maps, image, scale, mode, padding = others
    return _forward_op(points, image, maps, scale, mode, padding)


def _backward(grad: Tensor, points: Tensor, *others: Any) -> list[Tensor]:
    *maps, image, scale, mode, padding, needs = others
    arguments = (grad, points, image, maps, scale, mode, padding)
    of_points = _backward_points_op(*arguments) if needs[0] else points.new_empty(0)
    of_maps = _backward_maps_op(*arguments) if any(needs[1:-1]) else [map.new_empty(0) for map in maps]
    return [of_points, *of_maps]


def _formula(grad: Tensor, points: Tensor, *others: Any) -> list[Tensor]:
    *maps, image, scale, mode, padding, needs = others
    of_points, *of_maps = _pullback(grad, points, image, maps, (scale, mode, padding))
    wanted = (needs[0], *[any(needs[1:-1])] * len(maps))
    return [g if want else g.new_empty(0) for g, want in zip((of_points, *of_maps), wanted, strict=True)]


def _renumbered(batch_size: int, points: Tensor, *others: Any) -> tuple[Any, ...]:
    """Make image numbers count through the batch."""
    *maps, image, options = others
    if image is not None:
        image = image + maps[0].shape[1] * torch.arange(batch_size, device=image.device)[:, None]
    return points, *maps, image, options


def _grads_renumbered(batch_size: int, grad: Tensor, *others: Any) -> tuple[Any, ...]:
    return grad, *_renumbered(batch_size, *others)


_sampled = differentiable(
    "point_sample",
    _forward,
    _backward,
    formula=_formula,
    vmap=(folded(renumber=_renumbered), folded(renumber=_grads_renumbered)),
    selective=True,
)


def _image_reference(numbers: Tensor, images: int) -> Tensor:
    image = _whole(numbers)
    wrong = (image < 0) | (image >= images)
    if wrong.any():
        raise ValueError(f"boxes: expected numbers of {images} images, got {numbers[wrong][0].item():g}")
    return image


def _whole(numbers: Tensor, images: int = 0) -> Tensor:
    """Cast integers to int64 and all other values to -1; a cast of NaN is undefined."""
    return torch.where((numbers == numbers.floor()) & (numbers.abs() < 2**31), numbers, -1).long()


def _image_fake(numbers: Tensor, images: int) -> Tensor:
    return numbers.new_empty(numbers.shape, dtype=torch.int64)


_image_op = define(
    "image_numbers(Tensor numbers, SymInt images) -> Tensor", _image_reference, _image_fake, decompose=_whole
)
# On CUDA the kernels check the numbers, as reading them here would synchronize.
library.impl("image_numbers", _whole, "CUDA")


def _named(name: str, value: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Return one tensor or several by their names in errors."""
    if isinstance(value, list | tuple):
        return {f"{name}[{i}]": item for i, item in enumerate(value)}
    return {name: cast(Tensor, value)}


def _check_maps(input: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the maps in one dtype."""
    named = _named("input", input)
    if not named:
        raise ValueError("input: expected at least one map, got none")
    maps = list(named.values())
    first = maps[0]
    for name, map in named.items():
        checks.floating(name, map)
        if map.dim() != 4 or 0 in map.shape[2:]:
            checks.shape(name, map, ("N", "C", "H", "W"))
            raise ValueError(f"{name}: expected shape (N, C, H, W) with pixels, got {tuple(map.shape)}")
        if map is not first:
            if map.shape[0] != first.shape[0]:
                raise ValueError(f"{name}: expected as many images as input[0], {first.shape[0]}, got {map.shape[0]}")
            checks.same_device(name, map, "input[0]", first)
    dtype = first.dtype
    for map in maps:
        if map.dtype != dtype:
            dtype = torch.promote_types(dtype, map.dtype)
    # Also of one dtype: in a trace, calls with the same maps would share their list, which the stable ABI empties.
    return [map.to(dtype) for map in maps]


def _check_boxes(boxes: Tensor | Sequence[Tensor], images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all boxes (R, 4), and the image number of each."""
    parts, several = _named("boxes", boxes), isinstance(boxes, list | tuple)
    for name, part in parts.items():
        checks.floating(name, part)
        checks.shape(name, part, ("R", 4 if several else 5))
        if part.device != device:
            raise ValueError(f"{name}: expected the device of input, {device}, got {part.device}")
    if not several:
        corners = parts["boxes"].detach()
        return corners[:, 1:], _image_op(corners[:, 0], images)
    if len(parts) != images:
        raise ValueError(f"boxes: expected a tensor for each of {images} images, got {len(parts)}")
    numbers = [torch.full((part.shape[0],), i, device=device) for i, part in enumerate(parts.values())]
    if not parts:
        return torch.empty(0, 4, device=device), torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([*parts.values()]).detach(), torch.cat(numbers)


def _check_scales(spatial_scale: float | Sequence[float], levels: int) -> list[float]:
    scales = [*spatial_scale] if isinstance(spatial_scale, list | tuple) else [cast(float, spatial_scale)] * levels
    scales = [checks.number("spatial_scale", scale) for scale in scales]
    if len(scales) != levels or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"spatial_scale: expected positive numbers, one or {levels}, got {spatial_scale!r}")
    return [float(scale) for scale in scales]


@leaf
def point_sample(
    input: Tensor | Sequence[Tensor],
    points: Tensor,
    *,
    boxes: Tensor | Sequence[Tensor] | None = None,
    spatial_scale: float | Sequence[float] = 1.0,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Tensor:
    r"""Sample images, or the levels of a feature pyramid, at points: all levels' channels in one tensor.

    .. math:: y_{n,c,p} = \sum_{i,j} \max(0, 1 - |u_p - j|) \max(0, 1 - |v_p - i|) \, x_{n,c,i,j},
        \quad (u_p, v_p) = (p_x W - \tfrac12, p_y H - \tfrac12)

    The point-wise features of section 3.3 of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as
    Rendering", CVPR 2020. A map's corners are (0, 0) and (1, 1), and its pixels' centres lie half a pixel inside, so
    that one map gives what ``grid_sample(input, 2 * points - 1, align_corners=False)`` does. With `boxes` the
    points are relative to these: ``(u, v) = (corner + p * size) * spatial_scale - 0.5`` in each map.

    Coordinates are computed in float32, or float64 where the points are, whatever the maps are; half types are summed
    in float32. Gradients go to the maps, always summed in one order, and to the points, not to the boxes.

    Args:
        input: Maps of shape (N, C, H, W), one or a list of any sizes; float32, float64, bfloat16 or float16. Of
            several dtypes the result has the promoted one.
        points: (x, y) of shape (N, P, 2) or (N, H_g, W_g, 2), or (R, ...) with `boxes`, 0 to 1 across the image or
            the box. Other points are outside; NaN gives 0.
        boxes: Corners (x1, y1, x2, y2) in pixels of the image: a tensor (R_i, 4) for each image, or (R, 5) with the
            image's number first, as in torchvision's ``roi_align``. Boxes without area are points.
        spatial_scale: With `boxes`, pixels of a map for each pixel of the image: one number or one for each map.
        mode: "bilinear", or "nearest": the pixel whose centre is nearest, of two the even one.
        padding_mode: The values outside: "zeros", or "border", the nearest pixel.

    Returns:
        Tensor of shape (N, channels of all maps, P) or (N, channels of all maps, H_g, W_g), or (R, ...) with `boxes`.
        As in the first map, either points or channels (channels_last) are next to one another in memory.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or names do not fit.

    Example:
        >>> import torch, paper_layers
        >>> p2, p3 = torch.randn(2, 256, 64, 64), torch.randn(2, 256, 32, 32)
        >>> paper_layers.point_sample([p2, p3], torch.rand(2, 100, 2)).shape
        torch.Size([2, 512, 100])
        >>> boxes = [torch.tensor([[8.0, 8.0, 96.0, 64.0]]), torch.empty(0, 4)]
        >>> paper_layers.point_sample(p2, torch.rand(1, 14, 14, 2), boxes=boxes, spatial_scale=1 / 4).shape
        torch.Size([1, 256, 14, 14])
    """
    maps = _check_maps(input)
    checks.floating("points", points)
    checks.same_device("points", points, "input", maps[0])
    checks.choice("mode", mode, MODES)
    checks.choice("padding_mode", padding_mode, PADDINGS)
    count = maps[0].shape[0]
    points = points.to(dtypes.accumulation(points))
    image = scales = None
    if boxes is not None:
        scales = _check_scales(spatial_scale, len(maps))
        corners, image = _check_boxes(boxes, count, maps[0].device)
        count = corners.shape[0]
    elif spatial_scale != 1.0:
        raise ValueError(f"spatial_scale: expected 1.0 without boxes, got {spatial_scale!r}")
    checks.shape("points", points, (count, "P", 2), (count, "H_g", "W_g", 2))
    grid = points.shape[1:-1]
    if len(grid) == 2:
        points = points.flatten(1, 2)
    if image is not None:
        corners = corners.to(points.dtype)[:, None]
        points = corners[..., :2] + points * (corners[..., 2:] - corners[..., :2])
    output = _sampled(points, *maps, image, (scales, mode, padding_mode))
    return output if len(grid) == 1 else output.unflatten(2, grid)
