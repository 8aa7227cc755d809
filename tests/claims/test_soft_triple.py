"""The trainings that SoftTriple's claim compares, and the comparison of their scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.claims import retrieval, soft_triple
from benchmarks.claims.soft_triple import BASELINE, TRIPLETS, WAYS, Outcome


def test_digits_are_halved_by_the_seed() -> None:
    one, same, other = (retrieval.digits(seed) for seed in (0, 0, 1))
    assert torch.equal(one.train_labels, same.train_labels)
    assert not torch.equal(one.train_labels, other.train_labels)
    assert torch.equal(one.test, other.test)
    assert one.test_labels.unique().tolist() == [*range(10)]
    assert retrieval.halves(3).bincount().tolist() == [5, 5]


def test_letters(tmp_path: Path) -> None:
    file = tmp_path / "letters.data"
    lines = [f"{letter},{','.join(str(i + n) for i in range(16))}" for n, letter in enumerate("AMNZ")]
    file.write_text("\n".join(["letter,x", *lines]) + "\n")
    data = retrieval.letters(file)
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 12], [13, 25])
    torch.testing.assert_close(data.train, torch.tensor([[-1.0], [1.0]]).expand(2, 16) * 0.5**0.5)
    torch.testing.assert_close(data.test - data.train[1], torch.tensor([[1.0], [2.0]]).expand(2, 16) * 2**0.5)


def test_batches_of_triplets() -> None:
    labels = torch.arange(9) % 3  # Three samples per class.
    for seed in range(5):
        rows = soft_triple._four_each(labels, torch.Generator().manual_seed(seed))
        groups = labels[rows].reshape(-1, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups.unique()) > 1


@pytest.mark.parametrize("way", [BASELINE, "K 10, tau 0.2", TRIPLETS])
def test_run(way: str) -> None:
    found, again = (soft_triple.run(("digits", way), 0, 3) for _ in range(2))
    assert 50 < found.recall <= 100
    assert (found.recall, found.nmi) == (again.recall, again.nmi)
    assert found.distinct == WAYS[way].get("centers_per_class", 0)  # None has merged yet.
    torch.testing.assert_close(found.embeddings.norm(dim=1), torch.ones(len(found.embeddings)))


def test_rows() -> None:
    nothing = torch.empty(0)
    baseline, mine = (
        [Outcome(recall, nmi, distinct, nothing, nothing) for recall, nmi, distinct in values]
        for values in ([(90, 50, 1), (92, 40, 1)], [(91, 55, 4), (95, 45, 5)])
    )
    found = soft_triple.row("digits", "K 10, tau 0", mine, baseline)
    assert (found["recall"]["mean"], found["recall"]["above_softmax"]) == (93, 2)
    assert (found["nmi"]["above_softmax"], found["nmi"]["above_softmax_interval"]) == (5, 0)
    assert found["distinct"]["mean"] == 4.5
    text = soft_triple.table([soft_triple.row("digits", BASELINE, baseline, baseline), found])
    assert "93.0 ± " in text
    assert "+5.0 ± 0.0" in text
