"""The kinds of corpora, ours and those of other packages. Loads neither torch nor pydantic.

Routers and planners, which the layer alone needs too, are in `moetrain.moe.options`.
"""

from typing import Any

from moetrain.common.registry import Options, Registry

CORPORA: Registry[Any] = Registry(
    "corpus",
    {
        "local": ("moetrain.data.corpus:read_local", Options),
        "debian": ("moetrain.data.corpus:read_debian", Options),
        "folder": ("moetrain.data.corpus:read_folder", Options),
    },
    field="data.source",
)


def register_corpus(name: str, options: type[Options] | None = None) -> Any:
    """Returns a decorator that makes a corpus known as `data.source=NAME`: a function (data, left_out) that yields
    (domain, text, name of the document) in a fixed order. `data` is the section `data`, its own options included;
    `left_out.add(reason, name)` counts what it does not take.

    `options`: the dataclass of its options, `data.OPTION`; None: the function's attribute `Options`, if it has one.
    """
    return CORPORA.register(name, options)
