"""The networks that AdvProp's claim compares, and the comparison of their accuracies."""

from __future__ import annotations

import torch

from benchmarks.claims import adv_prop
from benchmarks.claims.adv_prop import Measured, Outcome


def test_without_attack_all_ways_are_the_same_training() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(40, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(40) % 10
    models = [adv_prop.trained(way, (0.0, 0.0, 1), 0, 3, data) for way in ("vanilla", "shared", "split")]
    plain = [models[0], models[1], *adv_prop.branches(models[2], "split")]
    torch.manual_seed(0)
    start = adv_prop.network().state_dict()
    for model in plain[1:]:
        pairs = {name: (value, plain[0].state_dict()[name]) for name, value in model.state_dict().items()}
        # Unbiased variances; shared norms see twice as many values.
        close = [
            torch.isclose(*pair, rtol=1e-2, atol=1e-4) for name, pair in pairs.items() if "running_var" not in name
        ]
        # Adam turns rounding errors into whole steps where a gradient is 0.
        assert torch.cat([part.flatten() for part in close]).double().mean() > 0.99
    assert not torch.allclose(plain[0].state_dict()["0.weight"], start["0.weight"], atol=1e-3)


def test_rows() -> None:
    def outcome(*clean: float) -> Outcome:
        return Outcome([Measured(value, value / 2, [value / 4] * len(adv_prop.STRENGTHS)) for value in clean], 1.0)

    weak, strong = adv_prop.ATTACKS[0], adv_prop.ATTACKS[-1]
    outcomes = {("vanilla", strong): [outcome(90), outcome(92)]}
    outcomes |= {("shared", weak): [outcome(80), outcome(84)], ("split", weak): [outcome(91, 70), outcome(95, 72)]}
    found = adv_prop.rows(outcomes)
    assert [(row["way"], row["branch"]) for row in found] == [
        ("vanilla", "main"),
        ("shared", "main"),
        ("split", "main"),
        ("split", "auxiliary"),
    ]
    assert [row["clean_minus_vanilla"]["mean"] for row in found] == [0, -9, 2, -20]
    assert [row["clean_minus_shared"]["values"] for row in found[2:]] == [[11, 11], [-10, -12]]
    assert found[3]["corrupted"]["mean"] == 35.5
    assert "91.00 ± " in adv_prop.table(found)
