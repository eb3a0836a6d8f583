"""Bytes: where objects lie, and how one layer version is laid out in them. Knows nothing of the catalog."""
