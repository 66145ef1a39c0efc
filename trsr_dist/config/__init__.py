"""The run's configuration: one YAML file, dotted overrides, one dataclass-like model a section."""

from trsr_dist.config.loading import Config, check_key, dump_config, flat_settings, load_config

__all__ = ["Config", "check_key", "dump_config", "flat_settings", "load_config"]
