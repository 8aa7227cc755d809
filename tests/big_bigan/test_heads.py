"""The heads against formulas from the paper, and in torch's machinery."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.big_bigan import (
    BigBiGANDiscriminator,
    BigBiGANHeads,
    JointHead,
    LatentHead,
    ProjectionScore,
    ResidualMLP,
    Scores,
    UnaryHead,
    bn_crelu,
)

SMALL: dict[str, Any] = {"hidden_features": 12, "depth": 4}


def trunk() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())


def discriminator(**options: Any) -> BigBiGANDiscriminator:
    return BigBiGANDiscriminator(trunk(), 8, 5, **{**SMALL, **options})


def pairs(n: int = 6, **factory: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 9, 9, **factory), torch.randn(n, 5, **factory)


def normal(layer: nn.Module) -> Tensor:
    """Return the layer's weight over its largest singular value."""
    weight = layer.parametrizations.weight.original.detach()
    return weight / torch.linalg.matrix_norm(weight, 2)


def settle(module: nn.Module) -> nn.Module:
    """Set random weights and converged power iterations."""
    for layer in module.modules():
        if nn.utils.parametrize.is_parametrized(layer, "weight"):
            weight = layer.parametrizations.weight  # type: ignore[union-attr]
            nn.init.normal_(weight.original)
            left, _, right = torch.linalg.svd(weight.original)
            weight[0]._u.copy_(left[:, 0])
            weight[0]._v.copy_(right[0])
        if isinstance(getattr(layer, "bias", None), Tensor):
            nn.init.normal_(layer.bias)
    return module.eval()


# --- formulas


@pytest.mark.parametrize("activation", ["pre", "post"])
def test_formula(activation: str) -> None:
    """The scores in float64, from weights over their largest singular values."""
    net = settle(discriminator(activation=activation).double())
    images, latents = pairs(dtype=torch.double)

    def mlp(part: Any, x: Tensor) -> Tensor:
        for number, block in enumerate(part.blocks):
            skip = x if block.skip is None else x @ normal(block.skip).T
            h = F.relu(x) if activation == "pre" and number else x
            h = F.relu(h @ normal(block.fc1).T + block.fc1.bias) @ normal(block.fc2).T + block.fc2.bias
            x = skip + h if activation == "pre" else F.relu(skip + h)
        return F.relu(x)

    def score(part: Any, h: Tensor) -> Tensor:
        return (h @ normal(part.projection).T + part.projection.bias).squeeze(1)

    f = F.relu(F.conv2d(images, net.trunk[0].weight, net.trunk[0].bias, stride=2)).sum((2, 3))
    h = mlp(net.heads.z.mlp, latents)
    j = mlp(net.heads.xz.mlp, torch.cat([f, h], 1))
    expected = Scores(score(net.heads.x.score, f), score(net.heads.z.score, h), score(net.heads.xz.score, j))
    torch.testing.assert_close(net(images, latents), expected, rtol=1e-10, atol=1e-10)
    assert sum(isinstance(layer, nn.Linear) for layer in net.heads.xz.mlp.modules()) == 4 + 1  # And the first skip.


def test_class_projection() -> None:
    net = settle(discriminator(num_classes=4, projection_spectral_norm=False).double())
    images, latents = pairs(dtype=torch.double)
    labels = torch.tensor([0, 3, 1, 2, 0, 1])
    one, other = (net(images, latents, y) for y in (labels, labels.flip(0)))
    table = net.heads.x.score.classes.weight
    difference = ((table[labels] - table[labels.flip(0)]) * net.features(images)).sum(1)
    torch.testing.assert_close(one.x - other.x, difference)
    assert torch.equal(one.z, other.z)
    assert not torch.allclose(one.xz, other.xz)


def test_latents() -> None:
    head = LatentHead(8, 5, **SMALL).double()
    features = torch.randn(4000, 8, 2, 2, dtype=torch.double)[:1].expand(4000, -1, -1, -1)
    latent = head(features)
    raw = head.linear(head.mlp(features.mean((2, 3))))
    torch.testing.assert_close(latent.mean, raw[:, :5])
    torch.testing.assert_close(latent.std, (1 + raw[:, 5:].exp()).log())
    sample = latent.sample()
    torch.testing.assert_close(sample.mean(0), latent.mean[0], rtol=0, atol=0.06)
    torch.testing.assert_close(sample.std(0), latent.std[0], rtol=0.06, atol=0)
    sample.square().sum().backward()
    assert head.linear.weight.grad.count_nonzero(1).all()  # Mean and deviation get gradients.


