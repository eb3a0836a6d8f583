"""Ground floor: the words of tailorstore as pure data and pure functions.

Nothing here reads or writes anything. Imports only the standard library.
"""
