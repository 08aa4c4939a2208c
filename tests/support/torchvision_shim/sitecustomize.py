"""Makes torchvision importable beside a CPU build of torch; put this folder first on PYTHONPATH.

The public wheel is a CUDA build whose operators cannot load there, and its import stops at an operator without a
schema. Two schemas, declared right before torchvision is imported, are all that it asks for: its transforms are plain
torch. It has to be a sitecustomize, because the engines start processes of their own.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_KEPT: list[Any] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "torchvision" and not _KEPT:
            import torch  # type: ignore[import-not-found]

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(name + _SCHEMA)
            _KEPT.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
