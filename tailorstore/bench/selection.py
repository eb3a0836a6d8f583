"""What light commits, measuring and choosing cost a trainer."""

import shutil
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

import tailorstore as ts
from tailorstore.bench.report import Row, interleaved
from tailorstore.bench.state import Llama, TrainingState, training_state
from tailorstore.domain.mask import LayerState, Mask, MaskContext, Strategy, resolve_mask
from tailorstore.domain.names import layer_rule
from tailorstore.domain.records import LayerMeasures
from tailorstore.domain.strategies import Budget
from tailorstore.engine.tensors.capture import capture
from tailorstore.engine.tensors.measures import Gauge

_LIGHT: Mask = {"*": "light"}
_MEBIBYTE = 1 << 20


def measure(folder: Path, *, gigabytes: float, repeat: int, say: Callable[[str], None]) -> list[Row]:
    """Measure light commits beside full ones, what measuring adds to training, and how long choosing takes.

    Args:
        folder: where to write; everything made there is removed.
        gigabytes: size of the state.
        repeat: how often; medians are reported.
        say: is told what is going on.
    """
    say(f"making {gigabytes} GB of training state")
    bench = _Bench(folder, training_state(gigabytes))
    try:
        return [*_light_rows(bench, repeat, say), *_measuring_rows(repeat, say), *_choosing_rows(repeat, say)]
    finally:
        bench.close()


class _Bench:
    def __init__(self, folder: Path, state: TrainingState) -> None:
        self._folder = folder
        self.state = state
        self.store = ts.open_store(folder / "store", catalog=f"sqlite:///{folder}/catalog.sqlite")
        self.step = 0
        self.bytes_written = 0

    def commit(self, mask: Mask, *, block: bool = True) -> float:
        """Train a little, keep two commits, and return how long the trainer waits for the next."""
        _train(self.state)
        if self.step > 1:
            self.store.gc(ts.KeepLast(2), grace=timedelta(0))
        self.step += 1
        start = time.perf_counter()
        if block:
            commit = self.store.commit(self.step, self.state.model, self.state.optim, mask)
            taken = time.perf_counter() - start
        else:
            pending = self.store.commit(self.step, self.state.model, self.state.optim, mask, block=False)
            taken = time.perf_counter() - start
            commit = pending.result()
        self.bytes_written = commit.bytes_written
        return taken

    def restore(self) -> float:
        with self.store.checkout() as checkpoint:
            start = time.perf_counter()
            checkpoint.restore(self.state.model, self.state.optim)
            return time.perf_counter() - start

    def close(self) -> None:
        self.store.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _train(state: TrainingState) -> None:
    """Change everything as some steps of AdamW do."""
    with torch.no_grad():
        for param in state.model.parameters():
            slots = state.optim.state[param]
            param.add_(torch.randn_like(param), alpha=1e-4)
            slots["exp_avg"].normal_().mul_(1e-3)
            slots["exp_avg_sq"].mul_(torch.rand_like(param).add_(0.5))
            slots["step"] += 1


def _light_rows(bench: _Bench, repeat: int, say: Callable[[str], None]) -> list[Row]:
    say("full and light commits")
    bench.commit(None)
    bench.commit(_LIGHT)  # reads the base into memory, once for every base
    full_bytes, light_bytes = 0, 0

    def full() -> float:
        nonlocal full_bytes
        taken = bench.commit(None)
        full_bytes = bench.bytes_written
        return taken

    def light() -> float:
        nonlocal light_bytes
        taken = bench.commit(_LIGHT)
        light_bytes = bench.bytes_written
        return taken

    def of_new_base() -> float:
        bench.commit(None)
        return bench.commit(_LIGHT)

    walls = interleaved({"full": full}, repeat) | interleaved({"first": of_new_base}, repeat)
    walls |= interleaved({"light": light}, repeat)
    restores = interleaved({"light": bench.restore}, repeat)
    say("the same behind the trainer's back")
    waits = interleaved({"light": lambda: bench.commit(_LIGHT, block=False)}, repeat)
    waits |= interleaved({"full": lambda: bench.commit(None, block=False)}, repeat)
    restores |= interleaved({"full": bench.restore}, repeat)
    size = f"{bench.state.nbytes / 1e9:.2f} GB"
    return [
        Row(f"light commit ({size})", walls["light"], "s", "full commit", walls["full"], 1.0),
        Row("light commit, the first on a new base", walls["first"], "s", "full commit", walls["full"]),
        Row("wait of an asynchronous light commit", waits["light"], "s", "that of a full one", waits["full"], 1.1),
        Row("bytes of a light commit", light_bytes / _MEBIBYTE, "MiB", "full commit", full_bytes / _MEBIBYTE),
        Row("restore of a light composite", restores["light"], "s", "of a full one", restores["full"]),
    ]


def _measuring_rows(repeat: int, say: Callable[[str], None]) -> list[Row]:
    say("measuring layers beside training steps")
    torch.manual_seed(0)
    model = Llama(8, 512)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 8192, (4, 128))

    def train() -> float:
        start = time.perf_counter()
        optim.zero_grad()
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optim.step()
        return time.perf_counter() - start

    train()
    gauge = Gauge()
    rule = layer_rule(1)
    captured = capture(model, optim, rule)
    gauge.keep(gauge.sample(captured, captured.layers))

    def measured() -> float:
        start = time.perf_counter()
        gauge.observe(model)
        gauge.measure(capture(model, optim, rule))
        return time.perf_counter() - start

    measured()
    taken = interleaved({"step": train, "measure": measured}, 2 * repeat + 1)
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    return [
        Row(
            "measuring every layer once",
            1000 * taken["measure"],
            "ms",
            f"training step of {weights / 4e6:.0f} M parameters, 512 tokens",
            1000 * taken["step"],
            0.1,
            note="at one measurement in ten steps, a tenth of this",
        ),
        Row("memory of the samples", gauge.nbytes / _MEBIBYTE, "MiB", "weights", weights / _MEBIBYTE, 0.01),
    ]


def _choosing_rows(repeat: int, say: Callable[[str], None]) -> list[Row]:
    say("choosing among 400 layers")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand((400, 3), generator=generator).tolist()
    layers = {}
    for at, (size, moved, age) in enumerate(drawn):
        measures = LayerMeasures(moved, moved / 10, moved, moved, moved**2)
        full = int(1e8 * (0.1 + size))
        layers[f"h.{at}"] = LayerState(
            name=f"h.{at}",
            bytes_logical=full,
            source_step=100 - int(10 * age),
            fidelity="full",
            current_step=100 - int(10 * age),
            commits_since=int(10 * age),
            base_step=50,
            base_commits_since=5,
            due_full=False,
            bytes_full=full,
            bytes_light=full // 10,
            measures=measures,
        )
    context = MaskContext("main", 110, layers, number=11)
    everything = sum(state.bytes_full for state in layers.values())

    def row(name: str, strategy: Strategy) -> Row:
        def choose() -> float:
            start = time.perf_counter()
            resolve_mask(strategy, context)
            return time.perf_counter() - start

        choose()
        taken = statistics.median(choose() for _ in range(20 * repeat))
        return Row(f"mask of 400 layers, {name}", 1000 * taken, "ms", target=5.0)

    third = everything // 3
    return [
        row("budget", Budget(bytes_per_commit=third)),
        row("budget, no layer older than 12 commits", Budget(bytes_per_commit=third).max_age(commits=12)),
        row("budget of full and light", Budget(bytes_per_commit=third, light=True).max_age(commits=12)),
    ]
