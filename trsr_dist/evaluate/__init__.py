"""Evaluation: sharded scoring, metrics, the control, baselines, the report."""
