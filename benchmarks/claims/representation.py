"""Measures of features and pictures: linear probe, nearest neighbours, Fréchet distance."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from benchmarks.claims import canvas
from benchmarks.claims.training import Data, train
from paper_layers import knn
from paper_layers.big_bigan import bn_crelu

NEIGHBORS = 10


def normalized(train_features: Tensor, test_features: Tensor) -> tuple[Tensor, Tensor]:
    """Apply BN+CReLU to both, with the statistics of the first."""
    mean, var = train_features.mean(0), train_features.var(0, unbiased=False)
    return bn_crelu(train_features, mean, var), bn_crelu(test_features, mean, var)


def linear_probe(train_data: Data, test_data: Data) -> float:
    """Return the test accuracy, in percent, of a logistic regression."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=1000).fit(*(part.numpy() for part in train_data))
    return 100 * float(probe.score(*(part.numpy() for part in test_data)))


def knn_accuracy(train_data: Data, test_data: Data) -> float:
    """Return the accuracy, in percent, of the majority of the nearest training features."""
    index, _ = knn(test_data[0], train_data[0], k=NEIGHBORS)
    votes = torch.nn.functional.one_hot(train_data[1][index]).sum(1)
    return 100 * (votes.argmax(1) == test_data[1]).float().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the Fréchet distance of two sets of features (N, C), taken as normal distributions."""
    means, covariances = zip(*((t.mean(0), torch.cov(t.T)) for t in (a.double(), b.double())), strict=True)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    apart = (means[0] - means[1]).square().sum()
    return float(apart + covariances[0].trace() + covariances[1].trace() - 2 * overlap)


@functools.lru_cache(maxsize=1)
def digits(path: str | None, size: int) -> tuple[Data, Data]:
    """Load training and test images (N, 1, size, size), from -1 to 1, and labels."""
    parts = canvas.split(*canvas.digits(path, size))
    train_part, test_part = ((images[:, None] * 2 - 1, labels) for images, labels in parts)
    return train_part, test_part


class Judge(nn.Module):
    """A small classifier; pictures are compared by its last features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()),
            *(nn.LazyLinear(32), nn.ReLU()),
        )
        self.classes = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.features(images))


@functools.lru_cache(maxsize=1)
def judge(path: str | None, size: int, steps: int = 600) -> Judge:
    """Train the classifier, the same every time for the same data."""
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        data = digits(path, size)[0]
        model = Judge()
        model(data[0][:1])
        train(model, data, steps, 0, 64)
    return model.eval().requires_grad_(False)
