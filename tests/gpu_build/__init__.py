"""Builds Horovod with CUDA and NCCL for real and looks at what came of it: `make test-gpu-build`."""
