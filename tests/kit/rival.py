"""A process that commits when it is told to; :mod:`tests.test_conflicts` runs two of them on one branch.

``python -m tests.kit.rival ROOT NAME CATALOG`` reads commands from standard input, one a line, and answers each with a
line of JSON:

    prepare STEP   announce and write a commit, and stop where it would be published
    publish        publish it
    commit STEP    do all of that at once
"""

import json
import sys
import threading
from typing import Any

import torch

import tailorstore as ts


def weights(name: str, step: int) -> dict[str, torch.Tensor]:
    """Return what the rival of a name commits at a step."""
    value = float(step * 1000 + sum(map(ord, name)))
    return {"a.w": torch.full((50,), value), "b.w": torch.full((5,), value)}


class Rival:
    """Keeps a store open from command to command, as a trainer does."""

    def __init__(self, root: str, name: str, catalog: str | None) -> None:
        self._name = name
        self._store = ts.open_store(root, catalog=catalog)
        self._at_the_gate = threading.Event()
        self._gate = threading.Event()
        self._gate.set()
        self._outcome: dict[str, Any] = {}
        self._thread = threading.Thread()
        publish = self._store._catalog.publish

        def wait_and_publish(*args: Any) -> Any:
            self._at_the_gate.set()
            self._gate.wait()
            return publish(*args)

        self._store._catalog.publish = wait_and_publish  # type: ignore[method-assign,assignment]

    def prepare(self, step: int) -> dict[str, Any]:
        self._at_the_gate.clear()
        self._gate.clear()
        self._thread = threading.Thread(target=self._commit, args=(step,))
        self._thread.start()
        self._at_the_gate.wait(60)
        return {"waits": step}

    def publish(self) -> dict[str, Any]:
        self._gate.set()
        self._thread.join(60)
        return self._outcome

    def commit(self, step: int) -> dict[str, Any]:
        self._commit(step)
        return self._outcome

    def _commit(self, step: int) -> None:
        try:
            self._outcome = {"published": self._store.commit(step, weights(self._name, step)).id}
        except ts.TailorError as error:
            self._outcome = {"error": type(error).__name__, "message": str(error)}

    def close(self) -> None:
        self._store.close()


def main() -> int:
    root, name, *catalog = sys.argv[1:]
    rival = Rival(root, name, catalog[0] if catalog else None)
    for line in sys.stdin:
        match line.split():
            case ["prepare", step]:
                answer = rival.prepare(int(step))
            case ["publish"]:
                answer = rival.publish()
            case ["commit", step]:
                answer = rival.commit(int(step))
            case _:
                raise ValueError(line)
        print(json.dumps(answer), flush=True)  # noqa: T201
    rival.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
