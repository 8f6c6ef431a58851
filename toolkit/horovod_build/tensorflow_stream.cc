// TensorFlow's own function of this name, which Horovod calls, is no longer in its wheel; this is what it did.
#include <cuda_runtime_api.h>

#include "xla/stream_executor/stream.h"

namespace stream_executor {
namespace gpu {

cudaStream_t AsGpuStreamValue(Stream* stream) {
  return static_cast<cudaStream_t>(stream->platform_specific_handle().stream);
}

}  // namespace gpu
}  // namespace stream_executor
