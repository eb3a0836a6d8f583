"""One command a module; each module holds its command under the name ``command``."""
