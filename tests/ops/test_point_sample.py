from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import point_sample
from testing.battery import OpBattery
from testing.cases import TOLERANCE, Case, assert_close, by_dtype

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
by_options = pytest.mark.parametrize(
    "options", [{"mode": m, "padding_mode": p} for m in ("bilinear", "nearest") for p in ("zeros", "border")], ids=str
)


def formula(points: Tensor, *maps: Tensor, boxes: Any = None, spatial_scale: Any = 1.0, **options: str) -> Tensor:
    """Every pixel of every map, with its weight for every point."""
    mode, padding = options.get("mode", "bilinear"), options.get("padding_mode", "zeros")
    image = torch.arange(len(points))
    grid, p = points.shape[1:-1], points.flatten(1, -2)
    if boxes is not None:
        image = torch.tensor([i for i, b in enumerate(boxes) for _ in b], dtype=torch.int64)
        corners = torch.cat([p.new_empty(0, 4), *boxes])[:, None]
        p = corners[..., :2] + p * (corners[..., 2:] - corners[..., :2])
    levels = []
    for level, map in enumerate(maps):
        weights = []
        for axis, size in ((0, map.shape[3]), (1, map.shape[2])):
            scale = (
                size if boxes is None else spatial_scale[level] if isinstance(spatial_scale, list) else spatial_scale
            )
            x = p[..., axis, None] * scale - 0.5
            if padding == "border":
                x = torch.where(x <= 0, 0.0, torch.where(x >= size - 1, size - 1.0, x))
            distance = (x - torch.arange(size)).abs()
            if mode == "nearest":
                nearest = x.round() if padding == "zeros" else x.round().clamp(0, size - 1)
                weights.append((nearest == torch.arange(size)).to(p.dtype) + 0 * x.nan_to_num())
            else:
                weights.append(torch.where(distance < 1, 1 - distance, 0.0))
        value = torch.einsum("rpx,rpy,rcyx->rcp", *weights, map[image])
        levels.append(value)
    return torch.cat(levels, 1).unflatten(2, grid)


def sample(points: Tensor, *maps: Tensor, **options: Any) -> Tensor:
    return point_sample(maps, points, **options)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def smooth_points(*shape: int, seed: int = 0) -> Tensor:
    """In -1/4 to 5/4, and no pixel's centre or border for sizes that are powers of two: the gradient jumps there."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randint(-16, 80, (*shape, 2), generator=generator) + 0.375) / 64


def boxes_for(images: int, seed: int, largest: int = 3) -> list[Tensor]:
    """Corners at whole numbers, some boxes without area, some images without boxes."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, largest + 1, (images,), generator=generator).tolist()
    corners = [torch.randint(0, 16, (n, 2), generator=generator).float() for n in counts]
    sizes = [torch.tensor([0.0, 8.0, 16.0])[torch.randint(0, 3, (n, 2), generator=generator)] for n in counts]
    return [torch.cat([c, c + s], 1) for c, s in zip(corners, sizes, strict=True)]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return tensor[..., :1].expand(tensor.shape)
    if layout == "offset":
        return F.pad(tensor, (3, 2, 1, 0))[..., 1:, 3:-2]
    return tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    number, seed = draw(st.integers(0, 3)), draw(st.integers(0, 2**20))
    layouts = st.sampled_from(["contiguous", "channels_last", "channels_last", "expanded", "offset"])
    sides = st.sampled_from([1, 2, 4, 8, 16, 32])
    maps = []
    for level in range(draw(st.integers(1, 3))):
        channels = draw(st.sampled_from([0, 1, 3, 8, 9, 17, 40]))
        map = images(number, channels, draw(sides), draw(sides), seed=seed + level)
        maps.append(laid_out(map, draw(layouts)))
    options: dict[str, Any] = {
        "mode": draw(st.sampled_from(["bilinear", "nearest"])),
        "padding_mode": draw(st.sampled_from(["zeros", "border"])),
    }
    rows = number
    if draw(st.booleans()) and number:
        options["boxes"] = boxes_for(number, seed)
        options["spatial_scale"] = [0.5**level for level in range(len(maps))]
        rows = sum(len(b) for b in options["boxes"])
    shape = draw(st.sampled_from([(0,), (1,), (30,), (200,), (3, 5)]))
    points = smooth_points(rows, *shape, seed=seed)
    return Case((points, *maps), options)


