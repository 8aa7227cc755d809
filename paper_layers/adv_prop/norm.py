"""Batch norms that keep separate statistics and parameters for each split of the batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core._torch_private import BatchNorm
from paper_layers._core.fusing import readable
from paper_layers._core.recompute import recomputing
from paper_layers._core.tracing import Leaf
from paper_layers.adv_prop import _auxiliary
from paper_layers.ops.running_statistics import Running
from paper_layers.ops.split_batch_norm.op import normalize_splits, refuse_one_value


class SplitBatchNorm(Leaf, BatchNorm):
    """Base of the 1d, 2d and 3d norms. Has torch's attributes plus `num_splits` and `split_sizes`.

    Example:
        >>> from paper_layers import SplitBatchNorm, SplitBatchNorm2d
        >>> isinstance(SplitBatchNorm2d(64), SplitBatchNorm)
        True
    """

    aux_bn: _auxiliary.AuxiliaryNorms
    auxiliary_class: type[_auxiliary.AuxiliaryNorm] = _auxiliary.AuxiliaryNorm
    _split: int | None = None  # Set by `use_split`, as is `_update_statistics`.
    _update_statistics = True
    _name_in_model = ""  # Set by a swap, for error messages.

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        num_splits: int = 2,
        split_sizes: Sequence[int] | Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        num_features = checks.integer("num_features", num_features, 0)
        num_splits = checks.integer("num_splits", num_splits, 2)
        settings: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **settings)
        self.num_splits = num_splits
        self.split_sizes = None if split_sizes is None else _plain_sizes(split_sizes, num_splits)
        self.aux_bn = self.new_auxiliaries(self, num_splits, **settings)

    @classmethod
    def new_auxiliaries(cls, main: Any, num_splits: int, **factory: Any) -> _auxiliary.AuxiliaryNorms:
        """Return new auxiliary norms for a main norm.

        Their own momentum is unused, except that `update_bn` of torch sets it to None: see `_is_recalibrated`.
        """
        options = {"affine": main.affine, "track_running_stats": main.track_running_stats, **factory}
        if main.affine and main.bias is None:
            options["bias"] = False
        return _auxiliary.AuxiliaryNorms(
            cls.auxiliary_class(main.num_features, main.eps, **options) for _ in range(num_splits - 1)
        )

    @property
    def split_norms(self) -> list[BatchNorm]:
        """The norm of each split: the main norm, which is this module itself, and the auxiliary norms."""
        # Without the search of `Module.__getattr__`, as in `_tensors`: a third of the time of a small norm.
        return [self, *self._modules["aux_bn"]._modules.values()]  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        """Return the tensors of the split that `use_split` has set, for tools that fold the norm."""
        if self._split and name in _auxiliary.TENSORS:
            return getattr(self.aux_bn[self._split - 1], name)
        return super().__getattr__(name)

    def reset_running_stats(self) -> None:
        """Reset the running statistics of the split that `use_split` has set, else of the main norm.

        `torch.optim.swa_utils.update_bn` then computes the same ones afresh.
        """
        if self._split:
            self.aux_bn[self._split - 1].forget()  # type: ignore[operator]
        else:
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Initialize all splits afresh."""
        super().reset_parameters()
        super().reset_running_stats()
        for norm in getattr(self, "aux_bn", ()):  # torch's constructor calls this before they exist.
            norm.reset_parameters()

    def sizes(self, batch_size: int) -> list[int]:
        """Return how many samples of a batch each split gets in training."""
        if self.split_sizes is None:
            if batch_size % self.num_splits:
                raise ValueError(
                    f"input: expected a batch that num_splits={self.num_splits} divides, got {batch_size}"
                    f"{self._name_in_model and f' in {self._name_in_model}'}; set split_sizes for uneven splits"
                )
            return [batch_size // self.num_splits] * self.num_splits
        if not isinstance(self.split_sizes[0], float):
            return list(self.split_sizes)
        ends = [round(batch_size * share) for share in itertools.accumulate(self.split_sizes)]
        ends[-1] = batch_size
        return [end - start for start, end in itertools.pairwise([0, *ends])]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch: in training split by split, in eval all of it by the main norm.

        The main norm also gets all of a training batch while `torch.optim.swa_utils.update_bn` runs. If `use_split` has
        set a split, its norm gets the whole batch. A split without values keeps its statistics.
        """
        self._check_input_dim(input)
        norms = self.split_norms
        if self._split is not None:
            norms = norms[self._split : self._split + 1]
        elif not self.training or self._is_recalibrated():
            norms = norms[:1]
        for norm in norms:
            if norm is not self and not readable(norm, self.auxiliary_class):
                inputs = input.split(self._sizes_for(input, norms))
                return torch.cat([self._call(norm, one) for norm, one in zip(norms, inputs, strict=True)])
        return self.normalize(input, norms)

    def _call(self, norm: Any, input: Tensor) -> Tensor:
        """Run one split's norm by a call, since it may have hooks, or FSDP2 must gather it."""
        if norm is self:
            return self.normalize(input, [norm])
        norm._owner = (self,)
        try:
            output: Tensor = norm(input)
        finally:
            norm._owner = ()
        return output

    def normalize(self, input: Tensor, norms: list[BatchNorm]) -> Tensor:
        """Normalize a batch by one norm, or each split of it by its own norm."""
        if not self.training and norms[0].running_mean is not None:
            norm = norms[0]
            return F.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=self.eps)
        return self._normalize(input, norms, self._sizes_for(input, norms), self._running(norms))

    def _running(self, norms: Sequence[BatchNorm]) -> Running | None:
        """Return the running statistics that this batch moves."""
        if not (self.training and self.track_running_stats and self._update_statistics) or recomputing():
            return None
        mean, var, batches = _tensors(norms, "_buffers", "running_mean", "running_var", "num_batches_tracked")
        return Running(mean, var, batches, self.momentum) if mean else None

    def _is_recalibrated(self) -> bool:
        """Return True while `update_bn` runs: it sets every norm's momentum to None and turns gradients off."""
        return not torch.is_grad_enabled() and any(norm.momentum is None for norm in self.aux_bn)

    def _sizes_for(self, input: Tensor, norms: Sequence[BatchNorm]) -> list[int]:
        """Return how many samples each of these norms gets."""
        batch_size = input.shape[0]
        sizes = [batch_size] if len(norms) == 1 else self.sizes(batch_size)
        if sum(sizes) != batch_size:
            raise ValueError(f"split_sizes: expected sizes that sum to the batch, {batch_size}, got {sizes}")
        return sizes

    def _normalize(
        self, input: Tensor, norms: Sequence[BatchNorm], sizes: list[int], running: Running | None
    ) -> Tensor:
        """Return the output, and move the running statistics. Synchronized norms override it."""
        pixels = input.shape[2:].numel()
        counts = [size * pixels for size in sizes]
        if 0 in counts:
            return self._normalize_some(input, norms, sizes, counts)
        if 1 in counts:
            refuse_one_value(sizes, input)
        weights, biases = _tensors(norms, "_parameters", "weight", "bias")
        return normalize_splits(input, weights, biases, sizes, self.eps, running)[0]

    def _normalize_some(self, input: Tensor, norms: Sequence[BatchNorm], sizes: list[int], counts: list[int]) -> Tensor:
        """Normalize a batch with empty splits. Their parameters get gradients of zero, as torch's do."""
        outputs = [
            F.batch_norm(one, None, None, norm.weight, norm.bias, training=True)
            for one, norm, count in zip(input.split(sizes), norms, counts, strict=True)
            if not count
        ]
        filled = [i for i, count in enumerate(counts) if count]
        if filled:
            some = [norms[i] for i in filled]
            running = self._running(some)
            outputs.append(SplitBatchNorm._normalize(self, input, some, [sizes[i] for i in filled], running))
        return torch.cat(outputs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(f"{prefix}aux_bn.") for key in state_dict):
            # A plain batch norm's checkpoint fills every split; loading may assign, so each gets its own copy.
            for i, name in itertools.product(range(len(self.aux_bn)), _auxiliary.TENSORS):
                if prefix + name in state_dict:
                    state_dict[f"{prefix}aux_bn.{i}.{name}"] = state_dict[prefix + name].clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return all arguments, for the repr."""
        sizes = "" if self.split_sizes is None else f", split_sizes={self.split_sizes}"
        return f"{super().extra_repr()}, num_splits={self.num_splits}{sizes}"


def affine_of(norms: Sequence[BatchNorm]) -> list[list[Tensor]]:
    """Return the weights and the biases; empty lists if the norms do not have them."""
    return _tensors(norms, "_parameters", "weight", "bias")


def _tensors(norms: Sequence[BatchNorm], kind: str, *names: str) -> list[list[Any]]:
    """Return the norms' tensors of each name: parameters or buffers, or attributes that stand for them."""
    found: list[list[Any]] = []
    for name in names:
        tensors = []
        for norm in norms:
            tensor = norm.__dict__[kind].get(name)
            if tensor is None:
                tensor = getattr(norm, name)
            if tensor is not None:
                tensors.append(tensor)
        found.append(tensors)
    return found


