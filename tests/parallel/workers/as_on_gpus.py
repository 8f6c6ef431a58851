"""as_on_gpus.py WORKER [ARGUMENT …]: a worker's cases on the way that a GPU's gradients take through TensorFlow.

Horovod adds up where the tensors are, here on the CPU, in buckets so small that a model's gradients fill several.
"""

import runpy
import sys

from toolkit.adapters import _job, _tensorflow_ops

_job.reduces_on_gpu = lambda: True
_tensorflow_ops._BUCKET = 100
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