def call(**change: Any) -> Any:
    arguments = {"input": images(2, 4, 8, 8), "points": torch.rand(2, 5, 2), **change}
    return lambda: point_sample(**arguments)


BOXES = [torch.tensor([[1.0, 2.0, 9.0, 8.0], [3.0, 3.0, 3.0, 3.0]]), torch.tensor([[0.0, 4.0, 16.0, 12.0]])]


class TestPointSample(OpBattery):
    function = staticmethod(sample)
    formula = staticmethod(formula)
    cases = staticmethod(cases)
    grad_scale = 60.0  # of points: sums over channels, times the map's size
    ops = {  # noqa: RUF012
        "point_sample": torch.ops.paper_layers.point_sample.default,
        "point_sample_backward_maps": torch.ops.paper_layers.point_sample_backward_maps.default,
        "point_sample_backward_points": torch.ops.paper_layers.point_sample_backward_points.default,
    }
    bad_inputs = {  # noqa: RUF012
        "no maps": (call(input=[]), ValueError, "input: expected at least one map"),
        "map rank": (call(input=images(4, 8, 8)), ValueError, r"input: expected shape \(N, C, H, W\).*got \(4, 8, 8\)"),
        "no pixels": (call(input=images(2, 4, 0, 8)), ValueError, r"input: .*with pixels, got \(2, 4, 0, 8\)"),
        "map type": (call(input=[images(2, 4, 8, 8), 3]), TypeError, r"input\[1\]: expected a Tensor, got int"),
        "integers": (call(input=torch.ones(2, 4, 8, 8).long()), TypeError, "input: .*torch.int64"),
        "images": (
            call(input=[images(2, 4, 8, 8), images(3, 4, 8, 8)]),
            ValueError,
            r"input\[1\]: expected as many images as input\[0\], 2, got 3",
        ),
        "map devices": (
            call(input=[images(2, 4, 8, 8), images(2, 4, 8, 8).to("meta")]),
            ValueError,
            r"input\[1\]: .*cpu, got meta",
        ),
        "points type": (call(points=[0.5, 0.5]), TypeError, "points: expected a Tensor, got list"),
        "points dtype": (call(points=torch.ones(2, 5, 2).int()), TypeError, "points: .*torch.int32"),
        "points rank": (call(points=torch.rand(2, 2)), ValueError, r"points: expected shape \(2, P, 2\).*got \(2, 2\)"),
        "points rows": (call(points=torch.rand(3, 5, 2)), ValueError, r"points: .*\(2, P, 2\).*got \(3, 5, 2\)"),
        "points last": (call(points=torch.rand(2, 5, 3)), ValueError, r"points: .*got \(2, 5, 3\)"),
        "points device": (call(points=torch.rand(2, 5, 2, device="meta")), ValueError, "points: .*cpu, got meta"),
        "box rows": (call(boxes=BOXES), ValueError, r"points: .*\(3, P, 2\).*got \(2, 5, 2\)"),
        "box images": (call(boxes=BOXES[:1]), ValueError, "boxes: expected a tensor for each of 2 images, got 1"),
        "box shape": (call(boxes=[torch.ones(1, 5)] * 2), ValueError, r"boxes\[0\]: expected shape \(R, 4\), got \(1"),
        "boxes shape": (call(boxes=torch.ones(2, 4)), ValueError, r"boxes: expected shape \(R, 5\), got \(2, 4\)"),
        "boxes dtype": (call(boxes=torch.ones(2, 5).long()), TypeError, "boxes: .*torch.int64"),
        "boxes type": (call(boxes=[[1.0, 2.0]] * 2), TypeError, r"boxes\[0\]: expected a Tensor, got list"),
        "boxes device": (call(boxes=torch.ones(2, 5, device="meta")), ValueError, "boxes: .*cpu, got meta"),
        "image number": (call(boxes=torch.full((2, 5), 2.0)), ValueError, "boxes: expected numbers of 2 images, got 2"),
        "image nan": (
            call(boxes=torch.full((2, 5), math.nan)),
            ValueError,
            "boxes: expected numbers of 2 images, got nan",
        ),
        "scale alone": (call(spatial_scale=0.25), ValueError, "spatial_scale: expected 1.0 without boxes, got 0.25"),
        "scale type": (call(boxes=BOXES, spatial_scale="1"), TypeError, "spatial_scale: expected a number"),
        "scale count": (call(boxes=BOXES, spatial_scale=[1.0, 0.5]), ValueError, "spatial_scale: .*one or 1, got"),
        "scale zero": (call(boxes=BOXES, spatial_scale=0.0), ValueError, "spatial_scale: expected positive"),
        "mode": (call(mode="bicubic"), ValueError, "mode: expected one of bilinear, nearest, got 'bicubic'"),
        "padding": (call(padding_mode="wrap"), ValueError, "padding_mode: expected one of zeros, border, got 'wrap'"),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        last = torch.channels_last
        return [
            Case((smooth_points(2, 6), images(2, 3, 8, 4))),
            Case((smooth_points(2, 2, 3), images(2, 3, 8, 8), images(2, 2, 4, 2)), {"padding_mode": "border"}),
            Case(
                (smooth_points(3, 5), images(2, 3, 8, 16).to(memory_format=last), images(2, 4, 4, 8)),
                {"boxes": BOXES, "spatial_scale": [1.0, 0.5]},
            ),
            Case((smooth_points(2, 6), images(2, 3, 8, 4)), {"mode": "nearest"}),
        ]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        points, *maps = case.tensors
        points, image, scale = points.flatten(1, -2), None, None
        if "boxes" in case.options:
            image, scale = torch.tensor([0, 0, 1]), case.options["spatial_scale"]
        options = (case.options.get("mode", "bilinear"), case.options.get("padding_mode", "zeros"))
        arguments = (points, image, maps, scale, *options)
        grad = torch.ones_like(torch.ops.paper_layers.point_sample(*arguments))
        return {
            "point_sample": arguments,
            "point_sample_backward_maps": (grad, *arguments),
            "point_sample_backward_points": (grad, *arguments),
        }

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        """The result has the maps' dtype, promoted; gradients come back in each tensor's dtype."""
        case = Case((smooth_points(2, 6), images(2, 3, 8, 4).to(dtype), images(2, 3, 4, 4).to(dtype)))
        leaves = case.on(self.device).leaves()
        with torch.autocast(self.device, dtype=dtype):
            actual = sample(*leaves)
            mixed = sample(*leaves[:2], leaves[2].float())
        assert (actual.dtype, mixed.dtype) == (dtype, torch.float32)
        (actual.float() + mixed).sum().backward()
        assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
        assert_close(actual.cpu(), formula(*(t.cpu().double() for t in leaves)), dtype)

    @by_dtype
    def test_meta(self, dtype: torch.dtype) -> None:
        for case in self.placed_cases():
            options = dict(case.options)
            if "boxes" in options:
                options["boxes"] = [b.to("meta") for b in options["boxes"]]
            tensors = case.to(dtype).tensors
            on_meta, real = sample(*(t.to("meta") for t in tensors), **options), sample(*tensors, **case.options)
            assert (on_meta.shape, on_meta.dtype, on_meta.stride()) == (real.shape, real.dtype, real.stride())


@by_layout
@by_options
@by_dtype
def test_equals_grid_sample(dtype: torch.dtype, options: dict[str, str], layout: torch.memory_format) -> None:
    map = images(2, 20, 15, 21).to(dtype).contiguous(memory_format=layout).requires_grad_()
    points = (torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (map, points)]
    actual = point_sample(map, points, **options)
    grid = 2 * exact[1][:, :, None] - 1
    expected = F.grid_sample(
        exact[0], grid, mode=options["mode"], padding_mode=options["padding_mode"], align_corners=False
    )[..., 0]
    rtol, atol = TOLERANCE[dtype if dtype != torch.float64 else torch.float32]  # coordinates are float32
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=4 * atol)
    grad = images(*expected.shape).to(dtype)
    got = torch.autograd.grad(actual, (map, points), grad)
    want = torch.autograd.grad(expected, exact, grad.double())
    for a, b, scale in zip(got, want, (8, 400), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=scale * atol, check_stride=False)


