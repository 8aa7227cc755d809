"""BigBiGAN: samples and reconstructions of digits, and tests of the encoder's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.claims.adversarial import LATENT, SIZE, Training
from benchmarks.claims.big_bigan import OURS, UNTRAINED, VARIANTS, Outcome, assess
from benchmarks.claims.representation import digits
from benchmarks.claims.training import in_parallel
from benchmarks.report.page import Section, bars, code, heading, image_grid, picture, table, text

STEPS = 1200
NAMES = (OURS, "joint only (BiGAN)", UNTRAINED)
SAMPLES, RECONSTRUCTED = (3, 16), 16  # Numbers of images in the pictures.
LOOP = """\
discriminator = BigBiGANDiscriminator(trunk, in_features=512, latent_dim=32)
encoder = nn.Sequential(network, LatentHead(512, latent_dim=32))
for images in batches:
    for step, optimizer in ((discriminator_step, d_optimizer), (encoder_generator_step, eg_optimizer)):
        loss = step(discriminator, encoder, generator, images, torch.randn(len(images), 32)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()"""


def run(name: str) -> tuple[Outcome, Tensor, Tensor]:
    """Train a variant; return its scores, samples, and test images reconstructed from the means of their latents."""
    torch.set_num_threads(1)
    train_data, test_data = digits(None, SIZE)
    training = Training(VARIANTS.get(name, VARIANTS[OURS]), seed=0)
    if name != UNTRAINED:
        training.run(train_data[0], STEPS)
    outcome = assess(training, None)
    training.encoder.eval()
    with torch.no_grad():
        draw = training.average.eval()
        samples = draw(torch.randn(SAMPLES[0] * SAMPLES[1], LATENT, generator=torch.Generator().manual_seed(0)))
        latent: Any = training.encoder(test_data[0][:RECONSTRUCTED])
        return outcome, samples[:, 0], draw(latent.mean)[:, 0]


def section() -> Section:
    print("\nBigBiGAN: pictures and features of digits, without labels")
    results = in_parallel(run, [(name,) for name in NAMES], "training")
    outcomes = {name: result[0] for name, result in zip(NAMES, results, strict=True)}
    _, samples, redrawn = results[0]
    head = ("discriminator's scores", "linear probe", "nearest neighbours", "Fréchet distance")
    rows = [(name, f"{o.probe:.1f} %", f"{o.neighbors:.1f} %", f"{o.frechet:.0f}") for name, o in outcomes.items()]
    scores = table(head, rows)
    train_data, test_data = digits(None, SIZE)
    originals = test_data[0][:RECONSTRUCTED, 0]
    return Section(
        "BigBiGAN: a generator and an encoder that train each other",
        [
            text(
                "A generator draws images from latents, an encoder finds latents of images, and a discriminator has to "
                "tell the pairs apart, by the image (s_x), the latent (s_z) and both (s_xz). Where it cannot, the "
                "encoder inverts the generator, and its features have been learned without a label (Donahue and "
                "Simonyan, NeurIPS 2019)."
            ),
            code(LOOP),
            heading("Samples"),
            picture(
                _grid_picture(samples.unflatten(0, SAMPLES), [""] * SAMPLES[0]),
                f"Drawn from random latents after {STEPS} steps on {len(train_data[0])} of scikit-learn's digits.",
            ),
            heading("Reconstructions"),
            picture(
                _grid_picture(torch.stack([originals, redrawn]), ("x", "G(E(x))")),
                "Test digits, and what the generator draws from their latents. No loss compares the two: where "
                "they are alike, the discriminator's scores of pairs have made them so.",
            ),
            heading("Features"),
            text(
                "A linear classifier and the nearest neighbours on the frozen encoder's features, beside those of the "
                "untrained encoder, which is good on such small images. One seed and a short training: "
                "benchmarks/claims/big_bigan.py has more of both."
            ),
            scores,
            picture(_bars_picture(outcomes), "Accuracy on test digits, in percent."),
        ],
    )


def _grid_picture(images: Tensor, names: Sequence[str]) -> Figure:
    height, width = images.shape[:2]
    look = {"cmap": "gray_r", "vmin": -1, "vmax": 1}
    lines = [(name, line, look) for name, line in zip(names, images, strict=True)]
    return image_grid((9.5, 9.5 / width * height), lines, gap=(0.08, 0.08), frame=False)[0]


def _bars_picture(outcomes: dict[str, Outcome]) -> Figure:
    figure = Figure(figsize=(9.5, 1.7))
    left, right = figure.subplots(1, 2, sharey=True)
    bars(left, "linear probe", {name: outcome.probe for name, outcome in outcomes.items()}, 1, OURS)
    bars(right, "nearest neighbours", {name: outcome.neighbors for name, outcome in outcomes.items()}, 1, OURS)
    return figure
