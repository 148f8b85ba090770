"""The one place that imports mosaicml-streaming, and deals with what stands in its way.

streaming 0.13 imports torchvision and transformers when it is imported, for features that nextpt
does not use. The torchvision on the registry is a CUDA build that fails beside CPU torch ("operator
torchvision::nms does not exist"), transformers is pinned below 5 and takes a second to import.
Unless the real package is there already, an empty stand-in serves for the length of the import and
is then taken away, so that nobody else mistakes it for the real one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator

# module -> names that streaming takes from it while it is imported
STAND_INS: dict[str, dict[str, tuple[str, ...]]] = {
    "torchvision": {
        "torchvision": (),
        "torchvision.datasets": ("VisionDataset",),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("to_tensor",),
    },
    "transformers": {
        "transformers": (),
        "transformers.feature_extraction_utils": ("BatchFeature",),
        "transformers.tokenization_utils_base": ("BatchEncoding",),
        "transformers.models": (),
        "transformers.models.auto": (),
        "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
    },
}


def import_streaming() -> types.ModuleType:
    """The `streaming` module.

    Also sets LOCAL_WORLD_SIZE, which the deepspeed launcher calls LOCAL_SIZE.

    LOCAL_SIZE comes first: the other may be inherited from a process that started this one. A wrong
    one would have every rank take itself for the first of its machine, and StreamingDataset wait
    for ever.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    with contextlib.ExitStack() as stack:
        for package, modules in STAND_INS.items():
            if package not in sys.modules:
                stack.enter_context(_stand_in(package, modules))
        return importlib.import_module("streaming")


@contextlib.contextmanager
def _stand_in(package: str, modules: dict[str, tuple[str, ...]]) -> Iterator[None]:
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
