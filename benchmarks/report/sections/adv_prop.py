"""AdvProp: adversarial images, and training on them with one and with two sets of batch norms."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.claims.adv_prop import (
    ATTACKS,
    STRENGTHS,
    TRAIN,
    Measured,
    attacked_images,
    branches,
    datasets,
    draw,
    measured,
    trained,
)
from benchmarks.claims.training import in_parallel
from benchmarks.report.page import ACCENT, Section, code, heading, image_grid, picture, table, text

STEPS = 300
ATTACK = ATTACKS[1]
IMAGES, LEVELS = 8, (0.0, 16.0, 32.0, 64.0)  # Images in the picture.
LOOP = """\
model = swap.split_batch_norm(model)
attack = functools.partial(pgd, radius=76.5, step_size=24, steps=5, bounds=(-1, 1))
for images, labels in batches:
    loss = adv_prop_loss(model, images, labels, attack)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model = swap.plain_batch_norm(model)  # The network as it was, for inference."""


def run(way: str) -> dict[str, tuple[nn.Module, Measured]]:
    """Train one network; return its plain networks and their accuracies."""
    train_data, test_data = datasets(None)
    torch.set_num_threads(1)
    model = trained(way, ATTACK, 0, STEPS, train_data)
    names = [way] if way != "split" else ["split, main", "split, auxiliary"]
    return {name: (plain, measured(plain, test_data)) for name, plain in zip(names, branches(model, way), strict=True)}


def section() -> Section:
    print("\nAdvProp: digits and their adversarial images, with one set of norms and with two")
    parts = in_parallel(run, [(way,) for way in ("split", "shared", "vanilla")], "training")
    found = {name: result for part in reversed(parts) for name, result in part.items()}
    shown = STRENGTHS.index(32)
    head = ("training", "clean", "corrupted", "attacked by 32 grey levels")
    rows = [
        (name, *(f"{value:.1f} %" for value in (score.clean, score.corrupted, score.attacked[shown])))
        for name, (_, score) in found.items()
    ]
    accuracies = table(head, rows)
    models = {name: found[name][0] for name in ("split, main", "split, auxiliary")}
    return Section(
        "AdvProp: adversarial images that help",
        [
            text(
                "An adversarial image differs from a photograph by a few grey levels, such that a network errs. A "
                "network trained on both does worse on the clean ones, unless each kind has batch norms of its own: "
                "then they may help (Xie, Tan, Gong, Wang, Yuille and Le, CVPR 2020). At inference the auxiliary norms "
                "are dropped."
            ),
            code(LOOP),
            heading("Accuracy"),
            text(
                f"The same small network on {TRAIN} of scikit-learn's digits, {STEPS} steps each, one seed: "
                "benchmarks/claims/adv_prop.py has more, and weaker and stronger attacks. What protects from attacks "
                "and corruptions is in the shared norms or in the auxiliary ones, hardly in the main ones."
            ),
            accuracies,
            picture(
                _strength_picture({name: score for name, (_, score) in found.items()}),
                "Accuracy under attacks of growing strength (untargeted, 10 steps) on the norms that answer.",
            ),
            heading("Adversarial images"),
            picture(
                _images_picture(models),
                "Test images attacked through the main norms, and what main / auxiliary norms take them for. Wrong "
                "answers are red.",
            ),
        ],
    )


def _strength_picture(scores: dict[str, Measured]) -> Figure:
    figure = Figure(figsize=(6, 3.2))
    draw(figure.subplots(), {name: (score.clean, *score.attacked) for name, score in scores.items()})
    return figure


def _images_picture(models: dict[str, nn.Module]) -> Figure:
    main, _ = models.values()
    x, y = (values[:IMAGES] for values in datasets(None)[1])
    attacked = {f"eps {eps:g}": attacked_images(main, x, y, eps) for eps in LEVELS}
    look = {"cmap": "gray", "vmin": -1, "vmax": 1}
    lines = [(name, images[:, 0], look) for name, images in attacked.items()]
    figure, grid = image_grid((9.5, 5.6), lines, gap=(0.1, 0.35))
    for row, images in zip(grid, attacked.values(), strict=True):
        answers = [_answers(model, images) for model in models.values()]
        for axes, truth, *two in zip(row, y, *answers, strict=True):
            for answer, place, side in zip(two, (0.42, 0.58), ("right", "left"), strict=True):
                color = ACCENT if bool(answer != truth) else "black"
                axes.text(place, -0.17, f"{answer}", color=color, ha=side, transform=axes.transAxes)
    return figure


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images).argmax(1)
