"""LIPPool2d and its logit modules against the formula, and under torch's transforms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.lip import BottleneckLogit, BottleneckStem, LIPPool2d, LogitHead
from paper_layers.lip._norm import InstanceNorm2d

FORMS = ("bottleneck", "projection", "simplified")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def official_pool(x: Tensor, logit: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    weight = logit.exp()
    geometry = (kernel_size, stride, padding)
    return F.avg_pool2d(x * weight, *geometry) / F.avg_pool2d(weight, *geometry)


def official_logit(x: Tensor, p: dict[str, Tensor], form: str) -> Tensor:
    def conv_norm(x: Tensor, conv: str, norm: str, padding: int = 0) -> Tensor:
        y = F.conv2d(x, p[f"{conv}.weight"], padding=padding)
        return F.instance_norm(y, weight=p[f"{norm}.weight"], bias=p[f"{norm}.bias"])

    if form == "bottleneck":
        x = conv_norm(x, "stem.conv1", "stem.norm1").relu()
        x = conv_norm(x, "stem.conv2", "stem.norm2", padding=1).relu()
        x = conv_norm(x, "head.conv", "head.norm")
    else:
        x = conv_norm(x, "conv", "norm", padding=1 if form == "simplified" else 0)
    return 12 * torch.sigmoid(x)


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters at random, so that none stays at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 2, 0), (5, 3, 2)])
def test_equals_the_official_formula_forward_and_backward(form: str, geometry: tuple[int, int, int]) -> None:
    pool = trained(LIPPool2d(6, *geometry, logit=form, hidden_channels=8, dtype=torch.float64))
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64, requires_grad=True)
    inputs = [x, *pool.parameters()]
    actual = pool(x)
    logit = official_logit(x, dict(pool.logit.named_parameters()), form)
    expected = official_pool(x, logit, *geometry)
    torch.testing.assert_close(actual, expected)
    assert logit.std() > 0.5  # The logits differ, so this is not just an average.
    grad = torch.randn_like(actual)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero_init", ["norm", "conv"])
def test_fresh_is_average_pooling_and_learns(form: str, zero_init: str) -> None:
    pool = LIPPool2d(6, logit=form, hidden_channels=8, zero_init=zero_init)
    x = torch.randn(2, 6, 11, 10)
    torch.testing.assert_close(pool(x), average(x))
    optimizer = torch.optim.SGD(pool.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        pool(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in pool.parameters())
    assert (pool(x) - average(x)).abs().max() > 1e-3
    pool.reset_parameters()
    torch.testing.assert_close(pool(x), average(x))


def test_without_zero_init_is_not_average_pooling() -> None:
    x = torch.randn(2, 6, 11, 10)
    assert (LIPPool2d(6, zero_init=None)(x) - average(x)).abs().max() > 0.1


def test_each_module_resets_to_average_pooling_in_any_order() -> None:
    # FSDP and timm call every submodule's reset_parameters, parents first or children first.
    x = torch.randn(2, 6, 11, 10)
    for reverse in (False, True):
        pool = trained(LIPPool2d(6))
        for module in list(pool.modules())[:: -1 if reverse else 1]:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        torch.testing.assert_close(pool(x), average(x))


def test_logit_of_ones_own() -> None:
    x = torch.randn(2, 6, 11, 10)
    torch.testing.assert_close(LIPPool2d(6, logit="identity")(x), official_pool(x, x))
    shared = LIPPool2d(6, logit=lambda x: x.mean(1, keepdim=True))
    torch.testing.assert_close(shared(x), official_pool(x, x.mean(1, keepdim=True).expand_as(x)))
    conv = nn.Conv2d(6, 6, 1)
    weight = conv.weight.detach().clone()
    pool = LIPPool2d(6, logit=conv)
    assert pool.logit is conv
    assert torch.equal(conv.weight, weight)
    torch.testing.assert_close(pool(x), official_pool(x, conv(x)))


def test_output_has_the_inputs_dtype_whatever_the_logits() -> None:
    x = torch.randn(2, 6, 11, 10)
    for dtype, logit_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        pool = LIPPool2d(6, logit=lambda x, logit_dtype=logit_dtype: x.to(logit_dtype))
        assert pool(x.to(dtype)).dtype == dtype


def test_logit_input_goes_to_the_logit_module() -> None:
    stem, head = BottleneckStem(6, 8), LogitHead(8, 4)
    trained(stem), trained(head, seed=1)
    x, y = torch.randn(2, 6, 9, 9), torch.randn(2, 4, 9, 9)
    pool = LIPPool2d(4, logit=head)
    torch.testing.assert_close(pool(y, stem(x)), official_pool(y, head(stem(x))))
    whole = BottleneckLogit(6, 8)
    whole.stem, whole.head = stem, head
    torch.testing.assert_close(whole(x), head(stem(x)))


def test_importance() -> None:
    pool = trained(LIPPool2d(6, hidden_channels=8))
    x = torch.randn(2, 6, 9, 9)
    expected = pool.logit(x).exp()
    torch.testing.assert_close(pool.importance(x), expected / expected.amax((2, 3), keepdim=True))
    wild = torch.tensor([[3e38, -3e38, 0.0], [-torch.inf, torch.inf, 1e4]]).expand(1, 6, 2, 3)
    for logit in (wild, -wild, torch.full_like(wild, -torch.inf), torch.full_like(wild, 1e30)):
        importance = LIPPool2d(6, logit=lambda x, logit=logit: logit).importance(x)
        assert importance.isfinite().all()
        assert (importance.amax((2, 3)) == 1).all()
        assert importance.min() >= 0


@pytest.mark.parametrize("form", [*FORMS, "identity"])
@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (1, 6, 1, 1), (6, 1, 1), (0, 6, 8, 8), (6, 8, 8), (2, 6, 1, 5)])
def test_small_empty_and_unbatched_images(form: str, shape: tuple[int, ...]) -> None:
    pool = trained(LIPPool2d(6, logit=form))
    x = torch.randn(shape, requires_grad=True)
    y = pool(x)
    assert y.shape == average(x).shape
    grads = torch.autograd.grad(y.sum(), [x, *pool.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    if x.dim() == 3:
        torch.testing.assert_close(y, pool(x[None])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_is_torchs(layout: torch.memory_format) -> None:
    ours, theirs = InstanceNorm2d(5), nn.InstanceNorm2d(5, affine=True)
    theirs.load_state_dict(trained(ours).state_dict())
    # The mean is far above the deviation, so E[x^2] - E[x]^2 would be inaccurate.
    x = (torch.randn(3, 5, 40, 40) + 300).contiguous(memory_format=layout).requires_grad_()
    actual, expected = ours(x), theirs(x)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    assert actual.stride() == x.stride()
    grad = torch.randn_like(actual)
    inputs = [x, ours.weight, ours.bias]
    references = [x, theirs.weight, theirs.bias]
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, references, grad), atol=2e-2, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_types_and_autocast(dtype: torch.dtype, layout: torch.memory_format) -> None:
    pool = trained(LIPPool2d(6, hidden_channels=8))
    x = torch.randn(2, 6, 12, 12).contiguous(memory_format=layout)
    expected = pool(x)
    with torch.autocast("cpu", dtype):
        for image in (x, x.to(dtype)):
            actual = pool(image)
            assert actual.dtype == image.dtype
            torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.1)
            loss = actual.float().sum()
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(pool.parameters())))
    actual = copy.deepcopy(pool).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.1)


def test_half_logits_at_the_gates_bound_stay_finite() -> None:
    # exp(12) overflows float16.
    pool = LIPPool2d(6, logit="projection").half()
    nn.init.constant_(pool.logit.norm.bias, 20.0)
    x = torch.randn(2, 6, 12, 12).half()
    torch.testing.assert_close(pool(x).float(), average(x.float()), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_channels_last(form: str) -> None:
    pool = trained(LIPPool2d(6, logit=form, hidden_channels=8))
    x = torch.randn(2, 6, 12, 12)
    expected = pool(x)
    actual = pool.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(layout: torch.memory_format) -> None:
    pool = trained(LIPPool2d(6, hidden_channels=8))
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 6, 12, 12), (3, 6, 13, 17)):
        x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
        actual, expected = compiled(x), pool(x)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(torch.autograd.grad(actual.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export(layout: torch.memory_format) -> None:
    pool = trained(LIPPool2d(6, hidden_channels=8))
    side = {i: torch.export.Dim(name, min=4, max=64) for i, name in ((2, "height"), (3, "width"))}
    example = torch.randn(2, 6, 12, 12).contiguous(memory_format=layout)
    program = torch.export.export(pool, (example,), dynamic_shapes=({0: torch.export.Dim("batch"), **side},))
    x = torch.randn(3, 6, 13, 17).contiguous(memory_format=layout)
    torch.testing.assert_close(program.module()(x), pool(x))


def test_vmap_and_func_grad() -> None:
    pool = trained(LIPPool2d(6, hidden_channels=8))
    x = torch.randn(4, 12, 12, 2, 6).permute(0, 3, 4, 1, 2)
    torch.testing.assert_close(torch.vmap(pool)(x), torch.stack([pool(images) for images in x]))
    parameters = dict(pool.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(pool, parameters, (image[None],)).square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x[0])
    whole = torch.autograd.grad(pool(x[0]).square().sum(), list(parameters.values()))
    for grads, total in zip(each.values(), whole, strict=True):
        torch.testing.assert_close(grads.sum(0), total, atol=1e-4, rtol=1e-4)


def test_double_backward() -> None:
    pool = trained(LIPPool2d(2, logit="projection", dtype=torch.float64))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(pool, (x,))


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_meta(form: str) -> None:
    pool = trained(LIPPool2d(6, logit=form, hidden_channels=8))
    x = torch.randn(2, 6, 12, 12)
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(twin(x), pool(x))
    meta = LIPPool2d(6, logit=form, hidden_channels=8, device="meta", dtype=torch.float64)
    assert meta(x.double().to("meta")).shape == (2, 6, 6, 6)
    real = meta.to_empty(device="cpu")
    for parameter in real.parameters():
        nn.init.constant_(parameter, torch.nan)
    real.reset_parameters()
    torch.testing.assert_close(real(x.double()), average(x.double()))


def test_repr_states_form_and_geometry() -> None:
    text = repr(LIPPool2d(6, (3, 5), 2, (1, 2), hidden_channels=16, ceil_mode=True, zero_init="conv"))
    for part in (
        "6, kernel_size=(3, 5), stride=2, padding=(1, 2)",
        "logit='bottleneck', hidden_channels=16",
        "ceil_mode=True",
        "zero_init='conv'",
    ):
        assert part in text
    assert "logit='identity'" in repr(LIPPool2d(6, logit="identity"))
    assert "softplus" in repr(LIPPool2d(6, logit=F.softplus))


def test_ceil_mode_and_rectangles() -> None:
    pool = LIPPool2d(6, (3, 2), (2, 1), (1, 0), logit="projection", ceil_mode=True)
    x = torch.randn(2, 6, 8, 9)
    expected = F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
        ({"channels": 6.0}, TypeError, "channels: expected an int, got 6.0"),
        ({"channels": True}, TypeError, "channels: expected an int, got True"),
        ({"hidden_channels": True}, TypeError, "hidden_channels: expected an int, got True"),
        ({"kernel_size": (True, 3)}, TypeError, r"kernel_size: expected an int .*got \(True, 3\)"),
        ({"kernel_size": 0}, ValueError, "kernel_size: expected at least 1, got 0"),
        ({"stride": 1.5}, TypeError, "stride: expected an int"),
        ({"padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"hidden_channels": -2}, ValueError, "hidden_channels: expected at least 1"),
        ({"zero_init": "gate"}, ValueError, "zero_init: expected 'norm', 'conv' or None, got 'gate'"),
        ({"logit": 3}, TypeError, "logit: expected a string, a module or a function, got int"),
        ({"logit": "max"}, ValueError, "'bottleneck', 'projection', 'simplified', 'identity', .*, got 'max'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LIPPool2d(**{"channels": 6, **arguments})


@pytest.mark.parametrize("form", ["projection", "identity"])
@pytest.mark.parametrize(
    "following", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Hardswish(inplace=True)], ids=repr
)
def test_layers_that_follow_may_work_in_place(form: str, following: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), trained(LIPPool2d(6, logit=form)), following, nn.Conv2d(6, 2, 1))
    elsewhere = copy.deepcopy(net)
    elsewhere[2].inplace = False
    x = torch.randn(2, 3, 11, 10)
    for model in (net, elsewhere):
        torch.manual_seed(0)
        model(x).square().sum().backward()
    for got, want in zip(net.parameters(), elsewhere.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("norm", [nn.Sequential(nn.InstanceNorm2d(8), nn.Tanh()), nn.Identity()], ids=["tanh", "none"])
def test_a_layer_in_the_place_of_a_norm_keeps_its_output(norm: nn.Module) -> None:
    pool, seen = LIPPool2d(6, hidden_channels=8), []
    pool.logit.stem.norm1 = norm
    pool.logit.stem.conv1.register_forward_hook(lambda conv, args, output: seen.extend([output, output.clone()]))
    pool(torch.randn(2, 6, 8, 8)).sum().backward()
    assert torch.equal(*seen)


def test_the_input_as_its_own_logit_compiles() -> None:
    pool = LIPPool2d(6, logit="identity")
    x, y = (torch.linspace(-2, 2, 720).reshape(1, 6, 12, 10).requires_grad_() for _ in range(2))
    torch.compile(pool, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    pool(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_bad_input() -> None:
    pool = LIPPool2d(6)
    for shape in ((2, 5, 8, 8), (6, 8), (1, 2, 6, 8, 8)):
        with pytest.raises(ValueError, match=r"input: expected shape \(N, 6, H, W\) or \(6, H, W\), got"):
            pool(torch.randn(shape))
    with pytest.raises(ValueError, match="logit: expected shape"):
        LIPPool2d(6, logit=lambda x: x[..., 1:])(torch.randn(2, 6, 8, 8))


def test_onnx() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    pool = trained(LIPPool2d(6, hidden_channels=8)).eval()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4, max=64)}
    program = torch.onnx.export(pool, (torch.randn(2, 6, 12, 12),), dynamo=True, verbose=False, dynamic_shapes=(sizes,))
    assert program is not None
    evaluator = ReferenceEvaluator(onnx.load_from_string(program.model_proto.SerializeToString()))
    x = torch.randn(3, 6, 15, 12)
    actual = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(actual), pool(x).detach(), atol=1e-4, rtol=1e-4)
