"""Fuzzing: whatever stands in a stranger's store is refused by an error of ours, or read, within bounds."""
