"""Data-parallel training with Horovod: one contract for PyTorch, TensorFlow and Keras 3."""
