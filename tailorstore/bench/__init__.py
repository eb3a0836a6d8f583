"""Measurements: one run, side by side with what people use today, on the machine and storage at hand.

Uses the public API as a trainer would. Imports torch, and the libraries it compares with.
"""
