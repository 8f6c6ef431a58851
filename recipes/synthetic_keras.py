"""Measure how many images or tokens a second Keras 3 trains on: ResNet-50, or a transformer of GPT-2's kind.

    horovodrun -np 2 python recipes/synthetic_keras.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/synthetic_keras.py --model transformer
    python recipes/synthetic_keras.py --precision bf16

Each worker trains on one batch of random data, over and over. On CPUs the models are small ones, without --size full.
KERAS_BACKEND=torch runs it on PyTorch in place of TensorFlow.
Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

import keras
from keras import layers

import toolkit.adapters.keras as dp  # distributed
from toolkit.options import parse
from toolkit.synthetic import SyntheticOptions, workload
from toolkit.throughput import measure

PRECISIONS = {"float32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}


def convolution(x, filters, size, stride=1):
    if stride > 1:  # where "same" would pad more on one side
        x = layers.ZeroPadding2D(size // 2)(x)
    x = layers.Conv2D(filters, size, stride, "valid" if stride > 1 else "same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def bottleneck(x, width, stride):
    y = layers.ReLU()(convolution(x, width, 1))
    y = layers.ReLU()(convolution(y, width, 3, stride))
    y = convolution(y, 4 * width, 1)
    same = stride == 1 and x.shape[-1] == 4 * width
    return layers.ReLU()(layers.Add()([y, x if same else convolution(x, 4 * width, 1, stride)]))


def resnet50(blocks, width, pixels, classes):
    images = keras.Input((pixels, pixels, 3))
    x = layers.ReLU()(convolution(images, width, 7, 2))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))
    for stage, count in enumerate(blocks):
        for block in range(count):
            x = bottleneck(x, width << stage, 2 if stage > 0 and block == 0 else 1)
    return keras.Model(images, layers.Dense(classes)(layers.GlobalAveragePooling2D()(x)))


def transformer(blocks, width, heads, length, vocabulary):
    tokens = keras.Input((length,), dtype="int64")
    initial = keras.initializers.RandomNormal(stddev=0.02)
    embedding = layers.ReversibleEmbedding(vocabulary, width, embeddings_initializer=initial)
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = embedding(tokens) + layers.Embedding(length, width, initial)(positions)
    for _ in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        y = layers.Dense(4 * width, "gelu")(y)
        x = x + layers.Dense(width)(y)
    return keras.Model(tokens, embedding(layers.LayerNormalization(epsilon=1e-5)(x), reverse=True))


def build_model(name, shape):
    return {"resnet50": resnet50, "transformer": transformer}[name](**shape)


def main():
    options = parse(SyntheticOptions, __doc__)
    world = dp.start(**options.start)  # distributed
    keras.mixed_precision.set_global_policy(PRECISIONS[options.precision])
    work = workload(options, world)
    x, y = dp.on_device(work.x, work.y)
    model = build_model(options.model, work.shape)
    optimizer = keras.optimizers.SGD(options.learning_rate)
    if options.precision == "fp16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed
    dp.broadcast_state(model, optimizer)  # distributed
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, cross_entropy, jit_compile=options.compile)

    def train_step():
        return model.train_on_batch(x, y)

    measure(train_step, model, optimizer, options=options, world=world, adapter=dp, work=work)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()