def test_memory_follows_the_first_map() -> None:
    points = torch.rand(2, 3, 5, 2)
    planar, last = images(2, 4, 8, 8), images(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    assert point_sample([planar, last], points).is_contiguous()
    assert point_sample([last, planar], points).is_contiguous(memory_format=torch.channels_last)
    assert point_sample(last, points.flatten(1, 2)).mT.is_contiguous()
    torch.testing.assert_close(
        point_sample([last, planar], points), torch.cat([point_sample(m, points) for m in (last, planar)], 1)
    )


def test_boxes_in_one_tensor() -> None:
    map, points = images(3, 4, 8, 8), torch.rand(4, 7, 2)
    parts = [BOXES[0], torch.empty(0, 4), BOXES[1].expand(2, 4)]
    numbers = torch.tensor([0.0, 0.0, 2.0, 2.0])
    together = torch.cat([numbers[:, None], torch.cat(parts)], 1)
    options = {"spatial_scale": 0.5}
    expected = point_sample(map, points, boxes=parts, **options)
    assert torch.equal(point_sample(map, points, boxes=together, **options), expected)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(point_sample(map, points[order], boxes=together[order], **options), expected[order])


def test_boxes_take_no_gradient() -> None:
    boxes = [b.clone().requires_grad_() for b in BOXES]
    output = point_sample(images(2, 4, 8, 8), torch.rand(3, 5, 2).requires_grad_(), boxes=boxes)
    assert torch.autograd.grad(output.sum(), boxes, allow_unused=True) == (None, None)


@by_layout
@by_dtype
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e300])
def test_any_coordinate(value: float, mode: str, padding: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """NaN takes nothing; what is far away is outside; a pixel that is not taken does not matter, whatever it is."""
    map = images(1, 17, 4, 8).to(dtype).contiguous(memory_format=layout)
    points = torch.full(
        (1, 40, 2), 0.5, dtype=torch.float64 if dtype == torch.float64 or value == 1e300 else torch.float32
    )
    points[:, ::2, 0] = value
    map[:, :, :2] = math.nan  # y = 0.5 takes rows 1 and 2 ...
    map[:, :, 1:3] = 2.0
    leaves = (map.requires_grad_(), points.requires_grad_())
    output = point_sample(*leaves, mode=mode, padding_mode=padding)
    far = output[0, :, ::2]
    expected = 2.0 if padding == "border" and not math.isnan(value) else 0.0
    assert torch.equal(far, torch.full_like(far, expected))
    assert torch.equal(output[0, :, 1::2], torch.full_like(output[0, :, 1::2], 2.0))
    for grad in torch.autograd.grad(output.sum(), leaves):
        assert grad.isfinite().all()


@by_layout
def test_one_pixel(layout: torch.memory_format) -> None:
    map = torch.full((1, 17, 1, 1), 3.0).contiguous(memory_format=layout)
    points = torch.tensor([[[0.5, 0.5], [0.0, 0.5], [0.25, 0.75], [-0.5, 0.5], [1.0, 1.0]]])
    assert point_sample(map, points)[0, 5].tolist() == [3.0, 1.5, 1.6875, 0.0, 0.75]
    assert point_sample(map, points, padding_mode="border")[0, 16].tolist() == [3.0] * 5
    assert point_sample(map, points, mode="nearest")[0, 0].tolist() == [3.0, 3.0, 3.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_keep_their_pixels(dtype: torch.dtype) -> None:
    """Half types cannot tell columns beyond 2048 apart; coordinates stay float32."""
    width = 5000
    map = (torch.arange(width) % 64).to(dtype).expand(1, 3, 2, width)
    columns = torch.arange(2100, 4900, 7)
    points = torch.stack([(columns + 0.5) / width, torch.full((len(columns),), 0.5)], -1)[None]
    for mode in ("bilinear", "nearest"):
        output = point_sample(map, points, mode=mode)
        torch.testing.assert_close(output[0, 1].float(), (columns % 64).float(), atol=0.1, rtol=0)


def test_longer_pyramid() -> None:
    """Each number of levels has its own Function; here 19."""
    maps = [images(2, 3, 2 + level, 5, seed=level).requires_grad_() for level in range(19)]
    points = smooth_points(2, 11)
    actual, expected = point_sample(maps, points), torch.cat([point_sample(map, points) for map in maps], 1)
    assert torch.equal(actual, expected)
    grads = torch.autograd.grad(actual.square().sum(), maps)
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), maps), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.cpu_only
@by_layout
@pytest.mark.parametrize("boxed", [False, True])
def test_same_for_any_number_of_threads(layout: torch.memory_format, boxed: bool) -> None:
    """And from run to run, with many points in one pixel and a gradient that is written past the caches."""
    maps = [
        images(2, 40, side, 160).contiguous(memory_format=layout).requires_grad_() for side in (300, 1)
    ]  # 15 MB, several bands
    options: dict[str, Any] = {"boxes": [BOXES[0], BOXES[1]], "spatial_scale": [8.0, 1.0]} if boxed else {}
    points = torch.rand(3 if boxed else 2, 900, 2, generator=torch.Generator().manual_seed(0))
    points[:, :400] = points[:, :1] + points[:, :400] * 1e-3
    points.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5, 5):
            torch.set_num_threads(number)
            output = point_sample(maps, points, **options)
            results.append((output, *torch.autograd.grad(output.square().sum(), (points, *maps))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    exact = [t.detach().double().requires_grad_() for t in (points, *maps)]
    want = torch.autograd.grad(point_sample(exact[1:], exact[0], **options).square().sum(), exact[1:])
    for got, map_want in zip(results[0][2:], want, strict=True):
        torch.testing.assert_close(got.double(), map_want, rtol=1e-4, atol=1e-2)


def test_only_what_is_wanted_is_computed() -> None:
    """Gradients of maps alone, of points alone, of none."""
    map, points = images(2, 3, 8, 8), smooth_points(2, 9)
    both = (map.clone().requires_grad_(), points.clone().requires_grad_())
    want = torch.autograd.grad(point_sample(*both).square().sum(), both)
    torch.testing.assert_close(torch.autograd.grad(point_sample(both[0], points).square().sum(), both[0])[0], want[0])
    torch.testing.assert_close(torch.autograd.grad(point_sample(map, both[1]).square().sum(), both[1])[0], want[1])
    assert not point_sample(map, points).requires_grad


@pytest.mark.cpu_only
def test_op_refuses_what_does_not_fit() -> None:
    op, backward = torch.ops.paper_layers.point_sample, torch.ops.paper_layers.point_sample_backward_maps
    points, maps, options = torch.rand(2, 5, 2), [images(2, 4, 8, 8)], (None, "bilinear", "zeros")
    image = torch.tensor([0, 1])
    for message, run in {
        "maps: expected at least one": lambda: op(points, None, [], *options),
        "maps: expected shape": lambda: op(points, None, [maps[0][0]], *options),
        "maps: expected the dtype": lambda: op(points, None, [maps[0], maps[0].double()], *options),
        "points: expected shape": lambda: op(points[0], None, maps, *options),
        "points: expected float32 or float64": lambda: op(points.half(), None, maps, *options),
        "points: expected 2 rows": lambda: op(points[:1], None, maps, *options),
        "image: expected int64": lambda: op(points, image[:1], maps, *options),
        "boxes: expected numbers of 2 images, got -1": lambda: op(points, image - 1, maps, *options),
        "spatial_scale: expected 1 numbers, got 2": lambda: op(points, None, maps, [1.0, 2.0], *options[1:]),
        "mode: expected bilinear or nearest": lambda: op(points, None, maps, None, "cubic", "zeros"),
        "padding: expected zeros or border": lambda: op(points, None, maps, None, "nearest", "wrap"),
        "grad: expected shape": lambda: backward(torch.rand(2, 4, 6), points, None, maps, *options),
        "grad: expected the dtype": lambda: backward(torch.rand(2, 4, 5).half(), points, None, maps, *options),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            run()


@pytest.mark.parametrize("channels", [33, 64])
def test_result_written_past_the_caches(channels: int) -> None:
    """In channels_last, more than 8 MB, aligned or not."""
    map = images(2, channels, 32, 40).contiguous(memory_format=torch.channels_last)
    points = torch.rand(2, 40000, 2, generator=torch.Generator().manual_seed(0)) * 1.1 - 0.05
    expected = F.grid_sample(map.double(), 2 * points[:, :, None].double() - 1, align_corners=False)[..., 0]
    torch.testing.assert_close(point_sample(map, points).double(), expected, rtol=1e-4, atol=1e-4, check_stride=False)
