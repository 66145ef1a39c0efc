"""All kinds of cases."""

from tests.fuzz import configs, models, raw, servers, shards
from tests.fuzz.running import Kind

KINDS: dict[str, Kind] = {kind.KIND.name: kind.KIND for kind in (raw, configs, shards, models, servers)}
