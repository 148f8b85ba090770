"""The only module that imports mosaicml-streaming; works around its import-time needs.

streaming 0.13 imports torchvision and transformers when it is imported, for features that nextpt
does not use. The torchvision on the registry is a CUDA build that fails beside CPU torch ("operator
torchvision::nms does not exist"), and transformers is pinned below 5 and takes a second to import.
Unless the real package is imported already, an empty stand-in takes its place during the import and
is removed afterwards, so that nothing else takes it for the real one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

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


def import_streaming(module: str = "streaming") -> Any:
    """Import mosaicml-streaming, or one of its modules, without what it does not need.

    Also sets LOCAL_WORLD_SIZE from LOCAL_SIZE, the name that the deepspeed launcher uses.
    LOCAL_SIZE wins because LOCAL_WORLD_SIZE may be inherited from the process that started this
    one. A wrong value makes every rank take itself for the first of its machine, and
    StreamingDataset hangs.

    Args:
        module: Full name of the module.

    Returns:
        The module. Its types are unknown to a type checker.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    if module in sys.modules:
        return sys.modules[module]
    with contextlib.ExitStack() as stack:
        for package, modules in STAND_INS.items():
            if package not in sys.modules:
                stack.enter_context(_stand_in(package, modules))
        import streaming  # noqa: F401 - the import that tests/house checks for

        return importlib.import_module(module)


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
