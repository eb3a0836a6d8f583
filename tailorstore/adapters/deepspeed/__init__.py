"""DeepSpeed: commit from an engine of ZeRO stage 1, 2 or 3, and restore into one of any stage and world size.

    from tailorstore.adapters.deepspeed import commit, restore

    commit(store, step, engine, extra={"epoch": epoch})      # on every rank, after engine.step()
    extra = restore(store.checkout(), engine)                # on every rank

What is stored is what an unsharded model in the precision of the update and its optimizer would have: the fp32 master
where there is one (the 16-bit weight is its rounding), frozen parameters and buffers as they are, slots and step
counters by parameter. So ``store.checkout().restore(model, optimizer)`` of a plain fp32 model, or one under FSDP2,
takes an engine's commit, and an engine takes theirs.
"""

from tailorstore.adapters.deepspeed.commit import commit
from tailorstore.adapters.deepspeed.restore import restore

__all__ = ["commit", "restore"]
