"""The run's configuration: one YAML file, dotted overrides, one dataclass-like model a section."""

from trsr_dist.config.loading import check_key, dump_config, flat_settings, load_config
from trsr_dist.config.whole import Config

__all__ = ["Config", "check_key", "dump_config", "flat_settings", "load_config"]
