"""All kinds of cases."""

from tests.fuzz import configs, raw, shards
from tests.fuzz.running import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (raw.KIND, configs.KIND, shards.KIND)}
