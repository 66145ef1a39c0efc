"""Benchmark suites, side by side with the alternatives. Each module has ``run(scale) -> list[Row]``."""
