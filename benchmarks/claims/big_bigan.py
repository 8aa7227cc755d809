"""BigBiGAN's claims at small scale: what the unary scores and the random encoder bring to pictures and features.

The same convolutional players trained equally long on digits (data, steps, batches, rates), with the scores of images,
latents and pairs that the discriminator has, and the encoder's latents drawn or means:

- pictures: Fréchet distance between those of G's running average and test images, in the last features of a small
  classifier that never changes;
- features: accuracy of a linear classifier and of the nearest neighbours on the encoder's last hidden layer, frozen,
  normalized by `bn_crelu`. The encoder before training is the floor.

What came out for 10,000 digits of MNIST (benchmarks/results/claims_big_bigan.json): the encoder learns, 92 % by linear
classifier against 89 before training, with whatever scores; what the unary ones bring, three seeds do not show, neither
in pictures nor in features. A deterministic encoder is worse: 90 %, nearest neighbours 88 in place of 91, Fréchet
distance 7.1 in place of 6.2. Steps and rates were chosen in a few trials by the same test images.

    python -m benchmarks.claims.big_bigan [--path PATH] [--seeds 3] [--steps 4000] [--processes 2] [--work FOLDER]
        [--quick] [--json PATH]

PATH is an npz file with images (N, H, W) and labels (N,), such as MNIST's; default scikit-learn's digits. Finished
trainings and the state of broken ones are kept in FOLDER, where the same command goes on; the result file, and a
picture beside it, are written after each seed.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims import adversarial
from benchmarks.claims.adversarial import LATENT, SIZE, Training, Variant
from benchmarks.claims.representation import digits, frechet_distance, judge, knn_accuracy, linear_probe, normalized
from benchmarks.claims.training import in_parallel, mean_and_interval
from benchmarks.environment import environment, save

VARIANTS = {
    "all three": Variant(),
    "joint + x": Variant(("x", "xz")),
    "joint + z": Variant(("z", "xz")),
    "joint only (BiGAN)": Variant(("xz",)),
    "deterministic encoder": Variant(stochastic=False),
}
OURS, UNTRAINED = "all three", "untrained"
NAMES = {"frechet": "Fréchet distance", "probe": "linear probe, %", "neighbors": "nearest neighbours, %"}
_BATCH = 500  # Of evaluation.


@dataclass(frozen=True)
class Outcome:
    """Scores of one training."""

    frechet: float
    probe: float
    neighbors: float


@torch.no_grad()
def assess(training: Training, path: str | None) -> Outcome:
    """The scores of the players as they are."""
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
    """The outcome of a variant, of which no more is computed than is missing in `work`."""
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
    """Of each variant the scores, their mean, and how far they are from those of all three terms, seed by seed."""
    found = []
    for name, runs in outcomes.items():
        row: dict[str, Any] = {"name": name}
        for score in NAMES:
            mine, reference = ([getattr(run, score) for run in part] for part in (runs, outcomes[OURS]))
            mean, half = _interval(mine)
            lead, lead_half = _interval([a - b for a, b in zip(mine, reference, strict=True)])
            row[score] = {"values": mine, "mean": mean, "interval": half}
            row[score] |= {"minus_all_three": lead, "minus_all_three_interval": lead_half}
        found.append(row)
    return found


def _interval(values: list[float]) -> tuple[float, float]:
    return mean_and_interval(values) if len(values) > 1 else (values[0], float("nan"))


def table(found: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'':22}" + "".join(f"{name:>24}{'- all three':>16}" for name in NAMES.values())]
    for row in found:
        line = f"{row['name']:22}"
        for score in NAMES:
            value = row[score]
            line += f"{value['mean']:15.2f} ± {value['interval']:6.2f}"
            lead = f"{value['minus_all_three']:+.2f} ± {value['minus_all_three_interval']:.2f}"
            line += f"{'' if row['name'] == OURS else lead:>16}"
        lines.append(line)
    return "\n".join(lines)


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """All values and their means, one panel a score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axes, (score, title) in zip(figure.subplots(1, len(NAMES), sharey=True), NAMES.items(), strict=True):
        for place, row in enumerate(found):
            if score == "frechet" and row["name"] == UNTRAINED:
                continue  # A hundred times as far.
            values = row[score]["values"]
            axes.plot(
                values, [place] * len(values), "o", color="#c2410c" if row["name"] == OURS else "#78716c", alpha=0.6
            )
            axes.plot(row[score]["mean"], place, "|", markersize=18, color="#292524")
        axes.set_yticks(range(len(found)), [row["name"] for row in found])
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="npz file of digits; default scikit-learn's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="1 shows the steps of each training")
    parser.add_argument("--work", default="out/claims_big_bigan", help="folder of what is done already")
    parser.add_argument("--quick", action="store_true", help="does it run, rather than what comes out")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 2, 10

    facts = environment()  # Before the load is our own.
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*VARIANTS, UNTRAINED)}
    for seed in range(options.seeds):
        jobs = [(name, seed, options.steps, options.path, options.work) for name in outcomes]
        if options.processes == 1:
            torch.set_num_threads(1)
            results = [run(*job, progress=True) for job in jobs]
        else:
            results = in_parallel(run, jobs, f"claims of BigBiGAN, seed {seed}", options.processes)
        for name, result in zip(outcomes, results, strict=True):
            outcomes[name].append(result)
        found = rows(outcomes)
        print(f"\n{table(found)}")
        if options.json:
            setup: dict[str, Any] = {"data": Path(options.path).name if options.path else "scikit-learn digits"}
            setup |= {"images": [len(part[0]) for part in digits(options.path, SIZE)], "steps": options.steps}
            setup |= {"seeds": seed + 1, "batch": adversarial.BATCH, "latent": LATENT, "rates": adversarial.RATES}
            save(options.json, {"claim": (__doc__ or "").splitlines()[0], **facts, **setup, "results": found})
            picture(found, Path(options.json).with_suffix(".png"))


if __name__ == "__main__":
    main()
