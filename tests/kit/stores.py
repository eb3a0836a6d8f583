"""The stores that are kept in ``tests/data``: how each is made. :mod:`tests.kit.fixtures` makes and keeps them all."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

import tailorstore as ts
from tests.kit.damages import earlier_catalog
from tests.kit.kept import Recorder, describe, live_optim, parts_of, random_states, seed_generators
from tests.kit.layouts import in_layout, reference
from tests.kit.models import gpt, train
from tests.kit.postgres import postgres_programs, run_postgres
from tests.kit.ranks import run_ranks

ROOT_IN_DUMP: Final = "file:///@ROOT@"
"""Stands in a database's dump for the URL of the root."""

NOW: Final = timedelta(0)


@dataclass(slots=True)
class Made:
    """A store that was made."""

    root: Path
    recorder: Recorder
    about: dict[str, Any] = field(default_factory=dict)
    """What else stands in its JSON."""


# --- Tensors

PLAIN: Final = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex32", "complex64", "complex128"),
]
SMALL: Final = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
NAN_PAYLOADS: Final = {
    "float16": ("int16", [0x7C01, -0x3FF, 0x0001]),
    "bfloat16": ("int16", [0x7F81, -0x7F, 0x0001]),
    "float32": ("int32", [0x7F800001, -0x3FFFF0, 0x00000001]),
    "float64": ("int64", [0x7FF0000000000001, -0x7FFF0, 0x0000000000000001]),
}
"""Bits of a signalling NaN, of a negative one with a payload, and of the least denormal."""