def _plain_sizes(split_sizes: Sequence[int] | Sequence[float], num_splits: int) -> tuple[Any, ...]:
    """Return sizes as ints, or proportions as floats, also from NumPy numbers."""
    sizes = [checks.number("split_sizes", size) for size in split_sizes]
    whole = [checks.is_integer(size) for size in sizes]
    if len(set(whole)) > 1:
        raise TypeError(f"split_sizes: expected ints, or floats for proportions, got {split_sizes!r}")
    if len(sizes) != num_splits:
        raise ValueError(f"split_sizes: expected num_splits={num_splits} of them, got {split_sizes!r}")
    if min(sizes) <= 0:
        raise ValueError(f"split_sizes: expected sizes above 0, got {split_sizes!r}")
    if all(whole):
        return tuple(int(size) for size in sizes)
    if not math.isclose(sum(sizes), 1, rel_tol=1e-6):  # The precision of float32.
        raise ValueError(f"split_sizes: expected proportions that sum to 1, got {split_sizes!r}")
    return tuple(float(size) for size in sizes)


class SplitBatchNorm1d(SplitBatchNorm, nn.BatchNorm1d):
    """Split batch norm of (N, C) or (N, C, L): see `SplitBatchNorm2d`.

    Example:
        >>> import torch
        >>> from paper_layers import SplitBatchNorm1d
        >>> SplitBatchNorm1d(64)(torch.randn(8, 64)).shape  # 4 through each norm
        torch.Size([8, 64])
    """

    auxiliary_class = _auxiliary.AuxiliaryNorm1d

    def _check_input_dim(self, input: Tensor) -> None:
        checks.shape("input", input, ("N", self.num_features), ("N", self.num_features, "L"))


