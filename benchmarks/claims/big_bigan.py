"""BigBiGAN's claims at small scale: unary scores and a random encoder improve pictures and features.

The same convolutional players are trained equally long on digits (data, steps, batches, rates). The variants differ in
the discriminator's scores (images, latents, pairs), and in the encoder's latents (samples or means). Measured are

- pictures: Fréchet distance between test images and pictures of G's running average, in the last features of a small,
  fixed classifier;
- features: accuracy of a linear classifier and of nearest neighbours on the frozen encoder's last hidden layer,
  normalized by `bn_crelu`. The baseline is the untrained encoder.

Results for 10,000 digits of MNIST (benchmarks/results/claims_big_bigan.json): the encoder learns with any scores, from
89 to 92 % by linear classifier; three seeds show no benefit of the unary scores, neither in pictures nor in features.
A deterministic encoder is worse: linear classifier 90 %, nearest neighbours 88 instead of 91 %, Fréchet distance 7.1
instead of 6.2. Steps and learning rates were chosen in a few trials on the same test images.

    python -m benchmarks.claims.big_bigan [--path PATH] [--seeds 3] [--steps 4000] [--processes 2] [--work FOLDER]
        [--quick] [--json PATH]

PATH is an npz file with images (N, H, W) and labels (N,), such as MNIST's; default scikit-learn's digits. FOLDER
keeps finished trainings and the state of interrupted ones; the same command resumes there. The result file, and a plot
beside it, are written after each seed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.claims import adversarial
from benchmarks.claims.adversarial import LATENT, SIZE, Training, Variant
from benchmarks.claims.command import data_name, head, parser
from benchmarks.claims.representation import digits, frechet_distance, judge, knn_accuracy, linear_probe, normalized
from benchmarks.claims.summaries import minus, summary, with_leads
from benchmarks.claims.training import in_parallel

VARIANTS = {
    "all three": Variant(),
    "joint + x": Variant(("x", "xz")),
    "joint + z": Variant(("z", "xz")),
    "joint only (BiGAN)": Variant(("xz",)),
    "deterministic encoder": Variant(stochastic=False),
}
OURS, UNTRAINED = "all three", "untrained"
NAMES = {"frechet": "Fréchet distance", "probe": "linear probe, %", "neighbors": "nearest neighbours, %"}
_BATCH = 500  # Images at a time in evaluation.


@dataclass(frozen=True)
class Outcome:
    """Scores of one training."""

    frechet: float
    probe: float
    neighbors: float


@torch.no_grad()
def assess(training: Training, path: str | None) -> Outcome:
    """Measure the players as they are."""
    train_data, test_data = digits(path, SIZE)
    encoder, generator = training.encoder.eval(), training.average.eval()
    latents = torch.randn(len(test_data[0]), LATENT, generator=torch.Generator().manual_seed(0))
    features = normalized(*(_by_batch(encoder.features, data[0]) for data in (train_data, test_data)))
    pairs = tuple((part, data[1]) for part, data in zip(features, (train_data, test_data), strict=True))
    space = judge(path, SIZE).features
    distance = frechet_distance(space(_by_batch(generator, latents)), space(test_data[0]))
    encoder.train()
    return Outcome(distance, linear_probe(*pairs), knn_accuracy(*pairs))


def _by_batch(function: Any, inputs: Tensor) -> Tensor:
    return torch.cat([function(part) for part in inputs.split(_BATCH)])


def run(name: str, seed: int, steps: int, path: str | None, work: str, progress: bool = False) -> Outcome:
    """Return a variant's outcome, from the files in `work` if they exist."""
    kept = Path(work) / f"{'data' if path is None else Path(path).stem}-{steps}-{name.replace(' ', '-')}-{seed}.json"
    if not kept.exists():
        training = Training(VARIANTS.get(name, Variant()), seed)
        if name != UNTRAINED:
            title = f"{name}, seed {seed}" if progress else None
            training.run(digits(path, SIZE)[0][0], steps, kept.with_suffix(".pt"), progress=title)
        outcome = asdict(assess(training, path))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(outcome))
    return Outcome(**json.loads(kept.read_text()))


def rows(outcomes: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """Return each variant's scores, their mean, and their differences from all three terms, seed by seed."""
    found = []
    for name, runs in outcomes.items():
        row: dict[str, Any] = {"name": name}
        for score in NAMES:
            mine, reference = ([getattr(run, score) for run in part] for part in (runs, outcomes[OURS]))
            row[score] = summary(mine, minus_all_three=minus(mine, reference))
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Format the rows as a table."""
    head = [column for name in NAMES.values() for column in (name, "- all three")]
    lines = [[row["name"], *with_leads(row, NAMES, "minus_all_three", OURS, digits=2)] for row in found]
    return command.text_table(["", *head], lines)


def picture(found: list[dict[str, Any]]) -> Any:
    """Plot all values and their means, one panel per score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axes, (score, title) in zip(figure.subplots(1, len(NAMES), sharey=True), NAMES.items(), strict=True):
        for place, row in enumerate(found):
            if score == "frechet" and row["name"] == UNTRAINED:
                continue  # A hundred times larger than the others.
            values = row[score]["values"]
            axes.plot(
                values, [place] * len(values), "o", color="#c2410c" if row["name"] == OURS else "#78716c", alpha=0.6
            )
            axes.plot(row[score]["mean"], place, "|", markersize=18, color="#292524")
        axes.set_yticks(range(len(found)), [row["name"] for row in found])
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    return figure


def main() -> None:
    path = ("--path", "npz file of digits; default scikit-learn's")
    arguments = parser(__doc__, seeds=3, steps=4000, path=path)
    arguments.add_argument("--processes", type=int, default=os.cpu_count(), help="1 shows the steps of each training")
    arguments.add_argument("--work", default="out/claims_big_bigan", help="folder of what is done already")
    options = arguments.parse_args()
    if options.quick:
        options.seeds, options.steps = 2, 10

    content = head(__doc__)
    content |= {"data": data_name(options.path), "images": [len(part[0]) for part in digits(options.path, SIZE)]}
    content |= {"steps": options.steps, "batch": adversarial.BATCH, "latent": LATENT, "rates": adversarial.RATES}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*VARIANTS, UNTRAINED)}
    for seed in range(options.seeds):
        jobs = [(name, seed, options.steps, options.path, options.work) for name in outcomes]
        if options.processes == 1:
            torch.set_num_threads(1)
            results = [run(*job, progress=True) for job in jobs]
        else:
            results = in_parallel(run, jobs, f"seed {seed}", options.processes)
        for name, result in zip(outcomes, results, strict=True):
            outcomes[name].append(result)
        content |= {"seeds": seed + 1, "results": rows(outcomes)}
        print(f"\n{table(content['results'])}")
        if options.json:
            command.save(options.json, content, lambda: picture(rows(outcomes)))


if __name__ == "__main__":
    main()
