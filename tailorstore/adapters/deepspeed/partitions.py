"""Where the elements of which parameter lie in a DeepSpeed engine of ZeRO stage 1, 2 or 3.

ZeRO lays parameters end to end, gives each rank a run of the elements (of a whole group in stages 1 and 2, of each
parameter in stage 3), and has the wrapped optimizer train what a rank got as one flat tensor. So each element of a
master weight, and of each slot, is on one rank, and those of a parameter that a rank has are consecutive.

They are described from the flat tensors themselves, and nothing is gathered. DeepSpeed's ``safe_get_full_*`` would give
the tensors whole, on every rank, and not exactly: stages 1 and 2 add the ranks' parts up, so that -0.0 becomes 0.0,
find slots of the first parameter group only, and the wrong elements after ``round_robin_gradients`` (0.19.8).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from tailorstore.domain.chunks import Box, box_of
from tailorstore.domain.errors import InvalidInputError, MissingDependencyError
from tailorstore.engine.tensors.shards import Part, Sharded

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a tensor, in C order, as they lie in a flat tensor of this rank."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    stop: int
    """Equal to ``start`` where this rank has none of them."""
    at: int
    """Where in the flat tensor they begin."""
    layout: str
    """Equal for tensors of one shape that are cut alike on every rank."""

    def of(self, flat: torch.Tensor, param: torch.Tensor | None = None) -> Sharded:
        """Return the tensor of which a flat one holds this run; shares its memory.

        Args:
            flat: the flat tensor.
            param: the parameter that it is the weight of, if it is one.
        """
        parts, at = [], self.at
        for box in boxes_of_run(self.shape, self.start, self.stop):
            extents = [stop - start for start, stop in box]
            count = math.prod(extents)
            parts.append(Part(box, flat.detach()[at : at + count].view(extents)))
            at += count
        return Sharded(self.shape, flat.dtype, tuple(parts), param is not None, self.layout, param)

    def within(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the run as a flat tensor has it; shares its memory."""
        return flat.detach()[self.at : self.at + self.stop - self.start]


def boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that consecutive elements of a tensor make up, in order: part of a row, whole rows, part of one.

    Examples:
        >>> list(boxes_of_run((4, 3), 2, 10))
        [((0, 1), (2, 3)), ((1, 3), (0, 3)), ((3, 4), (0, 1))]
        >>> list(boxes_of_run((), 0, 1)), list(boxes_of_run((5,), 3, 3))
        ([()], [])
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = shape[1:]
    width = math.prod(inner)
    (first, skipped), (last, left) = divmod(start, width), divmod(stop, width)
    if skipped:
        end = width if first < last else left
        yield from (((first, first + 1), *box) for box in boxes_of_run(inner, skipped, end))
        first += 1
    if first < last:
        yield (first, last), *box_of(inner)
    if first <= last:
        yield from (((last, last + 1), *box) for box in boxes_of_run(inner, 0, left))


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One flat tensor that the wrapped optimizer trains."""

    group: int
    """Number of the parameter group."""
    master: torch.Tensor
    """One-dimensional, in the precision of the update; has padding between or after its runs."""
    runs: dict[str, Run]
    """Parameter name → what of it is in here, for each parameter that any rank has in its flat tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Partitions:
    """All that the wrapped optimizer trains on this rank."""

    flats: list[Partition]
    groups: list[list[str]]
    """Per parameter group the names of its trained parameters, in the group's order."""


def check_engine(engine: object) -> None:
    """Refuse what is no engine, and engines whose ranks give one name to different tensors.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        InvalidInputError: says what it is.
    """
    if not isinstance(engine, _known("deepspeed", "DeepSpeedEngine")):
        msg = f"engine must be what deepspeed.initialize returns first, not {type(engine).__name__}"
        raise InvalidInputError(msg)
    kinds = {
        "pipeline parallelism": engine.pipeline_parallelism,
        "experts on different ranks": engine.has_moe_layers,
        "tensor parallelism": engine.mp_world_size > 1 or engine.autotp_size() > 1,
    }
    found = [kind for kind, present in kinds.items() if present]
    if found:
        msg = f"the engine uses {found[0]}: its ranks hold different parameters, and only ZeRO itself is understood"
        raise InvalidInputError(msg)


