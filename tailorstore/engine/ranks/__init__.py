"""The processes that train together, and how they commit and restore together."""
