# Sets up the CUDA kernels. On success there is the target cuda_kernels, and cuda_version and
# cuda_archs are set; else cuda_reason says why not. Wrong values are errors.

# Code for 8.0 runs on 8.6 and 8.9, code for 10.0 on 10.3: the first of each generation is enough.
set(cuda_default_archs 80 90)
set(cuda_default_archs_since_12_8 100 120)

string(REGEX MATCHALL "[^ ,;]+" wanted_archs "${CONVNEST_CUDA_ARCHS}")
foreach(arch IN LISTS wanted_archs)
    if(NOT arch MATCHES "^[0-9]+$" OR arch LESS 80)
        message(FATAL_ERROR
            "CONVNEST_CUDA_ARCHS must be compute capabilities from 80 on, such as 80;90, "
            "got '${CONVNEST_CUDA_ARCHS}'")
    endif()
endforeach()

find_program(CONVNEST_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(NOT CONVNEST_NVCC)
    set(cuda_reason "nvcc was not found (looked in PATH, CUDACXX, CUDA_HOME and CUDA_PATH)")
    return()
endif()
if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${CONVNEST_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES 80)  # for CMake's own trial
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    set(cuda_reason "${CONVNEST_NVCC} does not compile with this C++ compiler")
    return()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    set(cuda_reason "it needs CUDA 12.0 or newer, ${CONVNEST_NVCC} is ${CMAKE_CUDA_COMPILER_VERSION}")
    return()
endif()
find_package(CUDAToolkit QUIET)
if(NOT TARGET CUDA::cudart_static)
    set(cuda_reason "the toolkit of ${CONVNEST_NVCC} has no static CUDA runtime")
    return()
endif()

if(NOT wanted_archs)
    set(wanted_archs ${cuda_default_archs})
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
        list(APPEND wanted_archs ${cuda_default_archs_since_12_8})
    endif()
endif()
list(REMOVE_DUPLICATES wanted_archs)
list(SORT wanted_archs COMPARE NATURAL)
# Machine code for each; PTX of the newest, for GPUs that are newer still.
list(TRANSFORM wanted_archs APPEND "-real" OUTPUT_VARIABLE compiled_archs)
list(GET wanted_archs -1 newest)
list(APPEND compiled_archs ${newest}-virtual)

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/*.cu)
add_library(cuda_kernels OBJECT ${cuda_sources})
target_include_directories(cuda_kernels PRIVATE csrc)
target_compile_options(cuda_kernels PRIVATE -Xfatbin=-compress-all)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake before 3.26 does not know that nvcc has it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set_target_properties(cuda_kernels PROPERTIES
    CUDA_ARCHITECTURES "${compiled_archs}"
    CUDA_STANDARD 20
    CUDA_VISIBILITY_PRESET hidden)

set(cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
list(JOIN wanted_archs " " cuda_archs)
