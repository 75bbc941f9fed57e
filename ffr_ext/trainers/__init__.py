"""Feature flow regularization inside the trainers people already have.

* PyTorch Lightning: :class:`FFRCallback`, no change in the user's module (``pip install ffr-ext[lightning]``)
* Hugging Face: :class:`FFRTrainer` and :class:`FFRTrainerMixin` (``pip install ffr-ext[hf]``)
* accelerate, DistributedDataParallel, FSDP2, plain loops: :class:`ffr_ext.FeatureFlow` itself, see ``examples/``

Both take other regularizers too, or several (``regularizers=``, ``ffr_regularizers=``).

Lightning and transformers are imported when one of these names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .huggingface import FFRTrainer, FFRTrainerMixin
    from .lightning import FFRCallback

_HOMES = {"FFRCallback": "lightning", "FFRTrainer": "huggingface", "FFRTrainerMixin": "huggingface"}
_EXTRAS = {"lightning": "lightning", "huggingface": "hf"}

__all__ = ["FFRCallback", "FFRTrainer", "FFRTrainerMixin"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{home}", __name__)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}: pip install 'ffr-ext[{_EXTRAS[home]}]'", name=error.name
        ) from error
    return getattr(module, name)
