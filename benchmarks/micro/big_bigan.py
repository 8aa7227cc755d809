"""BigBiGAN's heads in the discriminator's step, against their own matrix products and power iterations.

A step computes the three scores of 256 real and 256 fake pairs of features and latents in one forward, the hinge loss,
and the gradients of all parameters and of the features. The limit is what every implementation must compute: three
matrix products per layer (two if its input needs no gradient) and two matrix-vector products for its spectral norm.

python -m benchmarks.micro.big_bigan [--device cuda] [--threads 2] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.micro.command import Options, Target, main
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result
from paper_layers.big_bigan import BigBiGANHeads, SpectralLinear, discriminator_loss

PAIRS = 256  # Number of real pairs, and of fake pairs.
LATENT = 120
SIZES = ((512, 512), (1536, 2048))  # Input features and hidden features.
TARGET = 1.15  # Time over the limit's time.


def step(heads: BigBiGANHeads, features: Tensor, latents: Tensor, *parameters: Tensor) -> Tensor:
    return discriminator_loss(*heads(features, latents).split(PAIRS))


def in_two_calls(heads: BigBiGANHeads, features: Tensor, latents: Tensor, *parameters: Tensor) -> Tensor:
    real, fake = (heads(*half) for half in zip(features.split(PAIRS), latents.split(PAIRS), strict=True))
    return discriminator_loss(real, fake)


def inputs(case: Case) -> Inputs:
    in_features, width = case.params["features"], case.params["width"]
    heads = BigBiGANHeads(in_features, LATENT, hidden_features=width, device=case.device)
    features = torch.randn(2 * PAIRS, in_features, device=case.device, requires_grad=True)
    return heads, features, torch.randn(2 * PAIRS, LATENT, device=case.device), *heads.parameters()


def inputs_of_torch(case: Case) -> Inputs:
    """Make the same inputs, in a process that uses torch's own layers and parametrization."""
    SpectralLinear.forward = nn.Linear.forward  # type: ignore[method-assign]
    return inputs(case)


def products(layers: list[tuple[Tensor, ...]]) -> Tensor:
    result = torch.empty(0)
    for x, weight, grad, u, v in layers:
        torch.mv(weight, v)
        torch.mv(weight.mT, u)
        torch.mm(x, weight.mT)
        torch.mm(grad.mT, x)
        result = torch.mm(grad, weight) if x.shape[1] != LATENT else grad
    return result


def inputs_of_products(case: Case) -> Inputs:
    """Make the operands of each linear layer, in separate memory: input, weight, gradient and two vectors."""
    heads = inputs(case)[0]
    shapes = [(m.out_features, m.in_features) for m in heads.modules() if isinstance(m, nn.Linear)]
    rows = 2 * PAIRS
    return (
        [
            tuple(torch.randn(size, device=case.device) for size in ((rows, i), (o, i), (rows, o), (o,), (i,)))
            for o, i in shapes
        ],
    )


OURS, COMPILED, TWO, PEER = "BigBiGANHeads", "the same, compiled", "two calls, real and fake", "torch's spectral_norm"
LIMIT = Contender("limit: products", products, "limit", inputs=inputs_of_products)
CONTENDERS = (
    Contender(OURS, step, "ours"),
    Contender(COMPILED, step, "other", compiled=True),
    Contender(TWO, in_two_calls, "other"),
    Contender(PEER, step, "peer", inputs=inputs_of_torch),
)


def plan(options: Options) -> list[Comparison]:
    sizes = SIZES[:1] if options.quick else SIZES
    # The bytes moved determine how much of the heap is touched beforehand.
    cases = [Case({"features": f, "width": width}, inputs, 16 * 4 * width**2, True) for f, width in sizes]
    return [Comparison(CONTENDERS, cases, LIMIT)]


def targets(results: Sequence[Result], device: str) -> Iterator[Target]:
    for r in results:
        if r.contender in (OURS, COMPILED) and not r.error:
            yield Target(
                f"width {r.params['width']}, {r.contender}: times the limit", TARGET, [r.to_limit], at_most=True
            )


if __name__ == "__main__":
    title = f"BigBiGAN's heads, a discriminator's step on {PAIRS} real and {PAIRS} fake pairs"
    main(title, plan, doc=__doc__, quick="width 512 alone, fewer rounds", targets=targets)
