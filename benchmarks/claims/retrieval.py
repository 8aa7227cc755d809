"""Small data sets for retrieval; the test classes are new, or finer than the training classes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Retrieval(NamedTuple):
    train: Tensor  # (N, features)
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor  # Not the classes of the training.


def halves(seed: int) -> Tensor:
    """Assign each digit to one of two classes, five to each."""
    return torch.randperm(10, generator=torch.Generator().manual_seed(seed)) % 2


def digits(seed: int) -> Retrieval:
    """Load scikit-learn's digits: train on half as two classes of five digits, test on half as ten classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs, labels = torch.from_numpy(data.data).float()[order] / 16, torch.from_numpy(data.target)[order]
    half = len(order) // 2
    return Retrieval(inputs[:half], halves(seed)[labels[:half]], inputs[half:], labels[half:])


def letters(path: str | Path) -> Retrieval:
    """Load UCI's letter recognition (lines of a letter and 16 numbers): train on A to M, test on N to Z."""
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 17 and len(row[0]) == 1]
    labels = torch.tensor([ord(row[0]) - ord("A") for row in rows])
    inputs = torch.tensor([[float(value) for value in row[1:]] for row in rows])
    train = labels < 13
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    return Retrieval(inputs[train], labels[train], inputs[~train], labels[~train])
