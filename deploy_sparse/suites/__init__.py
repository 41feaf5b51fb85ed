"""Benchmark suites: which networks, in which forms, are timed where; and the running of them."""
