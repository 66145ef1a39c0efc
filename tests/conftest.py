"""The libraries' environment, as the entry points set it, before any test imports torch."""

from trsr_dist.environment import prepare_process

prepare_process(num_threads=1)
