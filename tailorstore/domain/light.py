"""Settings of light versions: quantised differences to a full version (DESIGN.md, "Light versions")."""

from collections.abc import Mapping
from dataclasses import dataclass

from tailorstore.domain.errors import InvalidInputError

BITS = (2, 3, 4, 8)
"""Bits per element that codes may have."""

ANY_SLOT = "*"


@dataclass(frozen=True, slots=True)
class LightSettings:
    """How light versions are made, and when a layer is due in full. The defaults are the study's."""

    weight_bits: int = 4
    """Bits per element of parameters and buffers; one of 2, 3, 4, 8."""
    slot_bits: int | Mapping[str, int] = 4
    """The same for optimizer slots, for all or by name; ``"*"`` stands for those that are not named."""
    block: int = 128
    """Elements that share a scale; a power of two from 16 to 4096."""
    max_weight_error: float = 0.02
    """Greatest relative L2 error of a parameter or buffer; one that errs more is stored exactly."""
    max_slot_error: float = 0.5
    """The same for slots."""
    due_error: float = 0.01
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
        named = {"*": self.slot_bits} if isinstance(self.slot_bits, int) else dict(self.slot_bits)
        for what, bits in {
            "weight_bits": self.weight_bits,
            **{f"slot_bits[{k!r}]": v for k, v in named.items()},
        }.items():
            if bits not in BITS or isinstance(bits, bool):
                msg = f"{what} is {bits!r}; light versions know {', '.join(map(str, BITS))} bits per element"
                raise InvalidInputError(msg)
        if not isinstance(self.block, int) or self.block not in [1 << power for power in range(4, 13)]:
            msg = f"block is {self.block!r}; it must be a power of two from 16 to 4096"
            raise InvalidInputError(msg)
        for what in ("max_weight_error", "max_slot_error", "due_error"):
            value = getattr(self, what)
            if not isinstance(value, int | float) or not value >= 0:
                msg = f"{what} is {value!r}; it must be a relative error of at least 0"
                raise InvalidInputError(msg)
        for what in ("max_base_commits", "max_base_steps"):
            value = getattr(self, what)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                msg = f"{what} is {value!r}; it must be a whole number of at least 1, or None"
                raise InvalidInputError(msg)

    def bits_of_slot(self, slot: str) -> int:
        """Return the bits per element of an optimizer slot."""
        if isinstance(self.slot_bits, int):
            return self.slot_bits
        return self.slot_bits.get(slot, self.slot_bits.get(ANY_SLOT, 4))
