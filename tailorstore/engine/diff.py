"""What differs between two composites: digests are compared, nothing is read."""

from tailorstore.domain.records import CommitDiff, Composite, DiffEntry


def diff_composites(a: Composite, b: Composite) -> CommitDiff:
    """Compare two composites layer by layer."""
    entries = []
    for layer in sorted(a.versions.keys() | b.versions.keys()):
        before, after = a.versions.get(layer), b.versions.get(layer)
        if before is None:
            change = "added"
        elif after is None:
            change = "removed"
        else:
            change = "same" if before.digest == after.digest else "changed"
        entries.append(
            DiffEntry(
                layer=layer,
                change=change,  # type: ignore[arg-type]
                step_a=before.step if before else None,
                step_b=after.step if after else None,
                bytes_logical=(after or before).bytes_logical,  # type: ignore[union-attr]
            )
        )
    return CommitDiff(a.commit, b.commit, tuple(entries))
