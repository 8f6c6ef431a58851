"""Each rank tells its framework's threads: `threads_cases.py torch|tensorflow [how the script itself has set them]`."""

import sys

framework, *called = sys.argv[1:]
threads = [int(number) for number in called]
if framework == "torch":
    import torch

    import toolkit.adapters.torch as dp

    if threads:
        torch.set_num_threads(threads[0])
else:
    import tensorflow as tf

    import toolkit.adapters.tensorflow as dp

    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads[0])
        tf.config.threading.set_inter_op_parallelism_threads(threads[1])
dp.start(verbose=True)
if framework == "torch":
    found = [torch.get_num_threads()]
else:
    found = [tf.config.threading.get_intra_op_parallelism_threads()]
    found.append(tf.config.threading.get_inter_op_parallelism_threads())
print("FOUND", *found, flush=True)
dp.stop()
