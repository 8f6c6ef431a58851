"""as_on_gpus.py WORKER [ARGUMENT …]: a worker's cases on the ways that a GPU's gradients take, on a CPU.

torch's travel in buckets during the backward pass, and TensorFlow's are added up by Horovod where they are, in buckets;
they are so small that a model's gradients fill several. Those of Keras on torch go through the host, as workers that
share a GPU have it.
"""

import os
import runpy
import sys
from types import SimpleNamespace

from toolkit.adapters import _job

if os.environ.get("KERAS_BACKEND") == "torch":
    from toolkit.adapters import _keras_torch_ops

    _keras_torch_ops.core = SimpleNamespace(get_device=lambda: "played")
    _keras_torch_ops.check_place = lambda model: None
elif "torch" in " ".join(sys.argv[1:3]):
    from toolkit.adapters import _torch_buckets

    _job.reduces_on_gpu = lambda: True
    _torch_buckets.BYTES = 60
else:
    from toolkit.adapters import _reduction, _tensorflow_horovod

    _reduction.choose = lambda *_: None  # Horovod, also where a case asks for MPI
    _job.reduces_on_gpu = lambda: True
    _tensorflow_horovod._BUCKET = 100
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
