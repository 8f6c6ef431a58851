"""Classes made at run time for objects of Keras' that are changed in place."""

from __future__ import annotations

from typing import Any

from keras.src.api_export import REGISTERED_OBJS_TO_NAMES
from keras.src.saving.object_registration import GLOBAL_CUSTOM_NAMES


def mixed_in(mixin: type, kind: type, **members: Any) -> type:
    """A class like `kind`, with `mixin` before it; Keras saves its objects by the name of `kind`.

    Args:
        mixin: a class without a constructor of its own.
        kind: Keras' class, or one of the user's.
        members: attributes of the new class.
    """
    own = {"__module__": kind.__module__, "__doc__": kind.__doc__, **members}
    made = type(kind.__name__, (mixin, kind), own)
    for names in (GLOBAL_CUSTOM_NAMES, REGISTERED_OBJS_TO_NAMES):
        if kind in names:  # the name goes on meaning the plain class
            names[made] = names[kind]
    return made


def change_class(changed: Any, kind: type) -> None:
    """Make an object one of another class, past Keras' own `__setattr__`, which would track that as a part of it."""
    object.__setattr__(changed, "__class__", kind)
