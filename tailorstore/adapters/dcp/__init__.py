"""torch.distributed.checkpoint (DCP) that saves to and loads from a store: a writer and a reader for its calls.

    dcp.save(state, storage_writer=TailorWriter(store, step))
    dcp.load(state, storage_reader=TailorReader(store))

A commit that was made this way is what ``store.commit(step, model, optim)`` would have made of the model and the
optimizer in the state dict, and the other way round.
"""

from tailorstore.adapters.dcp.reader import TailorReader
from tailorstore.adapters.dcp.writer import TailorWriter

__all__ = ["TailorReader", "TailorWriter"]
