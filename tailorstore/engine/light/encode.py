"""Making a layer light: which tensor is coded how, and the coding itself, piece by piece on several threads."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tailorstore.domain.light import BASED, BITS, Coding, LightSettings, LightTable, LightTensor
from tailorstore.engine.tensors.capture import LayerCapture, slots_of, weights_of
from tailorstore.engine.tensors.device_codes import codes_on_device, encode_on_device
from tailorstore.engine.tensors.elements import (
    any_negative,
    elements_of,
    is_rounding_of,
    sample_blocks,
    tensor_of,
)
from tailorstore.engine.tensors.memory import Tensor, name_of
from tailorstore.storage import quantise
from tailorstore.storage.light import CODED_DTYPES, CODES, EXACT, LOGARITHMIC, SCALES
from tailorstore.storage.threads import Job, in_turn

_PIECE = 16 * quantise.SLICE
_SAMPLE_BLOCKS = 256
_HALVES = ("bfloat16", "float16")
"""Rounding to these may err as much as the codes do."""


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """A layer as a light version holds it."""

    capture: LayerCapture
    """Its skeleton as it is, its arrays those of the light version."""
    table: LightTable
    error: float
    """Relative L2 error of its weights."""


@dataclass(slots=True)
class _Coded:
    """One tensor while it is coded."""

    tensor: LightTensor
    is_weight: bool
    codes: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    words: npt.NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    squared_errors: list[float] = field(default_factory=list)
    """Of its slices, in any order."""
    squared_norms: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        return _relative(self.squared_errors, self.squared_norms)


class LayerEncoder:
    """Codes one layer. Its jobs may run on any threads; the last calls ``done`` and returns what that returns."""

    def __init__(
        self,
        capture: LayerCapture,
        base: Mapping[str, Tensor],
        settings: LightSettings,
        previous: Mapping[str, LightTensor],
        done: Callable[[EncodedLayer], Iterable[Job]],
    ) -> None:
        """Take what is to be coded.

        Args:
            capture: live or staged tensors; they must not change until the last job has ended.
            base: elements of the base, by array path, in the dtypes that the tensors have now.
            settings: bits, blocks and bounds.
            previous: how tensors were coded by the version before on the same base: keeping to it saves reading what
                of the base is not needed, and trying how many bits suffice.
            done: is given the result.
        """
        self._capture = capture
        self._base = base
        self._settings = settings
        self._previous = previous
        self._done = done
        self._weights = set(weights_of(capture))
        self._buffers = {value["$array"] for value in capture.content["buffers"].values()}
        self._coded: dict[str, _Coded] = {}
        self._lock = threading.Lock()

    def jobs(self) -> list[Job]:
        """Return the jobs that code the layer."""
        jobs = [job for path, tensor in self._describe().items() for job in self._code(path, tensor)]
        return in_turn(jobs, self._finish)

    def _code(self, path: str, tensor: LightTensor) -> list[Job]:
        """Return the jobs that code one tensor."""
        self._coded[path] = coded = _Coded(tensor, path in self._weights)
        if not tensor.bits:
            return []
        count, block = tensor.elements, self._settings.block
        coded.codes = np.empty(quantise.packed_bytes(count, tensor.bits, block), np.uint8)
        words = quantise.scale_words(count, block, logarithmic=tensor.coding in LOGARITHMIC)
        coded.words = np.empty(words, np.uint16)
        return [self._piece(path, low, min(low + _PIECE, count)) for low in range(0, count, _PIECE)]

    def _describe(self) -> dict[str, LightTensor]:
        """Decide how each tensor is coded."""
        slots = slots_of(self._capture)
        masters = self._masters(slots)
        self._weights |= set(masters.values())
        return {
            path: self._choose(path, live, slots.get(path, ("", ""))[1], masters.get(path))
            for path, live in self._capture.arrays.items()
        }

    def _masters(self, slots: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Return 16-bit weight → the slot that it is exactly the rounding of."""
        arrays, names = self._capture.arrays, weights_of(self._capture)
        found: dict[str, str] = {}
        for path, name in names.items():
            for slot, (owner, _) in slots.items():
                if owner == name and path not in found and is_rounding_of(arrays[path], arrays[slot]):
                    found[path] = slot
        return found

    def _choose(self, path: str, live: Tensor, slot: str, master: str | None) -> LightTensor:
        dtype, shape = name_of(live.dtype), tuple(live.shape)
        exact = LightTensor(dtype, shape, "exact")
        if not shape or dtype not in CODED_DTYPES or live.numel() < self._settings.exact_below:
            return exact
        if master is not None:
            return LightTensor(dtype, shape, "rounded", of=master)
        if not self._bound(path):
            return exact
        base = self._base.get(path)
        if path in self._weights:
            # A variance that is rounded to less than zero makes NaN of what it normalises.
            if base is None or (path in self._buffers and not any_negative(live)):
                return exact
            return LightTensor(dtype, shape, "difference", self._bits(path, self._settings.weight_bits))
        if not slot:
            return exact
        kept = self._previous.get(path)
        usable = kept is not None and kept.bits and (base is not None or kept.coding not in BASED)
        coding = kept.coding if usable and kept else _better_coding(live, base, self._settings.block)
        bits = self._bits(path, self._settings.bits_of_slot(slot))
        return exact if coding == "exact" else LightTensor(dtype, shape, coding, bits)

    def _bits(self, path: str, asked: int) -> int:
        """Return how many bits to begin with: as many as sufficed for the version before."""
        kept = self._previous.get(path)
        return max(asked, kept.bits) if kept else asked

    def _bound(self, path: str) -> float:
        return self._settings.max_weight_error if path in self._weights else self._settings.max_slot_error

    def _device_piece(self, path: str, low: int, high: int) -> Job:
        def job() -> None:
            coded = self._coded[path]
            tensor, block = coded.tensor, self._settings.block
            base = self._base[path] if tensor.coding in BASED else None
            live = self._capture.arrays[path]
            logarithmic = tensor.coding in LOGARITHMIC
            found = encode_on_device(live, base, low, high, tensor.bits, block, logarithmic=logarithmic)
            codes_at = quantise.packed_bytes(low, tensor.bits, block)
            words_at = quantise.scale_words(low, block, logarithmic=logarithmic)
            coded.codes[codes_at : codes_at + found.codes.size] = found.codes
            coded.words[words_at : words_at + found.words.size] = found.words
            with self._lock:
                coded.squared_errors.append(found.squared_error)
                coded.squared_norms.append(found.squared_norm)

        return job

    def _piece(self, path: str, low: int, high: int) -> Job:
        if codes_on_device(self._capture.arrays[path]):
            return self._device_piece(path, low, high)

        def job() -> None:
            coded = self._coded[path]
            tensor, block = coded.tensor, self._settings.block
            live = elements_of(self._capture.arrays[path], low, high)
            base = elements_of(self._base[path], low, high) if tensor.coding in BASED else None
            logarithmic = tensor.coding in LOGARITHMIC
            encode = quantise.encode_log if logarithmic else quantise.encode_linear
            sums: list[tuple[float, float]] = []
            with np.errstate(invalid="ignore", over="ignore"):
                for at in range(low, high, quantise.SLICE):
                    end = min(at + quantise.SLICE, high)
                    codes = slice(*(quantise.packed_bytes(n, tensor.bits, block) for n in (at, end)))
                    words = slice(*(quantise.scale_words(n, block, logarithmic=logarithmic) for n in (at, end)))
                    part = quantise.widened(live[at - low : end - low], tensor.dtype)
                    of = None if base is None else quantise.widened(base[at - low : end - low], tensor.dtype)
                    stored = coded.codes[codes], coded.words[words]
                    measured = encode(part, of, tensor.bits, block, *stored)
                    if tensor.dtype in _HALVES and math.isfinite(sum(measured)):
                        decoded = _rounded(tensor, block, *stored, of, part.size)
                        measured = quantise.measure(part, decoded, logarithmic=logarithmic)
                    sums.append(measured)
            with self._lock:
                coded.squared_errors += [error for error, _ in sums]
                coded.squared_norms += [norm for _, norm in sums]

        return job

    def _finish(self) -> Iterable[Job]:
        again: list[Job] = []
        for path, coded in list(self._coded.items()):
            tensor = coded.tensor
            if not tensor.bits or (math.isfinite(coded.error) and coded.error <= self._bound(path)):
                continue
            more = [bits for bits in BITS if bits > tensor.bits and math.isfinite(coded.error)]
            if more:
                again += self._code(path, replace(tensor, bits=more[0]))
            else:
                coded.tensor = LightTensor(tensor.dtype, tensor.shape, "exact")
        if again:
            return in_turn(again, self._finish)
        table, arrays = self._lay_out()
        weights = [coded for coded in self._coded.values() if coded.is_weight and coded.tensor.coding != "exact"]
        errors = [error for coded in weights for error in coded.squared_errors]
        norms = [norm for coded in weights for norm in coded.squared_norms]
        capture = replace(self._capture, arrays=arrays)
        return self._done(EncodedLayer(capture, table, _shortened(_relative(errors, norms))))

    def _lay_out(self) -> tuple[LightTable, dict[str, Tensor]]:
        """Put the tensors' codes one behind the other, those that are alike together: they compress better so."""
        parts: dict[str, list[npt.NDArray[Any]]] = {CODES: [], SCALES: [], EXACT: []}
        sizes = dict.fromkeys(parts, 0)
        tensors: dict[str, LightTensor] = {}

        def place(array: str, part: npt.NDArray[Any]) -> int:
            at = sizes[array]
            parts[array].append(part)
            sizes[array] += part.size
            return at

        # By name within that, so that equal state gives equal bytes whoever codes it.
        for path, coded in sorted(
            self._coded.items(), key=lambda item: (item[1].tensor.coding, item[1].tensor.bits, item[0])
        ):
            tensor = coded.tensor
            if tensor.coding == "exact":
                live = self._capture.arrays[path]
                raw = elements_of(live, 0, tensor.elements).view(np.uint8)
                tensor = replace(tensor, codes_at=place(EXACT, raw))
            elif tensor.bits:
                tensor = replace(tensor, codes_at=place(CODES, coded.codes), scales_at=place(SCALES, coded.words))
            tensors[path] = replace(tensor, error=0.0 if tensor.coding == "exact" else _shortened(coded.error))
        arrays = {path: tensor_of(np.concatenate(found)) for path, found in parts.items() if found}
        ordered = {path: tensors[path] for path in self._capture.arrays}
        return LightTable(self._settings.block, ordered), arrays


