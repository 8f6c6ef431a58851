"""TensorFlow is told of GPUs that there are not, and prints what it would do: COUNT [touched] [parts] [OPTION …].

With parts they are parts of a GPU (MIG), and each worker sees its own alone.
"""

import os
import sys

import tensorflow as tf
from tensorflow.python.eager import context

import toolkit.adapters.tensorflow as dp
from toolkit import devices
from toolkit.options import RunOptions, parse

count, *sys.argv[1:] = sys.argv[1:]
parts = "parts" in sys.argv[1:] and not sys.argv.remove("parts")
touched = "touched" in sys.argv[1:] and not sys.argv.remove("touched")
runtime = context.context()
runtime._initialize_physical_devices()
played = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in range(int(count))]
runtime._physical_devices += played
runtime._visible_device_list += played
runtime._memory_growth_map.update(dict.fromkeys(played))
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
devices.identity = lambda number: (f"{rank + 7 if parts else number:032x}", f"0000:0{0 if parts else number}:00.0")
if touched:
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