def bits_of(dtype: str, shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """Return elements of all kinds of bits, but few different ones, so that archives stay small."""
    kind: torch.dtype = getattr(torch, dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = ((torch.arange(size) * 37 + start) % 251).to(torch.uint8)
    return (raw % 2).bool().reshape(shape) if dtype == "bool" else raw.view(kind).reshape(shape)


def all_kinds(start: int) -> dict[str, torch.Tensor]:
    """Return tensors of every dtype, of odd shapes, and with odd names."""
    found = {f"kinds.{dtype}": bits_of(dtype, (3, 11), start) for dtype in [*PLAIN, *SMALL]}
    for dtype, (words, values) in NAN_PAYLOADS.items():
        found[f"odd.{dtype}"] = torch.tensor(values, dtype=getattr(torch, words)).view(getattr(torch, dtype))
    found["odd.zeros"] = torch.tensor([-0.0, 0.0, float("inf"), -float("inf")])
    found["odd.none"] = torch.empty(0, 4, dtype=torch.bfloat16)
    found["odd.one"] = torch.tensor(-0.0, dtype=torch.float64)
    found["chunks.rows"] = bits_of("float32", (300, 3), start)
    found["chunks.wide"] = bits_of("int64", (2, 200), start)
    found["chunks.transposed"] = bits_of("int16", (40, 30), start).T
    found["tied.first"] = found["tied.second"] = bits_of("float32", (5, 5), start)
    names = ["slash/../path", ".hidden", "__zarr__", "zarr.json", "ünïcode ☃", "long" * 60, "@mine", "a=b%20c~d"]
    return found | {f"{name}.w": torch.full((2,), float(at)) for at, name in enumerate(names)}


# --- Good stores


def make_kinds(root: Path) -> Made:
    """Every dtype, shape and name, in every codec: one branch each."""
    recorder = Recorder(root)
    for at, codec in enumerate(("none", "lz4", "zstd")):
        seed_generators()
        with ts.open_store(root, branch=codec, codec=codec, chunk_bytes=1024) as store:  # type: ignore[arg-type]
            slots = {"kinds.float32": {"exp_avg": bits_of("bfloat16", (3, 11)), "step": torch.tensor(3.0)}}
            recorder.commit(store, 1, all_kinds(at), slots, message=f"all kinds, {codec}")
    return Made(root, recorder)


def make_training(root: Path) -> Made:
    """A run: optimizers of several kinds, groups, extra state, masks, strategies with what they learned, forks."""
    recorder = Recorder(root)
    model = gpt(seed=1, layers=2, width=4, tied=True)
    blocks = model.transformer.h
    adam = torch.optim.AdamW(
        [
            {"params": blocks[0].parameters(), "lr": 1e-2, "name": "first"},
            {"params": model.transformer.wte.parameters(), "weight_decay": 0.0},
        ],
        amsgrad=True,
    )
    sgd = torch.optim.SGD(blocks[1].parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    prop = torch.optim.RMSprop(model.transformer.ln_f.parameters(), lr=1e-3, centered=True)
    optimizers = [adam, sgd, prop]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20)
    strategy = ts.parse_strategy("top_k(2).max_age(commits=4)")
    with ts.open_store(root, chunk_bytes=1024) as store:
        for step in range(1, 6):
            train(model, optimizers, 1, seed=step)
            scheduler.step()
            seed_generators()
            extra = {
                "scheduler": scheduler.state_dict(),
                "position": torch.arange(step),
                "numbers": [np.arange(3, dtype=np.uint16), np.float32(1.5), 2**80, -0.0, float("nan")],
                "tuple": (1, b"\x00\xff", None, {3: "three"}),
            }
            recorder.commit(
                store,
                step * 10,
                model,
                optimizers,
                mask=None if step == 1 else strategy,
                metrics={"loss": 1 / step, "odd": float("nan") if step % 2 else -float("inf")},
                message=None if step == 3 else f"step {step}, ünïcode ☃",
                extra=extra,
            )
        store.tag("best", 30)
        store.tag("v1.0/rc+1", 50)
        store.branch("retry", 40)
    with ts.open_store(root, branch="retry", chunk_bytes=1024, codec="zstd") as store:
        seed_generators()
        train(model, optimizers, 1, seed=99)
        recorder.commit(store, 45, model, optimizers, mask=["*h.0"], metrics={"loss": 3.0}, extra={"again": True})
    return Made(root, recorder)


def make_light(root: Path) -> Made:
    """Light versions in all numbers of bits and of all codings, with their bases."""
    recorder = Recorder(root)
    chance = torch.Generator().manual_seed(7)

    def state(step: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
        drift = 0.01 * step * torch.randn(24, 20, generator=torch.Generator().manual_seed(step))
        master = first + drift
        model = {
            "a.w": first - drift,
            "a.half": master.bfloat16(),
            "a.count": torch.arange(90) * step,
            "a.infinite": torch.cat([drift[0], torch.tensor([float("inf"), -0.0])]),
            "b.w": drift[:, :3].double(),
        }
        slots = {
            "a.w": {"exp_avg": drift, "exp_avg_sq": drift.square() + 1e-9, "step": torch.tensor(float(step))},
            "a.half": {"master": master, "exp_avg_sq": drift.square() * (step % 2)},
        }
        return model, slots

    first = torch.randn(24, 20, generator=chance)
    seed_generators()
    with ts.open_store(root, chunk_bytes=1024) as store:
        recorder.commit(store, 1, *state(1))
        for bits in (2, 3, 4, 5, 6, 8):
            store.branch(f"bits-{bits}", "main")
    for bits in (2, 3, 4, 5, 6, 8):
        light = ts.LightSettings(
            weight_bits=bits, slot_bits=bits, block=16 * bits if bits in (2, 4, 8) else 64, exact_below=64,
            max_weight_error=10, max_slot_error=10, due_error=10,
        )  # fmt: skip
        with ts.open_store(root, branch=f"bits-{bits}", light=light, chunk_bytes=1024) as store:
            model, slots = state(bits)
            recorder.commit(store, bits, model, slots, mask={"a": "light"}, message=f"{bits} bits")
    return Made(root, recorder)


def small_state(step: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Return the state of the store that is damaged: three layers, one of several chunks, one fit to be light."""
    drift = (torch.arange(600) * 37 % 13 - 6) * step / 16  # few different numbers: small archives
    model = {
        "a.w": torch.arange(600.0) * step,
        "a.v": torch.full((3,), step, dtype=torch.bfloat16),
        "b/c.w": torch.arange(7) * step,
        "d.w": (torch.arange(600) % 7 + drift * 0.01).reshape(20, 30),
    }
    return model, {"a.w": {"exp_avg": drift, "step": torch.tensor(float(step))}}


def make_history(root: Path) -> Made:
    """Make a store with all that a catalog must know of one: forks, moves, drops, tags, light versions.

    ``main`` has steps 1, 2, 4 and 5, step 3 was dropped; ``side`` goes off at 2; ``trial`` was moved back to 4, and its
    first 5 is held by the tag ``adrift`` alone.
    """
    recorder = Recorder(root)
    light = ts.LightSettings(weight_bits=4, exact_below=64)
    good = {"good": 1.0}

    def commit(branch: str, step: int, mask: Any, metrics: dict[str, float] = good) -> None:
        with ts.open_store(root, branch=branch, chunk_bytes=1024, light=light) as store:
            seed_generators()
            recorder.commit(store, step, *small_state(step), mask=mask, metrics=metrics, extra={"at": step})

    commit("main", 1, None)
    commit("main", 2, ["a"])
    with ts.open_store(root) as store:
        store.branch("side", "main")
        store.tag("first", 1)
        store.tag("gone", 1)
        store.branch("over", 1)
    commit("side", 3, ["a"])
    commit("main", 3, ["b/c"], {})
    commit("main", 4, {"d": "light"})
    with ts.open_store(root) as store:
        store.branch("trial", "main")
        store.delete_tag("gone")
        store.delete_branch("over")
        store.tag("best", "main")
    commit("trial", 5, ["a"])
    with ts.open_store(root) as store:
        store.tag("adrift", "trial")
        store.branch("trial", "main", move=True)
    commit("trial", 6, ["b/c"])
    with ts.open_store(root) as store:
        report = store.gc(ts.KeepBest("good", 100, "max"), grace=NOW)
        assert [(one.step, one.branch) for one in report.expired] == [(3, "main")]
        assert report.versions_swept
    shutil.copy2(root / "catalog.sqlite", earlier_catalog(root))
    commit("main", 5, ["a"])
    return Made(root, recorder)


def _commit_sharded(url: str) -> str:
    model, optimizer = in_layout("sharded")
    seed_generators()
    with ts.open_store(url, chunk_bytes=1024, codec="zstd") as store:
        commit = store.commit(5, model, optimizer, extra={"rank": dist.get_rank()}, metrics={"loss": 1.0})
    return commit.id


def make_ranks(root: Path) -> Made:
    """Make a store by two ranks that hold a model in shards, each with extra state of its own."""
    recorder = Recorder(root)
    (commit_id, _) = run_ranks(_commit_sharded, 2, root)
    model, optimizer = reference()
    slots, groups = live_optim(model, optimizer)
    seed_generators()
    parts = parts_of(model.state_dict(), slots)
    described = {"groups": describe(groups), "rng": random_states()}
    with ts.open_store(root) as store:
        recorder.note(store, store.show(commit_id), parts, {}, described, {"rank": 0}, {"rank": 1})
    return Made(root, recorder)


def make_postgres(root: Path) -> Made:
    """Make a store whose catalog is in PostgreSQL; its dump goes with it."""
    recorder = Recorder(root)
    with run_postgres() as server, server.create_database() as url:
        with ts.open_store(root, catalog=url, chunk_bytes=1024) as store:
            for step in (1, 2):
                seed_generators()
                recorder.commit(store, step, *small_state(step), mask=["a"], message=f"step {step} \N{SNOWMAN}")
            store.tag("first", 1)
            made = Made(root, recorder, {"kept": recorder.kept(store)})
        done = subprocess.run(
            [
                *(postgres_programs() / "pg_dump", "--inserts", "--no-owner", "--no-privileges", "--no-comments"),
                f"--dbname={url.replace('+psycopg', '')}",
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    # Settings and meta-commands are for psql, and differ between versions of the server.
    left_out = re.compile(r"--|SET |\\|SELECT pg_catalog.set_config")
    lines = [line for line in done.stdout.splitlines() if line and not left_out.match(line)]
    dump = "\n".join(lines).replace(f"file://{root}", ROOT_IN_DUMP)
    assert ROOT_IN_DUMP in dump
    (root / "catalog.sql").write_text(dump + "\n")
    return made


GOOD: Final[dict[str, Callable[[Path], Made]]] = {
    "kinds": make_kinds,
    "training": make_training,
    "light": make_light,
    "history": make_history,
    "ranks": make_ranks,
    "postgres": make_postgres,
}