def test_bn_crelu() -> None:
    x = torch.randn(50, 3, 4, dtype=torch.double) * 5 + 2
    mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
    a = (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    expected = torch.cat([a.clamp(min=0), (-a).clamp(min=0)], 1)
    torch.testing.assert_close(bn_crelu(x), expected)
    torch.testing.assert_close(bn_crelu(x[:7], mean, var), expected[:7])


# --- trunks and terms


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_any_trunk(pool: str) -> None:
    maps = torch.randn(2, 8, 3, 4)
    options: dict[str, Any] = {"pool": pool, **SMALL}
    rows = maps.sum((2, 3)) if pool == "sum" else maps.mean((2, 3))
    for features, expected in ((maps, rows), (maps.flatten(2).mT, rows), (rows, rows)):
        net = BigBiGANDiscriminator(nn.Identity(), 8, 5, **options)
        torch.testing.assert_close(net.features(features), expected)


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 32), ("vit_tiny_patch16_224", 224)])
def test_timm(name: str, size: int) -> None:
    from testing import torchvision_stub  # noqa: F401 (before timm)

    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=0)
    net = BigBiGANDiscriminator(model, model.num_features, 5, **SMALL)
    scores = net(torch.randn(2, 3, size, size), torch.randn(2, 5))
    assert all(score.shape == (2,) for score in scores)


@pytest.mark.parametrize("terms", [("x",), ("xz",), ("x", "z"), ("x", "xz"), ("z", "xz"), ("xz", "z", "x")])
def test_terms_build_what_they_need(terms: tuple[str, ...]) -> None:
    net = discriminator(terms=terms)
    images, latents = pairs()
    scores = net(images, latents)
    assert set(scores.terms) == set(terms)
    torch.stack([*scores.terms.values()]).sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # DDP waits for all gradients.
    if terms == ("x",):
        assert torch.equal(net.eval()(images).x, net(images, latents).x)


# --- torch's machinery


def test_checkpoint_keeps_vectors_and_copies_are_equal() -> None:
    net = discriminator()
    net(*pairs())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = discriminator()
    other.load_state_dict(torch.load(file, weights_only=True))
    batch = pairs()
    for twin in (other, copy.deepcopy(net)):
        vectors = {name: value for name, value in twin.named_buffers() if name.endswith(("_u", "_v"))}
        assert len(vectors) == 2 * sum(isinstance(m, nn.Linear) for m in twin.modules())
        for name, value in vectors.items():
            assert torch.equal(value, net.get_buffer(name))
        torch.testing.assert_close(twin.eval()(*batch), net.eval()(*batch), rtol=0, atol=0)


def test_no_pickle_with_spectral_norm_but_without() -> None:
    head = UnaryHead(5, **SMALL, spectral_norm=False, projection_spectral_norm=False)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    x = torch.randn(2, 5)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), head(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(discriminator(), io.BytesIO())


@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    net = discriminator(num_classes=3).train(training)
    twin = copy.deepcopy(net)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batch = pairs()
    expected = net(*batch, labels)
    torch.stack(list(expected)).sum().backward()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    scores = compiled(*batch, labels)
    torch.stack(list(scores)).sum().backward()
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close([p.grad for p in twin.parameters()], [p.grad for p in net.parameters()])
    torch.testing.assert_close(list(twin.buffers()), list(net.buffers()))


def test_compile_the_sample() -> None:
    head = LatentHead(8, 5, **SMALL)
    sample = torch.compile(lambda x: head(x).sample(), backend="aot_eager", fullgraph=True)
    features = torch.randn(4, 8)
    torch.manual_seed(3)
    expected = head(features).sample()
    torch.manual_seed(3)
    torch.testing.assert_close(sample(features), expected)
    assert not torch.equal(sample(features), sample(features))


def test_inductor() -> None:
    net = discriminator(depth=2).eval()
    batch = pairs()
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(*batch), net(*batch))


def test_export() -> None:
    net = discriminator().eval()
    batch = pairs()
    torch.testing.assert_close(torch.export.export(net, batch).module()(*batch), net(*batch))


def test_save_exported_programs() -> None:
    encoder = nn.Sequential(trunk(), LatentHead(8, 5, **SMALL)).eval()
    for net, inputs in ((discriminator().eval(), pairs()), (encoder, pairs()[:1])):
        file = io.BytesIO()
        torch.export.save(torch.export.export(net, inputs), file)
        file.seek(0)
        output, expected = torch.export.load(file).module()(*inputs), net(*inputs)
        assert type(output) is type(expected)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    net, encoder = discriminator(num_classes=3), nn.Sequential(trunk(), LatentHead(8, 5, **SMALL))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    images, latents = pairs()
    expected = copy.deepcopy(net)(images, latents, labels)
    with torch.autocast("cpu", dtype):
        scores = net(images, latents, labels)
        latent = encoder(images)
    assert all(score.dtype == torch.float32 for score in scores)
    assert all(part.dtype == torch.float32 for part in latent)
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.05)
    torch.stack(list(scores)).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_half_and_meta() -> None:
    net = discriminator(device="cpu", dtype=torch.bfloat16)
    net.trunk.bfloat16()
    scores = net(*pairs(dtype=torch.bfloat16))
    assert all(score.dtype == torch.float32 for score in scores)
    meta = BigBiGANHeads(8, 5, **SMALL, device="meta")
    assert meta(torch.empty(2, 8, device="meta"), torch.empty(2, 5, device="meta")).xz.shape == (2,)
    heads = meta.to_empty(device="cpu")
    old = list(heads.parameters())
    heads.reset_parameters()
    assert all(a is b for a, b in zip(old, heads.parameters(), strict=True))
    for layer in heads.modules():
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0))
            assert layer.bias is None or not layer.bias.any()


