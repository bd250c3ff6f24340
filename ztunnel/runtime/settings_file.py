"""A program's settings file, read whole: one YAML mapping."""

from __future__ import annotations

from pathlib import Path

from ztunnel.mesh.errors import ConfigError
from ztunnel.runtime.documents import DocumentError, read_yaml

MAX_FILE_BYTES = 1 << 20
"""A settings file over 1 MiB is somebody's mistake: they have forty lines."""


def read_settings(file: Path) -> dict[str, object]:
    """What a settings file says.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or is not one YAML mapping.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
        documents = list(read_yaml(content[: MAX_FILE_BYTES + 1]))
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from error
    except DocumentError as error:
        raise ConfigError([f"{file}: {error}"]) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError([f"{file}: larger than {MAX_FILE_BYTES} bytes"])
    if len(documents) > 1:
        raise ConfigError([f"{file}: {len(documents)} documents; one is expected"])
    settings = documents[0] if documents else {}
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError([f"{file}: a mapping of settings is expected"])
    return {str(key): value for key, value in settings.items()}
