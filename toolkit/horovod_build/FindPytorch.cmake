# Stands before Horovod's module of the same name (CMAKE_MODULE_PATH) and sets the same variables,
# for the CPU part of torch alone unless GPU operations are built. Horovod's own one asks for the CUDA
# toolkit as soon as torch was built with CUDA, as PyPI's is, and an nvcc is found; and fails then if
# the toolkit doesn't suit.

if("$ENV{HOROVOD_GPU_OPERATIONS}" STREQUAL "")
  set(Pytorch_CUDA FALSE)
  set(_Pytorch_EXTENSION "CppExtension")
else()
  set(Pytorch_CUDA TRUE)
  set(_Pytorch_EXTENSION "CUDAExtension")
endif()

execute_process(
  COMMAND "${PY_EXE}" -c "
import torch
from torch.utils.cpp_extension import ${_Pytorch_EXTENSION}
extension = ${_Pytorch_EXTENSION}('', [])
def cmake_set(name, *values):
    print(f'set({name} [==[' + ';'.join(values) + ']==])')
cmake_set('Pytorch_VERSION', torch.__version__)
cmake_set('Pytorch_INCLUDE_DIRS', *extension.include_dirs)
cmake_set('Pytorch_LIBRARY_DIRS', *extension.library_dirs)
cmake_set('_Pytorch_LIBRARY_NAMES', *extension.libraries)
cmake_set('Pytorch_CXX11', 'TRUE' if torch.compiled_with_cxx11_abi() else 'FALSE')
"
  OUTPUT_VARIABLE _Pytorch_FOUND_HERE
  ERROR_VARIABLE _Pytorch_ERROR)
cmake_language(EVAL CODE "${_Pytorch_FOUND_HERE}")

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Pytorch
  REQUIRED_VARS Pytorch_VERSION VERSION_VAR Pytorch_VERSION REASON_FAILURE_MESSAGE "${_Pytorch_ERROR}")
if(NOT PYTORCH_FOUND)
  return()
endif()

set(Pytorch_ROCM FALSE)
if(Pytorch_CXX11)
  set(Pytorch_COMPILE_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=1")
else()
  set(Pytorch_COMPILE_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=0")
endif()
set(Pytorch_LIBRARIES "")
foreach(name IN LISTS _Pytorch_LIBRARY_NAMES)
  find_library(FOUND_LIB_${name} NAMES ${name} HINTS ${Pytorch_LIBRARY_DIRS} REQUIRED)
  list(APPEND Pytorch_LIBRARIES "${FOUND_LIB_${name}}")
endforeach()