def test_discriminator_resets_its_heads() -> None:
    net = discriminator(spectral_norm=False, projection_spectral_norm=False)
    kept = net.trunk[0].weight.clone()
    for layer in (module for module in net.heads.modules() if isinstance(module, nn.Linear)):
        nn.init.zeros_(layer.weight)
    net.reset_parameters()
    assert all(layer.weight.any() for layer in net.heads.modules() if isinstance(layer, nn.Linear))
    assert torch.equal(net.trunk[0].weight, kept)


def test_repr_has_the_arguments() -> None:
    text = repr(discriminator(terms=("x", "xz"), activation="post"))
    assert all(
        part in text for part in ("8, 5, terms=('x', 'xz')", "pool='sum'", "hidden_features=12, depth=4", "'post'")
    )


# --- bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: discriminator(terms=("x", "y")), ValueError, "terms: expected some of 'x', 'z', 'xz', got 'y'"),
        (lambda: discriminator(terms=()), ValueError, "terms: .* got \\(\\)"),
        (lambda: discriminator(terms=("z",)), ValueError, "terms: .* images"),
        (lambda: discriminator(pool="max"), ValueError, "pool: .* 'max'"),
        (lambda: discriminator(activation="mid"), ValueError, "activation: .* 'mid'"),
        (lambda: discriminator(depth=3), ValueError, "depth: .* even .* 3"),
        (lambda: discriminator(hidden_features=0), ValueError, "hidden_features: .* at least 1, got 0"),
        (lambda: discriminator(width=3), TypeError, "'width'"),
        (lambda: discriminator(num_classes=1.5), TypeError, "num_classes: expected an int"),
        (lambda: BigBiGANDiscriminator(F.relu, 8, 5), TypeError, "trunk: expected a Module"),  # type: ignore[arg-type]
        (lambda: LatentHead(8, 0), ValueError, "latent_dim: "),
        (lambda: ResidualMLP(0), ValueError, "in_features: "),
        (
            lambda: ProjectionScore(4)(torch.randn(2, 5)),
            ValueError,
            "features: expected shape \\(N, 4\\).* got \\(2, 5\\)",
        ),
        (lambda: ProjectionScore(4)(torch.zeros(2, 4, dtype=torch.int64)), TypeError, "features: .*int64"),
        (
            lambda: JointHead(4, 3, **SMALL)(torch.randn(2, 4), torch.randn(3, 3)),
            ValueError,
            "hidden: .*\\(2, 3\\).*\\(3",
        ),
        (lambda: discriminator()(pairs()[0], torch.randn(6, 4)), ValueError, "latents: expected shape \\(6, 5\\)"),
        (lambda: discriminator()(pairs()[0], torch.randn(5, 5)), ValueError, "latents: .* got \\(5, 5\\)"),
        (lambda: discriminator()(pairs()[0]), ValueError, "latents: .* got None"),
        (
            lambda: BigBiGANDiscriminator(trunk(), 9, 5, **SMALL)(*pairs()),
            ValueError,
            "trunk.*C = in_features.*\\(N, 9\\).* got \\(6, 8, 4, 4",
        ),
        (lambda: discriminator()(*pairs(), torch.zeros(6).long()), ValueError, "labels: expected None without num_cl"),
        (lambda: discriminator(num_classes=3)(*pairs()), ValueError, "labels: expected a label of 3 .* got None"),
        (lambda: discriminator(num_classes=3)(*pairs(), torch.zeros(5).long()), ValueError, "labels: .*\\(6,\\).*\\(5"),
        (lambda: discriminator(num_classes=3)(*pairs(), torch.zeros(6)), TypeError, "labels: expected an int64"),
        (lambda: bn_crelu(torch.randn(4)), ValueError, "features: "),
        (lambda: bn_crelu(torch.randn(4, 2), torch.zeros(2)), ValueError, "var: "),
        (lambda: bn_crelu(torch.randn(4, 2), torch.zeros(3), torch.ones(2)), ValueError, "mean: .*\\(2,\\).*\\(3,\\)"),
    ],
)
def test_bad_input(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    score, features, labels = ProjectionScore(4, num_classes=3).eval(), torch.randn(3, 4), torch.tensor([2, 0, 1])
    assert torch.equal(score(features, labels.to(dtype)), score(features, labels))
