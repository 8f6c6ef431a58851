"""A Keras 3 optimizer made to average gradients over all ranks, on any backend.

Keras does clipping, weight decay, loss scaling, accumulation and weight averaging (EMA) behind
`Optimizer.apply`, and both `fit` and `apply_gradients` call that. So averaging in front of `apply`
makes all of them act on the averaged gradients.
"""

from __future__ import annotations

import gc
import warnings
from functools import partial
from typing import Any

import keras
from keras.src.backend.common.stateless_scope import in_stateless_scope

from toolkit.adapters._keras_classes import change_class, mixed_in
from toolkit.errors import UsageError

_LossScaleOptimizer = keras.optimizers.LossScaleOptimizer


def distribute(
    optimizer: Any,
    model: Any,
    average: Any,
    accumulation_steps: int,
    clip_norm: float | None,
) -> Any:
    """Change the optimizer's class, in place, to one that averages gradients before it applies them.

    Args:
        optimizer: an instance of a `keras.optimizers.Optimizer`.
        model: the model that it trains; a Keras model is kept from compiling its train step with XLA.
        average: the backend's `GradientAverager`.
        accumulation_steps: goes to `gradient_accumulation_steps` where it is above 1.
        clip_norm: goes to `global_clipnorm` where it is not None.

    Raises:
        UsageError: the optimizer, or an option for it, can't be used.
    """
    _check(optimizer)
    if isinstance(model, keras.Model):
        _keep_from_xla(model)
    _set_options(optimizer, accumulation_steps, clip_norm)
    change_class(optimizer, mixed_in(_Distributed, type(optimizer), _average=average))
    return optimizer


def plain_class(optimizer: Any) -> Any:
    """The class that an optimizer had before `distribute`."""
    kind = type(optimizer)
    return kind.__mro__[2] if issubclass(kind, _Distributed) else kind  # itself, _Distributed, the plain one


def is_distributed(optimizer: Any) -> bool:
    """Whether `distribute` has seen this optimizer."""
    return isinstance(optimizer, _Distributed)


def require_distributed(model: Any) -> None:
    """Raise `UsageError` where the model would train with an optimizer that `distribute` has not seen."""
    if not is_distributed(model.optimizer):
        raise UsageError(
            f"the model is compiled with a plain {type(model.optimizer).__name__}, which trains each rank on its own: "
            "optimizer = distribute(optimizer, model), then compile(optimizer=optimizer), also after load_model()."
        )


