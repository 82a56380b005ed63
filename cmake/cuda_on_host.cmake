# The CUDA sources compiled by the host compiler, for tests: tests/cuda_on_host/README.md. The module _cuda_on_host
# has the interface of _cuda; _broken has kernels with planted mistakes, and _words tests the words of device code one
# by one. JACOBIAN_OPS_CUDA_ON_HOST says which variant: plain, checked or sanitize.
set(variants plain checked sanitize)
if(NOT JACOBIAN_OPS_CUDA_ON_HOST IN_LIST variants)
  message(FATAL_ERROR "JACOBIAN_OPS_CUDA_ON_HOST: allowed ${variants}, got ${JACOBIAN_OPS_CUDA_ON_HOST}")
endif()
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "JACOBIAN_OPS_CUDA_ON_HOST needs GCC, got ${CMAKE_CXX_COMPILER_ID}")
endif()

set(shim ${PROJECT_SOURCE_DIR}/tests/cuda_on_host)
add_library(cuda_on_host_flags INTERFACE)
target_include_directories(cuda_on_host_flags INTERFACE csrc ${shim})
target_compile_definitions(cuda_on_host_flags INTERFACE JOPS_ISA=cuda)
target_compile_options(cuda_on_host_flags INTERFACE
  -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas)
# -g1: lines for messages, no more.
set(kernel_options -O1 -g1)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  target_compile_options(cuda_on_host_flags INTERFACE -mf16c -mfma)
endif()
if(JACOBIAN_OPS_CUDA_ON_HOST STREQUAL "sanitize")
  # A null pointer faults by itself, a pointer that wrapped is caught where it is used, and there are no virtual
  # functions: without these checks, and with those of addresses in calls, compiling takes half of the time.
  list(APPEND kernel_options -fno-omit-frame-pointer --param asan-instrumentation-with-call-threshold=0
    -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow,vptr -fno-sanitize-recover=all)
  target_link_options(cuda_on_host_flags INTERFACE -fsanitize=address,undefined)
elseif(JACOBIAN_OPS_CUDA_ON_HOST STREQUAL "checked")
  target_compile_definitions(cuda_on_host_flags INTERFACE CUDA_ON_HOST_CHECKED)
  set(machine_checks ${shim}/shadow.cpp)
  # Calls at every access of kernels, which shadow.cpp answers: ThreadSanitizer itself is not linked. Vectors would join
  # the accesses of different iterations.
  set(kernel_checks -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-vectorize)
endif()

# Compiled apart from the kernels, as its own accesses are not theirs.
add_library(cuda_on_host STATIC ${shim}/fiber.cpp ${shim}/machine.cpp ${machine_checks})
target_link_libraries(cuda_on_host PUBLIC cuda_on_host_flags ${CMAKE_DL_LIBS})
target_compile_options(cuda_on_host PRIVATE ${kernel_options})

# A Python module of the .cu files `kernels` and of other sources.
function(add_cuda_on_host_module name kernels)
  set(wrapped "")
  foreach(kernel IN LISTS kernels)
    # LANGUAGE of a .cu file would hold for the build by nvcc too.
    get_filename_component(stem ${kernel} NAME_WE)
    set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/${name}/${stem}.cpp)
    file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${kernel}\"\n" @ONLY)
    list(APPEND wrapped ${wrapper})
  endforeach()
  add_library(${name}_kernels OBJECT ${wrapped})
  target_compile_options(${name}_kernels PRIVATE ${kernel_options} ${kernel_checks})
  target_link_libraries(${name}_kernels PRIVATE cuda_on_host_flags)
  pybind11_add_module(${name} NO_EXTRAS ${ARGN} ${shim}/facts.cpp $<TARGET_OBJECTS:${name}_kernels>)
  target_compile_definitions(${name} PRIVATE JOPS_MODULE=${name} JOPS_VERSION="${PROJECT_VERSION}"
    CUDA_ON_HOST_VARIANT="${JACOBIAN_OPS_CUDA_ON_HOST}")
  target_compile_options(${name} PRIVATE -O1)
  target_link_libraries(${name} PRIVATE cuda_on_host)
endfunction()

file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_cuda_on_host_module(_cuda_on_host "${cuda_kernels}"
  csrc/bindings.cpp csrc/checked.cpp csrc/names.cpp ${shim}/backend.cpp)
add_cuda_on_host_module(_broken ${shim}/broken.cu ${shim}/broken.cpp)
add_cuda_on_host_module(_words ${shim}/words.cu ${shim}/words.cpp)
