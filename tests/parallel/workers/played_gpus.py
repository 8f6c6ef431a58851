"""TensorFlow is told of GPUs that there are not, and prints what it would do: COUNT [WORD …] [OPTION …].

parts: they are parts of a GPU (MIG), and each worker sees its own alone; handed-out: whole GPUs, likewise.
nccl: Horovod says that it has it. limited: the script sets how much of a GPU's memory it takes.
touched: it has an operation run before start().
"""

import os
import sys

import horovod.tensorflow as hvd
import tensorflow as tf
from tensorflow.python.eager import context

import toolkit.adapters.tensorflow as dp
from toolkit import devices
from toolkit.options import RunOptions, parse

count, *sys.argv[1:] = sys.argv[1:]
words = {word for word in sys.argv[1:] if word in ("parts", "handed-out", "nccl", "limited", "touched")}
sys.argv = [argument for argument in sys.argv if argument not in words]
runtime = context.context()
runtime._initialize_physical_devices()
played = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in range(int(count))]
runtime._physical_devices += played
runtime._visible_device_list += played
runtime._memory_growth_map.update(dict.fromkeys(played))
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))


def identity(number):
    own = rank + 7 if words & {"parts", "handed-out"} else number
    return f"{own:032x}", f"0000:0{0 if 'parts' in words else own}:00.0"


devices.identity = identity
if "nccl" in words:
    hvd.nccl_built = lambda: True
if "limited" in words:
    tf.config.set_logical_device_configuration(played[rank], [tf.config.LogicalDeviceConfiguration(memory_limit=512)])
if "touched" in words:
    tf.constant(0)
options = parse(RunOptions, __doc__)
world = dp.start(**options.start)
gpu = runtime.config.gpu_options
seen = {"device": world.device, "shown": gpu.visible_device_list, "grows": gpu.allow_growth}
threads = tf.config.threading.get_intra_op_parallelism_threads()
for rank, told in enumerate(dp.gather((seen, threads))):
    if world.rank == 0:
        print("rank", rank, *told, flush=True)
dp.stop()
