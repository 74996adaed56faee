"""URIs of a storage: which have more in them than a path, and what of them may be shown. Floor 0.

``s3://key:secret@bucket/path?endpoint_override=host:9000`` names a filesystem with its credentials and options, and a
path on it. A name cannot simply be put behind such a URI, and the whole of it is for nobody's eyes.
"""

from __future__ import annotations

import re

_LOGIN = re.compile(r"(?<=://)[^\s/@'\"?]*:[^\s@'\"]*@")
_SECRET_OPTION = re.compile(r"([?&][^\s=&]*(?:key|secret|token|password|sig)[^\s=&]*=)[^\s&'\"]+", re.IGNORECASE)


def has_more_than_a_path(uri: str) -> bool:
    """Tell whether credentials or options are in a URI; False for a path."""
    return "://" in uri and ("?" in uri or _LOGIN.search(uri) is not None)


def redacted(text: str) -> str:
    """Return a URI, or a text with URIs in it, without credentials."""
    return _SECRET_OPTION.sub(r"\1***", _LOGIN.sub("***@", text))