def _relative(squared_errors: Iterable[float], squared_norms: Iterable[float]) -> float:
    """Return the root of the ratio of two sums, the same in whatever order; infinite where there is none."""
    try:
        error, norm = math.fsum(squared_errors), math.fsum(squared_norms)
    except OverflowError:
        return math.inf
    if not math.isfinite(error) or not math.isfinite(norm):
        return math.inf
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / norm)


def _shortened(error: float) -> float:
    """Round an error up to four digits: a bound that is short to write."""
    if not error:
        return 0.0
    exponent = math.floor(math.log10(error)) - 3
    return float(f"{math.ceil(error / 10.0**exponent)}e{exponent}")


def _rounded(
    tensor: LightTensor,
    block: int,
    codes: npt.NDArray[np.uint8],
    words: npt.NDArray[np.uint16],
    base: quantise.FloatArray | None,
    count: int,
) -> quantise.FloatArray:
    """Decode a slice of a 16-bit tensor as reading it will, and widen it again."""
    wide: quantise.FloatArray = np.empty(count, np.float32)
    if tensor.coding in LOGARITHMIC:
        quantise.decode_log(codes, words, tensor.bits, block, base, tensor.dtype, wide)
    else:
        quantise.decode_linear(codes, words, tensor.bits, block, base, wide)
    narrow = np.empty(count, np.uint16 if tensor.dtype == "bfloat16" else np.float16)
    quantise.narrowed(wide, tensor.dtype, narrow)
    return quantise.widened(narrow, tensor.dtype)


