# Read by CMake right after Horovod's own `project()` call (CMAKE_PROJECT_INCLUDE), so that
# Horovod 0.28.1 builds against today's frameworks. Two lines of its source are corrected, in the
# copy that is built here.

if("$ENV{HOROVOD_GPU_OPERATIONS}" STREQUAL "")
  # A CPU build, whatever CUDA toolkit this machine has or lacks. Defined but false skips
  # Horovod's search for a CUDA compiler.
  set(CMAKE_CUDA_COMPILER "CMAKE_CUDA_COMPILER-NOTFOUND")
  set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit ON)
endif()

# Horovod asks for RelWithDebInfo; without debug information the wheel is a tenth of the size.
set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")
set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")

# Replaces a piece of Horovod's source, once.
function(hvdkit_correct name wrong right)
  set(file "${CMAKE_SOURCE_DIR}/horovod/common/${name}")
  file(READ "${file}" source)
  string(FIND "${source}" "${right}" corrected)
  if(NOT corrected EQUAL -1)
    return()
  endif()
  string(FIND "${source}" "${wrong}" place)
  if(place EQUAL -1)
    message(FATAL_ERROR "${file} is not that of Horovod 0.28.1: it has no ${wrong}")
  endif()
  string(REPLACE "${wrong}" "${right}" source "${source}")
  file(WRITE "${file}" "${source}")
endfunction()

# With Gloo, Horovod's stall inspector looks at no rank: the list of ranks is filled, and its length
# stays 0. A rank that doesn't come to a compiled step's all-reduce would be waited for without end.
hvdkit_correct(gloo/gloo_controller.cc "global_ranks_.reserve(size_);" "global_ranks_.resize(size_);")

# In each cycle the ranks' background threads meet. Horovod counts the cycle from when a thread set out for
# the meeting, so that one that was late once is as late each time after, and the others' threads wait for
# it on the cores that train. Counted from the meeting's end, which all see at once, they come together.
set(met "state.timeline_controller.MarkCyclesInTimelinePending();")
hvdkit_correct(operations.cc "${met}" "${met}
      state.last_cycle_start = std::chrono::steady_clock::now();")

set(HVDKIT_HERE "${CMAKE_CURRENT_LIST_DIR}")

# Waits until Horovod has defined its targets.
function(hvdkit_adjust_targets)
  # Torch and TensorFlow headers are C++17, and a C++14 gloo then fails to link
  # ("multiple definition of gloo::rendezvous::Store::kDefaultTimeout").
  foreach(target pytorch tensorflow gloo)
    if(TARGET ${target})
      set_target_properties(${target} PROPERTIES CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON)
    endif()
  endforeach()
  foreach(target horovod_cuda_kernels compatible_horovod_cuda_kernels)
    if(TARGET ${target})
      set_target_properties(${target} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
    endif()
  endforeach()

  # Serves only HOROVOD_ENABLE_XLA_OPS and needs headers that TensorFlow no longer ships.
  if(TARGET tensorflow)
    get_target_property(sources tensorflow SOURCES)
    list(FILTER sources EXCLUDE REGEX "xla_mpi_ops\\.cc$")
    if(NOT "$ENV{HOROVOD_GPU_OPERATIONS}" STREQUAL "")
      list(APPEND sources "${HVDKIT_HERE}/tensorflow_stream.cc")
    endif()
    set_target_properties(tensorflow PROPERTIES SOURCES "${sources}")
  endif()

  # Where the built libraries look for libmpi, and for NCCL, instead of the paths of the building environment.
  foreach(target pytorch tensorflow)
    if(TARGET ${target})
      set_target_properties(${target} PROPERTIES
        BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ENV{HVDKIT_RPATH}")
    endif()
  endforeach()
endfunction()

cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL hvdkit_adjust_targets)
