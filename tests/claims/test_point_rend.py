"""The networks that PointRend's claim compares."""

from __future__ import annotations

import torch

from benchmarks.claims import point_rend


def test_same_start_and_same_labels_where_every_pixel_is_refined() -> None:
    networks = {}
    for way in point_rend.WAYS:
        torch.manual_seed(0)
        networks[way] = point_rend.network(way, 1, 4).eval()
    bilinear, ours, dense = networks.values()
    assert isinstance(ours, point_rend.PointRend)
    assert isinstance(dense, point_rend.Dense)
    head = ours.refine.point_head.state_dict()
    assert head.keys() == dense.head.state_dict().keys()
    for other in (ours, dense):
        for one, same in zip(bilinear.backbone.parameters(), other.backbone.parameters(), strict=True):
            assert torch.equal(one, same)
    for name, value in dense.head.state_dict().items():
        assert torch.equal(value, head[name])

    images = torch.rand(2, 1, 64, 64)
    ours.refine.subdivision_num_points = 64 * 64
    inside = (..., slice(4, -4), slice(4, -4))  # Points near the frame also sample zeros outside the coarse map.
    with torch.no_grad():
        torch.testing.assert_close(ours(images)[inside], dense(images)[inside])
        assert not torch.allclose(dense(images), bilinear(images))
