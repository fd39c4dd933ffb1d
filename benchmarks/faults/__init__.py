"""Faults that soak.py tries, a file for each kind."""
