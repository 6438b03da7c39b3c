"""A hook for MkDocs: search finds a public name before the longer ones it begins.

Rare words count more, so that otherwise `BatchNorm` finds `BatchNormParams` first, and
`batch_norm` finds `batch_norm_mask`.
"""

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority


@event_priority(-50)  # between the plugins search and offline, which write and copy it
def on_post_build(config: MkDocsConfig) -> None:
    """Raise the short names of the API in the index."""
    path = Path(config.site_dir) / "search/search_index.json"
    index = json.loads(path.read_text())
    entries = {
        entry["location"]: entry["title"].rpartition(".")[2]
        for entry in index["docs"]
        if "#jaxbn." in entry["location"]
    }
    for entry in index["docs"]:
        name = entries.get(entry["location"], "")
        longer = [other for other in entries.values() if other.startswith(name)]
        if name and any(other != name for other in longer):
            entry["boost"] = 12
    path.write_text(json.dumps(index, separators=(",", ":")))
