"""Boxes of stored tensors are read straight to where they belong, from no chunk that they do not meet."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tailorstore as ts
from tailorstore.domain.chunks import Box, box_of
from tailorstore.domain.errors import DigestMismatchError
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.light import decode
from tailorstore.engine.light.decode import read_tensor, read_tensors
from tailorstore.engine.light.sources import LightSource, Source
from tailorstore.engine.tensors.shards import Part, Sharded
from tests.engine.test_commit_and_restore import COMPLEXES, FLOAT8S, FLOATS, INTS, every_bit_pattern
from tests.kit.models import bits, same_bits
from tests.kit.reading import Watched, extents, objects_with, sources_of, taken

CHUNK_BYTES = 1024
BLOCK = 128

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STATE = {
    "a.rows": noise(40, 50),
    "a.prime": noise(31, 33),
    "a.wide": noise(3, 1000),
    "a.vector": noise(700),
    "a.scalar": noise(),
    "b.experts": noise(5, 12, 20),
    "b.large_experts": noise(4, 30, 40),
    "b.half": noise(64, 33).bfloat16(),
    "b.empty": noise(0, 4),
    "b.flags": noise(90, 40) > 0,
    "b.complex": torch.complex(noise(30, 20), noise(30, 20, seed=1)),
}


@pytest.fixture(scope="module", params=["none", "zstd"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with ts.open_store(tmp_path_factory.mktemp("full"), codec=request.param, chunk_bytes=CHUNK_BYTES) as store:
        store.commit(1, STATE)
        yield store.checkout()


def watched(checkpoint: Checkpoint) -> Watched:
    return Watched(Path(checkpoint._objects.url.removeprefix("file://")))


# --- Where the elements of a box lie in memory


def lying_plain(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def lying_turned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    turned = torch.zeros(shape[::-1], dtype=dtype)
    return turned.permute(tuple(reversed(range(len(shape)))))


def lying_inside(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    around = torch.zeros(tuple(extent + 3 for extent in shape), dtype=dtype)
    return around[tuple(slice(1, 1 + extent) for extent in shape)]


LYING: dict[str, Callable[[tuple[int, ...], torch.dtype], torch.Tensor]] = {
    "plain": lying_plain,
    "turned": lying_turned,
    "inside": lying_inside,
}


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    cuts = []
    for extent in shape:
        start = draw(st.integers(0, extent))
        whole = draw(st.booleans())
        cuts.append((0, extent) if whole else (start, draw(st.integers(start, extent))))
    return tuple(cuts)


@st.composite
def parts_of(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Sharded:
    found = []
    for box in draw(st.lists(boxes(shape), max_size=3)):
        lying = LYING[draw(st.sampled_from(sorted(LYING)))]
        found.append(Part(box, lying(extents(box), dtype)))
    return Sharded(shape, dtype, tuple(found))


def assert_read(objects: Watched, targets: Sequence[tuple[Source, Sharded]], values: Sequence[torch.Tensor]) -> None:
    """Read, and fail unless every part holds its box to the bit, from just the objects it needs, each read once."""
    read_tensors(objects, targets)
    for (source, target), value in zip(targets, values, strict=True):
        for part in target.parts:
            assert same_bits(part.tensor, taken(value, part.box)), (source, part.box)
    needed = set[str]().union(*(objects_with(source, part.box) for source, target in targets for part in target.parts))
    assert Counter(objects.read) == Counter(needed)


@MANY
@given(data=st.data())
def test_parts_are_filled_from_the_chunks_that_they_meet(full: Checkpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(STATE)))
    target = data.draw(parts_of(tuple(STATE[name].shape), STATE[name].dtype))
    assert_read(watched(full), [(sources_of(full)[name], target)], [STATE[name]])
    for part in target.parts:
        around = part.tensor._base
        if around is not None and not torch.is_complex(around):
            assert around.count_nonzero() == part.tensor.count_nonzero(), "memory beside a part was written"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_shards_of_all_ranks_make_the_tensor(full: Checkpoint, size: int) -> None:
    sources = sources_of(full)
    for name, value in STATE.items():
        if value.dim() == 0:
            continue
        step = -(-value.shape[0] // size)
        read: Counter[str] = Counter()
        shards = []
        for rank in range(size):
            rows = (min(rank * step, value.shape[0]), min((rank + 1) * step, value.shape[0]))
            box = (rows, *box_of(tuple(value.shape))[1:])
            shards.append(lying_plain(extents(box), value.dtype))
            parts = (Part(box, shards[-1]),) if shards[-1].numel() else ()
            objects = watched(full)
            assert_read(objects, [(sources[name], Sharded(tuple(value.shape), value.dtype, parts))], [value])
            read += Counter(objects.read)
        assert bits(torch.cat(shards)) == bits(value)
        # A chunk is read by more than one only where a cut goes through it.
        assert read.total() <= len(objects_with(sources[name], box_of(sources[name].shape))) + size - 1, name


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_keeps_every_bit_in_parts(tmp_path: Path) -> None:
    state = {str(dtype): every_bit_pattern(dtype) for dtype in [*FLOATS, *FLOAT8S, *INTS, *COMPLEXES, torch.bool]}
    with ts.open_store(tmp_path / "root", chunk_bytes=CHUNK_BYTES) as store:
        store.commit(1, state)
        checkpoint = store.checkout()
        sources = sources_of(checkpoint)
        cuts: list[Box] = [((0, 2), (0, 7)), ((2, 5), (0, 3)), ((2, 5), (3, 7)), ((5, 6), (0, 7))]
        for lying in LYING.values():
            targets = {
                name: Sharded((6, 7), value.dtype, tuple(Part(box, lying(extents(box), value.dtype)) for box in cuts))
                for name, value in state.items()
            }
            assert_read(
                watched(checkpoint), [(sources[name], target) for name, target in targets.items()], [*state.values()]
            )


def test_whole_rows_of_a_plain_part_are_read_straight_into_it(tmp_path: Path) -> None:
    value = noise(1000, 64)
    with ts.open_store(tmp_path / "root", chunk_bytes=8 << 10) as store:
        store.commit(1, {"w": value})
        checkpoint = store.checkout()
        [source] = sources_of(checkpoint).values()
        objects = watched(checkpoint)
        rows = torch.zeros(300, 64)
        assert_read(objects, [(source, Sharded((1000, 64), value.dtype, (Part(((90, 390), (0, 64)), rows),)))], [value])
    own = range(rows.data_ptr(), rows.data_ptr() + rows.nbytes)
    # The part begins and ends in the middle of a chunk: of these two, too, what is wanted goes straight into place.
    inside = [held for several in objects.filled.values() for held in several if held.start in own and held]
    assert len(inside) == len(objects.filled)
    assert sum(map(len, inside)) == rows.nbytes
    assert all(held.stop <= own.stop for held in inside)


def test_a_model_of_parts_is_restored(full: Checkpoint) -> None:
    parts = {
        name: Sharded(tuple(value.shape), value.dtype, (Part(box_of(tuple(value.shape)), torch.zeros_like(value)),))
        for name, value in STATE.items()
    }
    full.restore(parts)
    for name, value in STATE.items():
        assert same_bits(parts[name].parts[0].tensor, value), name


def test_parts_of_another_dtype_are_cast(full: Checkpoint) -> None:
    box: Box = ((3, 22), (4, 40))
    target = torch.zeros(extents(box), dtype=torch.float64)
    read_tensors(watched(full), [(sources_of(full)["a.rows"], Sharded((40, 50), target.dtype, (Part(box, target),)))])
    assert same_bits(target, taken(STATE["a.rows"], box).double())


def test_damage_is_noticed_by_the_ranks_whose_boxes_meet_it(tmp_path: Path) -> None:
    value = noise(40, 50)
    with ts.open_store(tmp_path / "root", chunk_bytes=CHUNK_BYTES) as store:
        store.commit(1, {"w": value})
        checkpoint = store.checkout()
        [source] = sources_of(checkpoint).values()
        [key] = objects_with(source, ((0, 1), (0, 1)))
        chunk = tmp_path / "root" / key
        raw = bytearray(chunk.read_bytes())
        raw[-1] ^= 1
        chunk.chmod(0o644)
        chunk.write_bytes(raw)

        def part(first: int, stop: int) -> Sharded:
            return Sharded((40, 50), value.dtype, (Part(((first, stop), (0, 7)), torch.zeros(stop - first, 7)),))

        beyond = part(20, 40)
        read_tensors(checkpoint._objects, [(source, beyond)])
        assert same_bits(beyond.parts[0].tensor, value[20:, :7])
        with pytest.raises(DigestMismatchError, match="array 'w'"):
            read_tensors(checkpoint._objects, [(source, part(0, 3))])


# --- Light versions


def light_state(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Return weights and slots; those of another seed have drifted a little."""

    def value(*shape: int, at: int = 0) -> torch.Tensor:
        return noise(*shape, seed=at) + seed * 0.01 * noise(*shape, seed=at + 50)

    masters = {"a.rows": value(40, 50), "a.experts": value(5, 12, 20, at=1), "b.wide": value(3, 1000, at=2)}
    weights = {name: master.bfloat16() for name, master in masters.items()}
    weights |= {"a.prime": value(31, 33, at=3), "b.vector": value(700, at=4), "b.small": value(6, 5, at=5)}
    weights |= {"b.double": value(60, 21, at=6).double(), "b.whole": torch.arange(600 * seed, 600 * seed + 600)}
    slots = {
        name: {
            "exp_avg": value(*weight.shape, at=7),
            "exp_avg_sq": value(*weight.shape, at=8).square(),
            **({"master": masters[name]} if name in masters else {}),
        }
        for name, weight in weights.items()
        if name != "b.whole"
    }
    slots["a.rows"]["exp_avg_sq"][7:9] = 0
    # Nothing like what was there before: their differences would take more than they do.
    slots["a.prime"] = {"exp_avg": noise(31, 33, seed=100 + seed), "exp_avg_sq": noise(31, 33, seed=200 + seed) ** 8}
    return weights, slots


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    small = ts.LightSettings(weight_bits=4, slot_bits={"exp_avg": 2, "*": 8}, block=BLOCK, exact_below=64)
    with ts.open_store(tmp_path_factory.mktemp("light"), chunk_bytes=CHUNK_BYTES, light=small) as store:
        store.commit(1, *light_state(0))
        store.commit(2, *light_state(1), mask={"*": "light"})
        yield store.checkout()