class _Distributed:
    """Mixed in before an optimizer's own class by `distribute`; has no constructor of its own."""

    _average: Any
    built: bool
    name: str
    _trainable_variables: list[Any]

    @property
    def passes_per_step(self) -> int:
        """Passes whose gradients are accumulated, by `distribute` or by the optimizer's own option."""
        inner = getattr(self, "inner_optimizer", self)
        return getattr(inner, "gradient_accumulation_steps", None) or 1

    @property
    def compression(self) -> str:
        """The `compression` of `distribute`."""
        return self._average.compression

    @property
    def reducer(self) -> str | None:
        """Who adds up the gradients; see `toolkit.adapters._reduction.Averager`."""
        return self._average.reducer

    @reducer.setter
    def reducer(self, reducer: str) -> None:
        self._average.reducer = reducer

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Update the variables from the mean of all ranks' gradients."""
        grads = list(grads)
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            raise UsageError(f"apply() was given {len(grads)} gradients for {len(variables)} variables.")
        if not grads:
            return None
        means = self._average(grads, variables)
        apply = partial(super().apply, means, variables)  # type: ignore[misc]
        if isinstance(self, _LossScaleOptimizer):  # which leaves out such steps by itself
            return apply()
        if not self.built:  # variables can't be made where it is undecided whether the step is taken
            with keras.name_scope(self.name, caller=self):
                self.build(variables)  # type: ignore[attr-defined]
        return self._average.unless_broken(means, grads, variables, apply)

    def stateless_apply(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a function without side effects has no place for a collective operation."""
        raise UsageError("stateless_apply() can't average gradients over the ranks: use apply() or apply_gradients().")

    def __setattr__(self, name: str, value: Any) -> None:
        # A LossScaleOptimizer sets this on the optimizer that it wraps. Wrapped, ours would average only on
        # those ranks whose own gradients are finite, and the job would hang.
        if name == "loss_scale_factor":
            raise UsageError(
                "a distributed optimizer can't be wrapped, and compile() wraps one under mixed_float16: "
                "pass keras.optimizers.LossScaleOptimizer(optimizer) to distribute(), or compile with "
                "auto_scale_loss=False."
            )
        if name == "learning_rate" and isinstance(value, float) and (variable := self._tensorflows_rate()) is not None:
            variable.assign(value, read_value=False)  # what Keras does, in a third of the time: loops set it each step
            return
        super().__setattr__(name, value)

    def _tensorflows_rate(self) -> Any:
        """TensorFlow's own variable, to which a rate is assigned; None: there is none, or more to do."""
        variable = vars(self).get("_learning_rate")  # or a schedule, which can't be set to a number
        plain = type(self).learning_rate is keras.optimizers.Optimizer.learning_rate  # type: ignore[attr-defined]
        if not plain or not isinstance(variable, keras.Variable) or keras.backend.backend() != "tensorflow":
            return None
        return None if in_stateless_scope() else variable._value


def _check(optimizer: Any) -> None:
    kind = type(optimizer)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        found = repr(optimizer) if isinstance(optimizer, str) else f"a {kind.__module__}.{kind.__name__}"
        raise UsageError(
            f"the optimizer is {found}: give an instance of a keras.optimizers.Optimizer, "
            "or use the adapter of its framework."
        )
    if isinstance(optimizer, _Distributed):
        raise UsageError("this optimizer is distributed already: call distribute() once.")
    if hasattr(optimizer, "_HAS_AGGREGATE_GRAD"):
        raise UsageError("this optimizer was wrapped by Horovod's DistributedOptimizer: pass the plain optimizer.")
    if kind.apply_gradients is not keras.optimizers.Optimizer.apply_gradients:
        raise UsageError(
            f"{kind.__name__} has its own apply_gradients(), which may pass by the averaging in apply(): "
            "override apply() or update_step() instead."
        )
    for holder in gc.get_referrers(optimizer):  # an object, or the dict of its attributes
        found = vars(holder) if isinstance(holder, _LossScaleOptimizer) else holder
        if isinstance(found, dict) and found.get("inner_optimizer") is optimizer and "dynamic_growth_steps" in found:
            raise UsageError("this optimizer is inside a LossScaleOptimizer: pass that one to distribute().")


def _set_options(optimizer: Any, accumulation_steps: int, clip_norm: float | None) -> None:
    inner = optimizer.inner_optimizer if isinstance(optimizer, _LossScaleOptimizer) else optimizer
    if isinstance(inner, keras.optimizers.MultiOptimizer) and (accumulation_steps > 1 or clip_norm is not None):
        raise UsageError("a MultiOptimizer takes no accumulation_steps or clip_norm: set them on its optimizers.")
    if accumulation_steps > 1 and inner.gradient_accumulation_steps:
        raise UsageError(
            f"accumulation_steps={accumulation_steps} and the optimizer's own "
            f"gradient_accumulation_steps={inner.gradient_accumulation_steps}: give one of them."
        )
    if accumulation_steps > 1 and inner.built:
        raise UsageError("accumulation_steps for an optimizer that is built already: call distribute() before that.")
    own = {name: getattr(inner, name) for name in ("clipnorm", "global_clipnorm", "clipvalue")}
    own = {name: value for name, value in own.items() if value is not None}
    if clip_norm is not None and own:
        raise UsageError(f"clip_norm={clip_norm} and the optimizer's own {own}: give one of them.")
    if accumulation_steps > 1:
        inner.gradient_accumulation_steps = accumulation_steps
    if clip_norm is not None:
        inner.global_clipnorm = clip_norm


def _keep_from_xla(model: Any) -> None:
    """Make `jit_compile="auto"` mean no XLA for this model; True stays True and is refused in the first step."""
    if model.compiled:
        if model.jit_compile and keras.backend.backend() == "tensorflow":
            if not model._resolve_auto_jit_compile():
                raise UsageError("the model is compiled with jit_compile=True, which can't hold Horovod: use False.")
            warnings.warn("the model was compiled for XLA, which can't hold Horovod: XLA is off now.", stacklevel=4)
            model.jit_compile = False
        model.train_function = None  # one that is traced already would go on without averaging
    model._resolve_auto_jit_compile = lambda: False