def _better_coding(live: Tensor, base: Tensor | None, block: int) -> Coding:
    """Return how a slot is coded with the least error, as a sample of its blocks tells."""
    values = sample_blocks(live, block, _SAMPLE_BLOCKS)
    others = None if base is None else sample_blocks(base, block, _SAMPLE_BLOCKS)
    if others is not None and not np.isfinite(others).all():
        others = None
    if not np.isfinite(values).all():
        return "exact"
    # What is never negative is taken for a second moment.
    if (values >= 0).all() and not any_negative(live):
        if others is None or (others < 0).any():
            return "log"
        with np.errstate(divide="ignore"):
            logs = np.where(values > 0, np.log2(values), np.nan)
            ratios = logs - np.where(others > 0, np.log2(others), 0)
        return "ratio" if _mean_range(ratios) < _mean_range(logs) else "log"
    if others is None:
        return "value"
    return "difference" if _mean_peak(values - others) < _mean_peak(values) else "value"


def _mean_peak(rows: npt.NDArray[np.float64]) -> float:
    """Return what the error of linear codes goes with."""
    return float(np.mean(np.abs(rows).max(axis=1) ** 2))


def _mean_range(logs: npt.NDArray[np.float64]) -> float:
    """Return what the error of logarithmic codes goes with; NaN stands for zeros, which cost nothing."""
    known = logs[~np.isnan(logs).all(axis=1)]
    return float(np.mean((np.nanmax(known, axis=1) - np.nanmin(known, axis=1)) ** 2)) if known.size else 0.0
