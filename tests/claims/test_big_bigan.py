"""The training of BigBiGAN's claim, and its scores."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from benchmarks.claims import big_bigan
from benchmarks.claims.adversarial import Training, Variant
from benchmarks.claims.big_bigan import VARIANTS, rows, run
from benchmarks.claims.representation import frechet_distance, judge, knn_accuracy, linear_probe, normalized


def test_resumed_training_is_the_same(tmp_path: Path) -> None:
    images = torch.rand(80, 1, 16, 16) * 2 - 1
    Training(Variant(), 0).run(images, 1, tmp_path / "state.pt")
    resumed = Training(Variant(), 1)
    resumed.run(images, 3, tmp_path / "state.pt")
    whole = Training(Variant(), 0)
    whole.run(images, 3)
    one, other = whole.state(), resumed.state()
    assert one["done"] == other["done"] == 3
    assert torch.equal(one["rng"], other["rng"])
    torch.testing.assert_close(one["parts"], other["parts"], rtol=0, atol=0)
    assert not torch.equal(whole.average[0].weight, whole.generator[0].weight)


def test_done_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(big_bigan, "judge", functools.partial(judge, steps=2))
    first = run("joint only (BiGAN)", 0, 2, None, str(tmp_path))
    assert run("joint only (BiGAN)", 0, 2, None, str(tmp_path)) == first  # Including the modification time.
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".json"}


def test_variants_start_equal() -> None:
    starts = [Training(variant, 3) for variant in VARIANTS.values()]
    for other in starts[1:]:
        for player in ("encoder", "generator"):
            one, same = (getattr(training, player).state_dict() for training in (starts[0], other))
            torch.testing.assert_close(one, same, rtol=0, atol=0)
        trunks = [training.discriminator.trunk.state_dict() for training in (starts[0], other)]
        torch.testing.assert_close(*trunks, rtol=0, atol=0)


def test_frechet_distance() -> None:
    """Normal distributions along axes: squared distances of means and of standard deviations."""
    a = torch.randn(200_000, 2) * torch.tensor([1.0, 3.0])
    b = torch.randn(200_000, 2) * torch.tensor([2.0, 0.5]) + torch.tensor([4.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(4**2 + 1 + 2.5**2, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_accuracies() -> None:
    labels = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    near, anywhere = (torch.randn(300, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for train, test, lowest, highest in ((near, anywhere, 99, 100),):
        data = ((train + centres[labels], labels), (test + centres[labels], labels))
        assert lowest <= linear_probe(*data) <= highest
        assert lowest <= knn_accuracy(*data) <= highest
    noise = ((near, labels), (anywhere, labels))
    assert linear_probe(*noise) < 50
    assert knn_accuracy(*noise) < 50
    scaled, _ = normalized(near * 7 + 3, anywhere)
    torch.testing.assert_close((scaled[:, :2] - scaled[:, 2:]).std(0, unbiased=False), torch.ones(2))


def test_rows() -> None:
    from benchmarks.claims.big_bigan import Outcome

    outcomes = {
        "all three": [Outcome(1, 90, 80), Outcome(3, 92, 82)],
        "other": [Outcome(2, 80, 70), Outcome(6, 82, 72)],
    }
    other = rows(outcomes)[1]
    assert other["frechet"]["mean"] == 4
    assert other["frechet"]["minus_all_three"] == 2
    assert other["probe"]["minus_all_three_interval"] == 0