class SplitBatchNorm2d(SplitBatchNorm, nn.BatchNorm2d):
    r"""A main batch norm and auxiliary ones, which share the batch in training: AdvProp's split.

    .. math:: y_s = \frac{x_s - \mathrm{E}[x_s]}{\sqrt{\mathrm{Var}[x_s] + \epsilon}} \gamma_s + \beta_s

    Section 4.2 of Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020. In training, the batch is
    split in order: the first split goes through the main norm, the next through ``aux_bn[0]``, and so on, all in one
    pass. In eval, the main norm gets the whole batch; `paper_layers.adv_prop.use_split` runs another split. The keys
    are those of `nn.BatchNorm2d`, and the same under ``aux_bn.0.`` and so on, as in timm. A plain checkpoint fills
    every split. `momentum` and `eps` of this module hold for all splits.

    Every split's norm is one of torch's batch norms, so that loops that freeze norms or exempt them from weight decay
    find it. `torch.optim.swa_utils.update_bn` renews the main norm's statistics from whole batches and leaves the other
    splits alone; inside `use_split` it renews that split's. A batch that `torch.utils.checkpoint` recomputes counts
    once. A split without images keeps its statistics.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        momentum: Share of a batch in the running statistics; None for their average over all batches.
        affine: Learn a weight and a bias for each split.
        track_running_stats: Keep running statistics, which eval uses.
        num_splits: Number of splits, at least 2.
        split_sizes: Sizes of a training batch's splits. None: equal. Ints: numbers of samples, which must sum to the
            batch. Floats: proportions of any batch, rounded, which must sum to 1.

    Shape:
        Input and output (N, C, H, W), of one memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a wrong value; the sizes do not match the batch; a split has one value per channel.

    Example:
        >>> import torch
        >>> from paper_layers import SplitBatchNorm2d
        >>> norm = SplitBatchNorm2d(16)
        >>> clean, adversarial = torch.randn(2, 8, 16, 32, 32)
        >>> norm(torch.cat([clean, adversarial])).shape
        torch.Size([16, 16, 32, 32])
        >>> norm.eval()(clean[:1]).shape
        torch.Size([1, 16, 32, 32])
    """

    auxiliary_class = _auxiliary.AuxiliaryNorm2d

    def _check_input_dim(self, input: Tensor) -> None:
        shape = input.shape
        if len(shape) != 4 or shape[1] != self.num_features:
            checks.shape("input", input, ("N", self.num_features, "H", "W"))


class SplitBatchNorm3d(SplitBatchNorm, nn.BatchNorm3d):
    """Split batch norm of (N, C, D, H, W): see `SplitBatchNorm2d`.

    Example:
        >>> import torch
        >>> from paper_layers import SplitBatchNorm3d
        >>> SplitBatchNorm3d(16)(torch.randn(4, 16, 3, 5, 5)).shape  # 2 through each norm
        torch.Size([4, 16, 3, 5, 5])
    """

    auxiliary_class = _auxiliary.AuxiliaryNorm3d

    def _check_input_dim(self, input: Tensor) -> None:
        checks.shape("input", input, ("N", self.num_features, "D", "H", "W"))
