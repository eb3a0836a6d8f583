"""Processes killed, interrupted, or cut off from power in the midst of what they do to a store.

``python -m tests.crash`` kills at every call, and prints a table; ``make crash`` runs it. The tests run a share of it.

- ``fuse`` counts calls and kills at one of them; ``places`` has stores to be damaged, and copies of them.
- ``content`` is what is committed, and how it must read back; ``scenarios`` what processes are killed at.
- ``campaign`` kills at one call after the other.
- ``disk`` says what a disk may hold after a power cut; ``power`` cuts it.
- ``interrupts`` sends SIGINT and SIGTERM.

All of it runs in programs of their own: they fork, and pytest's process has threads.
"""
