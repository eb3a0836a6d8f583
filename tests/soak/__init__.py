"""Many processes on one store for as long as one likes: ``python -m tests.soak``; see :mod:`tests.soak.__main__`."""
