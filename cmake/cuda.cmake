# The module _cuda: kernels by nvcc, bindings by the host compiler, linked statically to the CUDA runtime, so that it
# is imported where there is no driver and no GPU.
include(CheckLanguage)
if(JACOBIAN_OPS_CUDA STREQUAL "AUTO")
  check_language(CUDA)
  set(build_cuda ${CMAKE_CUDA_COMPILER})
else()
  set(build_cuda ${JACOBIAN_OPS_CUDA})
endif()
if(NOT build_cuda)
  return()
endif()

set(JACOBIAN_OPS_CUDA_ARCHS "75;80;86;89;90;100;120" CACHE STRING
  "Compute capabilities to compile for, without the dot; others get PTX for sm_80, or sm_75 without newer ones")
# From sm_80 on the sources say the same to the compiler, which takes twice as long as the assembler: its PTX is made
# once and assembled for each.
set(codes_75 "")
set(codes_80 "")
foreach(arch IN LISTS JACOBIAN_OPS_CUDA_ARCHS)
  if(arch LESS 80)
    list(APPEND codes_75 sm_${arch})
  else()
    list(APPEND codes_80 sm_${arch})
  endif()
endforeach()
if(codes_80)
  list(APPEND codes_80 compute_80)
else()
  list(APPEND codes_75 compute_75)
endif()
list(JOIN codes_75 "," codes_75)
list(JOIN codes_80 "," codes_80)
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(jops_cuda OBJECT ${cuda_sources} csrc/cuda/module/runtime.cu)
target_include_directories(jops_cuda PRIVATE csrc)
target_compile_definitions(jops_cuda PRIVATE JOPS_ISA=cuda)
foreach(virtual 75 80)
  if(codes_${virtual})
    target_compile_options(jops_cuda PRIVATE --generate-code=arch=compute_${virtual},code=[${codes_${virtual}}])
  endif()
endforeach()
# Divisions to 2 ulp, as on the CPU: the exact one calls a routine for denormal numbers. A spill is an error. The math
# headers' pragmas are GCC's.
target_compile_options(jops_cuda PRIVATE -O3 -prec-div=false --diag-suppress=1675
  -Xptxas --warn-on-spills,--warn-on-local-memory-usage)

pybind11_add_module(_cuda NO_EXTRAS csrc/bindings.cpp csrc/checked.cpp csrc/names.cpp
  csrc/cuda/module/facts.cpp $<TARGET_OBJECTS:jops_cuda>)
set(built_for ${codes_75} ${codes_80})
list(JOIN built_for "," built_for)
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE
  JOPS_MODULE=_cuda JOPS_VERSION="${PROJECT_VERSION}" JOPS_CUDA_ARCHS="${built_for}")
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