@pytest.fixture(scope="module")
def decoded(light: Checkpoint) -> Mapping[str, torch.Tensor]:
    """What the light versions give as a whole."""
    return {name: read_tensor(light._objects, source) for name, source in sources_of(light).items()}


def test_tensors_of_every_coding_are_cut(light: Checkpoint) -> None:
    codings = {source.tensor.coding for source in sources_of(light).values() if isinstance(source, LightSource)}
    assert codings == {"exact", "difference", "value", "ratio", "log", "rounded"}


@pytest.mark.parametrize("piece", [2 * BLOCK, 1 << 20])
@MANY
@given(data=st.data())
def test_parts_of_light_versions_are_those_of_the_whole(
    light: Checkpoint, decoded: Mapping[str, torch.Tensor], piece: int, data: st.DataObject
) -> None:
    sources = sources_of(light)
    chosen = data.draw(st.lists(st.sampled_from(sorted(sources)), min_size=1, max_size=3))
    targets = [data.draw(parts_of(sources[name].shape, decoded[name].dtype)) for name in chosen]
    held = [(sources[name], target) for name, target in zip(chosen, targets, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_PIECE", piece)
        objects = watched(light)
        values = [decoded[name] for name in chosen]
        if piece > 3000:
            assert_read(objects, held, values)
            return
        read_tensors(objects, held)
    for target, value in zip(targets, values, strict=True):
        assert all(same_bits(part.tensor, taken(value, part.box)) for part in target.parts)
    # Smaller pieces need no more than the whole run from a part's first element to its last.
    needed = set[str]().union(*(objects_with(source, part.box) for source, target in held for part in target.parts))
    assert set(objects.read) <= needed
    assert max(Counter(objects.read).values(), default=0) <= 1


def test_a_shard_of_all_tensors_of_a_light_layer_takes_its_share_of_codes(tmp_path: Path) -> None:
    shape = (256, 128)
    weights = {f"a.w{number}": noise(*shape, seed=number) for number in range(8)}
    with ts.open_store(tmp_path / "root", chunk_bytes=CHUNK_BYTES) as store:
        store.commit(1, weights)
        store.commit(2, {name: value + 0.01 * noise(*shape) for name, value in weights.items()}, mask={"*": "light"})
        checkpoint = store.checkout()
        sources = sources_of(checkpoint)
        whole, part = watched(checkpoint), watched(checkpoint)
        expected = {name: torch.zeros(shape) for name in weights}
        read_tensors(whole, [(sources[name], target) for name, target in expected.items()])
        rows: Box = ((64, 96), (0, 128))
        shards = {name: torch.zeros(32, 128) for name in weights}
        read_tensors(
            part,
            [(sources[name], Sharded(shape, torch.float32, (Part(rows, target),))) for name, target in shards.items()],
        )
    assert all(same_bits(shards[name], expected[name][64:96]) for name in weights)
    assert len(part.read) <= len(whole.read) / 8 + 2 * len(weights)


def test_parts_of_another_dtype_take_light_versions_cast(
    light: Checkpoint, decoded: Mapping[str, torch.Tensor]
) -> None:
    sources = sources_of(light)
    for name in ("a.rows", "a.prime", "exp_avg of a.rows", "b.whole"):
        shape = sources[name].shape
        box = tuple((extent // 3, extent - 1) for extent in shape)
        target = torch.zeros(extents(box), dtype=torch.float64)
        read_tensors(light._objects, [(sources[name], Sharded(shape, target.dtype, (Part(box, target),)))])
        assert same_bits(target, taken(decoded[name], box).double())
