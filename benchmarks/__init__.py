"""Benchmark suites, side by side with the alternatives. Each suite has ``run(scale) -> list[Row]``."""
