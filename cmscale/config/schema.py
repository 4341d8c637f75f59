"""Makes the JSON Schema of a config file, which editors check and explain configs by."""

from typing import Any

from cmscale.config.models import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ID = "urn:cmscale:config"


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file: every key with its description, type, bounds and default."""
    found = Config.model_json_schema()
    return {"$schema": DIALECT, "$id": ID, **found, "title": "Config of cmscale"}
