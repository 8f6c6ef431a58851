"""as_on_gpus.py [--share | --carried] WORKER [ARGUMENT …]: a worker's cases on the ways that a GPU's gradients take.

On a CPU, or where HVDKIT_TEST_DEVICE says gpu on a real one.
torch's travel in buckets during the backward pass, and TensorFlow's are added up by Horovod where they are, in buckets;
they are so small that a model's gradients fill several. With --share torch's go through the host, as workers that share
a GPU have it; with --carried they travel in buckets, and are added up in the host's memory in NCCL's place.
"""

import os
import runpy
import sys

from toolkit.adapters import _job

share, carried = (sys.argv[1] == flag for flag in ("--share", "--carried"))
if share or carried:
    del sys.argv[1]
if os.environ.get("KERAS_BACKEND") == "torch" or "torch" in " ".join(sys.argv[1:3]):
    from toolkit.adapters import _torch_buckets, _torch_buffer

    class Elsewhere(_torch_buffer.Buffer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._elsewhere = True

    if share:
        from toolkit.adapters import _torch_average

        _torch_average.Buffer = Elsewhere
    else:
        _job.reduces_on_gpu = lambda: True
        _torch_buckets.BYTES = 60
    if carried:
        from tests.parallel.workers.carried import carry

        carry()
else:
    from toolkit.adapters import _reduction, _tensorflow_horovod

    _reduction.choose = lambda *_: None  # Horovod, also where a case asks for MPI
    os.environ["HVDKIT_TEST_CHOOSES"] = "nobody"
    _job.reduces_on_gpu = lambda: True
    _tensorflow_horovod._BUCKET = 100
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
