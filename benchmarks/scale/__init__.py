"""A queue log of ten million rows, and what lies beyond one server: ``make bench-scale``."""
