"""The only place that makes prompt text. Pure: no I/O, no torch; tokenizers come in as arguments."""
