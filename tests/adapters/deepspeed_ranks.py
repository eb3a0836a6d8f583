"""What the ranks of the DeepSpeed tests do, and what they find; all that is compared by bits is read from the store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tailorstore as ts
from tailorstore.adapters.deepspeed import commit, restore
from tailorstore.adapters.deepspeed.partitions import partitions_of
from tests.adapters.deepspeed_engines import KINDS, Kind, make_engine, prepare, train

SPECIAL = [-0.0, float("inf"), 1e-42]
PAYLOAD = 0x7FC0_1234
"""A NaN that is not the usual one."""


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tuple(tensor.shape), str(tensor.dtype), raw.numpy().tobytes()


def _values(checkpoint: Any) -> dict[str, Any]:
    """Return every value of a composite, by name, as bits."""
    found = {name: bits(lazy.load()) for name, lazy in checkpoint.model.items()}
    for name, slots in checkpoint.optim.items():
        found |= {f"{slot} of {name}": bits(lazy.load()) for slot, lazy in slots.items()}
    return found


def _changed(store: ts.Store, a: int, b: int) -> list[str]:
    """Return what is not the same, to the bit, in the composites of two steps; only one rank looks."""
    with store.checkout(a) as before, store.checkout(b) as after:
        old, new = (_values(before), _values(after)) if dist.get_rank() == 0 else ({}, {})
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _live_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return whole copies of the weights that the model computes with."""
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=engine.zero_optimization_stage() == 3):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def _said(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return which error a call raises, and what it says."""
    with pytest.raises(ts.TailorError) as caught:
        call(*args, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


def train_and_commit(root: str) -> dict[str, Any]:
    """Make a store for each kind of engine, and try everything else that two ranks are needed for."""
    prepare()
    return {
        "kinds": {name: _goes_on(f"{root}/{name}", kind) for name, kind in KINDS.items()},
        "refused": _refuses(f"{root}/refusing"),
        "young": _before_the_first_step(f"{root}/young"),
        "slots": _other_optimizers(f"{root}/slots"),
        "special": _rare_bits(f"{root}/special"),
        "mixed": _mixed_steps(f"{root}/mixed"),
        "scaled": _loss_scales(f"{root}/scaled"),
    }


def take(root: str, pairs: list[tuple[str, str, bool]]) -> list[list[str]]:
    """Restore composites of step 3 into engines of other kinds; return what these then hold that is not the same.

    Args:
        root: with a store of each kind.
        pairs: name of the store, name of the engine's kind, and whether to be strict.
    """
    prepare()
    found = []
    for number, (stored, live, strict) in enumerate(pairs):
        with ts.open_store(f"{root}/{stored}") as store:
            engine = make_engine(KINDS[live], seed=2)
            restore(store.checkout(3), engine, strict=strict)
            step = 100 * dist.get_world_size() + number
            commit(store, step, engine)
            found.append(_changed(store, 3, step))
    return found


def _goes_on(url: str, kind: Kind) -> dict[str, Any]:
    with ts.open_store(url) as store:
        engine = make_engine(kind, seed=0)
        train(engine, range(3))
        commit(store, 3, engine, extra={"rank": dist.get_rank(), "epoch": [1, 2.5]})
        drawn = torch.rand(1).item()
        losses = train(engine, range(3, 6))
        pending = commit(store, 6, engine, block=False)
        late = train(engine, range(6, 7))
        pending.result()
        other = make_engine(kind, seed=1)
        extra = restore(store.checkout(3), other, rng=True)
        drawn_again = torch.rand(1).item()
        losses_again = train(other, range(3, 6))
        commit(store, 7, other)
        weights = _live_weights(other)
        with store.checkout(7) as checkpoint:
            masters = {name: checkpoint.model[name].load() for name in weights}
        return {
            "extra": extra,
            "same": [losses == losses_again, late == train(other, range(6, 7)), drawn == drawn_again],
            "changed": _changed(store, 6, 7),
            "rounded": all(torch.equal(masters[name].to(weight.dtype), weight) for name, weight in weights.items()),
            "dtypes": sorted({str(tensor.dtype) for tensor in masters.values()}),
            "counters": [other.global_steps, other.global_samples, other.micro_steps, other.skipped_steps],
            "lr": [one.get_lr() for one in (engine, other)],
            "calls": [one.module.blocks[0].counting.calls for one in (engine, other)],
        }


def _refuses(url: str) -> dict[str, Any]:
    engine = make_engine(Kind(2), seed=0)
    train(engine, range(1))
    with ts.open_store(url) as store:
        last = commit(store, 1, engine)
        found: dict[str, Any] = {
            "list": _said(commit, store, 3, engine, extra=[1]),
            "one rank": _said(commit, store, 3, engine, extra={} if dist.get_rank() == 0 else {"@deepspeed": 1}),
            "module": _said(commit, store, 3, engine.module),
            "no ZeRO": _said(commit, store, 3, make_engine(Kind(0), seed=0)),
            "log": [one.step for one in store.log()],
        }
        larger = make_engine(Kind(3), seed=1, blocks=3)
        before = _live_weights(larger)
        found["larger"] = _said(restore, store.checkout(), larger)
        after = _live_weights(larger)
        found["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
        momentum = make_engine(Kind(1), 1, torch.optim.SGD, momentum=0.9)
        found["momentum"] = _said(restore, store.checkout(), momentum)
        found["low"] = _said(restore, store.checkout(), make_engine(Kind(1, "bf16"), seed=1))
        # Only a rank that needs it finds that it is gone, and all of them hear of it.
        dist.barrier()
        if dist.get_rank() == 0:
            next(Path(url, f"layers/blocks.1/{last.id}/blocks.1.up.weight").glob("c*")).unlink()
        dist.barrier()
        found["damaged"] = _said(restore, store.checkout(), make_engine(Kind(3), seed=1))
    return found


def _before_the_first_step(url: str) -> list[Any]:
    """Return how many parameters have slots before the first step, and whether a restore takes slots away."""
    import deepspeed

    with ts.open_store(url) as store:
        young, grown = make_engine(Kind(2), seed=0), make_engine(Kind(2), seed=1)
        commit(store, 0, young)
        train(grown, range(1))
        restore(store.checkout(), grown)
        commit(store, 1, grown)
        with store.checkout() as checkpoint:
            found = [len(checkpoint.optim), _changed(store, 0, 1)]
        # DeepSpeed's own view of the slots is of those that there are now.
        found.append(train(young, range(1)) == train(grown, range(1)))
        seen = deepspeed.utils.safe_get_full_optimizer_state(grown.module.embed.weight, "exp_avg")
        commit(store, 2, grown)
        with store.checkout() as checkpoint:
            found.append(torch.equal(seen, checkpoint.optim["embed.weight"]["exp_avg"].load()))
    return found


def _other_optimizers(url: str) -> dict[str, Any]:
    from lion_pytorch import Lion

    found = {}
    optimizers: dict[Any, dict[str, Any]] = {torch.optim.SGD: {"momentum": 0.9}, Lion: {}, torch.optim.RMSprop: {}}
    for optimizer, options in optimizers.items():
        with ts.open_store(f"{url}/{optimizer.__name__}") as store:
            engine = make_engine(Kind(1, "bf16"), 0, optimizer, **options)
            train(engine, range(2))
            commit(store, 2, engine)
            other = make_engine(Kind(3, "bf16"), 1, optimizer, **options)
            restore(store.checkout(), other)
            commit(store, 3, other)
            with store.checkout() as checkpoint:
                found[optimizer.__name__] = [sorted(checkpoint.optim["embed.weight"]), _changed(store, 2, 3)]
    return found


def _rare_bits(url: str) -> list[Any]:
    """Return what of bits that arithmetic would lose changed on their way, and how some were stored."""
    with ts.open_store(url) as store:
        engine = make_engine(Kind(2), seed=0)
        train(engine, range(1))
        for flat in partitions_of(engine, {id(param): name for name, param in engine.module.named_parameters()}).flats:
            for tensor in (flat.master.detach(), engine.optimizer.state[flat.master]["exp_avg"]):
                tensor[:3] = torch.tensor(SPECIAL)
                tensor[3:4].view(torch.int32).fill_(PAYLOAD)
        commit(store, 1, engine)
        other = make_engine(Kind(3), seed=1)
        restore(store.checkout(), other)
        commit(store, 2, other)
        with store.checkout() as checkpoint:
            return [
                _changed(store, 1, 2),
                checkpoint.model["embed.weight"][0, :4].view(torch.int32).tolist(),
                checkpoint.optim["embed.weight"]["exp_avg"][0, :4].view(torch.int32).tolist(),
            ]


def _mixed_steps(url: str) -> dict[str, Any]:
    """Commit layers at different steps, in full and light; return what changes by way of another engine."""
    with ts.open_store(url) as store:
        engine = make_engine(Kind(1), seed=0)
        train(engine, range(1))
        commit(store, 1, engine)
        train(engine, range(1, 2))
        chosen = commit(store, 2, engine, ts.strategies.Budget("8kB"))
        train(engine, range(2, 3))
        commit(store, 3, engine, {"blocks.1": "light"})
        with store.checkout() as checkpoint:
            sources, fidelity = checkpoint.sources, checkpoint.fidelity["blocks.1"]
        other = make_engine(Kind(3), seed=1)
        restore(store.checkout(), other)
        commit(store, 4, other)
        drift = store.updates().of("relative_drift")
        return {
            "chosen": chosen.layers_written,
            "moved": bool((drift[1] > 0).any()),
            "sources": sources,
            "fidelity": fidelity,
            "changed": _changed(store, 3, 4),
        }


def _loss_scales(url: str) -> list[Any]:
    """Train where gradients overflow; return scales and losses of an engine, and of one that takes its place."""
    from deepspeed.accelerator import get_accelerator

    # torch computes in fp16 on CPUs too, if slowly: DeepSpeed asks whether they are made for it.
    get_accelerator().is_fp16_supported = lambda: True
    scaled = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2}
    found = []
    for kind in (
        Kind(2, "fp16", settings=(("fp16", scaled),)),
        Kind(1, settings=(("torch_autocast", {"enabled": True, "dtype": "float16"}),)),
    ):
        with ts.open_store(f"{url}/{kind.name}") as store:
            engine = make_engine(kind, seed=0)
            train(engine, range(4))
            commit(store, 4, engine)
            other = make_engine(kind, seed=1)
            restore(store.checkout(), other)
            before = [[one.skipped_steps, _scale_of(one)] for one in (engine, other)]
            losses = [train(one, range(4, 8)) for one in (engine, other)]
            found.append([before, losses, [_scale_of(one) for one in (engine, other)]])
    return found


def _scale_of(engine: Any) -> Any:
    scaler = engine.optimizer.torch_autocast_gradscaler
    return engine.optimizer.cur_scale if scaler is None else scaler.state_dict()
