"""A driver, NVML and NCCL that are played by stubs, for programs started with their directory in LD_LIBRARY_PATH.

What they answer stands in the environment: STUB_VERSION, STUB_INIT, STUB_GPUS (names, split by |), STUB_MODE,
STUB_APART (the numbers of two GPUs, such as 01), STUB_HANG, STUB_CRASH, STUB_NCCL, STUB_BUS (of GPUs, split by |).
"""

import subprocess

_CUDA = r"""
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static const char *told(const char *name, const char *otherwise) { return getenv(name) ? getenv(name) : otherwise; }
static void item(char *text, int length, const char *items, int number) {
    while (number) number -= *items++ == '|';
    size_t size = strcspn(items, "|");
    if (size >= (size_t)length) size = length - 1;
    memcpy(text, items, size);
    text[size] = 0;
}
int cuDriverGetVersion(int *version) { *version = atoi(told("STUB_VERSION", "13000")); return 0; }
int cuInit(unsigned flags) {
    if (getenv("STUB_HANG")) pause();
    if (getenv("STUB_CRASH")) abort();
    return atoi(told("STUB_INIT", "0"));
}
int cuGetErrorName(int number, const char **text) { *text = "CUDA_ERROR_OF_THE_STUB"; return 0; }
int cuDeviceGetCount(int *count) {
    const char *names = told("STUB_GPUS", "NVIDIA Stub 80GB");
    for (*count = *names ? 1 : 0; *names; names++) *count += *names == '|';
    return 0;
}
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    item(name, length, told("STUB_GPUS", "NVIDIA Stub 80GB"), device);
    return 0;
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = 16 * device + i;
    return 0;
}
int cuDeviceGetPCIBusId(char *text, int length, int device) {
    item(text, length, told("STUB_BUS", "0000:01:00.0|0000:02:00.0"), device);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 20 ? atoi(told("STUB_MODE", "0")) : 0;
    return 0;
}
int cuDeviceCanAccessPeer(int *can, int one, int other) {
    const char *apart = told("STUB_APART", "");
    *can = !(*apart && one == apart[0] - '0' && other == apart[1] - '0');
    return 0;
}
"""
# Each look at how busy a GPU is finds one percent more than the one before: 50 the first GPU, 60 the second.
_NVML = r"""
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strcpy(text, "580.1.2"); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    const char *known[] = {"GPU-00010203-0405-0607-0809-0a0b0c0d0e0f", "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"};
    for (long number = 0; number < 2; number++) {
        *device = (void *)number;
        if (!strcmp(uuid, known[number])) return 0;
    }
    return 6;
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned found[2]) {
    static unsigned looks;
    found[0] = 50 + 10 * (long)device + looks++;
    found[1] = 1;
    return 0;
}
"""
_NCCL = r"""
#include <stdlib.h>
int ncclGetVersion(int *version) { *version = getenv("STUB_NCCL") ? atoi(getenv("STUB_NCCL")) : 22809; return 0; }
"""
LIBRARIES = {"libcuda.so.1": _CUDA, "libnvidia-ml.so.1": _NVML, "libnccl.so.2": _NCCL}


def build(directory, libraries=LIBRARIES):
    """Make the stubs; the compiler's error where it can't."""
    for name, source in libraries.items():
        words = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", directory / name]
        subprocess.run(words, input=source, text=True, check=True, capture_output=True)
