"""The SoftTriple loss with its classes sharded over the ranks of a process group."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paper_layers._core import checks, dtypes, values
from paper_layers.ops.soft_triple.chunk_ops import known_labels
from paper_layers.ops.soft_triple.chunks import check
from paper_layers.ops.soft_triple.loss import soft_triple
from paper_layers.ops.soft_triple.rows import REDUCTIONS, reduce_rows
from paper_layers.soft_triple._collectives import Gather, Join, gather_rows
from paper_layers.soft_triple._metric_learning import check_references, count_rows, counts_to_weights
from paper_layers.soft_triple.loss import SoftTripleLoss

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import Unpack

    from paper_layers.soft_triple._options import LossOptions


class ShardedSoftTripleLoss(SoftTripleLoss):
    """SoftTriple with its classes sharded over several processes, for very many classes.

    The `SoftTripleLoss` of the joint batch of all ranks (Qian et al., "SoftTriple Loss", ICCV 2019). Each rank may have
    a different number of rows. Embeddings and labels are gathered on all ranks; each rank computes the logits of its
    own classes, and the soft-max is joined from their log-sum-exps and targets. Every rank returns the loss of the
    joint batch for "mean" (over the counted rows of all ranks) and "sum", and the losses of its own rows for "none".

    Use it beside a network in DistributedDataParallel, not inside, which raises an error: DDP would average the
    gradients of different centers. After ``loss(ddp(x), labels).backward()``, the gradients of network and centers are
    those of one process with the joint batch. In general, the gradients are those of the mean over ranks of the values
    on which backward is called; the embeddings' gradient is therefore multiplied by the world size. All ranks must call
    forward and backward together. A wrong argument on one rank, or different settings, are errors on all ranks. Double
    backward is not supported.

    If DistributedDataParallel wraps a module that contains the loss, such as a LightningModule, first exclude the
    centers: ``DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["loss.centers"])``, in
    Lightning in ``configure_model``.

    The centers are a DTensor, split by classes as `torch.chunk` splits. So ``torch.distributed.checkpoint`` saves and
    loads them and the optimizer's state with any number of ranks, also from and to `SoftTripleLoss`. `load_state_dict`
    and `load_official` take the centers of all classes on every rank. `distinct_centers`, `merge_centers` and
    `get_logits` gather all centers on every rank; `get_logits` gives no gradient to them.

    Args:
        num_classes: Number of classes of all ranks together.
        embedding_dim: Size d of the embeddings.
        centers_per_class: Number of centers per class.
        process_group: The ranks; default: all. All ranks create the loss together.
        device: Device of the centers, where they must stay; the process group's backend must support it.
        **options: `la`, `gamma`, `tau`, `margin`, `ignore_index`, `reduction`, `chunk_size`, `dtype`: see
            `SoftTripleLoss`.

    Attributes:
        centers: DTensor parameter of shape (num_classes, centers_per_class, embedding_dim).
        classes: Range of the classes on this rank.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError: A number has the wrong type.
        ValueError: A number is out of range, or `reduction` is unknown.

    Example:
        >>> import tempfile, torch, paper_layers
        >>> from paper_layers.soft_triple import ShardedSoftTripleLoss, param_groups
        >>> store = f"file://{tempfile.mkdtemp()}/store"
        >>> torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)  # or as torchrun has it
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(128, 64))
        >>> loss = ShardedSoftTripleLoss(num_classes=1000, embedding_dim=64, centers_per_class=2)
        >>> optimizer = torch.optim.Adam(param_groups(model, loss), eps=0.01, weight_decay=1e-4)
        >>> loss(model(torch.randn(8, 128)), torch.randint(1000, (8,))).backward()
        >>> optimizer.step()
        >>> torch.distributed.destroy_process_group()
    """

    _takes_joint_batch = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        centers_per_class: int = 10,
        *,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[LossOptions],
    ):
        super().__init__(num_classes, embedding_dim, centers_per_class, device="meta", **options)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "ShardedSoftTripleLoss: expected torch.distributed.init_process_group before it, got no process group "
                "(one process needs SoftTripleLoss)"
            )
        from torch.distributed.device_mesh import DeviceMesh

        group = cast("dist.ProcessGroup", process_group or dist.group.WORLD)
        place = torch.empty(0, device=device).device
        kind = place.type
        if kind == "meta":
            kind = "cpu" if dist.get_backend(group) == "gloo" else str(torch.accelerator.current_accelerator())
        self._mesh = DeviceMesh.from_group(group, kind)
        own = torch.empty(len(self.classes), *self.centers.shape[1:], dtype=self.centers.dtype, device=place)
        self.centers = nn.Parameter(self._distributed(own))
        self.register_load_state_dict_pre_hook(_split_whole)
        self.reset_parameters()

    @property
    def classes(self) -> range:
        """Range of the classes whose centers are on this rank."""
        size = -(-self.num_classes // self._mesh.size())
        start = min(size * self._mesh.get_local_rank(), self.num_classes)
        return range(start, min(start + size, self.num_classes))

    def _distributed(self, own: Tensor) -> DTensor:
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((self.num_classes, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new centers, as `SoftTripleLoss` does; all ranks must call it together."""
        if self.centers.is_meta:
            return
        own = self._own_centers()
        # Ranks often have the same seed, but their centers must differ.
        seed = torch.randint(1 << 62, (1,)).to(own.device)
        group = self._mesh.get_group()
        dist.broadcast(seed, group=group, group_src=0)
        generator = torch.Generator(own.device).manual_seed(int(seed) + dist.get_rank(group))
        bound = (self.num_classes * self.centers_per_class) ** -0.5
        own.uniform_(-bound, bound, generator=generator)

    def extra_repr(self) -> str:
        """Return all arguments, and the classes on this rank."""
        return f"{super().extra_repr()}, classes={self.classes.start} to {self.classes.stop - 1}"

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of all ranks' embeddings (B, embedding_dim) with labels (B,), as in `SoftTripleLoss`.

        `indices_tuple` has indices of this rank's rows; counts are divided by the largest count of all ranks.
        """
        group, own = self._mesh.get_group(), self._own_centers()
        labels, counts, sizes = self._agreed(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        labels = known_labels(gather_rows(labels, sizes, group), self.num_classes, self.ignore_index)
        rows = Gather.apply(embeddings, sizes, group, dtypes.accumulation(embeddings, own))
        count = self.centers_per_class
        regularized = self.tau > 0 and count > 1
        options: dict[str, Any] = {"la": self.la, "gamma": self.gamma, "margin": self.margin}
        options |= {"regularized": regularized, "chunk_size": self.chunk_size}
        others, target, distance = soft_triple(rows, own, labels - self.classes.start, **options)
        others, target, distance, _ = Join.apply(others, target, distance, group)
        weights = None if counts is None else counts_to_weights(gather_rows(counts, sizes, group))
        regulariser = self.tau / (self.num_classes * count * (count - 1)) if regularized else 0.0
        reduction: dict[str, Any] = {"regulariser": regulariser, "reduction": self.reduction, "weights": weights}
        loss = reduce_rows(others, target, distance, labels, **reduction)
        return loss.split(sizes)[dist.get_rank(group)] if self.reduction == "none" else loss

    def _agreed(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        """Return labels as int64, the counts of a miner if any rank has one, and the number of rows on each rank.

        Raise an error on all ranks if one has a wrong argument, or if their settings differ.
        """
        own, error, mine, counts = self._own_centers(), None, [-1, -1], None
        try:
            check_references(embeddings, labels, ref_emb, ref_labels)
            check(embeddings, own, self.la, self.gamma, self.chunk_size)
            if indices_tuple is not None:
                counts = count_rows(indices_tuple, embeddings)
            labels = values.integers("labels", labels, len(embeddings))
            checks.same_device("labels", labels, "embeddings", embeddings)
            mine = [len(embeddings), checks.FLOATING.index(embeddings.dtype)]
        except (IndexError, RuntimeError, TypeError, ValueError) as wrong:
            error = wrong
        settings = self._settings(error is None and embeddings.requires_grad)
        sent = torch.tensor([*mine, indices_tuple is not None, *map(_bits, settings.values())], device=own.device)[None]
        found = gather_rows(sent, [1] * self._mesh.size(), self._mesh.get_group()).tolist()
        if error is not None:
            raise error
        for rank, (size, dtype, *_) in enumerate(found):
            if size < 0:
                raise ValueError(f"embeddings, labels: expected valid ones on every rank, see the error of rank {rank}")
            if dtype != mine[1]:
                theirs = str(checks.FLOATING[dtype]).removeprefix("torch.")
                raise TypeError(f"embeddings: expected the dtype of rank {rank}, {theirs}, got {embeddings.dtype}")
        for (name, value), *bits in zip(settings.items(), *(bits for _, _, _, *bits in found), strict=True):
            if len(set(bits)) > 1:
                got = ", ".join(f"{_value(number, value)} on rank {rank}" for rank, number in enumerate(bits))
                raise ValueError(f"{name}: expected the same on all ranks, got {got}")
        if counts is None and any(tuples for _, _, tuples, *_ in found):
            counts = embeddings.new_zeros(len(embeddings), dtype=torch.float32)
        return labels, counts, [size for size, *_ in found]

    def _settings(self, requires_grad: bool) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks, by name."""
        own, grad = self._own_centers(), torch.is_grad_enabled()
        return {
            "num_classes": self.num_classes,
            "centers_per_class": self.centers_per_class,
            "embedding_dim": self.embedding_dim,
            "la": float(self.la),
            "gamma": float(self.gamma),
            "tau": float(self.tau),
            "margin": float(self.margin),
            "ignore_index": self.ignore_index,
            "reduction": _Choice(REDUCTIONS, REDUCTIONS.index(self.reduction)),
            "dtype of centers": _Choice(checks.FLOATING, checks.FLOATING.index(own.dtype)),
            "embeddings.requires_grad": _Choice((False, True), int(grad and requires_grad)),
            "centers.requires_grad": _Choice((False, True), int(grad and self.centers.requires_grad)),
        }

    def _own_centers(self) -> Tensor:
        return cast("DTensor", self.centers).to_local()

    def _all_centers(self) -> Tensor:
        return cast("DTensor", self.centers).full_tensor().detach()


class _Choice(NamedTuple):
    """One of several values, by its number."""

    values: tuple[Any, ...]
    number: int


def _bits(value: Any) -> int:
    """Return a setting as an int64 that can be sent."""
    if isinstance(value, _Choice):
        return value.number
    return struct.unpack("q", struct.pack("d", value))[0] if isinstance(value, float) else value


def _value(bits: int, like: Any) -> Any:
    """Return the setting that another rank sent, of the kind of `like`."""
    if isinstance(like, _Choice):
        return like.values[bits]
    return struct.unpack("d", struct.pack("q", bits))[0] if isinstance(like, float) else bits


def _split_whole(module: ShardedSoftTripleLoss, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take this rank's part of the centers of all classes, as one process saves them."""
    from torch.distributed.tensor import DTensor

    value = state_dict.get(f"{prefix}centers")
    if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == module.centers.shape:
        classes = module.classes
        state_dict[f"{prefix}centers"] = module._distributed(value[classes.start : classes.stop])
