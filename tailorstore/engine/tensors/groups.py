"""Parameter groups of an optimizer beside the stored ones: which belong together, and how they differ."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def groups_here(
    groups: Sequence[Mapping[str, Any]], mine: Sequence[Sequence[str | None]], absent: Collection[str]
) -> list[Mapping[str, Any]]:
    """Return stored groups without the parameters that only other ranks have.

    A group of which nothing is left stands for the live one at its place if that is empty, and is else left out.

    Args:
        groups: options, and ``params`` as names.
        mine: names of the parameters of each live group.
        absent: names that only other ranks have.
    """
    found: list[Mapping[str, Any]] = []
    for group in groups:
        names = [name for name in group["params"] if name not in absent]
        place = mine[len(found)] if len(found) < len(mine) else None
        if names or not group["params"] or place == []:
            found.append({**group, "params": names})
    return found


def groups_differ(mine: list[list[str | None]], theirs: list[list[str]]) -> str:
    """Describe how an optimizer's groups, as names of parameters, differ from stored ones; for people."""
    if len(mine) != len(theirs):
        return f"{len(mine)} parameter groups, {len(theirs)} in the composite"
    notes = []
    for at, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        missing = [name for name in here if name not in there]
        unexpected = [name for name in there if name not in here]
        notes += [f"group {at} has {name}, the composite's has not" for name in missing]
        notes += [f"group {at} lacks {name}, the composite's has it" for name in unexpected]
        if here != there and not missing and not unexpected:
            notes.append(f"group {at} holds its parameters in another order")
    return "; ".join(notes)
