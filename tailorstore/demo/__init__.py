"""The whole story in a minute and a half: train, be killed in mid-commit, restore, train on.

``train`` is the part to copy from: a trainer that commits under a mask and takes up where it was stopped. ``model``
and ``text`` are what it trains; ``story`` starts it, kills it and starts it again. Uses the public API alone.
"""