def partitions_of(engine: "DeepSpeedEngine", names: Mapping[int, str]) -> Partitions:
    """Return what an engine's optimizer trains, and where on this rank it is.

    Args:
        engine: one that ``check_engine`` has let through.
        names: ``id`` of a parameter → its name.

    Raises:
        InvalidInputError: it has no ZeRO or no optimizer, or its state is not all in memory; says which.
    """
    wrapper = engine.optimizer
    if type(wrapper) is _known("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"):
        _check_in_memory(wrapper)
        flats = _flats_of_groups(
            wrapper.round_robin_bit16_groups,
            wrapper.round_robin_bit16_offsets,
            wrapper.single_partition_of_fp32_groups,
            wrapper.real_dp_process_group,
            names,
        )
        return Partitions(flats, [[names[id(param)] for param in group] for group in wrapper.bit16_groups])
    if type(wrapper) is _known("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"):
        groups = wrapper.bf16_groups
        offsets = [list(itertools.accumulate((param.numel() for param in group), initial=0))[:-1] for group in groups]
        flats = _flats_of_groups(
            groups, offsets, wrapper.fp32_groups_flat_partition, wrapper.real_dp_process_group, names
        )
        return Partitions(flats, [[names[id(param)] for param in group] for group in groups])
    if type(wrapper) is _known("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"):
        _check_in_memory(wrapper)
        return _partitions_of_stage_3(wrapper, names)
    msg = (
        f"the engine's optimizer is a {type(wrapper).__name__}, which tailorstore cannot take apart: only those of ZeRO"
        " stages 1, 2 and 3. Without ZeRO, pass engine.module and engine.optimizer to store.commit itself"
    )
    raise InvalidInputError(msg)


def _known(module: str, name: str) -> Any:  # noqa: ANN401 - a class or function
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        msg = "this adapter needs the package deepspeed; install it with: pip install 'tailorstore[deepspeed]'"
        raise MissingDependencyError(msg) from error


def _check_in_memory(wrapper: Any) -> None:  # noqa: ANN401 - one of DeepSpeed's optimizers
    if wrapper.offloaded_states:
        msg = "the engine has states offloaded; call engine.reload_states() first"
        raise InvalidInputError(msg)
    if getattr(wrapper, "swap_optimizer", False) or getattr(wrapper, "params_in_nvme_and_cpu", False):
        msg = "the engine offloads state to NVMe, where tailorstore does not look; offload it to the CPU instead"
        raise InvalidInputError(msg)
    if hasattr(wrapper, "backup_optimizer"):
        msg = "the engine offloads a part of its optimizer (ratio below 1), which leaves two of them; offload all of it"
        raise InvalidInputError(msg)


def _flats_of_groups(
    groups: Sequence[Sequence[torch.Tensor]],
    offsets: Sequence[Sequence[int]],
    masters: Sequence[torch.Tensor],
    process_groups: Sequence[Any],
    names: Mapping[int, str],
) -> list[Partition]:
    """Describe groups that are laid end to end as wholes, each parameter at its offset, and then cut evenly."""
    found = []
    for number, (group, master) in enumerate(zip(groups, masters, strict=True)):
        size = master.numel()
        low = _known("deepspeed.comm", "get_rank")(group=process_groups[number]) * size
        runs = {}
        for param, offset in zip(group, offsets[number], strict=True):
            start = min(max(low - offset, 0), param.numel())
            stop = min(max(low + size - offset, 0), param.numel())
            name = names[id(param)]
            runs[name] = Run(tuple(param.shape), start, stop, offset + start - low, f"ZeRO, at {name}")
        found.append(Partition(number, master, runs))
    return found


def _partitions_of_stage_3(wrapper: Any, names: Mapping[int, str]) -> Partitions:  # noqa: ANN401
    """Describe groups of which each parameter is cut by itself; a large group is several flat tensors."""
    flats = []
    groups: list[list[str]] = [[] for _ in wrapper.param_groups]
    for sub_group, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        group, at, runs = wrapper.sub_group_to_group_id[sub_group], 0, {}
        for param in wrapper.fp16_groups[sub_group]:
            runs[names[id(param)]] = run_of_stage_3(param, at)
            at += param.partition_numel()
        flats.append(Partition(group, master, runs))
        groups[group] += runs
    return Partitions(flats, groups)


def run_of_stage_3(param: Any, at: int = 0) -> Run:  # noqa: ANN401 - a Parameter with what ZeRO 3 adds to it
    """Return what of a parameter this rank has; ``at``: where it begins."""
    size, elements = param.partition_numel(), param.ds_numel
    start = min(param.ds_zero_partition_rank * size, elements)
    return Run(tuple(param.ds_shape), start, min(start + size, elements), at, "ZeRO 3")
