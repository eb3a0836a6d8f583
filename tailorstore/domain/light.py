"""Settings of light versions: quantised differences to a full version (DESIGN.md, "Light versions")."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tailorstore.domain.errors import InvalidInputError

BITS = (2, 3, 4, 5, 6, 8)
"""Bits per element that codes may have."""

ANY_SLOT = "*"


@dataclass(frozen=True, slots=True)
class LightSettings:
    """How light versions are made, and when a layer is due in full. The defaults are the study's."""

    weight_bits: int = 5
    """Bits per element of parameters and buffers; one of 2, 3, 4, 5, 6, 8."""
    slot_bits: int | Mapping[str, int] = 2
    """The same for optimizer slots, for all or by name; ``"*"`` stands for those that are not named."""
    block: int = 256
    """Elements that share a scale; a power of two from 16 to 4096."""
    max_weight_error: float = 0.1
    """Greatest relative L2 error of a parameter or buffer. One that errs more is coded in more bits, up to 8, and
    stored exactly if these do not suffice."""
    max_slot_error: float = 1.0
    """The same for slots."""
    due_error: float = 0.05
    """A layer whose light version's weights err more than this is due in full at the next commit that writes it."""
    max_base_commits: int | None = 200
    """A layer whose newest full version is older than this many commits is due in full."""
    max_base_steps: int | None = None
    """The same in steps; ``None``: no bound."""
    exact_below: int = 1024
    """Tensors of fewer elements are stored exactly: their description would take as much as is saved."""

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InvalidInputError: names the setting.
        """
        if not isinstance(self.slot_bits, int | Mapping):
            msg = f"slot_bits is {self.slot_bits!r}; it must be a number of bits, or map slots to numbers of bits"
            raise InvalidInputError(msg)
        named = {ANY_SLOT: self.slot_bits} if isinstance(self.slot_bits, int) else dict(self.slot_bits)
        for what, bits in {
            "weight_bits": self.weight_bits,
            **{f"slot_bits[{k!r}]": v for k, v in named.items()},
        }.items():
            if type(bits) is not int or bits not in BITS:
                msg = f"{what} is {bits!r}; light versions know {', '.join(map(str, BITS))} bits per element"
                raise InvalidInputError(msg)
        if type(self.block) is not int or self.block not in [1 << power for power in range(4, 13)]:
            msg = f"block is {self.block!r}; it must be a power of two from 16 to 4096"
            raise InvalidInputError(msg)
        for what in ("max_weight_error", "max_slot_error", "due_error"):
            value = getattr(self, what)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                msg = f"{what} is {value!r}; it must be a relative error of at least 0"
                raise InvalidInputError(msg)
        for what in ("max_base_commits", "max_base_steps"):
            value = getattr(self, what)
            if value is not None and (type(value) is not int or value < 1):
                msg = f"{what} is {value!r}; it must be a whole number of at least 1, or None"
                raise InvalidInputError(msg)
        if type(self.exact_below) is not int or self.exact_below < 1:
            msg = f"exact_below is {self.exact_below!r}; it must be a whole number of at least 1"
            raise InvalidInputError(msg)

    def is_due(self, *, error: float | None, base_commits: int, base_steps: int) -> bool:
        """Whether a layer is due in full.

        Args:
            error: recorded of its newest version; ``None`` for a full one.
            base_commits: what the age of its base would be after a light version more, in commits.
            base_steps: the same in steps.
        """
        return (
            (error is not None and not error <= self.due_error)
            or (self.max_base_commits is not None and base_commits > self.max_base_commits)
            or (self.max_base_steps is not None and base_steps > self.max_base_steps)
        )

    def bits_of_slot(self, slot: str) -> int:
        """Return the bits per element of an optimizer slot."""
        if isinstance(self.slot_bits, int):
            return self.slot_bits
        return self.slot_bits.get(slot, self.slot_bits.get(ANY_SLOT, 2))


Coding = Literal["exact", "difference", "value", "ratio", "log", "rounded"]
"""How a tensor stands in a light version:

| coding | an element is |
|---|---|
| ``exact`` | itself |
| ``difference`` | that of the base plus scale × code |
| ``value`` | scale × code |
| ``ratio`` | that of the base times a power of two with fraction; never zero unless it was |
| ``log`` | a power of two with fraction; never zero unless it was |
| ``rounded`` | the rounding of another tensor's: 16-bit weights of which an optimizer keeps the master |
"""

CODINGS: tuple[Coding, ...] = get_args(Coding)
BASED: tuple[Coding, ...] = ("difference", "ratio")
"""Codings that need the base's elements."""


@dataclass(frozen=True, slots=True)
class LightTensor:
    """Where one tensor stands in a light version, and how."""

    dtype: str
    shape: tuple[int, ...]
    coding: Coding
    bits: int = 0
    """Bits per element of its codes."""
    codes_at: int = 0
    """Index of its first byte in the version's ``codes``, or, if exact, in its ``exact``."""
    scales_at: int = 0
    """Index of its first word in the version's ``scales``."""
    of: str | None = None
    """If rounded: array path of the tensor that it is the rounding of."""
    error: float = 0.0
    """Measured relative error: of the tensor's L2 norm, or, coded as ratio or log, root mean square over elements."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LightTable:
    """What a light version's arrays ``codes``, ``scales`` and ``exact`` mean."""

    block: int
    """Elements that share a scale."""
    tensors: Mapping[str, LightTensor]
    """By the path that the tensor's array has in a full version."""

    def needs_base(self, path: str) -> bool:
        """Whether elements of the base are needed to restore a tensor."""
        tensor = self.tensors[path]
        return tensor.coding in BASED or (tensor.of is not None and self.needs_base(tensor.of))
