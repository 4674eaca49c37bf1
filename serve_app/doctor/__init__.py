"""Checks of a machine, and the knowledge base of faults that they point to."""
