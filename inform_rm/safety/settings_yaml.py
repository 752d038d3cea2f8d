"""Reading a YAML file of settings from a stranger: plain values only, and no file that grows when it is read."""

from pathlib import Path
from typing import Any

from inform_rm.errors import InputError

_MOST_BYTES = 1 << 20  # there are some 70 settings; PyYAML takes about 10 s for a MiB


def read_settings_yaml(path: str | Path) -> Any:
    """The one document of a YAML file, of at most 1 MiB, without tags, merge keys or keys that stand twice.

    Anchors may be used; what they repeat is shared, not copied.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader, which makes no Python objects, without what it does in silence."""

        def flatten_mapping(self, node: Any) -> None:
            # Merged mappings are copied: ten lines of them fill any memory.
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", key.start_mark)
                if key.tag == "tag:yaml.org,2002:value":
                    key.tag = "tag:yaml.org,2002:str"

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep=deep)
            if len(found) < len(node.value):
                names = [str(key.value)[:80] for key, _ in node.value]
                twice = sorted({name for name in names if names.count(name) > 1}) if len(names) <= 1000 else []
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key stands twice: {', '.join(twice[:3])}", node.start_mark
                )
            return found

    try:
        size = Path(path).stat().st_size
        if not Path(path).is_file():
            raise InputError(f"{path}: is a folder, pipe or device, not a file. Pass a YAML file of settings.")
        if size > _MOST_BYTES:
            raise InputError(f"{path}: has {size} bytes; settings have at most {_MOST_BYTES}.")
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Pass a YAML file of settings.") from None
    # Dates and numbers that are none, unhashable keys and the like raise what Python raises for them.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())[:500]}") from None
