"""Plain data as JSON text that holds a checksum of itself, so that a changed byte is noticed."""

import hashlib
import json


def checksum_of(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content, indent=None):
    """A dict as JSON text with its own checksum."""
    return json.dumps(content | {"checksum": checksum_of(content)}, indent=indent) + "\n"


def unsealed(path):
    """The dict in a file that `sealed` wrote. Raises ValueError if it was changed. Earlier versions wrote no checksum."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("checksum", None) not in (None, checksum_of(content)):
        raise ValueError(f"{path} is damaged.")
    return content
